# SPDX-License-Identifier: Apache-2.0
"""The 2-D networks of the paper, teacher and student; need torch and monai only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.nets import ResNet
from torch import Tensor, nn

__all__ = ["ResNetFCN", "UNetPlusPlus"]


class UNetPlusPlus(nn.Module):
    """2-D UNet++ of five levels, for any size: the teacher of the paper.

    Node (i, j) is the j-th of level i, at 1 / 2^i of the size, with two convolutions of 3 x 3. Column 0 is the encoder.
    Images are padded to multiples of 16 with copies of their last row and column, which taps therefore contain.

    Taps: `nodes.x<i>_<j>`. Those of the paper are x1_0, x2_0, x1_1, x3_0, x4_0 (e1 to e5) and x0_1, x0_2, x0_3, x1_3
    (d5 to d2).

    Args:
        out_channels: of the prediction.
        in_channels: of the image.
        filters: channels of the five levels.

    Raises:
        ValueError: a wrong number of filters.

    Reference:
        Zhou et al., UNet++: a nested U-Net architecture for medical image segmentation, arXiv 1807.10165, without deep
        supervision; widths, bilinear steps up with their corners in place and normalization of the code of Gorade et
        al., arXiv 2311.16700.

    Example:
        >>> network = UNetPlusPlus(2, filters=(4, 8, 12, 16, 20)).eval()
        >>> network(torch.zeros(1, 1, 40, 33)).shape
        torch.Size([1, 2, 40, 33])
    """

    def __init__(
        self, out_channels: int = 2, in_channels: int = 1, filters: Sequence[int] = (64, 128, 256, 512, 1024)
    ) -> None:
        super().__init__()
        levels = list(filters)
        if len(levels) != 5 or min(levels) < 1:
            raise ValueError(f"`filters` must be 5 numbers of at least 1, got {levels}.")
        self.nodes = nn.ModuleDict()
        for column in range(5):
            for level in range(5 - column):
                if column:
                    before = column * levels[level] + levels[level + 1]
                else:
                    before = levels[level - 1] if level else in_channels
                self.nodes[_name(level, column)] = _TwoConvolutions(before, levels[level])
        self.head = nn.Conv2d(levels[0], out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to logits (B, out_channels, H, W)."""
        rows, columns = (-image.shape[2] % 16), (-image.shape[3] % 16)
        found: dict[str, Tensor] = {}
        deep = F.pad(image, [0, columns, 0, rows], mode="replicate")
        for level in range(5):
            deep = found[_name(level, 0)] = self.nodes[_name(level, 0)](F.max_pool2d(deep, 2) if level else deep)
        for column in range(1, 5):
            for level in range(5 - column):
                below = found[_name(level + 1, column - 1)]
                wide = F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=True)
                same = [found[_name(level, before)] for before in range(column)]
                found[_name(level, column)] = self.nodes[_name(level, column)](torch.cat([*same, wide], dim=1))
        return F.pad(self.head(found[_name(0, 4)]), [0, -columns, 0, -rows])


def _name(level: int, column: int) -> str:
    return f"x{level}_{column}"


class _TwoConvolutions(nn.Sequential):
    """Two convolutions of 3 x 3, each normalized over the batch."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
        )


class ResNetFCN(nn.Module):
    """2-D ResNet-18 with a 1 x 1 convolution to classes, scaled up to the image: the student of the paper.

    It has no decoder. What the paper's code calls decoder layers are its stages, scaled up; a class head commutes with
    that, so the stages themselves are tapped.

    Taps: `encoder.act` (before pooling, at 1/2 of the size), `encoder.layer1` to `encoder.layer4`, at 1/4 to 1/32. They
    are e1 to e5 of the paper, and the first four are d2 to d5.

    Args:
        out_channels: of the prediction.
        in_channels: of the image; a single one is shown three times, as the published size counts.
        filters: channels of the four stages.

    Reference:
        He et al., Deep residual learning for image recognition, arXiv 1512.03385; head of the code of Gorade et al.,
        arXiv 2311.16700.

    Example:
        >>> network = ResNetFCN(2, filters=(4, 8, 12, 16)).eval()
        >>> network(torch.zeros(1, 1, 40, 33)).shape
        torch.Size([1, 2, 40, 33])
    """

    def __init__(
        self, out_channels: int = 2, in_channels: int = 1, filters: Sequence[int] = (64, 128, 256, 512)
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.encoder = ResNet(
            "basic", [2, 2, 2, 2], list(filters), spatial_dims=2, conv1_t_size=7, conv1_t_stride=2, feed_forward=False,
            n_input_channels=3 if in_channels == 1 else in_channels,
        )
        self.head = nn.Conv2d(filters[-1], out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to logits (B, out_channels, H, W)."""
        encoder = self.encoder
        shown = image.expand(-1, 3, -1, -1) if self.in_channels == 1 else image
        deep = encoder.maxpool(encoder.act(encoder.bn1(encoder.conv1(shown))))
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            deep = stage(deep)                                     # (B, c, H / 2^stage, W / 2^stage), rounded up
        return F.interpolate(self.head(deep), size=image.shape[2:], mode="bilinear", align_corners=True)
