# SPDX-License-Identifier: Apache-2.0
"""Class heads on inner layers of a frozen teacher, fitted before it teaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_fitting import TeacherFitting
from medkd.losses.class_heads import TeacherHeads
from medkd.ops.ignored import samples_without_label
from medkd.ops.prediction import hard_labels
from medkd.ops.resample import pool_or_interpolate
from medkd.outputs import plain_tensor

__all__ = ["HeadFitting"]


class HeadFitting(TeacherFitting):
    """Fits the class heads of a frozen teacher at the start of a training whose loss needs them, unless they are there.

    They learn from labels, by a supervised loss; where a sample has none, from the classes that the teacher predicts.
    The teacher does not change, the run's random state neither. Attach it to the trainer in any order.

    Args:
        heads: those of the loss. Their file is written where it is missing, or was fitted to another teacher.
        teacher: whose layers they read.
        taps: the layers, in the order of `heads`.
        loss: takes predictions (B, K, *S) and labels (B, 1, *S), and gives a scalar.
        steps: batches of the training's loader that they are fitted with.
        learning_rate: of Adam.
        teacher_input: key of the batch that the teacher sees.
        seed: of the batches; not the run's, so that all runs on the same data have the same heads.

    Raises:
        ValueError: not as many taps as heads, or no step.

    Reference:
        Lee et al., Deeply-Supervised Nets, arXiv 1409.5185; after the teacher's training instead of within it.
    """

    name = "Class heads"

    def __init__(
        self, heads: TeacherHeads, teacher: Teacher, taps: Sequence[str], loss: nn.Module, steps: int = 100,
        learning_rate: float = 0.01, teacher_input: str = "image", seed: int = 0,
    ) -> None:
        if len(taps) != len(heads.channels):
            raise ValueError(
                f"`taps` must be {len(heads.channels)} layers, one for each of `heads`, got {list(taps)}."
            )
        super().__init__(heads, teacher, taps, steps, learning_rate, teacher_input, seed)
        self.heads = heads
        self.loss = loss

    def build(self) -> nn.Module:
        """Give heads with their first values."""
        return self.heads.build()

    def value(self, modules: Any, levels: Sequence[Tensor], pred: Tensor, image: Tensor, batch: Any) -> Tensor:
        """Give the supervised loss of the heads, on the grid of the image."""
        target = _with_classes(plain_tensor(batch["label"]).to(image.device), pred)
        resized = (pool_or_interpolate(one.float(), image.shape[2:], "average") for one in modules(levels))
        return torch.stack([self.loss(one, target) for one in resized]).mean()


def _with_classes(label: Tensor, pred: Tensor) -> Tensor:
    """Labels (B, 1, *S) in which a sample without one has the classes of a prediction (B, K, *S)."""
    missing = samples_without_label(label).view(-1, *[1] * (label.dim() - 1))
    return torch.where(missing, hard_labels(pred).to(label.dtype), label)
