# SPDX-License-Identifier: Apache-2.0
"""How large a prediction is beside its label, which Dice does not tell: over-segmentation that is taught."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medkd.metrics.base import CaseMetric, Mask

__all__ = ["VolumeRatio", "volumes"]


def volumes(
    pred: Mask, label: Mask, spacing: Sequence[float] = (), ignored: Mask | None = None
) -> tuple[int, int]:
    """Count the voxels of a class in prediction and label.

    Args:
        pred: one class of the prediction, shape (*S).
        label: the same of the label.
        spacing: not needed, as both lie on one grid.
        ignored: voxels that do not count; neither mask has them.

    Returns:
        Number of voxels of the prediction, and of the label.

    Example:
        >>> volumes(np.array([True, True, False]), np.array([False, True, False]))
        (2, 1)
    """
    return int(np.count_nonzero(pred)), int(np.count_nonzero(label))


class VolumeRatio(CaseMetric):
    """Volume of the prediction per class over that of the label; the background is left out.

    1 is right, 2.2 a prediction of 2.2 times the true volume, 0 a class that was missed. A class that the label does
    not have has no value (`WrongVolume` tells what was invented there). The mean is that of the ratios, so twice and
    half the volume do not cancel out: they are 1.25.

    The arguments are those of `CaseMetric`.

    Example:
        >>> import torch
        >>> label, pred = torch.zeros(2, 6, 6)
        >>> label[0], pred[:2] = 1, 1
        >>> metric = VolumeRatio(save_details=False)
        >>> metric.update([[torch.stack((1 - mask, mask))] for mask in (pred, label)])
        >>> metric.compute()
        2.0
    """

    measure = staticmethod(volumes)

    def score(self, measured: tuple[int, int], spacing: Sequence[float]) -> float:
        pred, label = measured
        return pred / label if label else math.nan
