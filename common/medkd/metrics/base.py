# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a case have in common: a value per class, native spacing, and measuring once for several."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics.metric import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils.type_conversion import convert_to_numpy
from numpy.typing import NDArray
from torch import Tensor

from medkd.ops.ignored import is_ignored, is_without_label

__all__ = ["CaseMetric", "Mask", "bounding_box", "spacing_of"]

Mask = NDArray[np.bool_]


class CaseMetric(IgniteMetricHandler):
    """A value per case and class, and the mean over classes, then cases; the background is left out.

    A subclass gives `measure`, which is costly and does not depend on arguments, and `score`, which makes the value of
    it. Metrics on one engine whose `measure` is the same function measure each case once between them. NaN is no
    value: it counts nothing in the mean. Voxels with a negative label, in any channel, are ignored; where fewer than
    two voxels are left there is no value, and none of a case without a label (`medkd.ops.ignored.UNLABELED`).

    Args:
        output_transform: gives `(pred, label)`, lists of one-hot `MetaTensor`s of shape (K, *S), 2-D or 3-D, from the
            engine's output. The spacing comes from the affine of each label; without one, voxels have 1 mm.
        save_details: keep the values per case and class for `MetricsSaver`.
        include_background: True gives channel 0 a value, too: for regions, which may overlap and have no background.

    Raises:
        ValueError: in `update`, channels that are not one-hot, as those of regions, without `include_background`.
    """

    blocks: tuple[int, ...] | None = None   # into how many an axis is divided; each has a value
    _takes = "one-hot of one shape (K, *S)"
    _way_out = "put `AsDiscreted` with `to_onehot` into the postprocessing"

    def __init__(
        self, output_transform: Callable[[Any], Any] = lambda x: x, save_details: bool = True,
        include_background: bool = False,
    ) -> None:
        self.include_background = include_background
        super().__init__(metric_fn=_Mean(), output_transform=output_transform, save_details=save_details)

    @staticmethod
    @abstractmethod
    def measure(pred: Mask, label: Mask, spacing: Sequence[float]) -> Any:
        """Measure one class of a case; masks of shape (*S), spacing in mm.

        Where voxels are ignored neither mask has them, and they come as a third mask, the argument `ignored`.
        """

    @abstractmethod
    def score(self, measured: Any, spacing: Sequence[float]) -> float:
        """Make the value of a class from what `measure` gave."""

    def attach(self, engine: Engine, name: str) -> None:   # type: ignore[override]
        """Put the mean under `name` in `engine.state.metrics`, the values in `engine.state.metric_details`."""
        super().attach(engine, name)
        engine.add_event_handler(Events.ITERATION_STARTED, _forget)

    def update(self, output: Sequence[Any]) -> None:
        """Add cases; `output` is `(pred, label)`, each a list or a batch.

        Raises:
            ValueError: prediction and label are not of one shape, or not what the metric takes.
        """
        for pred, label in zip(*output, strict=True):
            if pred.shape != label.shape or label.dim() not in (3, 4) or not self._has_channels(len(label)):
                shapes = f"{tuple(pred.shape)} and {tuple(label.shape)}"
                raise ValueError(f"`pred` and `label` must be {self._takes}, got {shapes}; {self._way_out}.")
            spacing = spacing_of(label)
            values = [self.score(measured, spacing) for measured in self._measure_parts(pred, label, spacing)]
            if is_without_label(label) or int((~is_ignored(label[0])).sum()) < 2:   # one voxel: perfect or all wrong
                values = [math.nan] * len(values)
            self.metric_fn.append(torch.tensor(values, device=pred.device))   # (parts,)

    def _has_channels(self, number: int) -> bool:
        return self.include_background or number > 1

    def _pairs(self, pred: Tensor, label: Tensor) -> Iterator[tuple[Any, ...]]:
        """Masks of shape (*S) for `measure`, of what has a value of its own: each class but the background."""
        first = 0 if self.include_background else 1
        unknown = (label < 0).any(0)
        if not self.include_background:
            _refuse_regions(pred, label, unknown)
        masks = zip(*(convert_to_numpy(side[first:] > 0.5) for side in (pred, label)), strict=True)
        if not bool(unknown.any()):
            yield from masks
            return
        ignored: Mask = convert_to_numpy(unknown)
        for pred_mask, label_mask in masks:
            yield pred_mask & ~ignored, label_mask & ~ignored, ignored

    def _measure_parts(self, pred: Tensor, label: Tensor, spacing: Sequence[float]) -> list[Any]:
        """What `measure` gives for each part, taken from `engine.state.measured` if another metric was here before."""
        state = self._engine.state if self._engine is not None else None
        known: dict[Any, tuple[list[Any], Tensor, Tensor]] = getattr(state, "measured", {})
        sides = [(side.data_ptr(), side.stride(), side.dtype) for side in (pred, label)]
        key = self.measure, self.blocks, getattr(self, "include_background", False), label.shape, *sides
        if key not in known:
            pairs = self._pairs(pred, label)
            measured = [self.measure(mine, other, spacing, *ignored) for mine, other, *ignored in pairs]
            known[key] = measured, pred, label   # while both are kept, no other tensor has their addresses
        return known[key][0]


def _refuse_regions(pred: Tensor, label: Tensor, ignored: Tensor) -> None:
    """Refuse channels that overlap, and a label that has voxels of no channel: its channel 0 is no background."""
    for name, maps in (("pred", pred), ("label", label)):
        classes = (maps > 0.5).sum(0)
        wrong = classes > 1 if name == "pred" else (classes != 1) & ~ignored
        if bool(wrong.any()):
            raise ValueError(
                f"`{name}` must be one-hot, one class per voxel with the background as channel 0, got "
                f"{int(wrong.sum())} voxels of {'several classes' if bool((classes > 1).any()) else 'no class'}; give "
                "the metric `include_background` true for regions, which may overlap, or put `AsDiscreted` with "
                "`argmax` and `to_onehot` into the postprocessing."
            )


def _forget(engine: Engine) -> None:
    """Measure anew in each iteration: its tensors may be the last one's memory, filled with another case."""
    engine.state.measured = {}   # type: ignore[attr-defined]


class _Mean(CumulativeIterationMetric):
    """The buffer of values, gathered from all ranks."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        raise NotImplementedError("`CaseMetric` computes; this adds up.")

    def aggregate(self) -> Tensor:
        values = self.get_buffer()   # type: ignore[no-untyped-call]
        if values is None:
            raise NotComputableError("The metric must be updated with a case before its mean is taken, got none.")
        if values.isnan().all():       # for which MONAI's mean is 0, a perfect distance
            return torch.full((), torch.nan)
        mean: Tensor = do_metric_reduction(values, "mean")[0]
        return mean


def spacing_of(label: Tensor) -> tuple[float, ...]:
    """Voxel size of a case in mm, one per spatial axis; 1 for a tensor without metadata.

    Args:
        label: shape (K, *S).

    Example:
        >>> from monai.data.meta_tensor import MetaTensor
        >>> spacing_of(MetaTensor(torch.zeros(2, 5, 5), affine=torch.diag(torch.tensor([0.5, 3.0, 1.0, 1.0]))))
        (0.5, 3.0)
        >>> spacing_of(torch.zeros(2, 5, 5, 5))
        (1.0, 1.0, 1.0)
    """
    axes = label.dim() - 1
    return tuple(float(step) for step in getattr(label, "pixdim", torch.ones(axes))[:axes])


def bounding_box(mask: Mask) -> tuple[slice, ...]:
    """Smallest box that holds all of a mask; an empty one of an empty mask.

    Example:
        >>> bounding_box(np.array([[False, True, True], [False, False, False]]))
        (slice(0, 1, None), slice(1, 3, None))
    """
    box = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0))
    return tuple(box)
