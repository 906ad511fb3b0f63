# SPDX-License-Identifier: Apache-2.0
"""Transforms for microscopy pictures of any kind."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import MapTransform

__all__ = ["ThreeChannelsd"]


class ThreeChannelsd(MapTransform):
    """Give pictures three channels: gray is repeated, transparency is dropped.

    Args:
        keys: pictures of shape (C, H, W): gray, gray and alpha, red green blue, or these and alpha.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: more than four channels.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with pictures of shape (3, H, W)."""
        result = dict(data)
        for key in self.key_iterator(result):
            channels = result[key].shape[0]
            if channels > 4:
                raise ValueError(f"`{key}` must be a picture of 1 to 4 channels, got {channels}; save it as gray.")
            result[key] = result[key][[0, 0, 0] if channels < 3 else [0, 1, 2]]
        return result
