# SPDX-License-Identifier: Apache-2.0
"""Resampling to a spacing that starts at the first voxel, also where the volume is rotated."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Spacingd
from numpy.typing import NDArray

__all__ = ["ExactSpacingd", "straightened"]

_BEFORE = "affine_before_spacing"     # entry of the metadata
_SHEAR = 1e-4                         # share of a voxel's edge; float32 leaves 1e-7, a tilted gantry 1e-2


def straightened(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the axes of a rotated volume exactly right angles; all other affines stay as they are, bit for bit.

    A header holds an affine in float32. MONAI's `compute_shape_offset` looks for a corner of the volume that is the
    first along all axes, to 1e-8 voxels, finds none where rounding left a shear of 1e-7, and centers the new grid on
    the volume instead: it moves by up to a voxel against that of the same voxels without a rotation.

    Args:
        affine: shape (4, 4) or (3, 3), any handedness.

    Returns:
        The same spacing, origin and directions; what has a shear on purpose keeps it.
    """
    matrix = affine[:-1, :-1]
    lengths = np.linalg.norm(matrix, axis=0)
    if not (lengths > 0).all() or (np.count_nonzero(matrix, axis=0) <= 1).all():
        return affine
    directions = matrix / lengths
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right                                        # the nearest one
    if np.abs(rotation - directions).max() > _SHEAR:
        return affine
    result = affine.copy()
    result[:-1, :-1] = rotation * lengths
    return result


class ExactSpacingd(Spacingd):
    """MONAI's `Spacingd` of a volume with a straightened affine: one grid for the same voxels, however they are turned.

    Arguments: those of `Spacingd`. `inverse` gives the affine of the file back.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Give a copy of `data`, resampled."""
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key]
            if isinstance(volume, MetaTensor):
                before = volume.affine.cpu().numpy().astype(np.float64)
                after = straightened(before)
                if after is not before:
                    result[key] = volume = volume.clone()   # type: ignore[no-untyped-call]
                    volume.affine = torch.as_tensor(after)
                    volume.meta[_BEFORE] = torch.as_tensor(before)
        resampled: dict[Hashable, Any] = super().__call__(result, lazy)
        return resampled

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` on the grid before."""
        result: dict[Hashable, Any] = super().inverse(data)
        for key in self.key_iterator(result):
            volume = result[key]
            if isinstance(volume, MetaTensor) and _BEFORE in volume.meta:
                volume.affine = torch.as_tensor(volume.meta.pop(_BEFORE)).reshape(volume.affine.shape)
        return result
