# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on a CPU, which MONAI's `amp` leaves to CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

__all__ = ["CpuAutocast", "CpuDtype", "cpu_autocast"]

CpuDtype = Literal["float32", "bfloat16"]


class CpuAutocast:
    """Train on a CPU with the networks' convolutions in bfloat16, as `amp` does on a GPU.

    The student's forward pass in training is in it, and the teacher's of a `DistillationHandler`. Weights, optimizer,
    losses and what they are given, validation and the teacher's check stay in float32. On a processor with AMX or
    AVX-512 BF16 a step of a small 3-D network is several times faster; on others bfloat16 is slower.

    Args:
        dtype: `bfloat16`, or `float32`, which changes nothing.

    Raises:
        ValueError: another type.

    Example:
        >>> CpuAutocast("bfloat16").dtype
        'bfloat16'
    """

    def __init__(self, dtype: CpuDtype = "float32") -> None:
        if dtype not in get_args(CpuDtype):
            raise ValueError(f"`dtype` must be one of {get_args(CpuDtype)}, got {dtype!r}.")
        self.dtype = dtype
        self._hooks: list[Any] = []
        self._context = _context(False)

    def attach(self, engine: Engine) -> None:
        """Register on a trainer; no effect on other devices than the CPU."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Any) -> None:
        self._finish(engine)                                       # hooks of a run that broke off
        is_on = self.dtype == "bfloat16" and torch.device(engine.state.device).type == "cpu"
        engine.state.cpu_autocast = is_on
        if is_on:
            self._hooks = [
                engine.network.register_forward_pre_hook(self._enter),
                engine.network.register_forward_hook(self._leave, always_call=True),
            ]

    def _enter(self, network: nn.Module, _inputs: Any) -> None:
        self._context = _context(network.training)                 # validation stays in float32
        self._context.__enter__()

    def _leave(self, _network: nn.Module, _inputs: Any, output: Any) -> Any:
        self._context.__exit__(None, None, None)
        return output.float() if isinstance(output, Tensor) else output

    def _finish(self, engine: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        engine.state.cpu_autocast = False


def cpu_autocast(engine: Any) -> AbstractContextManager[None]:
    """The context in which the trainer's other networks compute, where `CpuAutocast` is on; else one without effect."""
    return _context(getattr(engine.state, "cpu_autocast", False))


def _context(enabled: bool) -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
