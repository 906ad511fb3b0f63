# SPDX-License-Identifier: Apache-2.0
"""The mean label: where a class usually lies in the box of the body, whatever the image shows there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Box, Case, Rule, Segment, body_box

__all__ = ["RULE", "body_frame", "mean_label", "share_maps", "stretch"]

SIZE = 96                                  # of the body's box, along each axis


def mean_label(training: Sequence[Case], classes: int) -> Segment:
    """Give the rule that puts each class where at least `threshold` of the training cases have it in their box.

    The box of the body is that above -500 HU, in pictures that of all that is not black; it is stretched to one size.
    """
    maps = share_maps(training, classes)

    def segment(case: Case, threshold: float) -> NDArray[np.uint8]:
        box = body_frame(case.image)
        shape = tuple(one.stop - one.start for one in box)
        shares = np.stack([stretch(one, shape) for one in maps])
        found = np.zeros(case.image.shape, np.uint8)
        found[box] = np.where(shares.max(axis=0) >= threshold, shares.argmax(axis=0) + 1, 0)
        return found

    return segment


def share_maps(training: Sequence[Case], classes: int) -> NDArray[np.float32]:
    """Share of the cases that have a class at a place of their body's box, shape (K - 1, 96, ...)."""
    boxes = [body_frame(case.image) for case in training]
    return np.stack([
        np.mean([stretch(_label(case)[box] == value, (SIZE,) * case.image.ndim)
                 for case, box in zip(training, boxes, strict=True)], axis=0)
        for value in range(1, classes)
    ])


def body_frame(image: NDArray[Any]) -> Box:
    """Box of the body above -500 HU, in pictures that of all that is not black."""
    return body_box(image, -500.0 if image.min() < -500 else 0.0)


def _label(case: Case) -> NDArray[Any]:
    if case.label is None:
        raise ValueError("the training cases of `mean_label` must have labels, got one without.")
    return case.label


def stretch(values: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float32]:
    """Values on a grid of another size, linearly."""
    zoom = [new / old for new, old in zip(shape, values.shape, strict=True)]
    made: NDArray[np.float32] = ndimage.zoom(values.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest")
    return made


RULE = Rule(mean_label, {"threshold": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)}, uses_training=True)
