# SPDX-License-Identifier: Apache-2.0
"""Distances between the surfaces of prediction and label in millimeters, with each case's own spacing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from medkd.metrics.base import CaseMetric, Mask, bounding_box

__all__ = [
    "AverageSurfaceDistance", "HausdorffDistance95", "PooledHausdorffDistance95", "SurfaceDice", "surface_distances",
]

Distances = tuple[NDArray[np.float64], NDArray[np.float64]]
ROUNDING = 1e-4  # relative; affines are stored in float32, so one voxel may be a little more than its own size


def surface_distances(
    pred: Mask, label: Mask, spacing: Sequence[float], ignored: Mask | None = None
) -> Distances:
    """Measure how far the surface of the prediction is from that of the label, and the other way round.

    The surface is every voxel of a mask that has a neighbor outside the mask, or outside the image, across a face.
    Equal to MONAI's `get_edge_surface_distance`, which spends most of its time on cropping large volumes.

    Args:
        pred: one class of the prediction, shape (*S).
        label: the same of the label.
        spacing: voxel size in mm, one per axis.
        ignored: voxels that do not count, in neither mask: a mask has no surface towards them. None for none.

    Returns:
        The distances in mm from each surface voxel of the prediction to the label's surface, and from each of the
        label to the prediction's. Both are empty when the label is. When the prediction alone is empty, the label's
        surface voxels have the distance of the image's diagonal.

    Example:
        >>> pred, label = np.zeros((4, 3), dtype=bool), np.zeros((4, 3), dtype=bool)
        >>> pred[0, 0] = label[1, 0] = label[3, 0] = True
        >>> [distance.tolist() for distance in surface_distances(pred, label, spacing=(2.0, 1.0))]
        [[2.0], [2.0, 6.0]]
        >>> surface_distances(pred & False, label, spacing=(2.0, 4 / 3))[1].tolist()     # 8 mm by 4 mm
        [8.94427190999916, 8.94427190999916]
    """
    nothing = np.empty(0)
    if not label.any():
        return nothing, nothing
    box = bounding_box(pred | label)
    solids = (mask[box] if ignored is None else (mask | ignored)[box] for mask in (pred, label))
    insides = (ndimage.binary_erosion(solid) for solid in solids)
    surfaces = (mask[box] & ~inside for mask, inside in zip((pred, label), insides, strict=True))
    from_pred, from_label = (np.argwhere(surface) * np.asarray(spacing) for surface in surfaces)   # (E, axes) in mm
    if not len(from_pred):
        diagonal = math.hypot(*(size * step for size, step in zip(label.shape, spacing, strict=True)))
        return nothing, np.full(len(from_label), diagonal)
    return KDTree(from_label).query(from_pred)[0], KDTree(from_pred).query(from_label)[0]


class _SurfaceMetric(CaseMetric):
    """Metric of the surface distances; NaN where the label does not have the organ."""

    measure = staticmethod(surface_distances)

    def score(self, measured: Distances, spacing: Sequence[float]) -> float:
        return self.summarize(measured, spacing) if any(map(len, measured)) else math.nan

    @abstractmethod
    def summarize(self, distances: Distances, spacing: Sequence[float]) -> float:
        """Make the value of an organ that the label has."""


class HausdorffDistance95(_SurfaceMetric):
    """95th percentile of the Hausdorff distance per class, in millimeters; the background is left out.

    The larger one of the two directions' percentiles. MONAI's handler measures in voxels. Here the spacing comes from
    the affine of each case's label. An organ that the network missed altogether counts with the diagonal of its image,
    so that silence is not rewarded; an organ that the label does not have counts nothing.

    The arguments are those of `CaseMetric`.

    Reference:
        Huttenlocher et al., Comparing Images Using the Hausdorff Distance, IEEE TPAMI 15(9), 1993.

    Example:
        >>> import torch
        >>> label, pred = torch.zeros(2, 6, 6)
        >>> label[0, 0] = pred[0, 0] = pred[3, 4] = 1              # distances 0 and 5 one way, 0 the other
        >>> for kind in (HausdorffDistance95, AverageSurfaceDistance):
        ...     metric = kind(save_details=False)
        ...     metric.update(([torch.stack((1 - pred, pred))], [torch.stack((1 - label, label))]))
        ...     print(round(metric.compute(), 4))
        4.75
        1.6667
    """

    def summarize(self, distances: Distances, spacing: Sequence[float]) -> float:
        return max(float(np.percentile(one, 95)) for one in distances if len(one))


def _voxel_distances(
    pred: Mask, label: Mask, spacing: Sequence[float], ignored: Mask | None = None
) -> Distances:
    return surface_distances(pred, label, [1.0] * label.ndim, ignored)


class PooledHausdorffDistance95(_SurfaceMetric):
    """95th percentile of the surface distances of both directions taken together, per class, in voxels.

    What tables of the Synapse set call HD: they are made by `medpy.metric.hd95` without a spacing. It is never larger
    than the `HausdorffDistance95`, the larger percentile of the two directions, which is in millimeters; with slices
    far apart voxels say little. Missed organs (here the diagonal of the image) and organs that the label does not have
    (nothing) are as there; those tables count both as 0.

    The arguments are those of `CaseMetric`.

    Reference:
        Chen et al., TransUNet, arXiv 2102.04306, released code; Zou et al., Graph Flow, arXiv 2203.08667.

    Example:
        >>> import torch
        >>> label, pred = torch.zeros(2, 6, 6)
        >>> label[0, 0] = pred[0, 0] = pred[3, 4] = 1              # distances 0 and 5 one way, 0 the other
        >>> metric = PooledHausdorffDistance95(save_details=False)
        >>> metric.update(([torch.stack((1 - pred, pred))], [torch.stack((1 - label, label))]))
        >>> metric.compute()
        4.5
    """

    measure = staticmethod(_voxel_distances)

    def summarize(self, distances: Distances, spacing: Sequence[float]) -> float:
        return float(np.percentile(np.concatenate(distances), 95))


class AverageSurfaceDistance(_SurfaceMetric):
    """Average symmetric surface distance (ASSD) per class, in millimeters; the background is left out.

    The mean over the surface voxels of both, taken together: in contrast to the Hausdorff distance it tells by how
    much the boundary is off on the whole. Spacing, missed organs (the diagonal of the image) and organs that the label
    does not have (nothing) are as in `HausdorffDistance95`.

    The arguments are those of `CaseMetric`; see `HausdorffDistance95` for an example.

    Reference:
        Heimann et al., Comparison and Evaluation of Methods for Liver Segmentation From CT Datasets, IEEE TMI 28(8),
        2009.
    """

    def summarize(self, distances: Distances, spacing: Sequence[float]) -> float:
        return float(np.concatenate(distances).mean())


class SurfaceDice(_SurfaceMetric):
    """Share of the surfaces within a tolerance of each other per class, 0 to 1; the background is left out.

    Also called normalized surface Dice: surface voxels of both that lie within the tolerance, divided by all of them.
    A missed organ is 0; an organ that the label does not have counts nothing, as in `HausdorffDistance95` (MONAI's
    `SurfaceDiceMetric` gives 0 where such an organ is predicted). As there, the area of a surface is the number of its
    voxels; the reference weights them by their area.

    Args:
        tolerance: largest distance that is right, in mm. None is one voxel, by the largest of a case's voxel sizes:
            a surface that is shifted by one voxel along any axis is right. Give millimeters to compare data sets of
            different spacing, or when slices are thick.
        output_transform, save_details, include_background: as in `CaseMetric`.

    Raises:
        ValueError: a tolerance that is negative or not finite.

    Reference:
        Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
        radiotherapy, arXiv:1809.04430.

    Example:
        >>> import torch
        >>> label, pred = torch.zeros(2, 6, 6)
        >>> label[2, 2:4] = pred[3, 2:4] = 1                       # a line of two pixels, shifted by one pixel
        >>> for tolerance in (0.5, None):
        ...     metric = SurfaceDice(tolerance, save_details=False)
        ...     metric.update(([torch.stack((1 - pred, pred))], [torch.stack((1 - label, label))]))
        ...     print(metric.compute())
        0.0
        1.0
    """

    def __init__(
        self, tolerance: float | None = None, output_transform: Callable[[Any], Any] = lambda x: x,
        save_details: bool = True, include_background: bool = False,
    ) -> None:
        if tolerance is not None and not 0.0 <= tolerance < math.inf:
            raise ValueError(f"`tolerance` must be 0 mm or more and finite, got {tolerance}; None is one voxel.")
        super().__init__(output_transform, save_details, include_background)
        self.tolerance = tolerance

    def summarize(self, distances: Distances, spacing: Sequence[float]) -> float:
        tolerance = max(spacing) if self.tolerance is None else self.tolerance
        return float((np.concatenate(distances) <= tolerance * (1 + ROUNDING)).mean())
