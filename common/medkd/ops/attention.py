# SPDX-License-Identifier: Apache-2.0
"""Where a layer is strong: one channel that shows the power of its features, and how two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.checks import check_maps, check_same_grid
from medkd.ops.precision import at_least_float32
from medkd.ops.resample import pool_average, resize_linearly

__all__ = [
    "attention_distance", "attention_map", "effective_voxels", "largest_magnitude", "resized_attention_map",
    "shared_grid", "unified_attention_map",
]

_AT_ONCE = 2**20           # numbers of a block of channels: 4 MiB, and at least one channel
_TINY = 1e-30              # features below it are as good as 0; its inverse is still a float32


def largest_magnitude(maps: Tensor) -> Tensor:
    """Give the largest |x| of each sample, by which features are divided before a power that would overflow.

    Args:
        maps: shape (B, C, *S), floating.

    Returns:
        Shape (B, 1, ...), of as many axes, at least float32, without gradient; 1e-30 where a sample is 0.

    Example:
        >>> largest_magnitude(torch.tensor([[[[1.0, -3.0]], [[2.0, 0.0]]]])).shape
        torch.Size([1, 1, 1, 1])
    """
    check_maps("maps", maps)
    axes = tuple(range(1, maps.dim()))
    largest: Tensor = torch.linalg.vector_norm(maps.detach(), math.inf, dim=axes, keepdim=True)
    return at_least_float32(largest).clamp(min=_TINY)


def attention_map(maps: Tensor, exponent: float = 4.0, scale: Tensor | None = None) -> Tensor:
    """Mean over the channels of |x / scale|^exponent.

    Its direction, which is what `attention_distance` compares, does not depend on `scale`: with that of
    `largest_magnitude` neither overflow nor underflow is possible, and the gradient of a distance is exact although
    none is taken of `scale`.

    Args:
        maps: shape (B, C, *S), floating; half precision is widened a few channels at a time.
        exponent: at least 1. The larger it is, the more the map belongs to the strongest voxels.
        scale: positive, shape (B, 1, ...); 1 when None. Never receives a gradient.

    Returns:
        Shape (B, 1, *S), non-negative, at least float32. Kept for backward are `maps` and `scale` alone: powers of a
        few channels at a time are computed again.

    Raises:
        ValueError: no floating map, or an exponent below 1.

    Reference:
        Zagoruyko and Komodakis, Paying More Attention to Attention, arXiv 1612.03928, section 3.1; with a power of 4
        and normalized maps in Gorade et al., arXiv 2311.16700, released code.

    Example:
        >>> attention_map(torch.tensor([[[[1.0, 2.0]], [[-1.0, 0.0]]]])).flatten().tolist()
        [1.0, 8.0]
    """
    check_maps("maps", maps)
    if not 1 <= exponent < math.inf:
        raise ValueError(f"`exponent` must be a number of at least 1, got {exponent}; 4 is the published one.")
    scale = torch.ones_like(largest_magnitude(maps)) if scale is None else scale
    return _AttentionMap.apply(maps, scale, exponent)   # type: ignore[no-any-return, no-untyped-call]


class _AttentionMap(torch.autograd.Function):
    """Autograd would keep three copies of the features."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: Tensor, exponent: float) -> Tensor:
        total = scale.new_zeros(len(maps), 1, *maps.shape[2:])
        for part in _blocks(maps):
            root = maps[:, part] / scale                           # widened by the type of `scale`
            if exponent == 4:
                root.square_()
            elif exponent != 2:
                root.abs_().pow_(exponent / 2)
            total += root.square_().sum(1, keepdim=True)
        ctx.save_for_backward(maps, scale)
        ctx.exponent = exponent
        return total.div_(maps.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        maps, scale = ctx.saved_tensors
        pull = torch.empty_like(maps)
        force = grad * (ctx.exponent / maps.shape[1]) / scale      # (B, 1, *S)
        for part in _blocks(maps):
            slope = maps[:, part] / scale
            if ctx.exponent == 4:
                slope.pow_(3)
            elif ctx.exponent != 2:
                slope = slope.sign() * slope.abs().pow_(ctx.exponent - 1)
            pull[:, part] = slope.mul_(force)
        return pull, None, None


def _blocks(maps: Tensor) -> Iterator[slice]:
    voxels = max(1, maps.numel() // max(1, maps.shape[1]))
    step = max(1, _AT_ONCE // voxels)
    return (slice(start, start + step) for start in range(0, maps.shape[1], step))


def unified_attention_map(levels: Sequence[Tensor], exponent: float = 4.0) -> Tensor:
    """The attention map of several layers as if their channels were one layer's, on the coarsest of their grids.

    Each layer becomes one channel where it is, which is then average-pooled; layers count by their channels and keep
    their relative sizes, so the one with the largest activations dominates.

    Args:
        levels: shapes (B, C_l, *S_l), floating.
        exponent: as in `attention_map`.

    Returns:
        Shape (B, 1, *G), of any scale, G the smallest size along each axis.

    Raises:
        ValueError: no layer.

    Reference:
        Gorade et al., arXiv 2311.16700 (unified feature distillation); the released code resizes features and takes
        the power then, as `resized_attention_map` does.
    """
    grid, scale = shared_grid(levels), _common_scale(levels)
    channels = sum(level.shape[1] for level in levels)
    maps = [
        pool_average(attention_map(level, exponent, scale), grid) * (level.shape[1] / channels) for level in levels
    ]
    return torch.stack(maps).sum(0)


def resized_attention_map(levels: Sequence[Tensor], grid: Sequence[int], exponent: float = 4.0) -> Tensor:
    """The same as released: features are resized linearly, to the coarsest of their grids and from there to `grid`.

    A few channels are resized at a time, so that no array of all channels on a fine grid is ever made.

    Args:
        levels: shapes (B, C_l, *S_l), floating; never receive a gradient.
        grid: spatial shape of the result.
        exponent: as in `attention_map`.

    Returns:
        Shape (B, 1, *grid), of any scale.

    Raises:
        ValueError: no layer.

    Reference:
        Gorade et al., arXiv 2311.16700, released code.
    """
    coarse, scale = shared_grid(levels), _common_scale(levels)
    channels = sum(level.shape[1] for level in levels)
    like = at_least_float32(levels[0][:, :1]).detach()
    total = like.new_zeros(len(like), 1, *grid)
    for level in levels:
        small = resize_linearly(at_least_float32(level.detach()), coarse)
        step = max(1, _AT_ONCE // max(1, total.numel()))
        for part in torch.split(small, step, dim=1):
            share = part.shape[1] / channels
            total += attention_map(resize_linearly(part, grid), exponent, scale).mul_(share)
    return total


def shared_grid(levels: Sequence[Tensor]) -> tuple[int, ...]:
    """Give the smallest size along each axis of maps (B, C_l, *S_l).

    Raises:
        ValueError: no map.
    """
    if not levels:
        raise ValueError("`levels` must hold at least one map of shape (B, C, *S), got none.")
    return tuple(min(sizes) for sizes in zip(*(level.shape[2:] for level in levels), strict=True))


def _common_scale(levels: Sequence[Tensor]) -> Tensor:
    return reduce(torch.maximum, map(largest_magnitude, levels))


def attention_distance(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared distance of two attention maps, each scaled to length 1 over its voxels; 2 - 2 cosine.

    Args:
        student: shape (B, 1, *S), non-negative, at least float32; of any scale.
        teacher: likewise, on the same grid; never receives a gradient.
        weight: non-negative weights of voxels, shape (B, 1, *S), in both lengths and in the distance; None for 1.

    Returns:
        Shape (B,), range [0, 2]; 1 without gradient where one of the maps is 0 (a dead layer), 0 where both are, as
        where all weights are. Kept for backward is one map: the gradient.

    Raises:
        ValueError: no map, or another grid.

    Reference:
        Gorade et al., arXiv 2311.16700, released code, feature distance.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])
        >>> attention_distance(student, teacher).tolist(), attention_distance(student, 3.0 * student).tolist()
        ([2.0], [0.0])
    """
    check_maps("student", student)
    check_same_grid("student", student, "teacher", teacher)
    student, teacher = at_least_float32(student), teacher.detach().to(student.dtype)
    if weight is not None:
        root = weight.to(student.dtype).sqrt()                     # sum w m^2 = sum (sqrt(w) m)^2
        student, teacher = student * root, teacher * root
    return _AttentionDistance.apply(student, teacher)   # type: ignore[no-any-return, no-untyped-call]


class _AttentionDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        (mine, length), (other, _) = _unit_map(student), _unit_map(teacher)
        difference = mine - other
        axes = tuple(range(1, mine.dim()))
        along = (mine * difference).sum(axes, keepdim=True)        # a length does not matter: only the tangent is left
        ctx.save_for_backward((difference - along * mine).mul_(torch.where(length > 0, 2.0 / length, 0.0)))
        return difference.square_().sum(axes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (pull,) = ctx.saved_tensors
        return pull * grad.view(-1, *[1] * (pull.dim() - 1)), None


def _unit_map(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of length 1 per sample, 0 where they are 0, and their lengths (B, 1, ...); squares of tiny ones are safe."""
    axes = tuple(range(1, maps.dim()))
    largest = maps.amax(axes, keepdim=True)
    scaled = maps / torch.where(largest > 0, largest, 1.0)
    length = scaled.square().sum(axes, keepdim=True).sqrt_()
    return scaled.div_(torch.where(length > 0, length, 1.0)), length * largest


def effective_voxels(attention: Tensor) -> Tensor:
    """Tell over how many voxels a map is spread: 1 / sum a^4 of its unit vector a.

    Args:
        attention: shape (B, 1, *S), non-negative.

    Returns:
        Shape (B,): 1 where one voxel has it all, all voxels for a constant map, 0 for a map of zeros.

    Example:
        >>> [round(value, 3) for value in effective_voxels(torch.tensor([[[[0.0, 7.0]]], [[[3.0, 3.0]]]])).tolist()]
        [1.0, 2.0]
    """
    unit, length = _unit_map(at_least_float32(attention.detach()))
    fourth = unit.square().square_().flatten(1).sum(1)
    return torch.where(length.flatten() > 0, 1.0 / fourth, 0.0)
