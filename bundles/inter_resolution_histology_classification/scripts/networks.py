# SPDX-License-Identifier: Apache-2.0
"""Classifiers whose last layer of features is averaged and read by a linear head, as class attention needs it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn

__all__ = ["VGG16", "FieldClassifier", "with_backbone"]

_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))   # channels and convolutions of each level


class FieldClassifier(nn.Module):
    """Two convolutions per level, each with batch norm and ReLU; the mean over all positions; a linear head.

    Any size of picture gives one score per class. The layer that the head reads is `features`, its weight
    `head.weight`. A teacher has more `filters`, and a level more, as it sees more pixels.

    Args:
        out_channels: number of classes, K.
        filters: channels of each level.
        strides: of the first convolution of each level. Their product is the number of pixels per cell of the maps:
            of a small picture it must leave some cells, see `PairingCheck`.
        in_channels: of the picture.

    Raises:
        ValueError: another number of strides than of filters.

    Example:
        >>> network = FieldClassifier(3, [4, 8], [1, 2])
        >>> network(torch.rand(2, 3, 12, 8)).shape, network.features(torch.rand(2, 3, 12, 8)).shape
        (torch.Size([2, 3]), torch.Size([2, 8, 6, 4]))
    """

    def __init__(
        self, out_channels: int, filters: Sequence[int], strides: Sequence[int], in_channels: int = 3
    ) -> None:
        super().__init__()
        if len(filters) != len(strides) or not filters:
            raise ValueError(f"`strides` must be as many as `filters`, {len(filters)}, got {len(strides)}.")
        layers = []
        for (before, after), stride in zip(pairwise([in_channels, *filters]), strides, strict=True):
            layers += [_convolution(before, after, stride), _convolution(after, after, 1)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(filters[-1], out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        logits: Tensor = self.head(self.features(image).mean((2, 3)))
        return logits


def _convolution(before: int, after: int, stride: int) -> Convolution:
    return Convolution(2, before, after, strides=stride, adn_ordering="NA", norm="BATCH", act="RELU", bias=False)


class VGG16(nn.Module):
    """VGG16 of the published experiments, up to its last convolution; the mean over all positions; a linear head.

    The last ReLU and the last pooling are left out, so that features have a sign, as released. Modules of `features`
    have the numbers that torchvision gives them, for `with_backbone`. 14,716,740 parameters with four classes.

    Args:
        out_channels: number of classes, K.

    Reference:
        R. del Amor et al., Attention to detail: inter-resolution knowledge distillation, arXiv 2401.06010, and its
        released code; K. Simonyan, A. Zisserman, Very deep convolutional networks, arXiv 1409.1556, table 1, D.

    Example:
        >>> sum(parameter.numel() for parameter in VGG16(4).parameters())
        14716740
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, count in _VGG16:
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-2])                    # 0 to 28: up to conv5_3
        self.head = nn.Linear(before, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        logits: Tensor = self.head(self.features(image).mean((2, 3)))  # of (B, 512, H / 16, W / 16)
        return logits


def with_backbone(network: nn.Module, path: str | None) -> nn.Module:
    """Put pretrained weights into the features of a network.

    Args:
        network: has `features`.
        path: state dict with keys `features.0.weight` and so on, tensors only, such as torchvision's file of VGG16;
            keys that the network does not have are left out. None leaves the network as it is.

    Returns:
        The network.

    Raises:
        ValueError: the file lacks some of the features.
    """
    if path is None:
        return network
    weights = torch.load(path, map_location="cpu", weights_only=True)
    own = network.state_dict()
    wanted = [name for name in own if name.startswith("features.")]
    lacking = [name for name in wanted if name not in weights or weights[name].shape != own[name].shape]
    if lacking:
        raise ValueError(
            f"`backbone_path` must hold weights of {type(network).__name__}, got none that fit for {len(lacking)} of "
            f"{len(wanted)}, such as {lacking[0]}; give the file of the same network, or null."
        )
    network.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return network
