# SPDX-License-Identifier: Apache-2.0
"""Metrics of instance segmentation, all made of one table: how many voxels each prediction shares with each label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
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
    counts nothing in the mean. Voxels of label 0 do not count for the variation of information and the Rand error; for
    all others they are background, where whatever is predicted is wrong.

    Args:
        blocks: into how many blocks to divide each axis of a case, as equal as can be; one number per spatial axis.
            Each block is scored like a case, so that one error in a large volume does not decide all, and the spread
            over blocks is seen; instances that a border cuts are one in each block. The values are in the order of
            the blocks, last axis fastest. None scores the case as a whole.
        output_transform: gives `(pred, label)`, lists of instance maps of shape (1, *S), 2-D or 3-D, from the engine's
            output. Whole numbers of any type and size, 0 is background or not labeled.
        save_details: keep the values per case and block for `MetricsSaver`.

    Raises:
        ValueError: blocks are not 2 or 3 positive numbers.
    """

    def __init__(
        self,
        blocks: Sequence[int] | None = None,
        output_transform: Callable[[Any], Any] = lambda x: x,
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

    def update(self, output: Sequence[Any]) -> None:
        """Add cases; `output` is `(pred, label)`, each a list or a batch.

        Raises:
            ValueError: prediction and label are not instance maps of one shape, or have too few axes or voxels for
                the blocks.
        """
        for pred, label in zip(*output, strict=True):
            if pred.shape != label.shape or label.dim() not in (3, 4) or len(label) != 1:
                raise ValueError(
                    f"`pred` and `label` must be instance maps of one shape (1, *S), got {tuple(pred.shape)} and "
                    f"{tuple(label.shape)}; make instances of the network's output in the postprocessing."
                )
            values = [self.score(table, ()) for table in self._measure_classes(pred, label, ())]
            self.metric_fn.append(torch.tensor(values, device=pred.device))   # (number of blocks,)

    def _measure_classes(self, pred: Tensor, label: Tensor, spacing: Sequence[float]) -> list[Contingency]:
        """Count the table of each block, once for all metrics; what is a class elsewhere is a block here."""
        state = self._engine.state if self._engine is not None else None
        known: dict[Any, tuple[list[Contingency], Tensor, Tensor]] = getattr(state, "measured", {})
        sides = [(side.data_ptr(), side.stride(), side.dtype) for side in (pred, label)]
        key = self.measure, self.blocks, label.shape, *sides
        if key not in known:
            pairs = zip(self._divide(pred), self._divide(label), strict=True)
            known[key] = [self.measure(*pair) for pair in pairs], pred, label   # kept, as in `CaseMetric`
        return known[key][0]

    def _divide(self, ids: Tensor) -> list[Tensor]:
        """Blocks of an instance map (1, *S), without the channel."""
        pieces = [plain_tensor(ids).detach().cpu()[0]]
        if self.blocks is None:
            return pieces
        if len(self.blocks) != ids.dim() - 1 or np.greater(self.blocks, ids.shape[1:]).any():
            raise ValueError(
                f"`blocks` must be a number for each spatial axis and at most its voxels, got {self.blocks} for a map "
                f"of shape {tuple(ids.shape)}; divide into fewer blocks."
            )
        for axis, count in enumerate(self.blocks):
            pieces = [part for piece in pieces for part in piece.tensor_split(count, axis)]
        return pieces


class VariationOfInformation(InstanceMetric):
    """Variation of information in bits, the sum of split and merge error; 0 is perfect.

    See `variation_of_information` for the definition, and `InstanceMetric` for the arguments. A case or block without
    a label counts nothing. An empty prediction is one segment: it has the merge error of everything merged.

    Example:
        >>> pair = [torch.tensor([[[1, 1, 2, 0]]])], [torch.tensor([[[1, 1, 1, 1]]])]
        >>> for kind in (VariationOfInformation, VariationOfInformationSplit, VariationOfInformationMerge):
        ...     metric = kind(save_details=False)
        ...     metric.update(pair)
        ...     print(metric.compute())
        1.5
        1.5
        0.0
    """

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return sum(variation_of_information(measured))


class VariationOfInformationSplit(InstanceMetric):
    """Split part of `VariationOfInformation`: bits that tell the prediction of a labeled voxel, given its label."""

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return variation_of_information(measured)[0]


class VariationOfInformationMerge(InstanceMetric):
    """Merge part of `VariationOfInformation`: bits that tell the label of a labeled voxel, given its prediction."""

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return variation_of_information(measured)[1]


class AdaptedRandError(InstanceMetric):
    """Adapted Rand error (ARAND), 0 (perfect) to 1.

    See `adapted_rand_error` for the definition, and `InstanceMetric` for the arguments. A case or block without a
    label counts nothing.

    Example:
        >>> metric = AdaptedRandError(save_details=False)
        >>> metric.update(([torch.tensor([[[1, 1, 2, 2]]])], [torch.tensor([[[1, 1, 1, 2]]])]))
        >>> round(metric.compute(), 6)
        0.6
    """

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return adapted_rand_error(measured)


class PanopticQuality(InstanceMetric):
    """Panoptic quality of one class (PQ) at an intersection over union above one half, 0 to 1 (perfect).

    See `panoptic_quality` for the definition, and `InstanceMetric` for the arguments. A case or block where neither
    has an instance is 1, one where only one has is 0.

    Example:
        >>> pair = [torch.tensor([[[1, 1, 1, 0, 2, 2]]])], [torch.tensor([[[5, 5, 5, 5, 0, 8]]])]
        >>> for kind in (PanopticQuality, DetectionQuality, SegmentationQuality):
        ...     metric = kind(save_details=False)
        ...     metric.update(pair)
        ...     print(metric.compute())
        0.375
        0.5
        0.75
    """

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return panoptic_quality(measured)[0]


class DetectionQuality(InstanceMetric):
    """Detection factor of `PanopticQuality` (DQ): the F-score of instances that are found, 0 to 1 (perfect)."""

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return panoptic_quality(measured)[1]


class SegmentationQuality(InstanceMetric):
    """Segmentation factor of `PanopticQuality` (SQ): mean intersection over union of what is found, 0 if nothing is."""

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return panoptic_quality(measured)[2]


class AggregatedJaccard(InstanceMetric):
    """Aggregated Jaccard index (AJI), 0 to 1 (perfect).

    See `aggregated_jaccard` for the definition, and `InstanceMetric` for the arguments. A case or block where neither
    has an instance is 1, one where only one has is 0.

    Example:
        >>> metric = AggregatedJaccard(save_details=False)
        >>> metric.update(([torch.tensor([[[1, 1, 1, 0, 2]]])], [torch.tensor([[[5, 5, 5, 5, 0]]])]))
        >>> round(metric.compute(), 6)
        0.6
    """

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return aggregated_jaccard(measured)


class SymmetricBestDice(InstanceMetric):
    """Symmetric best Dice (SBD), 0 to 1 (perfect).

    See `symmetric_best_dice` for the definition, and `InstanceMetric` for the arguments. A case or block where neither
    has an instance is 1, one where only one has is 0.

    Example:
        >>> metric = SymmetricBestDice(save_details=False)
        >>> metric.update(([torch.tensor([[[1, 1, 1, 2]]])], [torch.tensor([[[5, 5, 5, 0]]])]))
        >>> metric.compute()
        0.5
    """

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return symmetric_best_dice(measured)


class CountDifference(InstanceMetric):
    """Absolute difference in count (|DiC|): by how many instances prediction and label differ; 0 is perfect.

    See `InstanceMetric` for the arguments. It is 0 for as many wrong instances, so read it next to another metric.

    Example:
        >>> metric = CountDifference(save_details=False)
        >>> metric.update(([torch.tensor([[[1, 1, 2, 3]]])], [torch.tensor([[[5, 5, 5, 0]]])]))
        >>> metric.compute()
        2.0
    """

    def score(self, measured: Contingency, spacing: Sequence[float]) -> float:
        return float(count_difference(measured))
