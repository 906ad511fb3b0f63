# SPDX-License-Identifier: Apache-2.0
"""A network that is to tell a teacher's prediction from a student's, with self-attention of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize

from medkd.checks import check_maps
from medkd.ops.resample import pool_average

__all__ = ["AdversarialForm", "Discriminator", "SelfAttention", "discriminator_loss", "student_score_loss"]

AdversarialForm = Literal["wgan_gp", "hinge"]
_SLOPE = 0.1
_KERNEL = 4


class SelfAttention(nn.Module):
    """Let each voxel look at all others: `maps + gain * values softmax(keys queries)`, gain 0 at first.

    Up to `most` voxels it is the published one. Keys and values of a larger map, which are ours, are averaged over the
    smallest blocks that bring it to `most` or below. Where torch has a fused kernel, as on a CPU, memory is that of the
    maps; without one, and for the gradient penalty, O(B N most) for N voxels.

    Args:
        channels: of the maps; queries and keys have an eighth of them, at least one.
        spatial_dims: 2 or 3.
        most: voxels that are looked at.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, arXiv 1805.08318, equations 1 to 3.
    """

    def __init__(self, channels: int, spatial_dims: int, most: int = 1728) -> None:
        super().__init__()
        convolution = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        narrow = max(1, channels // 8)
        self.query = convolution(channels, narrow, 1)
        self.key = convolution(channels, narrow, 1)
        self.value = convolution(channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(1))
        self.most = most

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, *S) to (B, C, *S)."""
        seen = pool_average(maps, _coarse(maps.shape[2:], self.most))
        query, key, value = (part.flatten(2).mT for part in (self.query(maps), self.key(seen), self.value(seen)))
        zeros = value.shape[2] - query.shape[2]                    # fused kernels want one width of all three
        padded = F.pad(query, (0, zeros)), F.pad(key, (0, zeros)), value
        query, key, value = (part.unsqueeze(1).contiguous() for part in padded)       # (B, 1 head, N or M, C)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
        return maps + self.gain * mixed.mT.reshape(maps.shape)


def _coarse(size: Sequence[int], most: int) -> tuple[int, ...]:
    """The size with all axes divided by the least whole number that leaves at most so many voxels."""
    divisor = 1
    while math.prod(coarse := [-(-length // divisor) for length in size]) > most:
        divisor += 1
    return tuple(coarse)


class Discriminator(nn.Module):
    """Tell what network a prediction is of, patch by patch: large for the teacher, small for the student.

    `tanh(logits / temperature)`; then `layers` convolutions of 4 voxels per axis and stride 2 with spectral
    normalization and LeakyReLU 0.1, of which each doubles the channels, the last two with self-attention behind them;
    then one of 4 voxels without padding, to one channel. With 4 layers a patch must have at least 64 voxels per axis.
    The first values come from the seed alone.

    Spectral normalization changes its vectors by one power iteration in a forward pass of training mode, and none in
    one of evaluation mode. The published code iterates in every pass, also in that of the student.

    Args:
        channels: K of the logits.
        spatial_dims: 2 or 3.
        width: channels of the first layer; 64 as published. Parameters and time go with its square: 3-D with 64 takes
            about 14 GMAC for a patch of 96^3, more than many a student.
        layers: convolutions of stride 2; 4 as published. Fewer for smaller patches.
        temperature: of the tanh, which is flat beyond 3 times that; 1 as published.
        attended: most voxels that one looks at in self-attention: 1728 are 12^3, or 41^2. Attention is the published
            one where its maps are not larger, which are an eighth of a patch along each axis, and less.
        seed: of the first values.

    Raises:
        ValueError: a number below 1, another rank.

    Reference:
        Zhang et al., arXiv 1805.08318, and Miyato et al., Spectral Normalization, arXiv 1802.05957; on logits as
        released with Zou et al., Graph Flow, arXiv 2203.08667.

    Example:
        >>> discriminator = Discriminator(2, spatial_dims=2, width=4)
        >>> discriminator(torch.randn(1, 2, 224, 224)).shape
        torch.Size([1, 1, 11, 11])
    """

    def __init__(
        self, channels: int, spatial_dims: int = 3, width: int = 64, layers: int = 4, temperature: float = 1.0,
        attended: int = 1728, seed: int = 0,
    ) -> None:
        super().__init__()
        if min(channels, width, layers, attended) < 1 or temperature <= 0:
            raise ValueError(
                "`channels`, `width`, `layers` and `attended` must be at least 1 and `temperature` above 0, got "
                f"{channels}, {width}, {layers}, {attended} and {temperature}."
            )
        if spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims}.")
        self.channels, self.spatial_dims, self.layers = channels, spatial_dims, layers
        self.temperature = temperature
        convolution = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        parts: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):                    # first values and vectors of the normalization
            torch.default_generator.manual_seed(seed)
            for n in range(layers):
                before, after = channels if n == 0 else width << (n - 1), width << n
                layer = convolution(before, after, _KERNEL, stride=2, padding=1)
                parts += [parametrizations.spectral_norm(layer), nn.LeakyReLU(_SLOPE)]
                parts += [SelfAttention(after, spatial_dims, attended)] if n >= layers - 2 else []
            parts += [convolution(width << (layers - 1), 1, _KERNEL)]
        self.body = nn.Sequential(*parts)

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits (B, K, *S) to scores (B, 1, *G), without bounds.

        Raises:
            ValueError: logits of other channels or axes than promised, or of a patch that is too small.
        """
        check_maps("logits", logits)
        if (found := (logits.shape[1], logits.dim() - 2)) != (self.channels, self.spatial_dims):
            raise ValueError(
                f"`channels` and `spatial_dims` of the discriminator must be {found[0]} and {found[1]}, those of the "
                f"predictions, got {self.channels} and {self.spatial_dims}."
            )
        if min(logits.shape[2:]) < (least := _KERNEL << self.layers):
            raise ValueError(
                f"`layers` of the discriminator must be fewer than {self.layers}, which need patches of at least "
                f"{least} voxels along each axis, got {tuple(logits.shape[2:])}; or take larger patches."
            )
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        scores: Tensor = self.body(torch.tanh(logits))
        return scores


def student_score_loss(scores: Tensor) -> Tensor:
    """What the student is to make small, `-mean D(student)`, alike for both forms.

    Args:
        scores: of the student's predictions, shape (B, 1, *G).
    """
    return -scores.mean()


def discriminator_loss(
    discriminator: nn.Module, teacher: Tensor, student: Tensor, form: AdversarialForm = "wgan_gp",
    generator: torch.Generator | None = None, penalty: float = 10.0,
) -> dict[str, Tensor]:
    """What the discriminator is to make small.

    * `wgan_gp`: `mean D(student) - mean D(teacher) + penalty mean_b (|g_b| - 1)^2`, g_b the gradient of the sum of all
      scores at `a teacher_b + (1 - a) student_b`, with one a per sample, uniform in [0, 1];
    * `hinge`: `mean relu(1 - D(teacher)) + mean relu(1 + D(student))`.

    Spectral normalization iterates once for all passes, in training mode.

    Args:
        discriminator: maps (B, K, *S) to scores (B, 1, *G).
        teacher: logits, shape (B, K, *S), float32; never receives a gradient.
        student: likewise, of the same shape.
        form: which of the two.
        generator: of a, on the CPU; the global one when None. The hinge form draws nothing.
        penalty: weight of the gradient penalty.

    Returns:
        `loss`, a scalar with the graph to the discriminator, and detached: `teacher` and `student`, their mean scores,
        and `penalty`, the weighted penalty, 0 for `hinge`.

    Raises:
        ValueError: unknown form, or different shapes.

    Reference:
        Gulrajani et al., Improved Training of Wasserstein GANs, arXiv 1704.00028, equation 3; Lim and Ye, Geometric
        GAN, arXiv 1705.02894 (hinge). The sum over patches in g as in Liu et al., Structured Knowledge Distillation,
        arXiv 1903.04197, released code.
    """
    if form not in get_args(AdversarialForm):
        raise ValueError(f"`form` must be one of {get_args(AdversarialForm)}, got {form!r}.")
    if teacher.shape != student.shape:
        raise ValueError(
            f"`teacher` and `student` must have one shape, got {tuple(teacher.shape)} and {tuple(student.shape)}."
        )
    teacher, student = teacher.detach(), student.detach()
    with parametrize.cached():
        real, fake = discriminator(torch.cat([teacher, student])).chunk(2)
        extra = real.new_zeros(())
        if form == "wgan_gp":
            loss = fake.mean() - real.mean()
            extra = penalty * _gradient_penalty(discriminator, teacher, student, generator)
        else:
            loss = F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()
    scores = {"teacher": real.detach().mean(), "student": fake.detach().mean(), "penalty": extra.detach()}
    return {"loss": loss + extra, **scores}


def _gradient_penalty(
    discriminator: nn.Module, teacher: Tensor, student: Tensor, generator: torch.Generator | None
) -> Tensor:
    share = torch.rand(len(teacher), generator=generator).to(teacher).view(-1, *[1] * (teacher.dim() - 1))
    mixed = torch.lerp(student, teacher, share).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):                             # the only one with second derivatives
        (slope,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
    length: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (length - 1.0).square().mean()
