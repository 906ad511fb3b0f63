# SPDX-License-Identifier: Apache-2.0
"""Where a classifier sees evidence for each class, and where the cells of that map lie on its image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medkd.ops.class_attention import class_attention, gradient_weights
from medkd.ops.map_distance import normalized_maps

__all__ = ["ClassMaps", "class_maps"]

Array = NDArray[Any]
# layers whose cells may lie elsewhere than those that they read
_MOVING = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class ClassMaps:
    """Maps of all classes of a case.

    Args:
        values: 0 to 1 over classes and positions together, shape (K, *s).
        cells: pixels of the network's image from a cell to the next, of each axis.
        start: place of the first cell's center in that image, of each axis, in pixels.
    """

    values: Array
    cells: tuple[float, ...]
    start: tuple[float, ...]

    def affine(self, image: Array) -> Array:
        """From cells to places, of the affine of the network's image: both of shape (axes + 1, axes + 1)."""
        step = np.diag([*self.cells, 1.0])
        step[:-1, -1] = self.start
        placed: Array = image @ step
        return placed


def class_maps(network: nn.Module, image: Tensor, path: str) -> ClassMaps:
    """Class attention of a layer, as `at_plus` has it: features times their weight for a class, where that is positive.

    The weights are gradients, so that any head and any layer will do; where a linear head reads the mean of the layer
    they are the head's own weight over the number of positions, and the maps those of the AT+ loss. Maps are brought
    to 0..1 over all classes together, as there: that of an unlikely class stays weak.

    Args:
        network: in eval mode; its parameters need no gradient, which would cost memory.
        image: shape (1, C, *S).
        path: of a layer with maps (1, k, *s).

    Raises:
        ValueError: the prediction does not depend on the layer.

    Reference:
        del Amor et al., Attention to detail: inter-resolution knowledge distillation, arXiv 2401.06010, released code.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        >>> maps = class_maps(network.eval(), torch.rand(1, 1, 12, 8), "0")
        >>> maps.values.shape, maps.cells, maps.start
        ((3, 6, 4), (2.0, 2.0), (0.0, 0.0))
    """
    axes = image.dim() - 2
    places: dict[tuple[int, ...], Any] = {tuple(image.shape[2:]): (np.ones(axes), np.zeros(axes))}
    leaves: list[Tensor] = []

    def follow(module: nn.Module, inputs: Any, output: Any) -> None:
        _follow(module, inputs[0], output, places)

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()                                   # which what follows may change in place

    hooks = [one.register_forward_hook(follow) for one in network.modules() if isinstance(one, _MOVING)]
    hooks.append(network.get_submodule(path).register_forward_hook(cut))
    try:
        with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
            weights = gradient_weights(network(image), leaves[0])  # (1, K, k)
    finally:
        for hook in hooks:
            hook.remove()
    features = leaves[0].detach()
    values = normalized_maps(class_attention(features, weights, "at_plus", pooled=False))[0]
    steps, start = places.get(tuple(features.shape[2:])) or _spread(image.shape[2:], features.shape[2:])
    return ClassMaps(values.cpu().numpy(), tuple(map(float, steps)), tuple(map(float, start)))


def _follow(module: Any, before: Tensor, after: Tensor, places: dict[tuple[int, ...], Any]) -> None:
    """Note where the cells of a layer lie, once for each size of maps: branches of one size lie alike."""
    known = places.get(tuple(before.shape[2:]))
    if known is None or tuple(after.shape[2:]) in places:
        return
    step, start = known
    kernel, stride, padding, dilation = (
        _each(getattr(module, name, 1), len(step)) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    places[tuple(after.shape[2:])] = step * stride, start + step * (dilation * (kernel - 1) / 2 - padding)


def _each(value: Any, axes: int) -> Array:
    """One number for each axis; of padding by name, which keeps the size or is none, 0."""
    return np.broadcast_to(np.asarray(0.0 if isinstance(value, str) else value, dtype=float), (axes,))


def _spread(image: Sequence[int], cells: Sequence[int]) -> tuple[Array, Array]:
    """Cells that share the image evenly, for layers of which is not known how they read it."""
    steps = np.array(image) / np.array(cells)
    return steps, (steps - 1) / 2
