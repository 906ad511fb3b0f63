# SPDX-License-Identifier: Apache-2.0
"""Pictures, gray or in color, with or without transparency, to the channels that a network takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import MapTransform
from torch import Tensor

__all__ = ["GrayFromColord", "PictureChannelsd", "ThreeChannelsd"]


class PictureChannelsd(MapTransform):
    """Base of what changes the channels of pictures; a subclass has `convert`.

    Args:
        keys: pictures of shape (C, *S): gray, gray and alpha, red green blue, or these and alpha.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: more than four channels.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the pictures converted."""
        result = dict(data)
        for key in self.key_iterator(result):
            channels = len(result[key])
            if channels > 4:
                raise ValueError(f"`{key}` must be a picture of 1 to 4 channels, got {channels}; save it as gray.")
            result[key] = self.convert(result[key][: 1 if channels < 3 else 3])
        return result

    def convert(self, colors: Tensor) -> Tensor:
        """Convert a picture of 1 or 3 channels, without alpha."""
        raise NotImplementedError


class GrayFromColord(PictureChannelsd):
    """Turn pictures to gray, shape (1, *S): the mean of red, green and blue. Arguments: see `PictureChannelsd`."""

    def convert(self, colors: Tensor) -> Tensor:
        """Average the colors."""
        return colors if len(colors) == 1 else colors.mean(0, keepdim=True)


class ThreeChannelsd(PictureChannelsd):
    """Give pictures three channels, shape (3, *S): gray is repeated. Arguments: see `PictureChannelsd`."""

    def convert(self, colors: Tensor) -> Tensor:
        """Repeat gray."""
        return colors[[0, 0, 0]] if len(colors) == 1 else colors
