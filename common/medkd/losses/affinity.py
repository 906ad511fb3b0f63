# SPDX-License-Identifier: Apache-2.0
"""Supervised loss of networks that give embeddings: their affinities against those of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medkd.ops.embedding import (
    AffinityBalance,
    BackgroundPairs,
    background_cosine,
    checked_pair_options,
    offset_affinity,
    weighted_targets,
)
from medkd.ops.ignored import ignored_voxels, labeled_samples
from medkd.ops.instances import instance_numbers
from medkd.ops.precision import at_least_float32

__all__ = ["AffinityLoss"]


class AffinityLoss(nn.Module):
    """Squared difference of the cosines of embeddings at offsets from 0 (two instances) or 1 (one), class-balanced.

    A sum over offsets of means over voxels. Embeddings of two instances are driven to be orthogonal, not opposite.

    Args:
        offsets: steps in voxels along the axes, one vector per affinity, as in `medkd.ops.embedding.offset_affinity`.
        background: `same`: background is one more object; `different`: a pair with background has target 0. None takes
            `same` in 2-D and `different` in 3-D, as the paper's code does.
        balance: weights of the rarer target by its share in the `sample` (2-D code), in each `channel` of it (3-D
            code), or `none`. None takes that of the rank.
        widen: make background of the voxels next to a border between instances first, see `widen_borders`.
        background_weight: also drive the embeddings of the background along the first axis of the embedding space and
            all others off it, which gives the network a foreground without a head of its own (ours): so many times the
            mean squared difference of the cosine with that axis from 1 or 0. The cosine is then the probability of
            background.

    Shape:
        embeddings (B, C, *S), floating; label (B, 1, *S), instance numbers, 0 is background, negative is ignored: pairs
        with such a voxel do not count, and means are over what is left. Samples without a label are left out first: the
        loss is that of the others alone, and 0 where there are none. Result: a scalar, float32.

    Raises:
        ValueError: unknown option, offsets of another rank than the embeddings, labels that are not whole numbers.

    Reference:
        Liu et al., Graph Relation Distillation, arXiv 2401.06370, L_aff. As in its code, the mean is over all voxels in
        2-D (pairs that leave the image add 0) and over the pairs inside in 3-D.

    Example:
        >>> loss = AffinityLoss([(0, -1)], balance="none")
        >>> embeddings = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
        >>> loss(embeddings, torch.tensor([[[[1, 1, 2, 2]]]])).item()
        0.5
    """

    def __init__(
        self,
        offsets: Sequence[Sequence[int]],
        background: BackgroundPairs | None = None,
        balance: AffinityBalance | None = None,
        widen: bool = False,
        background_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.background_weight = background_weight
        self.offsets = tuple(tuple(offset) for offset in offsets)
        is_flat = all(len(offset) == 2 for offset in self.offsets)
        self.balance: AffinityBalance = balance or ("sample" if is_flat else "channel")
        self.background = checked_pair_options(self.offsets, background, self.balance)
        self.widen = widen

    def forward(self, embeddings: Tensor, label: Tensor) -> Tensor:
        """Compute the loss; see the class for shapes."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, label = labeled_samples(whole := embeddings, label)
            if not len(label):
                return at_least_float32(whole).sum() * 0.0
            affinity = offset_affinity(embeddings, self.offsets)                 # (B, O, *S)
            numbers = instance_numbers(label, embeddings, self.widen)
            weight, target = weighted_targets(numbers, self.offsets, self.background, self.balance)
            loss = (weight * (affinity - target).square()).sum()
            if self.background_weight:
                loss = loss + self.background_weight * _off_axis(embeddings, numbers)
            return loss


def _off_axis(embeddings: Tensor, numbers: Tensor) -> Tensor:
    """Mean squared difference of the cosine with the first axis from 1 on background, else from 0."""
    cosine = background_cosine(embeddings)                         # (B, 1, *S)
    squares = (cosine - (numbers == 0).to(cosine)).square()
    if (ignored := ignored_voxels(numbers)) is None:
        return squares.mean()
    return squares.masked_fill(ignored, 0.0).sum() / (~ignored).sum().clamp(min=1)
