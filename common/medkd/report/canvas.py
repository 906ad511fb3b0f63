# SPDX-License-Identifier: Apache-2.0
"""A slice as a PNG, and what is drawn over it: outlines, marked voxels, attention."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["ATTENTION", "border", "canvas", "edges", "heat", "mark", "outline", "png"]

Array = NDArray[Any]
Pixel = tuple[float, float]

ATTENTION = "inferno"         # matplotlib's map of colors, from dark to bright
_WIDTH = 560                  # pixels of a picture
_FINER = 4                    # pixels that outlines divide one into
_PLACES = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))


def canvas(
    pixels: Array, pixel: Pixel, window: tuple[float, float], letters: Sequence[str] = (), width: int = _WIDTH,
    view: tuple[slice, slice] | None = None,
) -> Any:
    """Axes with a slice, on a figure of the shape of what is seen of it.

    Args:
        pixels: shape (H, W) in the unit of `window`, or (H, W, 3) of colors in [0, 1].
        pixel: height and width of a pixel, in any unit.
        window: level and width of the gray values.
        letters: of the left, right, top and bottom side; none for none.
        width: of the picture, in pixels.
        view: rows and columns that are seen; None for all.
    """
    from matplotlib.figure import Figure  # a second to import
    from matplotlib.patheffects import withStroke

    height, length = pixels.shape[0] * pixel[0], pixels.shape[1] * pixel[1]
    seen = view or (slice(0, pixels.shape[0]), slice(0, pixels.shape[1]))
    (top, bottom), (left, right) = ((one.start * step, one.stop * step) for one, step in zip(seen, pixel, strict=True))
    inches = width / 100
    size = inches, max(inches * (bottom - top) / (right - left), 0.2)
    axes: Any = Figure(figsize=size, dpi=100).add_axes((0, 0, 1, 1))
    gray = {"cmap": "gray", "vmin": window[0] - window[1] / 2, "vmax": window[0] + window[1] / 2}
    axes.imshow(pixels, extent=(0.0, length, height, 0.0), interpolation="bicubic", aspect="auto", **gray)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.autoscale(False)
    axes.set_axis_off()
    for letter, place in zip(letters, _PLACES[: len(letters)], strict=True):
        axes.text(
            *place, letter, transform=axes.transAxes, color="white", fontsize=20 * width / _WIDTH, weight="bold",
            ha="center", va="center", path_effects=[withStroke(linewidth=3 * width / _WIDTH, foreground="black")],
        )
    return axes


def outline(axes: Any, mask: Array, pixel: Pixel, color: str, width: float = 2.6) -> None:
    """Draw a mask's outline; drawn on a finer grid, so that thin shapes keep theirs."""
    if not mask.any():
        return
    finer = np.pad(np.kron(mask, np.ones((_FINER, _FINER))), _FINER)
    smooth = ndimage.gaussian_filter(finer, 1.5)
    offset = _FINER - 0.5
    rows, columns = ((np.arange(finer.shape[n]) - offset) * pixel[n] / _FINER for n in (0, 1))
    axes.contour(columns, rows, smooth, levels=[0.5], colors=[color], linewidths=width)


def edges(axes: Any, instances: Array, color: str) -> None:
    """Draw the borders of all instances, shape (H, W) of whole numbers, 0 is background, inside of each."""
    finer = np.kron(instances, np.ones((_FINER, _FINER), instances.dtype))
    padded = np.pad(finer, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    others = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    mark(axes, (middle > 0) & np.any([middle != other for other in others], axis=0), color, 1.0)


def mark(axes: Any, mask: Array, color: str, alpha: float = 0.75) -> None:
    """Color the pixels of a mask, of shape (H, W) or finer."""
    overlay = np.zeros((*mask.shape, 4))
    overlay[..., :3] = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    overlay[..., 3] = alpha * mask
    axes.imshow(overlay, extent=axes.images[0].get_extent(), interpolation="nearest", aspect="auto")


def heat(axes: Any, values: Array, top: float) -> None:
    """Draw values of 0 to `top`, shape (H, W), in colors; the lower, the more of the image is seen."""
    from matplotlib import colormaps

    share = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    colors = colormaps[ATTENTION](0.25 + 0.75 * share)             # (H, W, 4); the dark end would look like the image
    colors[..., 3] = 0.9 * np.sqrt(share)
    axes.imshow(colors, extent=axes.images[0].get_extent(), interpolation="bilinear", aspect="auto")


def border(axes: Any, color: str, dashed: bool = False, width: float = 9.0) -> None:
    """Draw a border inside of the picture, `width` points wide; half of it lies outside and is not seen."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=color, linewidth=width,
                             linestyle=(0, (2, 1.5)) if dashed else "-"))


def png(axes: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", facecolor="black")
    return buffer.getvalue()
