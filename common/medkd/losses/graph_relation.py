# SPDX-License-Identifier: Apache-2.0
"""Graph relation distillation (GRD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from medkd.losses.base import DistillationLoss, TapPair, pointwise_convolution, tap_pairs
from medkd.losses.relation_bank import RelationBank
from medkd.ops.embedding import (
    AffinityBalance,
    background_cosine,
    offset_affinity,
    pair_mask,
    pairs_of_background,
    pooled_directions,
    weighted_targets,
)
from medkd.ops.graph import unit_vectors
from medkd.ops.ignored import ignored_voxels
from medkd.ops.instances import (
    consecutive_labels,
    instance_numbers,
    moment_distance,
    relation_edges,
    second_moment,
    segment_mean,
)

__all__ = ["GraphRelationLoss", "NodeDistance"]

NodeDistance = Literal["l2", "mse"]
_TERMS = ("node", "edge", "affinity", "inter_edge", "inter_affinity")
_MANY = 512                                                        # numbers above this are made consecutive first


@dataclass(frozen=True)
class _Preset:
    node_loss: NodeDistance
    pooling: Mapping[int, tuple[int, ...]]                         # by rank
    weights: Mapping[int, tuple[float, ...]]


_PRESETS = {
    "default": _Preset(
        "l2", {2: (7, 7), 3: (3, 7, 7)}, {2: (0.1, 0.1, 10.0, 1.0, 4.0), 3: (0.1, 0.1, 10.0, 1.0, 24.0)}
    ),
    "paper": _Preset("mse", {2: (1, 1), 3: (1, 1, 1)}, dict.fromkeys((2, 3), (0.1, 0.1, 10.0, 1.0, 1.0))),
}


@dataclass(frozen=True)
class _Level:
    """A tapped layer that is distilled like the embedding."""

    taps: TapPair
    channels: tuple[int, int]
    stride: tuple[int, ...]


class GraphRelationLoss(DistillationLoss):
    """Distil the graph of instances and the affinities of embeddings, within images and across them.

    `pred` of both networks is an embedding map (B, C, *S) of the same C; the label holds instance numbers, 0 is
    background. Voxels with a negative label are ignored by all terms. A case without a label has no instances: `node`
    and `edge` are 0 there, it is remembered without nodes, and `affinity` and `inter_affinity` count all its voxels.

    * `node`: distance of the mean embeddings of each instance.
    * `edge`: squared difference of the cosines of all pairs of these nodes.
    * `affinity`: squared difference of the affinities at offsets: a sum over offsets of means over voxels.
    * `inter_edge`: as `edge`, between the nodes of this image and those of past images of the teacher.
    * `inter_affinity`: as `affinity`, between all voxels of this image and all of past images.

    The last two are exact without a matrix over pairs: a past image enters by its second moments alone (C x C). They
    are means over images, nodes and voxels, 0 in the first step, and their own memory is in the state dict.

    | | `default` (what the released code computes, without its faults) | `paper` (its formulas) |
    |---|---|---|
    | `node` | norm of the difference (`l2`) | its square (`mse`) |
    | `inter_affinity` | unit embeddings averaged over 7 x 7 or 3 x 7 x 7 voxels | all voxels |
    | weights, in the order above | 2-D: 0.1, 0.1, 10, 1, 4; 3-D: 0.1, 0.1, 10, 1, 24 | 0.1, 0.1, 10, 1, 1 |

    The code sums `inter_affinity` over pairs of images, so its weight 1 is 4 or 24 of a mean (batch of 2, 12 images).
    Left out in both: projections drawn anew in each step, edges whose norms have no gradient, a memory that holds the
    current image or gives fewer images than asked for, pairs that wrap around the border, sums over a growing list of
    nodes. Background is never a node (the 3-D code has it as one).

    Args:
        offsets: of `affinity`, as in `medkd.ops.embedding.offset_affinity`. The 3-D code takes the nearest three.
        preset: `default` or `paper`; the arguments below win over it.
        levels: further layers, each `{"tap": path or [student, teacher], "channels": [C_S, C_T], "stride": voxels per
            cell and axis}`. `node`, `edge` and `affinity` are summed over the embedding and these. For `node` the
            student's layer passes a learned 1 x 1 projection: add the loss to the optimizer. A layer whose cells
            reach beyond the label, as with valid convolutions, is cropped to it; both are centered.
        node_loss: `l2` or `mse`.
        pooling: voxels per axis of the blocks that `inter_affinity` averages over; all 1 for none.
        bank: the memory of past images; None for 32 images of 16 channels, of which 12 are drawn.
        widen: make background of the voxels next to a border between instances first, as `AffinityLoss` does.
        balance: weights of the pairs in `affinity`: `none`, the published mean over all voxels, or `sample` or
            `channel` as in `AffinityLoss` (ours): the rarer target counts as much as the other one. Not at `levels`.
        background_weight: for networks trained with that of `AffinityLoss`, whose first axis of the embedding space is
            the direction of the background: `affinity` compares the cosines with it too, so many times (ours).
        seed: of the projections' first values.

    Raises:
        ValueError: unknown preset or option; embeddings of different shapes; a level of other channels than promised.

    Reference:
        Liu et al., Graph Relation Distillation for Efficient Biomedical Instance Segmentation, arXiv 2401.06370.

    Example:
        >>> loss = GraphRelationLoss([(0, -1)], bank=RelationBank(channels=2, capacity=2, sample=1))
        >>> student = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]], requires_grad=True)
        >>> teacher = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
        >>> terms = loss({"pred": student}, {"pred": teacher}, torch.tensor([[[[1, 1, 2, 2]]]]))
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'node': 0.3536, 'edge': 0.25, 'affinity': 0.5, 'inter_edge': 0.0, 'inter_affinity': 0.0}
    """

    terms = _TERMS

    def __init__(   # noqa: PLR0913 - options of a config, each with a default
        self,
        offsets: Sequence[Sequence[int]],
        preset: Literal["default", "paper"] = "default",
        levels: Sequence[Mapping[str, Any]] = (),
        node_loss: NodeDistance | None = None,
        pooling: Sequence[int] | None = None,
        bank: RelationBank | None = None,
        widen: bool = False,
        balance: AffinityBalance = "none",
        background_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"`preset` must be one of {list(_PRESETS)}, got {preset!r}.")
        rank = len(offsets[0]) if len(offsets) else 0
        if rank not in (2, 3):
            raise ValueError(f"`offsets` must be vectors of 2 or 3 whole numbers, got {list(offsets)}.")
        chosen = _PRESETS[preset]
        read = [_read_level(level, rank) for level in levels]
        super().__init__([level.taps for level in read])
        self.offsets = tuple(tuple(offset) for offset in offsets)
        self.levels = tuple(read)
        self.node_loss: NodeDistance = node_loss or chosen.node_loss
        if self.node_loss not in get_args(NodeDistance):
            raise ValueError(f"`node_loss` must be one of {get_args(NodeDistance)}, got {node_loss!r}.")
        self.pooling = tuple(pooling or chosen.pooling[rank])
        self.preset_weights = dict(zip(_TERMS, chosen.weights[rank], strict=True))
        self.bank = RelationBank(channels=16) if bank is None else bank
        self.widen = widen
        if balance not in get_args(AffinityBalance):
            raise ValueError(f"`balance` must be one of {get_args(AffinityBalance)}, got {balance!r}.")
        self.balance: AffinityBalance = balance
        self.background_weight = background_weight
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ModuleList(
            pointwise_convolution(*level.channels, rank, generator) for level in self.levels
        )

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give the active terms; without labels there are no instances, and the terms that need them are 0."""
        mine, other = student["pred"], teacher["pred"]
        _check_embeddings(mine, other)
        label = mine.new_zeros(len(mine), 1, *mine.shape[2:]) if label is None else label
        numbers = _small(instance_numbers(label, mine, self.widen))
        ignored = ignored_voxels(numbers)
        values = {term: mine.new_zeros(()) for term in self.terms if term in self.active_terms}
        graph = self._within(values, mine, other, numbers, mine, None)
        self._across(values, mine, other, graph, ignored)
        for level, projection in zip(self.levels, self.projections, strict=True):
            self._at_level(values, student[level.taps[0]], teacher[level.taps[1]], numbers, level, projection)
        return values

    def _at_level(
        self, values: dict[str, Tensor], mine: Tensor, other: Tensor, numbers: Tensor, level: _Level,
        projection: nn.Module,
    ) -> None:
        if mine.shape[2:] != other.shape[2:] or (mine.shape[1], other.shape[1]) != level.channels:
            raise ValueError(
                f"`levels` must name layers of one size with {list(level.channels)} channels, got "
                f"{tuple(mine.shape)} at {level.taps[0]!r} and {tuple(other.shape)} at {level.taps[1]!r}."
            )
        cells, voxels = _overlap(mine.shape[2:], numbers.shape[2:], level.stride)
        mine, other = mine[cells], other[cells]
        for axis, index in enumerate(voxels, start=2):
            numbers = numbers.index_select(axis, index.to(numbers.device))
        projected = projection(mine) if "node" in values else mine
        self._within(values, mine, other, numbers, projected, level)

    def _within(
        self, values: dict[str, Tensor], mine: Tensor, other: Tensor, numbers: Tensor, projected: Tensor,
        level: _Level | None,
    ) -> _Graph | None:
        """Add the terms within images, of one level; gives its graphs, if a term needs them."""
        if "affinity" in values:
            squares = (offset_affinity(mine, self.offsets) - offset_affinity(other, self.offsets)).square()
            values["affinity"] = values["affinity"] + self._mean_over_pairs(squares, numbers, level)
            if self.background_weight and level is None:
                axis = _mean(ignored_voxels(numbers), (background_cosine(mine) - background_cosine(other)).square())
                values["affinity"] = values["affinity"] + self.background_weight * axis
        needs_graph = {"node", "edge"} if level is not None else {"node", "edge", "inter_edge"}
        if not needs_graph & values.keys():
            return None
        with torch.no_grad():
            other_nodes, present = segment_mean(other, numbers)    # (B, K, C_T)
        nodes = segment_mean(mine, numbers)[0]
        count = present.sum(1).clamp(min=1)
        if "node" in values:
            compared = nodes if projected is mine else segment_mean(projected, numbers)[0]
            values["node"] = values["node"] + (self._node_distance(compared - other_nodes) / count).mean()
        if "edge" in values:
            difference = relation_edges(nodes) - relation_edges(other_nodes)
            values["edge"] = values["edge"] + (difference.square().sum((1, 2)) / count**2).mean()
        return _Graph(nodes, other_nodes, present)

    def _mean_over_pairs(self, squares: Tensor, numbers: Tensor, level: _Level | None) -> Tensor:
        """Sum over offsets of means over voxels of (B, O, *S)."""
        if self.balance == "none" or level is not None:
            if (ignored := ignored_voxels(numbers)) is not None:
                return (pair_mask(ignored, self.offsets) * squares).sum() / (~ignored).sum().clamp(min=1)
            return squares.sum() / (len(squares) * squares[0, 0].numel())
        background = pairs_of_background(squares.dim() - 2)
        return (weighted_targets(numbers, self.offsets, background, self.balance)[0] * squares).sum()

    def _node_distance(self, difference: Tensor) -> Tensor:
        """Sum over nodes, (B,), of the length of (B, K, C) or its square; the length has gradient 0 at 0."""
        if self.node_loss == "mse":
            return difference.square().sum((1, 2))
        lengths: Tensor = torch.linalg.vector_norm(difference, dim=2)
        return lengths.sum(1)

    def _across(
        self, values: dict[str, Tensor], mine: Tensor, other: Tensor, graph: _Graph | None, ignored: Tensor | None
    ) -> None:
        """Add the terms across images, and keep this batch for later ones."""
        if not {"inter_edge", "inter_affinity"} & values.keys():
            return
        voxel_moment, node_moment = self.bank.draw()
        blank = other.new_zeros(len(other), other.shape[1], other.shape[1])
        moments, has_nodes = [blank, blank], torch.zeros(len(other), dtype=torch.bool, device=other.device)
        scale = None if ignored is None else _block_scale(ignored, self.pooling)
        if "inter_affinity" in values:
            with torch.no_grad():
                directions = pooled_directions(other, self.pooling, ignored)     # (B, N, C)
                moments[0] = second_moment(directions)
                moments[0] = moments[0] if scale is None else moments[0] * scale.reshape(-1, 1, 1)
            if voxel_moment is not None:
                own = pooled_directions(mine, self.pooling, ignored)
                distance = moment_distance(own, directions, voxel_moment)
                values["inter_affinity"] = (distance if scale is None else distance * scale).mean()
        if "inter_edge" in values and graph is not None:
            units = unit_vectors(graph.teacher, dim=2)
            count = graph.present.sum(1)
            padding = graph.present.shape[1] / count.clamp(min=1)  # rows of absent nodes are 0, and do not count
            moments[1], has_nodes = second_moment(units) * padding.reshape(-1, 1, 1), count > 0
            if node_moment is not None:
                distance = moment_distance(unit_vectors(graph.student, dim=2), units, node_moment)
                values["inter_edge"] = (distance * padding).mean()
        if self.training:
            kept = slice(None) if scale is None else scale > 0     # an image of ignored voxels alone is none
            self.bank.enqueue(moments[0][kept], moments[1][kept], has_nodes[kept])


@dataclass(frozen=True)
class _Graph:
    """Nodes of both networks, (B, K, C) each, and which there are, (B, K)."""

    student: Tensor
    teacher: Tensor
    present: Tensor


def _read_level(level: Mapping[str, Any], rank: int) -> _Level:
    if set(level) != {"tap", "channels", "stride"}:
        raise ValueError(f"`levels` must have the keys 'tap', 'channels' and 'stride', got {sorted(level)}.")
    channels, stride = tuple(level["channels"]), tuple(level["stride"])
    if len(channels) != 2 or len(stride) != rank or min(stride) < 1:
        raise ValueError(
            f"`levels` must give two `channels`, [student, teacher], and a `stride` of {rank} numbers of voxels, got "
            f"{list(channels)} and {list(stride)}."
        )
    return _Level(tap_pairs([level["tap"]], "levels")[0], cast(tuple[int, int], channels), stride)


def _check_embeddings(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"`pred` of student and teacher must be embeddings of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; give both the same `embedding_channels` and `padding`."
        )


def _small(numbers: Tensor) -> Tensor:
    """The same instances with numbers that are small enough to index nodes by."""
    return consecutive_labels(numbers) if int(numbers.max()) > _MANY else numbers


def _mean(ignored: Tensor | None, squares: Tensor) -> Tensor:
    if ignored is None:
        return squares.mean()
    return squares.masked_fill(ignored, 0.0).sum() / (~ignored).sum().clamp(min=1)


def _block_scale(ignored: Tensor, pooling: Sequence[int]) -> Tensor:
    """What makes a mean over all blocks of a sample, (B,), one over those with a voxel that counts; 0 without any."""
    ones = (~ignored).float()
    counted = pooled_directions(ones, pooling, ignored)[..., 0] > 0              # (B, N)
    found = counted.sum(1)
    return torch.where(found > 0, counted.shape[1] / found.clamp(min=1), 0.0)


def _overlap(
    size: Sequence[int], voxels: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[slice, ...], list[Tensor]]:
    """Cells of a layer whose centers lie in the label, with the voxel there, when both are centered on each other."""
    cells, places = [slice(None), slice(None)], []
    for length, wide, step in zip(size, voxels, stride, strict=True):
        center = (torch.arange(length) + 0.5) * step - (length * step - wide) / 2
        inside = (center >= 0) & (center < wide)
        first = int(inside.int().argmax())
        cells.append(slice(first, first + int(inside.sum())))
        places.append(center[inside].floor().long())
    return tuple(cells), places
