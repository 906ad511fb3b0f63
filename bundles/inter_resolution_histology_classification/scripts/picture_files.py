# SPDX-License-Identifier: Apache-2.0
"""Pictures and TIFF files, their colors by what they mean: palettes, inverted gray, print colors, single bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PICTURES", "TIFFS", "TiffStack", "colors_by_meaning", "is_plain_tiff", "itk_spacing", "one_channel",
           "read_tiff",
           "tiff_lengths"]

Array = NDArray[Any]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
TIFFS = (".tif", ".tiff")
_TO = {   # mode of Pillow -> the one that shows the same
    "1": "L", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA",
}
_BLACK, _RGB, _PALETTE, _WHITE, _PRINT = 1, 2, 3, 0, 5   # photometric interpretations of TIFF
_PLAIN = {"uint8", "uint16", "int16", "uint32", "int32", "float32"}   # types that ITK reads


def colors_by_meaning(picture: Any) -> Any:
    """Convert a picture of Pillow to gray or red, green, blue, perhaps with alpha; what is such already stays."""
    if picture.mode == "P":
        return picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    return picture.convert(_TO[picture.mode]) if picture.mode in _TO else picture


class TiffStack(NamedTuple):
    """Pixels of a TIFF file.

    Attributes:
        pixels: shape (Z, Y, X), Z is 1 for one page; with colors (Z, Y, X, C).
        spacing: lengths of a voxel along Z, Y, X; None where the file does not say.
        unit: that these are in, as the file names it; None where it names none.
    """

    pixels: Array
    spacing: tuple[float, float, float] | None
    unit: str | None


def is_plain_tiff(path: str) -> bool:
    """Whether ITK, by which MONAI reads TIFF, gives what the file shows: gray or RGB of common types."""
    try:
        tifffile = import_module("tifffile")                       # comes with scikit-image
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            gray = page.photometric == _BLACK and str(page.dtype) in _PLAIN
            return gray or (page.photometric in (_RGB, 6) and str(page.dtype) == "uint8")   # 6: YCbCr, of JPEG
    except Exception:   # a broken file makes it raise anything; ITK then says what is wrong
        return True


def one_channel(path: str, pixels: Array) -> Array:
    """Gray (Z, Y, X) of pages (Z, Y, X[, C]) that hold gray as colors, perhaps with alpha."""
    if pixels.ndim == 3:
        return pixels
    colors = pixels[..., : 1 if pixels.shape[-1] == 2 else 3]
    if bool((colors != colors[..., :1]).any()):
        raise ValueError(f"{path} must have one channel, got {pixels.shape[-1]} that differ; save the one meant.")
    return np.ascontiguousarray(colors[..., 0])


def tiff_lengths(path: str) -> tuple[tuple[float, float, float] | None, str | None]:
    """Lengths of a voxel along Z, Y, X that a TIFF file states, and their unit; None where it does not."""
    try:
        tifffile = import_module("tifffile")                       # comes with scikit-image
        with tifffile.TiffFile(path) as file:
            return _lengths(file, file.pages[0])
    except Exception:   # another reader has opened it: what is strange here says nothing
        return None, None


def itk_spacing(path: str, rank: int) -> list[float]:
    """Lengths of a pixel along X, Y (and Z) as ITK has them, also of files that it does not read: mm, or 1."""
    spacing, unit = tiff_lengths(path)
    plain = [1.0] * rank
    return plain if spacing is None or unit != "mm" else [spacing[2], spacing[1], 1.0][:rank]


def read_tiff(path: str, is_label: bool = False) -> TiffStack:
    """Read all pages of a TIFF file.

    Args:
        path: the file.
        is_label: numbers, such as indices into a palette, stay as they are.

    Raises:
        ValueError: pages of several sizes, or more than three axes and colors.
        ImportError: tifffile is not installed.
    """
    try:
        tifffile = import_module("tifffile")
    except ImportError as error:
        raise ImportError(f"{path} needs tifffile, which is not installed; pip install tifffile.") from error

    with tifffile.TiffFile(path) as file:
        if not len(file.pages):
            raise ValueError(f"{path} must be TIFF with a page, got another or a damaged file; export it again.")
        series, page = file.series[0], file.pages[0]
        try:
            pixels, axes = series.asarray(), series.axes
        except ValueError as error:                                # a codec that only Pillow has here
            pixels, axes = _read_with_pillow(path, error)
        pixels = _three_axes(path, pixels, axes, tuple(series.shape))
        if not is_label:
            pixels = _shown(path, pixels, page)
        return TiffStack(pixels, *_lengths(file, page))


def _read_with_pillow(path: str, error: Exception) -> tuple[Array, str]:
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as file:
            pages = [np.asarray(page) for page in ImageSequence.Iterator(file)]
        pixels = np.stack(pages)
    except (OSError, ValueError):
        raise error from None                                      # its first reader knows more of the file
    return pixels, "ZYX" if pixels.ndim == 3 else "ZYXS"


def _three_axes(path: str, pixels: Array, axes: str, shape: tuple[int, ...]) -> Array:
    """Bring (..., Y, X[, S]) to (Z, Y, X[, S]): axes of one element go, one other may be left."""
    if axes.endswith("YX") and "S" in axes:                        # colors, plane by plane
        place = axes.index("S")
        pixels, axes = np.moveaxis(pixels, place, -1), axes.replace("S", "") + "S"
    colors = axes.endswith("S")
    end = pixels.ndim - (3 if colors else 2)
    front = [size for size in pixels.shape[:end] if size > 1]
    if end < 0 or len(front) > 1:
        raise ValueError(f"{path} must be a picture or a stack of them, got axes {axes} of {shape}; save one channel.")
    return pixels.reshape(*(front or [1]), *pixels.shape[end:])


def _shown(path: str, pixels: Array, page: Any) -> Array:
    """What the numbers of the pages show."""
    if pixels.dtype == bool:
        return np.where(pixels != (page.photometric == _WHITE), 255, 0).astype(np.uint8)
    if page.photometric == _WHITE:
        top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else pixels.max()
        return np.asarray(top - pixels, pixels.dtype)
    if page.photometric == _PALETTE and page.colormap is not None and pixels.ndim == 3:
        colors = np.asarray(page.colormap).T                       # (numbers, 3), 16 bits: 256 or 257 times 8
        return (colors // 256).astype(np.uint8)[pixels]
    if page.photometric == _PRINT and pixels.shape[-1] == 4:
        top = float(np.iinfo(pixels.dtype).max)
        light = top - pixels.astype(np.float64)                    # of cyan, magenta, yellow and black ink
        return np.rint(light[..., :3] * light[..., 3:] / top).astype(pixels.dtype)
    if page.photometric not in (_BLACK, _RGB, 6):
        from PIL import Image

        with Image.open(path) as file:
            return np.asarray(colors_by_meaning(file))[None]
    return pixels


def _lengths(file: Any, page: Any) -> tuple[tuple[float, float, float] | None, str | None]:
    """Lengths of a voxel and their unit, of OME, ImageJ or the tags for resolution."""
    if file.ome_metadata:
        return _ome_lengths(file.ome_metadata)
    described = file.imagej_metadata or {}
    pixel = _pixel(page)
    unit = described.get("unit")
    if described and pixel and unit and str(unit).lower() not in ("pixel", "pixels", "inch"):
        return (float(described.get("spacing", 1.0)), *pixel), str(unit)
    code = int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 1
    if pixel and code in (2, 3):                                   # per inch, per centimeter: lengths in mm
        scale = 25.4 if code == 2 else 10.0
        return (float(described.get("spacing", 1.0)), pixel[0] * scale, pixel[1] * scale), "mm"
    return None, None


def _pixel(page: Any) -> tuple[float, float] | None:
    """Height and width of a pixel, in the unit of its resolution."""
    lengths = []
    for name in ("YResolution", "XResolution"):
        value = page.tags[name].value if name in page.tags else (0, 1)
        above, below = value if isinstance(value, tuple) else (value, 1)
        if not above or not below:
            return None
        lengths.append(float(below) / float(above))
    return lengths[0], lengths[1]


def _ome_lengths(text: str) -> tuple[tuple[float, float, float] | None, str | None]:
    from xml.etree import ElementTree

    try:
        found = ElementTree.fromstring(text).iter()
    except ElementTree.ParseError:
        return None, None
    for element in found:
        if element.tag.rpartition("}")[2] == "Pixels" and "PhysicalSizeX" in element.attrib:
            return _ome_pixels(element.attrib)
    return None, None


def _ome_pixels(stated: dict[str, str]) -> tuple[tuple[float, float, float], str]:
    """Lengths along Z, Y, X, all in the unit of X; OME's own default is the micron."""
    from .units import unit_power

    unit = stated.get("PhysicalSizeXUnit", "um")
    power = unit_power(unit)

    def length(axis: str, default: float) -> float:
        own = unit_power(stated.get(f"PhysicalSize{axis}Unit", "um"))
        scale = 10.0 ** (own - power) if own is not None and power is not None else 1.0
        return float(stated.get(f"PhysicalSize{axis}", default)) * scale

    across = float(stated["PhysicalSizeX"])
    down = length("Y", across) if "PhysicalSizeY" in stated else across
    deep = length("Z", across) if "PhysicalSizeZ" in stated else across
    return (deep, down, across), unit


