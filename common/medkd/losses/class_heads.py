# SPDX-License-Identifier: Apache-2.0
"""Predictions of layers inside a network: a 1 x 1 convolution to the classes for each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.base import pointwise_convolution
from medkd.losses.fitted import FittedFile

__all__ = ["ClassHeads", "FixedHeads", "LayerHeads", "TeacherHeads", "drawn_projection"]


class LayerHeads(nn.Module):
    """What both kinds have in common: logits of each layer on its own grid.

    Args:
        channels: channels of each layer.
        classes: channels of the logits.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: no layer, fewer than one channel or class, or another rank.
    """

    def __init__(self, channels: Sequence[int], classes: int, spatial_dims: int = 3) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or classes < 1:
            raise ValueError(
                "`channels` and `classes` must be at least 1, and there must be one layer, got "
                f"{list(channels)} and {classes}."
            )
        if spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims}.")
        self.channels = tuple(channels)
        self.classes = classes
        self.spatial_dims = spatial_dims

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Map layers (B, C_l, *S_l) to logits (B, K, *S_l) of their type.

        Raises:
            ValueError: layers of other channels or axes than promised.
        """
        if len(levels) != len(self.channels):
            raise ValueError(f"`levels` must be {len(self.channels)} layers, one for each head, got {len(levels)}.")
        return [self.predict(n, level) for n, level in enumerate(levels)]

    def predict(self, number: int, level: Tensor) -> Tensor:
        """Map one layer (B, C_l, *S_l) to its logits (B, K, *S_l).

        Raises:
            ValueError: a layer of other channels or axes than promised.
        """
        promised = (self.channels[number], self.spatial_dims)
        if (found := (level.shape[1], level.dim() - 2)) != promised:
            raise ValueError(
                f"`channels` and `spatial_dims` of head {number} must be {found[0]} and {found[1]}, those of the layer "
                f"it reads, got {promised[0]} and {promised[1]}; list the channels of the tapped layers in their order."
            )
        return self._project(number, level)

    def _project(self, number: int, level: Tensor) -> Tensor:
        raise NotImplementedError


class ClassHeads(LayerHeads):
    """Heads that are trained. Their first values come from a generator of their own.

    Args:
        channels: channels of each layer.
        classes: channels of the logits: those of the network's prediction.
        spatial_dims: 2 or 3.
        size: of the first weights, in units of 1 / sqrt(channels); small, so that a head learns before it pulls.
        seed: of the first values.

    Reference:
        Lee et al., Deeply-Supervised Nets, arXiv 1409.5185 (companion outputs).

    Example:
        >>> heads = ClassHeads([8, 4], classes=3, spatial_dims=2)
        >>> [tuple(one.shape) for one in heads([torch.rand(1, 8, 2, 2), torch.rand(1, 4, 5, 5)])]
        [(1, 3, 2, 2), (1, 3, 5, 5)]
    """

    def __init__(
        self, channels: Sequence[int], classes: int, spatial_dims: int = 3, size: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__(channels, classes, spatial_dims)
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(
            pointwise_convolution(c, classes, spatial_dims, generator, bias=True) for c in self.channels
        )
        with torch.no_grad():
            for layer in self.layers:
                layer.get_parameter("weight").mul_(size)

    def _project(self, number: int, level: Tensor) -> Tensor:
        layer = self.layers[number]
        logits: Tensor = layer(level.to(layer.get_parameter("weight").dtype))
        return logits


class FixedHeads(LayerHeads):
    """Heads that are drawn once and never trained: orthonormal rows, no bias.

    Args:
        channels: channels of each layer.
        classes: channels of the logits.
        spatial_dims: 2 or 3.
        seed: of the draw; student and teacher need one of their own each.

    Example:
        >>> head = FixedHeads([8], classes=3, spatial_dims=2)
        >>> weight = head.weight_0.flatten(1)
        >>> bool(torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-6)), len(list(head.parameters()))
        (True, 0)
    """

    def __init__(self, channels: Sequence[int], classes: int, spatial_dims: int = 3, seed: int = 0) -> None:
        super().__init__(channels, classes, spatial_dims)
        generator = torch.Generator().manual_seed(seed)
        for n, count in enumerate(self.channels):
            draw = torch.randn(max(count, classes), min(count, classes), generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(draw).Q                        # orthonormal columns
            weight = (basis.T if count >= classes else basis).float().contiguous()         # (K, C)
            self.register_buffer(f"weight_{n}", weight.view(classes, count, *[1] * spatial_dims))

    def _project(self, number: int, level: Tensor) -> Tensor:
        convolution = F.conv3d if self.spatial_dims == 3 else F.conv2d
        return convolution(level, self.get_buffer(f"weight_{number}").to(level.dtype))


class TeacherHeads(FittedFile[ClassHeads]):
    """The teacher's heads: fitted once, then frozen; read when they are needed, in no optimizer or checkpoint.

    Args:
        channels: channels of each tapped layer of the teacher.
        classes: channels of its prediction.
        path: their weights, as `medkd.handlers.teacher_heads.HeadFitting` writes them.
        spatial_dims: 2 or 3.
        teacher_path: weights of the teacher, which must be those that the heads were fitted to; None does not look.
    """

    name = "class heads"
    way_out = "give the trainer a `medkd.handlers.teacher_heads.HeadFitting`, which fits them"

    def __init__(
        self, channels: Sequence[int], classes: int, path: str | os.PathLike[str], spatial_dims: int = 3,
        teacher_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, spatial_dims, teacher_path)
        self.channels = tuple(channels)
        self.classes = classes

    def build(self) -> ClassHeads:
        """Give heads with their first values, of the size in which they are fitted."""
        return ClassHeads(self.channels, self.classes, self.spatial_dims, size=1.0)

    def describe(self) -> str:
        """Say what the file must hold."""
        return f"heads for layers of {list(self.channels)} channels and {self.classes} classes"


def drawn_projection(maps: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Map features (B, C, *S) to (B, channels, *S) by a convolution that is drawn now and never trained.

    Weights and biases are uniform in +-1 / sqrt(C), torch's default for a 1 x 1 kernel. On average over the draws,
    what depends on it has a gradient that knows nothing of what it is compared with.
    """
    size = (channels, maps.shape[1] + 1)
    drawn = ((2.0 * torch.rand(size, generator=generator) - 1.0) * maps.shape[1] ** -0.5).to(maps)
    weight, bias = drawn[:, :-1].reshape(channels, -1, *[1] * (maps.dim() - 2)), drawn[:, -1]
    convolution = F.conv3d if maps.dim() == 5 else F.conv2d
    return convolution(maps, weight, bias)
