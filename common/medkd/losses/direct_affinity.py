# SPDX-License-Identifier: Apache-2.0
"""Losses of networks that give affinities directly, a logit per offset, without embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.checks import check_same_grid
from medkd.losses.base import DistillationLoss
from medkd.ops.embedding import (
    AffinityBalance,
    BackgroundPairs,
    checked_pair_options,
    offset_mask,
    pair_mask,
    target_balance_weight,
    weighted_targets,
)
from medkd.ops.ignored import ignored_voxels, labeled_samples
from medkd.ops.instances import instance_numbers
from medkd.ops.precision import at_least_float32

__all__ = ["DirectAffinityDistillation", "DirectAffinityLoss"]

_SMOOTH = 1e-5                                                     # nothing is cut, and nothing is said to be: no error


class DirectAffinityLoss(nn.Module):
    """Binary cross entropy of affinities, class-balanced, and the Dice loss of the pairs that are cut.

    `entropy` is a mean over offsets of weighted means over voxels, with the weights of `AffinityLoss`. `dice` is a mean
    over offsets of 1 - 2 sum(c t) / (sum(c) + sum(t)), where c is the chance and t the truth that a pair is cut, and
    the sums are over the pairs of the batch that count; an offset that no pair of the batch has is left out. With
    `foreground` both are computed of the last channel, too, with as much weight as all offsets together.

    Args:
        offsets: steps in voxels along the axes, one vector per channel, as in `medkd.ops.embedding.offset_affinity`.
        foreground: one channel more, the last: the logit of foreground, any instance.
        background: `same`: background is one more object; `different`: a pair with background is cut. None takes `same`
            in 2-D and `different` in 3-D, as `AffinityLoss` does.
        balance: of `entropy`, as in `AffinityLoss`: by the share of ones in each `channel` of a sample, in the
            `sample`, or `none`.
        widen: make background of the voxels next to a border between instances first, see `widen_borders`.
        entropy_weight: of the cross entropy.
        dice_weight: of the Dice loss.

    Shape:
        logits (B, O, *S) or, with `foreground`, (B, O + 1, *S), floating; label (B, 1, *S), instance numbers, 0 is
        background, negative is ignored: pairs with such a voxel do not count. Samples without a label are left out
        first: the loss is that of the others alone, and 0 where there are none. Result: a scalar, float32.

    Raises:
        ValueError: unknown option; another number of channels; labels that are not whole numbers.

    Reference:
        Ours. Affinities as the direct output of a U-Net: Funke et al., TPAMI 2018, and Lee et al., arXiv 1706.00120.

    Example:
        >>> loss = DirectAffinityLoss([(0, -1)], balance="none", dice_weight=0.0)
        >>> logits = torch.zeros(1, 1, 1, 4, requires_grad=True)
        >>> value = loss(logits, torch.tensor([[[[1, 1, 2, 2]]]]))
        >>> value.backward()
        >>> round(value.item(), 4)                # log 2 of three pairs; the first of four voxels has no partner
        0.5199
    """

    def __init__(
        self,
        offsets: Sequence[Sequence[int]],
        foreground: bool = False,
        background: BackgroundPairs | None = None,
        balance: AffinityBalance = "channel",
        widen: bool = False,
        entropy_weight: float = 1.0,
        dice_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.offsets = tuple(tuple(offset) for offset in offsets)
        self.foreground = foreground
        self.background = checked_pair_options(self.offsets, background, balance)
        self.balance: AffinityBalance = balance
        self.widen = widen
        self.entropy_weight = entropy_weight
        self.dice_weight = dice_weight

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Compute the loss; see the class for shapes."""
        _check_channels("logits", logits, self.offsets, self.foreground)
        with torch.autocast(logits.device.type, enabled=False):
            logits, label = labeled_samples(whole := logits, label)
            if not len(label):
                return at_least_float32(whole).sum() * 0.0
            logits = at_least_float32(logits)
            numbers = instance_numbers(label, logits, self.widen)
            weight, target = weighted_targets(numbers, self.offsets, self.background, self.balance)
            value = self._value(logits[:, : len(self.offsets)], target.to(logits), weight.to(logits))
            return value + self._of_foreground(logits[:, -1:], numbers) if self.foreground else value

    def _of_foreground(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """The same of (B, 1, *S), with foreground, the rarer one, in the place of what is cut."""
        ignored = ignored_voxels(numbers)
        counted = torch.ones_like(logits) if ignored is None else (~ignored).to(logits)
        return self._value(-logits, (numbers <= 0).to(logits), counted / counted.sum().clamp(min=1))

    def _value(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        entropy, dice = _entropy(logits, target, weight), _cut_dice(logits, target, weight > 0)
        return self.entropy_weight * entropy + self.dice_weight * dice


class DirectAffinityDistillation(DistillationLoss):
    """`DirectAffinityLoss` with the teacher's affinities in the place of the labels.

    * `affinity`: cross entropy with the teacher's probabilities, in which the rarer of its two answers counts as much
      as the other one, and 1 - 2 sum(c d) / (sum(c^2) + sum(d^2)) of the chances c and d that a pair is cut. Both are
      least where the student has the teacher's.

    `pred` of both networks holds a logit per offset and, with `foreground`, that of foreground behind them. Labels are
    not needed, and tell only what is ignored.

    Args:
        offsets: as in `DirectAffinityLoss`.
        foreground: as in `DirectAffinityLoss`.
        entropy_weight: of the cross entropy.
        dice_weight: of the Dice part.

    Raises:
        ValueError: student and teacher of different grids, or another number of channels.

    Reference:
        Ours; Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.

    Example:
        >>> loss = DirectAffinityDistillation([(0, -1)], dice_weight=0.0)
        >>> teacher = torch.tensor([[[[0.0, 2.0, -2.0, 2.0]]]])
        >>> student = torch.zeros(1, 1, 1, 4, requires_grad=True)
        >>> loss({"pred": student}, {"pred": teacher})["affinity"].backward()
        >>> student.grad.flatten()[[0, 1]].tolist() == [0.0, student.grad.flatten()[3].item()]
        True
    """

    terms = ("affinity",)

    def __init__(
        self, offsets: Sequence[Sequence[int]], foreground: bool = False, entropy_weight: float = 1.0,
        dice_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.offsets = tuple(tuple(offset) for offset in offsets)
        self.foreground = foreground
        self.entropy_weight = entropy_weight
        self.dice_weight = dice_weight
        self.preset_weights = {"affinity": 1.0}

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give `affinity`; the labels tell which voxels are ignored, without them none is."""
        if "affinity" not in self.active_terms:
            return {}
        mine, other = student["pred"], teacher["pred"]
        check_same_grid("student['pred']", mine, "teacher['pred']", other)
        for name, logits in (("student['pred']", mine), ("teacher['pred']", other)):
            _check_channels(name, logits, self.offsets, self.foreground)
        ignored = ignored_voxels(label)
        mask = offset_mask(mine.shape[2:], self.offsets, mine.device) if ignored is None else pair_mask(
            ignored, self.offsets
        )
        count = len(self.offsets)
        value = self._value(mine[:, :count], torch.sigmoid(other[:, :count]), mask.expand_as(mine[:, :count]))
        if self.foreground:
            counted = torch.ones_like(mine[:, -1:], dtype=torch.bool) if ignored is None else ~ignored
            value = value + self._value(-mine[:, -1:], torch.sigmoid(-other[:, -1:]), counted)
        return {"affinity": value}

    def _value(self, logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        weight = counted.to(logits) * target_balance_weight(target, counted, per_channel=True)
        total = counted.sum((0, *range(2, counted.dim()))).clamp(min=1).reshape(-1, *[1] * (counted.dim() - 2))
        entropy, dice = _entropy(logits, target, weight / total), _cut_dice(logits, target, counted, is_soft=True)
        return self.entropy_weight * entropy + self.dice_weight * dice


def _entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over offsets of the weighted sums of (B, O, *S)."""
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / logits.shape[1]


def _cut_dice(logits: Tensor, target: Tensor, counted: Tensor, is_soft: bool = False) -> Tensor:
    """Mean over offsets of the Dice loss of the pairs that are cut, of those that count; all (B, O, *S)."""
    cut, truth = torch.sigmoid(-logits) * counted, (1.0 - target) * counted
    axes = (0, *range(2, logits.dim()))
    sizes = cut.square().sum(axes) + truth.square().sum(axes) if is_soft else cut.sum(axes) + truth.sum(axes)
    dice = 1.0 - (2.0 * (cut * truth).sum(axes) + _SMOOTH) / (sizes + _SMOOTH)
    exists = counted.flatten(2).any(2).any(0)
    return torch.where(exists, dice, 0.0).sum() / exists.sum().clamp(min=1)


def _check_channels(name: str, logits: Tensor, offsets: Sequence[Sequence[int]], foreground: bool) -> None:
    if logits.shape[1] != (channels := len(offsets) + int(foreground)):
        raise ValueError(f"`{name}` must have {channels} channels, one per affinity, got {tuple(logits.shape)}.")
