# SPDX-License-Identifier: Apache-2.0
"""The mean label: where a class usually lies in the box of the body, whatever the image shows there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Case, Rule, Segment, body_box

__all__ = ["RULE", "mean_label"]

SIZE = 96                                  # of the body's box, along each axis


def mean_label(training: Sequence[Case], classes: int) -> Segment:
    """Give the rule that puts each class where at least `threshold` of the training cases have it in their box.

    The box of the body is that above -500 HU, in pictures that of all that is not black; it is stretched to one size.
    """
    boxes = [_box(case.image) for case in training]
    maps = np.stack([
        np.mean([_stretch(_label(case)[box] == value, (SIZE,) * case.image.ndim)
                 for case, box in zip(training, boxes, strict=True)], axis=0)
        for value in range(1, classes)
    ])                                                             # (K - 1, 96, ...), share of the cases

    def segment(case: Case, threshold: float) -> NDArray[np.uint8]:
        box = _box(case.image)
        shape = tuple(one.stop - one.start for one in box)
        shares = np.stack([_stretch(one, shape) for one in maps])
        found = np.zeros(case.image.shape, np.uint8)
        found[box] = np.where(shares.max(axis=0) >= threshold, shares.argmax(axis=0) + 1, 0)
        return found

    return segment


def _box(image: NDArray[Any]) -> tuple[slice, ...]:
    return body_box(image, -500.0 if image.min() < -500 else 0.0)


def _label(case: Case) -> NDArray[Any]:
    if case.label is None:
        raise ValueError("the training cases of `mean_label` must have labels, got one without.")
    return case.label


def _stretch(values: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float32]:
    zoom = [new / old for new, old in zip(shape, values.shape, strict=True)]
    made: NDArray[np.float32] = ndimage.zoom(values.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest")
    return made


RULE = Rule(mean_label, {"threshold": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)}, uses_training=True)
