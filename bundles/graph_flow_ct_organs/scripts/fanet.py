# SPDX-License-Identifier: Apache-2.0
"""FANet, the 2-D teacher of the paper; needs torch only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.padding import crop_to, pad_to_multiple

__all__ = ["FANet"]

_CELLS = ((3, 6), (12, 18), (3, 6))    # per side of the two grids that the decoder averages over, at 1, 1/2, 1/4


class FANet(nn.Module):
    """2-D U-Net of selective kernels with pyramid and strip pooling in its decoder, for any size: the paper's teacher.

    Images are padded to multiples of 8 with copies of their last row and column, which taps therefore contain. It has
    38.292 million parameters with two classes and multiplies 166.6 thousand million times for 256 x 256 pixels. A
    second head of 2 x 65 parameters that the published code trains without use, and three unused scalars, are left out.

    Taps, in the order of the forward pass, with the default filters:

    * `encoder.0` to `encoder.3`: 64, 128, 256 and 512 channels at 1, 1/2, 1/4 and 1/8 of the size; `encoder.2` is the
      paper's first tap (c3);
    * `decoder.0.up` to `decoder.2.up`: 256, 128 and 64 channels at 1/4, 1/2 and 1, before the skip is attached;
      `decoder.0.up` is its second tap (up_7);
    * `decoder.0` to `decoder.2`: the same channels and sizes, after pooling.

    A batch of one sample can be trained on: its channel weights come from a map of one pixel, which has no variance, so
    that they are normalized by the running statistics, which such a batch leaves as they are. An image of up to 8 x 8
    pixels has one pixel at 1/8, too, and is treated alike there.

    Args:
        out_channels: of the prediction.
        in_channels: of the image.
        filters: channels of the four levels, multiples of 2.

    Raises:
        ValueError: a wrong number of filters, or odd ones.

    Reference:
        Zou et al., Graph Flow, arXiv 2203.08667, released code; Li et al., Selective kernel networks, arXiv 1903.06586;
        Hou et al., Strip pooling, arXiv 2003.13328. Sizes that are no multiples of 8, and batches of one, are ours.

    Example:
        >>> network = FANet(filters=(4, 8, 12, 16)).eval()
        >>> network(torch.zeros(1, 1, 40, 33)).shape
        torch.Size([1, 2, 40, 33])
    """

    def __init__(
        self, out_channels: int = 2, in_channels: int = 1, filters: Sequence[int] = (64, 128, 256, 512)
    ) -> None:
        super().__init__()
        levels = list(filters)
        if len(levels) != 4 or min(levels) < 2 or any(level % 2 for level in levels):
            raise ValueError(f"`filters` must be 4 multiples of 2, got {levels}.")
        self.encoder = nn.ModuleList([_TwoBlocks(*pair) for pair in pairwise([in_channels, *levels])])
        self.decoder = nn.ModuleList([
            _Level(levels[level + 1], levels[level], _CELLS[level], joins=level == 0) for level in (2, 1, 0)
        ])
        self.dropout = nn.Dropout2d(0.5)
        self.head = nn.Conv2d(levels[0], out_channels, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to logits (B, out_channels, H, W)."""
        deep = pad_to_multiple(image, 8)
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            deep = block(F.max_pool2d(deep, 2) if level > 0 else deep)    # (B, c, H / 2^level, W / 2^level)
            skips.append(deep)
        for number, step in enumerate(self.decoder):
            deep = step(deep, skips[2 - number])
        return crop_to(self.head(self.dropout(deep)), image)


class _Level(nn.Module):
    """Twice the size, joined to the skip of that size, two blocks and pooling."""

    def __init__(self, before: int, after: int, cells: Sequence[int], joins: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, kernel_size=2, stride=2)
        self.blocks = _TwoBlocks(2 * after, after)
        self.pooling = _Pooling(after, cells, joins)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        return self.pooling(self.blocks(torch.cat([self.up(features), skip], 1)))


class _TwoBlocks(nn.Sequential):
    """Two residual blocks, the first of which changes the channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(_Block(before, after, projects=True), _Block(after, after, projects=False))


class _Block(nn.Module):
    """Selective kernels between convolutions of 1 x 1, added to the input or a projection of it."""

    def __init__(self, before: int, after: int, projects: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _normalized(before, after, 1), nn.ReLU(inplace=True),
            _SelectiveKernels(after), _BatchNorm(after), nn.ReLU(inplace=True),
            _normalized(after, after, 1),
        )
        self.shortcut = _normalized(before, after, 1) if projects else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.main(features) + self.shortcut(features))


class _SelectiveKernels(nn.Module):
    """Convolutions of 5 x 5 and of 3 x 3, weighed against each other per channel by what both see in all the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(_normalized(channels, channels, 5, bias=True), nn.ReLU(inplace=True))
        self.narrow = nn.Sequential(_normalized(channels, channels, 3, bias=True), nn.ReLU(inplace=True))
        self.squeeze = nn.Sequential(_normalized(channels, channels // 2, 1, bias=True), nn.ReLU(inplace=True))
        self.choose_wide = nn.Conv2d(channels // 2, channels, kernel_size=1)
        self.choose_narrow = nn.Conv2d(channels // 2, channels, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        wide, narrow = self.wide(features), self.narrow(features)
        seen = self.squeeze((wide + narrow).mean(dim=[2, 3], keepdim=True))    # (B, C / 2, 1, 1)
        # the softmax over two branches is the logistic function of their difference
        weight = torch.sigmoid(self.choose_wide(seen) - self.choose_narrow(seen))
        return narrow + weight * (wide - narrow)


class _Pooling(nn.Module):
    """Means over two grids of cells and over whole rows and columns, added to the features they come from.

    Args:
        channels: of the features.
        cells: per side of the two grids.
        joins: as the level of the image's size does it: joins the grids to the features rather than adding them, with
            half of the channels each, and multiplies the rows and columns by the features.
    """

    def __init__(self, channels: int, cells: Sequence[int], joins: bool) -> None:
        super().__init__()
        grid = channels // 2 if joins else channels
        self.coarse, self.fine = cells
        self.joins = joins
        self.to_grids = nn.Sequential(_normalized(channels, channels, 1), nn.ReLU(inplace=True))
        self.to_strips = nn.Sequential(_normalized(channels, channels, 1), nn.ReLU(inplace=True))
        self.near = _normalized(channels, channels, 3)
        self.of_coarse = _normalized(channels, grid, 3)
        self.of_fine = _normalized(channels, grid, 3)
        self.of_columns = _normalized(channels, channels, (1, 3))
        self.of_rows = _normalized(channels, channels, (3, 1))
        both = 2 * channels if joins else channels
        self.grids = nn.Sequential(_normalized(both, channels, 3), nn.ReLU(inplace=True))
        self.strips = nn.Sequential(_normalized(channels, channels, 3), nn.ReLU(inplace=True))
        self.result = _normalized(2 * channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        size = [features.shape[2], features.shape[3]]
        grids, strips = self.to_grids(features), self.to_strips(features)
        near = self.near(grids)
        coarse = F.interpolate(self.of_coarse(_cell_means(grids, self.coarse)), size)
        fine = F.interpolate(self.of_fine(_cell_means(grids, self.fine)), size)
        columns = self.of_columns(strips.mean(dim=2, keepdim=True))    # (B, C, 1, W), the same in all rows
        rows = self.of_rows(strips.mean(dim=3, keepdim=True))          # (B, C, H, 1)
        grids = self.grids(F.relu(torch.cat([near, coarse, fine], 1) if self.joins else near + coarse + fine))
        strips = self.strips(F.relu(columns + rows))
        if self.joins:
            strips = features * strips
        return F.relu(features + self.result(torch.cat([grids, strips], 1)))


def _cell_means(features: Tensor, cells: int) -> Tensor:
    """Means over `cells` x `cells` parts, shape (B, C, cells, cells), as adaptive average pooling defines them.

    As products with two matrices, since adaptive pooling is exported to ONNX for one size of image only, and its
    gradient is not deterministic on a GPU.
    """
    rows, columns = _shares(features.shape[2], cells, features), _shares(features.shape[3], cells, features)
    return rows @ features @ columns.transpose(0, 1)


def _shares(length: int, cells: int, like: Tensor) -> Tensor:
    """What each of `length` pixels has in the mean of each cell, shape (cells, length)."""
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    pixel = torch.arange(length, device=like.device)
    start, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = ((pixel >= start) & (pixel < end)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


class _BatchNorm(nn.BatchNorm2d):
    """Takes its running statistics for a single pixel of a single sample, which has no variance."""

    def forward(self, features: Tensor) -> Tensor:
        training = self.training and features.numel() > features.shape[1]
        if training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )


def _normalized(before: int, after: int, kernel: int | tuple[int, int], bias: bool = False) -> nn.Sequential:
    """Convolution that keeps the size, and batch normalization."""
    return nn.Sequential(nn.Conv2d(before, after, kernel, padding="same", bias=bias), _BatchNorm(after))
