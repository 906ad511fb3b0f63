# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with the values of an image: none that shows, outside of the window, colors taken for gray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.data.volumes import Volume

__all__ = ["image_problems"]

_SAMPLE = 2**20           # voxels that speak for an image
_LEAST_SHARE = 0.02       # of voxels inside the window; CT of head and neck has 0.10 and more, in air
_LEAST_SPREAD = 0.02      # of the window, that the values inside fill
_LEAST_SHIFTED = 0.05     # of voxels where soft tissue lies in HU + 1024
_CT_OFFSET = 1024
_LEAST_ABOVE = 0.02       # of voxels outside of a window of 8 bit, so that it is none
_CLOSE = 0.06             # mean difference of two pictures in 0..1 that show the same
_COLORS = 4               # values per pixel that are colors, with alpha
Window = Sequence[float]


def image_problems(
    data: NDArray[Any], volume: Volume, window: Window | None, channels: Sequence[int] | None
) -> Iterator[str]:
    """Look at the values of an image (C, *S), and tell what is wrong with them.

    Args:
        data: the voxels as the reader gives them.
        volume: gets its `low` and `high`.
        window: values that become 0 and 1; None where there is no fixed window.
        channels: numbers of channels that are taken; None takes any.
    """
    volume.low, volume.high = float(data.min()), float(data.max())
    found = volume.header.samples if volume.header.samples > _COLORS else volume.channels
    if channels is not None and found not in channels:
        expected = " or ".join(map(str, channels))
        yield (
            f"{volume.path} must have {expected} channel(s), got {found}; save it in gray, or take one "
            "channel; for a network of more channels name their numbers (--data_check#channels \"[4]\")."
        )
    if not np.isfinite([volume.low, volume.high]).all():
        count = int(data.size - np.isfinite(data).sum())
        yield f"{volume.path} must have finite values, got {count:,} NaN or infinite voxels; replace them."
    elif volume.low == volume.high:
        yield f"{volume.path} must show something, got {volume.low:g} in all voxels; export it again."
    else:
        if window is not None:
            yield from _window_problem(data, volume, window)
        yield from _mode_problem(data, volume)


def _window_problem(data: NDArray[Any], volume: Volume, window: Window) -> Iterator[str]:
    low, high = (float(value) for value in window)
    flat = data.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)
    inside = float(((sample > low) & (sample < high)).mean())
    ends = np.quantile(np.clip(sample, low, high), [0.001, 0.999])
    spread = float(ends[1] - ends[0]) / (high - low)
    shifted = float(((sample > low + _CT_OFFSET) & (sample < high + _CT_OFFSET)).mean())
    outside = float(((sample < low) | (sample > high)).mean())
    has = f"{volume.path} must have its values in `intensity_range`, {low:g} to {high:g}, got {volume.low:g} to "
    has += f"{volume.high:g}"
    if low < 0 <= volume.low and volume.high > high and shifted >= _LEAST_SHIFTED:
        yield f"{has}, like HU + {_CT_OFFSET} without a sign; subtract {_CT_OFFSET}, or move the window by as much."
    elif spread < _LEAST_SPREAD:
        scaled = ", like values scaled to 0..1" if volume.low >= 0 and volume.high <= 1 else ""
        yield f"{has}{scaled}, of which the window makes one gray; undo the scaling, or set `intensity_range` to fit."
    elif inside < _LEAST_SHARE:
        yield f"{has} with {inside:.1%} of the voxels inside; undo a scaling, or set `intensity_range` to fit."
    elif (low, high) == (0, 255) and outside >= _LEAST_ABOVE:
        yield (
            f"{has} with {outside:.0%} of the voxels outside, like 12 or 16 bit, or HU, for a window of 8 bit; "
            "scale it to 0..255, or set `intensity_range` to fit."
        )


def _mode_problem(data: NDArray[Any], volume: Volume) -> Iterator[str]:
    """Compare a picture of a rare mode with what it shows; no word where the reader got it right."""
    if not volume.header.mode or volume.header.pages > 1:
        return
    found = _unit(np.squeeze(data[: 3 if len(data) > 2 else 1].astype(np.float64).mean(0)))
    try:
        shown = [_unit(gray) for gray in _shown(volume.path, volume.header.mode)]
    except (OSError, ValueError):   # no viewer shows it either
        return
    pairs = [(found, gray) for gray in shown] + [(found.T, gray) for gray in shown]
    if any(a.shape == b.shape and float(np.abs(a - b).mean()) < _CLOSE for a, b in pairs):
        return
    yield (
        f"{volume.path} must be gray or RGB, got {volume.header.mode}, which the reader takes for something else; "
        "save it as an RGB or gray PNG."
    )


def _shown(path: str, mode: str) -> Iterator[NDArray[np.float64]]:
    """A picture in gray, as a viewer shows it: the mean of its colors, and their luminance."""
    from PIL import Image

    if mode == "white as 0":
        import tifffile

        yield -tifffile.imread(path).astype(np.float64)
        return
    with Image.open(path) as picture:
        color = picture.convert("RGB")
        yield np.asarray(color, np.float64).mean(-1)
        yield np.asarray(color.convert("L"), np.float64)


def _unit(gray: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = float(gray.min()), float(gray.max())
    return (gray - low) / (high - low) if high > low else gray - low
