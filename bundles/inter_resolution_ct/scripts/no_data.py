# SPDX-License-Identifier: Apache-2.0
"""Voxels without data: missing sections, margins and corners of aligned or stitched images, black or white.

What fills them is one number, exactly. It would enter mean and deviation, bleed into its surroundings when the image is
resampled or seen by a network, and join everything that touches it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms import MapTransform, NormalizeIntensity
from monai.utils import convert_to_dst_type
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["ClearNoDatad", "FillNoDatad", "NormalizeDatad", "bridged", "filled", "find_no_data", "section_axis"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
logger = logging.getLogger(__name__)

_RARE_IN_PLANES = 0.25   # share of other voxels that may have the number that fills whole sections
_RARE = 0.05             # the same of margins and corners, and in pictures: fluorescence may be 0 where nothing is
_NOISE = 0.02            # share of the range of gray values within which a filling varies, where it was compressed
_AREA = 0.01             # of a section: less is a dark or a saturated spot
_SQUARE = 16             # pixels of a square without any noise, which is in each region, but in no tissue
_told: set[str] = set()
_LEAST = 64              # pixels of a section; smaller ones tell nothing


def find_no_data(image: Array, axis: int = 0, dark: bool = False) -> Mask | None:
    """Find voxels that hold no data; a healthy image has none.

    They have one number, that is rare elsewhere; in volumes to within 2 % of the range, as files may have been
    compressed or resampled. In a volume they are

    * whole planes of any number: straight margins, and along one axis missing sections;
    * regions of a section that touch its edge, of the smallest or the largest number, or 0, that have 1 % of its area
      and hold a square of 16 pixels (a quarter of the section's length where that is less): slanted margins, corners;
    * the same within a section, if it is exactly the smallest number, or 0: holes.

    In a picture they are whole lines at its edges, of the largest number, and at most half of it. The smallest number
    counts with `dark` only: in fluorescence it is what lies between nuclei.

    Args:
        image: shape (*S), 2-D or 3-D.
        axis: of the sections of a volume.
        dark: whether a dark margin of a picture is one.

    Returns:
        The mask, shape (*S); None where all voxels have data, or none has.
    """
    if image.ndim not in (2, 3) or image.size < _LEAST or not np.isfinite(image).all():
        return None
    low, high = image.min(), image.max()
    if low == high:
        return None
    mask = np.zeros(image.shape, bool)
    noise = _noise(image)
    planes = _constant_planes(image, noise)
    if image.ndim == 2:
        for value in {float(high), float(low)} if dark else {float(high)}:
            _add(mask, np.abs(image - value) <= noise, planes.get(value, mask), _RARE)
        return mask if _AREA * mask.size <= mask.sum() <= mask.size // 2 else None
    for value, region in planes.items():
        _add(mask, np.abs(image - value) <= noise, region, _RARE_IN_PLANES)
    for value in {float(low), float(high), 0.0}:
        for most, within in ((0.0, value < high), (noise, False)):
            same = np.abs(image - value) <= most
            regions = _regions(np.moveaxis(same, axis, 0), np.moveaxis(mask, axis, 0), within)
            if regions is not None:
                _add(mask, same, np.moveaxis(regions, 0, axis), _RARE)
    return mask if 0 < mask.sum() < mask.size else None


def _noise(image: Array) -> float:
    """How far from a number still counts as it: a share of a volume's range without outliers; nothing in a picture."""
    if image.ndim == 2:
        return 0.0
    step = max(1, image.size // 1_000_000)                         # a million voxels tell it well enough
    low, high = np.percentile(image.ravel()[::step], (1, 99))
    return _NOISE * float(high - low)


def _add(mask: Mask, same: Mask, region: Mask, rare: float) -> None:
    """Take a region into the mask if its number, which all voxels of `same` have, hardly occurs outside."""
    outside = ~(mask | region)
    count = int(outside.sum())
    if not count or int((same & outside).sum()) <= rare * count:
        mask |= region


def _constant_planes(image: Array, noise: float) -> dict[float, Mask]:
    """Number -> planes that consist of it: from the edges inward, and within a volume along one axis."""
    rows: list[tuple[int, Array, Mask, Mask]] = []                 # axis, number, planes, those that reach an edge
    for axis in range(image.ndim):
        if image.size // image.shape[axis] < (_LEAST if image.ndim == 3 else _SQUARE):
            continue
        others = tuple(other for other in range(image.ndim) if other != axis)
        least, most = image.min(others).astype(float), image.max(others).astype(float)
        same, low = most - least <= noise, (least + most) / 2
        rows.append((axis, low, same, _reached(same, low, noise) | _reached(same[::-1], low[::-1], noise)[::-1]))
    crossed = sum(bool((same & ~edges).any()) for _, _, same, edges in rows) > 1   # a drawn grid, no lost sections
    found: dict[float, Mask] = {}
    for axis, low, same, edges in rows:
        for place in np.flatnonzero(edges if crossed or image.ndim == 2 else same):
            value = next((one for one in found if abs(one - low[place]) <= noise), float(low[place]))
            planes = found.setdefault(value, np.zeros(image.shape, bool))
            planes[tuple(place if one == axis else slice(None) for one in range(image.ndim))] = True
    return found


def _reached(same: Mask, value: Array, noise: float) -> Mask:
    """Which are in one row, of one number, with the first."""
    return np.logical_and.accumulate(same & (np.abs(value - value[0]) <= noise))


def _regions(same: Mask, known: Mask, within: bool) -> Mask | None:
    """Regions of one number, which the voxels of `same` (Z, Y, X) have, at the edges of sections; or also within.

    What is `known` is none again, and has edges that others may touch.
    """
    height, width = same.shape[1:]
    side = min(_SQUARE, height // 4, width // 4)
    least = _AREA * height * width
    found: Mask | None = None
    for place in range(len(same) if side > 1 else 0):
        flat = same[place] & ~known[place]
        if flat.sum() < max(least, side * side) or flat.all():
            continue
        squares = ndimage.grey_opening(same[place].view(np.uint8), side, mode="constant") > 0
        if not squares.any():
            continue
        parts = ndimage.label(flat)[0]
        beside = parts[ndimage.binary_dilation(known[place])]
        edge = parts if within else np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1], beside])
        sizes = np.bincount(parts.ravel()).clip(1)
        large = np.flatnonzero(sizes >= least)
        kept = np.intersect1d(np.intersect1d(np.unique(parts[squares]), edge), large[large > 0])
        if len(kept):
            found = np.zeros(same.shape, bool) if found is None else found
            found[place] = np.isin(parts, kept)
    return found


def bridged(image: Array, mask: Mask, axis: int, most: int) -> tuple[Array, Mask]:
    """Fill gaps of few sections by repeating the nearest one; they then count as data.

    Args:
        image: shape (*S).
        mask: voxels without data, shape (*S).
        axis: of the sections; gaps along another axis are bridged too if whole planes along it are missing.
        most: sections in a row; longer gaps, and those at the ends, stay.

    Returns:
        The image with the gaps filled, and the mask without them.
    """
    result, left = image.copy(), mask.copy()
    for one in range(image.ndim):
        others = tuple(other for other in range(image.ndim) if other != one)
        if most < 1 or not (one == axis or left.all(others).any()):
            continue
        length = image.shape[one]
        places = np.arange(length, dtype=np.int32).reshape([-1 if other == one else 1 for other in range(image.ndim)])
        before = np.maximum.accumulate(np.where(left, -1, places), one)
        after = np.flip(np.minimum.accumulate(np.flip(np.where(left, length, places), one), one), one)
        short = left & (before >= 0) & (after < length) & (after - before - 1 <= most)
        nearest = np.where(places - before <= after - places, before, after)
        source = np.take_along_axis(result, np.clip(nearest, 0, length - 1), one)
        result[short] = source[short]
        left &= ~short
    return result, left


def filled(image: Array, mask: Mask, axis: int) -> Array:
    """Give voxels without data the number of the nearest that has some: of its section, else of the nearest section."""
    result = image.copy()
    if image.ndim == 2:
        _fill_section(result, mask)
        return result
    sections, masks = np.moveaxis(result, axis, 0), np.moveaxis(mask, axis, 0)
    whole = np.flatnonzero(~masks.all((1, 2)))                      # sections that have some data
    for section, lost in zip(sections, masks, strict=True):
        if lost.any() and not lost.all():
            _fill_section(section, lost)
    for place in np.flatnonzero(masks.all((1, 2))):
        sections[place] = sections[whole[np.abs(whole - place).argmin()]]
    return result


def _fill_section(section: Array, mask: Mask) -> None:
    nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
    section[mask] = section[tuple(nearest)][mask]


class FillNoDatad(MapTransform):
    """Fill voxels that hold no data, see `find_no_data`, and mark them for the steps behind.

    Gaps of few sections are bridged: the nearest section is repeated and counts as data. What else is missing repeats
    the nearest voxel of its section, so that it disturbs neither resampling nor the network, and is marked in
    `mask_key`, beside the image: statistics, instances and results leave it out. A line in the log tells how much it
    is. An image without such voxels stays as it is, and gets no mask.

    Args:
        keys: images of shape (C, *S), before they are resampled. In pictures in color only gray counts: black, white.
        label_key: label that becomes `ignored` where there is no data; it may be absent. In bridged sections it stays.
        ignored: number for that, -1 where losses know it; None leaves the label.
        mask_key: key of the mask, shape (1, *S), uint8, 1 where there is no data.
        bridge: most sections in a row that are bridged; 0 bridges none.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str = "label",
        ignored: int | None = -1,
        mask_key: str = "no_data",
        bridge: int = 2,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if bridge < 0:
            raise ValueError(f"`bridge` must be a number of sections of at least 0, got {bridge}.")
        self.label_key = label_key
        self.ignored = ignored
        self.mask_key = mask_key
        self.bridge = bridge

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the images filled."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            voxels = np.asarray(torch.as_tensor(image).cpu())      # (C, *S)
            axis = section_axis(image) if isinstance(image, MetaTensor) and image.dim() == 4 else 0
            found = find_no_data(_gray(voxels), axis, dark=not bool((voxels == voxels[:1]).all()))
            if found is None:
                continue
            left = found
            if found.ndim == 3 and self.bridge:
                channels = [bridged(channel, found, axis, self.bridge) for channel in voxels]
                voxels, left = np.stack([channel for channel, _ in channels]), channels[0][1]
            voxels = np.stack([filled(channel, left, axis) for channel in voxels])
            result[key] = convert_to_dst_type(voxels, image)[0]
            self._tell(image, found, left, axis)
            if left.any():
                self._mark(result, image, left)
        return result

    def _mark(self, data: dict[Hashable, Any], image: Any, left: Mask) -> None:
        data[self.mask_key] = convert_to_dst_type(left[None], image, dtype=torch.uint8)[0]
        if isinstance(image, MetaTensor):
            data[self.mask_key].meta = {"affine": image.affine.clone(), **_file(image)}
        label = data.get(self.label_key)
        if self.ignored is not None and isinstance(label, torch.Tensor):   # inference leaves its path
            lost = torch.as_tensor(left, device=label.device)
            data[self.label_key] = label.clone()
            data[self.label_key][:, lost] = self.ignored

    def _tell(self, image: Any, found: Mask, left: Mask, axis: int) -> None:
        parts = []
        if found.ndim == 3:
            others = tuple(other for other in range(3) if other != axis)
            missing, open_ones = int(found.all(others).sum()), int(left.all(others).sum())
            if missing:
                parts.append(f"{missing} of {found.shape[axis]} sections are missing, {missing - open_ones} bridged")
        if (found & ~left).any() and not parts:
            parts.append(f"{100.0 * float((found & ~left).mean()):.2g} % of voxels are filled from the sections beside")
        if left.any():
            parts.append(f"{100.0 * float(left.mean()):.2g} % of voxels hold no data")
        line = f"{_file(image).get('filename_or_obj', 'image')}: {'; '.join(parts)}."
        if line not in _told:                                      # a training reads a file several times
            _told.add(line)
            logger.warning("%s", line)


def _file(image: Any) -> dict[str, Any]:
    meta = getattr(image, "meta", {})
    return {key: meta[key] for key in ("filename_or_obj",) if key in meta}


def section_axis(volume: MetaTensor) -> int:
    """Spatial axis of the largest spacing, the first of equal ones, of a volume (C, *S)."""
    spacing = np.asarray(volume.pixdim)
    return int(np.argmax((spacing / spacing.max()).round(4)))      # in any unit, mm as well as nm


def _gray(voxels: Array) -> Array:
    """One channel (*S); of colors those that are gray, and for others a number that never repeats."""
    gray: Array = voxels[0]
    if len(voxels) == 1:
        return gray
    low, high = float(voxels.min()), float(voxels.max())
    other = low + (high - low) * np.linspace(0.3, 0.7, gray.size).reshape(gray.shape)
    return np.where((voxels == voxels[:1]).all(0), gray, other)


def _masks(data: Mapping[Hashable, Any], mask_key: str) -> Iterator[torch.Tensor]:
    """The mask (*S), if there is one."""
    if data.get(mask_key) is not None:
        yield torch.as_tensor(data[mask_key])[0] > 0


class NormalizeDatad(MapTransform):
    """Bring images to mean 0 and deviation 1, of the voxels that hold data; `NormalizeIntensityd` where all do.

    Args:
        keys: images of shape (C, *S).
        mask_key: of voxels without data, shape (1, *S); it may be absent.
        subtrahend: in place of the mean.
        divisor: in place of the deviation.
        floor: of the deviation, in units of the largest absolute value: below it an image is constant, but for
            rounding in float32, and becomes 0.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str = "no_data",
        subtrahend: float | None = None,
        divisor: float | None = None,
        floor: float = 1e-6,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.subtrahend = subtrahend
        self.divisor = divisor
        self.floor = floor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the images normalized, float32."""
        result = dict(data)
        for key in self.key_iterator(result):
            values = torch.as_tensor(result[key]).float()
            for mask in _masks(result, self.mask_key):
                values = values[:, ~mask]
            mean, deviation = float(values.mean()), float(values.std(unbiased=False))
            top = float(values.abs().max())
            mean = mean if self.subtrahend is None else self.subtrahend
            if self.divisor is None and deviation <= self.floor * top:
                result[key] = convert_to_dst_type(torch.zeros(result[key].shape), result[key], dtype=torch.float32)[0]
                continue
            normalize = NormalizeIntensity(mean, deviation if self.divisor is None else self.divisor)   # type: ignore[arg-type]
            result[key] = normalize(result[key])
        return result


class ClearNoDatad(MapTransform):
    """Set results to 0 where there is no data.

    Args:
        keys: results of shape (C, *S), on the grid of the mask.
        mask_key: of voxels without data, shape (1, *S); it may be absent.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(self, keys: KeysCollection, mask_key: str = "no_data", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the results cleared."""
        result = dict(data)
        for mask in _masks(result, self.mask_key):
            for key in self.key_iterator(result):
                result[key] = result[key].clone()
                result[key][:, mask.to(result[key].device)] = 0
        return result
