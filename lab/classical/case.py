# SPDX-License-Identifier: Apache-2.0
"""What a rule is given, in one orientation for all, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "Case", "Rule", "body_box"]

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Case:
    """An image with its axes along right to left, back to front, feet to head (RAS); a picture as it lies."""

    image: NDArray[np.float32]             # (*S), HU or gray values, the mean of colors; (3, H, W), 0 to 1, of a class
    spacing: tuple[float, ...]             # mm
    label: NDArray[np.int16] | None        # (*S), or () of a class; only training cases have theirs


Segment = Callable[..., NDArray[Any]]      # a case, parameters -> classes or instances (*S), scores of classes (K,)


@dataclass(frozen=True)
class Rule:
    """A way to segment, or to classify whole images, without a network.

    `prepare` is given the training cases and the number of classes, and gives the function that segments a case, with
    a keyword for each key of `grid`; a rule of filters knows what it does and looks at no training case.
    """

    prepare: Callable[[Sequence[Case], int], Segment]
    grid: Mapping[str, Sequence[Any]]      # parameter -> values, of which the best on validation is taken
    uses_training: bool = False            # else the training cases are not even read


def body_box(image: NDArray[Any], threshold: float = -500.0) -> Box:
    """Smallest box around all above a threshold; the whole image where there is nothing."""
    inside = image > threshold
    found = [np.flatnonzero(inside.any(axis=tuple(set(range(image.ndim)) - {axis}))) for axis in range(image.ndim)]
    if not found[0].size:
        return tuple(slice(0, size) for size in image.shape)
    return tuple(slice(int(one[0]), int(one[-1]) + 1) for one in found)
