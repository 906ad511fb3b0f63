# SPDX-License-Identifier: Apache-2.0
"""Two five-level DynUNets on one patch: what a distillation loss costs beside them, in a step and alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from lab.bench.peers import step_works
from lab.measure import Row, compare, threads
from medkd.losses.base import DistillationLoss
from medkd.taps import FeatureTaps

STUDENT, TEACHER = (16, 32, 64, 128, 160), (32, 64, 128, 256, 320)
Filters = Sequence[Sequence[int]]                                  # of the student and of the teacher


class DynUNets:
    """Student and teacher of random weights, their taps, and one patch; in the quick mode a third of its size."""

    def __init__(
        self, quick: bool, classes: int, make_loss: Callable[[Filters], DistillationLoss],
        make_label: Callable[[int], Tensor],
    ) -> None:
        torch.manual_seed(0)
        self.quick = quick
        filters = [[count // 4 for count in counts] if quick else list(counts) for counts in (STUDENT, TEACHER)]
        self.student, self.teacher = (make_network(counts, classes) for counts in filters)
        self.teacher.eval().requires_grad_(False)
        self.loss = make_loss(filters)
        paths = ([pair[role] for pair in self.loss.tap_pairs] for role in (0, 1))
        self.taps = [FeatureTaps(one, names) for one, names in zip((self.student, self.teacher), paths, strict=True)]
        size = 32 if quick else 96
        self.image, self.label = torch.randn(1, 1, size, size, size), make_label(size)

    def run_teacher(self) -> dict[str, Tensor]:
        """Forward without gradients; gives the tapped tensors."""
        with torch.no_grad():
            return self._run(self.teacher, self.taps[1])

    def run_student(self) -> dict[str, Tensor]:
        """Forward; gives the tapped tensors."""
        self.student.zero_grad()
        return self._run(self.student, self.taps[0])

    def _run(self, network: nn.Module, taps: FeatureTaps) -> dict[str, Tensor]:
        taps.open()
        pred = network(self.image)
        return taps.close() | {"pred": pred}

    def training_step(self, terms: str) -> list[Row]:
        """Compare a distillation step, without the optimizer, with the plain step and the teacher's forward pass."""
        supervised = DiceCELoss(to_onehot_y=True, softmax=True)
        works = step_works(self.run_student, self.run_teacher, supervised, self.loss, self.label)
        words = f"step with {terms}", "plain step + teacher's forward"
        with threads(1 if self.quick else 2):
            return compare("training_step", words, works, 2 if self.quick else 5, "lower", 1.15)

    def loss_share(self, terms: str, label: Tensor | None = None, goal: float | None = None) -> list[Row]:
        """Time the loss alone, down to the tapped features, against the student's forward and backward pass."""
        teacher = self.run_teacher()
        student = {name: value.detach().requires_grad_() for name, value in self.run_student().items()}
        pull = torch.randn_like(student["pred"])

        def network() -> None:
            torch.autograd.backward(self.run_student()["pred"], pull)

        works = partial(loss_alone, self.loss, student, teacher, label), network
        words = f"{terms}, forward and backward", "student, forward and backward"
        with threads(1 if self.quick else 2):
            return compare("loss_share", words, works, 2 if self.quick else 7, "lower", goal, memory=False)


def loss_alone(
    loss: DistillationLoss, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
) -> None:
    """Run a loss, forward and backward to the student's features."""
    for value in student.values():
        value.grad = None
    torch.autograd.backward(list(loss(student, teacher, label).values()))


def make_network(filters: Sequence[int], classes: int) -> DynUNet:
    """A DynUNet of these channels, from a stride of 1 to one of 2 per further level; random weights."""
    levels = len(filters)
    strides = [1] + [2] * (levels - 1)
    return DynUNet(3, 1, classes, [3] * levels, strides, strides[1:], filters=filters)
