# SPDX-License-Identifier: Apache-2.0
"""Unit vectors, class-balanced weights, and relations compared in Gram form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medkd.ops.graph import (
    class_balance_weight,
    gram_relation_distance,
    softmax_relation_distance,
    unit_vectors,
)
from oracles import boundary_relation as oracle

TEACHER = [(3, 0), (0, 2), (1, 1)]
STUDENT = [(1, 0, 0), (1, 1, 0), (0, 0, 2)]


def nodes(vectors: list[tuple[float, ...]]) -> Tensor:
    """Unit nodes of one sample, (1, N, C), in float64."""
    return unit_vectors(torch.tensor([vectors], dtype=torch.float64), dim=2)


def random_nodes(batch: int, count: int, channels: int) -> Tensor:
    return unit_vectors(torch.randn(batch, count, channels, dtype=torch.float64), dim=2)


# ---- unit vectors --------------------------------------------------------------------------------------------------


def test_unit_vectors_have_length_one_or_zero() -> None:
    units = unit_vectors(torch.tensor([[3.0, 0.0, 1e-7], [4.0, 0.0, 0.0]]), dim=0)
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.0, 0.0], [0.8, 0.0, 0.0]]))


def test_a_vector_as_long_as_eps_is_alive_and_a_shorter_one_is_dead() -> None:
    vectors = torch.tensor([[0.5, 0.25, 1e-5]])
    assert unit_vectors(vectors, eps=0.5, dim=0).tolist() == [[1.0, 0.0, 0.0]]
    torch.testing.assert_close(unit_vectors(vectors, dim=0), torch.ones(1, 3))


def test_dead_vectors_get_no_gradient() -> None:
    vectors = torch.tensor([[3.0, 0.0, 1e-7], [4.0, 0.0, 0.0]], requires_grad=True)
    unit_vectors(vectors, dim=0)[0].sum().backward()
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, torch.tensor([[0.128, 0.0, 0.0], [-0.096, 0.0, 0.0]]))


def test_unit_vectors_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(unit_vectors, torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True))


# ---- weights -------------------------------------------------------------------------------------------------------


def test_every_class_present_weighs_the_same() -> None:
    label = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]])
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 6, 1 / 2], [1 / 4, 1 / 4, 1 / 4, 1 / 4]])
    torch.testing.assert_close(class_balance_weight(label), expected)


def test_ignored_nodes_weigh_nothing_and_absent_classes_are_left_out() -> None:
    label = torch.tensor([[0, 0, 1, 1, 255]])
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(class_balance_weight(label, label != 255), expected)


def test_unbalanced_weights_are_uniform_over_the_valid_nodes() -> None:
    label = torch.tensor([[0, 0, 0, 1, 255]])
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(class_balance_weight(label, label != 255, balanced=False), expected)


@pytest.mark.parametrize("balanced", [True, False])
def test_a_sample_without_valid_nodes_weighs_nothing(balanced: bool) -> None:
    label = torch.tensor([[255, 255], [0, 1]])
    weight = class_balance_weight(label, label != 255, balanced)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.0], [0.5, 0.5]]))


# ---- distance ------------------------------------------------------------------------------------------------------


def test_distance_of_three_nodes_matches_the_value_by_hand() -> None:
    student, teacher = nodes(STUDENT), nodes(TEACHER)
    relation = teacher @ teacher.transpose(1, 2)
    assert relation[0, [0, 0, 1], [1, 2, 2]].tolist() == pytest.approx([0, 0.707107, 0.707107], abs=1e-6)
    assert gram_relation_distance(student, teacher).item() == pytest.approx(1 / 3)
    assert oracle.relation_distance(student, teacher).item() == pytest.approx(1 / 3)


def test_weighted_distance_of_three_nodes_matches_the_value_by_hand() -> None:
    weight = torch.tensor([[0.25, 0.25, 0.5]])
    assert gram_relation_distance(nodes(STUDENT), nodes(TEACHER), weight).item() == pytest.approx(0.3125)


def test_gradient_of_three_nodes_matches_the_values_by_hand() -> None:
    student = nodes(STUDENT).requires_grad_()
    gram_relation_distance(student, nodes(TEACHER)).sum().backward()
    expected = [[0.222222, 0.222222, -0.314270], [0.314270, 0, -0.314270], [-0.536492, -0.222222, 0]]
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_class_balanced_distance_matches_the_value_by_hand() -> None:
    student = nodes([(1, 1), (1, 0), (0, 1), (1, 2), (0, 1)])
    teacher = nodes([(1, 0), (2, 2), (0, 1), (0, 3), (1, 0)])
    label = torch.tensor([[0, 0, 1, 1, 255]])
    weight = class_balance_weight(label, label != 255)
    assert gram_relation_distance(student, teacher, weight).item() == pytest.approx(0.247336, abs=1e-6)
    assert gram_relation_distance(student[:, :4], teacher[:, :4]).item() == pytest.approx(0.247336, abs=1e-6)


def test_distance_and_gradient_equal_the_dense_matrices() -> None:
    teacher, weight = random_nodes(2, 200, 11), torch.rand(2, 200, dtype=torch.float64)
    student = random_nodes(2, 200, 7).requires_grad_()
    ours, dense = gram_relation_distance(student, teacher, weight), oracle.relation_distance(student, teacher, weight)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (ours, dense)]
    torch.testing.assert_close(*gradients)


def test_float32_nodes_keep_five_digits_of_the_distance() -> None:
    student, teacher = random_nodes(1, 500, 8), random_nodes(1, 500, 16)
    expected = oracle.relation_distance(student, teacher)
    torch.testing.assert_close(gram_relation_distance(student.float(), teacher.float()), expected, rtol=1e-5, atol=0)


def test_nearly_equal_float32_nodes_keep_three_digits_of_the_distance() -> None:
    student = random_nodes(1, 500, 8).float()
    teacher = unit_vectors(student + 1e-4 * torch.randn_like(student), dim=2)
    expected = oracle.relation_distance(student.double(), teacher.double())
    assert expected < 1e-7
    torch.testing.assert_close(gram_relation_distance(student, teacher), expected, rtol=1e-3, atol=0)


def test_distance_passes_gradcheck() -> None:
    teacher, weight = random_nodes(2, 5, 4), torch.rand(2, 5, dtype=torch.float64)
    student = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gram_relation_distance(x, teacher, weight), student)


def test_equal_nodes_have_no_distance_and_no_gradient() -> None:
    student = random_nodes(200, 30, 4).requires_grad_()
    distance = gram_relation_distance(student, student.detach()[:, :, [1, 0, 3, 2]])   # sums in another order
    distance.sum().backward()
    assert distance.max() < 1e-12
    assert distance.min() == 0                                     # never below
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_rotated_and_zero_padded_channels_leave_the_distance() -> None:
    student, teacher = random_nodes(1, 20, 4), random_nodes(1, 20, 5)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    padded = torch.cat([student @ rotation, torch.zeros(1, 20, 3, dtype=torch.float64)], dim=2)
    torch.testing.assert_close(gram_relation_distance(padded, teacher), gram_relation_distance(student, teacher))


def test_moving_nodes_around_leaves_the_distance() -> None:
    student, teacher, weight = random_nodes(2, 20, 4), random_nodes(2, 20, 5), torch.rand(2, 20)
    order = torch.randperm(20)
    torch.testing.assert_close(
        gram_relation_distance(student[:, order], teacher[:, order], weight[:, order]),
        gram_relation_distance(student, teacher, weight),
    )


def test_a_sample_without_weight_has_distance_zero_and_zero_gradient() -> None:
    student = random_nodes(2, 6, 3).requires_grad_()
    weight = torch.tensor([[0.0] * 6, [1.0] * 6])
    distance = gram_relation_distance(student, random_nodes(2, 6, 4), weight)
    distance.sum().backward()
    assert student.grad is not None
    assert distance[0] == 0
    assert distance[1] > 0
    assert not student.grad[0].any()
    assert student.grad.isfinite().all()


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = random_nodes(1, 6, 3).requires_grad_(), random_nodes(1, 6, 3).requires_grad_()
    gram_relation_distance(student, teacher).sum().backward()
    assert teacher.grad is None


def test_nodes_of_other_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shapes \(B, N, C\).*pool both to one grid"):
        gram_relation_distance(torch.zeros(1, 4, 2), torch.zeros(1, 5, 2))


# ---- relations through a softmax -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "rows", "mean"),
    [(1.0, (0.126512, 0.126512, 0.061657), 0.104893), (0.1, (0.358478, 0.358478, 0.581463), 0.432806)],
)
def test_softmax_distance_of_three_nodes_matches_the_values_by_hand(
    temperature: float, rows: tuple[float, ...], mean: float
) -> None:
    student, teacher = nodes(STUDENT), nodes(TEACHER)
    assert softmax_relation_distance(student, teacher, None, temperature).item() == pytest.approx(mean, abs=1e-6)
    dense = oracle.softmax_relation_rows(student, teacher, temperature)
    torch.testing.assert_close(dense, torch.tensor([rows], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 30])
def test_streamed_softmax_distance_and_gradient_equal_the_dense_matrices(block: int) -> None:
    student, teacher = random_nodes(2, 30, 5).requires_grad_(), random_nodes(2, 30, 8)
    weight = torch.rand(2, 30, dtype=torch.float64)
    weight[0, :4] = 0                                              # ignored nodes are in no row
    ours = softmax_relation_distance(student, teacher, weight, 0.1, block)
    plain = torch.stack([
        (w[w > 0] * oracle.softmax_relation_rows(s[None, w > 0], t[None, w > 0], 0.1)[0]).sum() / w.sum()
        for s, t, w in zip(student, teacher, weight, strict=True)
    ])
    torch.testing.assert_close(ours, plain)
    pull = torch.rand(2, dtype=torch.float64)
    found, expected = (torch.autograd.grad(v, student, pull, retain_graph=True)[0] for v in (ours, plain))
    torch.testing.assert_close(found, expected)


def test_softmax_distance_gives_the_teacher_no_gradient_and_has_a_temperature_of_a_tenth() -> None:
    student, teacher = random_nodes(1, 6, 3).requires_grad_(), random_nodes(1, 6, 3).requires_grad_()
    value = softmax_relation_distance(student, teacher)
    value.sum().backward()
    assert teacher.grad is None
    assert not softmax_relation_distance(student.detach(), teacher).requires_grad
    torch.testing.assert_close(value, softmax_relation_distance(student, teacher, temperature=0.1))


def test_softmax_distance_passes_gradcheck() -> None:
    student, teacher = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True), random_nodes(1, 6, 2)

    def distance(vectors: Tensor) -> Tensor:
        return softmax_relation_distance(unit_vectors(vectors, 2), teacher, None, 0.3, 4)

    assert torch.autograd.gradcheck(distance, student)


def test_equal_rotated_and_moved_nodes_behave_as_in_gram_form() -> None:
    student, teacher = random_nodes(1, 20, 4).requires_grad_(), random_nodes(1, 20, 6)
    zero = softmax_relation_distance(student, student)
    (gradient,) = torch.autograd.grad(zero.sum(), student)
    assert zero.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    rotation, order = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q, torch.randperm(20)
    expected = softmax_relation_distance(student, teacher)
    torch.testing.assert_close(softmax_relation_distance(student @ rotation, teacher), expected)
    torch.testing.assert_close(softmax_relation_distance(student[:, order], teacher[:, order]), expected)


def test_softmax_distance_without_weight_is_zero_and_float32_keeps_five_digits() -> None:
    student, teacher = random_nodes(2, 9, 3).requires_grad_(), random_nodes(2, 9, 3)
    weight = torch.ones(2, 9)
    weight[1] = 0
    value = softmax_relation_distance(student, teacher, weight)
    value.sum().backward()
    assert value[1] == 0
    assert student.grad is not None
    assert not student.grad[1].any()
    assert student.grad[0].any()
    single = softmax_relation_distance(student.detach().float(), teacher.float(), weight)
    assert single.dtype == torch.float32
    assert softmax_relation_distance(student.detach().bfloat16(), teacher.bfloat16(), weight).dtype == torch.float32
    assert single[0].item() == pytest.approx(value[0].item(), rel=1e-5)


def test_wrong_options_of_the_softmax_distance_are_refused() -> None:
    with pytest.raises(ValueError, match="`temperature` must be above 0 and `rows` at least 1, got 0"):
        softmax_relation_distance(random_nodes(1, 3, 2), random_nodes(1, 3, 2), temperature=0)
    with pytest.raises(ValueError, match="`temperature` must be above 0 and `rows` at least 1, got 0.1 and 0"):
        softmax_relation_distance(random_nodes(1, 3, 2), random_nodes(1, 3, 2), rows=0)
    with pytest.raises(ValueError, match=r"`student` and `teacher` must have shapes \(B, N, C\)"):
        softmax_relation_distance(random_nodes(1, 3, 2), random_nodes(1, 4, 2))
