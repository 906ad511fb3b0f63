# SPDX-License-Identifier: Apache-2.0
"""Self-relations between voxels, compared through small Gram matrices or row by row, never as N x N."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.ops.precision import at_least_float32

__all__ = ["class_balance_weight", "gram_relation_distance", "softmax_relation_distance", "unit_vectors"]


def unit_vectors(vectors: Tensor, dim: int = 1, eps: float = 1e-6) -> Tensor:
    """Scale vectors to unit length; a vector shorter than `eps` becomes zero, with zero gradient.

    Args:
        vectors: any floating shape.
        dim: axis of the vector components.
        eps: length under which a vector counts as dead (padded air, a dead unit).

    Returns:
        Same shape; lengths 1 or 0.
    """
    squared = vectors.square().sum(dim, keepdim=True)
    alive = squared >= eps * eps
    scale = torch.where(alive, squared, 1.0).rsqrt()               # a safe denominator: no inf, no NaN in backward
    return vectors * torch.where(alive, scale, 0.0)


def class_balance_weight(label: Tensor, valid: Tensor | None = None, balanced: bool = True) -> Tensor:
    """Weights of nodes that give every class present in a sample the same total.

    Args:
        label: class indices of the nodes, shape (B, N), integer.
        valid: nodes that count, shape (B, N), bool; all when None.
        balanced: False gives every valid node the same weight.

    Returns:
        Weights of shape (B, N), float32, with sum 1 per sample, or all zero where no node is valid:
        `w = 1 / (K_present * n_class)` when balanced.
    """
    valid = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
    weight = valid.float()
    if balanced:
        classes = int(torch.where(valid, label, 0).max()) + 1
        counts = weight.new_zeros(label.shape[0], classes)
        counts.scatter_add_(1, torch.where(valid, label, 0), weight)                        # (B, K)
        weight = weight / counts.gather(1, torch.where(valid, label, 0)).clamp(min=1.0)
    return weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def gram_relation_distance(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of two cosine self-relation matrices, exactly, without building either.

    With unit rows `Q` and weights `w`, sum_pq w_p w_q (R^S_pq - R^T_pq)^2 / (sum w)^2 equals
    (|G_SS|^2 + |G_TT|^2 - 2 |G_ST|^2) / (sum w)^2 with G_XY = (sqrt(w) Q^X)^T (sqrt(w) Q^Y), which are C x C.
    The difference of squares is formed in float64: two nearly equal networks leave only its last digits.

    Args:
        student: unit node vectors, shape (B, N, C_S), floating.
        teacher: unit node vectors, shape (B, N, C_T), floating; never receives a gradient.
        weight: node weights, shape (B, N), non-negative; uniform when None.

    Returns:
        Distance per sample, shape (B,), float64, 0 where all weights are 0. Range [0, 4].
        Time O(N C^2), memory O(N C).

    Reference:
        Liu et al., Structured Knowledge Distillation for Semantic Segmentation, arXiv 1903.04197 (pair-wise loss),
        here in Gram form; Zhang et al., arXiv 2401.13174 (relation distillation).

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> gram_relation_distance(student, teacher).tolist()
        [0.5]
    """
    _check_pair(student, teacher)
    batch, nodes, _ = student.shape
    weight = student.new_ones(batch, nodes) if weight is None else weight
    root = weight.double().sqrt().unsqueeze(-1)                   # (B, N, 1)
    s, t = student.double() * root, teacher.detach().double() * root
    # one product per pair of networks: (B, C, C)
    ss, tt, st = s.transpose(1, 2) @ s, t.transpose(1, 2) @ t, s.transpose(1, 2) @ t
    distance = ss.square().sum((1, 2)) + tt.square().sum((1, 2)) - 2.0 * st.square().sum((1, 2))
    total = weight.double().sum(1)
    return torch.where(total > 0, distance.clamp(min=0.0) / total.square().clamp(min=1e-300), distance * 0.0)


def softmax_relation_distance(
    student: Tensor, teacher: Tensor, weight: Tensor | None = None, temperature: float = 0.1, rows: int = 512
) -> Tensor:
    """Divergence of two self-attention maps: each row of Q Q^T / temperature through a softmax, compared by KL.

    Rows are taken a block at a time and the gradient is formed inside the block, so that no N x N matrix outlives it:
    memory O(rows N + N C), time O(N^2 C).

    Args:
        student: unit node vectors, shape (B, N, C_S), floating.
        teacher: unit node vectors, shape (B, N, C_T), floating; never receives a gradient.
        weight: node weights, shape (B, N), non-negative: rows count by them, nodes of weight 0 are in no row;
            uniform when None.
        temperature: of the softmax, in units of the cosine; above 0.
        rows: rows per block.

    Returns:
        Sum_p w_p KL(softmax(R^T_p) || softmax(R^S_p)) / sum w per sample, shape (B,), float32 (float64 for a float64
        student); 0 with zero gradient where all weights are 0.

    Reference:
        Zhang et al., arXiv 2401.13174 (relation distillation); temperature after Yang et al., Cross-Image Relational
        Knowledge Distillation, arXiv 2204.06986.

    Example:
        >>> student = torch.eye(3)[None]
        >>> teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> [round(v, 4) for v in softmax_relation_distance(student, teacher, temperature=1.0).tolist()]
        [0.0745]
    """
    _check_pair(student, teacher)
    if temperature <= 0 or rows < 1:
        raise ValueError(f"`temperature` must be above 0 and `rows` at least 1, got {temperature} and {rows}.")
    student = at_least_float32(student)
    teacher = teacher.detach().to(student)
    weight = student.new_ones(student.shape[:2]) if weight is None else weight.to(student)
    distances = [
        _SoftmaxRelation.apply(s[w > 0], t[w > 0], w[w > 0], temperature, rows)   # type: ignore[no-untyped-call]
        for s, t, w in zip(student, teacher, weight, strict=True)
    ]
    return torch.stack(distances)


class _SoftmaxRelation(torch.autograd.Function):
    """One sample; keeps the gradient of the finished scalar with respect to the student's nodes."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, rows: int
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.zeros_like(student)
        weight = weight / weight.sum()
        blocks = (torch.split(part, rows) for part in (student, teacher, weight, gradient))
        for mine, other, share, pull in zip(*blocks, strict=True):
            log_mine = F.log_softmax(mine @ student.T / temperature, dim=1)          # (rows, N)
            log_other = F.log_softmax(other @ teacher.T / temperature, dim=1)
            target = log_other.exp()
            total += torch.dot(share, (target * log_other.sub_(log_mine)).sum(1))
            slope = log_mine.exp_().sub_(target).mul_(share.unsqueeze(1) / temperature)
            pull += slope @ student                                                # the block as rows of R ...
            gradient += slope.T @ mine                                              # ... and as its columns
        ctx.save_for_backward(gradient)
        return total.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "`student` and `teacher` must have shapes (B, N, C) with the same B and N, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; pool both to one grid."
        )
