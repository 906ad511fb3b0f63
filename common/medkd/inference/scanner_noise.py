# SPDX-License-Identifier: Apache-2.0
"""Noise of a scan of lower dose, in the units of the image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data.meta_obj import get_track_meta
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_tensor
from scipy import ndimage
from torch import Tensor

__all__ = ["RandScannerNoised"]


class RandScannerNoised(RandomizableTransform, MapTransform):
    """Add correlated noise to images of the same grid: what a scan of lower dose shows.

    Args:
        keys: images of shape (C, *S) in HU, or in the units of `std`, before windowing; each gets noise of its own.
        std: deviation of the noise; two numbers draw it between them for each case.
        width: deviation of the Gaussian that the noise is smoothed with, in voxels; 0 for none. The deviation of the
            noise is `std` all the same.
        seed: None draws anew each time; a number gives an image the same noise each time, as validation and inference
            need it.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: `std` or `width` is none.
    """

    def __init__(
        self, keys: KeysCollection, std: float | Sequence[float], width: float = 1.0, seed: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        pair: list[Any] = list(std) if isinstance(std, (list, tuple)) else [std, std]
        if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 <= pair[0] <= pair[1]:
            raise ValueError(f"`std` must be a deviation of 0 or more, or two that ascend, got {std!r}.")
        if not _is_number(width) or width < 0:
            raise ValueError(f"`width` must be 0 or more voxels, got {width!r}.")
        self.low, self.high = pair
        self.width, self.seed = float(width), seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with noise, float32."""
        if self.seed is not None:
            self.set_random_state(self.seed)
        result = dict(data)
        for key in self.key_iterator(result):
            image: Tensor = convert_to_tensor(result[key], track_meta=get_track_meta()).float()
            std = self.R.uniform(self.low, self.high)
            noise = self.R.standard_normal(tuple(image.shape))
            if self.width:
                noise = ndimage.gaussian_filter(noise, (0, *[self.width] * (image.dim() - 1)), mode="wrap")
                noise /= max(float(noise.std()), 1e-12)             # one voxel alone has no deviation
            result[key] = image + torch.as_tensor(std * noise, dtype=torch.float32, device=image.device)
        return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
