# SPDX-License-Identifier: Apache-2.0
"""Cost of boundary and relation distillation: in a training step, alone, and op by op against the plain formulas.

Steps use two threads, single ops one. The plain formulas are batched torch with autograd (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from lab.bench.peers import against, error_rows, relative_errors, step_works, value_and_gradient
from lab.measure import Row, compare, compare_values, peak_memory, threads
from medkd.losses.boundary_relation import BoundaryRelationLoss
from medkd.ops.affinity import affinity_distance, feature_contrast
from medkd.ops.graph import gram_relation_distance, unit_vectors
from medkd.ops.resample import majority_label
from medkd.taps import FeatureTaps
from tests.oracles import boundary_relation as plain

CLASSES = 14
BOUNDARY = ["downsamples.0", "downsamples.1", "downsamples.2", "bottleneck"]
RELATION = ["downsamples.2", "bottleneck"]
STUDENT, TEACHER = (16, 32, 64, 128, 160), (32, 64, 128, 256, 320)


class Setting:
    """DynUNets of random weights, their taps, and one patch with random blobs as labels."""

    def __init__(self, quick: bool) -> None:
        torch.manual_seed(0)
        size = 32 if quick else 96
        self.student, self.teacher = (
            _network([count // 4 for count in filters] if quick else filters) for filters in (STUDENT, TEACHER)
        )
        self.teacher.eval().requires_grad_(False)
        self.loss = BoundaryRelationLoss(BOUNDARY, RELATION)
        self.taps = FeatureTaps(self.student, BOUNDARY), FeatureTaps(self.teacher, BOUNDARY, "teacher")
        self.image, self.label = torch.randn(1, 1, size, size, size), _blobs(size)

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
    """Compare a distillation step, without the optimizer, with the plain step and the teacher's forward pass."""
    setting = Setting(quick)
    supervised = DiceCELoss(to_onehot_y=True, softmax=True)
    works = step_works(setting.run_student, setting.run_teacher, supervised, setting.loss, setting.label)
    words = "step with both terms", "plain step + teacher's forward"
    with threads(1 if quick else 2):
        return compare("training_step", words, works, 2 if quick else 5, "lower", 1.15)


def loss_share(quick: bool) -> list[Row]:
    """Time the loss alone, down to the tapped features, against the student's forward and backward pass."""
    setting = Setting(quick)
    teacher = setting.run_teacher()
    student = {name: value.detach().requires_grad_() for name, value in setting.run_student().items()}
    pull = torch.randn_like(student["pred"])

    def network() -> None:
        torch.autograd.backward(setting.run_student()["pred"], pull)

    terms = partial(_loss_alone, setting.loss, student, teacher, setting.label)
    words = "both terms, forward and backward", "student, forward and backward"
    with threads(1 if quick else 2):
        return compare("loss_share", words, (terms, network), 2 if quick else 7, "lower", 0.10, memory=False)


def _loss_alone(
    loss: BoundaryRelationLoss, student: dict[str, Tensor], teacher: dict[str, Tensor], label: Tensor
) -> None:
    for value in student.values():
        value.grad = None
    torch.autograd.backward(list(loss(student, teacher, label).values()))


def loss_memory(quick: bool) -> list[Row]:
    """Compare the loss's peak memory per voxel of the patch between sizes; the features' gradients count too."""
    loss = BoundaryRelationLoss(BOUNDARY, RELATION)
    sizes = (32, 48, 64) if quick else (48, 64, 96)
    per_voxel = []
    for size in sizes:
        maps = _features(size, STUDENT, True), _features(size, TEACHER, False)
        per_voxel.append(peak_memory(partial(_loss_alone, loss, *maps, _blobs(size))) * 2**20 / size**3)
    rows = []
    for n in (1, 2):
        words = f"both terms, patch {sizes[n]}^3", f"both terms, patch {sizes[0]}^3"
        values = [(per_voxel[n], per_voxel[0])]
        rows.append(compare_values(f"loss_memory_{sizes[n]}", words, values, "lower", 1.25, "B/voxel"))
    return rows


def _features(size: int, filters: Sequence[int], gradient: bool) -> dict[str, Tensor]:
    maps = {
        name: torch.randn(1, channels, *[size // stride] * 3, requires_grad=gradient)
        for name, channels, stride in zip(BOUNDARY, filters[1:], (2, 4, 8, 16), strict=True)
    }
    return maps | {"pred": torch.zeros(1, CLASSES, size, size, size)}


def _nodes(count: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of student and teacher, (1, N, C)."""
    torch.manual_seed(0)
    student, teacher = (unit_vectors(torch.randn(1, count, channels), dim=2) for channels in (32, 64))
    return student.requires_grad_(), teacher


def relation(quick: bool) -> list[Row]:
    """Compare the Gram form with the N x N matrices, forward and backward."""
    count = 216 if quick else 13_824
    student, teacher = _nodes(count)
    functions = partial(gram_relation_distance, teacher=teacher), partial(plain.relation_distance, teacher=teacher)
    words = f"Gram form, N = {count}", f"N x N matrices, N = {count}"
    return against("relation", words, functions, student, 2 if quick else 3, None if quick else 20)


def relation_error(quick: bool) -> list[Row]:
    """Give the relative errors of the Gram form on float32 nodes against the matrices in float64."""
    count = 216 if quick else 1_728
    student, teacher = _nodes(count)
    double = student.detach().double().requires_grad_()
    found = value_and_gradient(partial(gram_relation_distance, teacher=teacher), student)
    right = value_and_gradient(partial(plain.relation_distance, teacher=teacher.double()), double)
    errors = relative_errors(found, right)
    return error_rows("relation_error", f"Gram form of float32 nodes, N = {count}", errors)


def affinity(quick: bool) -> list[Row]:
    """Compare the distance of pair affinities with slices, maxima and autograd, forward and backward."""
    torch.manual_seed(0)
    size = 12 if quick else 48
    student, teacher = torch.rand(2, 1, 1, size, size, size)
    label = _blobs(size)
    words = f"one direction at a time, {size}^3", f"slices and autograd, {size}^3"
    other = {"teacher": teacher, "label": label}
    functions = partial(affinity_distance, **other), partial(plain.affinity_distance, **other)
    return against("affinity", words, functions, student.requires_grad_(), 2 if quick else 7)


def contrast(quick: bool) -> list[Row]:
    """Compare the boundary map with autograd of the formula, forward and backward."""
    torch.manual_seed(0)
    size = 12 if quick else 48
    features = torch.randn(1, 32, size, size, size, requires_grad=True)
    words = f"a few channels at a time, 32 x {size}^3", f"autograd, 32 x {size}^3"
    return against("contrast", words, (feature_contrast, plain.contrast), features, 2 if quick else 7)


def majority(quick: bool) -> list[Row]:
    """Compare the majority of labels per block with one-hot maps, average pooling and argmax."""
    size = 24 if quick else 96
    label, grid = _blobs(size), (size // 2,) * 3
    words = f"integer votes, {size}^3 to {grid[0]}^3", f"one-hot, pool, argmax, {size}^3 to {grid[0]}^3"
    works = lambda: majority_label(label, grid)[0], lambda: plain.majority_label(label, grid, CLASSES)
    torch.testing.assert_close(works[0](), works[1]())
    return compare("majority", words, works, 2 if quick else 7)


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    measure.__name__: measure
    for measure in (training_step, loss_share, loss_memory, relation, relation_error, affinity, contrast, majority)
}
