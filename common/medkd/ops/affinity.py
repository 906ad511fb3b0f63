# SPDX-License-Identifier: Apache-2.0
"""Boundaries from feature contrast, and affinities of voxel pairs that a boundary separates or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.checks import check_label, check_maps, check_same_grid
from medkd.ops.ignored import is_ignored
from medkd.ops.precision import at_least_float32

__all__ = ["AffinityDivergence", "affinity_distance", "feature_contrast", "half_directions", "path_affinity"]

AffinityDivergence = Literal["squared", "binary_kl"]


def feature_contrast(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Measure how much each voxel's feature direction differs from its face neighbors': a boundary map.

    `delta(p, q) = |u_p - u_q|^2 / 4` with unit vectors u; the map is the mean over the neighbors that exist. The
    squared difference (not `(1 - cos) / 2`) gives 0 between two dead vectors, so padded air has no boundary.

    Args:
        features: shape (B, C, *S), floating; computed in at least float32.
        eps: length under which a feature vector counts as zero; it then gets no gradient.

    Returns:
        Map of shape (B, 1, *S), range [0, 1]. Axes of length 1 contribute nothing.

    Reference:
        Zhang et al., Boundary and Relation Distillation for Semantic Segmentation, arXiv 2401.13174; the operator
        is ours, as the paper's body does not give one.

    Example:
        >>> features = torch.tensor([[[[1.0, 2.0, 0.0, 0.0]], [[0.0, 0.0, 3.0, 1.0]]]])
        >>> feature_contrast(features).flatten().tolist()
        [0.0, 0.25, 0.25, 0.0]
    """
    check_maps("features", features)
    wide = at_least_float32(features)
    return _FeatureContrast.apply(wide, eps)   # type: ignore[no-any-return, no-untyped-call]


class _FeatureContrast(torch.autograd.Function):
    """Keeps nothing but the features; autograd would keep the unit vectors and one difference per axis besides.

    Channels are taken a few at a time, so that their differences stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, eps: float) -> Tensor:
        inverse = _inverse_length(features, eps)                   # (B, 1, *S)
        total = torch.zeros_like(inverse)
        pairs = {axis: torch.zeros_like(_neighbors(total, axis)[0]) for axis in _long_axes(features)}
        for slab in _slabs(features):
            units = slab * inverse
            for axis, contrast in pairs.items():
                low, high = _neighbors(units, axis)
                contrast += (high - low).square_().sum(1, keepdim=True)
        for axis, contrast in pairs.items():
            for part in _neighbors(total, axis):
                part += contrast
        scale = 0.25 / _neighbor_count(features)
        ctx.save_for_backward(features, inverse, scale)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        features, inverse, scale = ctx.saved_tensors
        grad = grad * scale
        # d |u_p - u_q|^2 / d u_p, without its u_p part: the sphere's tangent plane drops that anyway
        pairs = {axis: torch.add(*_neighbors(grad, axis)).mul_(-2.0) for axis in _long_axes(features)}
        pull = torch.zeros_like(features)
        along = torch.zeros_like(inverse)
        for slab, part in zip(_slabs(features), _slabs(pull), strict=True):
            units = slab * inverse
            for axis, pair in pairs.items():
                (part_low, part_high), (unit_low, unit_high) = _neighbors(part, axis), _neighbors(units, axis)
                part_low.addcmul_(unit_high, pair)
                part_high.addcmul_(unit_low, pair)
            along += units.mul_(part).sum(1, keepdim=True)
        return pull.addcmul_(features, along.mul_(inverse), value=-1.0).mul_(inverse), None


def _slabs(features: Tensor, elements: int = 2**19) -> list[Tensor]:
    """Views of a few channels each, of about so many elements."""
    channels = features.shape[1]
    few = max(1, elements * channels // max(1, features.numel()))
    return [features[:, first : first + few] for first in range(0, channels, few)]


def _inverse_length(features: Tensor, eps: float) -> Tensor:
    squared = torch.zeros_like(features[:, :1])
    for slab in _slabs(features):
        squared += slab.square().sum(1, keepdim=True)
    alive = squared >= eps * eps
    return torch.where(alive, squared, 1.0).rsqrt_().mul_(alive)   # 0 for dead vectors


def _long_axes(maps: Tensor) -> list[int]:
    return [axis for axis in range(2, maps.dim()) if maps.shape[axis] > 1]


def _neighbors(maps: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    size = maps.shape[axis]
    return maps.narrow(axis, 0, size - 1), maps.narrow(axis, 1, size - 1)


def _neighbor_count(maps: Tensor) -> Tensor:
    count = maps.new_zeros(1, 1, *maps.shape[2:])
    for axis in _long_axes(maps):
        for part in _neighbors(count, axis):
            part += 1.0
    return count.clamp_(min=1.0)


def half_directions(rank: int) -> list[tuple[int, ...]]:
    """List one direction of each opposite pair of the {-1, 0, 1} neighborhood, in lexicographic order.

    Args:
        rank: number of spatial axes.

    Returns:
        4 directions for rank 2, 13 for rank 3; the first non-zero component is positive.

    Example:
        >>> half_directions(2)
        [(0, 1), (1, -1), (1, 0), (1, 1)]
    """
    return [step for step in product((-1, 0, 1), repeat=rank) if step > (0,) * rank]


def path_affinity(boundary: Tensor, direction: Sequence[int], length: int) -> Tensor:
    """Tell for each pair of voxels how free the straight path between them is of boundaries.

    `a = 1 - maximum of the map over the path`. Pairs whose end would lie outside the volume do not exist; nothing is
    padded or wrapped around.

    Args:
        boundary: map of shape (B, 1, *S), range [0, 1].
        direction: one of `half_directions`.
        length: number of steps; the path visits `length + 1` voxels.

    Returns:
        Affinities of shape (B, 1, *S'), range [0, 1], in the order of the paths' first voxels; an axis along which the
        direction moves is shorter by `length`, down to 0.

    Reference:
        Ahn et al., Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, arXiv
        1904.05044, equation 3.

    Example:
        >>> path_affinity(torch.tensor([[[[0.0, 0.5, 0.25, 0.0]]]]), (0, 1), 2).flatten().tolist()
        [0.5, 0.5]
    """
    check_maps("boundary", boundary)
    if not _fits(boundary, direction, length):
        return boundary.new_zeros(*boundary.shape[:2], *_starts(boundary.shape[2:], direction, length)[1])
    steps = list(_running_maximum(boundary.flatten(), _stride(boundary, direction), length))
    whole = F.pad(steps[-1], (0, boundary.numel() - steps[-1].numel())).view_as(boundary)
    return 1.0 - _existing(whole, direction, length)


def _running_maximum(flat: Tensor, stride: int, length: int) -> Iterator[Tensor]:
    """Maxima over paths of 1, 2, ... `length` steps of `stride` in a flat map, one per first element.

    A flat map needs no index arithmetic: all paths of a direction are one slice. Those that leave the volume at one
    side and come in at the other are computed too, and weigh nothing (`_PairWeights`).
    """
    value = flat
    for reach in range(1, length + 1):
        value = torch.maximum(value[:-stride], flat[reach * stride :])
        yield value


def _stride(maps: Tensor, direction: Sequence[int]) -> int:
    """Steps in the flat map from a voxel to its neighbor in this direction; positive for half directions."""
    stride = 0
    for size, step in zip(maps.shape[2:], direction, strict=True):
        stride = stride * size + step
    return stride


def _fits(maps: Tensor, direction: Sequence[int], length: int) -> bool:
    return min(_starts(maps.shape[2:], direction, length)[1]) > 0


def _starts(size: Sequence[int], direction: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """First index and number, per axis, of the voxels from which a path stays inside."""
    moves = [length * step for step in direction]
    return [max(0, -move) for move in moves], [max(0, s - abs(move)) for s, move in zip(size, moves, strict=True)]


def _existing(maps: Tensor, direction: Sequence[int], length: int) -> Tensor:
    """The part of a map that belongs to paths that stay inside."""
    for axis, (first, count) in enumerate(zip(*_starts(maps.shape[2:], direction, length), strict=True), start=2):
        maps = maps.narrow(axis, first, count)
    return maps


def affinity_distance(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    lengths: Sequence[int] = (1, 2, 4),
    ignore: int | None = None,
    divergence: AffinityDivergence = "squared",
) -> Tensor:
    """Difference of two networks' pair affinities, balanced between crossing and other pairs.

    Pairs are the ends of straight paths in all `half_directions` (see `path_affinity`); a pair crosses when the labels
    on its path are not all equal. Few pairs cross (often under 3 %), so crossing and other pairs are averaged apart
    and each mean counts half; an empty set leaves the whole weight to the other one. Pairs that touch an ignored voxel
    are dropped. The values of one direction at a time are held in memory, one byte per pair for its kind, and the
    gradient is formed on the way.

    Args:
        student: boundary map, shape (B, 1, *S), range [0, 1].
        teacher: boundary map, same shape; never receives a gradient.
        label: class indices on the same grid, shape (B, 1, *S), whole numbers; None averages over all pairs.
        lengths: ascending path lengths, in voxels.
        ignore: one more label that does not count, besides negative ones, which never do.
        divergence: of one pair: `squared`, (a_S - a_T)^2, or `binary_kl`, the Kullback-Leibler divergence of two coins
            that show a_T and a_S; affinities are then clamped to [1e-5, 1 - 1e-5], with no gradient beyond.

    Returns:
        Scalar, float32 (float64 for a float64 student); 0 with zero gradient when no pair is valid.

    Raises:
        ValueError: maps or labels of different grids, lengths that do not ascend, an unknown divergence.

    Reference:
        Zhang et al., arXiv 2401.13174 (boundary distillation by semantic affinity of pixel pairs).
    """
    check_maps("student", student)
    check_same_grid("student", student, "teacher", teacher)
    if (student.shape[1], teacher.shape[1]) != (1, 1):
        raise ValueError(f"Both maps must have one channel, got {student.shape[1]} (`student`) and {teacher.shape[1]}.")
    if label is not None:
        check_label("label", label, student)
        check_same_grid("student", student, "label", label)
    if list(lengths) != sorted(set(lengths)) or not lengths or min(lengths) < 1:
        raise ValueError(f"`lengths` must be ascending positive numbers of voxels, got {list(lengths)}.")
    if divergence not in get_args(AffinityDivergence):
        raise ValueError(f"`divergence` must be one of {get_args(AffinityDivergence)}, got {divergence!r}.")
    student = at_least_float32(student)
    weights = _PairWeights(student, label, tuple(lengths), ignore)
    difference = _squared if divergence == "squared" else _binary_kl
    return _AffinityDistance.apply(student, teacher.detach().to(student), weights, difference)   # type: ignore[no-any-return, no-untyped-call]


class _AffinityDistance(torch.autograd.Function):
    """Keeps one map: the gradient of the finished scalar with respect to the student's map."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: _PairWeights, difference: _Difference
    ) -> Tensor:
        mine, other = student.flatten(), teacher.flatten()
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.zeros_like(mine)
        for direction, longest in weights.paths:
            stride = _stride(student, direction)
            above = list(_running_maximum(mine, stride, longest))
            pulls: dict[int, Tensor] = {}
            for length, target in enumerate(_running_maximum(other, stride, longest), start=1):
                if (weight := weights.of(direction, length)) is not None:
                    value, pulls[length] = difference(above[length - 1], target, weight)
                    total += value
            if ctx.needs_input_grad[0]:
                _pull_back(gradient, mine, above, pulls, stride)
        ctx.save_for_backward(gradient.view_as(student))
        return total.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (2.0 * grad), None, None, None


_Difference = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _squared(mine: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum over pairs of the difference, and half its derivative for `mine`; both are maxima, 1 - affinity."""
    difference = mine - other
    pull = weight.mul_(difference)
    return torch.dot(pull, difference), pull


def _binary_kl(mine: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the Kullback-Leibler divergence; it does not change when both affinities become 1 - a."""
    low, high = _CLAMP, 1.0 - _CLAMP
    p, q = other.clamp(low, high), mine.clamp(low, high)
    divergence = p * (p / q).log() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).log()
    slope = (q - p) / (q * (1.0 - q)) * ((mine > low) & (mine < high))
    return torch.dot(weight, divergence), weight * slope * 0.5


_CLAMP = 1e-5


def _pull_back(
    gradient: Tensor, flat: Tensor, maxima: list[Tensor], pulls: dict[int, Tensor], stride: int
) -> None:
    """Add to `gradient` what pulls at the maxima, each at the first voxel on its path that holds the maximum.

    From the longest path down: the last voxel takes the pull where it is above all before it, and else passes it on to
    the path without it. Masks are numbers, as multiplying is several times faster than `torch.where`.
    """
    rest = gradient.new_zeros(0)
    for length in range(len(maxima), 0, -1):
        longer, rest = rest, pulls[length] if length in pulls else torch.zeros_like(maxima[length - 1])
        rest[: longer.numel()] += longer
        last = flat[length * stride :]
        before = maxima[length - 2] if length > 1 else flat
        taken = torch.gt(last, before[:-stride], out=torch.empty_like(last)).mul_(rest)
        gradient[length * stride :] += taken
        rest -= taken
    gradient[: rest.numel()] += rest


class _PairWeights:
    """Weight of every pair: half of the mass on crossing pairs, half on the others, none on ignored ones.

    Attributes:
        paths: the directions along which a pair fits, each with its longest length.
    """

    def __init__(self, like: Tensor, label: Tensor | None, lengths: tuple[int, ...], ignore: int | None) -> None:
        self.paths: list[tuple[tuple[int, ...], int]] = []
        self.kinds: dict[tuple[tuple[int, ...], int], Tensor] = {}
        unlabeled = label is None
        label = torch.zeros_like(like) if label is None else label
        ignored = is_ignored(label, None if unlabeled else ignore).flatten()
        label = label.to(torch.int16)
        same = crossing = torch.zeros((), dtype=torch.int64, device=like.device)
        for direction in half_directions(like.dim() - 2):
            fitting = [length for length in lengths if _fits(like, direction, length)]
            if not fitting:
                continue
            self.paths.append((direction, fitting[-1]))
            steps = _kinds_of_steps(label, ignored, direction)
            longer = _running_maximum(steps, _stride(like, direction), fitting[-1] - 1)
            for length, kinds in enumerate(chain([steps], longer), start=1):
                if length in fitting:
                    self.kinds[direction, length] = kinds
                    same = same + (kinds == _SAME).sum()
                    crossing = crossing + (kinds == _CROSSING).sum()
        share = torch.where((same > 0) & (crossing > 0), 0.5, 1.0).to(like.dtype)
        self.same, self.crossing = share / same.clamp(min=1), share / crossing.clamp(min=1)

    def of(self, direction: tuple[int, ...], length: int) -> Tensor | None:
        """Weights in the layout of `_running_maximum`, None for a length that is not asked for; given out once."""
        kinds = self.kinds.pop((direction, length), None)
        if kinds is None:
            return None
        kinds = kinds.to(self.same.dtype)
        same = torch.eq(kinds, _SAME, out=torch.empty_like(kinds)).mul_(self.same)
        return same.add_(kinds.eq_(_CROSSING).mul_(self.crossing))


_SAME, _CROSSING, _NO_PAIR = 0, 1, 2                               # the maximum along a path decides


def _kinds_of_steps(label: Tensor, ignored: Tensor, direction: tuple[int, ...]) -> Tensor:
    """Kind of each single step of a direction, flat, uint8; no pair where it leaves the volume or is ignored."""
    stride = _stride(label, direction)
    leaves = torch.ones_like(label, dtype=torch.bool)
    _existing(leaves, direction, 1).fill_(False)
    flat = label.flatten()
    dropped = leaves.flatten()[:-stride] | ignored[:-stride] | ignored[stride:]
    changes = flat[:-stride] != flat[stride:]
    return torch.maximum(changes.to(torch.uint8) * _CROSSING, dropped.to(torch.uint8) * _NO_PAIR)
