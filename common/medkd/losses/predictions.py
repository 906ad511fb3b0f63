# SPDX-License-Identifier: Apache-2.0
"""Both networks' predictions as logits, and a sentence where they are not what they are said to be."""

from __future__ import annotations

import logging
from typing import get_args

import torch.nn.functional as F
from torch import Tensor

from medkd.checks import check_classes, check_maps, check_same_grid
from medkd.ops.prediction import Activation, TeacherOutput, logits_of, region_codes

__all__ = ["Predictions", "check_comparable"]

_NEAR = 0.05                                                       # so near to 0 and to 1 are certain probabilities
logger = logging.getLogger(__name__)
_LOGITS_WAY_OUT = "let the network give logits, without its last activation"


class Predictions:
    """Reads `pred` of student and teacher for a loss that needs logits.

    A softmax of probabilities is nearly uniform and teaches nothing, so outputs are looked at in the first batches,
    until one is outside of [0, 1]: logits do not sum to 1.

    Args:
        activation: `softmax`, one class per voxel (or one sigmoid channel), or `sigmoid`, regions that may overlap.
        teacher_output: `logits`, or `probabilities` of a teacher whose last layer is that activation.
        batches: how many are looked at, for each network.

    Raises:
        ValueError: unknown option.
    """

    def __init__(
        self, activation: Activation = "softmax", teacher_output: TeacherOutput = "logits", batches: int = 8
    ) -> None:
        for name, value, known in (
            ("activation", activation, get_args(Activation)),
            ("teacher_output", teacher_output, get_args(TeacherOutput)),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")
        self.activation: Activation = activation
        self.teacher_output: TeacherOutput = teacher_output
        self._left = {"student": batches, "teacher": batches}

    def student(self, pred: Tensor) -> Tensor:
        """Give the student's logits.

        Raises:
            ValueError: they are probabilities.
        """
        self._refuse_probabilities("student", pred, _LOGITS_WAY_OUT)
        return pred

    def teacher(self, pred: Tensor) -> Tensor:
        """Give the teacher's logits.

        Raises:
            ValueError: they are probabilities but are not said to be, or the other way round.
        """
        self.check_teacher(pred)
        return pred if self.teacher_output == "logits" else logits_of(pred, self.activation)

    def teacher_probabilities(self, pred: Tensor) -> Tensor:
        """Give the teacher's probabilities, of the shape of `pred`.

        Raises:
            ValueError: as in `teacher`.
        """
        self.check_teacher(pred)
        if self.teacher_output == "probabilities":
            return pred
        return pred.sigmoid() if self.activation == "sigmoid" or pred.shape[1] == 1 else F.softmax(pred, dim=1)

    def check_teacher(self, pred: Tensor) -> None:
        """Look at the first batches of the teacher.

        Raises:
            ValueError: as in `teacher`.
        """
        if self.teacher_output == "logits":
            way_out = f"{_LOGITS_WAY_OUT}, or give the loss `teacher_output` 'probabilities'"
            self._refuse_probabilities("teacher", pred, way_out)
        elif self._left["teacher"]:
            self._left["teacher"] -= 1
            self._refuse_logits(pred)

    def classes(self, label: Tensor, pred: Tensor) -> Tensor:
        """Give class indices of a label; of regions (B, K, *S) a class for each combination.

        Raises:
            ValueError: a label that has no class.
        """
        if self.activation == "sigmoid":
            return region_codes(label) if label.shape[1] == pred.shape[1] > 1 else label
        check_classes("label", label, max(pred.shape[1], 2))
        return label

    def _refuse_probabilities(self, role: str, pred: Tensor, way_out: str) -> None:
        if not self._left[role] or not pred.numel():
            return
        self._left[role] -= 1
        low, high = (float(value) for value in pred.detach().aminmax())
        if low < -1e-3 or high > 1.0 + 1e-3:
            self._left[role] = 0                                   # logits, beyond doubt
        elif self.activation == "softmax" and pred.shape[1] > 1:
            if _sums_to_one(pred):
                self._refuse(role, "values within [0, 1] that sum to 1 over the channels, as after a softmax", way_out)
            if _mostly_certain(pred):
                way_out += " and, for regions that overlap, `activation` 'sigmoid'"
                self._refuse(role, "values within [0, 1], most of them near 0 or 1, as after a sigmoid", way_out)
        elif low < _NEAR and high > 1.0 - _NEAR:
            self._refuse(role, "values within [0, 1] from near 0 to near 1, as after a sigmoid", way_out)
        if self._left[role] == 0 and -1e-3 <= low < high <= 1.0 + 1e-3:
            logger.warning(
                "All values of `%s['pred']` lie within [0, 1] so far, from %.3g to %.3g in the last batch; if they are "
                "probabilities, %s.", role, low, high, way_out,
            )

    def _refuse(self, role: str, found: str, way_out: str) -> None:
        raise ValueError(
            f"`{role}['pred']` must hold logits, got {found}: activated once more they are nearly uniform and teach "
            f"nothing; {way_out}."
        )

    def _refuse_logits(self, pred: Tensor) -> None:
        low, high = (float(value) for value in pred.detach().aminmax())
        has_classes = self.activation == "softmax" and pred.shape[1] > 1
        if low < -1e-3 or high > 1.0 + 1e-3 or (has_classes and not _sums_to_one(pred)):
            what = "sum to 1 over the channels" if has_classes else "lie within [0, 1]"
            raise ValueError(
                f"`teacher['pred']` must hold probabilities that {what}, got values from {low:.4g} to {high:.4g}; "
                "give `teacher_output` 'logits', or `activation` 'sigmoid' for regions that overlap."
            )


def check_comparable(student: Tensor, teacher: Tensor) -> None:
    """Refuse predictions that cannot be compared voxel by voxel and class by class.

    Raises:
        ValueError: other grids, or numbers of classes.
    """
    check_maps("student['pred']", student)
    check_same_grid("student['pred']", student, "teacher['pred']", teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"`student['pred']` must have the teacher's {teacher.shape[1]} classes, got {student.shape[1]}."
        )


def _sums_to_one(pred: Tensor) -> bool:
    return bool((pred.detach().sum(1) - 1.0).abs().max() < 0.02)   # also when they came in half precision


def _mostly_certain(pred: Tensor) -> bool:
    low, high = pred.detach() < _NEAR, pred.detach() > 1.0 - _NEAR
    return bool((low | high).float().mean() > 0.5) and bool(low.any()) and bool(high.any())
