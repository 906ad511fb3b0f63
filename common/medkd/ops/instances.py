# SPDX-License-Identifier: Apache-2.0
"""Nodes and edges of the graph of instances, and relations across images through second moments of C x C."""

from __future__ import annotations

import torch
from torch import Tensor

from medkd.checks import check_label, check_maps
from medkd.ops.embedding import widen_borders
from medkd.ops.graph import unit_vectors
from medkd.ops.ignored import IGNORED
from medkd.ops.precision import at_least_float32

__all__ = [
    "consecutive_labels", "instance_numbers", "moment_distance", "relation_edges", "second_moment", "segment_mean",
]


def consecutive_labels(label: Tensor) -> Tensor:
    """Number the instances of a batch 1 to K without gaps; 0, background, stays 0, and negative, ignored, becomes -1.

    Args:
        label: any shape, integer of any size.

    Returns:
        Same shape, int64.

    Example:
        >>> consecutive_labels(torch.tensor([70_000, 0, 9, 70_000])).tolist()
        [2, 0, 1, 2]
    """
    found, numbers = torch.unique(label, return_inverse=True)
    places = numbers + 1 - (found <= 0).sum()                      # 0 and what is ignored come before positive ids
    return torch.where(label <= 0, label.long().clamp(min=IGNORED), places)


def instance_numbers(label: Tensor, like: Tensor, widen: bool = False) -> Tensor:
    """Instance numbers as integers.

    Args:
        label: shape (B, 1, *S), whole numbers of any type, 0 is background, negative is ignored; 16-bit floats are too
            coarse for numbers.
        like: map of shape (B, C, *S).
        widen: see `widen_borders`.

    Returns:
        Shape (B, 1, *S), int64.

    Raises:
        ValueError: another shape, or a fraction.
    """
    check_maps("embeddings", like)
    check_label("label", label, like)
    if label.shape[2:] != like.shape[2:]:
        raise ValueError(
            f"`label` must have the size of the embeddings, {tuple(like.shape[2:])}, got {tuple(label.shape[2:])}; "
            "crop it to the field of view of a network with valid convolutions (CenterSpatialCropd)."
        )
    numbers = label.long()
    if label.is_floating_point() and not torch.equal(numbers.to(label), label):
        raise ValueError(
            "`label` must be whole numbers of instances, got fractions; resample labels with mode 'nearest'."
        )
    return widen_borders(numbers) if widen else numbers


def segment_mean(maps: Tensor, label: Tensor, background: bool = False) -> tuple[Tensor, Tensor]:
    """Mean vector of each instance: the nodes of the graph.

    Args:
        maps: shape (B, C, *S), floating; added up in at least float32.
        label: instance numbers, shape (B, 1, *S), integer, small (see `consecutive_labels`); negative is ignored.
        background: whether label 0 is a node too.

    Returns:
        Nodes of shape (B, K, C), K the largest number + 1, zero where a sample has no such instance; and which there
        are, (B, K), bool. Time O(N C), without a loop over instances.

    Reference:
        Liu et al., arXiv 2401.06370, nodes of the instance graph.

    Example:
        >>> nodes, present = segment_mean(torch.tensor([[[[1.0, 3.0, 5.0]]]]), torch.tensor([[[[1, 1, 0]]]]))
        >>> nodes.flatten().tolist(), present.tolist()
        ([0.0, 2.0], [[False, True]])
    """
    check_maps("maps", maps)
    check_label("label", label, maps)
    wide = at_least_float32(maps)
    index = label.flatten(1).long()                                # (B, N)
    count = int(index.max()) + 1
    if count < 1 or int(index.min()) < 0:
        return _mean_of_counted(maps, label, max(count, 1), background)
    sums = wide.new_zeros(*wide.shape[:2], count)
    sums = sums.scatter_add(2, index.unsqueeze(1).expand(-1, wide.shape[1], -1), wide.flatten(2))   # (B, C, K)
    sizes = wide.new_zeros(len(wide), count).scatter_add_(1, index, wide.new_ones(index.shape))
    present = sizes > 0
    if not background:
        present[:, 0] = False
    means = sums.transpose(1, 2) / sizes.clamp(min=1.0).unsqueeze(2)
    return torch.where(present.unsqueeze(2), means, 0.0), present


def _mean_of_counted(maps: Tensor, label: Tensor, count: int, background: bool) -> tuple[Tensor, Tensor]:
    """The same where some voxels are ignored: they make a node of their own, which is taken out."""
    nodes, present = segment_mean(maps.masked_fill(label < 0, 0.0), label.where(label >= 0, count), background)
    return nodes[:, :count], present[:, :count]


def relation_edges(nodes: Tensor) -> Tensor:
    """Cosine of each two nodes; 0 with a node of no length.

    Args:
        nodes: shape (B, K, C), floating; absent ones are zero, as `segment_mean` gives them.

    Returns:
        Edges of shape (B, K, K), the nodes with themselves among them.

    Reference:
        Liu et al., arXiv 2401.06370, edges of the instance graph; their gradient knows the norms, which the released
        code detaches.
    """
    units = unit_vectors(nodes, dim=2)
    return units @ units.transpose(1, 2)


def second_moment(vectors: Tensor) -> Tensor:
    """Mean of v v^T over the vectors of each sample: all that a relation to them needs.

    Args:
        vectors: shape (B, N, C), floating.

    Returns:
        Moments of shape (B, C, C), in at least float32.
    """
    wide = at_least_float32(vectors)
    return wide.transpose(1, 2) @ wide / max(wide.shape[1], 1)


def moment_distance(student: Tensor, teacher: Tensor, moment: Tensor) -> Tensor:
    """Mean squared difference of two relations to the same other vectors, exactly, from their second moment.

    With P, the M other vectors as rows, |P s^T - P t^T|^2 / (M N) summed over all N nodes equals
    trace(D G D^T) / N with D = s - t and G = P^T P / M, which is `moment`. Many images: the mean of their moments.

    Args:
        student: shape (B, N, C), floating.
        teacher: shape (B, N, C), floating; never receives a gradient.
        moment: shape (C, C); never receives a gradient.

    Returns:
        Distance per sample, shape (B,), in at least float32. Time O(N C^2), no matrix over pairs.

    Reference:
        Liu et al., arXiv 2401.06370, both losses across images, in Gram form.

    Example:
        >>> student, teacher = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> moment_distance(student, teacher, second_moment(torch.eye(2)[None])[0]).tolist()
        [1.0]
    """
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"`student` and `teacher` must have one shape (B, N, C), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; an embedding of another size needs a projection first."
        )
    wide = at_least_float32(student)
    difference = wide - teacher.detach().to(wide)
    return ((difference @ moment.detach().to(wide)) * difference).sum((1, 2)) / max(wide.shape[1], 1)
