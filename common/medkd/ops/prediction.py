# SPDX-License-Identifier: Apache-2.0
"""What a network's output stands for: logits or probabilities, of one class per voxel or of regions that overlap."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Activation", "TeacherOutput", "as_map", "foreground_probability", "hard_labels", "largest_channel",
    "log_probabilities", "logits_of", "probabilities", "region_codes", "two_class_logits",
]

Activation = Literal["softmax", "sigmoid"]
TeacherOutput = Literal["logits", "probabilities"]
_CERTAIN = 1e-7                                                    # float32 does not tell 1 from what is nearer to it


def as_map(values: Tensor, rank: int) -> Tensor:
    """Give what is said of whole images, classes (B,) or predictions (B, K), as maps of one voxel; maps stay.

    Args:
        values: shape (B,), (B, K) or (B, K, *S).
        rank: number of spatial axes of the result.

    Example:
        >>> as_map(torch.zeros(4, 3), 2).shape, as_map(torch.zeros(4), 3).shape
        (torch.Size([4, 3, 1, 1]), torch.Size([4, 1, 1, 1, 1]))
    """
    if values.dim() > 2:
        return values
    return values.reshape(len(values), -1, *[1] * rank)


def two_class_logits(logits: Tensor) -> Tensor:
    """Give a one-channel (sigmoid) output its background channel, so that softmax equals (1 - p, p)."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def logits_of(probabilities: Tensor, activation: Activation = "softmax") -> Tensor:
    """Logits whose activation gives these probabilities, so that dividing by a temperature softens them as usual.

    Args:
        probabilities: shape (B, K, *S), range [0, 1]; one channel is that of a sigmoid.
        activation: what made them.

    Returns:
        Same shape, log p, or log p - log(1 - p) of a sigmoid; p is kept 1e-7 away from 0, and there from 1.

    Example:
        >>> logits_of(torch.tensor([[[0.25]], [[0.5]]]).view(2, 1, 1, 1), "sigmoid").flatten().tolist()
        [-1.0986123085021973, 0.0]
    """
    if activation == "sigmoid" or probabilities.shape[1] == 1:
        return probabilities.logit(eps=_CERTAIN)
    return probabilities.clamp(min=_CERTAIN).log()


def log_probabilities(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """Log probabilities of the classes; of regions those of "is not" and "is" for each.

    Args:
        logits: shape (B, K, *S); one channel is a sigmoid output.
        activation: `softmax` or `sigmoid`.

    Returns:
        Shape (B, max(K, 2), *S), or (B, 2 K, *S) of regions: the divergences of K coins are added up over channels.
    """
    if activation == "sigmoid":
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)
    return F.log_softmax(two_class_logits(logits), dim=1)


def probabilities(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """The same without the logarithm."""
    if activation == "sigmoid":
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], dim=1)
    return F.softmax(two_class_logits(logits), dim=1)


def foreground_probability(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """How likely a voxel is no background, shape (B, 1, *S); of regions the probability of the likeliest one.

    Args:
        logits: shape (B, K, *S), channel 0 is background unless these are regions; one channel is a sigmoid output.
        activation: `softmax` or `sigmoid`.

    Example:
        >>> foreground_probability(torch.tensor([[[0.0]], [[0.0]]]).view(1, 2, 1, 1)).item()
        0.5
    """
    if activation == "sigmoid":
        return logits.sigmoid().amax(1, keepdim=True)
    return 1.0 - F.softmax(two_class_logits(logits), dim=1)[:, :1]


def hard_labels(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """Class of each voxel, shape (B, 1, *S), int64; of regions the code of those that are likelier than not."""
    if activation == "sigmoid":
        return region_codes(logits > 0)
    return largest_channel(two_class_logits(logits))


def largest_channel(maps: Tensor) -> Tensor:
    """Index of the largest channel of each voxel, the first of equal ones.

    Args:
        maps: shape (B, K, *S).

    Returns:
        Shape (B, 1, *S), int64. On a CPU channel by channel, 4 x as fast as torch's argmax over a middle axis.

    Example:
        >>> largest_channel(torch.tensor([[[[1.0, 2.0]], [[1.0, 5.0]]]])).flatten().tolist()
        [0, 1]
    """
    if maps.device.type != "cpu":
        return maps.max(dim=1, keepdim=True).indices
    best = maps[:, :1]
    index = torch.zeros_like(best, dtype=torch.uint8 if maps.shape[1] <= 256 else torch.int32)
    for channel in range(1, maps.shape[1]):
        other = maps[:, channel : channel + 1]
        index = torch.maximum(index, (other > best).to(index.dtype).mul_(channel))
        best = torch.maximum(best, other)
    return index.long()


def region_codes(regions: Tensor) -> Tensor:
    """Number the combinations of regions that occur: voxels of one combination have one number, from 0 on.

    A combination is a class, where relations between voxels are meant: regions that overlap have no classes.

    Args:
        regions: shape (B, K, *S), a region where above 0.5; a negative value in any channel is an unknown voxel.

    Returns:
        Shape (B, 1, *S), int64; -1 for unknown voxels.

    Example:
        >>> region_codes(torch.tensor([[[[0.0, 1.0, 1.0, -1.0]], [[0.0, 0.0, 1.0, -1.0]]]])).flatten().tolist()
        [0, 1, 2, -1]
    """
    bits = (1 << torch.arange(regions.shape[1], device=regions.device)).view(1, -1, *[1] * (regions.dim() - 2))
    codes = ((regions > 0.5) * bits).sum(1, keepdim=True)
    numbers: Tensor = torch.unique(codes, return_inverse=True)[1]
    if regions.dtype == torch.bool:
        return numbers
    return torch.where((regions < 0).any(1, keepdim=True), -1, numbers)
