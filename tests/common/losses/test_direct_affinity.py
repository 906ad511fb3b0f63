# SPDX-License-Identifier: Apache-2.0
"""Losses of affinities that a network gives directly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medkd.losses.direct_affinity import DirectAffinityDistillation, DirectAffinityLoss
from oracles import graph_relation as oracle

FLAT = [(-1, 0), (0, -1), (-3, 0), (0, -5)]
DEEP = [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, -3, 0)]
EITHER = pytest.mark.parametrize(("size", "offsets"), [((9, 7), FLAT), ((4, 7, 6), DEEP)])


def maps(channels: int, size: tuple[int, ...], batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def numbers(size: tuple[int, ...], batch: int = 2) -> Tensor:
    """Instances of 2 voxels and more along each axis, with background."""
    coarse = torch.randint(0, 4, (batch, 1, *(-(-s // 2) for s in size)), generator=torch.Generator().manual_seed(1))
    for axis, s in enumerate(size, start=2):
        coarse = coarse.repeat_interleave(2, axis).narrow(axis, 0, s)
    return coarse


def binary(chance: Tensor, target: Tensor) -> Tensor:
    return -torch.where(target > 0.5, chance, 1 - chance).log()


def dice(cut: Tensor, truth: Tensor) -> float:
    return 1 - float((2 * (cut * truth).sum() + 1e-5) / (cut.sum() + truth.sum() + 1e-5))


@EITHER
def test_it_equals_the_formulas_without_balance(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    logits, label = maps(len(offsets) + 1, size), numbers(size)
    background = "same" if len(size) == 2 else "different"
    pairs = [
        torch.as_tensor(oracle.label_affinity_by_loops(one[0].numpy(), offsets, background)) for one in label
    ]
    target = torch.stack(pairs).double()
    inside = torch.as_tensor(oracle.label_affinity_by_loops(torch.ones(size).numpy(), offsets, "same")) > 0
    chance, entropy, overlap = logits.sigmoid(), 0.0, 0.0
    for channel, chosen in enumerate(inside):
        mine, truth = chance[:, channel][:, chosen], target[:, channel][:, chosen]
        entropy += float(binary(mine, truth).sum()) / (2 * (int(chosen.sum()) if len(size) == 3 else math.prod(size)))
        overlap += dice(1 - mine, 1 - truth)
    expected = 0.3 * entropy / len(offsets) + 2.0 * overlap / len(offsets)
    options: dict[str, Any] = {"balance": "none", "entropy_weight": 0.3, "dice_weight": 2.0}
    alone = DirectAffinityLoss(offsets, **options)(logits[:, :-1], label)
    assert alone.item() == pytest.approx(expected, rel=1e-6)

    foreground = (label[:, 0] > 0).double()
    of_it = 0.3 * float(binary(chance[:, -1], foreground).mean()) + 2.0 * dice(chance[:, -1], foreground)
    both = DirectAffinityLoss(offsets, foreground=True, **options)(logits, label)
    assert both.item() == pytest.approx(expected + of_it, rel=1e-6)


def test_the_rarer_target_counts_as_much_as_the_other_one() -> None:
    label = torch.tensor([[[[[1] * 9 + [2]]]]])                    # 8 pairs within, 1 cut
    loss = DirectAffinityLoss([(0, 0, -1)], dice_weight=0.0)
    surely_one, surely_cut = (loss(torch.full((1, 1, 1, 1, 10), value), label).item() for value in (50.0, -50.0))
    assert surely_one == pytest.approx(50 * 8 / 9)                 # the cut pair weighs 8
    assert surely_cut == pytest.approx(50 * 8 / 9)


@EITHER
def test_gradient_equals_finite_differences(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    loss, label = DirectAffinityLoss(offsets, foreground=True), numbers(size, batch=1)
    logits = maps(len(offsets) + 1, size, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: loss(one, label).double(), logits, atol=1e-4, eps=1e-5)


@EITHER
def test_the_truth_has_no_loss(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    label = numbers(size, batch=1)
    background = "same" if len(size) == 2 else "different"
    target = torch.as_tensor(oracle.label_affinity_by_loops(label[0, 0].numpy(), offsets, background)).float()
    logits = torch.cat([target, (label[0] > 0).float()])[None] * 80 - 40
    assert DirectAffinityLoss(offsets, foreground=True)(logits, label).item() == pytest.approx(0, abs=1e-6)
    assert DirectAffinityLoss(offsets, foreground=True)(-logits, label).item() > 1


@EITHER
def test_ignored_voxels_do_not_count(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    loss, label = DirectAffinityLoss(offsets, foreground=True), numbers(size)
    label[..., -3:] = -1
    logits = maps(len(offsets) + 1, size).requires_grad_()
    loss(logits, label).backward()
    assert logits.grad is not None
    assert not logits.grad[..., -3:].any()
    assert logits.grad[..., :-3].any()


def test_samples_without_a_label_are_left_out() -> None:
    loss, label, logits = DirectAffinityLoss(FLAT), numbers((9, 7)), maps(len(FLAT), (9, 7))
    label[1] = -1
    assert loss(logits, label) == loss(logits[:1], label[:1])
    assert loss(logits, torch.full_like(label, -1)).item() == 0


@pytest.mark.parametrize("content", [0, 5])
@EITHER
def test_one_instance_or_none_is_defined(size: tuple[int, ...], offsets: list[tuple[int, ...]], content: int) -> None:
    far = [*offsets, tuple(-50 for _ in size)]                     # an offset that no pair has
    logits = maps(len(far) + 1, size).requires_grad_()
    value = DirectAffinityLoss(far, foreground=True)(logits, torch.full((2, 1, *size), content))
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, -2].any()


def test_half_precision_is_widened_also_under_autocast() -> None:
    logits, label = maps(len(FLAT), (9, 7)).half(), numbers((9, 7))
    expected = DirectAffinityLoss(FLAT)(logits.float(), label)
    with torch.autocast("cpu", torch.bfloat16):
        assert DirectAffinityLoss(FLAT)(logits, label) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "other"}, r"`background` must be one of \('same', 'different'\), got 'other'"),
        ({"balance": "batch"}, "`balance` must be one of .*, got 'batch'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DirectAffinityLoss(FLAT, **options)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`logits` must have 5 channels, one per affinity, got \(2, 4, 9, 7\)"):
        DirectAffinityLoss(FLAT, foreground=True)(maps(4, (9, 7)), numbers((9, 7)))


# ---- with a teacher ------------------------------------------------------------------------------------------------


def distil(student: Tensor, teacher: Tensor, offsets: list[tuple[int, ...]], **options: Any) -> Tensor:
    loss = DirectAffinityDistillation(offsets, foreground=True, **options)
    return loss({"pred": student}, {"pred": teacher})["affinity"]


def test_a_teacher_that_is_sure_teaches_as_the_labels_do() -> None:
    """Cross entropy in 3-D, where means are over the same pairs."""
    size = (4, 7, 6)
    label, student = numbers(size, batch=1), maps(len(DEEP), size, batch=1)
    target = torch.as_tensor(oracle.label_affinity_by_loops(label[0, 0].numpy(), DEEP, "different"))
    expected = DirectAffinityLoss(DEEP, dice_weight=0.0)(student, label)
    loss = DirectAffinityDistillation(DEEP, dice_weight=0.0)
    found = loss({"pred": student}, {"pred": target[None].double() * 80 - 40})["affinity"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@EITHER
@pytest.mark.parametrize("options", [{"dice_weight": 0.0}, {"entropy_weight": 0.0}, {}])
def test_the_teacher_has_the_least_loss(
    size: tuple[int, ...], offsets: list[tuple[int, ...]], options: dict[str, float]
) -> None:
    teacher = maps(len(offsets) + 1, size)
    student = teacher.clone().requires_grad_()
    least = distil(student, teacher, offsets, **options)
    least.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student.grad), atol=1e-7, rtol=0)
    for step in (-0.3, 0.1):
        assert distil(teacher + step, teacher, offsets, **options) > least


def test_another_number_of_channels_of_either_network_is_refused() -> None:
    for student, teacher, name in ((4, 5, "student"), (5, 4, "teacher")):
        with pytest.raises(ValueError, match=rf"`{name}\['pred'\]` must have 5 channels, one per affinity"):
            distil(maps(student, (9, 7)), maps(teacher, (9, 7)), FLAT)
    with pytest.raises(ValueError, match="must share batch and spatial shape"):
        distil(maps(5, (9, 7)), maps(5, (9, 8)), FLAT)
