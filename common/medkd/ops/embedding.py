# SPDX-License-Identifier: Apache-2.0
"""Affinities between each voxel's embedding and that of the voxel an offset away, and their targets from instances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.checks import check_maps
from medkd.ops.graph import unit_vectors
from medkd.ops.ignored import ignored_voxels
from medkd.ops.precision import at_least_float32

__all__ = [
    "AffinityBalance", "BackgroundPairs", "background_cosine", "checked_pair_options", "label_affinity",
    "offset_affinity", "offset_mask", "pair_mask", "pairs_of_background", "pooled_directions", "target_balance_weight",
    "weighted_targets", "widen_borders",
]

AffinityBalance = Literal["sample", "channel", "none"]
BackgroundPairs = Literal["same", "different"]
Offset = tuple[int, ...]
Slices = tuple[slice, ...]
_SHORT = 1e-12                                                     # embeddings under this length have no direction


def offset_affinity(embeddings: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    """Cosine of each voxel's embedding with that of the voxel an offset away.

    Args:
        embeddings: shape (B, C, *S), floating; computed in at least float32.
        offsets: one per channel of the result: steps in voxels along the axes of S, of any sign, not all 0.

    Returns:
        Affinities of shape (B, O, *S), range [-1, 1], each stored at the voxel p of its pair (p, p + offset); 0 without
        gradient where p + offset lies outside (see `offset_mask`) or an embedding has no length. Time O(N C O); kept
        for backward: the unit embeddings, whatever O is.

    Raises:
        ValueError: no map, or an offset of another rank or of zeros only.

    Reference:
        Liu et al., Graph Relation Distillation for Efficient Biomedical Instance Segmentation, arXiv 2401.06370, L_aff.

    Example:
        >>> embeddings = torch.tensor([[[[2.0, 3.0, 0.0]], [[0.0, 0.0, 4.0]]]])
        >>> offset_affinity(embeddings, [(0, -1)]).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    check_maps("embeddings", embeddings)
    steps = _check_offsets(offsets, embeddings.dim() - 2)
    wide = at_least_float32(embeddings)
    return _OffsetAffinity.apply(wide, steps)   # type: ignore[no-any-return, no-untyped-call]


class _OffsetAffinity(torch.autograd.Function):
    """Keeps the unit embeddings and their lengths; autograd would keep copies of both for every offset."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
        inverse = _inverse_length(embeddings)
        unit = embeddings * inverse
        affinity = embeddings.new_zeros(len(embeddings), len(offsets), *embeddings.shape[2:])
        for channel, offset in enumerate(offsets):
            here, there = _pairs(embeddings.shape[2:], offset)
            _at(affinity, here)[:, channel] = _inner_product(_at(unit, here), _at(unit, there))[:, 0]
        ctx.save_for_backward(unit, inverse)
        ctx.offsets = offsets
        return affinity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, inverse = ctx.saved_tensors
        pull = torch.zeros_like(unit)
        for channel, offset in enumerate(ctx.offsets):
            here, there = _pairs(unit.shape[2:], offset)
            force = _at(grad[:, channel : channel + 1], here)
            _at(pull, here).addcmul_(_at(unit, there), force)
            _at(pull, there).addcmul_(_at(unit, here), force)
        along = _inner_product(pull, unit)                         # a length does not matter: only the tangent is left
        return pull.addcmul_(unit, along, value=-1.0).mul_(inverse), None


def _inverse_length(embeddings: Tensor) -> Tensor:
    """1 / length of each embedding, 0 of one without length; (B, 1, *S)."""
    length = _inner_product(embeddings, embeddings).sqrt_()
    return torch.where(length > _SHORT, length.clamp(min=_SHORT).reciprocal(), 0.0)


def _inner_product(first: Tensor, second: Tensor) -> Tensor:
    """Sum over channels of the products, (B, 1, *S); on a CPU without a product of the maps' size, 3 to 13 x faster."""
    if first.device.type != "cpu":
        return (first * second).sum(1, keepdim=True)
    total = first[:, :1] * second[:, :1]
    for channel in range(1, first.shape[1]):
        part = slice(channel, channel + 1)
        total.addcmul_(first[:, part], second[:, part])
    return total


def pooled_directions(embeddings: Tensor, cells: Sequence[int], ignored: Tensor | None = None) -> Tensor:
    """Unit embeddings, averaged over blocks of voxels and not scaled to length 1 again.

    Args:
        embeddings: shape (B, C, *S), floating; computed in at least float32.
        cells: voxels of a block along each axis of S; blocks at the far border are as large as what is left. All 1
            leaves the unit embeddings as they are.
        ignored: voxels that are left out of the averages, shape (B, 1, *S), bool; a block of nothing else is 0.

    Returns:
        Shape (B, N, C), N the number of blocks. Kept for backward: a number per voxel.

    Raises:
        ValueError: no map, or blocks of another rank or of less than one voxel.

    Reference:
        Liu et al., arXiv 2401.06370, affinities across images; the pooling is of the released code.

    Example:
        >>> pooled_directions(torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 3.0, 0.0]]]]), (1, 2)).tolist()
        [[[0.5, 0.5], [1.0, 0.0]]]
    """
    check_maps("embeddings", embeddings)
    block = tuple(cells)
    if len(block) != embeddings.dim() - 2 or min(block) < 1:
        raise ValueError(f"`cells` must be {embeddings.dim() - 2} numbers of voxels of at least 1, got {list(cells)}.")
    wide = at_least_float32(embeddings)
    block = tuple(min(pair) for pair in zip(block, wide.shape[2:], strict=True))
    if ignored is not None:
        wide = wide.masked_fill(ignored, 0.0)                      # of no length: no direction, no gradient
    pooled = _PooledDirections.apply(wide, block)   # type: ignore[no-untyped-call]
    if ignored is not None:
        share = _pool((~ignored).to(pooled), block)
        pooled = torch.where(share > 0, pooled / share.clamp(min=1e-9), 0.0)
    return pooled.flatten(2).transpose(1, 2)   # type: ignore[no-any-return]


class _PooledDirections(torch.autograd.Function):
    """Keeps the embeddings, which are there anyway; autograd would keep their unit vectors too, and more."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, block: tuple[int, ...]) -> Tensor:
        inverse = _inverse_length(embeddings)
        ctx.save_for_backward(embeddings, inverse)
        ctx.block = block
        return _pool(embeddings * inverse, block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        embeddings, inverse = ctx.saved_tensors
        pull = _spread(grad, embeddings.shape[2:], ctx.block)
        along = _inner_product(pull, embeddings).mul_(inverse.pow(3))
        return pull.mul_(inverse).addcmul_(embeddings, along, value=-1.0), None


def _pool(maps: Tensor, block: tuple[int, ...]) -> Tensor:
    """Averages over blocks; those at the far border are as large as what is left."""
    pool = F.avg_pool2d if len(block) == 2 else F.avg_pool3d
    return maps if max(block) == 1 else pool(maps, block, block, ceil_mode=True)


def _spread(blocks: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Give each voxel its part of its block's value: (B, C, *S) from (B, C, *blocks); a new tensor."""
    shares = blocks.clone()
    for axis, (length, step) in enumerate(zip(size, block, strict=True), start=2):
        last = shares.narrow(axis, blocks.shape[axis] - 1, 1)
        last *= step / (length - step * (blocks.shape[axis] - 1))  # a smaller block gives each of its voxels more
    shares /= math.prod(block)
    within = [one for step in block for one in (-1, step)]
    shares = shares.reshape(*blocks.shape[:2], *(one for count in blocks.shape[2:] for one in (count, 1)))
    whole = shares.expand(-1, -1, *within)
    covered = [count * step for count, step in zip(blocks.shape[2:], block, strict=True)]
    spread = whole.contiguous().reshape(*blocks.shape[:2], *covered)
    return _at(spread, tuple(slice(length) for length in size))


def background_cosine(embeddings: Tensor) -> Tensor:
    """Cosine of each voxel's embedding with the first axis of their space, where that is the background's direction.

    Args:
        embeddings: shape (B, C, *S), floating; computed in at least float32.

    Returns:
        Shape (B, 1, *S), range [-1, 1].
    """
    return unit_vectors(at_least_float32(embeddings))[:, :1]


def offset_mask(size: Sequence[int], offsets: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Tell which pairs (p, p + offset) lie inside.

    Args:
        size: spatial shape S.
        offsets: as in `offset_affinity`.
        device: of the result.

    Returns:
        Mask of shape (O, *S), bool, at the voxel p of each pair.
    """
    steps = _check_offsets(offsets, len(size))
    mask = torch.zeros(len(steps), *size, dtype=torch.bool, device=device)
    for inside, offset in zip(mask, steps, strict=True):
        inside[_pairs(size, offset)[0]] = True
    return mask


def pair_mask(ignored: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    """Tell which pairs (p, p + offset) lie inside and touch no ignored voxel.

    Args:
        ignored: shape (B, 1, *S), bool.
        offsets: as in `offset_affinity`.

    Returns:
        Mask of shape (B, O, *S), bool, at the voxel p of each pair.

    Example:
        >>> pair_mask(torch.tensor([[[[False, True, False, False]]]]), [(0, -1)]).flatten().tolist()
        [False, False, False, True]
    """
    steps = _check_offsets(offsets, ignored.dim() - 2)
    mask = torch.zeros(len(ignored), len(steps), *ignored.shape[2:], dtype=torch.bool, device=ignored.device)
    for channel, offset in enumerate(steps):
        here, there = _pairs(ignored.shape[2:], offset)
        _at(mask, here)[:, channel] = ~(_at(ignored, here) | _at(ignored, there))[:, 0]
    return mask


def label_affinity(
    label: Tensor, offsets: Sequence[Sequence[int]], background: BackgroundPairs = "same"
) -> Tensor:
    """Targets of `offset_affinity`: 1 where both voxels of a pair are of one instance.

    Args:
        label: instance numbers, shape (B, 1, *S), integer of any size; 0 is background, negative is ignored.
        offsets: as in `offset_affinity`; every one is followed to its full length, along every axis.
        background: two voxels of background are the `same` object (2-D presets), or `different` (3-D presets).

    Returns:
        Targets of shape (B, O, *S), float32, 0 or 1; 0 where p + offset lies outside or a voxel of the pair is ignored
        (see `pair_mask`).

    Reference:
        Liu et al., arXiv 2401.06370; for offsets of several sections the released code takes the target of one section,
        which is not followed here.

    Example:
        >>> label_affinity(torch.tensor([[[[0, 0, 5, 5]]]]), [(0, -1)], background="different").flatten().tolist()
        [0.0, 0.0, 0.0, 1.0]
    """
    if label.dim() not in (4, 5) or label.shape[1] != 1 or label.is_floating_point():
        raise ValueError(
            f"`label` must be instance numbers of shape (B, 1, *S), integer, got {tuple(label.shape)} of {label.dtype}."
        )
    if background not in get_args(BackgroundPairs):
        raise ValueError(f"`background` must be one of {get_args(BackgroundPairs)}, got {background!r}.")
    size = label.shape[2:]
    steps = _check_offsets(offsets, len(size))
    target = torch.zeros(len(label), len(steps), *size, device=label.device)
    for channel, offset in enumerate(steps):
        here, there = _pairs(size, offset)
        mine = _at(label, here)[:, 0]
        is_same = (mine == _at(label, there)[:, 0]) & (mine >= 0 if background == "same" else mine > 0)
        _at(target, here)[:, channel] = is_same.float()
    return target


def pairs_of_background(axes: int) -> BackgroundPairs:
    """What the code of arXiv 2401.06370 takes two voxels of background for, in images of 2 or 3 axes."""
    return "same" if axes == 2 else "different"


def checked_pair_options(
    offsets: Sequence[Sequence[int]], background: BackgroundPairs | None, balance: AffinityBalance
) -> BackgroundPairs:
    """Give what two voxels of background are, by the rank of the offsets where it is None.

    Raises:
        ValueError: no such background or balance.
    """
    is_flat = all(len(offset) == 2 for offset in offsets)
    chosen = background or pairs_of_background(2 if is_flat else 3)
    for name, value, known in (
        ("background", chosen, get_args(BackgroundPairs)),
        ("balance", balance, get_args(AffinityBalance)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")
    return chosen


def target_balance_weight(target: Tensor, mask: Tensor | None = None, per_channel: bool = False) -> Tensor:
    """Weights that give the rarer of the two targets the same total as the other one.

    With f, the share of ones, between 0.05 and 0.99: zeros weigh f / (1 - f) where f > 0.5, else ones (1 - f) / f; the
    others weigh 1, and all of them where the target is constant.

    Args:
        target: 0 or 1, shape (B, O, *S), floating.
        mask: pairs that f is taken over, broadcast to `target`; all when None.
        per_channel: one f for each channel of a sample, else one for the sample.

    Returns:
        Weights of the shape of `target`; they do not know the mask.

    Reference:
        Class balance of L_aff in the code of arXiv 2401.06370.
    """
    axes = tuple(range(2 if per_channel else 1, target.dim()))
    counted = torch.ones_like(target) if mask is None else mask.to(target).expand_as(target)
    total = counted.sum(axes, keepdim=True)
    ones = (target * counted).sum(axes, keepdim=True)
    share = (ones / total.clamp(min=1.0)).clamp(0.05, 0.99)
    rare = torch.where(share > 0.5, share / (1.0 - share), (1.0 - share) / share)
    rare = torch.where((ones == 0) | (ones == total), 1.0, rare)
    return torch.where((target > 0.5) == (share <= 0.5), rare, 1.0)


@torch.no_grad()
def weighted_targets(
    numbers: Tensor, offsets: Sequence[Sequence[int]], background: BackgroundPairs, balance: AffinityBalance
) -> tuple[Tensor, Tensor]:
    """Give the weights of pairs in L_aff, and their targets.

    Args:
        numbers: instance numbers, shape (B, 1, *S), integer; 0 is background, negative is ignored.
        offsets: as in `offset_affinity`.
        background: two voxels of background are the `same` object, or `different`.
        balance: weights of the rarer target by its share in the `sample` (2-D code), in each `channel` of it (3-D
            code), or `none`.

    Returns:
        Two tensors of shape (B, O, *S), float32. The sum of the weights times squared differences is the sum over
        offsets of means over images and voxels: all voxels in 2-D (pairs that leave the image add 0), the pairs inside
        in 3-D, as in the code. Pairs that touch an ignored voxel weigh nothing, and means are over what is left of all
        images together.

    Reference:
        Liu et al., arXiv 2401.06370, L_aff.
    """
    size, ignored = numbers.shape[2:], ignored_voxels(numbers)
    counted = None if ignored is None else ~ignored
    mask = offset_mask(size, offsets, numbers.device) if ignored is None else pair_mask(ignored, offsets)
    target = label_affinity(numbers, offsets, background)
    weight = mask.expand_as(target).float()
    if balance == "sample":                                        # pairs that leave the image count as ones here
        weight = weight * target_balance_weight(target.masked_fill(~mask, 1.0), counted)
    elif balance == "channel":
        weight = weight * target_balance_weight(target, mask, per_channel=True)
    if counted is None:
        total = len(target) * (mask.flatten(1).sum(1).clamp(min=1) if len(size) == 3 else size.numel())
    else:
        total = (mask.transpose(0, 1).flatten(1).sum(1) if len(size) == 3 else counted.sum()).clamp(min=1)
    return weight / torch.as_tensor(total, device=target.device).reshape(-1, *[1] * len(size)), target


def widen_borders(label: Tensor) -> Tensor:
    """Make background of every voxel with two instances in the 3 x 3 window around it, section by section.

    Args:
        label: instance numbers, shape (..., H, W), integer of any size; 0 is background, negative is ignored.

    Returns:
        Same shape and type; ignored voxels stay and widen nothing. Exact for every number, unlike pooling in floating
        point.

    Reference:
        Widened borders of the EM targets in the code of arXiv 2401.06370.

    Example:
        >>> widen_borders(torch.tensor([[7, 7, 7, 9, 9, 9]])).tolist()
        [[7, 7, 0, 0, 9, 9]]
    """
    largest = _in_window(label, torch.maximum)
    smallest = _in_window(torch.where(label > 0, label, torch.iinfo(label.dtype).max), torch.minimum)
    return torch.where((largest == smallest) | (label < 0), label, 0)


def _in_window(values: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Extreme value in the 3 x 3 window of the last two axes."""
    for axis in (-2, -1):
        length = values.shape[axis] - 1
        low, high = values.narrow(axis, 0, length), values.narrow(axis, 1, length)
        values = values.clone()
        for part, neighbor in ((values.narrow(axis, 1, length), low), (values.narrow(axis, 0, length), high)):
            part.copy_(choose(part, neighbor))
    return values


def _check_offsets(offsets: Sequence[Sequence[int]], axes: int) -> tuple[Offset, ...]:
    steps = tuple(tuple(offset) for offset in offsets)
    is_whole = all(isinstance(step, int) for offset in steps for step in offset)
    if not steps or not is_whole or any(len(offset) != axes or not any(offset) for offset in steps):
        raise ValueError(f"`offsets` must be vectors of {axes} whole numbers, not all 0, got {list(offsets)}.")
    return steps


def _pairs(size: Sequence[int], offset: Offset) -> tuple[Slices, Slices]:
    """Where p and p + offset lie for all pairs inside; empty slices when an axis is shorter than its step."""
    both = list(zip(size, offset, strict=True))
    if any(abs(step) >= length for length, step in both):
        return ((slice(0, 0),) * len(both),) * 2
    here = tuple(slice(max(0, -step), length - max(0, step)) for length, step in both)
    there = tuple(slice(max(0, step), length - max(0, -step)) for length, step in both)
    return here, there


def _at(maps: Tensor, where: Slices) -> Tensor:
    return maps[(slice(None), slice(None), *where)]
