# SPDX-License-Identifier: Apache-2.0
"""Boundary maps against ordinary label maps: a loss that fits a map to labels, and how well a map shows borders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medkd.checks import check_label, check_maps, check_same_grid
from medkd.ops.affinity import half_directions, path_affinity
from medkd.ops.ignored import is_ignored

__all__ = ["border_auc", "label_border", "pair_label_loss"]


def pair_label_loss(
    boundary: Tensor, label: Tensor, lengths: Sequence[int] = (1, 2, 4), ignore: int | None = None, eps: float = 1e-5
) -> Tensor:
    """Fit a boundary map to labels through pairs of voxels, without ever making a boundary map of the labels.

    `1/2 [1/2 mean_{same class} -log(a + eps) + 1/2 mean_{both background} -log(a + eps)
    + mean_{crossing} -log(1 + eps - a)]` over the ends of straight paths (`path_affinity`); a pair crosses when the
    labels on its path are not all equal, and an empty set counts nothing. Pairs that touch an ignored voxel are
    dropped. Plain autograd: a head is fitted once, in a few epochs.

    Args:
        boundary: shape (B, 1, *S), range [0, 1].
        label: class indices on the same grid, shape (B, 1, *S), 0 is background.
        lengths: path lengths in voxels.
        ignore: one more label that does not count, besides negative ones, which never do.
        eps: keeps the logarithm finite.

    Returns:
        Scalar; 0 with zero gradient when no pair is valid.

    Reference:
        Ahn et al., Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, arXiv 1904.05044,
        equation 7 (there by end points, here by the whole path, so that thin structures are borders too).
    """
    check_maps("boundary", boundary)
    check_label("label", label, boundary)
    check_same_grid("boundary", boundary, "label", label)
    ignored = is_ignored(label, ignore).to(boundary.dtype)
    label = label.to(boundary.dtype)
    sums, counts = boundary.new_zeros(3), boundary.new_zeros(3)
    for direction in half_directions(boundary.dim() - 2):
        for length in lengths:
            affinity = path_affinity(boundary, direction, length)
            highest = 1.0 - path_affinity(label, direction, length)
            lowest = path_affinity(-label, direction, length) - 1.0
            valid = path_affinity(ignored, direction, length) == 1.0
            same = (highest == lowest) & valid
            kinds = (same & (highest > 0), same & (highest == 0), ~same & valid)
            costs = (-(affinity + eps).log(), -(affinity + eps).log(), -(1.0 + eps - affinity).log())
            sums = sums + torch.stack([(cost * kind).sum() for cost, kind in zip(costs, kinds, strict=True)])
            counts = counts + torch.stack([kind.sum() for kind in kinds])
    foreground, background, crossing = sums / counts.clamp(min=1.0)
    loss: Tensor = 0.25 * (foreground + background) + 0.5 * crossing
    return loss


def label_border(label: Tensor, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """Mark the voxels on both sides of a change of label: borders are two voxels thick.

    Args:
        label: class indices, shape (B, 1, *S).
        ignore: one more label that does not count, besides negative ones, which never do.

    Returns:
        Border and validity, bool, both of shape (B, 1, *S); a voxel is valid when it is not ignored.

    Example:
        >>> border, _ = label_border(torch.tensor([[[[0, 0, 1, 1, 1]]]]))
        >>> border.flatten().tolist()
        [False, True, True, False, False]
    """
    border = torch.zeros_like(label, dtype=torch.bool)
    valid = ~is_ignored(label, ignore)
    for axis in range(2, label.dim()):
        low, high = (slice(None, -1), slice(1, None))
        first, second = (label.movedim(axis, 0)[part] for part in (low, high))
        count = valid.movedim(axis, 0)
        changes = (first != second) & count[low] & count[high]
        for part in (low, high):
            border.movedim(axis, 0)[part] |= changes
    return border, valid


def border_auc(boundary: Tensor, label: Tensor, ignore: int | None = None) -> float:
    """Tell how well a boundary map separates the borders of a label map from all else: area under the ROC curve.

    Args:
        boundary: shape (B, 1, *S), any range.
        label: class indices on the same grid, shape (B, 1, *S).
        ignore: one more label that does not count, besides negative ones, which never do.

    Returns:
        1 is perfect, 0.5 is chance, below is inverted; ties count half. NaN without a border, or with nothing else.

    Example:
        >>> border_auc(torch.tensor([[[[0.1, 0.9, 0.8, 0.2]]]]), torch.tensor([[[[0, 0, 1, 1]]]]))
        1.0
    """
    check_label("label", label, boundary)
    check_same_grid("boundary", boundary, "label", label)
    border, valid = label_border(label, ignore)
    values, positive = boundary.detach()[valid].double(), border[valid]
    ordered = values.sort().values
    ranks = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) + 1).double() / 2
    hits = int(positive.sum())
    wins = ranks[positive].sum() - hits * (hits + 1) / 2
    return float(wins / (hits * (len(values) - hits)))             # 0 / 0 without a border, or with nothing else
