# SPDX-License-Identifier: Apache-2.0
"""The learned boundary map of preset `paper`: one channel from all encoder levels, and how a teacher gets its own."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.base import pointwise_convolution
from medkd.losses.fitted import FittedFile
from medkd.ops.border import pair_label_loss
from medkd.ops.ignored import labeled_samples
from medkd.ops.resample import majority_label, pool_or_interpolate

__all__ = ["BoundaryHead", "PairLabelLoss", "TeacherHead"]


class BoundaryHead(nn.Module):
    """A boundary map from the features of several encoder levels.

    Each level: 1 x 1 convolution to `width` channels without bias, group normalization, resizing to the grid, ReLU;
    then one 1 x 1 convolution over all of them, and a sigmoid. The first values come from a generator of its own.

    Args:
        channels: channels of each level.
        spatial_dims: 2 or 3.
        width: channels that each level is reduced to.
        groups: of the group normalization.
        seed: of the first values.

    Reference:
        Ahn et al., Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, arXiv 1904.05044,
        section 4.1 (class boundary detection branch).

    Example:
        >>> head = BoundaryHead([4, 8], spatial_dims=2)
        >>> head([torch.rand(1, 4, 6, 6), torch.rand(1, 8, 3, 3)], grid=(6, 6)).shape
        torch.Size([1, 1, 6, 6])
        >>> sum(p.numel() for p in BoundaryHead([32, 64, 128, 256, 320]).parameters())
        26081
    """

    def __init__(
        self, channels: Sequence[int], spatial_dims: int = 3, width: int = 32, groups: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.channels = tuple(channels)
        self.reduce = nn.ModuleList(pointwise_convolution(c, width, spatial_dims, generator) for c in channels)
        self.norm = nn.ModuleList(nn.GroupNorm(groups, width) for _ in channels)
        self.combine = pointwise_convolution(width * len(channels), 1, spatial_dims, generator, bias=True)

    def forward(self, levels: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
        """Map levels (B, C_l, *S_l) to one boundary map (B, 1, *grid), range (0, 1)."""
        found = tuple(level.shape[1] for level in levels)
        if found != self.channels:
            raise ValueError(f"`channels` of the boundary head must be {list(found)}, got {list(self.channels)}.")
        reduced = [
            F.relu(pool_or_interpolate(norm(convolution(level)), grid, pool="average"))
            for convolution, norm, level in zip(self.reduce, self.norm, levels, strict=True)
        ]
        logits: Tensor = self.combine(torch.cat(reduced, dim=1))
        return logits.sigmoid()


class TeacherHead(FittedFile[BoundaryHead]):
    """The teacher's boundary head: fitted once, then frozen; read when it is needed, in no optimizer or checkpoint.

    Args:
        channels: channels of each tapped level of the teacher.
        path: its weights, as the run with `teacher_head.json` writes them.
        spatial_dims: 2 or 3.
        teacher_path: weights of the teacher, which must be those that the head was fitted to; None does not look.
    """

    name = "boundary head"
    way_out = "fit it with the config file teacher_head.json behind those of this run"

    def __init__(
        self, channels: Sequence[int], path: str | os.PathLike[str], spatial_dims: int = 3,
        teacher_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, spatial_dims, teacher_path)
        self.channels = tuple(channels)

    def build(self) -> BoundaryHead:
        """Give a head with its first values."""
        return BoundaryHead(self.channels, self.spatial_dims)

    def describe(self) -> str:
        """Say what the file must hold."""
        return f"a head for levels of {list(self.channels)} channels"


class PairLabelLoss(nn.Module):
    """`pair_label_loss` of a boundary map and labels of any finer grid, which are reduced by majority vote.

    Args:
        pair_lengths: path lengths in cells of the boundary's grid.
        ignore_label: one more label that does not count, besides negative ones, which never do; None for no other.

    Samples without a label are left out first; 0 where none has one.
    """

    def __init__(self, pair_lengths: Sequence[int] = (1, 2, 4), ignore_label: int | None = None) -> None:
        super().__init__()
        self.pair_lengths = tuple(pair_lengths)
        self.ignore_label = ignore_label

    def forward(self, boundary: Tensor, label: Tensor) -> Tensor:
        """Map (B, 1, *G) and labels (B, 1, *S) to a scalar; float32 outside autocast."""
        boundary, label = boundary.as_subclass(Tensor), label.as_subclass(Tensor)   # without MONAI's metadata
        with torch.autocast(boundary.device.type, enabled=False):
            boundary, label = labeled_samples(whole := boundary, label)
            if not len(label):
                return whole.float().sum() * 0.0
            labels, _ = majority_label(label, boundary.shape[2:], self.ignore_label)
            return pair_label_loss(boundary.float(), labels, self.pair_lengths, self.ignore_label)
