# SPDX-License-Identifier: Apache-2.0
"""What must hold in every step, or a distillation would silently be none; asks no value of a device in a good step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor

from medkd.losses.base import DistillationLoss

__all__ = ["TermCheck", "refuse_deaf"]

logger = logging.getLogger(__name__)


def refuse_deaf(student: Mapping[str, Tensor]) -> None:
    """Refuse tensors of the student through which no gradient reaches it.

    Args:
        student: tap path, or `pred` -> tensor of this step.

    Raises:
        RuntimeError: the message names the taps.
    """
    deaf = [path for path, value in student.items() if not value.requires_grad]
    if deaf:
        raise RuntimeError(
            f"Taps {deaf} of the student must require a gradient in training, got tensors without one, so that their "
            "terms would teach nothing: they are frozen, detached, or computed under no_grad, as inside reentrant "
            "checkpointing. Tap a layer that is trained, or give torch.utils.checkpoint `use_reentrant=False`."
        )


class TermCheck:
    """Looks whether each weighted term is there and reaches the student.

    A term without a gradient may be 0, as where a crop has no instance; any other value is an error. One that has
    none in a whole epoch is a warning.

    Args:
        terms: names of those with a weight.
    """

    def __init__(self, terms: Iterable[str] = ()) -> None:
        self._all = tuple(terms)
        self._silent = set(self._all)
        self._steps = 0

    def __call__(self, values: Mapping[str, Tensor], loss: object) -> None:
        """Look at what a loss gave in a step.

        Raises:
            RuntimeError: a term is missing, is not asked for, or has a value but no gradient.
            TypeError: a term is no scalar.
        """
        self._steps += 1
        expected = loss.active_terms if isinstance(loss, DistillationLoss) else frozenset(values)
        if values.keys() != expected:
            raise RuntimeError(
                f"{type(loss).__name__} must give the terms {sorted(expected)}, got {sorted(values)}; `compute_terms` "
                "gives each of `active_terms`, 0 where there is nothing to compare."
            )
        for term, value in values.items():
            if not isinstance(value, Tensor) or value.dim():
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"Term {term!r} must be a scalar tensor, got {shape}; take the mean in the loss.")
            if value.requires_grad:
                self._silent.discard(term)
            elif bool(value != 0):
                raise RuntimeError(
                    f"Term {term!r} must require a gradient, got {float(value):.4g} without one: it would be logged "
                    f"and added but teach nothing. {type(loss).__name__} detaches the student, or does not read it."
                )

    def end_epoch(self) -> None:
        """Warn of terms that had no gradient in any step of the epoch."""
        if self._steps and self._silent:
            logger.warning(
                "Terms %s were 0 without a gradient in every step of this epoch: they taught nothing. Is there an "
                "instance, or a label, in the crops?", sorted(self._silent),
            )
        self._silent, self._steps = set(self._all), 0
