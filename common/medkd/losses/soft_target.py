# SPDX-License-Identifier: Apache-2.0
"""The supervised loss with the teacher in the place of the label: Dice and cross entropy on its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from medkd.checks import check_classes, check_same_grid
from medkd.losses.base import DistillationLoss
from medkd.losses.predictions import Predictions, check_comparable
from medkd.ops.ignored import ignored_voxels, on_grid
from medkd.ops.overlap import ClassSums, class_sums
from medkd.ops.prediction import Activation, TeacherOutput, largest_channel

__all__ = ["SoftTarget", "SoftTargetLoss"]

SoftTarget = Literal["argmax", "probabilities"]
_SMOOTH = 1e-5                                                     # as in MONAI; a class that neither has is no error


class SoftTargetLoss(DistillationLoss):
    """Dice and cross entropy against the teacher's prediction, on the scale of the supervised loss.

    `lambda_dice (1 - mean_c (2 sum_v p t + s) / (sum_v p + sum_v t + s)) + lambda_ce mean_v (-sum_c t log p)` with the
    student's probabilities p, the target t, and s = 1e-5: what `monai.losses.DiceCELoss` gives for this target, in a
    fraction of its time. So weight 1 makes the teacher count as much as a label does. It reads `pred` alone, and needs
    no label: cases without one count wholly. Voxels with a negative label are left out, as if they were not there.

    Cross entropy with probabilities is least where the student has the teacher's, with their entropy as its value; the
    Dice part in this form rewards certainty, as its least value lies at the teacher's likeliest class.

    Args:
        target: `argmax`, the teacher's likeliest class (of regions: those likelier than not), or its `probabilities`.
        include_background: whether channel 0 is in the Dice part; cross entropy always has it. None takes it in for
            `sigmoid`, whose channels are regions, and leaves it out for `softmax`. A single channel is always in.
        batch: sums of the Dice part run over all samples of the batch; false averages over samples instead.
        lambda_dice: weight of the Dice part, at least 0.
        lambda_ce: weight of the cross entropy, at least 0; for `sigmoid` the binary one, a mean over regions too.
        activation: `softmax` for one class per voxel (one channel is a sigmoid output), or `sigmoid` for regions.
        teacher_output: `logits`, or `probabilities` of a teacher that ends in that activation. Outputs that are not
            what this says are refused in the first batches.

    Raises:
        ValueError: unknown option or negative weight; student and teacher of different grids or classes; probabilities
            in the place of logits, or the other way round; a label that is no class.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2; Dice with the sums of
        the whole batch as in Isensee et al., nnU-Net, arXiv 1904.08128.

    Example:
        >>> import torch
        >>> loss = SoftTargetLoss(lambda_dice=0.0)
        >>> student = torch.zeros(1, 2, 1, 1, requires_grad=True)
        >>> value = loss({"pred": student}, {"pred": torch.tensor([-2.0, 2.0]).view(1, 2, 1, 1)})["soft_target"]
        >>> value.backward()
        >>> round(value.item(), 4), student.grad.flatten().tolist()
        (0.6931, [0.5, -0.5])
    """

    terms = ("soft_target",)

    def __init__(
        self, target: SoftTarget = "argmax", include_background: bool | None = None, batch: bool = True,
        lambda_dice: float = 1.0, lambda_ce: float = 1.0, activation: Activation = "softmax",
        teacher_output: TeacherOutput = "logits",
    ) -> None:
        super().__init__()
        if target not in get_args(SoftTarget):
            raise ValueError(f"`target` must be one of {get_args(SoftTarget)}, got {target!r}.")
        if lambda_dice < 0 or lambda_ce < 0 or lambda_dice + lambda_ce == 0:
            raise ValueError(
                f"`lambda_dice` and `lambda_ce` must be at least 0, and one above, got {lambda_dice} and {lambda_ce}."
            )
        self.target: SoftTarget = target
        self.include_background = include_background
        self.batch = batch
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce
        self.activation: Activation = activation
        self.teacher_output: TeacherOutput = teacher_output
        self._predictions = Predictions(activation, teacher_output)
        self.preset_weights = {"soft_target": 1.0}
        self.reads_classes = target == "argmax" and activation == "softmax"

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give `soft_target`; the labels tell which voxels are ignored, without them none is."""
        if "soft_target" not in self.active_terms:
            return {}
        mine = student["pred"]
        if (classes := teacher.get("classes")) is None:
            check_comparable(mine, teacher["pred"])
        else:
            check_same_grid("student['pred']", mine, "teacher['classes']", classes)
            check_classes("teacher['classes']", classes, max(mine.shape[1], 2))
        mine = self._predictions.student(mine)
        if label is not None and label.shape[1] == 1:
            self._predictions.classes(label, mine)
        ignored = ignored_voxels(label)
        counted = None if ignored is None else ~on_grid(ignored, mine.shape[2:])
        is_coin = self.activation == "sigmoid" or mine.shape[1] == 1
        target = self._target(teacher["pred"], is_coin) if classes is None else classes
        sums = class_sums(mine, target, counted, "sigmoid" if is_coin else "softmax")
        return {"soft_target": self._value(sums, is_coin)}

    def _target(self, pred: Tensor, is_coin: bool) -> Tensor:
        if self.target == "probabilities":
            return self._predictions.teacher_probabilities(pred)
        self._predictions.check_teacher(pred)
        if is_coin:
            return pred > (0.0 if self._predictions.teacher_output == "logits" else 0.5)
        return largest_channel(pred)

    def _value(self, sums: ClassSums, is_coin: bool) -> Tensor:
        """Mean over samples of each one's loss, or that of all as one; voxels that are ignored are not there."""
        entropy, voxels = sums.entropy, sums.voxels
        overlap, both = sums.overlap, sums.predicted + sums.target                   # (B, K)
        channels = both.shape[1]
        include = is_coin if self.include_background is None else self.include_background
        if not include and channels > 1:
            overlap, both = overlap[:, 1:], both[:, 1:]
        if self.batch:
            entropy, voxels, overlap, both = (one.sum(0, keepdim=True) for one in (entropy, voxels, overlap, both))
        dice = 1.0 - ((2.0 * overlap + _SMOOTH) / (both + _SMOOTH)).mean(1)          # 0 of a sample without a voxel
        entropy = entropy / (voxels.clamp(min=1) * (channels if is_coin else 1))
        return (self.lambda_dice * dice + self.lambda_ce * entropy).sum() / (voxels > 0).sum().clamp(min=1)
