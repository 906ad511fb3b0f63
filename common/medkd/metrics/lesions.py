# SPDX-License-Identifier: Apache-2.0
"""Lesions one by one: how many were found, how many were invented; and how far off their volume is.

A lesion is a connected component of its class (26 neighbors in 3-D, 8 in 2-D). Dice is that of the largest lesions: a
small one that was missed costs it next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.metrics.base import CaseMetric, Mask
from medkd.metrics.connectivity import Sizes, connected_components, wrong_component_sizes
from medkd.metrics.surface import ROUNDING
from medkd.metrics.volume import volumes

__all__ = ["FalsePositiveLesions", "LesionSensitivity", "RelativeVolumeDifference", "predicted_shares"]


def predicted_shares(
    pred: Mask, label: Mask, spacing: Sequence[float] = (), ignored: Mask | None = None
) -> NDArray[np.float64]:
    """Tell for each lesion of the label which share of its voxels is predicted.

    Args:
        pred: one class of the prediction, shape (*S).
        label: the same of the label.
        spacing: not needed, as both lie on one grid.
        ignored: voxels that do not count; neither mask has them, so a lesion that reaches into them is what is known
            of it, and may be parted by them.

    Returns:
        Above 0 to 1 for each lesion that is predicted in part, 0 for the others. Shape (N,).

    Example:
        >>> label = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=bool)
        >>> pred = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=bool)
        >>> predicted_shares(pred, label).tolist()
        [0.5, 1.0, 0.0]
    """
    lesions, box = connected_components(label)
    sizes = np.bincount(lesions.ravel())                           # (N + 1,), the first is the background
    found = np.bincount(lesions[pred[box]], minlength=len(sizes))
    return np.asarray(found[1:] / sizes[1:], np.float64)


class LesionSensitivity(CaseMetric):
    """Share of a case's lesions that the prediction found, 0 to 1, per class; the background is left out.

    A lesion counts alike whatever its size, in contrast to Dice. It is found when at least `min_overlap` of its voxels
    are predicted, by one piece or by several. A case without a lesion has no value, an empty prediction 0 elsewhere.
    The mean is over cases, so a lesion of a patient with one counts as much as all of a patient with five.

    A prediction of everything finds everything: `FalsePositiveLesions` tells what was invented beside the lesions and
    `RelativeVolumeDifference` what was around them.

    Args:
        min_overlap: smallest share of a lesion's voxels that counts as found, 0 to 1. The default of a tenth is one
            voxel of a lesion of ten or fewer, so that no small lesion is lost to a shift by a voxel; of a large one it
            is more than the few voxels of a piece that touches it by chance from beside. 0 is any voxel. It is a share
            of the lesion, not of the union: how exact an outline is, Dice and the surface distances tell.
        output_transform, save_details, include_background: as in `CaseMetric`.

    Raises:
        ValueError: a share below 0 or above 1.

    Reference:
        Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), arXiv:1901.04056: lesion-wise recall, there of all
        lesions of a set. Which overlap counts is ours.

    Example:
        >>> import torch
        >>> label, pred = torch.zeros(2, 6, 6)
        >>> label[0, 0] = label[2, 2:4] = pred[2, 3] = pred[5, 5] = 1     # one of two lesions, and one invented
        >>> for metric in (LesionSensitivity(save_details=False), FalsePositiveLesions(save_details=False)):
        ...     metric.update([[torch.stack((1 - mask, mask))] for mask in (pred, label)])
        ...     print(metric.compute())
        0.5
        1.0
    """

    measure = staticmethod(predicted_shares)

    def __init__(
        self, min_overlap: float = 0.1, output_transform: Callable[[Any], Any] = lambda x: x,
        save_details: bool = True, include_background: bool = False,
    ) -> None:
        if not 0.0 <= min_overlap <= 1.0:
            raise ValueError(f"`min_overlap` must be a share of a lesion, 0 to 1, got {min_overlap}; 0 is any voxel.")
        super().__init__(output_transform, save_details, include_background)
        self.min_overlap = min_overlap

    def score(self, measured: NDArray[np.float64], spacing: Sequence[float]) -> float:
        if not len(measured):
            return math.nan
        return float(((measured > 0) & (measured >= self.min_overlap)).mean())


class FalsePositiveLesions(CaseMetric):
    """Number of a case's predicted pieces that touch no lesion, per class; the background is left out.

    Touching is sharing a voxel, and a piece that touches an ignored voxel is none of them, as in `WrongComponents`,
    which this is without specks. Every case has a value, those without a lesion too: the mean is the number per case.

    Args:
        min_volume: smallest piece that counts, in mm^3 (3-D) or mm^2 (2-D), 0 or more; 0 counts them all. Specks are
            left out here only: one on a lesion is part of what `LesionSensitivity` finds. The voxel size comes from
            the affine of each case's label; without one, voxels have 1 mm, and this is a number of voxels.
        output_transform, save_details, include_background: as in `CaseMetric`; see `LesionSensitivity` for an example.

    Raises:
        ValueError: a volume that is negative or not finite.
    """

    measure = staticmethod(wrong_component_sizes)

    def __init__(
        self, min_volume: float = 0.0, output_transform: Callable[[Any], Any] = lambda x: x,
        save_details: bool = True, include_background: bool = False,
    ) -> None:
        if not 0.0 <= min_volume < math.inf:
            raise ValueError(f"`min_volume` must be 0 mm^3 or more and finite, got {min_volume}; 0 counts all pieces.")
        super().__init__(output_transform, save_details, include_background)
        self.min_volume = min_volume

    def score(self, measured: Sizes, spacing: Sequence[float]) -> float:
        return float((measured * math.prod(spacing) >= self.min_volume * (1 - ROUNDING)).sum())


class RelativeVolumeDifference(CaseMetric):
    """How far the predicted volume is off, as a share of the true one, per class; the background is left out.

    (P - G) / G of the numbers of voxels P of the prediction and G of the label: 0 is right, and 1 a class that was
    missed or one of twice its volume. It is the amount by default, as in a mean of signed ones twice the volume hides
    what was missed elsewhere. A class that the label does not have has no value.

    Args:
        signed: keep the sign: negative where the prediction is too small. Its mean is the bias of the volumes.
        output_transform, save_details, include_background: as in `CaseMetric`.

    Reference:
        Heimann et al., Comparison and Evaluation of Methods for Liver Segmentation From CT Datasets, IEEE TMI 28(8),
        2009, there in percent. The released code of HLFD (arXiv:2311.16700) has the signed mean, over the slices
        with a tumor only.

    Example:
        >>> import torch
        >>> label = torch.tensor([[1.0, 1, 0, 0]])
        >>> preds = torch.tensor([[[1.0, 1, 1, 0]], [[0.0, 0, 0, 0]]])    # half more, and nothing
        >>> for signed in (False, True):
        ...     metric = RelativeVolumeDifference(signed, save_details=False)
        ...     for pred in preds:
        ...         metric.update([[torch.stack((1 - mask, mask))] for mask in (pred, label)])
        ...     print(metric.compute())
        0.75
        -0.25
    """

    measure = staticmethod(volumes)

    def __init__(
        self, signed: bool = False, output_transform: Callable[[Any], Any] = lambda x: x,
        save_details: bool = True, include_background: bool = False,
    ) -> None:
        super().__init__(output_transform, save_details, include_background)
        self.signed = signed

    def score(self, measured: tuple[int, int], spacing: Sequence[float]) -> float:
        pred, label = measured
        if not label:
            return math.nan
        difference = (pred - label) / label
        return difference if self.signed else abs(difference)
