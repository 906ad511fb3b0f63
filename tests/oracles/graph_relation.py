# SPDX-License-Identifier: Apache-2.0
"""Graph relation distillation (arXiv 2401.06370) as one would write it down first: slow, large, obvious.

Loops over voxels in NumPy (`*_by_loops`), for tiny maps; and batched torch with autograd, which is what `make bench`
compares with. Nothing here is shared with `medkd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def offset_affinity(embeddings: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    """Roll the map back by each offset, take the cosine, and drop what came around the edge; (B, O, *S)."""
    axes = list(range(2, embeddings.dim()))
    channels = []
    for offset in offsets:
        moved = torch.roll(embeddings, [-step for step in offset], axes)
        inside = torch.ones(embeddings.shape[2:], dtype=embeddings.dtype)
        for axis, step in enumerate(offset):
            place = torch.arange(embeddings.shape[axis + 2]) + step
            shape = [-1 if one == axis else 1 for one in range(len(offset))]
            inside = inside * ((place >= 0) & (place < embeddings.shape[axis + 2])).reshape(shape)
        channels.append(F.cosine_similarity(embeddings, moved, dim=1, eps=1e-12) * inside)
    return torch.stack(channels, dim=1)


def label_affinity_by_loops(label: np.ndarray, offsets: Sequence[Sequence[int]], background: str) -> np.ndarray:
    """Targets (O, *S) of one label map (*S)."""
    target = np.zeros((len(offsets), *label.shape), np.float32)
    for channel, offset in enumerate(offsets):
        for here in product(*map(range, label.shape)):
            there = tuple(place + step for place, step in zip(here, offset, strict=True))
            if all(0 <= place < length for place, length in zip(there, label.shape, strict=True)):
                is_same = label[here] == label[there] and (background == "same" or label[here] != 0)
                target[(channel, *here)] = is_same
    return target


def widen_borders_by_loops(label: np.ndarray) -> np.ndarray:
    """One section (H, W): 0 where the 3 x 3 window has two instances."""
    result = label.copy()
    for row, column in product(*map(range, label.shape)):
        window = label[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        if len(set(window[window > 0].tolist())) > 1:
            result[row, column] = 0
    return result


def instance_means(maps: Tensor, label: Tensor) -> dict[tuple[int, int], Tensor]:
    """Mean vector of each instance, by sample and number; label (B, 1, *S)."""
    found = {}
    for sample in range(len(maps)):
        for number in label[sample].unique().tolist():
            found[sample, number] = maps[sample][:, label[sample, 0] == number].mean(1)
    return found


def relation_distance(student: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of the relations (B, N, M) to the vectors (M, C); shape (B,)."""
    return (student @ others.T - teacher @ others.T).square().mean((1, 2))
