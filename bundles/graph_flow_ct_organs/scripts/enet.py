# SPDX-License-Identifier: Apache-2.0
"""ENet for images and volumes: a 2-D student of the paper, and the small one for 3-D; needs torch and monai only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Dropout, Norm
from torch import Tensor, nn

from scripts.padding import crop_to, pad_to_multiple

__all__ = ["ENet"]


class ENet(nn.Module):
    """ENet in two or three dimensions, for any size: a student of the paper, and a small one for volumes.

    Images are padded to multiples of 8 with copies of their last row, column and plane, which taps therefore contain.
    With two classes in 2-D it has 0.349 million parameters and multiplies 0.461 thousand million times for 256 x 256
    pixels. That count has a single slope per PReLU, where ENet's paper has one per channel (0.353 million), and
    transposed convolutions of 2 x 2 where its code has 3 x 3; as in that paper, all convolutions but the last are
    normalized, the two of a pair of 5 x 1 and 1 x 5 too. In 3-D such a pair is three lines of 5 voxels, one per axis;
    there it has 0.634 million parameters, and 0.092 million with filters (8, 24, 48).

    Taps, in the order of the forward pass, with the default filters:

    * `initial`: 16 channels at 1/2 of the size;
    * `stage1`: 64 channels at 1/4, the paper's first tap;
    * `stage2` and `stage3`: 128 channels at 1/8;
    * `stage4`: 64 channels at 1/4, its second tap;
    * `stage5`: 16 channels at 1/2.

    Where the largest value of each 2 x 2 (2 x 2 x 2) came from is kept as its number in there, as unpooling by indices
    can neither be traced nor be exported to OpenVINO; of equal values the first counts, as in torch's pooling, and the
    numbers are the same. Exports to ONNX and OpenVINO take any size.

    Args:
        out_channels: of the prediction.
        in_channels: of the image.
        spatial_dims: 2 for images, shape (B, C, H, W), 3 for volumes, shape (B, C, D, H, W).
        filters: channels at 1/2, 1/4 and 1/8 of the size, growing multiples of 4.
        dilations: of the four dilated convolutions of stages 2 and 3, in voxels at 1/8 of the size. Where a patch has
            12 of them, one of 16 sees nothing but its center.

    Raises:
        ValueError: another number of dimensions, of filters or of dilations; filters that do not grow in multiples of 4
            from more than `in_channels`.

    Reference:
        Paszke et al., ENet: a deep neural network architecture for real-time semantic segmentation, arXiv 1606.02147;
        taps of Zou et al., Graph Flow, arXiv 2203.08667. The third dimension and other filters are ours.

    Example:
        >>> network = ENet(spatial_dims=3, filters=(8, 24, 48), dilations=(1, 2, 3, 4))
        >>> network(torch.zeros(2, 1, 16, 17, 20)).shape
        torch.Size([2, 2, 16, 17, 20])
    """

    def __init__(
        self,
        out_channels: int = 2,
        in_channels: int = 1,
        spatial_dims: int = 2,
        filters: Sequence[int] = (16, 64, 128),
        dilations: Sequence[int] = (2, 4, 8, 16),
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims}.")
        levels = [in_channels, *filters]
        if len(levels) != 4 or any(b <= a or b % 4 for a, b in pairwise(levels)):
            raise ValueError(
                f"`filters` must be 3 growing multiples of 4 above `in_channels`, {in_channels}, got {levels[1:]}."
            )
        if len(dilations) != 4 or min(dilations) < 1:
            raise ValueError(f"`dilations` must be 4 numbers of at least 1, got {list(dilations)}.")
        half, quarter, eighth = levels[1:]
        dims = spatial_dims
        self.initial = _Initial(dims, in_channels, half)
        self.down1 = _Down(dims, half, quarter, 0.01)
        self.stage1 = nn.Sequential(*[_Bottleneck(dims, quarter, 0.01) for _ in range(4)])
        self.down2 = _Down(dims, quarter, eighth, 0.1)
        self.stage2 = _context(dims, eighth, dilations)
        self.stage3 = _context(dims, eighth, dilations)
        self.up4 = _Up(dims, eighth, quarter)
        self.stage4 = nn.Sequential(*[_Bottleneck(dims, quarter, 0.1, act="relu") for _ in range(2)])
        self.up5 = _Up(dims, quarter, half)
        self.stage5 = nn.Sequential(_Bottleneck(dims, half, 0.1, act="relu"))
        self.head = Conv[Conv.CONVTRANS, dims](
            half, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, *S) to logits (B, out_channels, *S)."""
        features, place1 = self.down1(self.initial(pad_to_multiple(image, 8)))
        features, place2 = self.down2(self.stage1(features))           # (B, 128, *S / 8)
        features = self.up4(self.stage3(self.stage2(features)), place2)
        features = self.up5(self.stage4(features), place1)             # (B, 16, *S / 2)
        return crop_to(self.head(self.stage5(features)), image)


def _context(dims: int, channels: int, dilations: Sequence[int]) -> nn.Sequential:
    """Stage 2 or 3 of ENet: each dilated block after one of 3 x 3 or of lines."""
    blocks: list[nn.Module] = []
    for number, dilation in enumerate(dilations):
        blocks.append(_Bottleneck(dims, channels, 0.1, lines=number % 2 == 1))
        blocks.append(_Bottleneck(dims, channels, 0.1, dilation=dilation))
    return nn.Sequential(*blocks)


def _convolution(
    dims: int, before: int, after: int, kernel: int | Sequence[int], act: str | None = "prelu", dilation: int = 1
) -> Convolution:
    """Convolution without bias that keeps the size, batch normalization, activation."""
    return Convolution(
        dims, before, after, kernel_size=kernel, adn_ordering="NA", act=act, norm="batch", dilation=dilation, bias=False
    )


def _halving(dims: int, before: int, after: int, act: str, is_transposed: bool = False) -> Convolution:
    """Convolution of 2 x 2 pixels apart, or back, batch normalization, activation."""
    return Convolution(
        dims, before, after, strides=2, kernel_size=2, adn_ordering="NA", act=act, norm="batch", bias=False, padding=0,
        output_padding=0, is_transposed=is_transposed,
    )


def _activation(name: str) -> nn.Module:
    return nn.PReLU() if name == "prelu" else nn.ReLU()


class _Initial(nn.Module):
    """Half the size: a convolution, joined to the largest values of the image."""

    def __init__(self, dims: int, before: int, after: int) -> None:
        super().__init__()
        self.convolution = Conv[Conv.CONV, dims](before, after - before, 3, stride=2, padding=1, bias=False)
        self.norm = Norm[Norm.BATCH, dims](after)
        self.act = nn.PReLU()

    def forward(self, image: Tensor) -> Tensor:
        return self.act(self.norm(torch.cat([self.convolution(image), _pool(image)[0]], 1)))


class _Bottleneck(nn.Module):
    """A convolution, a dilated one or lines along each axis, in a quarter of the channels; added to the input."""

    def __init__(
        self, dims: int, channels: int, dropout: float, act: str = "prelu", dilation: int = 1, lines: bool = False
    ) -> None:
        super().__init__()
        hidden = channels // 4
        kernels = [[5 if other == axis else 1 for other in range(dims)] for axis in range(dims)] if lines else [3]
        self.main = nn.Sequential(
            _convolution(dims, channels, hidden, 1, act),
            *[_convolution(dims, hidden, hidden, kernel, act, dilation) for kernel in kernels],
            _convolution(dims, hidden, channels, 1, None), Dropout[Dropout.DROPOUT, dims](dropout),
        )
        self.act = _activation(act)

    def forward(self, features: Tensor) -> Tensor:
        return self.act(self.main(features) + features)


class _Down(nn.Module):
    """Half the size and more channels; gives the places of the largest values too, see `_pool`."""

    def __init__(self, dims: int, before: int, after: int, dropout: float) -> None:
        super().__init__()
        hidden = before // 4
        self.main = nn.Sequential(
            _halving(dims, before, hidden, "prelu"), _convolution(dims, hidden, hidden, 3),
            _convolution(dims, hidden, after, 1, None), Dropout[Dropout.DROPOUT, dims](dropout),
        )
        self.act = nn.PReLU()
        self.pads = [0, 0] * dims + [0, after - before]                # channels that are zero

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        largest, place = _pool(features)
        return self.act(self.main(features) + F.pad(largest, self.pads)), place


class _Up(nn.Module):
    """Twice the size and fewer channels, with values put back to the places of `_Down`."""

    def __init__(self, dims: int, before: int, after: int) -> None:
        super().__init__()
        hidden = before // 4
        self.main = nn.Sequential(
            _convolution(dims, before, hidden, 1, "relu"), _halving(dims, hidden, hidden, "relu", is_transposed=True),
            _convolution(dims, hidden, after, 1, None), Dropout[Dropout.DROPOUT, dims](0.1),
        )
        self.shortcut = _convolution(dims, before, after, 1, None)

    def forward(self, features: Tensor, place: Tensor) -> Tensor:
        return F.relu(self.main(features) + _unpool(self.shortcut(features), place))


def _pool(features: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each 2 x 2 (2 x 2 x 2), and its number in there; from (B, C, *S) both (B, C, *S / 2)."""
    dims = features.dim() - 2
    shape, order = [features.shape[0], features.shape[1]], [0, 1]
    for axis in range(dims):
        shape += [features.shape[2 + axis] // 2, 2]
        order.append(3 + 2 * axis)
    order += [2 + 2 * axis for axis in range(dims)]
    parts = features.reshape(shape).permute(order).flatten(2, 1 + dims)    # (B, C, 2^dims, *S / 2)
    return parts.max(dim=2)


def _unpool(features: Tensor, place: Tensor) -> Tensor:
    """Put values, shape (B, C, *S), to their numbers of `_pool` among zeros, shape (B, C, *S * 2)."""
    dims = features.dim() - 2
    number = torch.arange(2**dims, device=place.device).view([-1] + [1] * dims)
    values = features.unsqueeze(2)
    parts = torch.where(place.unsqueeze(2) == number, values, torch.zeros_like(values))    # (B, C, 2^dims, *S)
    shape = [features.shape[0], features.shape[1]] + [2] * dims
    order, doubled = [0, 1], [features.shape[0], features.shape[1]]
    for axis in range(dims):
        shape.append(features.shape[2 + axis])
        order += [2 + dims + axis, 2 + axis]
        doubled.append(2 * features.shape[2 + axis])
    return parts.reshape(shape).permute(order).reshape(doubled)
