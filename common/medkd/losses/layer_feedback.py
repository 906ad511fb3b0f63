# SPDX-License-Identifier: Apache-2.0
"""Hierarchical layer-selective feedback distillation (HLFD): deep layers of the teacher for early ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from medkd.checks import check_maps
from medkd.losses.base import DistillationLoss, TapPair, tap_pairs
from medkd.losses.class_heads import ClassHeads, FixedHeads, LayerHeads, TeacherHeads, drawn_projection
from medkd.losses.focus import FocusCheck
from medkd.losses.predictions import Predictions, check_comparable
from medkd.ops.attention import (
    attention_distance,
    attention_map,
    largest_magnitude,
    resized_attention_map,
    shared_grid,
    unified_attention_map,
)
from medkd.ops.divergence import prediction_divergence, softened_divergence
from medkd.ops.ignored import ignored_voxels, on_grid
from medkd.ops.prediction import Activation, TeacherOutput, foreground_probability
from medkd.ops.resample import pool_average, pool_or_interpolate, resize_linearly

__all__ = ["LayerFeedbackLoss", "Projection", "Reduction"]

Projection = Literal["learned", "fixed", "reference"]
Reduction = Literal["mean", "sum"]
Maps = Mapping[str, Tensor]
Heads = tuple[ClassHeads | FixedHeads, TeacherHeads | FixedHeads]
# Of the released code: 0.9 for features, 0.1 for predictions, each halved between two terms.
_WEIGHTS = {"ufd": 0.45, "ifd": 0.45, "upd": 0.05, "ipd": 0.05, "final_feature": 0.0, "final_pixel": 0.0}
_PIXEL_TERMS = frozenset({"upd", "ipd", "final_pixel"})
_LIKELY = 0.1                       # probability of foreground from which on a voxel is looked at more


@dataclass(frozen=True)
class _Preset:
    projection: Projection
    reduction: Reduction
    pools: bool     # compares on the coarser grid, by average pooling of maps; else resizes features linearly


_PRESETS = {"default": _Preset("learned", "mean", True), "paper": _Preset("reference", "sum", False)}


class LayerFeedbackLoss(DistillationLoss):
    """Send what deep layers of the teacher know back to early layers of the student.

    With encoder layers e1 ... e5 and decoder layers d5 ... d2, in the order of computation:

    * `ufd`, unified feature distillation: e1 of the student, e2, e3 and e4 of the teacher taken together;
    * `ifd`, individual: each of e2, e3, e4 of the student, and e5 of the teacher. Both compare attention maps, the mean
      over channels of x^4, as unit vectors over the voxels: `|a_S - a_T|^2`, range [0, 2];
    * `upd`, unified pixel distillation: d5 of the student, d5, d4 and d3 of the teacher taken together;
    * `ipd`, individual: each of d4, d3, d2 of the student, and the teacher's prediction. Both compare softened
      distributions by Kullback-Leibler divergence, times T^2, mean over voxels;
    * `final_feature`, `final_pixel`: e5 with e5, prediction with prediction. Not in HLFD; weight 0 in both presets.

    The paper's body could not be obtained; its released code is complete. There, pixel terms pass through 1 x 1
    convolutions that are drawn anew in each step and never trained, so that on average their gradients know nothing of
    the teacher: `ipd` shrinks activations, `upd` flattens the student's channels.

    | | `default` (ours) | `paper` (as released) |
    |---|---|---|
    | pixel terms | heads: the student's learn, the teacher's were fitted to labels | convolutions drawn in each step |
    | `upd` compares | classes; mean logits of the teacher's d5, d4, d3 | channels, softmax over those of the student |
    | three layers of `ifd`, `ipd` | mean | sum |
    | divisor of a divergence | voxels | voxels * channels / 2, as of `view(-1, 2)`: `upd` is C / 2 times weaker |
    | `ufd`, `ifd` | on the coarser grid; attention maps are averaged | features are resized linearly before the power |
    | weights `ufd ifd upd ipd` | 0.45 0.45 0.05 0.05 | the same |

    As released, `ufd` is on the student's grid and `ifd` on the teacher's; of a large map that is resized to a small
    grid most voxels are not looked at.

    Works without labels, which only tell the voxels that are ignored: those with a negative one. A cell of a layer
    weighs as much as the part of it that is not ignored. Without foreground, and with an image of one value, all terms
    are defined; a layer that is 0 everywhere has a feature distance of 1 and no gradient.

    Args:
        encoder_taps: e1, e2, ... finest first, at least three: a path stands for both networks, a pair `[student,
            teacher]` for each its own. The teacher's e1 is not read, and the student's last by `final_feature` alone.
        decoder_taps: d5, d4, ... likewise, in the order of computation, deepest first, at least two. The teacher's
            last is not read.
        preset: `default` or `paper`; the arguments below win over it.
        projection: `learned`, `fixed` (drawn once, `FixedHeads` on both sides), or `reference`: of `paper` alone.
        heads: the student's, one for each of `decoder_taps`, and the teacher's, for all but the last of them; None for
            `reference`.
        reduction: over the layers of `ifd` and of `ipd`.
        exponent: of the attention maps, at least 1. 4 is published; then the strongest voxel may own the map.
        temperature: T of the softened distributions, above 0.
        foreground: gamma; a voxel where the teacher sees foreground with a probability above 0.1 weighs 1 + gamma.
            In CT under 1 % of the voxels are foreground.
        seed: of the convolutions of `reference`.
        activation: `softmax` for one class per voxel (one channel is a sigmoid output), or `sigmoid` for regions.
        teacher_output: `logits`, or `probabilities` of a teacher that ends in that activation.

    Raises:
        ValueError: unknown option, too few layers, heads that do not belong to the projection, layers of other channels
            than the heads'.

    Reference:
        Gorade et al., Rethinking Intermediate Layers Design in Knowledge Distillation for Kidney and Liver Tumor
        Segmentation, arXiv 2311.16700, and its released code.

    Example:
        >>> heads = FixedHeads([8, 4], classes=2, spatial_dims=2), FixedHeads([16], classes=2, spatial_dims=2, seed=1)
        >>> loss = LayerFeedbackLoss(["e1", "e2", "e3"], ["d3", "d2"], projection="fixed", heads=heads)
        >>> def features(c):
        ...     shapes = {"e1": (c, 8), "e2": (2 * c, 4), "e3": (4 * c, 2), "d3": (2 * c, 4), "d2": (c, 8)}
        ...     shapes |= {"pred": (2, 8)}
        ...     return {name: torch.rand(1, channels, size, size) for name, (channels, size) in shapes.items()}
        >>> student = {name: value.requires_grad_() for name, value in features(4).items()}
        >>> terms = loss(student, features(8))
        >>> sum(loss.preset_weights[name] * value for name, value in terms.items()).backward()
        >>> sorted(terms), [student[name].grad is None for name in ("e1", "e2", "d3", "d2")]
        (['final_feature', 'final_pixel', 'ifd', 'ipd', 'ufd', 'upd'], [False, False, False, False])
    """

    terms = ("ufd", "ifd", "upd", "ipd", "final_feature", "final_pixel")

    def __init__(   # noqa: PLR0913 - options of a config, each with a default
        self,
        encoder_taps: Sequence[str | Sequence[str]],
        decoder_taps: Sequence[str | Sequence[str]],
        preset: Literal["default", "paper"] = "default",
        projection: Projection | None = None,
        heads: Heads | None = None,
        reduction: Reduction | None = None,
        exponent: float = 4.0,
        temperature: float = 4.0,
        foreground: float = 0.0,
        seed: int = 0,
        activation: Activation = "softmax",
        teacher_output: TeacherOutput = "logits",
    ) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"`preset` must be one of {list(_PRESETS)}, got {preset!r}.")
        chosen = _PRESETS[preset]
        super().__init__()
        self.projection: Projection = projection or chosen.projection
        self.reduction: Reduction = reduction or chosen.reduction
        self.pools = chosen.pools
        _check_options(self.projection, self.reduction, preset, activation)
        _check_numbers(exponent, temperature, foreground)
        self.encoder = _layers(encoder_taps, "encoder_taps", 3)
        self.decoder = _layers(decoder_taps, "decoder_taps", 2)
        _check_heads(self.projection, heads, len(self.decoder))
        self.exponent = exponent
        self.temperature = temperature
        self.foreground = foreground
        self.activation: Activation = activation
        self.teacher_output: TeacherOutput = teacher_output
        self.preset_weights = dict(_WEIGHTS)
        self._predictions = Predictions(activation, teacher_output)
        self.student_heads = None if heads is None else heads[0]
        self.teacher_heads = None if heads is None else heads[1]
        self._frozen_heads: list[ClassHeads] = []                  # a list keeps them out of optimizer and checkpoint
        self.seed = seed
        self.draws: Tensor
        if self.projection == "reference":
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))   # a resumed run draws what comes next
        self._focus = FocusCheck()
        self.tap_pairs = self._needed_pairs()

    def activate(self, terms: Iterable[str]) -> None:
        """Compute only these terms from now on, and read only their layers; the teacher's heads are read from file."""
        super().activate(terms)
        self.tap_pairs = self._needed_pairs()
        self._frozen_heads.clear()
        if "upd" in self.active_terms and self.teacher_heads is not None:
            self._heads_of_teacher("cpu")

    def _needed_pairs(self) -> tuple[TapPair, ...]:
        """Who learns from whom; `ipd` reads the prediction of the teacher, and of its layers none."""
        students, teachers = zip(*self.encoder, strict=True)
        first, *rest = (student for student, _ in self.decoder)
        deep = [teacher for _, teacher in self.decoder[:-1]]
        pairs: dict[str, list[TapPair]] = {
            "ufd": [(students[0], teacher) for teacher in teachers[1:-1]],
            "ifd": [(student, teachers[-1]) for student in students[1:-1]],
            "upd": [(first, teacher) for teacher in deep],
            "ipd": [(student, deep[-1]) for student in rest],
            "final_feature": [(students[-1], teachers[-1])],
        }
        needed = (pair for term in self.terms if term in self.active_terms for pair in pairs.get(term, []))
        return tuple(dict.fromkeys(needed))

    def compute_terms(self, student: Maps, teacher: Maps, label: Tensor | None) -> dict[str, Tensor]:
        """Give each of `active_terms`; the labels tell which voxels are ignored."""
        logits = teacher["pred"]
        if self.active_terms & _PIXEL_TERMS:                       # the others read only its grid
            logits = self._predictions.teacher(logits)
        if label is not None and label.shape[1] == 1:
            self._predictions.classes(label, teacher["pred"])
        ignored = ignored_voxels(label)
        counted = None if ignored is None else (~on_grid(ignored, logits.shape[2:])).to(logits.dtype)
        values = self._feature_terms(student, teacher, counted)
        if not self.active_terms & _PIXEL_TERMS:
            return values
        weight, generator = self._voxel_weight(logits, counted), None
        if self.projection == "reference" and self.active_terms & {"upd", "ipd"}:
            generator = torch.Generator().manual_seed(self.seed + int(self.draws))
            self.draws += 1
        if "upd" in self.active_terms:
            values["upd"] = self._unified_pixels(student, teacher, weight, generator)
        if "ipd" in self.active_terms:
            values["ipd"] = self._individual_pixels(student, logits, weight, generator)
        if "final_pixel" in self.active_terms:
            check_comparable(student["pred"], logits)
            values["final_pixel"] = self._divergence(self._predictions.student(student["pred"]), logits, weight)
        return {term: values[term] for term in self.terms if term in values}

    # ---- features --------------------------------------------------------------------------------------------------

    def _feature_terms(self, student: Maps, teacher: Maps, counted: Tensor | None) -> dict[str, Tensor]:
        students, teachers = zip(*self.encoder, strict=True)
        values = {}
        if "ufd" in self.active_terms:
            mine = self._map(student, students[0])
            levels = [teacher[path] for path in teachers[1:-1]]
            if self.pools:
                target = unified_attention_map(levels, self.exponent)
            else:
                target = resized_attention_map(levels, mine.shape[2:], self.exponent)
            self._focus("ufd", target)
            values["ufd"] = self._distance(mine, target, counted)
        if self.active_terms & {"ifd", "final_feature"}:
            target = self._map(teacher, teachers[-1])
            self._focus("ifd", target)
            grid = None if self.pools else tuple(target.shape[2:])
            layers = {"ifd": students[1:-1], "final_feature": students[-1:]}
            for term in (term for term in layers if term in self.active_terms):
                maps = (self._map(student, path, grid) for path in layers[term])
                values[term] = self._reduced([self._distance(mine, target, counted) for mine in maps])
        return values

    def _map(self, maps: Maps, path: str, grid: tuple[int, ...] | None = None) -> Tensor:
        """Attention map of one layer, whose features are resized before the power if a grid is given."""
        check_maps(f"tap {path}", maps[path])
        features = maps[path] if grid is None else resize_linearly(maps[path], grid)
        return attention_map(features, self.exponent, largest_magnitude(features))

    def _distance(self, student: Tensor, teacher: Tensor, counted: Tensor | None) -> Tensor:
        """Mean distance of the samples that have a voxel which counts, on the coarser grid."""
        grid = shared_grid([student, teacher])
        weight = None if counted is None else pool_or_interpolate(counted, grid, "average")
        distance = attention_distance(pool_average(student, grid), pool_average(teacher, grid), weight)   # (B,)
        if weight is None:
            return distance.mean()
        return distance.sum() / weight.flatten(1).any(1).sum().clamp(min=1)

    # ---- predictions -----------------------------------------------------------------------------------------------

    def _unified_pixels(
        self, student: Maps, teacher: Maps, weight: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        mine = student[self.decoder[0][0]]
        check_maps(f"tap {self.decoder[0][0]}", mine)
        levels = [teacher[path] for _, path in self.decoder[:-1]]
        grid = tuple(mine.shape[2:])
        if generator is not None:                                  # the student's channels are the classes
            coarse = shared_grid(levels)
            together = torch.cat([resize_linearly(level, coarse) for level in levels], dim=1)
            target = resize_linearly(drawn_projection(together, mine.shape[1], generator), grid)
            divergence = softened_divergence(mine, target.to(mine.dtype), self.temperature)
            return self._mean(divergence, weight) * (2.0 / mine.shape[1])
        predicted = self._heads_of_teacher(mine.device)(levels)
        target = torch.stack([pool_or_interpolate(one, grid, "average") for one in predicted]).mean(0)
        return self._divergence(self._head_of_student(0, mine), target, weight)

    def _individual_pixels(
        self, student: Maps, logits: Tensor, weight: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        values = []
        for n, (path, _) in enumerate(self.decoder[1:], start=1):
            check_maps(f"tap {path}", student[path])
            if generator is not None:
                mine = drawn_projection(student[path], logits.shape[1], generator)
            else:
                mine = self._head_of_student(n, student[path])
            # 1 x 1 convolution and linear interpolation commute, so K channels are resized instead of all
            mine = pool_or_interpolate(mine, logits.shape[2:], "average")
            divisor = 1.0 if generator is None else max(logits.shape[1], 2) / 2
            values.append(self._divergence(mine, logits, weight) / divisor)
        return self._reduced(values)

    def _divergence(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"`heads` must give the {teacher.shape[1]} classes of the teacher's prediction, got {student.shape[1]}."
            )
        teacher = teacher.to(student.dtype)
        divergence = prediction_divergence(student, teacher, self.temperature, self.activation)
        return self._mean(divergence, weight)

    def _mean(self, divergence: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            divergence = divergence * pool_or_interpolate(weight, divergence.shape[2:], "average")
        return self.temperature**2 * divergence.mean()

    def _voxel_weight(self, logits: Tensor, counted: Tensor | None) -> Tensor | None:
        """Weights (B, 1, *S) with mean 1 over the batch; None where all voxels weigh the same."""
        weight = counted
        if self.foreground > 0:
            own = 1.0 + self.foreground * (foreground_probability(logits, self.activation) > _LIKELY)
            weight = own if counted is None else own * counted
        return None if weight is None else weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)

    def _reduced(self, values: list[Tensor]) -> Tensor:
        total = torch.stack(values)
        return total.mean() if self.reduction == "mean" else total.sum()

    def _head_of_student(self, number: int, level: Tensor) -> Tensor:
        heads = cast(LayerHeads, self.student_heads)
        return heads.predict(number, level)

    def _heads_of_teacher(self, device: torch.device | str) -> LayerHeads:
        """The frozen heads on `device`, read from their file once."""
        if isinstance(self.teacher_heads, FixedHeads):
            return self.teacher_heads
        if not self._frozen_heads and self.teacher_heads is not None:
            self._frozen_heads.append(self.teacher_heads.load(device))
        return self._frozen_heads[0].to(device)


def _layers(taps: Sequence[str | Sequence[str]], argument: str, least: int) -> tuple[TapPair, ...]:
    pairs = tap_pairs(taps, argument)
    if len(pairs) < least:
        raise ValueError(
            f"`{argument}` must name at least {least} layers, one for each level of the networks, got {list(taps)}."
        )
    return pairs


def _check_options(projection: str, reduction: str, preset: str, activation: str) -> None:
    if projection not in get_args(Projection):
        raise ValueError(f"`projection` must be one of {get_args(Projection)}, got {projection!r}.")
    if reduction not in get_args(Reduction):
        raise ValueError(f"`reduction` must be one of {get_args(Reduction)}, got {reduction!r}.")
    if projection == "reference" and (preset != "paper" or activation != "softmax"):
        raise ValueError(
            "`projection` 'reference' must go with preset 'paper' and activation 'softmax', as it repeats the released "
            f"code, got {preset!r} and {activation!r}; take 'learned', which teaches something."
        )


def _check_numbers(exponent: float, temperature: float, foreground: float) -> None:
    if not (exponent >= 1 and temperature > 0 and foreground >= 0):
        raise ValueError(
            "`exponent` must be at least 1, `temperature` above 0 and `foreground` not below, got "
            f"{exponent}, {temperature} and {foreground}."
        )


def _check_heads(projection: Projection, heads: Heads | None, layers: int) -> None:
    """Refuse heads of another kind or number than the projection and the decoder's layers need."""
    wanted = {"learned": (ClassHeads, TeacherHeads), "fixed": (FixedHeads, FixedHeads), "reference": ()}[projection]
    given = () if heads is None else tuple(heads)
    if len(given) != len(wanted) or any(not isinstance(*pair) for pair in zip(given, wanted, strict=True)):
        expected = [kind.__name__ for kind in wanted] or None
        raise ValueError(
            f"`heads` must be {expected} (student's, teacher's) for projection {projection!r}, got "
            f"{[type(one).__name__ for one in given] or None}."
        )
    numbers = [len(one.channels) for one in given]
    if given and (numbers != [layers, layers - 1] or given[0].classes != given[1].classes):
        raise ValueError(
            f"`heads` must be for the {layers} layers of `decoder_taps` and the first {layers - 1} of the teacher's, "
            f"with the same classes, got {numbers} layers and {[one.classes for one in given]} classes."
        )
