# SPDX-License-Identifier: Apache-2.0
"""Where each channel is strongest, what lies around that place, and how two layers differ in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.checks import check_maps
from medkd.ops.graph import unit_vectors
from medkd.ops.precision import at_least_float32

__all__ = ["Maximum", "Variation", "salience_nodes", "variation_graph"]

Maximum = Literal["signed", "absolute"]
Variation = Literal["difference", "distance", "cosine"]


def salience_nodes(
    maps: Tensor, window: Sequence[int], maximum: Maximum = "signed", counted: Tensor | None = None
) -> Tensor:
    """What lies in a window around the place where each channel is largest.

    Of several largest voxels the first is taken. The place has no gradient; what is gathered has.

    Args:
        maps: shape (B, C, *S), floating, of any memory format.
        window: odd number of voxels for each of the axes.
        maximum: `signed`, the largest value, or `absolute`, the largest magnitude.
        counted: voxels that count, shape (B, 1, *S), bool; all when None. Others are no maximum, and 0 in a window.

    Returns:
        Shape (B, C, N), N voxels of a window, row by row, of the maps' type; 0 outside of the maps, and where no
        voxel of a sample counts. Time O(B C (S + N)); kept for backward are N numbers per channel, and no maps.

    Raises:
        ValueError: no floating map, another number of axes, an even window, or an unknown `maximum`.

    Reference:
        Zou et al., Graph Flow, arXiv 2203.08667 (channel-wise salience features).

    Example:
        >>> maps = torch.tensor([[[[0.0, 1.0, 2.0], [0.0, 9.0, 3.0]], [[5.0, 1.0, 0.0], [0.0, 2.0, 0.0]]]])
        >>> salience_nodes(maps, (1, 3)).tolist()
        [[[0.0, 9.0, 3.0], [0.0, 5.0, 1.0]]]
    """
    check_maps("maps", maps)
    if len(window) != maps.dim() - 2 or any(length < 1 or length % 2 == 0 for length in window):
        raise ValueError(
            f"`window` must be {maps.dim() - 2} odd numbers of voxels, one for each axis of the maps, got "
            f"{list(window)}."
        )
    if maximum not in get_args(Maximum):
        raise ValueError(f"`maximum` must be one of {get_args(Maximum)}, got {maximum!r}.")
    index = _window_index(_places(maps.detach(), maximum, counted), maps.shape[2:], window)
    if counted is not None:
        index = _without(index, counted)
    return _Gathered.apply(maps, index)   # type: ignore[no-any-return, no-untyped-call]


def _places(maps: Tensor, maximum: Maximum, counted: Tensor | None) -> Tensor:
    """Flat index of the largest voxel of each channel, (B, C)."""
    values = maps.abs() if maximum == "absolute" else maps
    if counted is not None:
        values = values.masked_fill(~counted, -math.inf)
    return values.flatten(2).max(2).indices                        # the first of equal ones


def _window_index(places: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Flat indices of the voxels around places, (B, C, N); -1 outside of the grid."""
    steps = torch.tensor(list(product(*(range(-(w // 2), w // 2 + 1) for w in window))), device=places.device)
    index = torch.zeros(*places.shape, len(steps), dtype=torch.int64, device=places.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    stride = 1
    for axis in reversed(range(len(size))):
        at = (places // stride % size[axis]).unsqueeze(-1) + steps[:, axis]
        inside &= (at >= 0) & (at < size[axis])
        index += at * stride
        stride *= size[axis]
    return index.masked_fill_(~inside, -1)


def _without(index: Tensor, counted: Tensor) -> Tensor:
    """The same index, -1 at voxels that do not count."""
    flat = counted.flatten(2).expand(-1, index.shape[1], -1)       # (B, C, S), no copy
    return index.masked_fill(~flat.gather(2, index.clamp(min=0)), -1)


class _Gathered(torch.autograd.Function):
    """Gathers voxels of (B, C, *S), 0 for index -1; backward writes into zeros of the maps' memory format."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.like = torch.empty_like(maps, device="meta")
        return maps.flatten(2).gather(2, index.clamp(min=0)).masked_fill_(index < 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        pull = torch.zeros_like(ctx.like, device=grad.device).flatten(2)             # no copy of the usual formats
        # a window has no voxel twice, so that the order of additions does not matter: what is outside adds 0
        pull.scatter_add_(2, index.clamp(min=0), grad.masked_fill(index < 0, 0.0))
        return pull.view(ctx.like.shape), None


def variation_graph(first: Tensor, second: Tensor, variation: Variation = "cosine") -> tuple[Tensor, Tensor]:
    """How the nodes of two layers and the relations between them differ.

    | | node | edge |
    |---|---|---|
    | `difference` | v2 - v1 | difference of the products <v_i, v_j> |
    | `distance` | squared length of v2 - v1 | the same |
    | `cosine` | cosine of v1 and v2 | difference of the cosines of v_i and v_j |

    Cosines do not depend on the scale of a layer, however small. A node that is shorter than 1e-6 of the largest value
    in all nodes of its layer and sample has cosine 0 with all and no gradient.

    Args:
        first: nodes of a layer, shape (B, C, N), floating.
        second: nodes of a later layer, likewise.
        variation: which of the three.

    Returns:
        Nodes, shape (B, C, N) of `difference`, else (B, C), and edges, shape (B, C, C), symmetric, at least float32.

    Raises:
        ValueError: other shapes, or an unknown `variation`.

    Reference:
        Zou et al., Graph Flow, arXiv 2203.08667; the published code lacks the formula. `distance` after Liu et al.,
        Knowledge Distillation via Instance Relationship Graph, CVPR 2019 (transformation of vertices).

    Example:
        >>> first = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
        >>> second = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])
        >>> [part.tolist() for part in variation_graph(first, second)]
        [[[0.0, 1.0]], [[[0.0, 1.0], [1.0, 0.0]]]]
    """
    if first.dim() != 3 or first.shape != second.shape:
        raise ValueError(
            f"`first` and `second` must be nodes of one shape (B, C, N), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    if variation not in get_args(Variation):
        raise ValueError(f"`variation` must be one of {get_args(Variation)}, got {variation!r}.")
    first, second = at_least_float32(first), at_least_float32(second)
    if variation == "cosine":
        first, second = _directions(first), _directions(second)
        nodes = (first * second).sum(2)
    else:
        nodes = second - first
        nodes = nodes.square().sum(2) if variation == "distance" else nodes
    return nodes, second @ second.mT - first @ first.mT


def _directions(nodes: Tensor) -> Tensor:
    """Unit vectors; they do not depend on the scale, so that its gradient is not needed."""
    largest = nodes.detach().abs().amax((1, 2), keepdim=True)
    return unit_vectors(nodes / torch.where(largest > 0, largest, 1.0), dim=2)
