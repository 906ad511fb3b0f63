# SPDX-License-Identifier: Apache-2.0
"""The one notion of voxels that do not count: a negative label means unknown, and is ignored everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "IGNORED", "UNLABELED", "ignored_voxels", "is_ignored", "is_without_label", "labeled_samples", "may_be_negative",
    "on_grid", "samples_without_label",
]

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
    negative = label < 0 if may_be_negative(label) else torch.zeros_like(label, dtype=torch.bool)
    return negative if ignore is None else negative | (label == ignore)


def ignored_voxels(label: Tensor | None, ignore: int | None = None) -> Tensor | None:
    """The same, and None where every voxel counts: then nothing has to be left out, and no result changes by a bit.

    Example:
        >>> ignored_voxels(torch.tensor([0, 1])) is None
        True
    """
    if label is None or (ignore is None and not may_be_negative(label)):
        return None
    mask = is_ignored(label, ignore)
    return mask if bool(mask.any()) else None


def may_be_negative(label: Tensor) -> bool:
    """Tell by its type whether a label can have ignored voxels at all."""
    return label.dtype not in _NEVER_NEGATIVE


def is_without_label(label: Tensor) -> bool:
    """Tell whether a case has no label: any voxel of `UNLABELED`, as transforms may have padded it with other values.

    Args:
        label: of one case, any shape and type.

    Example:
        >>> is_without_label(torch.tensor([-2, 0])), is_without_label(torch.tensor([-1, 0]))
        (True, False)
    """
    return may_be_negative(label) and bool((label == UNLABELED).any())


def samples_without_label(label: Tensor) -> Tensor:
    """Tell the same of each sample of a batch (B, ...), or (B,) of classes: shape (B,), bool.

    Example:
        >>> samples_without_label(torch.tensor([[0, 1], [-2, 0], [-1, 0]])).tolist()
        [False, True, False]
    """
    return (label == UNLABELED).view(len(label), -1).any(1)


def labeled_samples(pred: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the samples without a label, for a supervised loss: those with a voxel of `UNLABELED`.

    One such voxel is enough, as transforms may have padded the sample with another value.

    Args:
        pred: shape (B, ...).
        label: shape (B, ...), or (B,) of classes.

    Returns:
        Both, themselves where every sample has a label; else without those samples, and there may be none left.

    Example:
        >>> [len(part) for part in labeled_samples(torch.zeros(3, 2), torch.tensor([[0, 1], [-2, -2], [-1, 0]]))]
        [2, 2]
    """
    if not may_be_negative(label):
        return pred, label
    kept = ~samples_without_label(label)
    if bool(kept.all()):
        return pred, label
    return pred.as_subclass(Tensor)[kept], label.as_subclass(Tensor)[kept]   # without MONAI's metadata


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
