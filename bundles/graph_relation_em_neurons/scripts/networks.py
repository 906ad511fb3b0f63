# SPDX-License-Identifier: Apache-2.0
"""The 3-D U-Net of teacher and student; needs torch and monai only."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.affinities import output_head

__all__ = ["MalaUNet"]

Padding = Literal["valid", "same"]
Norm = Literal["none", "batch"]
_SLOPE = 0.005
_IN_THE_PLANE = [[1, 3, 3]] * 3


class MalaUNet(nn.Module):
    """3-D U-Net for EM that gives an embedding per voxel; it pools in the plane only unless it is told otherwise.

    With the default channels the teacher of the paper (84.02 M parameters); its student (0.368 M) has `channels`
    (8, 16, 32, 64) and `decoder_channels` (32, 32, 8).

    Taps, in the order of the forward pass, each after its second activation; sizes are those behind `stem`:

    * `encoder.0` to `encoder.3`: levels at 1, 1/3, 1/9 and 1/27 of the size in the plane; `encoder.3` is the bottom;
    * `decoder.0`, `decoder.1`, `decoder.2`: levels at 1/9, 1/3 and 1; the last two are conv14 and conv17 of the code of
      the paper;
    * `embedding`: the result, before it is cropped.

    With `padding` "same", taps have the size of the padded image: up to 26 voxels more at the ends of H and W, or what
    else makes each axis a multiple of `alignment`.

    Args:
        channels: of the four encoder levels.
        decoder_channels: of the three decoder levels, from the bottom up; the encoder's by default.
        embedding_channels: of the embedding.
        in_channels: of the image.
        padding: "valid", as in the paper: the result is smaller than the image by `margin` on each side, D must be at
            least 29, H and W one of 214, 241, 268, ...; or "same": of the image's size, for any size. A crop
            that starts at row and column 27 k + 1 has the same "valid" result as the whole image with "same" there.
        output: "embedding", shape (B, embedding_channels, *S), or "affinity", shape (B, len(offsets), *S), range
            [0, 1], see `embedding_affinity`; "direct_affinity": where the channels of the embedding are logits of
            affinities, see `direct_affinity`.
        offsets: (z, y, x) steps in voxels of the affinities; no use for embeddings.
        foreground: one channel behind the affinities, the probability of foreground; see `embedding_affinity`.
        pooling: (z, y, x) factors of the three poolings; another than that of the paper, such as [[2, 2, 2]] * 3 for
            voxels that are cubes, needs the padding "same".
        norm: "none", as in the paper, or "batch": batch normalization behind each convolution of 3 x 3 x 3. Unlike
            norms of an instance it gives a voxel the same value in every window.
        stem: (z, y, x) factors by which a first convolution makes the image smaller, and the last one the embedding
            larger again: all levels then work at that size. With (1, 2, 2) a student takes a quarter of the
            multiplications. Another than (1, 1, 1) needs the padding "same".

    `output`, `offsets` and `padding` do not change the state dict. `margin` is the number of voxels lost on each side
    of D, H, W; results of two crops agree if they are shifted by multiples of `alignment`.

    Raises:
        ValueError: a wrong number of channels, poolings or factors, no such output, padding or norm, an affinity
            without offsets; in the forward pass an image of a size that does not fit "valid".

    Reference:
        Funke et al., Large scale image segmentation with structured loss based deep learning, TPAMI 2018; with the
        embedding of Liu et al., arXiv 2401.06370, and its tiny student. "same", `pooling`, `norm` and `stem` are ours.

    Example:
        >>> network = MalaUNet(channels=(2, 3, 4, 5), padding="same")
        >>> network(torch.zeros(1, 1, 4, 30, 31)).shape
        torch.Size([1, 16, 4, 30, 31])
    """

    def __init__(   # noqa: PLR0913 - options of a config, each with a default
        self,
        channels: Sequence[int] = (12, 60, 300, 1500),
        decoder_channels: Sequence[int] | None = None,
        embedding_channels: int = 16,
        in_channels: int = 1,
        padding: Padding = "valid",
        output: Literal["embedding", "affinity", "direct_affinity"] = "embedding",
        offsets: Sequence[Sequence[int]] | None = None,
        foreground: bool = False,
        pooling: Sequence[Sequence[int]] = _IN_THE_PLANE,
        norm: Norm = "none",
        stem: Sequence[int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        for name, value, known in (("padding", padding, get_args(Padding)), ("norm", norm, get_args(Norm))):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")
        factors = _check_pooling(pooling, padding)
        shrink = _check_stem(stem, padding)
        encoder = _check_channels("channels", channels, 4)
        skips = encoder[2::-1]                                     # of levels 3, 2, 1
        decoder = skips if decoder_channels is None else _check_channels("decoder_channels", decoder_channels, 3)
        self.is_valid = padding == "valid"
        self.margin = (14, 106, 106) if self.is_valid else (0, 0, 0)
        planes, rows, columns = (prod(factor[axis] for factor in [shrink, *factors]) for axis in range(3))
        self.alignment = (planes, rows, columns)
        border = 0 if self.is_valid else 1
        is_small = max(shrink) > 1
        self.stem = nn.Conv3d(in_channels, encoder[0], shrink, stride=shrink) if is_small else nn.Identity()
        self.encoder = nn.ModuleList(
            _convolutions(before, after, border, norm)
            for before, after in zip([encoder[0] if is_small else in_channels, *encoder], encoder, strict=False)
        )
        self.pooling = factors
        self.decoder = nn.ModuleList(
            _Up(deep, skip, after, border, norm, factor)
            for deep, skip, after, factor in zip([encoder[-1], *decoder], skips, decoder, factors[::-1], strict=False)
        )
        last = nn.ConvTranspose3d if is_small else nn.Conv3d
        self.embedding = last(decoder[-1], embedding_channels, kernel_size=shrink, stride=shrink)
        self.head = output_head(output, offsets, spatial_dims=3, foreground=foreground)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE, mode="fan_in")

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, D, H, W) to embeddings or affinities."""
        planes, rows, columns = 0, 0, 0
        if not self.is_valid:
            depth, height, width = self.alignment
            planes, rows = (depth - image.shape[2] % depth) % depth, (height - image.shape[3] % height) % height
            columns = (width - image.shape[4] % width) % width
            image = F.pad(image, [0, columns, 0, rows, 0, planes], mode="replicate")
        elif not torch.jit.is_tracing():
            _check_size(image)
        skips: list[Tensor] = []
        deep = self.stem(image)
        for index, level in enumerate(self.encoder):
            if index > 0:
                deep = F.max_pool3d(deep, self.pooling[index - 1])
            deep = level(deep)                                     # (B, c, d, H / 3^index, W / 3^index), less if valid
            skips.append(deep)
        for index, level in enumerate(self.decoder):
            deep = level(deep, skips[2 - index])
        embedding = self.embedding(deep)
        if not self.is_valid:
            embedding = F.pad(embedding, [0, -columns, 0, -rows, 0, -planes])
        return self.head(embedding)


class _Up(nn.Module):
    """A decoder level: up, to the channels of the skip, joined to its center, two convolutions."""

    def __init__(self, deep: int, skip: int, out: int, border: int, norm: str, factor: list[int]) -> None:
        super().__init__()
        up = (factor[0], factor[1], factor[2])
        self.up = nn.ConvTranspose3d(deep, deep, up, stride=up, groups=deep, bias=False)
        self.reduce = nn.Conv3d(deep, skip, kernel_size=1)
        self.convolutions = _convolutions(2 * skip, out, border, norm)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        deep = self.reduce(self.up(deep))
        for axis in range(2, 5):
            length = deep.size(axis)
            skip = skip.narrow(axis, (skip.size(axis) - length) // 2, length)
        return self.convolutions(torch.cat([deep, skip], 1))


def _convolutions(before: int, after: int, border: int, norm: str) -> nn.Sequential:
    """Two convolutions; state dict: `0` and `2`, with norms `0`, `1`, `3` and `4`."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers.append(nn.Conv3d(channels, after, 3, padding=border))
        layers += [nn.BatchNorm3d(after)] if norm == "batch" else []
        layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
    return nn.Sequential(*layers)


def _check_pooling(pooling: Sequence[Sequence[int]], padding: str) -> list[list[int]]:
    factors = [list(factor) for factor in pooling]
    if len(factors) != 3 or any(len(factor) != 3 or min(factor) < 1 for factor in factors):
        raise ValueError(f"`pooling` must be 3 triples of factors (z, y, x) of at least 1, got {factors}.")
    if padding == "valid" and factors != _IN_THE_PLANE:
        raise ValueError(f"`pooling` must be {_IN_THE_PLANE} for the padding 'valid', got {factors}; take 'same'.")
    return factors


def _check_stem(stem: Sequence[int], padding: str) -> tuple[int, int, int]:
    factors = tuple(stem)
    if len(factors) != 3 or min(factors) < 1:
        raise ValueError(f"`stem` must be 3 factors (z, y, x) of at least 1, got {list(factors)}.")
    if padding == "valid" and max(factors) > 1:
        raise ValueError(f"`stem` must be [1, 1, 1] for the padding 'valid', got {list(factors)}; take 'same'.")
    return factors


def _check_channels(name: str, channels: Sequence[int], count: int) -> list[int]:
    numbers = list(channels)
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"`{name}` must be {count} numbers of at least 1, got {numbers}.")
    return numbers


def _check_size(image: Tensor) -> None:
    """Refuse sizes at which a pooling would drop voxels or nothing would be left."""
    least, step = [29, 214, 214], [1, 27, 27]                      # of which (1, 2, 2) voxels are left
    size, smaller, larger = list(image.shape[2:]), least[:0], least[:0]
    for axis, length in enumerate(size):
        excess = max(length - least[axis], 0)
        smaller.append(least[axis] + excess // step[axis] * step[axis])
        larger.append(least[axis] + (excess + step[axis] - 1) // step[axis] * step[axis])
    if size != smaller:
        raise ValueError(
            f"`image` must have D of at least 29 and H, W of 214, 241, 268, ... for the padding 'valid', got {size}; "
            f"the nearest sizes are {smaller} and {larger}."
        )
