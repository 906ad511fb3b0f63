# SPDX-License-Identifier: Apache-2.0
"""Contrast of pictures, with a floor: what is nearly empty is not stretched until its noise looks like objects."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.meta_obj import get_track_meta
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, convert_to_tensor
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

__all__ = ["StretchContrastd"]

_LEAST_NOISE, _LEAST_STEPS = 12.0, 8.0                             # Gaussian noise alone spans 5 deviations
_FLOOR = 2.0                                                       # range of an empty picture over that of the least
_SPECK = 5                                                         # what is smaller than this square is no object


class StretchContrastd(MapTransform):
    """Scale pictures so that two percentiles become 0 and 1, and clip.

    Where nearly all pixels are background, both percentiles lie in its noise. Then, when they are less than 12
    deviations of the noise, or 8 gray levels, apart, the range is that of the picture without its specks, and at least
    24 deviations and 16 gray levels. So one nucleus is seen as bright, noise alone stays dim, and a constant picture
    becomes 0. All others are scaled as MONAI's `ScaleIntensityRangePercentilesd` does, to the last bit.

    The noise is 1.05 x the median difference of neighbors; gray levels are those of whole numbers.

    Args:
        keys: pictures of shape (C, *S); all channels have one range.
        lower: percentile that becomes 0.
        upper: percentile that becomes 1.
        dark_ground: give the negative, 1 - value, of a picture whose median, of the mean over channels, is then above
            0.5: stained tissue on a bright slide gets bright nuclei on a dark ground, as fluorescence has them.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: percentiles that do not ascend from 0 to 100.
    """

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 1.0,
        upper: float = 99.8,
        dark_ground: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0.0 <= lower < upper <= 100.0:
            raise ValueError(f"`lower` and `upper` must be ascending percentiles of 0 to 100, got {lower} and {upper}.")
        self.lower = lower
        self.upper = upper
        self.dark_ground = dark_ground

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the pictures scaled, float32."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._scaled(result[key])
        return result

    def _scaled(self, picture: Any) -> Any:
        picture = convert_to_tensor(picture, track_meta=get_track_meta())
        plain: Tensor = convert_to_tensor(picture, dtype=torch.float32, track_meta=False)
        low, high = (torch.as_tensor(percentile(plain, share)) for share in (self.lower, self.upper))
        noise, step = _noise(plain), _gray_level(plain)
        least = max(_LEAST_NOISE * noise, _LEAST_STEPS * step)
        if high - low < least:
            darkest, brightest = _extremes(plain)
            low = torch.clamp(low, max=darkest)
            wide = _FLOOR * least if float(plain.min()) < float(plain.max()) else 0.0
            high = torch.clamp(high, min=max(brightest, float(low) + wide))
        scaled = _stretched(plain, low, high) if low < high else torch.zeros_like(plain)   # constant
        if self.dark_ground and float(scaled.mean(0).median()) > 0.5:
            scaled = 1.0 - scaled
        return convert_to_dst_type(scaled, picture, dtype=np.float32)[0]


def _stretched(picture: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As MONAI does it, with tensors of one number: floats of Python would be rounded differently."""
    stretch = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)   # type: ignore[arg-type]
    scaled: Tensor = convert_to_tensor(stretch(picture), track_meta=False)
    return scaled


def _noise(picture: Tensor) -> float:
    """Standard deviation of what differs from pixel to pixel, by the median, which edges of objects do not change."""
    differences = [picture.diff(dim=axis).abs().flatten() for axis in range(1, picture.dim())]
    return 1.4826 / 2**0.5 * float(torch.cat(differences).nanmedian()) if picture[0].numel() > 1 else 0.0


def _gray_level(picture: Tensor) -> float:
    """Least difference of two values that there can be: 1 of whole numbers, else 0."""
    return float(bool((picture == picture.round()).all()))


def _extremes(picture: Tensor) -> tuple[float, float]:
    """Darkest and brightest value that is no speck."""
    pixels: NDArray[Any] = picture.cpu().numpy()
    smooth = ndimage.median_filter(pixels, size=(1, *[_SPECK] * (pixels.ndim - 1)))
    return float(smooth.min()), float(smooth.max())
