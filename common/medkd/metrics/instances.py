# SPDX-License-Identifier: Apache-2.0
"""Metrics of instance segmentation, all made of one table: how many voxels each prediction shares with each label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medkd.metrics.base import CaseMetric
from medkd.metrics.contingency import (
    Contingency,
    adapted_rand_error,
    aggregated_jaccard,
    contingency,
    count_difference,
    panoptic_quality,
    symmetric_best_dice,
    variation_of_information,
)
from medkd.taps import plain_tensor

__all__ = [
    "AdaptedRandError", "AggregatedJaccard", "CountDifference", "DetectionQuality", "InstanceMetric",
    "PanopticQuality", "SegmentationQuality", "SymmetricBestDice", "VariationOfInformation",
    "VariationOfInformationMerge", "VariationOfInformationSplit",
]


class InstanceMetric(CaseMetric):
    """A value per case, or per block of a case, made of its `Contingency`; the mean over blocks, then cases.

    Instance metrics on one engine count each case once between them, if they have the same blocks. NaN is no value: it
    counts nothing in the mean: what has no instance, or a single voxel alone, is never perfect. Voxels of label 0 do
    not count for the variation of information and the Rand error; for all others they are background, where whatever is
    predicted is wrong. Voxels of a negative label count for none. `medkd.metrics.contingency` has a function for
    each metric, which says what it is, what is perfect, and what it is where there is no instance.

    Args:
        blocks: into how many blocks to divide each axis of a case, as equal as can be; one number per spatial axis.
            Each block is scored like a case, so that one error in a large volume does not decide all, and the spread
            over blocks is seen; instances that a border cuts are one in each block. The values are in the order of
            the blocks, last axis fastest. None scores the case as a whole.
        output_transform: gives `(pred, label)`, lists of instance maps of shape (1, *S), 2-D or 3-D, from the engine's
            output. Whole numbers of any type and size, 0 is background or not labeled, negative labels are ignored.
        save_details: keep the values per case and block for `MetricsSaver`.

    Raises:
        ValueError: blocks are not 2 or 3 positive numbers.

    Example:
        >>> import torch
        >>> pair = [torch.tensor([[[1, 1, 1, 1, 2, 3]]])], [torch.tensor([[[5, 5, 5, 8, 8, 0]]])]
        >>> for kind in (
        ...     VariationOfInformation, VariationOfInformationSplit, VariationOfInformationMerge, AdaptedRandError,
        ...     PanopticQuality, DetectionQuality, SegmentationQuality, AggregatedJaccard, SymmetricBestDice,
        ...     CountDifference,
        ... ):
        ...     metric = kind(save_details=False)
        ...     metric.update(pair)
        ...     print(f"{metric.compute():.4f}", kind.__name__)
        1.0490 VariationOfInformation
        0.4000 VariationOfInformationSplit
        0.6490 VariationOfInformationMerge
        0.4000 AdaptedRandError
        0.3000 PanopticQuality
        0.4000 DetectionQuality
        0.7500 SegmentationQuality
        0.5714 AggregatedJaccard
        0.5079 SymmetricBestDice
        1.0000 CountDifference
    """

    _takes = "instance maps of one shape (1, *S)"
    _way_out = "make instances of the network's output in the postprocessing"

    def __init__(
        self, blocks: Sequence[int] | None = None, output_transform: Callable[[Any], Any] = lambda x: x,
        save_details: bool = True,
    ) -> None:
        self.blocks = None if blocks is None else tuple(blocks)
        if self.blocks is not None and not (
            len(self.blocks) in (2, 3) and all(isinstance(count, int) and count > 0 for count in self.blocks)
        ):
            raise ValueError(
                f"`blocks` must be a positive number for each of 2 or 3 spatial axes, got {self.blocks}; None scores "
                "cases as a whole."
            )
        super().__init__(output_transform=output_transform, save_details=save_details)

    @staticmethod
    def measure(
        pred: Tensor | NDArray[Any], label: Tensor | NDArray[Any], spacing: Sequence[float] = ()
    ) -> Contingency:
        """Count the table of a case or block; the spacing is not needed."""
        return contingency(pred, label)

    @staticmethod
    @abstractmethod
    def grade(table: Contingency) -> float:
        """Make the value of a case or block from its table."""

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return float(self.grade(measured))

    def _has_channels(self, number: int) -> bool:
        return number == 1

    def _pairs(self, pred: Tensor, label: Tensor) -> Iterator[tuple[Any, ...]]:
        yield from zip(self._parts(pred), self._parts(label), strict=True)

    def _parts(self, maps: Tensor) -> list[Tensor]:
        """Blocks of an instance map (1, *S), without the channel."""
        pieces = [plain_tensor(maps).detach().cpu()[0]]
        if self.blocks is None:
            return pieces
        if len(self.blocks) != maps.dim() - 1 or np.greater(self.blocks, maps.shape[1:]).any():
            raise ValueError(
                f"`blocks` must be a number for each spatial axis and at most its voxels, got {self.blocks} for a map "
                f"of shape {tuple(maps.shape)}; divide into fewer blocks."
            )
        for axis, count in enumerate(self.blocks):
            pieces = [part for piece in pieces for part in piece.tensor_split(count, axis)]
        return pieces


class VariationOfInformation(InstanceMetric):
    """Variation of information in bits, the sum of split and merge error; 0 is perfect.

    An empty prediction is one segment: it has the merge error of everything merged.
    """

    grade = staticmethod(lambda table: sum(variation_of_information(table)))


class VariationOfInformationSplit(InstanceMetric):
    """Split part of `VariationOfInformation`: bits that tell the prediction of a labeled voxel, given its label."""

    grade = staticmethod(lambda table: variation_of_information(table)[0])


class VariationOfInformationMerge(InstanceMetric):
    """Merge part of `VariationOfInformation`: bits that tell the label of a labeled voxel, given its prediction."""

    grade = staticmethod(lambda table: variation_of_information(table)[1])


class AdaptedRandError(InstanceMetric):
    """Adapted Rand error (ARAND), 0 (perfect) to 1."""

    grade = staticmethod(adapted_rand_error)


class PanopticQuality(InstanceMetric):
    """Panoptic quality of one class (PQ) at an intersection over union above one half, 0 to 1 (perfect)."""

    grade = staticmethod(lambda table: panoptic_quality(table)[0])


class DetectionQuality(InstanceMetric):
    """Detection factor of `PanopticQuality` (DQ): the F-score of instances that are found, 0 to 1 (perfect)."""

    grade = staticmethod(lambda table: panoptic_quality(table)[1])


class SegmentationQuality(InstanceMetric):
    """Segmentation factor of `PanopticQuality` (SQ): mean intersection over union of what is found, 0 if nothing is."""

    grade = staticmethod(lambda table: panoptic_quality(table)[2])


class AggregatedJaccard(InstanceMetric):
    """Aggregated Jaccard index (AJI), 0 to 1 (perfect)."""

    grade = staticmethod(aggregated_jaccard)


class SymmetricBestDice(InstanceMetric):
    """Symmetric best Dice (SBD), 0 to 1 (perfect)."""

    grade = staticmethod(symmetric_best_dice)


class CountDifference(InstanceMetric):
    """Absolute difference in count (|DiC|): by how many instances prediction and label differ; 0 is perfect.

    It is 0 for as many wrong instances, so read it next to another metric.
    """

    grade = staticmethod(count_difference)
