# SPDX-License-Identifier: Apache-2.0
"""Mobile U-Net and ERFNet, 2-D students of the paper; need torch only. ENet is in `enet`, the teacher in `fanet`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.padding import crop_to, pad_to_multiple

__all__ = ["ERFNet", "MobileUNet"]

# stages of the encoder: factor of the hidden channels, channels, blocks, stride of the first block
_MOBILE_STAGES = (
    ((1, 16, 1, 1),), ((6, 24, 2, 2),), ((6, 32, 3, 2),), ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class MobileUNet(nn.Module):
    """2-D U-Net with MobileNetV2 as its encoder, for any size: a student of the paper.

    Images are padded to multiples of 32 with copies of their last row and column, which taps therefore contain. It has
    4.682 million parameters with two classes and multiplies 0.963 thousand million times for 256 x 256 pixels. The
    classifier of 1280 x 1000 that the published code has but never uses is left out.

    Taps, in the order of the forward pass:

    * `encoder.0` to `encoder.4`: 16, 24, 32, 96 and 1280 channels at 1/2 to 1/32 of the size; `encoder.1` is the
      paper's first tap (x2);
    * `decoder.0` to `decoder.3`: 96, 32, 24 and 16 channels at 1/16 to 1/2; `decoder.2` is its second tap (up3);
    * `head`: the prediction at 1/2, not yet scaled up.

    Args:
        out_channels: of the prediction.
        in_channels: of the image.

    Reference:
        Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, arXiv 1801.04381; decoder of the code of
        Zou et al., Graph Flow, arXiv 2203.08667. Sizes that are no multiples of 32 are ours.

    Example:
        >>> MobileUNet()(torch.zeros(2, 1, 40, 33)).shape
        torch.Size([2, 2, 40, 33])
    """

    def __init__(self, out_channels: int = 2, in_channels: int = 1) -> None:
        super().__init__()
        channels, stages = 32, []
        layers: list[nn.Module] = [_mobile_convolution(in_channels, 32, 3, stride=2)]
        for stage in _MOBILE_STAGES:
            for factor, after, blocks, stride in stage:
                for block in range(blocks):
                    layers.append(_InvertedResidual(channels, after, factor, stride if block == 0 else 1))
                    channels = after
            stages.append(layers)
            layers = []
        stages[-1].append(_mobile_convolution(channels, 1280, 1))
        self.encoder = nn.ModuleList([nn.Sequential(*stage) for stage in stages])
        self.decoder = nn.ModuleList([_MobileUp(*pair) for pair in pairwise([1280, 96, 32, 24, 16])])
        self.head = nn.Sequential(nn.Conv2d(16, 3, kernel_size=1), nn.Conv2d(3, out_channels, kernel_size=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to logits (B, out_channels, H, W)."""
        deep = pad_to_multiple(image, 32)
        skips: list[Tensor] = []
        for stage in self.encoder:
            deep = stage(deep)                                         # (B, c, H / 2^stage, W / 2^stage), stage from 1
            skips.append(deep)
        for number, step in enumerate(self.decoder):
            deep = step(deep, skips[3 - number])
        wide = F.interpolate(self.head(deep), scale_factor=2.0, mode="bilinear", align_corners=False)
        return crop_to(wide, image)


class _InvertedResidual(nn.Module):
    """Wide in the middle, where each channel is convolved alone; added to its input where shapes allow."""

    def __init__(self, before: int, after: int, factor: int, stride: int) -> None:
        super().__init__()
        hidden = before * factor
        widen = [] if factor == 1 else [_mobile_convolution(before, hidden, 1)]
        self.main = nn.Sequential(
            *widen, _mobile_convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, after, kernel_size=1, bias=False), nn.BatchNorm2d(after),
        )
        self.is_residual = stride == 1 and before == after

    def forward(self, features: Tensor) -> Tensor:
        result = self.main(features)
        return features + result if self.is_residual else result


class _MobileUp(nn.Module):
    """Twice the size, joined to the skip of that size, and an inverted residual block."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        self.block = _InvertedResidual(2 * after, after, 6, 1)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([skip, self.up(features)], 1))


def _mobile_convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalization, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after), nn.ReLU6(inplace=True),
    )


class ERFNet(nn.Module):
    """2-D network of factorized residual blocks, for any size: a student of the paper.

    Images are padded to multiples of 8 with copies of their last row and column, which taps therefore contain. It has
    2.063 million parameters with two classes and multiplies 3.304 thousand million times for 256 x 256 pixels. The
    class head of the encoder, with which ERFNet's authors train it first, is left out: 258 parameters, less than the
    published digits tell.

    Taps, in the order of the forward pass:

    * `initial`: 16 channels at 1/2 of the size;
    * `down1`: 64 channels at 1/4, the paper's first tap, and `stage1`, the five blocks after it;
    * `down2`: 128 channels at 1/8, and `stage2`, the eight dilated blocks after it;
    * `stage3`: 64 channels at 1/4, its second tap;
    * `stage4`: 16 channels at 1/2.

    Args:
        out_channels: of the prediction.
        in_channels: of the image, less than 16.

    Raises:
        ValueError: too many channels of the image.

    Reference:
        Romera et al., ERFNet: efficient residual factorized ConvNet for real-time semantic segmentation, IEEE T-ITS
        2018, doi 10.1109/TITS.2017.2750080; taps of Zou et al., Graph Flow, arXiv 2203.08667.

    Example:
        >>> ERFNet()(torch.zeros(2, 1, 40, 33)).shape
        torch.Size([2, 2, 40, 33])
    """

    def __init__(self, out_channels: int = 2, in_channels: int = 1) -> None:
        super().__init__()
        if not 0 < in_channels < 16:
            raise ValueError(f"`in_channels` must be from 1 to 15, got {in_channels}.")
        dilated = [_Factorized(128, 0.3, dilation) for dilation in (2, 4, 8, 16) * 2]
        self.initial = _FactorizedDown(in_channels, 16)
        self.down1 = _FactorizedDown(16, 64)
        self.stage1 = nn.Sequential(*[_Factorized(64, 0.03) for _ in range(5)])
        self.down2 = _FactorizedDown(64, 128)
        self.stage2 = nn.Sequential(*dilated)
        self.stage3 = _FactorizedUp(128, 64)
        self.stage4 = _FactorizedUp(64, 16)
        self.head = nn.ConvTranspose2d(16, out_channels, kernel_size=2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to logits (B, out_channels, H, W)."""
        deep = self.down1(self.initial(pad_to_multiple(image, 8)))     # (B, 64, H / 4, W / 4)
        deep = self.stage2(self.down2(self.stage1(deep)))              # (B, 128, H / 8, W / 8)
        return crop_to(self.head(self.stage4(self.stage3(deep))), image)


class _FactorizedDown(nn.Module):
    """Half the size: a convolution, joined to the largest values of the input."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after - before, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([self.convolution(features), F.max_pool2d(features, 2)], 1)))


class _FactorizedUp(nn.Sequential):
    """Twice the size, and two blocks."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(after, eps=1e-3), nn.ReLU(inplace=True), _Factorized(after), _Factorized(after),
        )


class _Factorized(nn.Module):
    """Two convolutions of 3 x 3, each as a column and a row, added to the input; the second pair is dilated."""

    def __init__(self, channels: int, dropout: float = 0.0, dilation: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in (1, dilation):
            layers += [
                nn.Conv2d(channels, channels, (3, 1), padding=(step, 0), dilation=(step, 1)), nn.ReLU(inplace=True),
                nn.Conv2d(channels, channels, (1, 3), padding=(0, step), dilation=(1, step)),
                nn.BatchNorm2d(channels, eps=1e-3), nn.ReLU(inplace=True),
            ]
        self.main = nn.Sequential(*layers[:-1], nn.Dropout2d(dropout))

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.main(features) + features)
