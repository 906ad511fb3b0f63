# SPDX-License-Identifier: Apache-2.0
"""Soft labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medkd.losses.logits import SoftLabelLoss


def value_of(loss: SoftLabelLoss, student: Tensor, teacher: Tensor) -> Tensor:
    return loss({"pred": student}, {"pred": teacher})["logits"]


def two_voxels(first: float, second: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two-class logits whose foreground probabilities at T = 1 are these; shape (1, 2, 1, 2)."""
    p = torch.tensor([first, second], dtype=dtype)
    return torch.stack([(1 - p).log(), p.log()]).view(1, 2, 1, 2)


def divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def softened(p: float, temperature: float) -> float:
    odds = (p / (1 - p)) ** (1 / temperature)
    return odds / (1 + odds)


def test_the_value_at_temperature_one_is_the_mean_divergence() -> None:
    value = value_of(SoftLabelLoss(1.0), two_voxels(0.5, 0.25), two_voxels(0.8, 0.25))
    assert value.item() == pytest.approx(0.192745 / 2, abs=1e-6)  # 0.8 ln 1.6 + 0.2 ln 0.4 = 0.192745
    assert value.item() == pytest.approx(divergence(0.8, 0.5) / 2)


def test_the_temperature_softens_both_sides_and_its_square_multiplies() -> None:
    value = value_of(SoftLabelLoss(2.0), two_voxels(0.5, 0.25), two_voxels(0.8, 0.25))
    assert softened(0.8, 2) == pytest.approx(2 / 3)               # odds 4 become 2
    assert value.item() == pytest.approx(4 * divergence(2 / 3, 0.5) / 2)
    assert value.item() == pytest.approx(4 * 0.0566330 / 2, abs=1e-6)


def test_foreground_weighting_counts_voxels_by_the_teachers_probability() -> None:
    student, teacher = two_voxels(0.5, 0.5), two_voxels(0.8, 0.1)
    value = value_of(SoftLabelLoss(1.0, "foreground", floor=0.05), student, teacher)
    expected = (0.85 * divergence(0.8, 0.5) + 0.15 * divergence(0.1, 0.5)) / (0.85 + 0.15)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value = value_of(SoftLabelLoss(1.0, "foreground"), student, teacher)   # a floor of 0.02
    expected = (0.82 * divergence(0.8, 0.5) + 0.12 * divergence(0.1, 0.5)) / (0.82 + 0.12)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_a_sigmoid_output_equals_its_two_class_form() -> None:
    student, teacher = torch.randn(2, 2, 1, 3, 4, 5)
    wide = [torch.cat([torch.zeros_like(x), x], 1) for x in (student, teacher)]
    for weighting in ("uniform", "foreground"):
        loss = SoftLabelLoss(2.0, weighting)
        torch.testing.assert_close(value_of(loss, student, teacher), value_of(loss, *wide))
    assert value_of(SoftLabelLoss(), student, teacher) > 0


@pytest.mark.parametrize("weighting", ["uniform", "foreground"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 4)])
def test_equal_predictions_have_no_loss_and_no_gradient(weighting: str, shape: tuple[int, ...]) -> None:
    student = torch.randn(2, 3, *shape, requires_grad=True)
    value = value_of(SoftLabelLoss(weighting=weighting), student, student.detach())
    value.backward()
    assert abs(value) < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize("weighting", ["uniform", "foreground"])
def test_the_loss_passes_gradcheck(weighting: str) -> None:
    student = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    loss = SoftLabelLoss(3.0, weighting)
    assert torch.autograd.gradcheck(lambda x: value_of(loss, x, teacher), student)


def test_gradient_never_reaches_the_teacher() -> None:
    student, teacher = (torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2))
    value_of(SoftLabelLoss(weighting="foreground"), student, teacher).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None


def test_large_logits_stay_finite() -> None:
    student = (1e4 * torch.randn(1, 3, 4, 4)).requires_grad_()
    value = value_of(SoftLabelLoss(weighting="foreground", floor=0.0), student, 1e4 * torch.randn(1, 3, 4, 4))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_equals_float32_of_the_rounded_values(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 1, 3, 4, 5).to(dtype)
    expected = value_of(SoftLabelLoss(), student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = value_of(SoftLabelLoss(), student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_labels_are_not_used_and_a_term_of_weight_zero_is_not_computed() -> None:
    loss, maps = SoftLabelLoss(), torch.randn(1, 3, 4, 4)
    assert loss.preset_weights == {"logits": 1.0}
    loss.activate([])
    assert loss({"pred": maps}, {"pred": maps}, torch.zeros(1, 1, 4, 4)) == {}


def test_other_classes_and_grids_are_refused() -> None:
    loss, student = SoftLabelLoss(), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`student\['pred'\]` must have the teacher's 2 classes, got 3"):
        value_of(loss, student, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"`student\['pred'\]` and `teacher\['pred'\]` must share batch and spatial"):
        value_of(loss, student, torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"`student\['pred'\]` must be a floating map"):
        value_of(loss, torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="`temperature` must be above 0 and `floor` not below, got 0 and"):
        SoftLabelLoss(temperature=0)
    with pytest.raises(ValueError, match="`temperature` must be above 0 and `floor` not below, got 2.0 and -1"):
        SoftLabelLoss(floor=-1)
    with pytest.raises(ValueError, match=r"`weighting` must be one of \('uniform', 'foreground'\), got 'organs'"):
        SoftLabelLoss(weighting="organs")   # type: ignore[arg-type]


# ---- classification ------------------------------------------------------------------------------------------------


def test_a_sample_of_a_classification_counts_as_a_voxel_does() -> None:
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    loss = SoftLabelLoss(temperature=4.0)
    value = value_of(loss, student, teacher)
    soft, target = (student / 4).log_softmax(1), (teacher / 4).softmax(1)
    expected = 16 * (target * (target.log() - soft)).sum(1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, student, retain_graph=True) for one in (value, expected)))
    row = [one.T.reshape(1, 3, 1, 5) for one in (student, teacher)]
    torch.testing.assert_close(value_of(loss, *row), value)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_a_sample_with_a_negative_class_is_left_out(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    label = torch.tensor([0, -1, 2, 1, -1]).view(shape)
    kept = torch.tensor([0, 2, 3])
    found = SoftLabelLoss()({"pred": student}, {"pred": teacher}, label)["logits"]
    torch.testing.assert_close(found, value_of(SoftLabelLoss(), student[kept], teacher[kept]))
    with pytest.raises(ValueError, match="`label` must be class indices below 3"):
        SoftLabelLoss()({"pred": student}, {"pred": teacher}, label + 2)
