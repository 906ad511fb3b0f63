# SPDX-License-Identifier: Apache-2.0
"""The 3-D U-Net of teacher and student; needs torch and monai only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.affinities import output_head

__all__ = ["MalaUNet"]

Padding = Literal["valid", "same"]
_SLOPE = 0.005


class MalaUNet(nn.Module):
    """3-D U-Net for anisotropic EM that gives an embedding per voxel; it pools in the plane only.

    With the default channels the teacher of the paper (84.02 M parameters); its student (0.368 M) has `channels`
    (8, 16, 32, 64) and `decoder_channels` (32, 32, 8).

    Taps, in the order of the forward pass, each after its second activation:

    * `encoder.0` to `encoder.3`: levels at 1, 1/3, 1/9 and 1/27 of the size in the plane; `encoder.3` is the bottom;
    * `decoder.0`, `decoder.1`, `decoder.2`: levels at 1/9, 1/3 and 1; the last two are conv14 and conv17 of the code of
      the paper;
    * `embedding`: the result, before it is cropped.

    With `padding` "same", taps have the size of the padded image: up to 26 voxels more at the ends of H and W.

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

    `output`, `offsets` and `padding` do not change the state dict. `margin` is the number of voxels lost on each side
    of D, H, W; results of two crops agree if they are shifted by multiples of `alignment`.

    Raises:
        ValueError: a wrong number of channels, no such output or padding, an affinity without offsets; in the forward
            pass an image of a size that does not fit "valid".

    Reference:
        Funke et al., Large scale image segmentation with structured loss based deep learning, TPAMI 2018; with the
        embedding of Liu et al., arXiv 2401.06370, and its tiny student. "same" is ours.

    Example:
        >>> network = MalaUNet(channels=(2, 3, 4, 5), padding="same")
        >>> network(torch.zeros(1, 1, 4, 30, 31)).shape
        torch.Size([1, 16, 4, 30, 31])
    """

    def __init__(
        self,
        channels: Sequence[int] = (12, 60, 300, 1500),
        decoder_channels: Sequence[int] | None = None,
        embedding_channels: int = 16,
        in_channels: int = 1,
        padding: Padding = "valid",
        output: Literal["embedding", "affinity", "direct_affinity"] = "embedding",
        offsets: Sequence[Sequence[int]] | None = None,
        foreground: bool = False,
    ) -> None:
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(f"`padding` must be one of {get_args(Padding)}, got {padding!r}.")
        encoder = _check_channels("channels", channels, 4)
        skips = encoder[2::-1]                                     # of levels 3, 2, 1
        decoder = skips if decoder_channels is None else _check_channels("decoder_channels", decoder_channels, 3)
        self.is_valid = padding == "valid"
        self.margin = (14, 106, 106) if self.is_valid else (0, 0, 0)
        self.alignment = (1, 27, 27)                            # three poolings by 3
        border = 0 if self.is_valid else 1
        self.encoder = nn.ModuleList(
            _convolutions(before, after, border)
            for before, after in zip([in_channels, *encoder], encoder, strict=False)
        )
        self.pool = nn.MaxPool3d((1, 3, 3))
        self.decoder = nn.ModuleList(
            _Up(deep, skip, after, border)
            for deep, skip, after in zip([encoder[-1], *decoder], skips, decoder, strict=False)
        )
        self.embedding = nn.Conv3d(decoder[-1], embedding_channels, kernel_size=1)
        self.head = output_head(output, offsets, spatial_dims=3, foreground=foreground)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE, mode="fan_in")

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_channels, D, H, W) to embeddings or affinities."""
        rows, columns = 0, 0
        if not self.is_valid:
            rows, columns = (27 - image.shape[3] % 27) % 27, (27 - image.shape[4] % 27) % 27
            image = F.pad(image, [0, columns, 0, rows, 0, 0], mode="replicate")
        elif not torch.jit.is_tracing():
            _check_size(image)
        skips: list[Tensor] = []
        deep = image
        for index, level in enumerate(self.encoder):
            if index > 0:
                deep = self.pool(deep)
            deep = level(deep)                                     # (B, c, d, H / 3^index, W / 3^index), less if valid
            skips.append(deep)
        for index, level in enumerate(self.decoder):
            deep = level(deep, skips[2 - index])
        embedding = self.embedding(deep)
        if not self.is_valid:
            embedding = F.pad(embedding, [0, -columns, 0, -rows])
        return self.head(embedding)


class _Up(nn.Module):
    """A decoder level: up by 3 in the plane, to the channels of the skip, joined to its center, two convolutions."""

    def __init__(self, deep: int, skip: int, out: int, border: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(deep, deep, (1, 3, 3), stride=(1, 3, 3), groups=deep, bias=False)
        self.reduce = nn.Conv3d(deep, skip, kernel_size=1)
        self.convolutions = _convolutions(2 * skip, out, border)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        deep = self.reduce(self.up(deep))
        for axis in range(2, 5):
            length = deep.size(axis)
            skip = skip.narrow(axis, (skip.size(axis) - length) // 2, length)
        return self.convolutions(torch.cat([deep, skip], 1))


def _convolutions(before: int, after: int, border: int) -> nn.Sequential:
    """Two convolutions; state dict: `0` and `2`."""
    return nn.Sequential(
        nn.Conv3d(before, after, 3, padding=border), nn.LeakyReLU(_SLOPE, inplace=True),
        nn.Conv3d(after, after, 3, padding=border), nn.LeakyReLU(_SLOPE, inplace=True),
    )


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
