# SPDX-License-Identifier: Apache-2.0
"""Boundary and relation distillation (arXiv 2401.13174) as one would write it down first: slow, large, obvious.

Two kinds: loops over voxels and pairs in NumPy (`*_by_loops`), for tiny maps; and batched torch with autograd, without
any loop over voxels, which is what `make bench` compares with. Nothing here is shared with `medkd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def directions(rank: int) -> list[tuple[int, ...]]:
    """One of each two opposite steps to a neighbor, the first non-zero component positive."""
    return [v for v in product((-1, 0, 1), repeat=rank) if any(v) and next(c for c in v if c) > 0]


# ---- relation ------------------------------------------------------------------------------------------------------


def relation_distance(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of (R^S - R^T)^2 over all N x N pairs; unit nodes (B, N, C), weights (B, N); shape (B,)."""
    squared = (student @ student.transpose(1, 2) - teacher @ teacher.transpose(1, 2)).square()   # (B, N, N)
    if weight is None:
        return squared.mean((1, 2))
    pair = weight.unsqueeze(2) * weight.unsqueeze(1)                                             # (B, N, N)
    return (pair * squared).sum((1, 2)) / pair.sum((1, 2))


def softmax_relation_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of the rows of two attention maps softmax(R / temperature); unit nodes (B, N, C); shape (B, N)."""
    attention = [(nodes @ nodes.transpose(1, 2) / temperature).softmax(2) for nodes in (teacher, student)]   # (B, N, N)
    return (attention[0] * (attention[0] / attention[1]).log()).sum(2)


# ---- boundary map --------------------------------------------------------------------------------------------------


def contrast(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean over the existing face neighbors of |u_p - u_q|^2 / 4, (B, C, *S) -> (B, 1, *S), by autograd."""
    units = features / features.norm(dim=1, keepdim=True).clamp(min=eps)
    total = torch.zeros_like(features[:, :1])
    count = torch.zeros_like(features[:, :1])
    for axis in range(2, features.dim()):
        delta = units.diff(dim=axis).square().sum(1, keepdim=True) / 4           # one per pair of neighbors
        before, after = [0, 0] * features.dim(), [0, 0] * features.dim()
        before[2 * (features.dim() - 1 - axis)] = 1                              # F.pad counts axes from the last
        after[2 * (features.dim() - 1 - axis) + 1] = 1
        total = total + F.pad(delta, before) + F.pad(delta, after)
        count = count + F.pad(torch.ones_like(delta), before) + F.pad(torch.ones_like(delta), after)
    return total / count.clamp(min=1)


def contrast_by_loops(features: np.ndarray) -> np.ndarray:
    """The same for one sample, (C, *S) -> (*S), one voxel and one neighbor at a time."""
    result = np.zeros(features.shape[1:])
    for p in np.ndindex(result.shape):
        deltas = []
        for axis, step in product(range(result.ndim), (-1, 1)):
            q = tuple(c + step * (a == axis) for a, c in enumerate(p))
            if 0 <= q[axis] < result.shape[axis]:
                deltas.append(((_unit(features[:, *p]) - _unit(features[:, *q])) ** 2).sum() / 4)
        result[p] = np.mean(deltas) if deltas else 0.0
    return result


def _unit(vector: np.ndarray) -> np.ndarray:
    length = np.sqrt((vector**2).sum())
    return vector / length if length >= 1e-6 else np.zeros_like(vector)


# ---- pair affinities -----------------------------------------------------------------------------------------------


def path_affinity(boundary: Tensor, direction: Sequence[int], length: int) -> Tensor:
    """1 - maximum on the path, for the paths that stay inside, (B, 1, *S) -> (B, 1, *S')."""
    return 1 - _maximum([_shifted(boundary, direction, k, length) for k in range(length + 1)])


def affinity_distance(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    lengths: Sequence[int] = (1, 2, 4),
    ignore: int = -1,
    divergence: str = "squared",
) -> Tensor:
    """Balanced mean of (a^S - a^T)^2 with a = 1 - maximum on the path, by slices and autograd; a scalar.

    With `binary_kl`: of the KL divergence of the affinities as probabilities.
    """
    squared, crosses, counts = [], [], []
    label = torch.zeros_like(student, dtype=torch.long) if label is None else label
    for direction, length in product(directions(student.dim() - 2), lengths):
        if any(length * abs(v) >= size for v, size in zip(direction, student.shape[2:], strict=True)):
            continue
        mine, other, labels = ([_shifted(m, direction, k, length) for k in range(length + 1)]
                               for m in (student, teacher, label))
        a_student, a_teacher = 1 - _maximum(mine), 1 - _maximum(other)
        if divergence == "squared":
            squared.append((a_student - a_teacher).square().flatten())
        else:
            p, q = a_teacher.clamp(1e-5, 1 - 1e-5), a_student.clamp(1e-5, 1 - 1e-5)
            squared.append((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).flatten())
        crosses.append((_maximum(labels) != -_maximum([-part for part in labels])).flatten())
        counts.append(torch.stack([part != ignore for part in labels]).all(0).flatten())
    if not squared:
        return 0 * student.sum()
    pairs, crossing, valid = torch.cat(squared), torch.cat(crosses), torch.cat(counts)
    means = [pairs[chosen].mean() for chosen in (crossing & valid, ~crossing & valid) if chosen.any()]
    return torch.stack(means).mean() if means else 0 * student.sum()


def _shifted(maps: Tensor, direction: Sequence[int], k: int, length: int) -> Tensor:
    """The k-th voxel of every path of `length` steps that stays inside."""
    index: list[slice] = [slice(None), slice(None)]
    for v, size in zip(direction, maps.shape[2:], strict=True):
        first = k * v + (length if v < 0 else 0)
        index.append(slice(first, first + max(0, size - length * abs(v))))
    return maps[tuple(index)]


def _maximum(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = torch.maximum(result, part)
    return result


def affinity_distance_by_loops(
    student: np.ndarray,
    teacher: np.ndarray,
    label: np.ndarray | None = None,
    lengths: Sequence[int] = (1, 2, 4),
    ignore: int = -1,
) -> float:
    """The same for maps (B, *S), one pair at a time."""
    sums: dict[bool, list[float]] = {True: [], False: []}
    rank = student.ndim - 1
    for sample, direction, length in product(range(len(student)), directions(rank), lengths):
        for p in np.ndindex(student.shape[1:]):
            path = [tuple(c + k * v for c, v in zip(p, direction, strict=True)) for k in range(length + 1)]
            if not all(0 <= c < size for c, size in zip(path[-1], student.shape[1:], strict=True)):
                continue
            seen = {0} if label is None else {int(label[sample, *q]) for q in path}
            if label is None or ignore not in seen:
                a_student = 1 - max(student[sample, *q] for q in path)
                a_teacher = 1 - max(teacher[sample, *q] for q in path)
                sums[len(seen) > 1].append((a_student - a_teacher) ** 2)
    means = [float(np.mean(values)) for values in sums.values() if values]
    return float(np.mean(means)) if means else 0.0


# ---- labels on a coarser grid --------------------------------------------------------------------------------------


def majority_label(label: Tensor, grid: Sequence[int], classes: int) -> Tensor:
    """Majority of the labels of each block, ties to the higher one: one-hot maps, average pooling, argmax."""
    one_hot = F.one_hot(label[:, 0].long(), classes).movedim(-1, 1).float()      # (B, K, *S)
    pool = F.adaptive_avg_pool3d if len(grid) == 3 else F.adaptive_avg_pool2d
    share = pool(one_hot, tuple(grid))                                           # (B, K, *grid)
    return classes - 1 - share.flip(1).argmax(1, keepdim=True)


def majority_label_by_loops(
    label: np.ndarray, grid: Sequence[int], ignore: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """Majority and valid share of one sample, (*S) -> (*grid); a voxel i belongs to cell floor(i * grid / size)."""
    winner = np.full(tuple(grid), ignore)
    share = np.zeros(tuple(grid))
    for cell in np.ndindex(*grid):
        block = [
            label[p]
            for p in np.ndindex(label.shape)
            if all(i * g // s == c for i, g, s, c in zip(p, grid, label.shape, cell, strict=True))
        ]
        votes = [value for value in block if value != ignore]
        if votes:
            winner[cell] = max(set(votes), key=lambda value: (votes.count(value), value))
        share[cell] = len(votes) / len(block)
    return winner, share
