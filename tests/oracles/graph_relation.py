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
    channels = []
    for offset in offsets:
        moved = _rolled(embeddings, offset)
        channels.append(F.cosine_similarity(embeddings, moved, dim=1, eps=1e-12) * _inside(embeddings, offset))
    return torch.stack(channels, dim=1)


def unit_offset_affinity(embeddings: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    """The same from unit vectors, which are made once: faster, and the best of the plain forms."""
    unit = F.normalize(embeddings, dim=1)
    channels = [(unit * _rolled(unit, offset)).sum(1) * _inside(unit, offset) for offset in offsets]
    return torch.stack(channels, dim=1)


def _rolled(maps: Tensor, offset: Sequence[int]) -> Tensor:
    """What lies an offset away, at each voxel."""
    return torch.roll(maps, [-step for step in offset], list(range(2, maps.dim())))


def _inside(maps: Tensor, offset: Sequence[int]) -> Tensor:
    """1 where both voxels of a pair lie inside, else 0; (*S)."""
    inside = torch.ones(maps.shape[2:], dtype=maps.dtype)
    for axis, step in enumerate(offset):
        place = torch.arange(maps.shape[axis + 2]) + step
        shape = [-1 if one == axis else 1 for one in range(len(offset))]
        inside = inside * ((place >= 0) & (place < maps.shape[axis + 2])).reshape(shape)
    return inside


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


# ---- a whole step, as `make bench` compares with: every image has an instance --------------------------------------


def instance_nodes(maps: Tensor, label: Tensor) -> list[Tensor]:
    """Mean vectors of the instances of each sample, (N, C), without background."""
    return [
        torch.stack([sample[:, numbers == number].mean(1) for number in numbers.unique() if number > 0])
        for sample, numbers in zip(maps, label[:, 0], strict=True)
    ]


def node_distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over samples of the mean length of the nodes' differences."""
    return torch.stack([(s - t).norm(dim=1).mean() for s, t in zip(student, teacher, strict=True)]).mean()


def edge_distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over samples of the mean squared difference of the cosines of their nodes."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(_cosines(s, s) - _cosines(t, t)).square().mean() for s, t in pairs]).mean()


def inter_edge_distance(student: list[Tensor], teacher: list[Tensor], past: list[Tensor]) -> Tensor:
    """Mean over pairs of a sample and a past image of the mean squared difference of the cosines of their nodes."""
    pairs = product(zip(student, teacher, strict=True), past)
    return torch.stack([(_cosines(s, p) - _cosines(t, p)).square().mean() for (s, t), p in pairs]).mean()


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


def pooled_directions(maps: Tensor, cells: Sequence[int]) -> Tensor:
    """Averages (B, N, C) of unit vectors over blocks."""
    pool = F.avg_pool2d if len(cells) == 2 else F.avg_pool3d
    return pool(F.normalize(maps, dim=1), cells, cells, ceil_mode=True).flatten(2).transpose(1, 2)


def inter_affinity_distance(student: Tensor, teacher: Tensor, past: Tensor, cells: Sequence[int]) -> Tensor:
    """Mean over past images (L, C, *S) of the mean squared difference of the relations of all pairs of blocks."""
    mine, other, images = (pooled_directions(maps, cells) for maps in (student, teacher, past))
    return torch.stack([relation_distance(mine, other, image) for image in images]).mean()


class MapBank:
    """Ring of past images: the teacher's maps and the labels."""

    def __init__(self, capacity: int, channels: int, size: Sequence[int]) -> None:
        self.maps = torch.zeros(capacity, channels, *size)
        self.label = torch.zeros(capacity, 1, *size, dtype=torch.int64)
        self.seen = 0

    def draw(self, sample: int) -> tuple[Tensor, Tensor]:
        """Maps and labels of some images."""
        chosen = torch.randperm(min(self.seen, len(self.maps)))[:sample]
        return self.maps[chosen], self.label[chosen]

    def enqueue(self, maps: Tensor, label: Tensor) -> None:
        """Keep a batch in place of the oldest."""
        for one, numbers in zip(maps, label, strict=True):
            place = self.seen % len(self.maps)
            self.maps[place], self.label[place] = one, numbers
            self.seen += 1


def flat_affinity_loss(embeddings: Tensor, label: Tensor, offsets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Supervised loss in 2-D, with its affinities: background is one more object, one balance for each sample."""
    affinity = unit_offset_affinity(embeddings, offsets)
    inside = torch.stack([_inside(embeddings, offset) for offset in offsets]) > 0
    moved = torch.cat([_rolled(label, offset) for offset in offsets], dim=1)
    target = ((label == moved) | ~inside).float()                  # pairs that leave the image are ones
    share = target.mean((1, 2, 3), keepdim=True).clip(0.05, 0.99)
    ones = torch.where(share > 0.5, 1.0, (1 - share) / share)
    zeros = torch.where(share > 0.5, share / (1 - share), 1.0)
    weight = torch.where(target > 0, ones, zeros) * inside
    return (weight * (affinity - target).square()).mean((0, 2, 3)).sum(), affinity


def flat_step(
    student: Tensor, teacher: Tensor, label: Tensor, bank: MapBank, offsets: Sequence[Sequence[int]],
    cells: Sequence[int], sample: int,
) -> dict[str, Tensor]:
    """Supervised loss and the five terms of a step in 2-D; the bank is drawn from before the batch is kept in it."""
    loss, affinity = flat_affinity_loss(student, label, offsets)
    with torch.no_grad():
        _, teacher_affinity = flat_affinity_loss(teacher, label, offsets)
        past, past_label = bank.draw(sample)
        nodes, past_nodes = instance_nodes(teacher, label), instance_nodes(past, past_label)
        bank.enqueue(teacher, label)
    mine = instance_nodes(student, label)
    return {
        "supervised": loss,
        "node": node_distance(mine, nodes),
        "edge": edge_distance(mine, nodes),
        "affinity": (affinity - teacher_affinity).square().mean((0, 2, 3)).sum(),
        "inter_edge": inter_edge_distance(mine, nodes, past_nodes),
        "inter_affinity": inter_affinity_distance(student, teacher, past, cells),
    }
