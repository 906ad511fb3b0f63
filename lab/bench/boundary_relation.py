# SPDX-License-Identifier: Apache-2.0
"""Cost of boundary and relation distillation: in a training step, alone, and op by op against the plain formulas.

Steps use two threads, single ops one. The plain formulas are batched torch with autograd (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.bench.dynunets import STUDENT, TEACHER, DynUNets, loss_alone
from lab.bench.peers import against, error_rows, relative_errors, value_and_gradient
from lab.measure import Row, compare, compare_values, peak_memory
from medkd.losses.boundary_relation import BoundaryRelationLoss
from medkd.ops.affinity import affinity_distance, feature_contrast
from medkd.ops.graph import gram_relation_distance, unit_vectors
from medkd.ops.resample import majority_label
from tests.oracles import boundary_relation as plain

CLASSES = 14
BOUNDARY = ["downsamples.0", "downsamples.1", "downsamples.2", "bottleneck"]
RELATION = ["downsamples.2", "bottleneck"]


def _setting(quick: bool) -> DynUNets:
    return DynUNets(quick, CLASSES, lambda filters: BoundaryRelationLoss(BOUNDARY, RELATION), _blobs)


def _blobs(size: int) -> Tensor:
    """Smooth regions of all classes, (1, 1, S, S, S)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, CLASSES, 6, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(size,) * 3, mode="trilinear").argmax(1, keepdim=True)


def training_step(quick: bool) -> list[Row]:
    """Compare a step with both terms with what it cannot do without."""
    return _setting(quick).training_step("both terms")


def loss_share(quick: bool) -> list[Row]:
    """Time the loss alone against the student's forward and backward pass."""
    setting = _setting(quick)
    return setting.loss_share("both terms", setting.label, 0.10)


def loss_memory(quick: bool) -> list[Row]:
    """Compare the loss's peak memory per voxel of the patch between sizes; the features' gradients count too."""
    loss = BoundaryRelationLoss(BOUNDARY, RELATION)
    sizes = (32, 48, 64) if quick else (48, 64, 96)
    per_voxel = []
    for size in sizes:
        maps = _features(size, STUDENT, True), _features(size, TEACHER, False)
        per_voxel.append(peak_memory(partial(loss_alone, loss, *maps, _blobs(size))) * 2**20 / size**3)
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
