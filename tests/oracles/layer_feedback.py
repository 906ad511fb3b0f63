# SPDX-License-Identifier: Apache-2.0
"""Hierarchical layer-selective feedback distillation (arXiv 2311.16700) as its released code has it: literal and large.

Written after the specification of that code, for maps of any rank, with autograd; nothing here is shared with `medkd`.
Features are resized with all their channels before anything else, and predictions are rows of two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resized(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Linear interpolation with `align_corners=False`."""
    mode = "trilinear" if maps.dim() == 5 else "bilinear"
    return F.interpolate(maps, size=tuple(grid), mode=mode, align_corners=False)


def together(levels: Sequence[Tensor]) -> Tensor:
    """All channels on the smallest of the grids, (B, sum C, *G)."""
    grid = min((level.shape[2:] for level in levels), key=lambda size: size.numel())
    return torch.cat([resized(level, grid) for level in levels], dim=1)


def attention(maps: Tensor, exponent: int = 4) -> Tensor:
    """Unit vectors (B, N)."""
    return F.normalize(maps.pow(exponent).mean(1).flatten(1), dim=1, eps=1e-12)


def feature_distance(student: Tensor, teacher: Tensor, exponent: int = 4) -> Tensor:
    """Mean over the batch of |a_S - a_T|^2; the student takes the teacher's grid."""
    if student.shape[2:] != teacher.shape[2:]:
        student = resized(student, teacher.shape[2:])
    return (attention(student, exponent) - attention(teacher, exponent)).square().sum(1).mean()


def unified_features(student: Tensor, levels: Sequence[Tensor], exponent: int = 4) -> Tensor:
    """UFD: the teacher takes the student's grid."""
    return feature_distance(student, resized(together(levels), student.shape[2:]), exponent)


def individual_features(students: Sequence[Tensor], teacher: Tensor) -> Tensor:
    """IFD: a sum."""
    return torch.stack([feature_distance(student, teacher) for student in students]).sum()


def two_column_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of softened channels, reshaped to two columns, summed and divided by their rows."""
    soft = (student / temperature).log_softmax(1).reshape(-1, 2)
    target = (teacher / temperature).softmax(1).reshape(-1, 2)
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean")


def projected(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1 x 1 convolution as a matrix (K, C) and a bias (K,)."""
    shape = (1, -1) + (1,) * (maps.dim() - 2)
    return torch.einsum("kc,bc...->bk...", weight, maps) + bias.view(shape)


def unified_pixels(student: Tensor, levels: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """UPD with the teacher's projection given."""
    return two_column_divergence(student, resized(projected(together(levels), weight, bias), student.shape[2:]))


def individual_pixels(
    students: Sequence[Tensor], logits: Tensor, projections: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """IPD, a sum, with the students' projections given."""
    values = [
        two_column_divergence(resized(projected(maps, *one), logits.shape[2:]), logits)
        for maps, one in zip(students, projections, strict=True)
    ]
    return torch.stack(values).sum()


def attention_by_loops(maps: np.ndarray, exponent: float) -> np.ndarray:
    """Mean over channels of |x|^exponent, (B, C, *S) -> (B, *S), voxel by voxel."""
    found = np.zeros((maps.shape[0], *maps.shape[2:]))
    for index in np.ndindex(found.shape):
        for channel in range(maps.shape[1]):
            found[index] += abs(maps[(index[0], channel, *index[1:])]) ** exponent / maps.shape[1]
    return found


def distance_by_loops(student: np.ndarray, teacher: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Squared distance of unit maps of each sample under weights of voxels; all of shape (B, N)."""
    result = []
    for mine, other, share in zip(student, teacher, weight, strict=True):
        lengths = [sum(w * m * m for w, m in zip(share, one, strict=True)) ** 0.5 for one in (mine, other)]
        units = [one / length if length else 0 * one for one, length in zip((mine, other), lengths, strict=True)]
        result.append(sum(w * (a - b) ** 2 for w, a, b in zip(share, *units, strict=True)))
    return np.array(result)
