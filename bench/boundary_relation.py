# SPDX-License-Identifier: Apache-2.0
"""Cost of boundary and relation distillation: in a training step, alone, and op by op against the plain formulas.

Steps use two threads, single ops one. The plain formulas are batched torch with autograd (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import Row, compare_memory, compare_times, peak_memory, plain_row, threads
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from medkd.losses.boundary_relation import BoundaryRelationLoss
from medkd.ops.affinity import affinity_distance, feature_contrast
from medkd.ops.graph import gram_relation_distance, unit_vectors
from medkd.ops.resample import majority_label
from medkd.taps import FeatureTaps
from oracles import boundary_relation as plain

__all__ = ["MEASUREMENTS"]

CLASSES = 14
BOUNDARY = ["downsamples.0", "downsamples.1", "downsamples.2", "bottleneck"]
RELATION = ["downsamples.2", "bottleneck"]
STUDENT, TEACHER = (16, 32, 64, 128, 160), (32, 64, 128, 256, 320)


# ---- a training step -----------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """Networks, their taps and one batch of one patch."""

    student: nn.Module
    teacher: nn.Module
    taps: tuple[FeatureTaps, FeatureTaps]
    loss: BoundaryRelationLoss
    image: Tensor
    label: Tensor

    @classmethod
    def make(cls, quick: bool) -> Setting:
        """Build DynUNets of random weights, and random blobs as labels."""
        torch.manual_seed(0)
        size = 32 if quick else 96
        student, teacher = (_network([c // 4 for c in filters] if quick else filters) for filters in (STUDENT, TEACHER))
        teacher.eval().requires_grad_(False)
        loss = BoundaryRelationLoss(BOUNDARY, RELATION)
        taps = FeatureTaps(student, BOUNDARY), FeatureTaps(teacher, BOUNDARY, "teacher")
        return cls(student, teacher, taps, loss, torch.randn(1, 1, size, size, size), _blobs(size))

    def run_teacher(self) -> dict[str, Tensor]:
        """Forward without gradients; gives the tapped tensors."""
        self.taps[1].open()
        with torch.no_grad():
            pred = self.teacher(self.image)
        return self.taps[1].close() | {"pred": pred}

    def run_student(self) -> dict[str, Tensor]:
        """Forward; gives the tapped tensors."""
        self.student.zero_grad()
        self.taps[0].open()
        pred = self.student(self.image)
        return self.taps[0].close() | {"pred": pred}


def _network(filters: Sequence[int]) -> DynUNet:
    levels = len(filters)
    strides = [1] + [2] * (levels - 1)
    return DynUNet(3, 1, CLASSES, [3] * levels, strides, strides[1:], filters=filters)


def _blobs(size: int) -> Tensor:
    """Smooth regions of all classes, (1, 1, S, S, S)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, CLASSES, 6, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(size,) * 3, mode="trilinear").argmax(1, keepdim=True)


def training_step(quick: bool) -> list[Row]:
    """Time a distillation step, without the optimizer, against the plain step and the teacher's forward pass."""
    setting = Setting.make(quick)
    supervised = DiceCELoss(to_onehot_y=True, softmax=True)
    weights = setting.loss.preset_weights

    def distilled() -> None:
        student, teacher = setting.run_student(), setting.run_teacher()
        terms = setting.loss(student, teacher, setting.label)
        total = supervised(student["pred"], setting.label) + sum(weights[name] * terms[name] for name in terms)
        total.backward()

    def apart() -> None:
        student = setting.run_student()
        setting.run_teacher()
        supervised(student["pred"], setting.label).backward()

    words = "step with both terms", "plain step + teacher's forward"
    with threads(1 if quick else 2):
        rows = compare_times(
            "training_step", (words[0], distilled), (words[1], apart), 2 if quick else 5, "lower", goal=1.15
        )
        memory = [peak_memory(work) for work in (distilled, apart)]
    return [*rows, compare_memory("training_step_memory", (words[0], memory[0]), (words[1], memory[1]), "lower")]


def loss_share(quick: bool) -> list[Row]:
    """Time the loss alone, down to the tapped features, against the student's forward and backward pass."""
    setting = Setting.make(quick)
    teacher = setting.run_teacher()
    student = {name: value.detach().requires_grad_() for name, value in setting.run_student().items()}
    pull = torch.randn_like(student["pred"])

    def network() -> None:
        setting.run_student()["pred"].backward(pull)

    def terms() -> None:
        _loss_alone(setting.loss, student, teacher, setting.label)

    words = "both terms, forward and backward", "student, forward and backward"
    with threads(1 if quick else 2):
        return compare_times(
            "loss_share", (words[0], terms), (words[1], network), 2 if quick else 7, "lower", goal=0.10
        )


def _loss_alone(
    loss: BoundaryRelationLoss, student: dict[str, Tensor], teacher: dict[str, Tensor], label: Tensor
) -> None:
    for value in student.values():
        value.grad = None
    sum(loss(student, teacher, label).values()).backward()   # type: ignore[union-attr]


def loss_memory(quick: bool) -> list[Row]:
    """Compare the loss's peak memory per voxel of the patch between sizes; the features' gradients count too."""
    loss = BoundaryRelationLoss(BOUNDARY, RELATION)
    sizes = (32, 48, 64) if quick else (48, 64, 96)
    per_voxel = []
    for size in sizes:
        student, teacher = _features(size, STUDENT, True), _features(size, TEACHER, False)
        label = _blobs(size)
        peak = peak_memory(lambda s=student, t=teacher, y=label: _loss_alone(loss, s, t, y))
        per_voxel.append(peak * 2**20 / size**3)
    words = [f"both terms, patch {size}^3" for size in sizes]
    return [
        compare_memory(
            f"loss_memory_{sizes[i]}", (words[i], per_voxel[i]), (words[0], per_voxel[0]), "lower", 1.25, "B/voxel"
        )
        for i in (1, 2)
    ]


def _features(size: int, filters: Sequence[int], gradient: bool) -> dict[str, Tensor]:
    maps = {
        name: torch.randn(1, channels, *[size // stride] * 3, requires_grad=gradient)
        for name, channels, stride in zip(BOUNDARY, filters[1:], (2, 4, 8, 16), strict=True)
    }
    return maps | {"pred": torch.zeros(1, CLASSES, size, size, size)}


# ---- op by op ------------------------------------------------------------------------------------------------------


def _against(
    name: str,
    subject: tuple[str, Callable[[Tensor], Tensor]],
    reference: tuple[str, Callable[[Tensor], Tensor]],
    leaf: Tensor,
    pairs: int,
    goal: float | None = None,
) -> list[Row]:
    """Time forward and backward to `leaf` on one thread, after seeing that both give the same gradient."""
    shape = subject[1](leaf).shape
    pull = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def run(function: Callable[[Tensor], Tensor]) -> Tensor:
        value = function(leaf)
        return torch.autograd.grad(value, leaf, pull.to(value))[0]

    with threads(1):
        gradients = [run(function) for function in (subject[1], reference[1])]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
        del gradients
        works = [lambda: run(subject[1]), lambda: run(reference[1])]
        rows = compare_times(name, (subject[0], works[0]), (reference[0], works[1]), pairs, goal=goal)
        memory = [peak_memory(work) for work in works]
    return [*rows, compare_memory(f"{name}_memory", (subject[0], memory[0]), (reference[0], memory[1]))]


def relation(quick: bool) -> list[Row]:
    """Compare the Gram form with the N x N matrices, forward and backward."""
    torch.manual_seed(0)
    count = 216 if quick else 13_824
    student, teacher = (unit_vectors(torch.randn(1, count, channels), dim=2) for channels in (32, 64))
    return _against(
        "relation", (f"Gram form, N = {count}", lambda s: gram_relation_distance(s, teacher)),
        (f"N x N matrices, N = {count}", lambda s: plain.relation_distance(s, teacher)),
        student.requires_grad_(), 2 if quick else 3, None if quick else 20,
    )


def relation_error(quick: bool) -> list[Row]:
    """Give the relative errors of the Gram form on float32 nodes against the matrices in float64."""
    torch.manual_seed(0)
    count = 216 if quick else 1_728
    student, teacher = (unit_vectors(torch.randn(1, count, channels), dim=2) for channels in (32, 64))
    student.requires_grad_()
    double = student.detach().double().requires_grad_()
    value, exact = gram_relation_distance(student, teacher), plain.relation_distance(double, teacher.double())
    pairs = {
        "value": (value.detach(), exact.detach()),
        "gradient": (torch.autograd.grad(value.sum(), student)[0], torch.autograd.grad(exact.sum(), double)[0]),
    }
    words = f"Gram form of float32 nodes, N = {count}"
    return [
        plain_row(f"relation_error_{of}", words, float((mine - other).norm() / other.norm()), 1e-5, "relative")
        for of, (mine, other) in pairs.items()
    ]


def affinity(quick: bool) -> list[Row]:
    """Compare the distance of pair affinities with slices, maxima and autograd, forward and backward."""
    torch.manual_seed(0)
    size = 12 if quick else 48
    student, teacher = torch.rand(2, 1, 1, size, size, size)
    label = _blobs(size)
    return _against(
        "affinity", (f"one direction at a time, {size}^3", lambda s: affinity_distance(s, teacher, label)),
        (f"slices and autograd, {size}^3", lambda s: plain.affinity_distance(s, teacher, label)),
        student.requires_grad_(), 2 if quick else 7,
    )


def contrast(quick: bool) -> list[Row]:
    """Compare the boundary map with autograd of the formula, forward and backward."""
    torch.manual_seed(0)
    size = 12 if quick else 48
    features = torch.randn(1, 32, size, size, size, requires_grad=True)
    return _against(
        "contrast", (f"a few channels at a time, 32 x {size}^3", feature_contrast),
        (f"autograd, 32 x {size}^3", plain.contrast), features, 2 if quick else 7,
    )


def majority(quick: bool) -> list[Row]:
    """Compare the majority of labels per block with one-hot maps, average pooling and argmax."""
    size = 24 if quick else 96
    label, grid = _blobs(size), (size // 2,) * 3
    words = f"integer votes, {size}^3 to {grid[0]}^3", f"one-hot, pool, argmax, {size}^3 to {grid[0]}^3"

    def mine() -> Tensor:
        return majority_label(label, grid)[0]

    def other() -> Tensor:
        return plain.majority_label(label, grid, CLASSES)

    with threads(1):
        torch.testing.assert_close(mine(), other())
        rows = compare_times("majority", (words[0], mine), (words[1], other), 2 if quick else 7)
        memory = [peak_memory(work) for work in (mine, other)]
    return [*rows, compare_memory("majority_memory", (words[0], memory[0]), (words[1], memory[1]))]


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    "training_step": training_step,
    "loss_share": loss_share,
    "loss_memory": loss_memory,
    "relation": relation,
    "relation_error": relation_error,
    "affinity": affinity,
    "contrast": contrast,
    "majority": majority,
}
