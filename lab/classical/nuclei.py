# SPDX-License-Identifier: Apache-2.0
"""Nuclei: Otsu's threshold, holes filled, and a watershed of the distance to the border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import feature, filters, segmentation

from lab.classical.case import Case, Rule, Segment

__all__ = ["RULE"]

peak_local_max: Any = feature.peak_local_max       # untyped
threshold_otsu: Any = filters.threshold_otsu
watershed: Any = segmentation.watershed

_LEAST = 30                                # pixels of a nucleus, as in the bundle's decoding


def _distance_watershed(_training: Sequence[Case], _classes: int) -> Segment:
    """Nuclei are the smaller part of the picture, bright or dark, that Otsu's threshold divides.

    `sigma` smooths the gray values, `level` is a factor of the threshold's distance from the background, `smooth` the
    sigma of the distance to the border, and `distance` the least between the middles of two nuclei, all in pixels.
    """

    def segment(case: Case, sigma: float, level: float, smooth: float, distance: int) -> NDArray[np.int32]:
        gray = ndimage.gaussian_filter(case.image, sigma)
        if gray.min() == gray.max():
            return np.zeros(gray.shape, np.int32)
        threshold = threshold_otsu(gray)
        if (gray > threshold).mean() > 0.5:
            gray = -gray
            threshold = threshold_otsu(gray)
        background = np.median(gray[gray <= threshold])
        inside = gray > background + level * (threshold - background)
        inside = ndimage.binary_fill_holes(ndimage.binary_opening(inside))
        depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(inside), smooth)
        seeds = np.zeros(gray.shape, np.int32)
        peaks = peak_local_max(depth, min_distance=distance, labels=inside.astype(int), exclude_border=False)
        seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        found = watershed(-depth, seeds, mask=inside)
        sizes = np.bincount(found.ravel())
        return np.where(sizes[found] < _LEAST, 0, found).astype(np.int32)

    return segment


RULE = Rule(
    _distance_watershed,
    {"sigma": (0.5, 1.0), "level": (0.8, 0.9, 1.0), "smooth": (1.0, 2.0), "distance": (4, 6, 8)},
)
