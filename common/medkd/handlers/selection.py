# SPDX-License-Identifier: Apache-2.0
"""Whether the validation metric of a run can choose its best student."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Selection"]

_LEAST = 2                 # validations of one value that say nothing
logger = logging.getLogger(__name__)


class Selection:
    """Watches the best metric of a validation engine.

    MONAI takes the first value for the best one, whatever it is: a NaN would stay there for ever, as nothing compares
    with it, and a metric that never changes (0.0 where no label has anything in it) would choose the first epoch.

    Args:
        evaluator: the validation engine; None has no metric.
    """

    def __init__(self, evaluator: Any | None) -> None:
        self.evaluator = evaluator
        self._best: tuple[float, int] = (-1.0, -1)
        self._count, self._first, self._differs = 0, 0.0, False
        self._nothing = 0

    @property
    def epoch(self) -> int:
        """Epoch of the best validation, -1 before there is one."""
        return self._best[1]

    @property
    def metric(self) -> float:
        """The best value."""
        return self._best[0]

    @property
    def name(self) -> str | None:
        """Name of the metric."""
        return None if self.evaluator is None else self.evaluator.state.key_metric_name

    @property
    def says_nothing(self) -> bool:
        """All validations, two at least, gave the same value."""
        return self._count >= _LEAST and not self._differs and self.metric == self._first

    def look(self, epoch: int) -> None:
        """Take notice of a validation, if there was one in this epoch; a value that is no number is passed over."""
        if self.evaluator is None or self.evaluator.state.epoch != epoch or self.name is None:
            return
        state = self.evaluator.state
        if not _is_number(state.best_metric):
            state.best_metric, state.best_metric_epoch = self._best
        self._best = float(state.best_metric), int(state.best_metric_epoch)
        value = state.metrics.get(self.name)
        if not _is_number(value):
            self._nothing += 1
            logger.warning("%s of epoch %d is %s: it chooses no student. Look at the validation labels.",
                           self.name, epoch, value)
            return
        if self._count == 0:
            self._first = float(value)
        self._differs |= float(value) != self._first
        self._count += 1

    def verdict(self) -> str | None:
        """Why the last student has to be taken instead of the best one; None if there is a best one."""
        if self.epoch < 1:
            return f"{self.name} was no number in any validation" if self._nothing else "No validation took place"
        if self.says_nothing:
            return f"{self.name} was {self._first:g} in all {self._count} validations and says nothing"
        return None

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one, as the evaluator compares them; never without a validation."""
        return self.evaluator is not None and self.epoch >= 1 and bool(self.evaluator.metric_cmp_fn(value, other))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"metric": self.name, "best": list(self._best), "count": self._count, "first": self._first,
                "differs": self._differs, "nothing": self._nothing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with the evaluator."""
        self._best = float(state["best"][0]), int(state["best"][1])
        self._count, self._first, self._differs = state["count"], state["first"], state["differs"]
        self._nothing = state["nothing"]
        if self.evaluator is not None:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = self._best


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):                   # not a scalar
        return False
