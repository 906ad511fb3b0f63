# SPDX-License-Identifier: Apache-2.0
"""Stop before a NaN reaches the weights, and say where it came from."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import Tensor

__all__ = ["NanGuard", "NonFiniteLossError"]


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite."""


class NanGuard:
    """Raise `NonFiniteLossError` before backward when the loss is not finite, naming the term and the cases.

    The step is not taken: weights and the last checkpoint stay good. Place it behind the `DistillationHandler`.

    Args:
        image_key: key of the batch whose metadata names the files.
    """

    def __init__(self, image_key: str = "image") -> None:
        self.image_key = image_key

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        output = engine.state.output
        loss = output["loss"].detach()
        if bool(torch.isfinite(loss)):
            return
        terms = [key for key in output if key == "supervised_loss" or key.startswith("kd/")]
        broken = [f"{key} = {float(output[key])}" for key in terms if not bool(torch.isfinite(output[key]))]
        cases = _case_names(engine.state.batch, self.image_key)
        raise NonFiniteLossError(
            f"The loss of step {engine.state.iteration} must be finite, got {float(loss)}: "
            f"{', '.join(broken) or 'the sum of the terms'}, on {cases}. The weights were not changed; the last "
            "checkpoint is good. Check these cases with `medkd check-data`, lower the learning rate or the weight."
        )


def _case_names(batch: Any, key: str) -> str:
    image = batch.get(key) if isinstance(batch, dict) else None
    meta = getattr(image, "meta", {}) if isinstance(image, Tensor) else {}
    names = meta.get("filename_or_obj", "cases without file names")
    return ", ".join(dict.fromkeys(map(str, names))) if isinstance(names, (list, tuple)) else str(names)
