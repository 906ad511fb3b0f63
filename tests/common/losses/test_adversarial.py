# SPDX-License-Identifier: Apache-2.0
"""The adversarial term of the student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.base import trainable_parameters
from medkd.losses.discriminator import Discriminator
from medkd.ops.ignored import IGNORED, UNLABELED

Maps = dict[str, Tensor]


def a_loss(rank: int = 2, preset: Any = "default", **options: Any) -> AdversarialLoss:
    return AdversarialLoss(Discriminator(2, rank, width=4, layers=2), preset, **options)


def centered(maps: Tensor) -> Tensor:
    return maps - maps.mean(1, keepdim=True)


def shown_of(loss: AdversarialLoss, student: Maps, teacher: Maps, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    loss(student, teacher, label)
    shown = loss.take_shown()
    assert shown is not None
    return shown


def predictions(rank: int = 2) -> tuple[Maps, Maps]:
    size = (16, 20) if rank == 2 else (16, 16, 20)
    return {"pred": torch.randn(2, 2, *size, requires_grad=True)}, {"pred": torch.randn(2, 2, *size)}


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_term_is_the_negative_score_of_the_student(rank: int, preset: str) -> None:
    loss, (student, teacher) = a_loss(rank, preset), predictions(rank)
    value = loss(student, teacher)["adversarial"]
    seen = student["pred"] if preset == "paper" else centered(student["pred"])
    torch.testing.assert_close(value, -loss.discriminator(seen).mean())
    value.backward()
    assert student["pred"].grad is not None
    assert student["pred"].grad.any()
    assert all(one.grad is None for one in loss.discriminator.parameters())


def test_the_discriminator_is_no_part_of_the_loss_and_does_not_change() -> None:
    loss, (student, teacher) = a_loss(), predictions()
    assert len(list(trainable_parameters(nn.Conv2d(1, 1, 1), loss))) == 2
    assert all(one.requires_grad for one in loss.discriminator.parameters())   # for an optimizer that is made later
    before = {key: value.clone() for key, value in loss.discriminator.state_dict().items()}
    loss.to("cpu").train()
    loss(student, teacher)["adversarial"].backward()
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in loss.discriminator.state_dict().items())
    assert not loss.discriminator.training


def test_what_is_shown_is_detached_and_given_once() -> None:
    loss, (student, teacher) = a_loss(preset="paper"), predictions()
    assert loss.take_shown() is None
    shown = shown_of(loss, student, teacher)
    assert torch.equal(shown[0], teacher["pred"])
    assert torch.equal(shown[1], student["pred"])
    assert not shown[1].requires_grad
    assert loss.take_shown() is None


def test_a_discriminator_that_nobody_trains_is_an_error() -> None:
    loss, (student, teacher) = a_loss(), predictions()
    loss(student, teacher)
    with pytest.raises(RuntimeError, match="`AdversarialLoss` must have a discriminator that is trained in each step"):
        loss(student, teacher)
    loss = a_loss().eval()                                         # where no one trains
    assert loss(student, teacher) == loss(student, teacher)


def test_ignored_voxels_are_zero_for_both_and_a_label_is_not_needed() -> None:
    loss, (student, teacher) = a_loss(), predictions()
    label = torch.zeros(2, 1, 16, 20, dtype=torch.int64)
    label[1] = UNLABELED
    plain = loss(student, teacher)["adversarial"]
    loss.take_shown()
    assert loss(student, teacher, label)["adversarial"] == plain
    loss.take_shown()
    label[0, ..., 10:] = IGNORED
    value = loss(student, teacher, label)["adversarial"]
    (slope,) = torch.autograd.grad(value, student["pred"])
    assert not slope[0, ..., 10:].any()
    assert slope[1, ..., 10:].any()
    shown = loss.take_shown()
    assert shown is not None
    for one in shown:
        assert not one[0, ..., 10:].any()
        assert one[1, ..., 10:].any()


def test_probabilities_of_a_teacher_become_logits() -> None:
    student, teacher = predictions()
    discriminator = Discriminator(2, 2, width=4, layers=2)
    loss = AdversarialLoss(discriminator, teacher_output="probabilities")
    loss(student, {"pred": teacher["pred"].softmax(1)})
    shown = loss.take_shown()
    assert shown is not None
    torch.testing.assert_close(shown[0].softmax(1), teacher["pred"].softmax(1))
    torch.testing.assert_close(shown[0], centered(teacher["pred"]))
    with pytest.raises(ValueError, match=r"`teacher\['pred'\]` must hold logits, got values within \[0, 1\]"):
        AdversarialLoss(discriminator)(student, {"pred": teacher["pred"].softmax(1)})


def test_logits_and_the_logarithm_of_their_softmax_show_the_same() -> None:
    """So that a teacher that runs and one whose predictions were written down are the same to the discriminator."""
    (student, teacher), label = predictions(), torch.zeros(2, 1, 16, 20, dtype=torch.int64)
    label[0, ..., 10:] = IGNORED
    logs = [{"pred": maps["pred"].log_softmax(1)} for maps in (student, teacher)]
    default, paper = a_loss(), a_loss(preset="paper")
    pairs = shown_of(default, *logs, label), shown_of(default, student, teacher, label)
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected)
        assert not found[0, ..., 10:].any()
    assert not torch.allclose(shown_of(paper, *logs)[0], shown_of(paper, student, teacher)[0])


def test_logits_of_regions_and_of_one_channel_are_shown_as_they_are() -> None:
    student, teacher = predictions()
    assert torch.equal(shown_of(a_loss(activation="sigmoid"), student, teacher)[0], teacher["pred"])
    loss = AdversarialLoss(Discriminator(1, 2, width=4, layers=2))
    single = [{"pred": maps["pred"][:, :1]} for maps in (student, teacher)]
    assert torch.equal(shown_of(loss, *single)[0], teacher["pred"][:, :1])


def test_the_presets_are_what_the_docs_say() -> None:
    assert (a_loss().form, a_loss(preset="paper").form) == ("hinge", "wgan_gp")
    assert (a_loss(form="wgan_gp").form, a_loss(preset="paper", form="hinge").form) == ("wgan_gp", "hinge")


def test_predictions_in_double_precision_are_cast_for_the_discriminator() -> None:
    loss, (student, teacher) = a_loss(), predictions()
    double = {"pred": student["pred"].detach().double().requires_grad_()}
    value = loss(double, {"pred": teacher["pred"].double()})["adversarial"]
    value.backward()
    assert double["pred"].grad is not None
    assert double["pred"].grad.any()
    shown = loss.take_shown()
    assert shown is not None
    assert {one.dtype for one in shown} == {torch.float32}
    torch.testing.assert_close(value, loss(student, teacher)["adversarial"])


def test_half_precision_is_computed_in_float32() -> None:
    loss, (student, teacher) = a_loss(), predictions()
    half = {"pred": student["pred"].detach().half().requires_grad_()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, {"pred": teacher["pred"].half()})["adversarial"]
    assert value.dtype == torch.float32
    value.backward()
    assert half["pred"].grad is not None
    assert half["pred"].grad.isfinite().all()


def test_a_term_without_weight_runs_no_discriminator() -> None:
    loss, (student, teacher) = a_loss(), predictions()
    loss.activate([])
    assert loss(student, teacher) == {}
    assert loss.take_shown() is None


def test_wrong_input_is_refused() -> None:
    student, _ = predictions()
    with pytest.raises(ValueError, match="`form` must be one of .* got 'gan'"):
        a_loss(form="gan")
    with pytest.raises(ValueError, match=r"`preset` must be one of \['default', 'paper'\], got 'hinge'"):
        a_loss(preset="hinge")
    with pytest.raises(ValueError, match="must have the teacher's 3 classes, got 2"):
        a_loss()(student, {"pred": torch.randn(2, 3, 16, 20)})
    with pytest.raises(ValueError, match="must share batch and spatial shape"):
        a_loss()(student, {"pred": torch.randn(2, 2, 16, 16)})
