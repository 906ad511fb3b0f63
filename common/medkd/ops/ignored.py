# SPDX-License-Identifier: Apache-2.0
"""The one notion of voxels that do not count: a negative label means unknown, and is ignored everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "UNLABELED", "ignored_voxels", "is_ignored", "on_grid"]

IGNORED = -1
UNLABELED = -2    # all of a case without a label: it counts in no supervised loss, and in every distillation term
_NEVER_NEGATIVE = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def is_ignored(label: Tensor, ignore: int | None = None) -> Tensor:
    """Mark the voxels that do not count: those of a negative label, and of `ignore` if that is given.

    Args:
        label: any shape and type.
        ignore: one more label that does not count, such as 255.

    Returns:
        Same shape, bool.

    Example:
        >>> is_ignored(torch.tensor([0, -1, 2, -100])).tolist()
        [False, True, False, True]
    """
    negative = torch.zeros_like(label, dtype=torch.bool) if label.dtype in _NEVER_NEGATIVE else label < 0
    return negative if ignore is None else negative | (label == ignore)


def ignored_voxels(label: Tensor | None, ignore: int | None = None) -> Tensor | None:
    """The same, and None where every voxel counts: then nothing has to be left out, and no result changes by a bit.

    Example:
        >>> ignored_voxels(torch.tensor([0, 1])) is None
        True
    """
    if label is None or (ignore is None and label.dtype in _NEVER_NEGATIVE):
        return None
    mask = is_ignored(label, ignore)
    return mask if bool(mask.any()) else None


def on_grid(ignored: Tensor, grid: Sequence[int]) -> Tensor:
    """Bring a mask to another grid: each voxel takes that of the nearest one.

    Args:
        ignored: shape (B, C, *S), bool.
        grid: spatial shape of the result.

    Returns:
        Shape (B, 1, *grid), bool; a voxel that any channel marks is marked.
    """
    merged = ignored.any(1, keepdim=True)
    if tuple(merged.shape[2:]) == tuple(grid):
        return merged
    return F.interpolate(merged.float(), size=tuple(grid), mode="nearest-exact") > 0.5
