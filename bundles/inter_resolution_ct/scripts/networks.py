# SPDX-License-Identifier: Apache-2.0
"""A classifier of volumes whose last layer of features is averaged and read by a linear head, as attention needs it."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn

__all__ = ["VolumeClassifier"]


class VolumeClassifier(nn.Module):
    """VGG for volumes: levels of 3 x 3 x 3 convolutions, halved between levels; mean over all positions; linear head.

    Any size of at least 2 voxels per halving gives one score per class. The layer that the head reads is `features`,
    behind its last ReLU; the head's weight is `head.weight`. A cell of that layer is 2^(levels - 1) voxels long.

    Args:
        out_channels: number of classes, K.
        filters: channels of each level.
        convolutions: of each level, or one number for all.
        norm: MONAI's name of a norm behind each convolution, which then has no bias; None for convolutions with a bias
            and no norm, as in the original VGG.
        in_channels: of the volume.

    Raises:
        ValueError: no level, or another number of convolutions than of filters, or a level without one.

    Reference:
        K. Simonyan, A. Zisserman, Very deep convolutional networks, arXiv 1409.1556; the mean and the linear head as in
        R. del Amor et al., Attention to detail: inter-resolution knowledge distillation, arXiv 2401.06010.

    Example:
        >>> import torch
        >>> network = VolumeClassifier(2, [4, 8], convolutions=[1, 2])
        >>> volume = torch.rand(3, 1, 12, 8, 10)
        >>> network(volume).shape, network.features(volume).shape
        (torch.Size([3, 2]), torch.Size([3, 8, 6, 4, 5]))
    """

    def __init__(
        self, out_channels: int, filters: Sequence[int], convolutions: int | Sequence[int] = 2,
        norm: str | None = "BATCH", in_channels: int = 1,
    ) -> None:
        super().__init__()
        counts = [convolutions] * len(filters) if isinstance(convolutions, int) else list(convolutions)
        if not filters or len(counts) != len(filters) or min(counts) < 1:
            raise ValueError(
                f"`convolutions` must be 1 or more for each of the levels of `filters`, {list(filters)}, got "
                f"{convolutions}."
            )
        layers: list[nn.Module] = []
        before = in_channels
        for level, (after, count) in enumerate(zip(filters, counts, strict=True)):
            layers += [nn.MaxPool3d(2)] if level else []
            for _ in range(count):
                layers.append(_convolution(before, after, norm))
                before = after
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, out_channels)
        for module in self.features.modules():
            if isinstance(module, nn.Conv3d):                      # without a norm, torch's default fades with depth
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, volume: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> logits (B, K)."""
        logits: Tensor = self.head(self.features(volume).mean((2, 3, 4)))
        return logits


def _convolution(before: int, after: int, norm: str | None) -> Convolution:
    return Convolution(3, before, after, adn_ordering="NA", norm=norm, act="RELU", bias=norm is None)
