# SPDX-License-Identifier: Apache-2.0
"""CT slices with outlines, in radiological view: the patient's right on the left, anterior or superior at the top."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medkd.report.canvas import canvas, mark, outline, png

__all__ = [
    "DIFFERENT", "SOFT_TISSUE", "Plane", "Volume", "best_slice", "class_color", "cut", "difference_picture",
    "disagreement", "load", "outline_picture",
]

Plane = Literal["axial", "coronal"]
Array = NDArray[Any]

SOFT_TISSUE = (40.0, 400.0)   # level and width, HU
DIFFERENT = "#ff2fd0"
_COLORS = ("#ff9f1c", "#4cc9f0", "#ffe94a", "#ff4d5a", "#3ddc84", "#ff7be5", "#b79cff", "#c8d64b")
_LETTERS = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I")}   # left, right, top, bottom


@dataclass(frozen=True)
class Volume:
    """Voxels with axes to the patient's right, anterior and superior, shape (X, Y, Z), and their size in mm."""

    data: Array
    spacing: tuple[float, ...]


def load(path: Path) -> Volume:
    """Read a NIfTI file, and turn its axes to the nearest right, anterior and superior ones."""
    image: Any = nib.as_closest_canonical(nib.load(path))   # type: ignore[no-untyped-call]
    return Volume(np.asarray(image.dataobj), tuple(float(size) for size in image.header.get_zooms()[:3]))


def cut(volume: Volume, plane: Plane, position: int) -> tuple[Array, tuple[float, float]]:
    """Give a slice as it is looked at, axial from the feet or coronal from the front.

    Returns:
        Rows from the top and columns from the left, the patient's right first; height and width of a pixel in mm.
    """
    if plane == "axial":
        return volume.data[::-1, ::-1, position].T, (volume.spacing[1], volume.spacing[0])
    return volume.data[::-1, position, ::-1].T, (volume.spacing[2], volume.spacing[0])


def class_color(number: int) -> str:
    """Color of the outline of class 1, 2, ...; they repeat after eight."""
    return _COLORS[(number - 1) % len(_COLORS)]


def best_slice(label: Array, plane: Plane) -> int:
    """Choose the slice that shows most classes, each counted by the share of its largest section that is there."""
    other = (0, 1) if plane == "axial" else (0, 2)
    areas = [(label == number).sum(axis=other) for number in range(1, int(label.max()) + 1)]
    return int(np.argmax(sum(np.sqrt(area / max(area.max(), 1)) for area in areas)))


def disagreement(first: Array, second: Array) -> float:
    """Percent of the voxels that either calls foreground where the two differ.

    Example:
        >>> disagreement(np.array([0, 1, 1, 2]), np.array([0, 1, 1, 1]))
        33.333333333333336
    """
    foreground = (first > 0) | (second > 0)
    return 100.0 * float((first != second).sum()) / max(int(foreground.sum()), 1)


def outline_picture(
    image: Volume, label: Volume, plane: Plane, position: int, window: tuple[float, float] = SOFT_TISSUE
) -> bytes:
    """Draw a slice with the outline of each class of `label`, a map on the same grid, as a PNG.

    `window` is level and width of the gray values, in the unit of the image.
    """
    axes = _canvas(image, plane, position, window)
    classes, pixel = cut(label, plane, position)
    for number in np.unique(classes[classes > 0]):
        outline(axes, classes == number, pixel, class_color(int(number)))
    return png(axes)


def difference_picture(
    image: Volume, first: Volume, second: Volume, plane: Plane, position: int,
    window: tuple[float, float] = SOFT_TISSUE,
) -> bytes:
    """Draw as `outline_picture` the voxels where two predictions differ, and the outline of the second one."""
    axes = _canvas(image, plane, position, window)
    (one, pixel), (other, _) = cut(first, plane, position), cut(second, plane, position)
    outline(axes, other > 0, pixel, "#ffffff", 1.2)
    mark(axes, one != other, DIFFERENT)
    return png(axes)


def _canvas(image: Volume, plane: Plane, position: int, window: tuple[float, float]) -> Any:
    """Axes with the windowed slice and the letters of its sides."""
    return canvas(*cut(image, plane, position), window, _LETTERS[plane])
