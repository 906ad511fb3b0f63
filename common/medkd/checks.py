# SPDX-License-Identifier: Apache-2.0
"""Shape checks with one message grammar: the argument, what was expected, what came, the way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from torch import Tensor

__all__ = ["check_classes", "check_label", "check_maps", "check_same_grid", "suggest"]


def check_maps(name: str, value: Tensor) -> None:
    """Raise `ValueError` unless `value` is a floating feature map of shape (B, C, *S), 2-D or 3-D."""
    if value.dim() not in (4, 5) or not value.is_floating_point():
        raise ValueError(
            f"`{name}` must be a floating map of shape (B, C, *S) with 2 or 3 spatial axes, "
            f"got {tuple(value.shape)} of {value.dtype}."
        )


def check_label(name: str, value: Tensor, like: Tensor) -> None:
    """Raise `ValueError` unless `value` is a label map of shape (B, 1, *S) with the batch and rank of `like`."""
    if value.dim() != like.dim() or value.shape[1] != 1 or value.shape[0] != like.shape[0]:
        raise ValueError(
            f"`{name}` must have shape (B, 1, *S) with B = {like.shape[0]} and {like.dim() - 2} spatial axes, "
            f"got {tuple(value.shape)}; add a channel axis or use class indices instead of one-hot maps."
        )


def check_classes(name: str, value: Tensor, classes: int) -> None:
    """Raise `ValueError` unless every label is a class below `classes` or negative, which means ignored."""
    largest = int(value.max()) if value.numel() else 0
    if largest >= classes:
        raise ValueError(
            f"`{name}` must be class indices below {classes}, the network's channels, or negative where a voxel is to "
            f"be ignored, got {largest}; if that stands for unknown voxels (255 often does), map it to -1."
        )


def check_same_grid(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Raise `ValueError` unless both maps have the same batch and spatial shape."""
    if first.shape[0] != second.shape[0] or first.shape[2:] != second.shape[2:]:
        raise ValueError(
            f"`{first_name}` and `{second_name}` must share batch and spatial shape, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}."
        )


def suggest(name: str, known: Iterable[str], most: int = 12) -> str:
    """Word the way out of a wrong name: the nearest known names, else the first few of them."""
    names: Sequence[str] = list(known)
    near = get_close_matches(name, names, n=3)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(repr(n) for n in names[:most])
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"there are {shown}{rest}." if names else "there are none."
