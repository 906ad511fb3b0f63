# SPDX-License-Identifier: Apache-2.0
"""Plain knowledge distillation: soft labels per voxel, the baseline every method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from torch import Tensor

from medkd.losses.base import DistillationLoss
from medkd.losses.predictions import Predictions, check_comparable
from medkd.ops.divergence import prediction_divergence
from medkd.ops.ignored import ignored_voxels
from medkd.ops.prediction import Activation, TeacherOutput
from medkd.ops.voxel_weight import VoxelWeighting, voxel_weight

__all__ = ["SoftLabelLoss"]


class SoftLabelLoss(DistillationLoss):
    """Kullback-Leibler divergence from the student's to the teacher's softened class probabilities.

    `T^2 * sum_v w_v KL(softmax(z^T_v / T) || softmax(z^S_v / T)) / sum_v w_v`; the factor T^2 keeps the gradient's
    size when T changes. Voxels with a negative label are ignored; of a case without a label every voxel counts. With
    `sigmoid`, for regions that overlap, it is the sum over regions of the divergences of two coins that show a voxel to
    be in the region, softened likewise. Of a classification, predictions (B, K), each sample counts as a voxel does; a
    temperature of 4 is usual there.

    Args:
        temperature: T, softens both distributions; above 0.
        weighting: `uniform`, as published, or `foreground`: by the teacher's foreground probability (ours; in CT
            the foreground is under 1 % of the voxels, and uniform weighting teaches air).
        floor: weight added to every voxel under `foreground`.
        activation: `softmax` for one class per voxel (one channel is a sigmoid output), or `sigmoid` for regions.
        teacher_output: `logits`, or `probabilities` of a teacher that ends in that activation; these are softened to
            p^(1/T), scaled to sum to 1. Outputs that are not what this says are refused in the first batches.

    Raises:
        ValueError: unknown option or wrong number; student and teacher of different grids or classes; probabilities in
            the place of logits, or the other way round; a label that is no class.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.

    Example:
        >>> import torch
        >>> loss = SoftLabelLoss(temperature=1.0)
        >>> student = torch.zeros(1, 2, 1, 1, requires_grad=True)
        >>> teacher = torch.tensor([0.0, 1.0]).log().clamp(min=-30).view(1, 2, 1, 1)
        >>> value = loss({"pred": student}, {"pred": teacher})["logits"]
        >>> value.backward()
        >>> round(value.item(), 4), student.grad.flatten().tolist()
        (0.6931, [0.5, -0.5])
    """

    terms = ("logits",)

    def __init__(
        self, temperature: float = 2.0, weighting: VoxelWeighting = "uniform", floor: float = 0.02,
        activation: Activation = "softmax", teacher_output: TeacherOutput = "logits",
    ) -> None:
        super().__init__()
        if temperature <= 0 or floor < 0:
            raise ValueError(f"`temperature` must be above 0 and `floor` not below, got {temperature} and {floor}.")
        if weighting not in get_args(VoxelWeighting):
            raise ValueError(f"`weighting` must be one of {get_args(VoxelWeighting)}, got {weighting!r}.")
        self.temperature = temperature
        self.weighting: VoxelWeighting = weighting
        self.floor = floor
        self.activation: Activation = activation
        self.teacher_output: TeacherOutput = teacher_output
        self._predictions = Predictions(activation, teacher_output)
        self.preset_weights = {"logits": 1.0}

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give `logits`; the labels tell which voxels are ignored."""
        if "logits" not in self.active_terms:
            return {}
        mine, other = student["pred"], teacher["pred"]
        check_comparable(mine, other)
        mine, other = self._predictions.student(mine), self._predictions.teacher(other)
        if label is not None and label.shape[1] == 1:
            self._predictions.classes(label, mine)
        divergence = prediction_divergence(mine, other, self.temperature, self.activation)
        ignored = ignored_voxels(label)
        weight = voxel_weight(other, self.weighting, self.floor, self.activation, ignored)   # (B, 1, *S), mean 1
        return {"logits": self.temperature**2 * (weight * divergence).mean()}
