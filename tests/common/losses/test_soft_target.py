# SPDX-License-Identifier: Apache-2.0
"""Dice and cross entropy on the teacher's prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor

from medkd.losses.ignoring import IgnoringLoss
from medkd.losses.soft_target import SoftTargetLoss

SIZES = [(7, 9), (5, 4, 6)]


def value_of(loss: SoftTargetLoss, student: Tensor, teacher: Tensor, label: Tensor | None = None) -> Tensor:
    return loss({"pred": student}, {"pred": teacher}, label)["soft_target"]


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=dtype, requires_grad=True), 3.0 * torch.randn(*shape, dtype=dtype)


def both_gradients(mine: Callable[[], Tensor], other: Callable[[], Tensor], leaf: Tensor) -> None:
    """Compare two values, and what each sends back to a leaf, to a millionth of the largest."""
    values = mine(), other()
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(value, leaf)[0] for value in values]
    assert slopes[1].any()
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6 * float(slopes[1].abs().max()))


def written_out(
    student: Tensor, target: Tensor, kept: Tensor, batch: bool, background: bool, weights: tuple[float, float]
) -> Tensor:
    """The formula, sample by sample and class by class; target of probabilities (B, K, N), kept (B, N)."""
    chances = student.flatten(2).softmax(1)
    samples = [(p[:, k], t[:, k]) for p, t, k in zip(chances, target, kept, strict=True) if k.any()]
    if batch:
        samples = [(torch.cat([p for p, _ in samples], 1), torch.cat([t for _, t in samples], 1))]
    values = []
    for p, t in samples:
        classes = range(0 if background else 1, len(p))
        dice = [1 - (2 * (p[c] * t[c]).sum() + 1e-5) / (p[c].sum() + t[c].sum() + 1e-5) for c in classes]
        entropy = -(t * p.log()).sum(0).mean()
        values.append(weights[0] * torch.stack(dice).mean() + weights[1] * entropy)
    return torch.stack(values).mean()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_the_argmax_it_is_monais_loss_of_that_label(
    size: tuple[int, ...], batch: bool, background: bool, dtype: torch.dtype
) -> None:
    student, teacher = logits(2, 4, *size, dtype=dtype)
    options: dict[str, Any] = {"batch": batch, "include_background": background, "lambda_dice": 0.7, "lambda_ce": 1.3}
    monai = DiceCELoss(softmax=True, to_onehot_y=True, **options)
    loss = SoftTargetLoss("argmax", **options)
    label = teacher.argmax(1, keepdim=True)
    both_gradients(lambda: value_of(loss, student, teacher), lambda: monai(student, label), student)
    shares = SoftTargetLoss("argmax", teacher_output="probabilities", **options)
    torch.testing.assert_close(value_of(shares, student, teacher.softmax(1)), value_of(loss, student, teacher))


@pytest.mark.parametrize("channels", [1, 4])
def test_the_teachers_classes_may_stand_for_its_prediction(channels: int) -> None:
    student, teacher = logits(2, channels, 5, 4, 6)
    classes = (teacher > 0).long() if channels == 1 else teacher.argmax(1, keepdim=True)
    loss = SoftTargetLoss()
    given = loss({"pred": student}, {"classes": classes})["soft_target"]
    assert torch.equal(given, value_of(loss, student, teacher))
    with pytest.raises(ValueError, match=r"`teacher\['classes'\]` must be class indices below"):
        loss({"pred": student}, {"classes": classes + channels + 1})
    with pytest.raises(ValueError, match=r"`teacher\['classes'\]` must share batch and spatial shape"):
        loss({"pred": student}, {"classes": classes[:, :, 1:]})
    for reads_more in (SoftTargetLoss("probabilities"), SoftTargetLoss(activation="sigmoid")):
        with pytest.raises(ValueError, match=r"`teacher` must hold \['pred'\], got \['classes'\]"):
            reads_more({"pred": student}, {"classes": classes})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [True, False])
def test_a_single_channel_is_monais_binary_loss(size: tuple[int, ...], batch: bool) -> None:
    student, teacher = logits(2, 1, *size)
    monai = DiceCELoss(sigmoid=True, batch=batch)
    for target, wanted in (("argmax", (teacher > 0).float()), ("probabilities", teacher.sigmoid())):
        loss = SoftTargetLoss(target, batch=batch)   # type: ignore[arg-type]
        both_gradients(lambda: value_of(loss, student, teacher), lambda: monai(student, wanted), student)   # noqa: B023


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_with_probabilities_it_is_the_formula_and_monais_loss_of_them(
    size: tuple[int, ...], batch: bool, background: bool
) -> None:
    student, teacher = logits(2, 4, *size)
    options: dict[str, Any] = {"batch": batch, "include_background": background, "lambda_dice": 0.7, "lambda_ce": 1.3}
    loss = SoftTargetLoss("probabilities", **options)
    target, kept = teacher.flatten(2).softmax(1), torch.ones(2, math.prod(size), dtype=torch.bool)
    mine = partial(value_of, loss, student, teacher)
    both_gradients(mine, lambda: written_out(student, target, kept, batch, background, (0.7, 1.3)), student)
    monai = DiceCELoss(softmax=True, **options)
    both_gradients(mine, lambda: monai(student, teacher.softmax(1)), student)
    given = SoftTargetLoss("probabilities", teacher_output="probabilities", **options)
    torch.testing.assert_close(value_of(given, student, teacher.softmax(1)), mine())


def test_targets_that_do_not_sum_to_one_by_a_rounding_have_their_own_gradient() -> None:
    """Probabilities that were stored in 8 bits."""
    student, teacher = logits(2, 3, 5, 6)
    stored = (teacher.softmax(1) * 255).round() / 255
    loss = SoftTargetLoss("probabilities", teacher_output="probabilities")
    kept = torch.ones(2, 30, dtype=torch.bool)
    oracle = partial(written_out, student, stored.flatten(2), kept, True, False, (1.0, 1.0))
    both_gradients(lambda: value_of(loss, student, stored), oracle, student)


@pytest.mark.parametrize("target", ["argmax", "probabilities"])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_ignored_voxels_are_left_out_exactly(target: Any, batch: bool, size: tuple[int, ...]) -> None:
    student, teacher = logits(3, 4, *size)
    label = torch.randint(-1, 4, (3, 1, *size))
    label[2] = -1
    loss = SoftTargetLoss(target, batch=batch)
    hard = torch.zeros_like(teacher).scatter_(1, teacher.argmax(1, keepdim=True), 1.0).flatten(2)
    wanted = hard if target == "argmax" else teacher.flatten(2).softmax(1)
    oracle = partial(written_out, student, wanted, label.flatten(1) >= 0, batch, False, (1.0, 1.0))
    both_gradients(lambda: value_of(loss, student, teacher, label), oracle, student)
    slope = torch.autograd.grad(value_of(loss, student, teacher, label), student)[0]
    assert not slope[(label < 0).expand_as(slope)].any()
    if target == "argmax":
        own = teacher.argmax(1, keepdim=True).where(label >= 0, -1)
        supervised = IgnoringLoss(DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=batch))
        torch.testing.assert_close(value_of(loss, student, teacher, label), supervised(student, own))


def test_where_everything_is_ignored_the_loss_is_zero_with_a_gradient_of_zero() -> None:
    for channels in (1, 3):
        student, teacher = logits(2, channels, 4, 5)
        value = value_of(SoftTargetLoss(), student, teacher, torch.full((2, 1, 4, 5), -1))
        assert value.item() == 0
        assert not torch.autograd.grad(value, student)[0].any()


@pytest.mark.parametrize("target", ["argmax", "probabilities"])
def test_regions_have_binary_cross_entropy_and_the_dice_of_every_channel(target: Any) -> None:
    student, teacher = logits(2, 3, 5, 6)
    label = torch.randint(0, 2, (2, 3, 5, 6)).float()
    label[:, 1, 2] = -1
    wanted = (teacher > 0).float() if target == "argmax" else teacher.sigmoid()
    rows = [0, 1, 3, 4]

    def oracle() -> Tensor:
        p, t = student.sigmoid()[:, :, rows], wanted[:, :, rows]
        overlap, both = (p * t).sum((0, 2, 3)), (p + t).sum((0, 2, 3))
        entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        return (1 - (2 * overlap + 1e-5) / (both + 1e-5)).mean() + entropy

    loss = SoftTargetLoss(target, activation="sigmoid")
    both_gradients(lambda: value_of(loss, student, teacher, label), oracle, student)
    given = SoftTargetLoss(target, activation="sigmoid", teacher_output="probabilities")
    torch.testing.assert_close(value_of(given, student, teacher.sigmoid(), label), oracle())


def test_half_of_each_class_is_a_dice_of_a_half() -> None:
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[4.0, -4.0]], [[-4.0, 4.0]]]])
    value = value_of(SoftTargetLoss(lambda_ce=0.0), student, teacher)
    assert value.item() == pytest.approx(1 - 2 * 0.5 / (1.0 + 1.0), abs=1e-5)
    assert value_of(SoftTargetLoss(lambda_dice=0.0), student, teacher).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("target", ["argmax", "probabilities"])
def test_the_loss_passes_gradcheck(target: Any) -> None:
    student, teacher = logits(2, 3, 2, 3, dtype=torch.float64)
    label = torch.randint(-1, 3, (2, 1, 2, 3))
    assert torch.autograd.gradcheck(lambda x: value_of(SoftTargetLoss(target), x, teacher, label), student)


@pytest.mark.parametrize("target", ["argmax", "probabilities"])
def test_memory_format_and_precision_do_not_matter(target: Any) -> None:
    student, teacher = (maps.detach().bfloat16() for maps in logits(2, 3, 4, 5, 6))
    expected = value_of(SoftTargetLoss(target), student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = value_of(SoftTargetLoss(target), student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    last = [maps.float().to(memory_format=torch.channels_last_3d) for maps in (student, teacher)]
    torch.testing.assert_close(value_of(SoftTargetLoss(target), *last), expected)


def test_certain_logits_stay_finite_and_teach_where_they_are_wrong() -> None:
    student, teacher = (1e4 * maps.detach() for maps in logits(1, 3, 4, 4))
    student.requires_grad_()
    value = value_of(SoftTargetLoss(), student, teacher)
    slope = torch.autograd.grad(value, student)[0]
    assert value.isfinite()
    assert slope.isfinite().all()
    wrong = (student.argmax(1) != teacher.argmax(1)).unsqueeze(1)
    assert wrong.any()
    assert (slope.abs().sum(1, keepdim=True) > 0.01)[wrong].all()


def test_the_teacher_has_no_gradient_and_a_term_of_weight_zero_is_not_computed() -> None:
    student, teacher = logits(1, 3, 4, 4)
    teacher.requires_grad_()
    for target in ("argmax", "probabilities"):
        value_of(SoftTargetLoss(target), student, teacher).backward()   # type: ignore[arg-type]
    assert teacher.grad is None
    loss = SoftTargetLoss()
    assert loss.preset_weights == {"soft_target": 1.0}
    loss.activate([])
    assert loss({"pred": student}, {"pred": teacher}) == {}


def test_equal_channels_make_the_first_one_the_target_as_torch_does() -> None:
    student = logits(1, 3, 2, 2)[0]
    expected = torch.nn.functional.cross_entropy(student, torch.zeros(1, 2, 2, dtype=torch.int64))
    value = value_of(SoftTargetLoss(lambda_dice=0.0), student, torch.full((1, 3, 2, 2), 2.0))
    torch.testing.assert_close(value, expected)


def test_other_classes_grids_and_labels_are_refused() -> None:
    loss, student = SoftTargetLoss(), torch.full((1, 3, 4, 4), 2.0)
    with pytest.raises(ValueError, match=r"`student\['pred'\]` must have the teacher's 2 classes, got 3"):
        value_of(loss, student, torch.full((1, 2, 4, 4), 2.0))
    with pytest.raises(ValueError, match=r"`student\['pred'\]` and `teacher\['pred'\]` must share batch and spatial"):
        value_of(loss, student, torch.full((1, 3, 4, 5), 2.0))
    with pytest.raises(ValueError, match=r"`label` must be class indices below 3, .* got 255; .* map it to -1"):
        value_of(loss, student, student, torch.full((1, 1, 4, 4), 255))


@pytest.mark.parametrize("target", ["argmax", "probabilities"])
def test_probabilities_in_the_place_of_logits_are_refused_and_the_other_way_round(target: Any) -> None:
    student, teacher = logits(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`teacher\['pred'\]` must hold logits, got values within \[0, 1\] that sum"):
        value_of(SoftTargetLoss(target), student, teacher.softmax(1))
    with pytest.raises(ValueError, match=r"`teacher\['pred'\]` must hold probabilities that sum to 1 over the chan"):
        value_of(SoftTargetLoss(target, teacher_output="probabilities"), student, teacher)
    with pytest.raises(ValueError, match=r"`student\['pred'\]` must hold logits"):
        value_of(SoftTargetLoss(target), student.softmax(1), teacher)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`target` must be one of \('argmax', 'probabilities'\), got 'soft'"):
        SoftTargetLoss("soft")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`lambda_dice` and `lambda_ce` must be at least 0, and one above, got 0 and"):
        SoftTargetLoss(lambda_dice=0, lambda_ce=0)
    with pytest.raises(ValueError, match="`lambda_dice` and `lambda_ce` must be at least 0, and one above, got -1 and"):
        SoftTargetLoss(lambda_dice=-1)
    with pytest.raises(ValueError, match="`activation` must be one of"):
        SoftTargetLoss(activation="relu")   # type: ignore[arg-type]
