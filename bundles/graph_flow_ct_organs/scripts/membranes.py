# SPDX-License-Identifier: Apache-2.0
"""Membranes of electron microscopy, made of the instances on both sides of them; needs torch and monai only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type
from torch import Tensor

__all__ = ["MembraneFromInstancesd", "membranes"]

_EXACT = 2**24   # float32 holds whole numbers up to here


def membranes(instances: Tensor, axes: Sequence[int] | None = None, grow: int = 0) -> Tensor:
    """Mark the membranes between instances: the voxels on both sides where two touch, and lines of 0 between them.

    A voxel is a membrane if it has a face neighbor that belongs to an instance, and to another one than the voxel:

    * where instances touch, the membrane is 2 voxels thick, one on each side;
    * a line of 0 between instances is the membrane, 1 or 2 voxels thick as it is drawn;
    * of a larger region of 0 (background, or not labeled) only the rim is, 1 voxel thick.

    There is no neighbor beyond the edge of the volume.

    Args:
        instances: ids, 0 for none, negative where nothing is known: such a voxel is no membrane and makes none. Shape
            (C, *S), any integer type, or floats below 2^24, where they are exact.
        axes: spatial axes, from 0 on, along which neighbors are compared; None for all. `[0, 1]` is for sections along
            the last axis whose ids do not link from one to the next.
        grow: voxels that are added on each side of a membrane, along the same axes; at least 0.

    Returns:
        1 for membrane, else 0. Shape of `instances`, uint8.

    Raises:
        ValueError: no such axis, a negative `grow`, or floats too large to tell ids apart.

    Example:
        >>> membranes(torch.tensor([[3, 3, 3, 7, 7, 0, 8, 8]])).tolist()
        [[0, 0, 1, 1, 0, 1, 0, 0]]
    """
    chosen = _check_axes(axes, instances.dim() - 1)
    if grow < 0:
        raise ValueError(f"`grow` must be a number of voxels of at least 0, got {grow}.")
    if instances.is_floating_point() and instances.numel() and float(instances.max()) >= _EXACT:
        raise ValueError(
            f"`instances` must have ids below {_EXACT:,} as {instances.dtype}, got {float(instances.max()):.0f}, where "
            "floats no longer tell neighbors apart; number the instances anew from 1 on, or load them as integers."
        )
    known = instances >= 0
    mask = torch.zeros(instances.shape, dtype=torch.bool, device=instances.device)
    for axis in chosen:
        first, second = _neighbors(instances, axis)
        differ = first != second
        for side, other in zip(_neighbors(mask, axis), (second, first), strict=True):
            side |= differ & (other > 0)                           # a view: this writes into `mask`
    mask &= known
    for _ in range(grow):
        before = mask.clone()
        for axis in chosen:
            for side, other in zip(_neighbors(mask, axis), reversed(_neighbors(before, axis)), strict=True):
                side |= other
    return (mask & known).to(torch.uint8)


def _check_axes(axes: Sequence[int] | None, rank: int) -> list[int]:
    chosen = list(range(rank)) if axes is None else list(axes)
    if not chosen or any(axis not in range(rank) for axis in chosen):
        raise ValueError(f"`axes` must be spatial axes out of {list(range(rank))}, got {axes}.")
    return chosen


def _neighbors(volume: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Views of all voxels but the last, and of all but the first, along a spatial axis."""
    size = volume.shape[axis + 1]
    return volume.narrow(axis + 1, 0, size - 1), volume.narrow(axis + 1, 1, size - 1)


class MembraneFromInstancesd(MapTransform):
    """Replace instance labels by membrane (1) and the rest (0), and what is negative, ignored, by -1; see `membranes`.

    Args:
        keys: keys of instance labels, shape (1, *S).
        axes: see `membranes`.
        grow: see `membranes`.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        axes: Sequence[int] | None = None,
        grow: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.axes = axes
        self.grow = grow

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with membranes, in the type of the labels and with their metadata."""
        result = dict(data)
        for key in self.key_iterator(result):
            instances = torch.as_tensor(result[key])
            mask = membranes(instances, self.axes, self.grow)
            if bool((instances < 0).any()):
                mask = torch.where(instances < 0, -1, mask.to(torch.int64))
            result[key] = convert_to_dst_type(mask, result[key])[0]
        return result
