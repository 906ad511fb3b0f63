# SPDX-License-Identifier: Apache-2.0
"""Where predictions are wrong or differ, and how much two of them agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.compare.networks import Kind
from medkd.metrics.contingency import contingency, panoptic_quality

__all__ = ["agreement", "class_dice", "differ", "wrong"]

Array = NDArray[Any]


def wrong(pred: Array, label: Array, kind: Kind, background_counts: bool = True) -> Array:
    """Mark the voxels where a prediction is wrong.

    Of classes those of another number. Of instances those that are not in a pair of an instance of the prediction and
    one of the label that overlap most, for both of them; so of two that are merged the smaller one is wrong, and of one
    that is split the smaller part.

    Args:
        pred: class or instance numbers, shape (*S), 0 is background.
        label: the same; what is negative is ignored.
        kind: what the numbers are.
        background_counts: False for instances of a label whose 0 means not labeled.

    Returns:
        Shape (*S), bool.

    Example:
        >>> wrong(np.array([5, 5, 5, 0]), np.array([1, 1, 2, 0]), "instances").tolist()
        [False, False, True, False]
    """
    counts = label >= 0 if background_counts else label > 0
    if kind == "classes":
        differs: Array = (pred != label) & counts
        return differs
    pred, label = (np.where(counts, side, 0) for side in (pred, label))
    table = contingency(pred, label)
    best = [np.zeros(len(ids), np.int64) for ids in (table.pred_ids, table.label_ids)]
    things = np.flatnonzero((table.pred_index > 0) & (table.label_index > 0))
    ascending = things[np.argsort(table.counts[things], kind="stable")]
    best[0][table.pred_index[ascending]] = table.label_index[ascending]      # the last one stays, the largest
    best[1][table.label_index[ascending]] = table.pred_index[ascending]
    is_mutual = best[1][best[0]] == np.arange(len(best[0]))
    partner = np.where(is_mutual, table.label_ids[best[0]], -1)              # of each predicted instance
    partner[0] = 0
    wanted: Array = partner[np.searchsorted(table.pred_ids, pred)]            # (*S) numbers of the label
    found: Array = (wanted != label) & counts
    return found


def differ(predictions: Sequence[Array], kind: Kind) -> Array:
    """Mark the voxels where not all predictions agree; of instances, where one differs from the first one."""
    first, *others = predictions
    found = np.zeros(first.shape, dtype=bool)
    for other in others:
        found |= wrong(other, first, kind)
    return found


def class_dice(first: Array, second: Array, classes: int) -> list[float]:
    """Dice of each class but the background; NaN where neither has it.

    Example:
        >>> class_dice(np.array([1, 1, 0]), np.array([1, 0, 0]), 3)
        [0.6666666666666666, nan]
    """
    values = []
    for number in range(1, classes):
        mine, other = first == number, second == number
        total = int(mine.sum()) + int(other.sum())
        values.append(2.0 * int((mine & other).sum()) / total if total else float("nan"))
    return values


def agreement(first: Array, second: Array, kind: Kind, classes: int) -> float:
    """How much two predictions agree, 0 to 1: mean Dice of the classes that either has, or panoptic quality.

    Two that find nothing agree.
    """
    if kind == "instances":
        value = float(panoptic_quality(contingency(first, second))[0])
        return value if not np.isnan(value) else 1.0
    values = [value for value in class_dice(first, second, classes) if not np.isnan(value)]
    return float(np.mean(values)) if values else 1.0
