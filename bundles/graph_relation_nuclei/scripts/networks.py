# SPDX-License-Identifier: Apache-2.0
"""The 2-D networks of teacher and students; need torch and monai only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.affinities import output_head

__all__ = ["MobileNetV2", "ResidualUNet"]

Output = Literal["embedding", "affinity", "direct_affinity"]
# factor of the hidden channels, channels, blocks, stride of the first block; the strides give 1/8 of the size
_STAGES = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 1), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class ResidualUNet(nn.Module):
    """2-D U-Net of residual blocks that gives an embedding per pixel, of the image's size, for any size.

    With the default filters the teacher of the paper; its student has `filters` (4, 8, 16, 32, 64). Images are padded
    to multiples of 16 (times `stem`) with copies of their last row and column, which taps therefore contain.

    Taps, in the order of the forward pass; sizes are those behind `stem`:

    * `encoder.0` to `encoder.4`: x1 to x5 of the paper's network, at 1, 1/2, 1/4, 1/8 and 1/16 of the size;
    * `decoder.0` to `decoder.3`: u1 to u4, at 1/8, 1/4, 1/2 and 1;
    * `embedding`: the result, before it is cropped.

    Args:
        filters: channels of the five encoder levels; the first level has no skip.
        embedding_channels: of the embedding.
        in_channels: of the image.
        output: "embedding", shape (B, embedding_channels, H, W), or "affinity", shape (B, len(offsets), H, W), range
            [0, 1], see `embedding_affinity`; "direct_affinity": where the channels of the embedding are logits of
            affinities, see `direct_affinity`. Neither this nor `offsets` changes the state dict.
        offsets: (row, column) steps in pixels of the affinities; no use for embeddings.
        published_head: with the foreground head that the paper's code has but never uses; it is part of the published
            numbers of parameters.
        stem: factor by which a first convolution makes the image smaller, and the last one the embedding larger again:
            all levels then work at that size. With 2 a student takes a quarter of the multiplications.

    Raises:
        ValueError: a wrong number of filters, a factor below 1, no such output, an affinity without offsets.

    Reference:
        Liu et al., Graph Relation Distillation for Efficient Biomedical Instance Segmentation, arXiv 2401.06370, code;
        sizes that are no multiples of 16, and `stem`, are ours.

    Example:
        >>> network = ResidualUNet(filters=(4, 8, 16, 32, 64))
        >>> network(torch.zeros(2, 3, 40, 33)).shape
        torch.Size([2, 16, 40, 33])
    """

    def __init__(
        self,
        filters: Sequence[int] = (32, 64, 179, 349, 680),
        embedding_channels: int = 16,
        in_channels: int = 3,
        output: Output = "embedding",
        offsets: Sequence[Sequence[int]] | None = None,
        foreground: bool = False,
        published_head: bool = False,
        stem: int = 1,
    ) -> None:
        super().__init__()
        levels = list(filters)
        if len(levels) != 5 or min(levels) < 1:
            raise ValueError(f"`filters` must be 5 numbers of at least 1, got {levels}.")
        if stem < 1:
            raise ValueError(f"`stem` must be at least 1, got {stem}.")
        self.multiple = 16 * stem
        self.stem = nn.Conv2d(in_channels, levels[0], stem, stride=stem) if stem > 1 else nn.Identity()
        before = levels[0] if stem > 1 else in_channels
        self.encoder = nn.ModuleList([_Residual(before, levels[0]), *map(_Down, levels[:-1], levels[1:])])
        skips = levels[:0:-1]                                      # of x5, x4, x3, x2
        joined = [levels[4], *(deep + skip for deep, skip in pairwise(skips))]
        self.decoder = nn.ModuleList(map(_Up, joined, skips))
        last = nn.ConvTranspose2d if stem > 1 else nn.Conv2d
        self.embedding = last(skips[-1], embedding_channels, kernel_size=stem, stride=stem)
        if published_head:
            self.foreground = nn.Sequential(
                nn.Conv2d(skips[-1], skips[-1], 1), nn.BatchNorm2d(skips[-1]), nn.ReLU(), nn.Conv2d(skips[-1], 2, 1)
            )
        self.head = output_head(output, offsets, spatial_dims=2, foreground=foreground)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to embeddings or affinities."""
        step = self.multiple
        rows, columns = (step - image.shape[2] % step) % step, (step - image.shape[3] % step) % step
        deep = self.stem(F.pad(image, [0, columns, 0, rows], mode="replicate"))
        skips: list[Tensor] = []
        for level in self.encoder:
            deep = level(deep)                                     # (B, c, H / 2^level, W / 2^level)
            skips.append(deep)
        for index, level in enumerate(self.decoder):
            if index > 0:
                deep = torch.cat([deep, skips[4 - index]], 1)
            deep = level(deep)
        embedding = F.pad(self.embedding(deep), [0, -columns, 0, -rows])
        return self.head(embedding)


class _Residual(nn.Module):
    """Two convolutions of 3 x 3 and, next to them, one as the shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after))

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.main(features) + self.shortcut(features))


class _Down(nn.Sequential):
    """A residual block, then half the size."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(_Residual(before, after), nn.MaxPool2d(2))


class _Up(nn.Sequential):
    """Twice the size with the corners in place, then a residual block."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), _Residual(before, after))


class MobileNetV2(nn.Module):
    """MobileNetV2 that gives an embedding per pixel, of the image's size, for any size: a student of the paper.

    It has the blocks and names of torchvision's MobileNetV2, at 1/2, 1/4 and 1/8 of the size (not 1/32), and scales the
    embedding up with its corners in place.

    Taps, in the order of the forward pass; sizes are rounded up:

    * `features.0`: 32 channels at 1/2 of the size;
    * `features.1` to `features.17`: the blocks. Stages end at `features.1`, `features.3` (16 and 24 channels at 1/2),
      `features.6`, `features.10` and `features.13` (32, 64 and 96 at 1/4), `features.16` and `features.17` (160 and 320
      at 1/8);
    * `features.18`: 1280 channels at 1/8;
    * `embedding`: the result at 1/8, not yet scaled up.

    Args:
        embedding_channels: of the embedding.
        in_channels: of the image.
        output: "embedding", shape (B, embedding_channels, H, W), or "affinity", shape (B, len(offsets), H, W), range
            [0, 1], see `embedding_affinity`; "direct_affinity": where the channels of the embedding are logits of
            affinities, see `direct_affinity`. Neither this nor `offsets` changes the state dict.
        offsets: (row, column) steps in pixels of the affinities; no use for embeddings.
        classifier: with the linear layer that the paper's code has but never uses; it is part of the published number
            of parameters.

    Raises:
        ValueError: no such output, an affinity without offsets.

    Reference:
        Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, arXiv 1801.04381; strides, embedding and
        initialization of the code of Liu et al., arXiv 2401.06370.

    Example:
        >>> MobileNetV2()(torch.zeros(2, 3, 40, 33)).shape
        torch.Size([2, 16, 40, 33])
    """

    def __init__(
        self,
        embedding_channels: int = 16,
        in_channels: int = 3,
        output: Output = "embedding",
        offsets: Sequence[Sequence[int]] | None = None,
        foreground: bool = False,
        classifier: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_normalized(in_channels, 32, 3, stride=2)]
        before = 32
        for factor, after, blocks, stride in _STAGES:
            for block in range(blocks):
                layers.append(_InvertedResidual(before, after, factor, stride if block == 0 else 1))
                before = after
        self.features = nn.Sequential(*layers, _normalized(before, 1280, 1))
        self.embedding = nn.Conv2d(1280, embedding_channels, kernel_size=1)
        if classifier:
            self.classifier = nn.Linear(1280, embedding_channels)
        self.head = output_head(output, offsets, spatial_dims=2, foreground=foreground)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to embeddings or affinities."""
        small = self.embedding(self.features(image))               # (B, embedding_channels, H / 8, W / 8), rounded up
        return self.head(F.interpolate(small, size=image.shape[2:], mode="bilinear", align_corners=True))


class _InvertedResidual(nn.Module):
    """Wide in the middle, where each channel is convolved alone; added to its input where shapes allow."""

    def __init__(self, before: int, after: int, factor: int, stride: int) -> None:
        super().__init__()
        hidden = before * factor
        widen = [] if factor == 1 else [_normalized(before, hidden, 1)]
        self.conv = nn.Sequential(
            *widen,
            _normalized(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.is_residual = stride == 1 and before == after

    def forward(self, features: Tensor) -> Tensor:
        result = self.conv(features)
        return features + result if self.is_residual else result


def _normalized(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalization, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU6(inplace=True),
    )
