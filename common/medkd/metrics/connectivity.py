# SPDX-License-Identifier: Apache-2.0
"""Pieces of a prediction where the label has nothing: how many, and how large."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medkd.metrics.base import CaseMetric, Mask, bounding_box

__all__ = ["WrongComponents", "WrongVolume", "connected_components", "wrong_component_sizes"]

Sizes = NDArray[np.int64]


def connected_components(mask: Mask) -> tuple[NDArray[np.int32], tuple[slice, ...]]:
    """Number the connected components of a mask, in the smallest box that holds it, which saves most of the time.

    Voxels that meet in a face, an edge or a corner are connected (26 neighbors in 3-D, 8 in 2-D).

    Args:
        mask: shape (*S).

    Returns:
        Numbers from 1, 0 is outside, in the shape of the box; and the box.

    Example:
        >>> numbers, box = connected_components(np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=bool))
        >>> numbers.tolist(), box
        ([[1, 0], [0, 1]], (slice(0, 2, None), slice(1, 3, None)))
    """
    box = bounding_box(mask)
    components, _ = ndimage.label(mask[box], structure=np.ones((3,) * mask.ndim))
    return components, box


def wrong_component_sizes(
    pred: Mask, label: Mask, spacing: Sequence[float] = (), ignored: Mask | None = None
) -> Sizes:
    """Find the connected components of the prediction that share no voxel with the label.

    Components are those of `connected_components`.

    Args:
        pred: one class of the prediction, shape (*S).
        label: the same of the label.
        spacing: not needed, as sizes are in voxels.
        ignored: voxels that do not count, in neither mask; a component that touches one may belong to something there,
            and is not wrong. None for none.

    Returns:
        Number of voxels of each such component, shape (N,).

    Example:
        >>> pred = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=bool)
        >>> label = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=bool)
        >>> wrong_component_sizes(pred, label).tolist()
        [2, 1]
    """
    components, box = connected_components(pred)
    sizes: Sizes = np.bincount(components.ravel())
    sizes[components[label[box]]] = 0
    if ignored is not None:
        sizes[components[ndimage.binary_dilation(ignored, np.ones((3,) * pred.ndim))[box]]] = 0
    return sizes[1:][sizes[1:] > 0]


class WrongComponents(CaseMetric):
    """Number of predicted pieces per class that touch no voxel of that class in the label; the background is left out.

    A piece is a connected component (26 neighbors in 3-D, 8 in 2-D), and touching is sharing a voxel. Such pieces are
    what Dice hardly sees: an island far from its organ, or an organ that is not in the image. So every case has a
    value: 0 for an organ that was missed, since this counts what was invented only (Dice and `HausdorffDistance95`
    tell what was missed), and all pieces of an organ that the label does not have.

    The arguments are those of `CaseMetric`.

    Example:
        >>> import torch
        >>> from monai.data.meta_tensor import MetaTensor
        >>> label, pred = torch.zeros(2, 6, 6)
        >>> label[0, 0] = pred[0, :2] = pred[3, 3] = pred[5, 0] = 1    # the first piece touches the label
        >>> affine = torch.diag(torch.tensor([5.0, 2.0, 1.0, 1.0]))    # pixels of 10 mm^2
        >>> pair = [[MetaTensor(torch.stack((1 - mask, mask)), affine=affine)] for mask in (pred, label)]
        >>> for kind in (WrongComponents, WrongVolume):
        ...     metric = kind(save_details=False)
        ...     metric.update(pair)
        ...     print(round(metric.compute(), 6))
        2.0
        0.2
    """

    measure = staticmethod(wrong_component_sizes)

    def score(self, measured: Sizes, spacing: Sequence[float]) -> float:
        return float(len(measured))


class WrongVolume(CaseMetric):
    """Size per class of what `WrongComponents` counts, in ml (3-D) or cm^2 (2-D); the background is left out.

    The sum over the pieces. The voxel size comes from the affine of each case's label; without one, or when an image
    has no physical size, such as a PNG, voxels have 1 mm, and 1000 voxels (100 in 2-D) are 1.

    The arguments are those of `CaseMetric`; see `WrongComponents` for an example.
    """

    measure = staticmethod(wrong_component_sizes)

    def score(self, measured: Sizes, spacing: Sequence[float]) -> float:
        return int(measured.sum()) * math.prod(step / 10 for step in spacing)   # mm to cm
