# SPDX-License-Identifier: Apache-2.0
"""CT slices with outlines, in radiological view: the patient's right on the left, anterior or superior at the top."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = [
    "DIFFERENT", "SOFT_TISSUE", "Plane", "Volume", "best_slice", "class_color", "cut", "difference_picture",
    "disagreement", "load", "outline_picture",
]

Plane = Literal["axial", "coronal"]
Array = NDArray[Any]

SOFT_TISSUE = (40.0, 400.0)   # level and width, HU
DIFFERENT = "#ff2fd0"
_COLORS = ("#ff9f1c", "#4cc9f0", "#ffe94a", "#ff4d5a", "#3ddc84", "#ff7be5", "#b79cff", "#c8d64b")
_WIDTH = 560                  # pixels of a picture
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
        _outline(axes, classes == number, pixel, class_color(int(number)))
    return _png(axes)


def difference_picture(
    image: Volume, first: Volume, second: Volume, plane: Plane, position: int,
    window: tuple[float, float] = SOFT_TISSUE,
) -> bytes:
    """Draw as `outline_picture` the voxels where two predictions differ, and the outline of the second one."""
    axes = _canvas(image, plane, position, window)
    (one, pixel), (other, _) = cut(first, plane, position), cut(second, plane, position)
    _outline(axes, other > 0, pixel, "#ffffff", 1.2)
    overlay = np.zeros((*one.shape, 4))
    overlay[..., :3] = [int(DIFFERENT[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    overlay[..., 3] = 0.75 * (one != other)
    axes.imshow(overlay, extent=axes.images[0].get_extent(), interpolation="nearest")
    return _png(axes)


def _canvas(image: Volume, plane: Plane, position: int, window: tuple[float, float]) -> Any:
    """Axes with the windowed slice, on a figure of its shape, in mm, with the letters of its sides."""
    from matplotlib.figure import Figure  # a second to import
    from matplotlib.patheffects import withStroke

    pixels, pixel = cut(image, plane, position)
    height, width = pixels.shape[0] * pixel[0], pixels.shape[1] * pixel[1]
    axes: Any = Figure(figsize=(_WIDTH / 100, _WIDTH / 100 * height / width), dpi=100).add_axes((0, 0, 1, 1))
    gray = {"cmap": "gray", "vmin": window[0] - window[1] / 2, "vmax": window[0] + window[1] / 2}
    axes.imshow(pixels, extent=(0.0, width, height, 0.0), interpolation="bicubic", **gray)
    axes.autoscale(False)
    axes.set_axis_off()
    places = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
    for letter, place in zip(_LETTERS[plane], places, strict=True):
        axes.text(
            *place, letter, transform=axes.transAxes, color="white", fontsize=20, weight="bold", ha="center",
            va="center", path_effects=[withStroke(linewidth=3, foreground="black")],
        )
    return axes


def _outline(axes: Any, mask: Array, pixel: tuple[float, float], color: str, width: float = 2.6) -> None:
    """Draw a mask's outline; drawn on a finer grid, so that thin shapes keep theirs."""
    if not mask.any():
        return
    finer = np.pad(np.kron(mask, np.ones((4, 4))), 4)
    smooth = ndimage.gaussian_filter(finer, 1.5)
    rows, columns = ((np.arange(finer.shape[n]) - 3.5) * pixel[n] / 4 for n in (0, 1))
    axes.contour(columns, rows, smooth, levels=[0.5], colors=[color], linewidths=width)


def _png(axes: Any) -> bytes:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", facecolor="black")
    return buffer.getvalue()
