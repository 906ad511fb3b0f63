# SPDX-License-Identifier: Apache-2.0
"""Heads for inner layers of a frozen teacher, trained with the supervised loss before the teacher teaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medkd.handlers.teacher import Teacher
from medkd.losses.class_heads import ClassHeads
from medkd.ops.resample import pool_or_interpolate
from medkd.taps import FeatureTaps

__all__ = ["EachHeadLoss", "TeacherLayers", "TeacherWithHeads"]


class TeacherLayers:
    """The frozen teacher, asked for some of its layers; no module, so that what holds it does not have its weights.

    Args:
        teacher: loaded here.
        taps: paths of its layers.
    """

    def __init__(self, teacher: Teacher, taps: Sequence[str]) -> None:
        self.network = teacher.load()
        self.sha256 = torch.tensor(list(bytes.fromhex(teacher.file_sha256 or ""))).byte()   # of the teacher's file
        self.paths = tuple(taps)
        self.taps = FeatureTaps(self.network, taps, "teacher")

    def __call__(self, image: Tensor) -> list[Tensor]:
        """Give the layers (B, C_l, *S_l) for an image (B, C, *S), in the order of the taps."""
        self.network.to(image.device).eval()
        self.taps.open()
        with torch.no_grad():
            self.network(image)
        outputs = self.taps.close()
        return [outputs[path] for path in self.paths]


class TeacherWithHeads(ClassHeads):
    """A network that is the frozen teacher with a class head on some of its layers.

    Its weights are the heads' alone, and `teacher_sha256`, the hash of the teacher's file: what `TeacherHeads` reads.

    Args:
        teacher: loaded here, and from then on frozen.
        channels: channels of the tapped layers.
        taps: layers of the teacher, in the order in which a loss has them.
        classes: channels of the teacher's prediction.
        spatial_dims: 2 or 3.
        seed: of the first values.

    Reference:
        Lee et al., Deeply-Supervised Nets, arXiv 1409.5185; after the teacher's training instead of within it.
    """

    def __init__(
        self, teacher: Teacher, channels: Sequence[int], taps: Sequence[str], classes: int, spatial_dims: int = 3,
        seed: int = 0,
    ) -> None:
        if len(taps) != len(channels):
            raise ValueError(f"`channels` must give one number for each of {len(taps)} taps, got {list(channels)}.")
        super().__init__(channels, classes, spatial_dims, size=1.0, seed=seed)
        self.frozen = TeacherLayers(teacher, taps)
        self.register_buffer("teacher_sha256", self.frozen.sha256)

    def forward(self, image: Tensor) -> Tensor:   # type: ignore[override]
        """Logits on the grid of an image (B, C, *S): of all heads one after another in training, else their mean.

        Returns:
            Shape (B, heads * K, *S) in training, for `EachHeadLoss`; else (B, K, *S).
        """
        logits = super().forward(self.frozen(image))
        resized = [pool_or_interpolate(one, image.shape[2:], "average") for one in logits]
        return torch.cat(resized, dim=1) if self.training else torch.stack(resized).mean(0)


class EachHeadLoss(nn.Module):
    """Mean over the heads of a supervised loss.

    Args:
        loss: takes predictions (B, K, *S) and labels, and gives a scalar.
        classes: K.
    """

    def __init__(self, loss: nn.Module, classes: int) -> None:
        super().__init__()
        self.loss = loss
        self.classes = classes

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Map (B, heads * K, *S) and labels to a scalar.

        Raises:
            ValueError: channels that are no multiple of the classes.
        """
        if pred.shape[1] % self.classes:
            raise ValueError(
                f"`pred` must have a multiple of {self.classes} channels, `classes` for each head, got {pred.shape[1]}."
            )
        return torch.stack([self.loss(one, label) for one in torch.split(pred, self.classes, dim=1)]).mean()
