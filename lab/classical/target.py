# SPDX-License-Identifier: Apache-2.0
"""Radiotherapy targets of head and neck: where they usually lie, and more so on the side with more soft tissue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Case, Rule, Segment
from lab.classical.priors import body_frame, share_maps, stretch

__all__ = ["RULE", "larger_side"]

NEAR = 0.2                                 # share of the training cases from which on tissue is compared


def larger_side(training: Sequence[Case], classes: int) -> Segment:
    """Give the rule: the mean label, made symmetric, times 1 + `side` on the side that has more soft tissue there.

    `threshold` is the least share of the training cases, `low` the least HU of the smoothed image.
    """
    (usual,) = share_maps(training, classes)
    symmetric = (usual + usual[::-1]) / 2

    def segment(case: Case, threshold: float, low: float, side: float) -> NDArray[np.uint8]:
        box = body_frame(case.image)
        shape = tuple(one.stop - one.start for one in box)
        share = stretch(symmetric, shape)
        smooth = ndimage.gaussian_filter(case.image, [4.0 / step for step in case.spacing])[box]
        tissue = (share > NEAR) & (smooth > 0) & (smooth < 150)
        half = shape[0] // 2
        larger = np.sign(np.count_nonzero(tissue[-half:]) - np.count_nonzero(tissue[:half]))
        sides = np.sign(np.arange(shape[0]) - (shape[0] - 1) / 2) * larger
        found = np.zeros(case.image.shape, np.uint8)
        found[box] = (share * (1 + side * sides)[:, None, None] >= threshold) & (smooth > low)
        return found

    return segment


RULE = Rule(
    larger_side,
    {"threshold": (0.25, 0.3, 0.35, 0.4), "low": (-1000.0, -150.0, -100.0), "side": (0.0, 0.2, 0.4, 0.6, 0.8)},
    uses_training=True,
)
