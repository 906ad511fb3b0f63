# SPDX-License-Identifier: Apache-2.0
"""A teacher's layer in as few channels as the student's has: auto-encoders, fitted without labels and then frozen."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.base import drawn_convolution
from medkd.losses.fitted import FittedFile, read_taps
from medkd.ops.precision import at_least_float32

__all__ = ["Paraphraser", "Paraphrasers", "Reconstruction", "TeacherParaphrasers", "check_kind", "reconstruction_loss"]

Reconstruction = Literal["l1", "mse"]
_SLOPE = 0.1


class Paraphraser(nn.Module):
    """An auto-encoder of one layer; its code, the factor, is what the student learns from.

    Encoder: convolutions C_T -> C_T -> C -> C; decoder: transposed ones C -> C -> C_T -> C_T. All have 3 voxels per
    axis, a bias, and LeakyReLU 0.1 behind them, the last one too; no normalization, and the size stays. The first
    values come from a generator of their own. Published are 256 channels, which in 3-D take 28 GMAC at 24^3.

    Args:
        channels: C_T of the teacher's layer.
        factor: C of the student's.
        spatial_dims: 2 or 3.
        squeeze: channels that a 1 x 1 convolution brings the layer to first, and another one back from at the end
            (ours, for 3-D: 256 -> 64 -> 32 takes 1.4 instead of 28 GMAC); None is as published.
        seed: of the first values.

    Raises:
        ValueError: fewer than one channel, or another rank.

    Reference:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, arXiv 1802.04977; as released
        with Zou et al., Graph Flow, arXiv 2203.08667.

    Example:
        >>> paraphraser = Paraphraser(8, factor=3, spatial_dims=2)
        >>> maps = torch.rand(1, 8, 5, 5)
        >>> paraphraser(maps).shape, paraphraser.reconstruct(maps).shape
        (torch.Size([1, 3, 5, 5]), torch.Size([1, 8, 5, 5]))
    """

    def __init__(
        self, channels: int, factor: int, spatial_dims: int = 3, squeeze: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if min(channels, factor, squeeze or 1) < 1:
            raise ValueError(
                f"`channels`, `factor` and `squeeze` must be at least 1, got {channels}, {factor} and {squeeze}."
            )
        if spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims}.")
        self.channels, self.factor, self.spatial_dims = channels, factor, spatial_dims
        generator = torch.Generator().manual_seed(seed)
        middle, kernel = (channels, 3) if squeeze is None else (squeeze, 1)
        self.encoder = _chain([(channels, middle, kernel), (middle, factor, 3), (factor, factor, 3)], spatial_dims,
                              False, generator)
        self.decoder = _chain([(factor, factor, 3), (factor, middle, 3), (middle, channels, kernel)], spatial_dims,
                              True, generator)

    def forward(self, maps: Tensor) -> Tensor:
        """Map a layer (B, C_T, *S) to its factor (B, C, *S).

        Raises:
            ValueError: a layer of other channels or axes than promised.
        """
        if (found := (maps.shape[1], maps.dim() - 2)) != (self.channels, self.spatial_dims):
            raise ValueError(
                f"`channels` and `spatial_dims` of a paraphraser must be {found[0]} and {found[1]}, those of the layer "
                f"it reads, got {self.channels} and {self.spatial_dims}; list the layers in the order of `flows`."
            )
        factor: Tensor = self.encoder(maps)
        return factor

    def reconstruct(self, maps: Tensor) -> Tensor:
        """Map a layer (B, C_T, *S) to what its factor tells of it, of the same shape."""
        layer: Tensor = self.decoder(self(maps))
        return layer


def reconstruction_loss(found: Tensor, maps: Tensor, kind: Reconstruction = "l1") -> Tensor:
    """How far a reconstruction is from the layer that it is of, by which a paraphraser is fitted.

    Args:
        found: shape (B, C_T, *S), floating.
        maps: the layer, likewise; never receives a gradient.
        kind: `l1`, as in the official code of factor transfer, or `mse`.

    Returns:
        A scalar, mean over all values, at least float32.

    Raises:
        ValueError: unknown `kind`.

    Example:
        >>> reconstruction_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0])).item()
        1.5
    """
    check_kind(kind)
    distance = F.l1_loss if kind == "l1" else F.mse_loss
    return distance(at_least_float32(found), at_least_float32(maps.detach()))


def check_kind(kind: str) -> None:
    """Refuse an unknown reconstruction loss.

    Raises:
        ValueError: neither `l1` nor `mse`.
    """
    if kind not in get_args(Reconstruction):
        raise ValueError(f"`kind` must be one of {get_args(Reconstruction)}, got {kind!r}.")


class Paraphrasers(nn.Module):
    """One auto-encoder for each of several layers.

    Args:
        channels: `[C_T, C]` for each layer: the teacher's channels, and the student's.
        spatial_dims: 2 or 3.
        squeeze: as in `Paraphraser`.
        seed: of the first values; each layer has its own.

    Raises:
        ValueError: no layer, or what `Paraphraser` refuses.
    """

    def __init__(
        self, channels: Sequence[Sequence[int]], spatial_dims: int = 3, squeeze: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if not channels or any(len(pair) != 2 for pair in channels):
            raise ValueError(
                f"`channels` must give [teacher, student] for each layer of the teacher in `flows`, got {channels!r}."
            )
        self.layers = nn.ModuleList(
            Paraphraser(pair[0], pair[1], spatial_dims, squeeze, seed + n) for n, pair in enumerate(channels)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Map layers (B, C_l, *S_l) to their factors.

        Raises:
            ValueError: another number of layers, or layers of other channels or axes than promised.
        """
        if len(levels) != len(self.layers):
            raise ValueError(f"`levels` must be {len(self.layers)} layers, one for each, got {len(levels)}.")
        return [layer(level) for layer, level in zip(self.layers, levels, strict=True)]


class TeacherParaphrasers(FittedFile[Paraphrasers]):
    """Fitted paraphrasers of a teacher: read when they are needed and frozen, in no optimizer or checkpoint.

    Args:
        taps: paths of the teacher's layers, in the order in which the loss names them first.
        channels: `[C_T, C]` for each of them: the teacher's channels, and the student's.
        path: their weights, as `medkd.handlers.teacher_fitting.ParaphraserFitting` writes them.
        spatial_dims: 2 or 3.
        squeeze: as in `Paraphraser`.
        teacher_path: weights of the teacher, which must be those that they were fitted to; None does not look.

    Raises:
        ValueError: not as many taps as channels; in `load`: a file that was fitted to other layers, or in other order.
    """

    argument = "paraphrasers"
    name = "paraphrasers"
    way_out = "give the trainer a `medkd.handlers.teacher_fitting.ParaphraserFitting`, which fits them"

    def __init__(
        self, taps: Sequence[str], channels: Sequence[Sequence[int]], path: str | os.PathLike[str],
        spatial_dims: int = 3, squeeze: int | None = None, teacher_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, spatial_dims, teacher_path)
        if isinstance(taps, str) or len(taps) != len(channels):
            raise ValueError(f"`taps` must be {len(channels)} layers, one for each of `channels`, got {taps!r}.")
        self.taps = tuple(taps)
        self.channels = tuple(tuple(pair) for pair in channels)
        self.squeeze = squeeze

    def build(self) -> Paraphrasers:
        """Give paraphrasers with their first values."""
        return Paraphrasers(self.channels, self.spatial_dims, self.squeeze)

    def describe(self) -> str:
        """Say what the file must hold."""
        return f"paraphrasers of {[list(pair) for pair in self.channels]} channels, [teacher, student]"

    def check_notes(self, notes: Mapping[str, Tensor]) -> None:
        """Refuse a file that was fitted to other layers; their channels may be the same."""
        if (told := read_taps(notes)) is not None and told != list(self.taps):
            raise ValueError(
                f"`paraphrasers` must be fitted to the teacher's layers {list(self.taps)}, in this order, but "
                f"{self.path} was fitted to {told}; {self.way_out}."
            )


def _chain(
    sizes: Sequence[tuple[int, int, int]], spatial_dims: int, transposed: bool, generator: torch.Generator
) -> nn.Sequential:
    """Convolutions (channels in, out, voxels per axis), each with LeakyReLU behind it."""
    layers: list[nn.Module] = []
    for channels_in, channels_out, kernel in sizes:
        layers += [_convolution(channels_in, channels_out, kernel, spatial_dims, transposed, generator)]
        layers += [nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers)


def _convolution(
    channels_in: int, channels_out: int, kernel: int, spatial_dims: int, transposed: bool, generator: torch.Generator
) -> nn.Module:
    gain = math.sqrt(2.0 / (1.0 + _SLOPE**2))                      # keeps the size of what passes
    std, padding = gain / math.sqrt(channels_in * kernel**spatial_dims), kernel // 2
    kinds = (nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (nn.Conv2d, nn.Conv3d)
    kind: type[nn.Conv2d] = kinds[spatial_dims - 2]   # type: ignore[assignment]
    return drawn_convolution(lambda: kind(channels_in, channels_out, kernel, padding=padding), std, generator)
