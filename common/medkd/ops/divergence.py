# SPDX-License-Identifier: Apache-2.0
"""Kullback-Leibler divergence of two softened class distributions per voxel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.ops.prediction import Activation, log_probabilities, two_class_logits

__all__ = ["prediction_divergence", "softened_divergence"]


def prediction_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, activation: Activation = "softmax"
) -> Tensor:
    """The divergence of each voxel for what a network may predict: classes, one sigmoid channel, or regions.

    Args:
        student: logits, shape (B, K, *S), float32 or float64.
        teacher: likewise; never receives a gradient.
        temperature: T, above 0.
        activation: `softmax` (one channel is a sigmoid output); of `sigmoid` the sum over regions of the divergences
            of two coins that show a voxel to be in the region.

    Returns:
        Shape (B, 1, *S).
    """
    if activation == "softmax":
        return softened_divergence(two_class_logits(student), two_class_logits(teacher), temperature)
    soft, target = (log_probabilities(one / temperature, activation) for one in (student, teacher.detach()))
    return F.kl_div(soft, target, reduction="none", log_target=True).sum(1, keepdim=True)


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of each voxel.

    Args:
        student: logits, shape (B, K, *S), K at least 2, float32 or float64.
        teacher: likewise; never receives a gradient.
        temperature: T, above 0.

    Returns:
        Shape (B, 1, *S). Kept for backward is one map of the size of the student's; exactly 0 where both are equal.

    Example:
        >>> teacher = torch.tensor([0.8, 0.2]).log().reshape(1, 2, 1, 1)
        >>> round(softened_divergence(torch.zeros(1, 2, 1, 1), teacher).item(), 4)
        0.1927
    """
    return _SoftenedDivergence.apply(student, teacher.detach(), temperature)   # type: ignore[no-any-return, no-untyped-call]


class _SoftenedDivergence(torch.autograd.Function):
    """With both normalizers, sum_c q_c (log q_c - log p_c) is sum_c q_c (t_c - s_c) / T and their difference."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        mine, other = (maps.contiguous() / temperature for maps in (student, teacher))   # softmax gives them so
        chances, wanted = F.softmax(mine, dim=1), F.softmax(other, dim=1)
        normalizers = _log_normalizer(mine, chances) - _log_normalizer(other, wanted)
        divergence = other.sub_(mine).mul_(wanted).sum(1, keepdim=True).add_(normalizers)
        ctx.save_for_backward(chances.sub_(wanted))
        ctx.temperature = temperature
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (grad / ctx.temperature), None, None


def _log_normalizer(logits: Tensor, chances: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials: the likeliest class has at least 1 / K, so its logarithm is safe."""
    return logits.amax(1, keepdim=True) - chances.amax(1, keepdim=True).log()
