# SPDX-License-Identifier: Apache-2.0
"""NaN losses stop the run before they reach the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from monai.engines.utils import IterationEvents
from torch import Tensor

import toys
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.nan_guard import NanGuard, NonFiniteLossError
from medkd.losses.base import DistillationLoss
from medkd.losses.logits import SoftLabelLoss


class Breaking(DistillationLoss):
    """A term that is `value` times a number of the student."""

    terms = ("edge",)

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.preset_weights = {"edge": 1.0}

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        return {"edge": student["pred"].square().mean() * self.value}


def nan_loss(pred: Tensor, label: Tensor) -> Tensor:
    return pred.mean() * float("nan")


def stopped(*handlers: Any, image_key: str = "image", **options: Any) -> str:
    """The message with which training stops; student and optimizer are as they were."""
    network = toys.student()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    backward = toys.on(IterationEvents.BACKWARD_COMPLETED, lambda _: pytest.fail("backward ran"))
    engine = toys.make_trainer(network, [*handlers, backward, NanGuard(image_key)], **options)
    with pytest.raises(NonFiniteLossError, match="The weights were not changed; the last checkpoint is good") as error:
        engine.run()
    assert toys.same(before, dict(network.named_parameters()))
    assert not engine.optimizer.state
    return str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_term_is_named_and_the_others_are_not(value: float) -> None:
    handler = DistillationHandler(toys.Bright(), [SoftLabelLoss(), Breaking(value)])
    message = stopped(handler, data=toys.cases(2))
    assert f"The loss of step 1 must be finite, got {value}: kd/edge = {value}, on" in message


def test_the_cases_of_the_batch_are_named() -> None:
    message = stopped(DistillationHandler(toys.Bright(), Breaking(float("nan"))), data=toys.cases(2))
    assert "case_0.nii.gz" in message
    assert "case_1.nii.gz" in message


def test_a_case_of_which_the_batch_has_two_crops_is_named_once() -> None:
    assert stopped(data=toys.cases(1) * 2, loss_function=nan_loss).count("case_0.nii.gz") == 1


def test_cases_are_named_by_the_image_that_was_asked_for() -> None:
    data = [{"image": torch.ones(1, 4, 4), "label": torch.ones(1, 4, 4), "ct": case["image"]} for case in toys.cases(2)]
    assert "case_1.nii.gz" in stopped(data=data, loss_function=nan_loss, image_key="ct")


def test_a_broken_supervised_loss_is_named() -> None:
    message = stopped(DistillationHandler(toys.Bright(), SoftLabelLoss()), loss_function=nan_loss)
    assert ": supervised_loss = nan, on case_" in message


def test_finite_terms_with_a_sum_that_is_not_are_told_as_such() -> None:
    message = stopped(DistillationHandler(toys.Bright(), Breaking(3e38), {"edge": 1e30}))
    assert "got inf: the sum of the terms, on case_" in message


def test_plain_training_is_guarded_too() -> None:
    assert "got nan" in stopped(loss_function=nan_loss)


def test_images_without_metadata_are_said_to_have_no_names() -> None:
    data = [{key: torch.ones(1, 4, 4) for key in ("image", "label")} for _ in range(2)]
    assert "on cases without file names" in stopped(data=data, loss_function=nan_loss)


def test_a_finite_loss_passes() -> None:
    engine = toys.make_trainer(toys.student(), [NanGuard()], epochs=1)
    engine.run()
    assert engine.state.iteration == 2
