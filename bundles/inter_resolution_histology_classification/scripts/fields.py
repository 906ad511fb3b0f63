# SPDX-License-Identifier: Apache-2.0
"""The part of a picture that shows tissue."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform, SpatialCrop

__all__ = ["CropRimd"]


class CropRimd(MapTransform):
    """Cut off the outermost pixels of pictures, which some programs leave darker: averages would keep a dark frame.

    Args:
        keys: pictures of shape (C, H, W).
        rim: pixels on each side, 0 or more.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: `rim` is no number of pixels, or leaves nothing of a picture.
    """

    def __init__(self, keys: KeysCollection, rim: int = 1, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if isinstance(rim, bool) or not isinstance(rim, int) or rim < 0:
            raise ValueError(f"`rim` must be a whole number of pixels, 0 or more, got {rim!r}.")
        self.rim = rim

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the pictures cut."""
        result = dict(data)
        for key in self.key_iterator(result) if self.rim else ():
            size = tuple(result[key].shape[1:])
            if min(size) <= 2 * self.rim:
                raise ValueError(
                    f"`{key}` must be larger than its rim of {self.rim} pixels on each side, got {size}; lower `rim`."
                )
            ends = [length - self.rim for length in size]
            result[key] = SpatialCrop(roi_start=[self.rim] * len(size), roi_end=ends)(result[key])
        return result
