# SPDX-License-Identifier: Apache-2.0
"""A teacher's layer in as few channels as the student's has: auto-encoders, fitted without labels and then frozen."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.fitted import fitted_to, load_fitted
from medkd.ops.precision import at_least_float32
from medkd.weights import load_tensors

__all__ = ["Paraphraser", "Paraphrasers", "Reconstruction", "TeacherParaphrasers", "reconstruction_loss"]

Reconstruction = Literal["l1", "mse"]
_SLOPE = 0.1
_WAY_OUT = "give the trainer a `medkd.handlers.teacher_heads.ParaphraserFitting`, which fits them"


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
    if kind not in get_args(Reconstruction):
        raise ValueError(f"`kind` must be one of {get_args(Reconstruction)}, got {kind!r}.")
    distance = F.l1_loss if kind == "l1" else F.mse_loss
    return distance(at_least_float32(found), at_least_float32(maps.detach()))


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


class TeacherParaphrasers:
    """Fitted paraphrasers of a teacher: read when they are needed and frozen, in no optimizer or checkpoint.

    Args:
        channels: `[C_T, C]` for each layer of the teacher, in the order in which `flows` names them first.
        path: their weights, as `medkd.handlers.teacher_heads.ParaphraserFitting` writes them.
        spatial_dims: 2 or 3.
        squeeze: as in `Paraphraser`.
        teacher_path: weights of the teacher, which must be those that they were fitted to; None does not look.

    Attributes:
        before_loading: called before the file is read; it may write it.
    """

    def __init__(
        self, channels: Sequence[Sequence[int]], path: str | os.PathLike[str], spatial_dims: int = 3,
        squeeze: int | None = None, teacher_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.channels = tuple(tuple(pair) for pair in channels)
        self.path = Path(path)
        self.spatial_dims = spatial_dims
        self.squeeze = squeeze
        self.teacher_path = None if teacher_path is None else Path(teacher_path)
        self.before_loading: Callable[[], None] = lambda: None

    def belong_to(self, sha256: str) -> bool:
        """Whether the file is there and was fitted to the teacher of this hash."""
        return self.path.is_file() and fitted_to(load_tensors(self.path)) == sha256

    def load(self, device: torch.device | str = "cpu") -> Paraphrasers:
        """Build them, load them strictly, and freeze them on `device`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: weights of others, or of such that were fitted to another teacher.
        """
        self.before_loading()
        built = Paraphrasers(self.channels, self.spatial_dims, self.squeeze)
        contents = f"paraphrasers of {[list(pair) for pair in self.channels]} channels, [teacher, student]"
        return load_fitted(built, self.path, self.teacher_path, device, "paraphrasers", contents, _WAY_OUT)


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
    kinds = (nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (nn.Conv2d, nn.Conv3d)
    with torch.device("meta"):                                     # no draw from the global generator
        layer = kinds[spatial_dims - 2](channels_in, channels_out, kernel, padding=kernel // 2)
    layer = layer.to_empty(device="cpu")
    gain = math.sqrt(2.0 / (1.0 + _SLOPE**2))                      # keeps the size of what passes
    with torch.no_grad():
        layer.weight.normal_(std=gain / math.sqrt(channels_in * kernel**spatial_dims), generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer
