# SPDX-License-Identifier: Apache-2.0
"""The liver in windowed slices: the largest even gray region on its side of the body."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Case, Rule, Segment, body_box

__all__ = ["RULE"]


def _gray_values(_training: Sequence[Case], _classes: int) -> Segment:
    """Gray near the most frequent value of the liver's side, opened: its largest piece.

    `side` is the part of the body's width, from the left of the picture, in which the liver is looked for, `width` how
    far gray values may be from the most frequent one, in shares of it, `radius` the opening's, in pixels.
    """

    def segment(case: Case, side: float, width: float, radius: int) -> NDArray[np.uint8]:
        image = ndimage.median_filter(case.image, 5)
        found = np.zeros(image.shape, np.uint8)
        box = body_box(image, 10.0)
        part = image[box][: max(1, int(side * (box[0].stop - box[0].start)))]        # the first axis is the width
        counts = np.bincount(part[part > 20].astype(int).ravel(), minlength=256).astype(float)
        if not counts.any():
            return found
        level = ndimage.gaussian_filter1d(counts, 4).argmax()
        inside = np.abs(part - level) <= width * level
        pieces, count = ndimage.label(ndimage.binary_opening(inside, iterations=radius))
        if count:
            largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
            filled = ndimage.binary_fill_holes(ndimage.binary_dilation(largest, iterations=1))
            found[box][: part.shape[0]] = filled
        return found

    return segment


RULE = Rule(_gray_values, {"side": (0.55, 0.7), "width": (0.15, 0.25, 0.35), "radius": (2, 4)})
