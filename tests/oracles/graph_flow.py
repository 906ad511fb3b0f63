# SPDX-License-Identifier: Apache-2.0
"""Graph Flow as its formulas are written: every window of a map is laid out, one is taken, sums as they stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def salience(maps: Tensor, window: Sequence[int]) -> Tensor:
    """The window around the maximum of each channel: (B, C, *S) -> (B, C, N)."""
    padded = F.pad(maps, [length // 2 for length in reversed(window) for _ in range(2)])
    for axis, length in enumerate(window, start=2):
        padded = padded.unfold(axis, length, 1)
    patches = padded.flatten(2 + len(window)).flatten(2, 1 + len(window))              # (B, C, S, N)
    place = maps.detach().flatten(2).argmax(2)
    return patches.gather(2, place[..., None, None].expand(-1, -1, 1, patches.shape[-1])).squeeze(2)


def edges(nodes: Tensor, cosine: bool) -> Tensor:
    """(B, C, N) -> (B, C, C)."""
    if cosine:
        nodes = nodes / nodes.norm(dim=2, keepdim=True).clamp(min=1e-6)
    return nodes @ nodes.transpose(1, 2)


def variation(taps: Pair, window: Sequence[int], kind: str) -> Pair:
    """The variation graph of an earlier and a later layer."""
    first, second = (salience(maps, window) for maps in taps)
    nodes = {
        "difference": lambda: second - first,
        "distance": lambda: (second - first).square().sum(2),
        "cosine": lambda: F.cosine_similarity(first, second, dim=2),
    }[kind]()
    is_cosine = kind == "cosine"
    return nodes, edges(second, is_cosine) - edges(first, is_cosine)


def graph_flow(
    student: Sequence[Pair], teacher: Sequence[Pair], window: Sequence[int], kind: str, reduction: str
) -> dict[str, Tensor]:
    """Both terms, mean over pairs of layers and over samples."""
    terms: dict[str, list[Tensor]] = {"node": [], "edge": []}
    for mine, other in zip(student, teacher, strict=True):
        found = variation(mine, window, kind)
        with torch.no_grad():
            right = variation(other, window, kind)
        for values, one, two in zip(terms.values(), found, right, strict=True):
            squares = (one - two).square()
            values.append(squares.mean() if reduction == "mean" else squares.sum() / len(squares))
    return {term: torch.stack(values).mean() for term, values in terms.items()}
