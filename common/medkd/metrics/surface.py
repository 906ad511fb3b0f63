# SPDX-License-Identifier: Apache-2.0
"""Surface distances in millimeters, with each case's own spacing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics.hausdorff_distance import HausdorffDistanceMetric
from torch import Tensor

__all__ = ["HausdorffDistance95"]


class HausdorffDistance95(IgniteMetricHandler):
    """95th percentile of the Hausdorff distance per class, in millimeters; the background is left out.

    MONAI's handler measures in voxels. Here the spacing comes from the affine of each case's label. An organ that the
    network missed altogether counts with the diagonal of its image, so that silence is not rewarded; an organ that the
    label does not have counts nothing.

    Args:
        output_transform: gives `(pred, label)`, lists of one-hot `MetaTensor`s of shape (K, *S), from the engine's
            output.
        save_details: keep the values per case and class for `MetricsSaver`.

    Reference:
        Huttenlocher et al., Comparing Images Using the Hausdorff Distance, IEEE TPAMI 15(9), 1993.
    """

    def __init__(self, output_transform: Callable[[Any], Any] = lambda x: x, save_details: bool = True) -> None:
        super().__init__(
            metric_fn=_MissedIsDiagonal(include_background=False, percentile=95),
            output_transform=output_transform,
            save_details=save_details,
        )

    def update(self, output: Sequence[Any]) -> None:
        """Add cases; `output` is `(pred, label)`, each a list or a batch."""
        pred, label = output
        for one_pred, one_label in zip(pred, label, strict=True):
            pixdim = getattr(one_label, "pixdim", torch.ones(one_label.dim() - 1))
            spacing = [float(step) for step in pixdim[: one_label.dim() - 1]]
            self.metric_fn([one_pred], [one_label], spacing=spacing)


class _MissedIsDiagonal(HausdorffDistanceMetric):
    """MONAI's metric with a defined value for a missed organ; it gives infinity there."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:   # type: ignore[override]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*all 0, this may result in nan/inf distance.*")
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*")   # MONAI 1.6 calling itself
            distance: Tensor = super()._compute_tensor(y_pred, y, **kwargs)
        spacing = kwargs.get("spacing") or [1.0] * (y.dim() - 2)
        diagonal = math.hypot(*(size * step for size, step in zip(y.shape[2:], spacing, strict=True)))
        missed = (y_pred.flatten(2).sum(-1) == 0)[:, 1:] & (y.flatten(2).sum(-1) > 0)[:, 1:]
        absent = (y.flatten(2).sum(-1) == 0)[:, 1:]
        distance = torch.where(missed.to(distance.device), diagonal, distance)
        return torch.where(absent.to(distance.device), float("nan"), distance)
