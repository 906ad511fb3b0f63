# SPDX-License-Identifier: Apache-2.0
"""A distillation that would silently be none is refused before its first step."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn

import toys
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.teacher import Teacher
from medkd.losses.base import trainable_parameters
from medkd.losses.logits import SoftLabelLoss

LACKING = r"`optimizer` must hold .* without 'HintLoss.projectors.0.weight'.*`medkd.losses.base.trainable_parameters"


def run(network: nn.Module, *handlers: Any, **options: Any) -> Any:
    engine = toys.make_trainer(network, handlers, epochs=1, **options)
    engine.run()
    return engine


# ---- the optimizer -------------------------------------------------------------------------------------------------


def test_learnable_heads_outside_the_optimizer_are_refused_before_the_first_step() -> None:
    network = toys.student()
    before = toys.state_of(network)
    handler = DistillationHandler(Teacher(toys.teacher), toys.hint_loss())
    with pytest.raises(ValueError, match=LACKING):
        run(network, handler, parameters=list(network.parameters()))
    assert toys.same(before, toys.state_of(network))


def test_heads_of_another_object_of_the_same_loss_are_no_heads() -> None:
    network = toys.student()
    handler = DistillationHandler(Teacher(toys.teacher), toys.hint_loss())
    with pytest.raises(ValueError, match=LACKING):
        run(network, handler, parameters=list(trainable_parameters(network, toys.hint_loss())))


def test_heads_count_in_any_group_and_inside_an_optimizer_that_wraps_another() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.zero_grad, self.step = optimizer.zero_grad, optimizer.step

    network, loss = toys.student(), toys.hint_loss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    optimizer.add_param_group({"params": list(loss.parameters()), "lr": 0.1})
    wrapped: Any = Wrapper(optimizer)
    run(network, DistillationHandler(Teacher(toys.teacher), loss), optimizer=wrapped)
    optimizer.param_groups.pop()
    with pytest.raises(ValueError, match=LACKING):
        run(network, DistillationHandler(Teacher(toys.teacher), loss), optimizer=wrapped)


def test_heads_that_are_frozen_or_not_in_use_need_no_optimizer() -> None:
    network, loss = toys.student(), toys.hint_loss()
    only = list(network.parameters())
    run(network, DistillationHandler(Teacher(toys.teacher), [SoftLabelLoss(), loss], {"logits": 1.0}), parameters=only)
    loss.requires_grad_(False)
    run(network, DistillationHandler(Teacher(toys.teacher), loss), parameters=only)


def test_weights_of_the_student_outside_the_optimizer_are_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    network = toys.student()
    network.encoder.conv.requires_grad_(False)                     # on purpose, so nothing to tell
    head = list(network.head.parameters())
    run(network, DistillationHandler(Teacher(toys.teacher), SoftLabelLoss()), parameters=head)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == [
        "2 of 4 trainable parameter tensors of the student are not in the optimizer and stay as they are: "
        "'encoder.norm.weight', 'encoder.norm.bias'."
    ]


def test_the_losses_that_a_checkpoint_must_hold_are_on_the_state() -> None:
    hint, memory = toys.hint_loss(), toys.memory_loss()
    losses = [SoftLabelLoss(), hint, memory]
    handler = DistillationHandler(Teacher(toys.teacher), losses, {"logits": 1.0, "features": 1.0})
    assert run(toys.student(), handler).state.distill_modules == [hint]
    weights = {"features": 1.0, "node": 1.0}
    assert run(toys.student(), DistillationHandler(Teacher(toys.teacher), losses, weights)).state.distill_modules == [
        hint, memory,
    ]
    assert run(toys.student(), DistillationHandler(Teacher(toys.teacher), losses, {})).state.distill_modules == []


# ---- teacher and student are two -----------------------------------------------------------------------------------


def shared_encoder(expert: toys.ToyNetwork, network: toys.ToyNetwork) -> None:
    network.encoder = expert.encoder


def shared_memory(expert: toys.ToyNetwork, network: toys.ToyNetwork) -> None:
    network.head.weight = nn.Parameter(expert.head.weight.data)


def shared_buffer(expert: toys.ToyNetwork, network: toys.ToyNetwork) -> None:
    network.encoder.norm.running_mean = expert.encoder.norm.running_mean


def shared_dropout(expert: toys.ToyNetwork, network: toys.ToyNetwork) -> None:
    network.dropout = expert.dropout


@pytest.mark.parametrize(
    ("share", "named"),
    [
        (shared_encoder, "'encoder.conv.weight', 'encoder.conv.bias'"), (shared_memory, "'head.weight'"),
        (shared_buffer, "'encoder.norm.running_mean'"), (shared_dropout, "'dropout'"),
    ],
)
@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel])
def test_a_teacher_that_shares_a_part_with_the_student_is_refused_and_not_frozen(
    share: Any, named: str, wrap: Any
) -> None:
    torch.manual_seed(2)
    expert, network = (toys.ToyNetwork(toys.STUDENT_WIDTH) for _ in range(2))
    share(expert, network)
    student = network if wrap is nn.Identity else wrap(network)
    with pytest.raises(ValueError, match=f"must share nothing with the student, got both with {named}") as error:
        run(student, DistillationHandler(expert, SoftLabelLoss()))
    assert "copy.deepcopy" in str(error.value)
    assert all(parameter.requires_grad for parameter in network.parameters())
    run(network, DistillationHandler(copy.deepcopy(expert), SoftLabelLoss()))


def test_a_teacher_that_is_the_student_is_refused_whoever_builds_it() -> None:
    network = toys.student()
    for expert in (network, Teacher(lambda: network)):
        with pytest.raises(ValueError, match="`teacher` must be another object than the student"):
            run(network, DistillationHandler(expert, SoftLabelLoss()))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_weights_are_not_loaded_into_a_part_that_the_student_has(tmp_path: Any) -> None:
    torch.save(toys.student(9).state_dict(), tmp_path / "model.pt")
    network = toys.student()
    before = toys.state_of(network)
    with pytest.raises(ValueError, match="`teacher` must be another object"):
        run(network, DistillationHandler(Teacher(network, tmp_path / "model.pt"), SoftLabelLoss()))
    assert toys.same(before, toys.state_of(network))


def test_a_head_of_the_loss_that_is_a_part_of_the_teacher_is_refused() -> None:
    expert, loss = toys.teacher(), toys.hint_loss()
    expert.extra = loss.projectors[0]
    with pytest.raises(ValueError, match="share nothing with the loss HintLoss, got both with 'projectors.0.weight'"):
        run(toys.student(), DistillationHandler(expert, loss))
    assert all(parameter.requires_grad for parameter in loss.parameters())


def test_modules_without_weights_that_behave_the_same_in_training_may_be_shared() -> None:
    expert, network = toys.teacher(), toys.student()
    network.encoder.act = expert.encoder.act
    assert run(network, DistillationHandler(expert, SoftLabelLoss())).state.distillation["mode"] == "distilled"


# ---- one handler, one trainer, one run -----------------------------------------------------------------------------


def test_a_second_handler_on_a_trainer_is_refused_when_it_is_attached() -> None:
    first, second = (DistillationHandler(Teacher(toys.teacher), SoftLabelLoss()) for _ in range(2))
    engine = toys.make_trainer(toys.student(), [first])
    for handler in (second, first):
        with pytest.raises(ValueError, match="must have one DistillationHandler, got a second; put all losses into"):
            handler.attach(engine)
    engine.run()


def test_a_handler_serves_one_trainer_after_another() -> None:
    handler = DistillationHandler(Teacher(toys.teacher), SoftLabelLoss())
    for _ in range(2):
        assert "kd/logits" in run(toys.student(), handler).state.output[0]


def test_a_trainer_whose_handler_another_one_has_started_does_not_go_on_without_it() -> None:
    handler = DistillationHandler(Teacher(toys.teacher), SoftLabelLoss())
    inner = toys.make_trainer(toys.student(), [handler], epochs=1)
    between = toys.on(Events.ITERATION_COMPLETED, lambda _: inner.run())
    with pytest.raises(RuntimeError, match="must belong to one run at a time, got a trainer whose handler another one"):
        run(toys.student(), handler, between)
