# SPDX-License-Identifier: Apache-2.0
"""Class probabilities in 8 bits per class and voxel, fine where distillation looks: near 1 and in the tails."""

from __future__ import annotations

import torch
from torch import Tensor

from medkd.ops.prediction import Activation

__all__ = ["complete", "pack_probabilities", "unpack_probabilities"]

_DEEPEST = 16.0            # nats; less likely than exp(-16), about 1e-7, is as good as impossible
_STEPS = 255


def pack_probabilities(probabilities: Tensor, activation: Activation = "softmax") -> Tensor:
    """Store probabilities in 8 bits: log p, of regions the logit, in steps that grow with the root of its size.

    Args:
        probabilities: shape (K, *S), range [0, 1]; a single channel is that of a sigmoid.
        activation: `softmax`, one class per voxel, or `sigmoid`, regions that may overlap.

    Returns:
        Same shape, uint8; 0 stands for "impossible".

    Example:
        >>> packed = pack_probabilities(torch.tensor([[0.9], [0.099], [0.001]]))
        >>> [round(value, 3) for value in unpack_probabilities(packed).flatten().tolist()]
        [0.9, 0.099, 0.001]
    """
    if _is_coin(probabilities, activation):
        logits = probabilities.logit(eps=1e-7).clamp(-_DEEPEST, _DEEPEST)
        share = 0.5 + 0.5 * logits.sign() * (logits.abs() / _DEEPEST).sqrt()
    else:
        share = 1.0 - (-probabilities.log() / _DEEPEST).clamp(0.0, 1.0).sqrt()
    return (share * _STEPS).round().to(torch.uint8)


def unpack_probabilities(packed: Tensor, activation: Activation = "softmax") -> Tensor:
    """Give the probabilities back: off by at most 0.01 each, and by 6 % of their odds in the tails.

    Args:
        packed: of `pack_probabilities`; voxels that are 0 in each class, as padding leaves them, become background.
        activation: what they were packed with.

    Returns:
        Same shape, float32; of classes they sum to 1.
    """
    share = torch.arange(_STEPS + 1, device=packed.device) / _STEPS
    is_coin = _is_coin(packed, activation)
    if is_coin:
        side = 2.0 * share - 1.0
        table = (side.sign() * side.square() * _DEEPEST).sigmoid()
    else:
        table = (-_DEEPEST * (1.0 - share).square()).exp()
    values = table.index_select(0, packed.flatten().int()).view(packed.shape)   # 30 times as fast as to work them out
    if is_coin:
        return values
    total = values.sum(0, keepdim=True)
    return complete(torch.where(total > 0.5, values / total, 0.0), 0)


def complete(probabilities: Tensor, axis: int = 1) -> Tensor:
    """Give what the classes of a voxel lack to 1 to the background, class 0, as where an image was moved out of view.

    Example:
        >>> complete(torch.tensor([[0.25, 0.5], [0.0, 0.0]])).tolist()
        [[0.5, 0.5], [1.0, 0.0]]
    """
    result = probabilities.clone()
    result.select(axis, 0).add_((1.0 - probabilities.sum(axis)).clamp(min=0.0))
    return result


def _is_coin(values: Tensor, activation: Activation) -> bool:
    return activation == "sigmoid" or len(values) == 1
