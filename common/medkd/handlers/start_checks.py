# SPDX-License-Identifier: Apache-2.0
"""What must hold before the first step, or a distillation would silently be none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from medkd.losses.base import DistillationLoss
from medkd.taps import unwrap

__all__ = ["check_optimizer", "refuse_shared", "with_state"]

logger = logging.getLogger(__name__)


def check_optimizer(optimizer: Any, student: nn.Module, losses: Sequence[DistillationLoss]) -> None:
    """Refuse an optimizer that would leave learnable heads as they are; warn of weights of the student that it lacks.

    Args:
        optimizer: with `param_groups`, or a wrapper that has the real one as `optimizer`.
        student: the network that is trained, possibly wrapped.
        losses: those that have a weight.

    Raises:
        ValueError: a trainable parameter of a loss is in no group.
    """
    held = _held_by(optimizer)
    if held is None:
        return
    lacking = [
        f"{type(loss).__name__}.{name}"
        for loss in losses for name, value in loss.named_parameters() if value.requires_grad and id(value) not in held
    ]
    if lacking:
        raise ValueError(
            "`optimizer` must hold all trainable parameters of the distillation losses, got one without "
            f"{_few(lacking)}, which would stay random: the student would imitate a random projection. Build it over "
            "`medkd.losses.base.trainable_parameters(student, loss)`, with the very loss that the handler has."
        )
    trainable = [(name, value) for name, value in unwrap(student).named_parameters() if value.requires_grad]
    left = [name for name, value in trainable if id(value) not in held]
    if left:
        logger.warning(
            "%d of %d trainable parameter tensors of the student are not in the optimizer and stay as they are: %s.",
            len(left), len(trainable), _few(left),
        )


def _held_by(optimizer: Any) -> set[int] | None:
    """Ids of the parameters that are optimized; None where that cannot be told."""
    seen: list[Any] = []
    while not hasattr(optimizer, "param_groups"):
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None or any(optimizer is one for one in seen):
            return None
    return {id(value) for group in optimizer.param_groups for value in group["params"]}


def refuse_shared(teacher: nn.Module, others: Mapping[str, nn.Module]) -> None:
    """Refuse a teacher that has a part in common with what is trained, before it is frozen.

    Parameters and buffers are in common when they are one object or one memory; modules without either only if they
    behave differently in training, as dropout does.

    Args:
        teacher: not frozen yet.
        others: what to call each of the other modules -> the module, possibly wrapped.

    Raises:
        ValueError: the message names what is shared.
    """
    own = dict(_parts(unwrap(teacher)))
    for name, module in others.items():
        shared = [path for key, path in _parts(unwrap(module)) if key in own]
        if shared:
            what = "be another object than" if unwrap(module) is unwrap(teacher) else "share nothing with"
            raise ValueError(
                f"`teacher` must {what} {name}, got both with {_few(shared)}: freezing the teacher would freeze these "
                "for good, and each step would change the teacher. Give it a copy of its own: copy.deepcopy(...)."
            )


def _parts(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """What identifies each tensor and each module whose mode matters, with its path."""
    for path, value in [*module.named_parameters(), *module.named_buffers()]:
        yield ("object", id(value)), path
        if (memory := _memory(value)) is not None:
            yield memory, path
    for path, part in module.named_modules():
        code = getattr(getattr(type(part), "forward", None), "__code__", None)
        if code is not None and "training" in code.co_names:
            yield ("object", id(part)), path or type(part).__name__


def _memory(value: Tensor) -> Any:
    if is_lazy(value) or not value.numel() or value.layout is not Tensor().layout:
        return None
    address = value.untyped_storage().data_ptr()
    return ("memory", str(value.device), address) if address else None


def with_state(losses: Iterable[DistillationLoss]) -> list[nn.Module]:
    """Those losses that a checkpoint must hold: with learnable heads, or with a memory."""
    return [loss for loss in losses if loss.state_dict()]


def _few(names: Iterable[str], most: int = 5) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - most} more" if len(unique) > most else ""
    return ", ".join(repr(name) for name in unique[:most]) + more
