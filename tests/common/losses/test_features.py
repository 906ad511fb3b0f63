# SPDX-License-Identifier: Apache-2.0
"""Hints."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.losses.features import HintLoss
from medkd.ops.voxel_weight import voxel_weight


def value_of(loss: HintLoss, student: Tensor, teacher: Tensor, pred: Tensor | None = None) -> Tensor:
    pred = torch.zeros(student.shape[0], 2, *teacher.shape[2:]) if pred is None else pred
    return loss({"e": student, "pred": pred}, {"e": teacher, "pred": pred})["features"]


def a_loss(channels: tuple[int, int] = (3, 4), rank: int = 2, **options: object) -> HintLoss:
    return HintLoss(["e"], [channels], spatial_dims=rank, **options)   # type: ignore[arg-type]


def test_the_value_by_hand_of_one_channel_each() -> None:
    loss = a_loss((1, 2))
    with torch.no_grad():
        loss.projectors[0].weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    student, teacher = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[1.0, 5.0]], [[0.0, -3.0]]]])
    # projected (2, 6) and (-1, -3); differences (1, 1) and (-1, 0)
    assert value_of(loss, student, teacher).item() == pytest.approx(3 / 4)


def test_foreground_weighting_by_hand() -> None:
    loss = a_loss((1, 1), weighting="foreground")
    with torch.no_grad():
        loss.projectors[0].weight.fill_(1.0)
    student, teacher = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    pred = torch.tensor([0.2, 0.2, 0.7, 0.9]).logit().view(1, 1, 1, 4)
    # mean foreground of the two blocks 0.2 and 0.8, plus the floor of 0.02, over their mean 0.52
    expected = (0.22 * 1 + 0.82 * 4) / 0.52 / 2
    assert value_of(loss, student, teacher, pred).item() == pytest.approx(expected, rel=1e-5)
    other = loss({"e": student, "pred": -pred}, {"e": teacher, "pred": pred})["features"]
    assert other.item() == pytest.approx(expected, rel=1e-5)       # the student's foreground does not count


def test_layers_are_averaged_and_may_have_other_names_in_the_teacher() -> None:
    loss = HintLoss(["a", ["b", "c"]], [[1, 1], [2, 3]], spatial_dims=3)
    maps = {"pred": torch.zeros(1, 2, 4, 4, 4)}
    student = maps | {"a": torch.rand(1, 1, 4, 4, 4), "b": torch.rand(1, 2, 2, 2, 2)}
    teacher = maps | {"a": torch.rand(1, 1, 4, 4, 4), "c": torch.rand(1, 3, 2, 2, 2)}
    single = []
    for projector, (s, t) in zip(loss.projectors, loss.tap_pairs, strict=True):
        single.append((projector(student[s]) - teacher[t]).square().mean())
    torch.testing.assert_close(loss(student, teacher)["features"], torch.stack(single).mean())


@pytest.mark.parametrize(("mine", "other"), [((5, 7), (3, 4)), ((4, 3), (8, 6)), ((3, 5, 4), (3, 5, 4))])
@pytest.mark.parametrize("weighting", ["uniform", "foreground"])
def test_other_strides_and_channels_meet_on_the_coarser_grid(
    mine: tuple[int, ...], other: tuple[int, ...], weighting: str
) -> None:
    loss = a_loss(rank=len(mine), weighting=weighting)
    student = torch.randn(2, 3, *mine, requires_grad=True)
    pred = torch.randn(2, 3, *(2 * max(pair) for pair in zip(mine, other, strict=True)))
    teacher = torch.randn(2, 4, *other)
    value = value_of(loss, student, teacher, pred)
    value.backward()
    pool = F.adaptive_avg_pool3d if len(mine) == 3 else F.adaptive_avg_pool2d
    coarse = tuple(min(pair) for pair in zip(mine, other, strict=True))
    squares = (loss.projectors[0](pool(student, coarse)) - pool(teacher, coarse)).square().mean(1, keepdim=True)
    torch.testing.assert_close(value, (pool(voxel_weight(pred, weighting), coarse) * squares).mean())   # type: ignore[arg-type]
    assert student.grad is not None
    assert student.grad.any()


def test_gradient_reaches_student_and_projector_and_never_the_teacher() -> None:
    loss = a_loss()
    student, teacher = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(1, 4, 4, 4, requires_grad=True)
    pred = torch.randn(1, 2, 4, 4, requires_grad=True)
    value_of(loss, student, teacher, pred).backward()
    assert student.grad is not None
    assert loss.projectors[0].weight.grad is not None
    assert loss.projectors[0].weight.grad.any()
    assert teacher.grad is None
    assert pred.grad is None


def test_the_loss_passes_gradcheck() -> None:
    loss = a_loss(rank=3).double()
    teacher, pred = torch.randn(1, 4, 2, 3, 2).double(), torch.randn(1, 2, 2, 3, 2).double()
    student = torch.randn(1, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: value_of(loss, x, teacher, pred), student)


def test_a_perfect_projection_has_no_loss() -> None:
    loss, student = a_loss(), torch.randn(2, 3, 5, 7)
    teacher = loss.projectors[0](student)
    assert value_of(loss, student, teacher).item() == 0


def test_building_the_loss_leaves_the_global_generators_untouched() -> None:
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    a_loss(rank=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_the_seed_decides_the_first_values_of_the_projector() -> None:
    first, same, other = a_loss(seed=1), a_loss(seed=1), a_loss(seed=2)
    assert torch.equal(first.projectors[0].weight, same.projectors[0].weight)
    assert not torch.equal(first.projectors[0].weight, other.projectors[0].weight)
    assert a_loss((400, 400)).projectors[0].weight.std().item() == pytest.approx(400**-0.5, rel=0.02)


def test_a_deep_copy_and_a_state_dict_round_trip_give_the_same_value() -> None:
    loss = a_loss(seed=1)
    student, teacher = torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4)
    twin, loaded = copy.deepcopy(loss), a_loss(seed=2)
    loaded.load_state_dict(loss.state_dict())
    expected = value_of(loss, student, teacher)
    for again in (twin, loaded):
        assert torch.equal(value_of(again, student, teacher), expected)
    assert twin.projectors[0].weight is not loss.projectors[0].weight
    assert [p.requires_grad for p in loss.parameters()] == [True]


def test_half_precision_under_autocast_equals_float32_of_the_rounded_values() -> None:
    loss = a_loss()
    student, teacher = torch.randn(1, 3, 4, 4).bfloat16(), torch.randn(1, 4, 4, 4).bfloat16()
    expected = value_of(loss, student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value_of(loss, student, teacher), expected)
    assert expected.dtype == torch.float32


def test_large_and_zero_features_stay_finite() -> None:
    for features in (torch.zeros(1, 3, 4, 4), 1e4 * torch.randn(1, 3, 4, 4)):
        student = features.requires_grad_()
        value = value_of(a_loss(weighting="foreground"), student, torch.zeros(1, 4, 4, 4))
        value.backward()
        assert value.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_a_term_of_weight_zero_is_not_computed() -> None:
    loss = a_loss()
    loss.activate([])
    maps = torch.zeros(1, 3, 4, 4)
    assert loss({"pred": maps, "e": maps}, {"pred": maps, "e": maps}) == {}


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`channels` of taps \('e', 'e'\) must be \[5, 4\], got \[3, 4\]"):
        value_of(a_loss(), torch.zeros(1, 5, 4, 4), torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"`channels` must give \[student, teacher\] for each of 1 taps"):
        HintLoss(["e"], [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"`channels` must give \[student, teacher\] for each of 1 taps"):
        HintLoss(["e"], [[1]])


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 or 3, got 1"):
        a_loss(rank=1)
    with pytest.raises(ValueError, match=r"`weighting` must be one of \('uniform', 'foreground'\), got 'none'"):
        a_loss(weighting="none")
    with pytest.raises(ValueError, match="`taps` must list at least one layer path"):
        HintLoss([], [])
    with pytest.raises(ValueError, match=r"`student\['e'\]` must be a floating map"):
        value_of(a_loss(), torch.zeros(1, 3, 4), torch.zeros(1, 4, 4), torch.zeros(1, 2, 4, 4))
