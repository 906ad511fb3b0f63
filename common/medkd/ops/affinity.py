# SPDX-License-Identifier: Apache-2.0
"""Boundaries from feature contrast, and affinities of voxel pairs that a boundary separates or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.checks import check_label, check_maps, check_same_grid
from medkd.ops.graph import unit_vectors

__all__ = ["PathMaximum", "affinity_distance", "feature_contrast", "half_directions", "path_maxima"]


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
    wide = features if features.dtype == torch.float64 else features.float()
    return _FeatureContrast.apply(wide, eps)   # type: ignore[no-any-return, no-untyped-call]


class _FeatureContrast(torch.autograd.Function):
    """Keeps the unit vectors only; autograd would keep one difference per axis besides."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, eps: float) -> Tensor:
        units = unit_vectors(features, eps=eps)
        total = features.new_zeros(features.shape[0], 1, *features.shape[2:])
        for axis in _long_axes(features):
            low, high = _neighbors(units, axis)
            contrast = (high - low).square_().sum(1, keepdim=True)
            for part in _neighbors(total, axis):
                part += contrast
        scale = 0.25 / _neighbor_count(features)
        ctx.save_for_backward(features, units, scale)
        ctx.eps = eps
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        features, units, scale = ctx.saved_tensors
        grad = grad * scale
        pull = torch.zeros_like(units)
        for axis in _long_axes(units):
            low, high = _neighbors(grad, axis)
            pair = (low + high).mul_(-2.0)                         # d |u_p - u_q|^2 / d u_p, without its u_p part
            (pull_low, pull_high), (unit_low, unit_high) = _neighbors(pull, axis), _neighbors(units, axis)
            pull_low.addcmul_(unit_high, pair)
            pull_high.addcmul_(unit_low, pair)
        along = (pull * units).sum(1, keepdim=True)                # the sphere's tangent plane drops it anyway
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        return pull.addcmul_(units, along, value=-1.0).mul_(_inverse(length, ctx.eps)), None


def _inverse(length: Tensor, eps: float) -> Tensor:
    return torch.where(length >= eps, 1.0 / length.clamp(min=eps), 0.0)


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


class PathMaximum(NamedTuple):
    """Maxima of a map over the straight paths of one length that start at each voxel.

    Attributes:
        length: steps of the path; it visits length + 1 voxels.
        value: maximum per path, shape (B, 1, *S'), over the start voxels whose end lies inside the volume.
        step: index of the first voxel on the path that holds the maximum, same shape, uint8.
    """

    length: int
    value: Tensor
    step: Tensor


def path_maxima(maps: Tensor, direction: Sequence[int], lengths: Sequence[int]) -> Iterator[PathMaximum]:
    """Run along a direction and give the maximum over the path at each of the lengths.

    The affinity of the two ends is `1 - value`: no boundary on the way between them. Pairs whose end would lie
    outside the volume do not exist; nothing is padded or wrapped around.

    Args:
        maps: boundary map, shape (B, 1, *S).
        direction: one step per spatial axis, components -1, 0 or 1.
        lengths: ascending numbers of steps.

    Yields:
        One `PathMaximum` per length that fits into the volume.

    Reference:
        Ahn et al., Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, arXiv
        1904.05044, equation 3 (affinity by the maximum on the path).

    Example:
        >>> boundary = torch.tensor([[[[0.0, 0.6, 0.6, 0.0]]]])
        >>> [(1 - m.value).flatten().tolist()[0] for m in path_maxima(boundary, (0, 1), (1, 2))]
        [0.3999999761581421, 0.3999999761581421]
    """
    value = maps
    step = torch.zeros_like(maps, dtype=torch.uint8)
    for reach in range(1, max(lengths) + 1):
        if not _fits(maps, direction, reach):
            return
        ahead = _along(maps, direction, reach, reach)
        value, step = _starts_that_go_on(value, direction), _starts_that_go_on(step, direction)
        step = torch.where(ahead > value, reach, step)
        value = torch.maximum(value, ahead)
        if reach in lengths:
            yield PathMaximum(reach, value, step)


def _fits(maps: Tensor, direction: Sequence[int], reach: int) -> bool:
    return all(size > reach * abs(step) for size, step in zip(maps.shape[2:], direction, strict=True))


def _along(maps: Tensor, direction: Sequence[int], position: int, reach: int) -> Tensor:
    """Voxels at `position` steps from the start of every path of `reach` steps that stays inside."""
    for axis, step in enumerate(direction, start=2):
        start = position * step if step >= 0 else (reach - position) * -step
        maps = maps.narrow(axis, start, maps.shape[axis] - reach * abs(step))
    return maps


def _starts_that_go_on(maps: Tensor, direction: Sequence[int]) -> Tensor:
    """Paths that can be made one step longer, out of all present ones."""
    return _along(maps, direction, 0, 1)


def affinity_distance(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    lengths: Sequence[int] = (1, 2, 4),
    ignore: int = 255,
) -> Tensor:
    """Squared difference of two networks' pair affinities, balanced between crossing and other pairs.

    Pairs are the ends of straight paths in all `half_directions`; a pair crosses when the labels on its path are
    not all equal. Few pairs cross (often under 3 %), so crossing and other pairs are averaged apart and each
    mean counts half; an empty set leaves the whole weight to the other one. Pairs that touch an ignored voxel are
    dropped. One direction at a time is held in memory, and the gradient is formed on the way.

    Args:
        student: boundary map, shape (B, 1, *S), range [0, 1].
        teacher: boundary map, same shape; never receives a gradient.
        label: class indices on the same grid, shape (B, 1, *S), integer; None averages over all pairs.
        lengths: ascending path lengths, in voxels.
        ignore: label of voxels that do not count.

    Returns:
        Scalar, float32 (float64 for float64 maps); 0 with zero gradient when no pair is valid.

    Reference:
        Zhang et al., arXiv 2401.13174 (boundary distillation by semantic affinity of pixel pairs).
    """
    check_maps("student", student)
    check_same_grid("student", student, "teacher", teacher)
    if label is not None:
        check_label("label", label, student)
        check_same_grid("student", student, "label", label)
    if list(lengths) != sorted(set(lengths)) or not lengths or min(lengths) < 1:
        raise ValueError(f"`lengths` must be ascending positive numbers of voxels, got {list(lengths)}.")
    return _AffinityDistance.apply(student, teacher.detach(), label, tuple(lengths), ignore)   # type: ignore[no-any-return, no-untyped-call]


class _AffinityDistance(torch.autograd.Function):
    """Keeps one map: the gradient of the finished scalar with respect to the student's map."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, label: Tensor | None, lengths: tuple[int, ...], ignore: int
    ) -> Tensor:
        weights = _PairWeights(student, label, lengths, ignore)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.zeros_like(student)
        for direction in half_directions(student.dim() - 2):
            pairs = zip(
                path_maxima(student, direction, lengths), path_maxima(teacher, direction, lengths), strict=True
            )
            for mine, other in pairs:
                difference = mine.value - other.value
                weighted = difference * weights.of(direction, mine.length)
                total += (weighted * difference).sum()
                for position in range(mine.length + 1):            # to the one voxel that made the maximum
                    part = _along(gradient, direction, position, mine.length)
                    part.addcmul_(weighted, (mine.step == position).to(weighted), value=2.0)
        ctx.save_for_backward(gradient)
        return total.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


class _PairWeights:
    """Weight of every pair: half of the mass on crossing pairs, half on the others, none on ignored ones."""

    def __init__(self, like: Tensor, label: Tensor | None, lengths: tuple[int, ...], ignore: int) -> None:
        self.crossing: dict[tuple[tuple[int, ...], int], tuple[Tensor, Tensor]] = {}
        self.dtype = like.dtype
        crossing = other = torch.zeros((), dtype=torch.int64, device=like.device)
        label = torch.zeros_like(like, dtype=torch.uint8) if label is None else label
        narrow = label.to(torch.int16)
        valid = narrow != ignore
        for direction in half_directions(like.dim() - 2):
            for length, crosses, counts in _label_paths(narrow, valid, direction, lengths):
                self.crossing[direction, length] = crosses, counts
                crossing = crossing + (crosses & counts).sum()
                other = other + (~crosses & counts).sum()
        share = torch.where((crossing > 0) & (other > 0), 0.5, 1.0)
        self.crossing_weight = (share / crossing.clamp(min=1)).to(self.dtype)
        self.other_weight = (share / other.clamp(min=1)).to(self.dtype)

    def of(self, direction: tuple[int, ...], length: int) -> Tensor:
        crosses, counts = self.crossing.pop((direction, length))
        return torch.where(crosses, self.crossing_weight, self.other_weight) * counts


def _label_paths(
    label: Tensor, valid: Tensor, direction: tuple[int, ...], lengths: tuple[int, ...]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give, per length, which paths see more than one label and which ones see no ignored voxel."""
    if not _fits(label, direction, 1):
        return
    change = _along(label, direction, 0, 1) != _along(label, direction, 1, 1)   # per path of one step
    clean = _along(valid, direction, 0, 1) & _along(valid, direction, 1, 1)
    crosses, counts = change, clean
    for reach in range(1, max(lengths) + 1):
        if not _fits(label, direction, reach):
            return
        if reach > 1:
            crosses = _starts_that_go_on(crosses, direction) | _along(change, direction, reach - 1, reach - 1)
            counts = _starts_that_go_on(counts, direction) & _along(clean, direction, reach - 1, reach - 1)
        if reach in lengths:
            yield reach, crosses, counts
