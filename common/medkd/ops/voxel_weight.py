# SPDX-License-Identifier: Apache-2.0
"""Weights that let voxel-wise terms look at the organs instead of the air around them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medkd.ops.ignored import on_grid
from medkd.ops.prediction import Activation, foreground_probability

__all__ = ["VoxelWeighting", "voxel_weight"]

VoxelWeighting = Literal["uniform", "foreground"]


def voxel_weight(
    teacher_logits: Tensor, weighting: VoxelWeighting, floor: float = 0.02, activation: Activation = "softmax",
    ignored: Tensor | None = None,
) -> Tensor:
    """Weight voxels alike, or by the teacher's foreground probability.

    In CT the foreground is often under 1 % of the voxels: averaged uniformly, a voxel-wise term teaches air.

    Args:
        teacher_logits: shape (B, K, *S), channel 0 is background; one channel is a sigmoid output.
        weighting: `uniform`, or `foreground` for `1 - p(background) + floor`.
        floor: weight of certain background; keeps the teacher's silence part of the lesson.
        activation: `sigmoid` when the channels are regions that may overlap and none is background; the foreground
            probability is then that of the likeliest one.
        ignored: voxels that weigh nothing, shape (B, C, *s), bool, of any grid; None for none.

    Returns:
        Weights of shape (B, 1, *S), float32, with mean 1 over the batch.

    Reference:
        Ours; see the results protocol of the bundles' README.
    """
    if weighting == "uniform":
        weight = torch.ones_like(teacher_logits[:, :1], dtype=torch.float32)
        if ignored is None:
            return weight
    else:
        weight = foreground_probability(teacher_logits.float(), activation) + floor
    if ignored is not None:
        weight = weight.masked_fill(on_grid(ignored, weight.shape[2:]), 0.0)
    return weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)   # all zero under a floor of 0: stays zero
