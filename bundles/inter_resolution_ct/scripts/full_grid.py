# SPDX-License-Identifier: Apache-2.0
"""Bring what a network says of an image of low resolution to the grid of full resolution, as a step of inference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn import functional

__all__ = ["FullGridInferer", "TellResolutiond", "checked_scale"]

logger = logging.getLogger(__name__)

_FINER, _AS_COARSE = 0.75, 0.9             # of the student's spacing
_LINEAR = {2: "bilinear", 3: "trilinear"}


class FullGridInferer(Inferer):
    """Run a network on a small image, and interpolate its logits linearly to `scale` times as many voxels.

    Classes are chosen behind it, so that their borders lie between the voxels of the small image, and a loss or metric
    sees the label in its own resolution. The network itself, what is trained and exported, has the small grid at both
    ends.

    Args:
        inferer: runs the network, such as MONAI's `SlidingWindowInferer`, on windows of the small image.
        scale: voxels of the result per voxel of the image along each axis, the `scale` by which the image was degraded;
            all ones change nothing.

    Raises:
        ValueError: `scale` is no whole number of 1 or more for each of 2 or 3 axes, or for others than the image has.

    Example:
        >>> import torch
        >>> from monai.inferers import SimpleInferer
        >>> FullGridInferer(SimpleInferer(), [1, 1, 4])(torch.zeros(2, 1, 8, 8, 3), torch.nn.Conv3d(1, 5, 1)).shape
        torch.Size([2, 5, 8, 8, 12])
    """

    def __init__(self, inferer: Callable[..., Tensor], scale: Sequence[int]) -> None:
        super().__init__()
        self.inferer, self.scale = inferer, tuple(_whole(scale))
        self.roi_size = getattr(inferer, "roi_size", None)         # who looks into a network asks for its windows

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Give logits (B, K, *(S * scale)) for images (B, C, *S); float32 where they are interpolated."""
        if inputs.dim() != len(self.scale) + 2:
            raise ValueError(
                f"`scale` must have a number for each of the {inputs.dim() - 2} axes of the image, got "
                f"{list(self.scale)}."
            )
        logits = self.inferer(inputs, network, *args, **kwargs)    # (B, K, *S)
        if max(self.scale) == 1 or logits.numel() == 0:            # nothing is left of air, cropped to the body
            return logits
        size = [length * step for length, step in zip(logits.shape[2:], self.scale, strict=True)]
        return functional.interpolate(logits.float(), size, mode=_LINEAR[len(size)], align_corners=False)


class TellResolutiond(MapTransform):
    """Log a warning where a file is not of the resolution that `input_is_high_res` says.

    One of full resolution taken as a low one is not averaged, and its noise stays; one of low resolution taken as a
    full one is blurred once more.

    Args:
        keys: images with an affine, shape (C, *S), before they are resampled; they stay as they are.
        spacing: of full resolution along each axis, in the unit of the affine.
        scale: voxels of full resolution per voxel of the student along each axis.
        is_high_res: images are degraded by `scale`; False takes them as the student's.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(
        self, keys: KeysCollection, spacing: Sequence[float], scale: Sequence[int], is_high_res: bool,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.low = {axis: spacing[axis] * step for axis, step in enumerate(scale) if step > 1}
        self.is_high_res = is_high_res

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data`."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            if not hasattr(image, "affine") or not self.low:
                continue
            own = {axis: float(np.asarray(image.pixdim)[axis]) for axis in self.low}
            shares = [own[axis] / self.low[axis] for axis in self.low]
            found, low = (" x ".join(f"{length:g}" for length in one.values()) for one in (own, self.low))
            name = image.meta.get("filename_or_obj", key)
            if self.is_high_res and min(shares) >= _AS_COARSE:
                logger.warning(
                    "%s has voxels of %s, as coarse as the student's %s, and is averaged once more: with "
                    "--input_is_high_res false it is taken as it is.", name, found, low,
                )
            elif not self.is_high_res and min(shares) < _FINER:
                logger.warning(
                    "%s has voxels of %s, finer than the student's %s, and is sampled without averaging: leave "
                    "--input_is_high_res false out.", name, found, low,
                )
        return result


def checked_scale(scale: Sequence[int], patch_size: Sequence[int]) -> list[int]:
    """Give `scale` as it is, if a patch can be degraded by it: a slip is told before any data are read.

    Args:
        scale: voxels of the teacher's image per voxel of the student's along each axis.
        patch_size: voxels of a patch at full resolution.

    Raises:
        ValueError: `scale` is no whole number of 1 or more for each axis of the patch, or leaves a rest of it.

    Example:
        >>> checked_scale([1, 1, 4], [48, 48, 48])
        [1, 1, 4]
    """
    steps = _whole(scale)
    if len(steps) != len(patch_size):
        raise ValueError(
            f"`scale` must have a number for each of the {len(patch_size)} axes of `patch_size`, got {steps}; 1 where "
            "nothing is averaged."
        )
    if any(length % step for length, step in zip(patch_size, steps, strict=True)):
        raise ValueError(f"`patch_size` must be divisible by `scale` {steps} along its axes, got {list(patch_size)}.")
    return steps


def _whole(scale: Sequence[int]) -> list[int]:
    whole = all(isinstance(step, int) and not isinstance(step, bool) and step >= 1 for step in scale)
    if not whole or len(scale) not in _LINEAR:
        raise ValueError(
            f"`scale` must be a whole number of 1 or more for each of 2 or 3 axes, got {list(scale)}; such as "
            "[2, 2, 2], or [1, 1, 4] for slices of four times the thickness."
        )
    return list(scale)
