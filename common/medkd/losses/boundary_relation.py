# SPDX-License-Identifier: Apache-2.0
"""Boundary and relation distillation (BRD)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from medkd.checks import check_label, check_maps
from medkd.losses.base import DistillationLoss, tap_pairs
from medkd.losses.boundary_head import BoundaryHead, TeacherHead
from medkd.losses.predictions import Predictions
from medkd.ops.affinity import AffinityDivergence, affinity_distance, feature_contrast
from medkd.ops.border import border_auc
from medkd.ops.graph import (
    class_balance_weight,
    gram_relation_distance,
    softmax_relation_distance,
    unit_vectors,
)
from medkd.ops.ignored import IGNORED
from medkd.ops.prediction import Activation, TeacherOutput, hard_labels, probabilities
from medkd.ops.resample import majority_label, pool_average, pool_or_interpolate

__all__ = ["BoundaryMap", "BoundaryRelationLoss", "RelationBalance", "boundary_grid"]

BoundaryMap = Literal["contrast", "head", "prob"]
RelationBalance = Literal["class", "none"]
logger = logging.getLogger(__name__)
_GOOD_AUC = 0.6


@dataclass(frozen=True)
class _Preset:
    boundary_map: BoundaryMap
    divergence: AffinityDivergence
    softmax: bool
    balance: RelationBalance
    cells: int
    weights: Mapping[str, float]


_PRESETS = {
    "default": _Preset("contrast", "squared", False, "class", 13_824, {"boundary": 5.0, "relation": 0.5}),
    "paper": _Preset("head", "binary_kl", True, "none", 4_096, {"boundary": 1.0, "relation": 1.0}),
}


class BoundaryRelationLoss(DistillationLoss):
    """Distil where boundaries lie in the encoder's features, and how voxels relate to each other.

    * `boundary`: a boundary map per network; affinity of two voxels = 1 - maximum on the straight path between them;
      difference of the affinities, balanced between pairs that cross a label border and pairs that do not.
    * `relation`: cosine self-relation of all voxels of a level, compared as N x N matrices that are never built;
      mean over levels.

    Cases without a label take the teacher's prediction in its place, alone or next to others in a batch.

    The paper's body could not be obtained, so both presets are re-implementations after its abstract and its lineage:

    | | `default` (ours) | `paper` (our reading of the paper) |
    |---|---|---|
    | boundary map | contrast of feature directions, mean over levels; nothing to train | learned one-channel heads |
    | affinities | squared difference, range [0, 1] | binary Kullback-Leibler divergence |
    | relation | squared difference, exact by Gram matrices, range [0, 4] | row softmax at temperature 0.1, KL |
    | nodes | every class of a sample weighs the same | equal weights |
    | weights | 5, 0.5 (from measured gradients) | 1, 1 |

    Args:
        boundary_taps: encoder layers, one per level, finest first: paths, or pairs `[student, teacher]`. Decoder layers
            of instance-normalized networks show inverted boundaries; leave them out. Not read by `prob`.
        relation_taps: layers whose voxels are related, likewise.
        preset: `default` or `paper`; the arguments below win over it.
        boundary_map: `contrast`, `head`, or `prob`: contrast of the square roots of the predicted probabilities
            (Hellinger), which tells the student of mask borders only.
        heads: for `head`: the student's, which learns, and the teacher's, which was fitted before.
        pair_lengths: path lengths in cells of the boundary grid, ascending.
        boundary_cells: the boundary grid is the finest tapped one with at most so many cells per sample.
        relation_cells: a larger tapped grid is average-pooled to at most so many cells, with one warning.
        relation_balance: `class`, or `none` for equal weights.
        min_boundary_auc: the teacher's boundary map is compared with the borders of the labels in the first batches
            (area under the ROC curve), and a value below 0.6 is a warning: it teaches wrong boundaries. Below this
            argument training stops; 0 never stops.
        ignore_label: one more label that does not count, besides negative ones, which never do; None for no other.
        activation: `sigmoid` when `pred` has regions that overlap; a combination of regions is then a class, and the
            label may have a channel for each region, (B, K, *S). See `SoftLabelLoss`.
        teacher_output: `logits`, or `probabilities`; matters where the teacher's prediction is read: without labels,
            and for the map `prob`.

    Raises:
        ValueError: unknown preset, map or balance, no tap, no heads for `head`; a label of another shape than the
            prediction; a teacher whose boundary map is worse than `min_boundary_auc`.

    Reference:
        Zhang et al., Boundary and Relation Distillation for Semantic Segmentation, arXiv 2401.13174.

    Example:
        >>> loss = BoundaryRelationLoss(["e1"], ["e1"])
        >>> student = torch.rand(1, 4, 6, 6, requires_grad=True)
        >>> pred, teacher = torch.rand(1, 2, 12, 12), torch.rand(1, 8, 6, 6)
        >>> label = torch.randint(0, 2, (1, 1, 12, 12))
        >>> terms = loss({"e1": student, "pred": pred}, {"e1": teacher, "pred": pred}, label)
        >>> sum(terms.values()).backward()
        >>> sorted(terms), student.grad.shape
        (['boundary', 'relation'], torch.Size([1, 4, 6, 6]))
    """

    terms = ("boundary", "relation")

    def __init__(   # noqa: PLR0913 - options of a config, each with a default
        self,
        boundary_taps: Sequence[str | Sequence[str]],
        relation_taps: Sequence[str | Sequence[str]],
        preset: Literal["default", "paper"] = "default",
        boundary_map: BoundaryMap | None = None,
        heads: tuple[BoundaryHead, TeacherHead] | None = None,
        pair_lengths: Sequence[int] = (1, 2, 4),
        boundary_cells: int = 131_072,
        relation_cells: int | None = None,
        relation_balance: RelationBalance | None = None,
        min_boundary_auc: float = 0.6,
        ignore_label: int | None = None,
        activation: Activation = "softmax",
        teacher_output: TeacherOutput = "logits",
    ) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"`preset` must be one of {list(_PRESETS)}, got {preset!r}.")
        chosen = _PRESETS[preset]
        boundary_map = boundary_map or chosen.boundary_map
        relation_balance = relation_balance or chosen.balance
        relation_cells = chosen.cells if relation_cells is None else relation_cells
        _check_options(boundary_map, relation_balance, heads is not None, min(boundary_cells, relation_cells))
        boundary_pairs = () if boundary_map == "prob" else tap_pairs(boundary_taps, "boundary_taps")
        relation_pairs = tap_pairs(relation_taps, "relation_taps")
        super().__init__(list(dict.fromkeys(boundary_pairs + relation_pairs)))
        self.boundary_pairs = boundary_pairs
        self.relation_pairs = relation_pairs
        self.preset_weights = chosen.weights
        self.boundary_map = boundary_map
        self.divergence = chosen.divergence
        self.relation_distance = softmax_relation_distance if chosen.softmax else gram_relation_distance
        self.relation_balance = relation_balance
        self.relation_cells = relation_cells
        self.pair_lengths = tuple(pair_lengths)
        self.boundary_cells = boundary_cells
        self.ignore_label = ignore_label
        self.activation: Activation = activation
        self._predictions = Predictions(activation, teacher_output)
        self.head = None if heads is None else heads[0]
        self.teacher_head = None if heads is None else heads[1]
        self._frozen_head: list[BoundaryHead] = []                 # a list keeps it out of optimizer and checkpoint
        self._check = _BoundaryCheck(min_boundary_auc)
        self._told_of_pooling = False

    def activate(self, terms: Iterable[str]) -> None:
        """Compute only these terms from now on; the teacher's head is read here if it is needed."""
        super().activate(terms)
        self._frozen_head.clear()
        if "boundary" in self.active_terms:
            self._load_teacher_head("cpu")

    def _load_teacher_head(self, device: torch.device | str) -> BoundaryHead | None:
        """The frozen head on `device`, read from its file once; None for a map without heads."""
        if self.teacher_head is None:
            return None
        if not self._frozen_head:
            self._frozen_head.append(self.teacher_head.load(device))
        return self._frozen_head[0].to(device)

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give `boundary` and `relation`; without labels the teacher's prediction takes their place as weights."""
        if label is None:
            label = hard_labels(self._predictions.teacher(teacher["pred"]), self.activation)
        label = self._classes(label, student["pred"])
        terms = {}
        if "boundary" in self.active_terms:
            terms["boundary"] = self._boundary(student, teacher, label)
        if "relation" in self.active_terms:
            values = [self._relation(student[s], teacher[t], label) for s, t in self.relation_pairs]
            terms["relation"] = torch.stack(values).mean()
        return terms

    def stand_in(self, teacher: Mapping[str, Tensor], label: Tensor) -> Tensor:
        """Give the teacher's classes, or its regions where the label has a channel for each."""
        pred = self._predictions.teacher(teacher["pred"])
        if self.activation == "sigmoid" and label.shape[1] == pred.shape[1] > 1:
            return pred > 0
        return hard_labels(pred, self.activation)

    def _classes(self, label: Tensor, pred: Tensor) -> Tensor:
        if self.ignore_label is not None:
            label = label.long().masked_fill(label == self.ignore_label, IGNORED)
        label = self._predictions.classes(label, pred)
        check_label("label", label, pred)
        return label

    def _boundary(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor) -> Tensor:
        mine, other = self._levels(student, 0), self._levels(teacher, 1)
        grid = boundary_grid(mine, self.boundary_cells)
        labels, _ = majority_label(label, grid)
        with torch.no_grad():
            target = _boundary_map(other, grid, self._load_teacher_head(other[0].device))   # (B, 1, *grid)
        self._check(target, labels)
        boundary = _boundary_map(mine, grid, self.head)
        return affinity_distance(boundary, target, labels, self.pair_lengths, divergence=self.divergence)

    def _levels(self, maps: Mapping[str, Tensor], role: int) -> list[Tensor]:
        if self.boundary_map == "prob":
            read = self._predictions.teacher if role else self._predictions.student
            return [probabilities(read(maps["pred"]), self.activation).clamp(min=1e-12).sqrt()]
        return [maps[pair[role]] for pair in self.boundary_pairs]

    def _relation(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        check_maps("student", student)
        shared = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
        grid = _shrunk(shared, self.relation_cells)
        if grid != shared and not self._told_of_pooling:
            self._told_of_pooling = True
            logger.warning(
                "Relation taps of %s cells are average-pooled to %s: `relation_cells` is %d.",
                *("x".join(map(str, one)) for one in (shared, grid)), self.relation_cells,
            )
        labels, share = majority_label(label, grid)
        valid = share.flatten(1) >= 0.5
        weight = class_balance_weight(labels.flatten(1), valid, self.relation_balance == "class")
        return self.relation_distance(_nodes(student, grid), _nodes(teacher, grid), weight).mean().to(student.dtype)


class _BoundaryCheck:
    """Compares the teacher's boundary maps of the first batches with the borders of the labels, once."""

    def __init__(self, least: float, batches: int = 8) -> None:
        self.least = least
        self.batches = batches
        self.values: list[float] = []

    def __call__(self, boundary: Tensor, label: Tensor) -> None:
        if len(self.values) == self.batches:
            return
        value = border_auc(boundary, label)
        if math.isnan(value):
            return                                                 # no border in this batch
        self.values.append(value)
        if len(self.values) < self.batches:
            return
        mean = sum(self.values) / self.batches
        level = logging.INFO if mean >= _GOOD_AUC else logging.WARNING
        logger.log(level, "The teacher's boundary map shows the borders of the labels with an AUC of %.3f.", mean)
        if mean < self.least:
            raise ValueError(
                f"The teacher's boundary map must show the borders of the labels with an AUC of at least {self.least}, "
                f"got {mean:.3f} over {self.batches} batches; tap other encoder layers, take "
                "boundary_map 'prob', or set `min_boundary_auc` to 0 to distil from it all the same."
            )


def _check_options(boundary_map: str, balance: str, heads: bool, cells: int) -> None:
    if boundary_map not in get_args(BoundaryMap):
        raise ValueError(f"`boundary_map` must be one of {get_args(BoundaryMap)}, got {boundary_map!r}.")
    if balance not in get_args(RelationBalance):
        raise ValueError(f"`relation_balance` must be one of {get_args(RelationBalance)}, got {balance!r}.")
    if heads != (boundary_map == "head"):
        raise ValueError(
            "`heads` must be [student's, teacher's] for the boundary map 'head', and None for any other, "
            f"got {'heads' if heads else 'None'} for {boundary_map!r}."
        )
    if cells < 1:
        raise ValueError(f"`boundary_cells` and `relation_cells` must be positive, got {cells} as the smaller one.")


def _nodes(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Unit node vectors, shape (B, N, C): pool first, then normalize."""
    return unit_vectors(pool_average(features, grid)).flatten(2).transpose(1, 2)


def _boundary_map(levels: Sequence[Tensor], grid: tuple[int, ...], head: BoundaryHead | None) -> Tensor:
    """What the head shows; without one the mean over levels of each level's contrast, brought to one grid."""
    if head is not None:
        boundary: Tensor = head(levels, grid)
        return boundary
    return torch.stack([pool_or_interpolate(feature_contrast(maps), grid) for maps in levels]).mean(0)


def boundary_grid(levels: Sequence[Tensor], cells: int) -> tuple[int, ...]:
    """Grid of the boundary map: the finest of the levels (B, C, *S) with at most so many cells per sample."""
    grids = [tuple(level.shape[2:]) for level in levels]
    fitting = [grid for grid in grids if math.prod(grid) <= cells]
    return max(fitting, key=math.prod) if fitting else _shrunk(min(grids, key=math.prod), cells)


def _shrunk(grid: tuple[int, ...], cells: int) -> tuple[int, ...]:
    """Divide a grid by the smallest whole number that brings it to at most `cells`."""
    divisor = 1
    while math.prod(max(1, size // divisor) for size in grid) > cells:
        divisor += 1
    return tuple(max(1, size // divisor) for size in grid)
