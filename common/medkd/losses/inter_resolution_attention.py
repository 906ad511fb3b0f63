# SPDX-License-Identifier: Apache-2.0
"""Inter-resolution attention distillation (AT+): look where the teacher looks, class by class, at lower resolution."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from medkd.checks import check_classes, check_maps
from medkd.losses.base import DistillationLoss, TapPair, pointwise_convolution, tap_pairs
from medkd.losses.predictions import Predictions
from medkd.ops.class_attention import ClassAttention, class_attention, head_matrix, head_mismatch
from medkd.ops.ignored import ignored_voxels, on_grid
from medkd.ops.map_distance import Normalization, map_distance, root_mean_square
from medkd.ops.prediction import Activation, TeacherOutput, hard_labels
from medkd.ops.resample import pool_or_interpolate

__all__ = ["ChosenClasses", "Grid", "InterResolutionAttentionLoss", "Task", "TeacherFilter", "WeightGradient"]

Task = Literal["classification", "segmentation"]
Grid = Literal["student", "teacher"]
ChosenClasses = Literal["all", "target", "teacher_argmax"]
TeacherFilter = Literal["none", "correct"]
WeightGradient = Literal["through", "detached"]
Tap = str | Sequence[str]
Maps = Mapping[str, Tensor]
_PRESETS: dict[str, Grid] = {"default": "student", "paper": "teacher"}
_WEIGHTS: dict[str, dict[str, float]] = {
    "classification": {"attention": 10.0, "feature": 0.1, "regression": 0.0},          # of the released README
    "segmentation": {"attention": 1.0, "feature": 0.0, "regression": 0.0},
}
_MISMATCH = 0.1            # of predictions and what the head makes of the features
_LOOKS = 4                 # first batches, in which it is looked whether the head reads the layer
_FEW = 64                  # positions; a map of fewer says little about where
logger = logging.getLogger(__name__)


class InterResolutionAttentionLoss(DistillationLoss):
    """Give the student, which sees less resolution, the teacher's class attention, its features, and its head.

    * `attention` (AT+): Grad-CAM maps S of every class, made of what raises its score; the root of the mean squared
      difference over classes and positions of the normalized maps, mean over samples. In [0, 1] with min-max, 0.2 for
      two networks of random weights; if it stays there, images of student and teacher do not show the same.
    * `feature` (FM): the root of the mean squared difference of the features, over the whole batch.
    * `regression` (SR): the same of the student's and the teacher's features after the teacher's head, for scores.

    Soft labels are a loss of their own, `SoftLabelLoss`, which goes beside this one.

    Maps come in closed form from the layer that the head reads and from its weight, see
    `medkd.ops.class_attention`: values and gradients are those of autograd with create_graph. They are resized first
    and normalized then, as the extremes of another grid would not be 0 and 1. Student and teacher may have any grids.

    In a segmentation (ours; the paper has none) the score of a class is the sum of its logits over all voxels, the
    layer is that before the last 1 x 1 convolution, and the maps are that convolution's with positive evidence apart.

    | | `default` (ours) | `paper` (as released) |
    |---|---|---|
    | grid | the student's: the teacher's maps are average-pooled | the teacher's; there the student's image is \
up-sampled, so that both are one |
    | features are compared | on that grid | on that grid |
    | layer (`tap`, of the config) | behind the last ReLU | before it: half of a map is negative weight times negative \
feature |
    | student's image (of the data) | small | small and up-sampled: it costs what the teacher costs |
    | `SoftLabelLoss` beside it | T = 4, times T^2 | T = 1; released is the cross entropy, which is larger by the \
teacher's entropy and has the same gradient |
    | weights `attention feature regression` | 10 0.1 0, of a segmentation 1 0 0 | the same |

    Differences from the released code in both presets: a constant map gives 0 and a distance of 0 no gradient, where it
    has NaN; a sample whose teacher's map is constant does not count; the teacher has no gradient; batches of one run.
    The released code teaches all classes where the abstract says the target's: `classes`. KL and binary cross entropy
    of maps, switched off there, are left out, and so is attention of layers that the head does not read directly.

    MONAI's `tap` and `head` are of DenseNet `class_layers.relu`, `class_layers.out.weight`; ResNet `layer4`,
    `fc.weight`; SENet `layer4`, `last_linear.weight`; BasicUNet `upcat_1`, `final_conv.weight`; DynUNet of three levels
    `upsamples.1`, `output_block.conv.conv.weight`. SegResNet has one activation for all blocks: it cannot be tapped.

    Ignored voxels, those with a negative label, count in no term, and a cell of a coarser grid as much as the part of
    it that counts. A case without a label counts; where its class is asked for it is the teacher's.

    Args:
        tap: the layer that the head reads: a path for both networks, or `[student, teacher]`.
        head: the parameter path of the linear head's weight, such as `class_layers.out.weight`, likewise.
        preset: `default` or `paper`; the arguments below win over it.
        task: `classification` (pred (B, C), features averaged over positions), or `segmentation` (pred (B, C, *S)).
        variant: of the maps, see `class_attention`.
        normalization: see `normalized_maps`. With `minmax_class` in a segmentation, classes that no voxel of the label
            has do not count in a sample.
        grid: on which maps and features are compared, `student` or `teacher`. Coarser ones of under 8 x 8 cells show
            little: take the teacher's then.
        classes: whose maps are compared: `all`, or of each sample the `target`, those in its label, or those in the
            teacher's prediction, `teacher_argmax`.
        teacher_filter: `correct` leaves out samples that the teacher takes for another class; of a classification.
        weight_grad: whether the student's head learns from `attention`: `through` it, or `detached`.
        include_background: whether class 0 has a map; None for True in a classification, False in a segmentation, where
            its evidence would own the maximum. One class is never left out.
        channels: `[C_S, C_T]` of the layer, for a learned 1 x 1 convolution from the student's to the teacher's, which
            `feature` and `regression` read; None where they have as many.
        seed: of its first values.
        activation: `softmax`, or `sigmoid` for classes that may be together.
        teacher_output: `logits`, or `probabilities` of a teacher that ends in that activation. Maps are of the head.
        least_positions: that maps must have to be compared, 2 or more; 27 are 3 along each axis of a volume.

    Raises:
        ValueError: unknown option; a head that does not read the layer; another number of classes or channels; a map
            of too few positions; a label that is no class.

    Reference:
        del Amor et al., Attention to detail: inter-resolution knowledge distillation, arXiv 2401.06010, and its
        released code; Yang et al., Knowledge distillation via softmax regression representation learning (SR).

    Example:
        >>> loss = InterResolutionAttentionLoss("features", "head.weight")
        >>> def network(size):
        ...     maps, weight = (torch.rand(s, requires_grad=True) for s in ((2, 8, size, size), (3, 8)))
        ...     return {"features": maps, "head.weight": weight, "pred": maps.mean((2, 3)) @ weight.T}
        >>> student = network(8)
        >>> terms = loss(student, network(16), torch.tensor([0, 2]))
        >>> sum(loss.preset_weights[name] * value for name, value in terms.items()).backward()
        >>> sorted(terms), tuple(student["features"].grad.shape), tuple(student["head.weight"].grad.shape)
        (['attention', 'feature', 'regression'], (2, 8, 8, 8), (3, 8))
    """

    terms = ("attention", "feature", "regression")

    def __init__(   # noqa: PLR0913 - options of a config, each with a default
        self,
        tap: Tap,
        head: Tap,
        preset: Literal["default", "paper"] = "default",
        task: Task = "classification",
        variant: ClassAttention = "at_plus",
        normalization: Normalization = "minmax_joint",
        grid: Grid | None = None,
        classes: ChosenClasses = "all",
        teacher_filter: TeacherFilter = "none",
        weight_grad: WeightGradient = "through",
        include_background: bool | None = None,
        channels: Sequence[int] | None = None,
        seed: int = 0,
        activation: Activation = "softmax",
        teacher_output: TeacherOutput = "logits",
        least_positions: int = 2,
    ) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"`preset` must be one of {list(_PRESETS)}, got {preset!r}.")
        super().__init__()
        (self.tap,), (self.head,) = tap_pairs([tap], "tap"), tap_pairs([head], "head")
        self.task: Task = task
        self.variant: ClassAttention = variant
        self.normalization: Normalization = normalization
        self.grid: Grid = grid or _PRESETS[preset]
        self.classes: ChosenClasses = classes
        self.teacher_filter: TeacherFilter = teacher_filter
        self.weight_grad: WeightGradient = weight_grad
        self.activation: Activation = activation
        self.teacher_output: TeacherOutput = teacher_output
        self.least_positions = least_positions
        self._check_options()
        self.include_background = task == "classification" if include_background is None else include_background
        self.preset_weights = dict(_WEIGHTS[task])
        self.projector = _projector(channels, seed)
        self._predictions = Predictions(activation, teacher_output)
        self._left = _LOOKS
        self.tap_pairs = self._needed_pairs()

    def _check_options(self) -> None:
        known: dict[str, Any] = {
            "task": Task, "variant": ClassAttention, "normalization": Normalization, "grid": Grid,
            "classes": ChosenClasses, "teacher_filter": TeacherFilter, "weight_grad": WeightGradient,
        }
        for name, values in known.items():
            if (given := getattr(self, name)) not in get_args(values):
                raise ValueError(f"`{name}` must be one of {get_args(values)}, got {given!r}.")
        if self.least_positions < 2:
            raise ValueError(f"`least_positions` must be 2 or more, got {self.least_positions}.")
        if self.teacher_filter == "correct" and (self.task, self.activation) != ("classification", "softmax"):
            raise ValueError(
                "`teacher_filter` 'correct' must go with task 'classification' and activation 'softmax', where a "
                f"sample has one class, got {self.task!r} and {self.activation!r}."
            )
        if self.variant == "activation" and (self.classes != "all" or self.normalization == "minmax_class"):
            raise ValueError(
                "`variant` 'activation' must go with `classes` 'all' and no normalization by class, as its map has no "
                f"class, got {self.classes!r} and {self.normalization!r}."
            )

    def activate(self, terms: Iterable[str]) -> None:
        """Compute only these terms from now on, and read the heads only if one of them does."""
        super().activate(terms)
        self.tap_pairs = self._needed_pairs()

    def _needed_pairs(self) -> tuple[TapPair, ...]:
        reads_head = "regression" in self.active_terms or (
            "attention" in self.active_terms and self.variant != "activation"
        )
        return (self.tap, self.head) if reads_head else (self.tap,) if self.active_terms else ()

    def stand_in(self, teacher: Maps, label: Tensor) -> Tensor | None:
        """The teacher's classes, (B, 1, *s), or (B, K, *s) of those that may be together; None where none are read."""
        return self._predicted(teacher["pred"]) if self._reads_label else None

    @property
    def _reads_label(self) -> bool:
        return self.classes == "target" or self.teacher_filter == "correct" or self._skips_absent

    @property
    def _skips_absent(self) -> bool:
        return self.normalization == "minmax_class" and self.task == "segmentation"

    def compute_terms(self, student: Maps, teacher: Maps, label: Tensor | None) -> dict[str, Tensor]:
        """Give each of `active_terms`; labels tell what is ignored, and classes where they are asked for."""
        if not self.active_terms:
            return {}
        self._check(student, teacher, label)
        mine, other = student[self.tap[0]], teacher[self.tap[1]]
        ignored = ignored_voxels(label)
        values = {}
        if "attention" in self.active_terms:
            if label is None and self._reads_label:
                label = self._predicted(teacher["pred"])
            values["attention"] = self._attention(student, teacher, label, ignored)
        if self.active_terms & {"feature", "regression"}:
            mine = self._projected(mine, other.shape[1])
        if "feature" in self.active_terms:
            values["feature"] = self._difference(mine, other, ignored)
        if "regression" in self.active_terms:
            weight = head_matrix(f"teacher[{self.head[1]!r}]", teacher[self.head[1]])
            mine, other = (self._scores(maps, weight) for maps in (mine, other))
            values["regression"] = self._difference(mine, other, ignored)
        self._left = max(self._left - 1, 0)
        return values

    # ---- attention -------------------------------------------------------------------------------------------------

    def _attention(self, student: Maps, teacher: Maps, label: Tensor | None, ignored: Tensor | None) -> Tensor:
        pooled = self.task == "classification"
        heads = (self._head(student, 0), self._head(teacher, 1))
        if self.weight_grad == "detached" and heads[0] is not None:
            heads = heads[0].detach(), heads[1]
        mine, other = (
            class_attention(maps[path], head, self.variant, pooled)
            for maps, path, head in zip((student, teacher), self.tap, heads, strict=True)
        )
        chosen = self._chosen(teacher["pred"], label)
        if not self.include_background and mine.shape[1] > 1:
            mine, other = mine[:, 1:], other[:, 1:]
            chosen = None if chosen is None else chosen[:, 1:]
        mine, other = self._on_one_grid(mine, other, ignored)
        self._tell_few(mine)
        weight = _share(ignored, mine)
        if chosen is not None:
            chosen = chosen.view(*chosen.shape, *[1] * (mine.dim() - 2)).to(mine.dtype)
            weight = chosen.expand_as(mine) if weight is None else weight * chosen
        distance, counts = map_distance(mine, other, self.normalization, weight)       # (B,)
        if self.teacher_filter == "correct" and label is not None:
            counts = counts & (hard_labels(teacher["pred"]) == label).flatten(1).all(1)
        return torch.where(counts, distance, 0.0).sum() / counts.sum().clamp(min=1)

    def _head(self, maps: Maps, role: int) -> Tensor | None:
        if self.variant == "activation":
            return None
        return head_matrix(f"{('student', 'teacher')[role]}[{self.head[role]!r}]", maps[self.head[role]])

    def _chosen(self, pred: Tensor, label: Tensor | None) -> Tensor | None:
        """Which classes of each sample are compared, (B, C), bool; None for all."""
        if self.classes == "teacher_argmax":
            return _present(self._predicted(pred), pred.shape[1])
        is_asked = self.classes == "target" or self._skips_absent
        return _present(label, pred.shape[1]) if is_asked and label is not None else None

    def _predicted(self, pred: Tensor) -> Tensor:
        """The teacher's classes, of its form of a label."""
        logits = self._predictions.teacher(pred)
        return (logits > 0).long() if self.activation == "sigmoid" else hard_labels(logits)

    def _tell_few(self, maps: Tensor) -> None:
        if self._left < _LOOKS:
            return
        if (positions := maps[0, 0].numel()) < self.least_positions:
            raise ValueError(
                f"`tap` must have {self.least_positions} positions or more, or there is no place to look at, got maps "
                f"of size {tuple(maps.shape[2:])}; take larger images, a smaller stride, or `grid` 'teacher'."
            )
        if positions < _FEW:
            logger.warning(
                "Attention maps are compared on a grid of %s, which says little about where; take `grid` 'teacher', or "
                "a smaller stride.", tuple(maps.shape[2:]),
            )

    # ---- features --------------------------------------------------------------------------------------------------

    def _projected(self, maps: Tensor, channels: int) -> Tensor:
        promised = None if self.projector is None else (self.projector.in_channels, self.projector.out_channels)
        if promised != (maps.shape[1], channels) and (promised or maps.shape[1] != channels):
            raise ValueError(
                f"`channels` must be {[maps.shape[1], channels]}, those of the layer in student and teacher, for "
                f"`feature` and `regression`, got {promised and list(promised)}."
            )
        if self.projector is None:
            return maps
        flat = maps.flatten(2)[..., None].to(self.projector.weight.dtype)              # of any number of axes
        projected: Tensor = self.projector(flat)
        return projected.view(len(maps), channels, *maps.shape[2:])

    def _scores(self, maps: Tensor, weight: Tensor) -> Tensor:
        """What the teacher's head makes of features, (B, C, *S), or of their mean; without its bias, as of both."""
        if self.task == "classification":
            maps = maps.mean(tuple(range(2, maps.dim())), keepdim=True)
        return class_attention(maps, weight, "signed", pooled=False)

    def _difference(self, student: Tensor, teacher: Tensor, ignored: Tensor | None) -> Tensor:
        student, teacher = self._on_one_grid(student, teacher, ignored)
        return root_mean_square(student, teacher, _share(ignored, student))

    def _on_one_grid(self, student: Tensor, teacher: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.grid == "student":
            return student, _average(teacher, student.shape[2:], ignored)
        return _average(student, teacher.shape[2:], ignored), teacher

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check(self, student: Maps, teacher: Maps, label: Tensor | None) -> None:
        for name, maps, tap in zip(("student", "teacher"), (student, teacher), self.tap, strict=True):
            check_maps(f"{name}[{tap!r}]", maps[tap])
        axes = student[self.tap[0]].dim() - 2, teacher[self.tap[1]].dim() - 2
        if axes[0] != axes[1]:
            raise ValueError(f"`tap` must have as many axes in both networks, got {axes[0]} and {axes[1]}.")
        preds, channels = (student["pred"], teacher["pred"]), teacher["pred"].shape[1]
        if preds[0].shape[1] != channels:
            raise ValueError(f"`student['pred']` must have the teacher's {channels} classes, got {preds[0].shape[1]}.")
        if self.task == "classification" and any(pred[0, 0].numel() > 1 for pred in preds):
            raise ValueError(
                "`task` must be 'segmentation' for predictions of voxels, got 'classification' and "
                f"{tuple(preds[0].shape)} of the student, {tuple(preds[1].shape)} of the teacher."
            )
        if label is not None and label.shape[1] == 1 and self.activation == "softmax":
            check_classes("label", label, max(channels, 2))
        if channels == 1 and self.classes != "all":
            raise ValueError(f"`classes` must be 'all' for predictions of one channel, got {self.classes!r}.")
        is_misread = label is not None and self.activation == "sigmoid" and label.shape[1] != channels
        if label is not None and is_misread and self._reads_label:
            raise ValueError(
                f"`label` must have a channel for each of {channels} classes that may be together, got "
                f"{tuple(label.shape)}."
            )
        if self._left and len(self.tap_pairs) == 2:
            for role, maps in enumerate((student, teacher)):
                self._check_head(maps, role)

    def _check_head(self, maps: Maps, role: int) -> None:
        """Refuse a teacher's head that does not read the layer; in a student in training there may be dropout."""
        name, pooled = ("student", "teacher")[role], self.task == "classification"
        tap, head, pred = self.tap[role], self.head[role], maps["pred"]
        weight = head_matrix(f"{name}[{head!r}]", maps[head])
        if tuple(weight.shape) != (expected := (pred.shape[1], maps[tap].shape[1])):
            raise ValueError(
                f"`head` must have shape {expected} in the {name}, classes by channels of {tap!r}, got {head!r} of "
                f"{tuple(weight.shape)}; tap the layer that the head reads."
            )
        if role and self.teacher_output == "probabilities":
            return
        off = head_mismatch(pred.flatten(1) if pooled else pred, maps[tap], weight, pooled)
        if off <= _MISMATCH:
            return
        text = (
            f"`head` must read {'the mean of `tap`' if pooled else '`tap`'} and nothing else, but the {name}'s "
            f"predictions differ from what {head!r} makes of {tap!r} by {off:.2g} of how they vary"
        )
        if role:
            raise ValueError(f"{text}; tap the layer that the head reads, behind its activation.")
        if self._left == _LOOKS:
            logger.warning("%s. Dropout between them does that; else tap the layer that the head reads.", text)


def _projector(channels: Sequence[int] | None, seed: int) -> nn.Conv2d | None:
    if channels is None:
        return None
    if len(channels) != 2 or min(channels) < 1:
        raise ValueError(f"`channels` must be [student, teacher] of the layer, got {channels!r}.")
    layer = pointwise_convolution(channels[0], channels[1], 2, torch.Generator().manual_seed(seed))
    assert isinstance(layer, nn.Conv2d)   # noqa: S101 - for mypy: the rank is 2
    return layer


def _present(label: Tensor, channels: int) -> Tensor:
    """Classes that occur in a label (B, 1, *S), or in that of classes that may be together (B, K, *S): (B, K), bool."""
    if label.shape[1] == channels:                                 # of one channel 1 is the class
        return (label > 0.5).flatten(2).any(2)
    flat = label.flatten(1)
    return torch.stack([(flat == index).any(1) for index in range(channels)], 1)


def _average(maps: Tensor, grid: Sequence[int], ignored: Tensor | None) -> Tensor:
    """Maps (B, C, *S) on another grid, each cell the mean of the part of it that counts."""
    counted = _share(ignored, maps)
    if counted is None or tuple(maps.shape[2:]) == tuple(grid):
        return pool_or_interpolate(maps, grid, "average")
    whole = pool_or_interpolate(counted, grid, "average")
    return pool_or_interpolate(maps * counted, grid, "average") / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _share(ignored: Tensor | None, maps: Tensor) -> Tensor | None:
    """How much of each cell of a grid counts, (B, 1, *S); None where all does."""
    if ignored is None:
        return None
    counted = (~on_grid(ignored, ignored.shape[2:])).to(maps.dtype)
    return pool_or_interpolate(counted, maps.shape[2:], "average")
