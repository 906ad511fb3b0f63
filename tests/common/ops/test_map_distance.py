# SPDX-License-Identifier: Apache-2.0
"""Distances of normalized maps: known answers, what does not count, and maps that show nothing."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from medkd.ops.attention import attention_distance
from medkd.ops.class_attention import class_attention
from medkd.ops.map_distance import Normalization, map_distance, normalized_maps, root_mean_square
from medkd.ops.resample import pool_average, resize_linearly
from oracles import inter_resolution_attention as oracle

ALL = get_args(Normalization)
TEACHER = [[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, -1.0]]], [[1.0, -1.0], [0.5, 2.0]]
STUDENT = [[[1.0, 1.0], [0.0, 1.0]], [[-1.0, 0.0], [2.0, 0.5]]], [[1.0, -2.0], [1.0, 1.0]]


def example(variant: Any = "at_plus") -> tuple[Tensor, Tensor]:
    """Maps of the specification's two networks."""
    return tuple(   # type: ignore[return-value]
        class_attention(torch.tensor([maps], dtype=torch.float64), torch.tensor(head, dtype=torch.float64), variant)
        for maps, head in (STUDENT, TEACHER)
    )


def test_known_normalized_maps() -> None:
    student, teacher = (normalized_maps(maps)[0] for maps in example())
    third = 1 / 3
    expected = [[[third, 0], [0, 1]], [[0.5 * third, 2 * third], [2 * third, third]]]
    torch.testing.assert_close(teacher, torch.tensor(expected, dtype=torch.float64))
    expected = [[[1, third], [0, third]], [[third, third], [2 * third, 0.5]]]
    torch.testing.assert_close(student, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("variant", "normalization", "temperature", "expected"), [
    ("at_plus", "minmax_joint", 0.01, 0.381881308),
    ("at_plus", "minmax_class", 0.01, 0.503460249),
    ("at_plus", "softmax", 1.0, 0.040447541),
    ("at_plus", "softmax", 0.1, 0.430182962),
    ("at_plus", "softmax", 0.01, 0.5),
    ("at_plus", "l2", 0.01, 6 / 11),
    ("positive_weight", "minmax_joint", 0.01, 0.429995155),
    ("gradcam", "minmax_joint", 0.01, 0.493006649),
    ("signed", "minmax_joint", 0.01, 0.448966003),
    ("activation", "l2", 0.01, 0.945678049),
])
def test_known_distances(variant: Any, normalization: Any, temperature: float, expected: float) -> None:
    distance, counts = map_distance(*example(variant), normalization, temperature=temperature)
    assert distance.item() == pytest.approx(expected, abs=1e-9)
    assert counts.tolist() == [True]


def test_known_distances_of_single_classes_and_their_mean() -> None:
    alone = [map_distance(*(maps[:, c : c + 1] for maps in example()))[0].item() for c in range(2)]
    assert alone == pytest.approx([0.5, 0.506896878], abs=1e-9)
    assert sum(alone) / 2 == pytest.approx(0.503448438, abs=1e-8)


def test_known_distances_of_two_grids_depend_on_the_order() -> None:
    teacher = torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4)
    student = torch.tensor([[[[0.0, 2.0], [2.0, 4.0]]]], dtype=torch.float64)
    pooled = map_distance(student, pool_average(teacher, (2, 2)))[0]
    assert pooled.item() == pytest.approx(0.212132034, abs=1e-9)
    wrong = normalized_maps(student) - pool_average(normalized_maps(teacher), (2, 2))
    assert wrong.square().mean().sqrt().item() == pytest.approx(0.184089350, abs=1e-9)
    resized = map_distance(resize_linearly(student, (4, 4)), teacher)[0]
    assert resized.item() == pytest.approx(0.163511807, abs=1e-9)
    stretched = torch.nn.functional.interpolate(student, size=(4, 4), mode="bilinear", align_corners=True)
    assert map_distance(stretched, teacher)[0].item() == pytest.approx(0.158113883, abs=1e-9)


def test_the_distance_is_that_of_the_plain_formula() -> None:
    torch.manual_seed(0)
    for size in ((5, 3), (4, 3, 2)):
        student, teacher = torch.randn(4, 3, *size, requires_grad=True), torch.randn(4, 3, *size)
        found, expected = map_distance(student, teacher)[0].mean(), oracle.distance(student, teacher)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(one, student, retain_graph=True) for one in (found, expected)))


def test_l2_is_the_attention_distance_where_there_is_one_map() -> None:
    torch.manual_seed(0)
    student, teacher, weight = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    for w in (None, weight):
        found = map_distance(student, teacher, "l2", w)[0]
        torch.testing.assert_close(found, attention_distance(student, teacher, w))


@pytest.mark.parametrize("normalization", ALL)
def test_it_passes_gradcheck(normalization: Any) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 2, 3, 2, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(2, 1, 3, 2, dtype=torch.float64).masked_fill(torch.rand(2, 1, 3, 2) < 0.3, 0.0)
    for w in (None, weight):
        def distance(maps: Tensor, w: Tensor | None = w) -> Tensor:
            return map_distance(maps, teacher, normalization, w, temperature=1.0)[0]

        assert torch.autograd.gradcheck(distance, student.clone().requires_grad_())


# ---- what does not count -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ALL)
def test_what_weighs_nothing_is_as_if_it_were_not_there(normalization: Any) -> None:
    torch.manual_seed(0)
    maps, weight = torch.randn(2, 2, 3, 4, 5), torch.ones(2, 1, 4, 5)
    weight[..., 3:] = 0.0
    maps[..., 4] = 1e3                                             # extremes that must not be seen
    student, teacher = maps
    expected = map_distance(student[..., :3], teacher[..., :3], normalization)
    found = map_distance(student, teacher, normalization, weight)
    torch.testing.assert_close(found, expected)
    assert not normalized_maps(student, normalization, weight)[..., 3:].any()


def test_classes_that_weigh_nothing_are_as_if_they_were_not_there() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    weight = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    for normalization in ALL:
        expected = map_distance(student[:, ::2], teacher[:, ::2], normalization)
        torch.testing.assert_close(map_distance(student, teacher, normalization, weight), expected)


@pytest.mark.parametrize("normalization", ALL)
def test_a_sample_without_weight_or_with_a_constant_teacher_does_not_count(normalization: Any) -> None:
    student = torch.rand(3, 2, 4, 4, requires_grad=True)
    teacher, weight = torch.rand(3, 2, 4, 4), torch.ones(3, 1, 4, 4)
    teacher[0] = 3.0
    weight[1] = 0.0
    distance, counts = map_distance(student, teacher, normalization, weight)
    assert counts.tolist() == [False, False, True]
    assert bool(distance.isfinite().all())
    (slope,) = torch.autograd.grad(distance.sum(), student)
    assert bool(slope.isfinite().all())


def test_by_class_a_constant_map_of_the_teacher_does_not_count() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 1, 2, 4, 4)
    expected = map_distance(student[:, :1], teacher[:, :1])
    teacher[:, 1] = 0.0
    torch.testing.assert_close(map_distance(student, teacher, "minmax_class"), expected)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-3, 1e4])
@pytest.mark.parametrize("normalization", ALL)
def test_a_constant_student_has_a_finite_distance_and_gradient(normalization: Any, value: float) -> None:
    student = torch.full((1, 2, 3, 3), value, requires_grad=True)
    distance, counts = map_distance(student, torch.rand(1, 2, 3, 3), normalization)
    assert counts.all()
    (slope,) = torch.autograd.grad(distance.sum(), student)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().max()) < 1e3
    if normalization.startswith("minmax"):
        assert not slope.any()
        assert not normalized_maps(student, normalization).any()


@pytest.mark.parametrize("normalization", ALL)
def test_equal_maps_have_no_distance_and_a_gradient_of_zero(normalization: Any) -> None:
    maps = torch.rand(2, 3, 4, 4)
    student = maps.clone().requires_grad_()
    distance, _ = map_distance(student, maps, normalization)
    assert distance.max().item() <= 1.001e-6
    (slope,) = torch.autograd.grad(distance.sum(), student)
    assert not slope.any()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
@pytest.mark.parametrize("normalization", ["minmax_joint", "minmax_class", "l2"])
def test_only_the_shape_of_maps_matters(normalization: Any, scale: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 2, 3, 4, 4)
    expected = map_distance(student, teacher, normalization)[0]
    torch.testing.assert_close(map_distance(scale * student, teacher, normalization)[0], expected)
    torch.testing.assert_close(map_distance(student, scale * teacher, normalization)[0], expected)
    swapped = map_distance(student.flip(1), teacher, normalization)[0]
    assert not torch.allclose(swapped, expected)
    if normalization != "l2":
        torch.testing.assert_close(map_distance(student + 2.0, teacher, normalization)[0], expected)
        assert bool((expected <= 1).all())


def test_the_root_of_the_mean_square_is_over_the_whole_batch_and_weighted() -> None:
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    torch.testing.assert_close(root_mean_square(student, teacher), (student - teacher).square().mean().sqrt())
    expected = (weight * (student - teacher).square()).sum() / (3 * weight.sum())
    torch.testing.assert_close(root_mean_square(student, teacher, weight), expected.sqrt())
    leaf = student.requires_grad_()
    nothing = root_mean_square(leaf, teacher, 0.0 * weight)
    assert nothing.item() == 0.0
    assert not torch.autograd.grad(nothing, leaf)[0].any()


def test_errors_say_what_is_wrong() -> None:
    maps = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="`normalization` must be one of .*'l2'.*, got 'l1'"):
        normalized_maps(maps, "l1")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        normalized_maps(maps, "softmax", temperature=0.0)
    with pytest.raises(ValueError, match="`student` must have the teacher's 3 maps, got 2"):
        map_distance(maps, torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match="`student` and `teacher` must share batch and spatial shape"):
        map_distance(maps, torch.zeros(1, 2, 3, 4))
