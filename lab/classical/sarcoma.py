# SPDX-License-Identifier: Apache-2.0
"""Soft-tissue sarcoma: muscle in the middle; and the ellipsoid that shows that the crop gives the tumor away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Case, Rule, Segment

__all__ = ["ELLIPSOID", "RULE", "ellipsoid"]


def ellipsoid(shape: Sequence[int], spacing: Sequence[float], inset: float) -> NDArray[np.bool_]:
    """The ellipsoid in a box that is `inset` mm smaller on each side, at least a voxel."""
    inside = np.zeros(tuple(shape), np.float64)
    for axis, (size, step) in enumerate(zip(shape, spacing, strict=True)):
        places = (np.arange(size) - (size - 1) / 2) * step
        radius = max(size * step / 2 - inset, step)
        inside += ((places / radius) ** 2).reshape([-1 if axis == other else 1 for other in range(len(shape))])
    found: NDArray[np.bool_] = inside <= 1
    return found


def _inset_ellipsoid(_training: Sequence[Case], _classes: int) -> Segment:
    def segment(case: Case, inset: float, soft_tissue: bool) -> NDArray[np.uint8]:
        found = ellipsoid(case.image.shape, case.spacing, inset)
        mask = found & (case.image > -30) & (case.image < 150) if soft_tissue else found
        return np.asarray(mask, np.uint8)

    return segment


def _muscle(_training: Sequence[Case], _classes: int) -> Segment:
    """Soft tissue of a narrow range, smoothed and opened; the largest piece, wherever it lies."""

    def segment(case: Case, low: float, high: float, radius: float) -> NDArray[np.uint8]:
        smooth = ndimage.gaussian_filter(case.image, [4.0 / step for step in case.spacing])
        mask = (smooth > low) & (smooth < high)
        depth = ndimage.distance_transform_edt(mask, sampling=case.spacing)
        pieces, count = ndimage.label(depth > radius)
        if not count:
            return np.zeros(case.image.shape, np.uint8)
        largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
        return np.asarray(ndimage.distance_transform_edt(~largest, sampling=case.spacing) <= radius, np.uint8)

    return segment


RULE = Rule(_muscle, {"low": (0.0, 15.0, 30.0), "high": (50.0, 70.0, 100.0), "radius": (6.0, 10.0, 15.0)})
ELLIPSOID = Rule(_inset_ellipsoid, {"inset": (40.0, 45.0, 50.0, 55.0), "soft_tissue": (True, False)})
