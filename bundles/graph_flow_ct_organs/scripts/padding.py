# SPDX-License-Identifier: Apache-2.0
"""Any size of image for networks that halve it several times."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_to", "pad_to_multiple"]


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Lengthen each spatial axis at its end to a multiple, with copies of the last row, column or plane.

    Args:
        image: shape (B, C, *S).
        multiple: what the lengths become multiples of, in pixels or voxels.

    Example:
        >>> import torch
        >>> pad_to_multiple(torch.arange(5.0).view(1, 1, 1, 5), 4).shape
        torch.Size([1, 1, 4, 8])
    """
    pads: list[int] = []
    for size in image.shape[2:]:
        pads = [0, (size + multiple - 1) // multiple * multiple - size] + pads    # F.pad begins with the last axis
    return F.pad(image, pads, mode="replicate")


def crop_to(result: Tensor, image: Tensor) -> Tensor:
    """Undo `pad_to_multiple`: the part of a result, shape (B, K, *S'), that lies on the image, shape (B, C, *S)."""
    pads: list[int] = []
    for axis in range(2, image.dim()):
        pads = [0, image.shape[axis] - result.shape[axis]] + pads
    return F.pad(result, pads)
