# SPDX-License-Identifier: Apache-2.0
"""CT slices with contours, in radiological view: the patient's right on the left, anterior or superior at the top."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["COLORS", "Volume", "best_slice", "contour_picture", "cut", "difference_picture", "disagreement", "load"]

Plane = Literal["axial", "coronal"]
Array = NDArray[Any]

COLORS = ("#ff9f1c", "#4cc9f0", "#ffe94a", "#ff4d5a", "#3ddc84", "#ff7be5", "#b79cff", "#c8d64b")  # organ 1, 2, ...
DIFFERENT = "#ff2fd0"
WINDOW = (40.0, 400.0)  # level and width, HU
WIDTH = 560             # pixels of a picture
_LETTERS = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I")}   # left, right, top, bottom


@dataclass(frozen=True)
class Volume:
    """Voxels with axes to the patient's right, anterior and superior, shape (X, Y, Z), and their size in mm."""

    data: Array
    spacing: tuple[float, ...]


def load(path: Path) -> Volume:
    """Read a NIfTI file, and turn its axes to the nearest right, anterior and superior ones."""
    image: Any = nib.as_closest_canonical(nib.load(path))
    return Volume(np.asarray(image.dataobj), tuple(float(size) for size in image.header.get_zooms()[:3]))


def cut(volume: Volume, plane: Plane, position: int) -> tuple[Array, tuple[float, float]]:
    """Give a slice as it is looked at.

    Args:
        volume: axes to the patient's right, anterior, superior.
        plane: `axial`, seen from the feet, or `coronal`, seen from the front.
        position: index along the third or the second axis.

    Returns:
        Rows from the top and columns from the left, the patient's right first; height and width of a pixel in mm.
    """
    if plane == "axial":
        return volume.data[::-1, ::-1, position].T, (volume.spacing[1], volume.spacing[0])
    return volume.data[::-1, position, ::-1].T, (volume.spacing[2], volume.spacing[0])


def best_slice(label: Array, plane: Plane) -> int:
    """Choose the slice that shows most organs, each counted by the share of its largest section that is there."""
    axis = 2 if plane == "axial" else 1
    other = tuple(number for number in range(3) if number != axis)
    score = np.zeros(label.shape[axis])
    for organ in range(1, int(label.max()) + 1):
        area = (label == organ).sum(axis=other).astype(float)
        score += np.sqrt(area / max(area.max(), 1.0))
    return int(score.argmax())


def disagreement(first: Array, second: Array) -> float:
    """Percent of the voxels that either calls an organ where the two differ."""
    organ = (first > 0) | (second > 0)
    return 100.0 * float((first != second).sum()) / max(int(organ.sum()), 1)


def contour_picture(image: Volume, label: Volume, plane: Plane, position: int) -> bytes:
    """Draw a slice with the organs' outlines, as a PNG."""
    figure, axes = _canvas(image, plane, position)
    classes, pixel = cut(label, plane, position)
    for organ in range(1, len(COLORS) + 1):
        _outline(axes, classes == organ, pixel, COLORS[organ - 1])
    return _png(figure)


def difference_picture(
    image: Volume, pair: Sequence[Volume], plane: Plane, position: int
) -> bytes:
    """Draw the voxels of a slice where two predictions differ, and the outline of the second one, as a PNG."""
    figure, axes = _canvas(image, plane, position)
    first, pixel = cut(pair[0], plane, position)
    second, _ = cut(pair[1], plane, position)
    _outline(axes, second > 0, pixel, "#ffffff", 1.2)
    color = np.array([int(DIFFERENT[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    overlay = np.zeros((*first.shape, 4))
    overlay[..., :3], overlay[..., 3] = color, 0.75 * (first != second)
    axes.imshow(overlay, extent=_extent(first, pixel), interpolation="nearest")
    return _png(figure)


def _extent(pixels: Array, pixel: tuple[float, float]) -> tuple[float, float, float, float]:
    height, width = pixels.shape[0] * pixel[0], pixels.shape[1] * pixel[1]
    return (0.0, width, height, 0.0)


def _canvas(image: Volume, plane: Plane, position: int) -> tuple[Figure, Any]:
    """The windowed slice on a figure of its own shape, with the letters of its sides."""
    pixels, pixel = cut(image, plane, position)
    left, right, bottom, top = _extent(pixels, pixel)
    figure = Figure(figsize=(WIDTH / 100, WIDTH / 100 * bottom / right), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    low = WINDOW[0] - WINDOW[1] / 2
    axes.imshow(
        pixels, cmap="gray", vmin=low, vmax=low + WINDOW[1], extent=(left, right, bottom, top),
        interpolation="bicubic",
    )
    axes.set_axis_off()
    places = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
    for letter, place in zip(_LETTERS[plane], places, strict=True):
        axes.text(
            *place, letter, transform=axes.transAxes, color="white", fontsize=20, weight="bold", ha="center",
            va="center", path_effects=[withStroke(linewidth=3, foreground="black")],
        )
    return figure, axes


def _outline(axes: Any, mask: Array, pixel: tuple[float, float], color: str, width: float = 2.6) -> None:
    """Draw a mask's outline; drawn on a finer grid, so that thin organs keep theirs."""
    if not mask.any():
        return
    finer = np.pad(np.kron(mask, np.ones((4, 4))), 4)
    smooth = ndimage.gaussian_filter(finer, 1.5)
    rows = (np.arange(finer.shape[0]) - 3.5) * pixel[0] / 4
    columns = (np.arange(finer.shape[1]) - 3.5) * pixel[1] / 4
    axes.contour(columns, rows, smooth, levels=[0.5], colors=[color], linewidths=width)
    axes.set_xlim(0, mask.shape[1] * pixel[1])
    axes.set_ylim(mask.shape[0] * pixel[0], 0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="black")
    return buffer.getvalue()


def differing_share(predictions: Mapping[str, Sequence[Volume]], run: str, teacher: str) -> list[float]:
    """`disagreement` of a network with the teacher, for each case."""
    pairs = zip(predictions[run], predictions[teacher], strict=True)
    return [disagreement(one.data, other.data) for one, other in pairs]
