# SPDX-License-Identifier: Apache-2.0
"""Instances: their numbers in labels, out of affinities, into files."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms import MapTransform, SaveImage, SaveImaged
from monai.utils import convert_to_dst_type
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import label as connected_components
from skimage.segmentation import watershed
from torch import Tensor

from .writing import LikeFileWriter

__all__ = ["ConsecutiveLabelsd", "InstancesFromAffinitiesd", "Partition", "SaveInstancesd", "instances",
           "section_axis"]

Partition = Literal["mutex", "waterz", "watershed"]
Array = NDArray[Any]
logger = logging.getLogger(__name__)
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_WHEELS = {"mutex": "mwatershed", "waterz": "waterz"}


def instances(   # noqa: PLR0913 - options of a config, each with a default
    affinities: Array,
    offsets: Sequence[Sequence[int]],
    method: Partition = "mutex",
    stride: int = 4,
    bias: float = 0.5,
    threshold: float = 0.5,
    seed_distance: int = 4,
    per_section: bool = False,
    absorb: int = 0,
    min_size: int = 0,
    foreground: Array | None = None,
) -> Array:
    """Partition an image by its affinities.

    Args:
        affinities: shape (O, *S), range [0, 1], stored at the voxel p of each pair (p, p + offset).
        offsets: (O) vectors of steps in voxels.
        method: `mutex`: mutex watershed over all offsets; neighbors attract, the others repel, the strongest first.
            `watershed`: seeds are where it is farthest from a border, grown over the mean affinity of neighbors.
            `waterz`: the regions of a watershed, merged by their mean affinity; 3-D.
        stride: of `mutex`: only every so many voxels along each in-plane axis a repelling pair counts.
        bias: of `mutex`: affinity above which a pair attracts, else it repels; larger splits more.
        threshold: of `waterz`: regions whose mean affinity is above 1 - threshold are merged; larger merges more.
        seed_distance: of `watershed` and `waterz`: voxels along each axis within which there is one seed.
        per_section: of `watershed` and `waterz`: regions are grown section by section, for anisotropic volumes.
        absorb: connected instances of fewer voxels, and what is in none, go to their neighbors along the axes of which
            there are affinities; where there is no larger one, they become background.
        min_size: connected instances of fewer voxels become background.
        foreground: probability of foreground, shape (*S); 0 below 0.5. None for none.

    Returns:
        Numbers from 1 on of connected instances, 0 for background, shape (*S), int32. `mutex` takes a voxel that no
        neighbor attracts for background, the others fill the image: without any seed it is one instance.

    Raises:
        ValueError: another method, shapes that do not agree, or no affinities of the nearest neighbors along all axes,
            which all but `mutex` need.
        ImportError: the package that the method needs is not installed.

    Reference:
        Wolf et al., The Mutex Watershed, arXiv 1904.12654; Funke et al., arXiv 1709.02974 (waterz).
    """
    if method not in get_args(Partition):
        raise ValueError(f"`method` must be one of {get_args(Partition)}, got {method!r}.")
    rank = affinities.ndim - 1
    if len(offsets) != len(affinities) or any(len(offset) != rank for offset in offsets):
        raise ValueError(
            f"`affinities` must have a channel per offset and an axis per step of it, got shape {affinities.shape} for "
            f"the offsets {[list(offset) for offset in offsets]}."
        )
    if foreground is not None and foreground.shape != affinities.shape[1:]:
        raise ValueError(
            f"`foreground` must have the shape {affinities.shape[1:]} of an affinity, got {foreground.shape}."
        )
    mask = None if foreground is None else foreground >= 0.5
    nearest = _nearest(offsets)
    if method == "mutex":
        found = _mutex(affinities, offsets, stride, bias, mask)
    else:
        neighbors = affinities[_all_axes(nearest, offsets)].astype(np.float32)   # (rank, *S)
        found = _regions(neighbors, seed_distance, per_section)
        if method == "waterz":
            found = _merged(neighbors, found, threshold)
    if mask is not None:
        found = np.where(mask, found, 0)
    found = connected_components(found, connectivity=1, background=0)   # type: ignore[no-untyped-call]
    if absorb > 1:
        found = _absorbed(affinities, nearest, found, absorb, mask)
    if min_size > 1:
        found = _drop_small(found, min_size)
    return found.astype(np.int32)


def _mutex(
    affinities: Array, offsets: Sequence[Sequence[int]], stride: int, bias: float, mask: Array | None
) -> Array:
    weights = affinities.astype(np.float64) - bias
    near = [sum(abs(step) for step in offset) == 1 for offset in offsets]
    rank = affinities.ndim - 1
    if mask is not None:                                           # background joins nothing
        for weight, offset in zip(weights, offsets, strict=True):
            both = mask & _moved(mask, offset)
            weight[~both] = 0.0
    for weight, is_near in zip(weights, near, strict=True):
        if not is_near:
            np.minimum(weight, 0.0, out=weight)                    # far pairs only repel
    in_plane = [1] * (rank - 2) + [stride] * 2
    strides = [[1] * rank if is_near else in_plane for is_near in near]
    mutex = import_module("mwatershed")
    found: Array = mutex.agglom(weights, [list(offset) for offset in offsets], strides=strides)
    return found


def _moved(mask: Array, offset: Sequence[int]) -> Array:
    """The mask at p + offset, False outside."""
    result = np.zeros_like(mask)
    here = tuple(slice(max(0, -step), mask.shape[axis] - max(0, step)) for axis, step in enumerate(offset))
    there = tuple(slice(max(0, step), mask.shape[axis] - max(0, -step)) for axis, step in enumerate(offset))
    if all(abs(step) < length for step, length in zip(offset, mask.shape, strict=True)):
        result[here] = mask[there]
    return result


def _regions(neighbors: Array, seed_distance: int, per_section: bool) -> Array:
    """Watershed over the affinities of neighbors, from where it is farthest from a border."""
    border = 1.0 - neighbors[-2 if per_section else 0 :].mean(0)
    if per_section and border.ndim == 3:
        found, count = np.zeros(border.shape, np.int64), 0
        for section, plane in zip(found, border, strict=True):
            section[:] = _watershed(plane, seed_distance) + count
            count = int(section.max())
        return found
    return _watershed(border, seed_distance)


def _watershed(border: Array, seed_distance: int) -> Array:
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(border < 0.5), 1.0)   # smooth: fewer seeds
    highest = ndimage.maximum_filter(distance, 2 * seed_distance + 1)
    seeds = ndimage.label((highest == distance) & (distance > 0), np.ones([3] * border.ndim))[0]
    found: Array = watershed(border, seeds) if seeds.any() else np.ones(border.shape, np.int64)   # type: ignore[no-untyped-call]
    return found


def _merged(neighbors: Array, regions: Array, threshold: float) -> Array:
    if neighbors.ndim != 4:
        raise ValueError(f"`method` 'waterz' must have volumes, got {neighbors.ndim - 1} axes; take 'mutex'.")
    waterz = import_module("waterz")
    with _silent_output():
        whole = np.ascontiguousarray(neighbors)
        merged = waterz.agglomerate(whole, [threshold], fragments=regions.astype(np.uint64), discretize_queue=256)
        return np.array(next(iter(merged)))


def _absorbed(
    affinities: Array, nearest: Mapping[int, int], found: Array, absorb: int, mask: Array | None
) -> Array:
    """Grow instances of enough voxels into the rest; never from section to section without affinities of these."""
    border = 1.0 - affinities[list(nearest.values())].mean(0)
    reach = np.zeros([3] * found.ndim, bool)
    for axis in nearest:
        reach[tuple(slice(None) if axis == other else 1 for other in range(found.ndim))] = True
    grown: Array = watershed(border, _drop_small(found, absorb), connectivity=reach, mask=mask)   # type: ignore[no-untyped-call]
    return grown


def _nearest(offsets: Sequence[Sequence[int]]) -> dict[int, int]:
    """Axis -> channel of the affinities to the previous neighbor along it, of the axes that have them."""
    steps = [list(offset) for offset in offsets]
    rank = len(steps[0])
    units = {axis: [-int(axis == other) for other in range(rank)] for axis in range(rank)}
    return {axis: steps.index(unit) for axis, unit in units.items() if unit in steps}


def _all_axes(nearest: Mapping[int, int], offsets: Sequence[Sequence[int]]) -> list[int]:
    """Channels of `nearest`; raise where an axis has none."""
    for axis in range(rank := len(offsets[0])):
        if axis not in nearest:
            wanted = [-int(axis == other) for other in range(rank)]
            raise ValueError(
                f"`offsets` must hold {wanted}, the previous neighbor along axis {axis}, got {list(offsets)}."
            )
    return list(nearest.values())


def _drop_small(found: Array, min_size: int) -> Array:
    sizes = np.bincount(found.ravel())
    kept = sizes >= min_size
    kept[0] = False
    numbers = np.cumsum(kept) * kept
    small: Array = numbers[found]
    return small


@contextmanager
def _silent_output() -> Iterator[None]:
    """Keep what compiled code prints, to the file as well as to Python's buffer of it, away from the user."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            os.dup2(nothing.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class InstancesFromAffinitiesd(MapTransform):
    """Replace affinities by instance numbers; see `instances`.

    Without the package that the method needs, the affinities stay as they are and a warning tells what to install:
    inference then saves them. `required` makes that an error, as validation needs instances.

    Args:
        keys: affinities of shape (O, *S); with `foreground` one channel more, behind them.
        offsets: of the affinities.
        foreground: whether the last channel is the probability of foreground.
        required: raise when the package is missing.
        options: further arguments of `instances`.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ImportError: the package is missing, and `required`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        offsets: Sequence[Sequence[int]],
        foreground: bool = False,
        required: bool = True,
        options: Mapping[str, Any] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.offsets = [list(offset) for offset in offsets]
        self.foreground = foreground
        self.options = dict(options or {})
        wheel = _WHEELS.get(self.options.get("method", "mutex"))
        self.is_ready = wheel is None or find_spec(wheel) is not None
        message = (
            f"Instances by '{self.options.get('method', 'mutex')}' need the package {wheel}: pip install {wheel}; "
            "or take the method 'watershed', which needs none."
        )
        if not self.is_ready and required:
            raise ImportError(message)
        if not self.is_ready:
            logger.warning("%s Until then the affinities are saved.", message)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with instance numbers of shape (1, *S), int32, and their metadata."""
        result = dict(data)
        for key in self.key_iterator(result) if self.is_ready else ():
            maps = np.asarray(torch.as_tensor(result[key]).cpu())
            if not np.isfinite(maps).all():
                raise ValueError(f"`{key}` must be finite affinities, got NaN or infinity; look at the image.")
            inside = maps[-1] if self.foreground else None
            affinities = maps[:-1] if self.foreground else maps
            numbers = instances(affinities, self.offsets, foreground=inside, **self.options)
            result[key] = convert_to_dst_type(numbers[None], result[key], dtype=torch.int32)[0]
        return result


class ConsecutiveLabelsd(MapTransform):
    """Number instances 1, 2, ... without gaps, so that no later step in floating point can mix them up.

    Args:
        keys: instance numbers of any size, shape (1, *S), 0 is background, and what is negative is ignored and becomes
            -1; load them as integers.
        per_section: what has one number in two sections is two instances. Sections lie along the axis of the largest
            spacing, the first of equal ones.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(self, keys: KeysCollection, per_section: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.per_section = per_section

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with new numbers, int32."""
        result = dict(data)
        for key in self.key_iterator(result):
            numbers = _consecutive(torch.as_tensor(result[key]))
            if self.per_section:
                numbers = _consecutive(_apart(numbers, section_axis(result[key])))
            result[key] = convert_to_dst_type(numbers, result[key], dtype=torch.int32)[0]
        return result


def _consecutive(numbers: Tensor) -> Tensor:
    found, places = torch.unique(numbers, return_inverse=True)
    below = int((found == 0).any())
    if not numbers.dtype.is_signed:
        return torch.where(numbers == 0, 0, places + 1 - below)
    below += int((found < 0).sum())
    return torch.where(numbers > 0, places + 1 - below, numbers.long().clamp(min=-1))


def section_axis(volume: MetaTensor) -> int:
    """Spatial axis of the largest spacing, the first of equal ones, of a volume (C, *S)."""
    spacing = np.asarray(volume.pixdim)
    return int(np.argmax((spacing / spacing.max()).round(4)))      # in any unit, mm as well as nm


def _apart(numbers: Tensor, axis: int) -> Tensor:
    """Different numbers for different sections."""
    sections = torch.arange(numbers.shape[axis + 1]).reshape(-1, *[1] * (numbers.dim() - axis - 2))
    return torch.where(numbers <= 0, numbers, numbers + sections * (int(numbers.max()) + 1))


class SaveInstancesd(SaveImaged):
    """Save instance numbers of a picture (PNG, JPEG, BMP, TIFF) as PNG of 16 bits, and of anything else as NIfTI.

    Affinities, which are there when a package for instances is missing, are saved as NIfTI in float32; they are what
    has several channels or values between whole numbers. A stack of pictures in one file is a volume.

    Args:
        keys: maps with the metadata of their images, shape (O, *S); O is 1 for instance numbers, of any type, as
            `Invertd` gives floats.
        allow_missing_keys: do nothing where a key is absent.
        options: of `SaveImage`, but for `output_ext` and `output_dtype`.

    Raises:
        ValueError: a picture with more than 65,535 instances.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **options: Any) -> None:
        super().__init__(
            keys, output_ext=".nii.gz", output_dtype=np.int32, allow_missing_keys=allow_missing_keys,
            writer=LikeFileWriter, **options,
        )
        self.picture_saver = SaveImage(output_ext=".png", output_dtype=np.uint16, **options)
        self.map_saver = SaveImage(output_ext=".nii.gz", output_dtype=np.float32, writer=LikeFileWriter, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files; gives a copy of `data`."""
        result = dict(data)
        for key in self.key_iterator(result):
            maps = result[key]
            name = str(maps.meta.get("filename_or_obj", "")).lower()
            if len(maps) > 1 or not bool((maps == maps.round()).all()):
                self.map_saver(maps)
            elif maps.dim() != 3 or not name.endswith(_PICTURES):
                self.saver(maps)
            elif int(maps.max()) > np.iinfo(np.uint16).max:
                raise ValueError(f"`{key}` must have at most 65,535 instances for a PNG, got {int(maps.max())}.")
            else:
                self.picture_saver(maps)
        return result
