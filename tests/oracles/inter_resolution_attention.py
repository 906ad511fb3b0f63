# SPDX-License-Identifier: Apache-2.0
"""Class attention as it was released: a backward pass for each class, every channel's map laid out, plain norms."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_weights(pred: Tensor, maps: Tensor, create_graph: bool) -> Tensor:
    """Mean over positions of the slope of each class, (B, C, K)."""
    scores = pred.flatten(2).sum(2) if pred.dim() > 2 else pred
    slopes = [
        torch.autograd.grad(scores[:, c].sum(), maps, create_graph=create_graph, retain_graph=True)[0]
        for c in range(scores.shape[1])
    ]
    return torch.stack([slope.flatten(2).mean(2) for slope in slopes], 1)


def class_maps(weights: Tensor, maps: Tensor, variant: str) -> Tensor:
    """Weights (B, C, K) and features (B, K, *S) -> (B, C, *S), by way of (B, C, K, *S)."""
    factors = weights[(...,) + (None,) * (maps.dim() - 2)]
    if variant == "positive_weight":
        factors = factors.relu()
    products = factors * maps[:, None]
    if variant == "at_plus":
        products = products.relu()
    total = products.sum(2)
    return total.relu() if variant == "gradcam" else total


def attention(pred: Tensor, maps: Tensor, variant: str = "at_plus", create_graph: bool = True) -> Tensor:
    """Maps (B, C, *S) of a network's features that are on the way to its predictions."""
    return class_maps(channel_weights(pred, maps, create_graph), maps, variant)


def minmax(maps: Tensor) -> Tensor:
    """Over classes and positions, per sample."""
    flat = maps.flatten(1)
    low, high = flat.min(1).values, flat.max(1).values
    return ((flat - low[:, None]) / (high - low)[:, None]).view_as(maps)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples of the root of the mean square."""
    return (minmax(student) - minmax(teacher)).square().flatten(1).mean(1).sqrt().mean()
