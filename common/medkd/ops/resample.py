# SPDX-License-Identifier: Apache-2.0
"""Bring maps and labels to a coarser or finer grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.checks import check_maps
from medkd.ops.ignored import IGNORED, is_ignored

__all__ = ["majority_label", "pool_average", "pool_or_interpolate", "resize_linearly"]

_LINEAR = {2: "bilinear", 3: "trilinear"}


def pool_or_interpolate(
    maps: Tensor, grid: Sequence[int], pool: Literal["maximum", "average"] = "maximum"
) -> Tensor:
    """Resize maps: adaptive pooling where the grid is coarser, linear interpolation where it is finer.

    Args:
        maps: shape (B, C, *S), floating.
        grid: spatial shape of the result.
        pool: `maximum` loses no peak; `average` for features.

    Returns:
        Maps of shape (B, C, *grid); the input itself when it is on the grid already.

    Raises:
        ValueError: unknown `pool`, or no floating map.

    Reference:
        Boundary map resizing of the `default` preset: maxima keep a thin boundary alive on a coarse grid.
    """
    check_maps("maps", maps)
    if pool not in ("maximum", "average"):
        raise ValueError(f"`pool` must be 'maximum' or 'average', got {pool!r}.")
    size, grid = tuple(maps.shape[2:]), tuple(grid)
    coarse = tuple(min(s, g) for s, g in zip(size, grid, strict=True))
    if coarse != size:
        maps = _pool_maximum(maps, coarse) if pool == "maximum" else pool_average(maps, coarse)
    return resize_linearly(maps, grid)


def resize_linearly(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Interpolate maps linearly between voxel centers; where the grid is coarser, voxels between are not looked at.

    Args:
        maps: shape (B, C, *S), floating.
        grid: spatial shape of the result.

    Returns:
        Maps of shape (B, C, *grid); the input itself when it is on the grid already.
    """
    grid = tuple(grid)
    if tuple(maps.shape[2:]) == grid:
        return maps
    return F.interpolate(maps, size=grid, mode=_LINEAR[len(grid)], align_corners=False)


def _pool_maximum(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    size = tuple(maps.shape[2:])
    pool = F.max_pool3d if len(grid) == 3 else F.max_pool2d
    if all(s % g == 0 for s, g in zip(size, grid, strict=True)):   # deterministic backward on every device
        return pool(maps, tuple(s // g for s, g in zip(size, grid, strict=True)))
    adaptive = F.adaptive_max_pool3d if len(grid) == 3 else F.adaptive_max_pool2d
    return adaptive(maps, grid)


def pool_average(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Adaptive average pooling to `grid`, for 2-D and 3-D maps.

    Args:
        maps: shape (B, C, *S), floating; every axis at least as long as the grid's.
        grid: spatial shape of the result.

    Returns:
        Maps of shape (B, C, *grid); the input itself when it is on the grid already.
    """
    check_maps("maps", maps)
    grid = tuple(grid)
    if tuple(maps.shape[2:]) == grid:
        return maps
    return F.adaptive_avg_pool3d(maps, grid) if len(grid) == 3 else F.adaptive_avg_pool2d(maps, grid)   # type: ignore[arg-type]


def majority_label(label: Tensor, grid: Sequence[int], ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """Reduce a label map to a coarser grid by majority vote; ties go to the higher label.

    Ignored voxels do not vote, and a block without votes is ignored. Nearest-neighbor reduction would delete
    thin structures and move borders by half a block. Along an axis on which the label is coarser than the grid,
    labels are repeated. Counting is done in integers, so the result is the same on every device.

    Args:
        label: class indices, shape (B, 1, *S), any dtype that holds whole numbers.
        grid: spatial shape of the result.
        ignore: one more label that does not count, besides negative ones, which never do.

    Returns:
        Labels of shape (B, 1, *grid), int64, `ignore` (or -1) where no voxel voted; and the share of each block's
        voxels that are not ignored, same shape, float32.
    """
    label = label.long()
    size, grid = tuple(label.shape[2:]), tuple(grid)
    finer = tuple(max(s, g) for s, g in zip(size, grid, strict=True))
    if finer != size:
        label = F.interpolate(label.double(), size=finer, mode="nearest-exact").long()
    if finer == grid:
        return label, (~is_ignored(label, ignore)).float()
    valid = ~is_ignored(label, ignore)
    classes = int(torch.where(valid, label, 0).max()) + 1
    cells = label.shape[0] * math.prod(grid)
    if _blocks_are_equal(finer, grid):
        votes = _count_blocks(torch.where(valid, label, classes), grid, classes)
        block: Tensor | int = math.prod(finer) // math.prod(grid)
    else:
        cell = _cell_index(label, grid)
        votes = torch.bincount((label * cells + cell)[valid], minlength=classes * cells).view(classes, cells)
        block = torch.bincount(cell.flatten(), minlength=cells)
    total = votes.sum(0)
    ranked = votes * classes + torch.arange(classes, device=label.device).unsqueeze(1)
    winner = torch.where(total > 0, ranked.amax(0) % classes, IGNORED if ignore is None else ignore)
    shape = (label.shape[0], 1, *grid)
    return winner.view(shape), (total / block).float().view(shape)


def _blocks_are_equal(size: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    return all(s % g == 0 for s, g in zip(size, grid, strict=True))


def _count_blocks(label: Tensor, grid: tuple[int, ...], classes: int) -> Tensor:
    """Votes per cell, shape (classes, B * cells), int64: voxels of a block one below the other, then compared."""
    split = [label.shape[0]]
    for s, g in zip(label.shape[2:], grid, strict=True):
        split += [g, s // g]
    rank = len(grid)
    order = [*range(2, 2 * rank + 1, 2), 0, *range(1, 2 * rank, 2)]
    blocks = label.float().reshape(split).permute(order).reshape(-1, label.shape[0] * math.prod(grid))
    equal = torch.empty_like(blocks)                               # (voxels, cells); float sums are exact to 2^24
    return torch.stack([torch.eq(blocks, k, out=equal).sum(0).long() for k in range(classes)])


def _cell_index(label: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Flat index of the cell of every voxel, shape of `label`; cells are disjoint, floor(i * grid / size)."""
    index = torch.arange(label.shape[0], device=label.device).view(-1, *[1] * (label.dim() - 1))
    for axis, (s, g) in enumerate(zip(label.shape[2:], grid, strict=True), start=2):
        along = torch.arange(s, device=label.device) * g // s
        shape = [1] * label.dim()
        shape[axis] = s
        index = index * g + along.view(shape)
    return index.expand_as(label)
