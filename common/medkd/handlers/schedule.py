# SPDX-License-Identifier: Apache-2.0
"""Weights that change during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine, Events

from medkd.checks import suggest

__all__ = ["WeightSchedule"]


class WeightSchedule:
    """Ramp the factor of distillation terms linearly from 0 to 1 over the first part of training.

    The factor of step i (from 1) is `min(1, i / n)` with n = `fraction` of all steps, so the first value is positive.
    It depends on the step alone: a resumed run goes on where it was. Place it anywhere behind the
    `DistillationHandler`; the two meet in `engine.state.distill_factors` only.

    Args:
        fraction: share of all training steps that the ramp takes, 0 to 1; 0 is no ramp.
        terms: names of the terms; all when None.

    Raises:
        ValueError: fraction outside its range; at start: a term that the loss does not have.

    Example:
        >>> [WeightSchedule(0.4).factor(step, steps=10) for step in (1, 2, 4, 10)]
        [0.25, 0.5, 1.0, 1.0]
    """

    def __init__(self, fraction: float = 0.05, terms: Sequence[str] | None = None) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"`fraction` must be between 0 and 1 of all steps, got {fraction}.")
        self.fraction = fraction
        self.terms = terms

    def factor(self, step: int, steps: int) -> float:
        """Factor of a step, counted from 1, out of `steps`."""
        ramp = math.ceil(self.fraction * steps)
        return 1.0 if ramp == 0 else min(1.0, step / ramp)

    def attach(self, engine: Engine) -> None:
        """Register on a trainer that has a `DistillationHandler`."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def _check(self, engine: Any) -> None:
        known = getattr(engine.state, "distill_factors", None)
        if known is None:
            raise ValueError("`WeightSchedule` must stand behind a `DistillationHandler` in the list, got none before.")
        for term in self.terms or ():
            if term not in known:
                raise ValueError(f"`terms` must be terms of the loss, got {term!r}; {suggest(term, known)}")

    def __call__(self, engine: Any) -> None:
        state = engine.state
        factor = self.factor(state.iteration, state.epoch_length * state.max_epochs)
        for term in self.terms if self.terms is not None else state.distill_factors:
            state.distill_factors[term] = factor
