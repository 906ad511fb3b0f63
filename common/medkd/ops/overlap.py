# SPDX-License-Identifier: Apache-2.0
"""What Dice and cross entropy need of a prediction and a target: a few sums per class, and their gradient in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.ops.prediction import Activation

__all__ = ["ClassSums", "class_sums"]


@dataclass(frozen=True)
class ClassSums:
    """Sums over the voxels that count, of each sample.

    Attributes:
        entropy: cross entropy of the prediction with the target; of regions the binary one, summed over them. (B,).
        overlap: product of predicted probability and target. (B, K).
        predicted: predicted probability. (B, K).
        target: target; without gradient. (B, K).
        voxels: how many count. (B,), int64.
    """

    entropy: Tensor
    overlap: Tensor
    predicted: Tensor
    target: Tensor
    voxels: Tensor


def class_sums(
    logits: Tensor, target: Tensor, counted: Tensor | None = None, activation: Activation = "softmax"
) -> ClassSums:
    """Sum up a prediction against a target, class by class.

    Args:
        logits: shape (B, K, *S), float32 or float64.
        target: class indices (B, 1, *S), int64, all of them from 0 to K - 1; or probabilities (B, K, *S), floating.
            Never receives a gradient. One channel and `sigmoid` take probabilities alone.
        counted: voxels that count, shape (B, 1, *S), bool; None for all.
        activation: `softmax`, one class per voxel, or `sigmoid`, each channel a region of its own.

    Returns:
        The sums, attached to the graph of `logits`. Kept for backward are the probabilities and the target; autograd
        would keep the maps of each step.

    Example:
        >>> sums = class_sums(torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]]]]))
        >>> sums.overlap.tolist(), sums.predicted.tolist(), sums.target.tolist()
        ([[0.5, 0.5]], [[1.0, 1.0]], [[1.0, 1.0]])
    """
    flat = logits.flatten(2).contiguous()                          # (B, K, N); over channels last all of this is slow
    wanted = target.detach().flatten(2)
    mask = None if counted is None else counted.flatten(2)
    voxels = flat.new_full((len(flat),), flat.shape[2], dtype=torch.int64) if mask is None else mask.sum((1, 2))
    if activation == "sigmoid":
        return ClassSums(*_of_regions(flat, wanted.to(flat), mask), voxels)
    if wanted.is_floating_point():
        wanted = wanted.to(flat)
        expected = (wanted if mask is None else wanted * mask).sum(2)
    else:
        wanted = wanted[:, 0]
        expected = _by_class(wanted, None if mask is None else mask[:, 0].to(flat), flat)
    entropy, overlap, predicted = _SoftmaxSums.apply(flat, wanted, mask)   # type: ignore[no-untyped-call]
    return ClassSums(entropy, overlap, predicted, expected, voxels)


def _of_regions(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = None if mask is None else mask.to(logits)             # (B, 1, N)
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none").sum((1, 2))
    predicted = logits.sigmoid()
    if weight is not None:
        predicted, target = predicted * weight, target * weight
    return entropy, (predicted * target).sum(2), predicted.sum(2), target.sum(2)


def _by_class(index: Tensor, values: Tensor | None, like: Tensor) -> Tensor:
    """Sums of values (B, N), or counts, of each class; (B, K)."""
    batch, classes = like.shape[:2]
    numbers = torch.arange(max(batch, classes), device=index.device)
    if index.device.type != "cpu":                                 # where bincount adds in an order of chance
        found = index.unsqueeze(1) == numbers[:classes].reshape(1, -1, 1)            # (B, K, N)
        return (found.to(like) if values is None else found * values.unsqueeze(1)).sum(2)
    places = index + classes * numbers[:batch].unsqueeze(1)
    weights = None if values is None else values.flatten()
    return torch.bincount(places.flatten(), weights, batch * classes).reshape(batch, classes).to(like)


class _SoftmaxSums(torch.autograd.Function):
    """Entropy, overlap and prediction of one class per voxel; logits (B, K, N), target (B, N) or (B, K, N).

    With t the slope with respect to the log probabilities, that of the logits is t - p sum(t).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        chances = F.softmax(logits, dim=1)
        scale = logits.amax(1) - chances.amax(1).log()             # log of the sum of exponentials; p >= 1 / K there
        if target.is_floating_point():
            seen = target if mask is None else target * mask
            entropy = (seen.sum(1) * scale).sum(1) - (seen * logits).sum((1, 2))
            overlap = (seen * chances).sum(2)
        else:
            hit = logits.gather(1, target.unsqueeze(1))[:, 0] - scale   # (B, N), log probability of the class wanted
            entropy = -(hit if mask is None else hit.masked_fill(~mask[:, 0], 0.0)).sum(1)
            hit = hit.exp_() if mask is None else hit.exp_() * mask[:, 0]
            overlap = _by_class(target, hit, logits)
        ctx.save_for_backward(chances, target, mask)
        return entropy, overlap, (chances if mask is None else chances * mask).sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, entropy: Tensor, overlap: Tensor, predicted: Tensor) -> tuple[Tensor, None, None]:
        chances, target, mask = ctx.saved_tensors
        if target.is_floating_point():
            slope = torch.addcmul(predicted.unsqueeze(2), target, overlap.unsqueeze(2)).mul_(chances)
            slope.addcmul_(target, entropy.reshape(-1, 1, 1), value=-1.0)
            grad = slope.addcmul_(chances, slope.sum(1, keepdim=True), value=-1.0)
        else:                                                      # t is p times `predicted`, and more at one class
            place = target.unsqueeze(1)
            pull = chances.gather(1, place).mul_(overlap.gather(1, target).unsqueeze(1)).sub_(entropy.reshape(-1, 1, 1))
            total = torch.bmm(predicted.unsqueeze(1), chances).add_(pull)          # sum(t), (B, 1, N)
            grad = (predicted.unsqueeze(2) - total).mul_(chances).scatter_add_(1, place, pull)
        return (grad if mask is None else grad.mul_(mask)), None, None
