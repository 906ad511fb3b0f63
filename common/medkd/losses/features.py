# SPDX-License-Identifier: Apache-2.0
"""Hints: the student's features, projected by a learned 1 x 1 convolution, imitate the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast, get_args

import torch
from torch import Tensor, nn

from medkd.checks import check_maps
from medkd.losses.base import DistillationLoss, pointwise_convolution, tap_pairs
from medkd.losses.predictions import Predictions
from medkd.ops.ignored import ignored_voxels
from medkd.ops.prediction import Activation, TeacherOutput
from medkd.ops.resample import pool_average
from medkd.ops.voxel_weight import VoxelWeighting, voxel_weight

__all__ = ["HintLoss"]


class HintLoss(DistillationLoss):
    """Mean squared error between projected student features and teacher features, averaged over the layers.

    The projector is a part of the loss: add its parameters to the optimizer. Its first values come from a generator
    of its own, so building the loss leaves the global generators untouched.

    Args:
        taps: layer paths, or pairs `[student path, teacher path]`.
        channels: `[C_S, C_T]` per tap.
        spatial_dims: 2 or 3.
        weighting: `uniform`, as published, or `foreground`: voxels by the teacher's foreground probability, averaged
            over the block that a feature voxel stands for (ours).
        seed: of the projector's first values.
        activation: what the teacher's prediction is read with under `foreground`, as in `SoftLabelLoss`.
        teacher_output: likewise.

    Voxels with a negative label are ignored: a feature voxel weighs as much as the part of its block that is not. Of a
    case without a label every voxel counts.

    Raises:
        ValueError: as many `channels` as `taps` are needed; features of other channel numbers than promised.

    Reference:
        Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550, equation 3.

    Example:
        >>> loss = HintLoss(["e"], [[2, 4]], spatial_dims=2)
        >>> student, teacher = torch.ones(1, 2, 4, 4), torch.ones(1, 4, 4, 4)
        >>> value = loss({"e": student, "pred": student}, {"e": teacher, "pred": teacher})["features"]
        >>> value.backward()
        >>> loss.projectors[0].weight.grad.shape
        torch.Size([4, 2, 1, 1])
    """

    terms = ("features",)

    def __init__(
        self,
        taps: Sequence[str | Sequence[str]],
        channels: Sequence[Sequence[int]],
        spatial_dims: int = 3,
        weighting: VoxelWeighting = "uniform",
        seed: int = 0,
        activation: Activation = "softmax",
        teacher_output: TeacherOutput = "logits",
    ) -> None:
        super().__init__(tap_pairs(taps, "taps"))
        if len(channels) != len(self.tap_pairs) or any(len(pair) != 2 for pair in channels):
            raise ValueError(
                f"`channels` must give [student, teacher] for each of {len(self.tap_pairs)} taps, got {channels!r}."
            )
        if weighting not in get_args(VoxelWeighting):
            raise ValueError(f"`weighting` must be one of {get_args(VoxelWeighting)}, got {weighting!r}.")
        if spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims}.")
        self.weighting: VoxelWeighting = weighting
        self.activation: Activation = activation
        self._predictions = Predictions(activation, teacher_output)
        self.preset_weights = {"features": 1.0}
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleList(
            pointwise_convolution(c_s, c_t, spatial_dims, generator) for c_s, c_t in channels
        )

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give `features`; the labels tell which voxels are ignored."""
        if "features" not in self.active_terms:
            return {}
        pred = teacher["pred"] if self.weighting == "uniform" else self._predictions.teacher(teacher["pred"])
        weight = voxel_weight(pred, self.weighting, activation=self.activation, ignored=ignored_voxels(label))
        errors = [
            self._error(cast(nn.Conv3d, projector), student[s], teacher[t], weight, (s, t))
            for projector, (s, t) in zip(self.projectors, self.tap_pairs, strict=True)
        ]
        return {"features": torch.stack(errors).mean()}

    def _error(
        self, projector: nn.Conv2d | nn.Conv3d, student: Tensor, teacher: Tensor, weight: Tensor, names: tuple[str, str]
    ) -> Tensor:
        check_maps(f"student[{names[0]!r}]", student)
        expected = (projector.in_channels, projector.out_channels)
        if (student.shape[1], teacher.shape[1]) != expected:
            raise ValueError(
                f"`channels` of taps {names} must be {[student.shape[1], teacher.shape[1]]}, got {list(expected)}."
            )
        grid = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
        difference = projector(pool_average(student, grid)) - pool_average(teacher, grid)   # (B, C_T, *grid)
        error: Tensor = (pool_average(weight, grid) * difference.square().mean(1, keepdim=True)).mean()
        return error
