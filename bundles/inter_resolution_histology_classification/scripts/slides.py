# SPDX-License-Identifier: Apache-2.0
"""Whole slides: read at a resolution in microns, classified tile by tile, told as a map and as shares of the tissue."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.data.wsi_reader import WSIReader
from monai.inferers import Inferer
from monai.transforms import MapTransform
from monai.utils import OptionalImportError
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import threshold_otsu
from torch import Tensor

__all__ = ["LoadSlided", "SaveSlideClassesd", "TileInferer", "class_map", "tissue_mask"]

_TOLERANCE = 0.05                      # of the resolution, as MONAI's reader has it: nothing is resampled within it
_STRIP = 256 * 2**20                   # bytes of a slide that are read at once
_PACKAGES = {
    "openslide": "openslide-python openslide-bin", "cucim": "cucim-cu12", "tifffile": "tifffile imagecodecs",
}
_CELL = 8                              # pixels per side over which the color is averaged, to find tissue
_LEAST_CONTRAST = 0.05                 # of two saturations that Otsu's threshold parts
_COLORS = (   # of background and up to eight classes
    (255, 255, 255), (102, 194, 165), (252, 141, 98), (141, 160, 203), (231, 138, 195), (166, 216, 84),
    (255, 217, 47), (229, 196, 148), (120, 120, 120),
)


class LoadSlided(MapTransform):
    """Read whole slides at the resolution that the student sees, by MONAI's `WSIReader`.

    The coarsest level that is fine enough is read, in strips, and averaged over areas to the resolution, as the
    training does; a level within 5 % of it is taken as it is.

    Args:
        keys: paths of slides. What is loaded already stays as it is.
        mpp: microns per pixel of the pictures that the student was trained with, before they were degraded.
        scale: how many of these pixels a pixel of the student has along each axis.
        backend: openslide, cucim or tifffile. The last reads a whole level at once, and knows few compressions.
        file_mpp: microns per pixel of a slide's finest level, where its file does not say or is wrong.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: no resolution or backend, a slide that is coarser than that, or that does not say its own.
        ImportError: the package of the backend is not installed.
    """

    def __init__(
        self, keys: KeysCollection, mpp: float | None, scale: int = 1, backend: str = "openslide",
        file_mpp: float | None = None, allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if backend not in _PACKAGES:
            raise ValueError(f"`backend` must be one of {', '.join(_PACKAGES)}, got {backend!r}.")
        for name, value in (("mpp", mpp), ("file_mpp", file_mpp)):
            if (value is None and name == "mpp") or (value is not None and not value > 0):
                raise ValueError(
                    f"`{name}` must be microns per pixel, above 0, got {value!r}; give what the pictures of the "
                    "training had, such as --slide#mpp 1.0 for 10 x."
                )
        self.mpp = float(mpp or 0) * scale
        self.backend, self.file_mpp = backend, file_mpp

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the slides as pictures (3, H, W), 0 to 255, uint8."""
        result = dict(data)
        for key in self.key_iterator(result):
            if isinstance(result[key], (str, os.PathLike)):
                result[key] = self._read(str(result[key]))
        return result

    def _read(self, path: str) -> MetaTensor:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} must be there to be read, got no such file; correct its path.")
        try:
            reader = WSIReader(self.backend)
            slide = reader.read(path)
        except OptionalImportError as error:
            packages = _PACKAGES[self.backend]
            raise ImportError(
                f"{path} needs {self.backend}, which is not installed; pip install {packages}, or give another "
                "--slide#backend."
            ) from error
        with closing(slide):
            return self._picture(reader, slide, path)

    def _picture(self, reader: WSIReader, slide: Any, path: str) -> MetaTensor:
        level, own = self._level(reader, slide, path)
        ratio = 1.0 if abs(own / self.mpp - 1) <= _TOLERANCE else self.mpp / own     # pixels of the level per pixel
        size = _level_size(reader, slide, level)
        strips = [_averaged(strip, ratio) for strip in _strips(reader, slide, level, size, ratio)]
        picture = torch.cat(strips, 1)                                               # (3, H, W)
        step = self.mpp / 1000.0                                                     # mm
        meta = {"filename_or_obj": path, "original_channel_dim": 0}
        return MetaTensor(picture, torch.diag(torch.tensor([step, step, 1.0])), meta)

    def _level(self, reader: WSIReader, slide: Any, path: str) -> tuple[int, float]:
        """The coarsest level that is fine enough, and its microns per pixel."""
        try:
            first = self.file_mpp or float(np.mean(reader.get_mpp(slide, 0)))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} must say its microns per pixel, got none ({error}); give them as --slide#file_mpp."
            ) from error
        full = _level_size(reader, slide, 0)[0]
        lengths = [first * full / _level_size(reader, slide, level)[0] for level in range(_levels(reader, slide))]
        good = [level for level, length in enumerate(lengths) if length <= self.mpp * (1 + _TOLERANCE)]
        if not good:
            raise ValueError(
                f"{path} must have {self.mpp:g} microns per pixel or less, got {first:g} at its finest; if that is the "
                "resolution of a screen, which some programs write, give the right one, --slide#file_mpp, else take a "
                "student that was trained for less resolution."
            )
        best = max(good, key=lambda level: lengths[level])
        return best, lengths[best]


def _levels(reader: WSIReader, slide: Any) -> int:
    """Number of levels; of TIFF only where pages are levels, as MONAI takes pages such as a label for some."""
    if reader.backend != "tifffile":
        return int(reader.get_level_count(slide))
    pages, levels = len(slide.pages), len(slide.series[0].levels)
    return levels if pages == levels else 1


def _level_size(reader: WSIReader, slide: Any, level: int) -> tuple[int, int]:
    height, width = reader.get_size(slide, level)
    return int(height), int(width)


def _strips(
    reader: WSIReader, slide: Any, level: int, size: tuple[int, int], ratio: float
) -> Iterator[NDArray[np.uint8]]:
    """Parts of a level from the top to the bottom, each (3, h, W), whose heights `ratio` divides."""
    height, width = size
    rows = max(1, int(_STRIP / (3 * width * ratio)))                                 # of the result
    if reader.backend == "tifffile":
        rows = int(height / ratio) + 1                                               # each call decodes the whole level
    down = _level_size(reader, slide, 0)[0] / height
    total = max(1, int(height / ratio))
    for start in range(0, total, rows):
        top, bottom = round(start * ratio), round(min(start + rows, total) * ratio)
        part = (min(bottom, height) - top, width)
        pixels, _ = reader.get_data(slide, (round(top * down), 0), part, level=level)
        yield np.asarray(pixels, np.uint8)


def _averaged(pixels: NDArray[np.uint8], ratio: float) -> Tensor:
    """Mean over areas of `ratio` x `ratio` pixels, (3, h / ratio, W / ratio), uint8."""
    plain = torch.from_numpy(np.ascontiguousarray(pixels))
    if ratio == 1.0:
        return plain
    size = [max(1, round(plain.shape[1] / ratio)), max(1, int(plain.shape[2] / ratio))]
    return F.adaptive_avg_pool2d(plain[None].float(), size)[0].round().to(torch.uint8)


def tissue_mask(picture: Tensor) -> Tensor:
    """Tell where tissue is: cells of 8 x 8 pixels whose color is more saturated than Otsu's threshold.

    Args:
        picture: shape (3, H, W), floating, 0 to 1, of a slide.

    Returns:
        Shape (1, ceil(H / 8), ceil(W / 8)), float, 1.0 for tissue; all 0 where nothing stands out.

    Example:
        >>> white = torch.ones(3, 16, 16)
        >>> white[1, :8, :8] = 0.4
        >>> tissue_mask(white)
        tensor([[[1., 0.],
                 [0., 0.]]])
    """
    cells = F.avg_pool2d(picture[None].float(), _CELL, ceil_mode=True)[0]            # (3, H / 8, W / 8)
    high, low = cells.amax(0), cells.amin(0)
    saturation = (high - low) / high.clamp(min=1e-3)
    values = saturation.cpu().numpy()
    if float(values.max() - values.min()) < _LEAST_CONTRAST:
        return torch.full_like(saturation, float(values.mean() > _LEAST_CONTRAST))[None]
    return (saturation > float(threshold_otsu(values))).float()[None]


def class_map(probabilities: Tensor) -> Tensor:
    """Number of the likeliest class from 1 on, 0 for cells without tissue; (K, h, w) -> (h, w), uint8."""
    best = probabilities.max(0)
    return torch.where(best.values > 0, best.indices + 1, 0).to(torch.uint8)


class TileInferer(Inferer):
    """Classify the tiles of a slide that show tissue.

    Tiles lie on a grid, `overlap` of their length apart from full; a cell of the result is one step. A cell has the
    mean of the tiles that cover it, if it shows tissue itself; else 0 for every class. Behind the right and lower edge
    tiles are filled up with white.

    Args:
        tile_size: pixels of the slide per tile, (h, w): what the student saw in training.
        overlap: of neighbors: 0, 0.5 or 0.75.
        tissue: least share of a tile, and of a cell, that must be tissue, 0 to 1; 0 takes all.
        batch_size: tiles at once.
        enlarge: how often a tile is enlarged before the network, for students of up-sampled pictures.

    Raises:
        ValueError: an overlap, a share or a size that is out of range; pictures of more than one slide.
    """

    def __init__(
        self, tile_size: Sequence[int], overlap: float = 0.0, tissue: float = 0.25, batch_size: int = 64,
        enlarge: int = 1,
    ) -> None:
        parts = {0.0: 1, 0.5: 2, 0.75: 4}.get(float(overlap))
        if parts is None or any(length % parts or length < parts for length in tile_size):
            raise ValueError(
                f"`overlap` must be 0, 0.5 or 0.75, of tiles that it divides, got {overlap} of {list(tile_size)}."
            )
        if not 0 <= tissue <= 1:
            raise ValueError(f"`tissue` must be a share of a tile, 0 to 1, got {tissue}.")
        self.tile_size, self.parts = tuple(tile_size), parts
        self.tissue, self.batch_size, self.enlarge = tissue, batch_size, enlarge

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Slide (1, 3, H, W), 0 to 1 -> probabilities of the classes per cell, (1, K, h, w)."""
        if len(inputs) != 1:
            raise ValueError(f"`inputs` must be one slide, got a batch of {len(inputs)}.")
        slide = inputs[0].as_subclass(Tensor)
        steps = [length // self.parts for length in self.tile_size]
        cells = [max(-(-length // step), self.parts) for length, step in zip(slide.shape[1:], steps, strict=True)]
        missing = [count * step - length for count, step, length in zip(cells, steps, slide.shape[1:], strict=True)]
        tissue = F.interpolate(tissue_mask(slide)[None], scale_factor=_CELL)[0, :, : slide.shape[1], : slide.shape[2]]
        slide, tissue = (
            F.pad(one, (0, missing[1], 0, missing[0]), value=fill) for one, fill in ((slide, 1.0), (tissue, 0.0))
        )
        share = F.avg_pool2d(tissue[None], steps)                                    # (1, 1, h, w) of each cell
        tile_share = F.avg_pool2d(share, self.parts, stride=1)[0, 0]                 # of each tile
        places = (tile_share >= self.tissue).nonzero()
        classify = partial(self._probabilities, lambda tiles: network(tiles, *args, **kwargs))
        found = self._classified(slide, places, steps, classify)                     # (N, K)
        tiles = found.new_zeros(found.shape[1] + 1, *tile_share.shape)               # the last counts
        tiles[:-1, places[:, 0], places[:, 1]] = found.T
        tiles[-1, places[:, 0], places[:, 1]] = 1.0
        around = F.pad(tiles, [self.parts - 1] * 4)
        covering = F.avg_pool2d(around[None], self.parts, stride=1)[0]               # (K + 1, h, w)
        mean = covering[:-1] / covering[-1:].clamp(min=1e-6)
        return (mean * (share[0] >= self.tissue))[None]

    def _classified(
        self, slide: Tensor, places: Tensor, steps: Sequence[int], classify: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Probabilities of the tiles at these places of the grid, (N, K)."""
        height, width = self.tile_size
        if not len(places):                                                          # K is asked of a white tile
            return classify(slide.new_ones(1, len(slide), height, width))[:0]
        found = []
        for part in places.split(self.batch_size):
            corners = [(int(y) * steps[0], int(x) * steps[1]) for y, x in part]
            found.append(classify(torch.stack([slide[:, y : y + height, x : x + width] for y, x in corners])))
        return torch.cat(found)

    def _probabilities(self, network: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
        if self.enlarge > 1:
            tiles = F.interpolate(tiles, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        return network(tiles).as_subclass(Tensor).float().softmax(1)


class SaveSlideClassesd(MapTransform):
    """Write `<slide>_classes.png`, a color per class and 0 for background, and a row of `slides.csv` with the shares.

    A row has the slide, the file of its map, the microns per cell of the map, the number of cells with tissue, and for
    each class its share of them in percent. Of slides of one name in several folders the further maps are numbered.

    Args:
        keys: probabilities per cell, shape (K, h, w), 0 for all classes where there is no tissue.
        output_dir: folder of the files; it is made.
        class_names: names of the columns, K.
        cell_size: microns per cell.
        image_key: slide whose metadata name the file.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: as many names as there are not classes.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | os.PathLike[str], class_names: Sequence[str], cell_size: float,
        image_key: str = "image", allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir, self.class_names, self.cell_size = Path(output_dir), list(map(str, class_names)), cell_size
        self.image_key = image_key
        self._written: set[str] = set()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write both files, and give a copy of `data` with the map, (1, h, w)."""
        result = dict(data)
        for key in self.key_iterator(result):
            probabilities = torch.as_tensor(result[key]).as_subclass(Tensor).cpu()
            if len(probabilities) != len(self.class_names):
                raise ValueError(
                    f"`class_names` must name {len(probabilities)} classes, got {', '.join(self.class_names)}."
                )
            found = class_map(probabilities)
            path = str(getattr(result[self.image_key], "meta", {}).get("filename_or_obj", "slide"))
            self._write(path, found)
            result[key] = found[None]
        return result

    def _write(self, path: str, found: Tensor) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        stem = Path(path).stem
        name, number = f"{stem}_classes.png", 1
        while name in self._written:
            number += 1
            name = f"{stem}_{number}_classes.png"
        picture = Image.fromarray(found.numpy(), mode="P")
        picture.putpalette([value for color in _COLORS for value in color])
        picture.save(self.output_dir / name)
        counts = torch.bincount(found.flatten().long(), minlength=len(self.class_names) + 1)[1:]
        total = int(counts.sum())
        shares = [f"{100 * int(count) / total:.2f}" if total else "" for count in counts]
        mode = "a" if self._written else "w"
        with (self.output_dir / "slides.csv").open(mode, newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self._written:
                columns = (f"{one} %" for one in self.class_names)
                writer.writerow(["image", "map", "microns_per_cell", "cells", *columns])
            writer.writerow([path, name, f"{self.cell_size:g}", total, *shares])
        self._written.add(name)
