# SPDX-License-Identifier: Apache-2.0
"""Affinities as the output of a network of embeddings, or of one that gives them directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DirectAffinity", "EmbeddingAffinity", "direct_affinity", "embedding_affinity", "output_head"]


def embedding_affinity(embedding: Tensor, offsets: list[list[int]], foreground: bool = False) -> Tensor:
    """Cosine of each voxel's embedding with that of the voxel an offset away, and 0 for the negative ones.

    Args:
        embedding: shape (B, C, *S), floating; computed in at least float32.
        offsets: one per channel of the result: steps in voxels along the axes of S, of any sign.
        foreground: one channel more, the last: 1 - cosine with the first axis of the embedding space, along which
            `medkd.losses.affinity.AffinityLoss` with `background_weight` puts the background.

    Returns:
        Affinities of shape (B, O, *S), range [0, 1], each stored at the voxel p of its pair (p, p + offset); 0 where
        p + offset lies outside or an embedding has no length. No size is looked at, so that a trace of this function
        serves all sizes.

    Reference:
        Liu et al., Graph Relation Distillation for Efficient Biomedical Instance Segmentation, arXiv 2401.06370. As for
        its predictions of EM volumes, negative cosines count as 0; those of its 2-D ones are not cut.

    Example:
        >>> embedding = torch.tensor([[[[2.0, 3.0, 0.0]], [[0.0, 0.0, 4.0]]]])
        >>> embedding_affinity(embedding, [[0, -1]]).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    axes = embedding.dim() - 2
    wide = embedding if embedding.dtype == torch.float64 else embedding.float()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    has_length = (length > 1e-12).to(wide.dtype)                   # (B, 1, *S)
    unit = wide / length.clamp(min=1e-12) * has_length             # (B, C, *S)

    before = [0] * axes                                            # how far the offsets reach out of the image
    after = [0] * axes
    for offset in offsets:
        for axis, step in enumerate(offset):
            before[axis] = max(before[axis], -step)
            after[axis] = max(after[axis], step)
    reach: list[int] = []
    for axis in range(axes):
        reach = [before[axis], after[axis]] + reach                # `pad` counts axes from the last one
    padded = F.pad(unit, reach)

    channels: list[Tensor] = []
    for offset in offsets:
        partner = padded
        for axis, step in enumerate(offset):
            partner = partner.narrow(axis + 2, before[axis] + step, unit.size(axis + 2))
        channels.append((unit * partner).sum(1))
    if foreground:
        channels.append(1.0 - unit[:, 0])
    return torch.stack(channels, 1).clamp(0.0, 1.0)


class EmbeddingAffinity(nn.Module):
    """`embedding_affinity` as a module without parameters.

    Args:
        offsets: as in `embedding_affinity`; not all 0.
        spatial_dims: 2 or 3, the length of an offset.
        foreground: as in `embedding_affinity`.

    Raises:
        ValueError: no offset, or one of another length or of zeros only.
    """

    def __init__(self, offsets: Sequence[Sequence[int]], spatial_dims: int, foreground: bool = False) -> None:
        super().__init__()
        self.offsets = _check_offsets(offsets, spatial_dims)
        self.foreground = foreground

    def forward(self, embedding: Tensor) -> Tensor:
        """Embedding (B, C, *S) to affinities (B, O, *S)."""
        return embedding_affinity(embedding, self.offsets, self.foreground)


def direct_affinity(logits: Tensor, count: int, foreground: bool = False) -> Tensor:
    """Sigmoid of the first channels of a network of `medkd.losses.direct_affinity.DirectAffinityLoss`.

    Args:
        logits: shape (B, C, *S), floating; computed in at least float32.
        count: channels of the result, which are those of the first offsets of the training.
        foreground: the last channel of the logits, too, behind these.

    Returns:
        Affinities of shape (B, count, *S), or one channel more, range [0, 1].

    Example:
        >>> logits = torch.tensor([[[0.0], [9.0], [-9.0]]])
        >>> direct_affinity(logits, 1, foreground=True).round(decimals=2).flatten().tolist()
        [0.5, 0.0]
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = torch.cat([wide[:, :count], wide[:, -1:]], 1) if foreground else wide[:, :count]
    return torch.sigmoid(chosen)


class DirectAffinity(nn.Module):
    """`direct_affinity` as a module without parameters.

    Args:
        offsets: of the affinities that are wanted: the first ones of the training, in their order; not all 0.
        spatial_dims: 2 or 3, the length of an offset.
        foreground: as in `direct_affinity`.

    Raises:
        ValueError: no offset, or one of another length or of zeros only.
    """

    def __init__(self, offsets: Sequence[Sequence[int]], spatial_dims: int, foreground: bool = False) -> None:
        super().__init__()
        self.count = len(_check_offsets(offsets, spatial_dims))
        self.foreground = foreground

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, C, *S) to affinities (B, O, *S)."""
        return direct_affinity(logits, self.count, self.foreground)


_HEADS: dict[str, type[EmbeddingAffinity | DirectAffinity]] = {
    "affinity": EmbeddingAffinity, "direct_affinity": DirectAffinity,
}


def output_head(
    output: str, offsets: Sequence[Sequence[int]] | None, spatial_dims: int, foreground: bool = False
) -> nn.Module:
    """Last module of a network, without parameters.

    Nothing for an `embedding`, which is also what gives logits; `EmbeddingAffinity` for an `affinity` and
    `DirectAffinity` for a `direct_affinity`.

    Raises:
        ValueError: another output, an affinity without offsets, or offsets that are no vectors of `spatial_dims` steps.
    """
    if output != "embedding" and output not in _HEADS:
        raise ValueError(f"`output` must be one of {['embedding', *_HEADS]}, got {output!r}.")
    if offsets is None:
        if output in _HEADS:
            raise ValueError(f"`offsets` must be given for the output {output!r}, got None.")
        return nn.Identity()
    head = _HEADS.get(output, EmbeddingAffinity)(offsets, spatial_dims, foreground)   # checks those not needed, too
    return head if output in _HEADS else nn.Identity()


def _check_offsets(offsets: Sequence[Sequence[int]], axes: int) -> list[list[int]]:
    steps = [list(offset) for offset in offsets]
    is_whole = all(isinstance(step, int) for offset in steps for step in offset)
    if not steps or not is_whole or any(len(offset) != axes or not any(offset) for offset in steps):
        raise ValueError(f"`offsets` must be vectors of {axes} whole numbers, not all 0, got {list(offsets)}.")
    return steps
