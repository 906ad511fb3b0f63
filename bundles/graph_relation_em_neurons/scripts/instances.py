# SPDX-License-Identifier: Apache-2.0
"""Instances: their numbers in labels, out of affinities, into files."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.image_writer import PILWriter
from monai.transforms import MapTransform, SaveImage, SaveImaged
from monai.utils import convert_to_dst_type
from numpy.typing import NDArray
from torch import Tensor

from .no_data import section_axis
from .partition import WHEELS, Partition, instances
from .writing import LikeFileWriter

__all__ = ["ConsecutiveLabelsd", "InstancesFromAffinitiesd", "Partition", "SaveInstancesd", "instances",
           "section_axis"]

logger = logging.getLogger(__name__)
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_GIVEN = ("affinities", "offsets", "foreground", "mask")              # by the transform, not by its options


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
        no_data: key of a map of shape (1, *S), or (*S), that is not 0 where the image has no data: the result is 0
            there, and nothing is linked across. Where the key is absent, there is data everywhere.

    Raises:
        ImportError: the package is missing, and `required`.
        ValueError: an unknown option; affinities that are no numbers, or `no_data` of another size.
    """

    def __init__(
        self,
        keys: KeysCollection,
        offsets: Sequence[Sequence[int]],
        foreground: bool = False,
        required: bool = True,
        options: Mapping[str, Any] | None = None,
        allow_missing_keys: bool = False,
        no_data: str | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.no_data = no_data
        self.offsets = [list(offset) for offset in offsets]
        self.foreground = foreground
        self.options = dict(options or {})
        known = [name for name in signature(instances).parameters if name not in _GIVEN]
        for name in self.options:
            if name not in known:
                raise ValueError(f"`options` must be arguments of `instances`, got {name!r}; there are {known}.")
        wheel = WHEELS.get(self.options.get("method", "mutex"))
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
            mask = self._mask(result, maps.shape[1:])
            numbers = instances(affinities, self.offsets, foreground=inside, mask=mask, **self.options)
            result[key] = convert_to_dst_type(numbers[None], result[key], dtype=torch.int32)[0]
        return result

    def _mask(self, data: Mapping[Hashable, Any], size: tuple[int, ...]) -> NDArray[Any] | None:
        """Where there is data, shape (*S), bool; None for everywhere."""
        if self.no_data is None or data.get(self.no_data) is None:
            return None
        empty = np.asarray(torch.as_tensor(data[self.no_data]).cpu()) != 0
        if empty.shape == (1, *size):
            empty = empty[0]
        if empty.shape != size:
            raise ValueError(
                f"`{self.no_data}` must have the size {size} of the affinities, with one channel, got {empty.shape}; "
                "let every transform that moves voxels have its key, too."
            )
        return ~empty if empty.any() else None


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


def _apart(numbers: Tensor, axis: int) -> Tensor:
    """Different numbers for different sections."""
    sections = torch.arange(numbers.shape[axis + 1]).reshape(-1, *[1] * (numbers.dim() - axis - 2))
    return torch.where(numbers <= 0, numbers, numbers + sections * (int(numbers.max()) + 1))


class SaveInstancesd(SaveImaged):
    """Save instance numbers of a picture (PNG, JPEG, BMP, TIFF) as PNG of 16 bits, and of anything else as NIfTI.

    A picture with more than 65,535 instances, which PNG cannot hold, becomes a TIFF of 32 bits. Affinities, which are
    there when a package for instances is missing, are saved as NIfTI in float32; they are what has several channels or
    values between whole numbers. A stack of pictures in one file is a volume.

    Args:
        keys: maps with the metadata of their images, shape (O, *S); O is 1 for instance numbers, of any type, as
            `Invertd` gives floats.
        allow_missing_keys: do nothing where a key is absent.
        options: of `SaveImage`, but for `output_ext` and `output_dtype`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **options: Any) -> None:
        super().__init__(
            keys, output_ext=".nii.gz", output_dtype=np.int32, allow_missing_keys=allow_missing_keys,
            writer=LikeFileWriter, **options,
        )
        self.picture_saver = SaveImage(output_ext=".png", output_dtype=np.uint16, writer=_PictureWriter, **options)
        self.large_saver = SaveImage(output_ext=".tif", output_dtype=np.int32, writer=_PictureWriter, **options)
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
                logger.info("%s has %d instances, more than PNG can hold; a TIFF is written.", name, int(maps.max()))
                self.large_saver(maps)
            else:
                self.picture_saver(maps)
        return result


class _OneChannel:
    """Takes away the channel alone; MONAI's writers take away every last axis of one voxel, too."""

    data_obj: Any

    def set_data_array(self, data_array: Any, *_: Any, **options: Any) -> None:
        """Keep the first channel."""
        self.data_obj = np.asarray(torch.as_tensor(data_array).cpu())[0]


class _PictureWriter(_OneChannel, PILWriter):
    pass
