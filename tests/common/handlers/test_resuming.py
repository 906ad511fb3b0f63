# SPDX-License-Identifier: Apache-2.0
"""Going on with other settings: the new ones win, and what was learned stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.handlers.lr_schedule_handler import LrScheduleHandler
from torch import nn

import toys
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.resuming import as_resume
from medkd.weights import load_tensors


class Training:
    """A run with a cosine over its epochs, which notes the rate of each step."""

    def __init__(self, folder: Path, epochs: int, resume: Any = False, rate: float = 0.1, **options: Any) -> None:
        self.network = options.pop("network", None) or toys.student()
        make = options.pop("optimizer", lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate))
        self.optimizer = make(list(self.network.parameters()), rate)
        make = options.pop("schedule", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs))
        self.schedule = make(self.optimizer)
        objects = {"network": self.network, "optimizer": self.optimizer, "lr_scheduler": self.schedule}
        self.rates: list[float] = []
        handlers = [
            LrScheduleHandler(self.schedule, print_lr=False, epoch_level=options.pop("epoch_level", True)),
            toys.on(Events.ITERATION_STARTED, lambda _: self.rates.append(self.optimizer.param_groups[0]["lr"])),
            CheckpointHandler(folder, {**objects, **options.pop("objects", {})}, resume=resume),
        ]
        self.trainer = toys.make_trainer(self.network, handlers, optimizer=self.optimizer, epochs=epochs, **options)

    def run(self) -> Training:
        self.trainer.run()
        return self


def cosine(rate: float, epochs: int, first: int) -> list[float]:
    """Rates of two steps per epoch, from an epoch on."""
    return [rate * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(first, epochs) for _ in range(2)]


@pytest.mark.parametrize(("epochs", "rate"), [(6, 0.1), (4, 0.02), (3, 0.1)])
def test_a_cosine_goes_down_to_the_new_end_at_the_new_rate(tmp_path: Path, epochs: int, rate: float) -> None:
    Training(tmp_path, epochs=3).run()
    resumed = Training(tmp_path, epochs, "changed", rate).run()
    assert resumed.rates == pytest.approx(cosine(rate, epochs, first=3))
    assert max(resumed.rates, default=0.0) < rate


@pytest.mark.parametrize(("epochs", "rate", "message"), [
    (4, 0.1, "max_epochs: 3, now 4\n  lr_scheduler#T_max: 3, now 4\n"), (3, 0.02, "lr: 0.1, now 0.02\n"),
])
def test_more_epochs_or_another_rate_are_refused_unless_asked_for(
    tmp_path: Path, epochs: int, rate: float, message: str
) -> None:
    Training(tmp_path, epochs=3).run()
    with pytest.raises(ValueError, match=f"(?s)got others:.*{message}.*`--resume changed`"):
        Training(tmp_path, epochs, True, rate).run()


def test_without_a_change_it_goes_on_as_exactly_as_ever(tmp_path: Path) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    ends = []
    for number, resume in enumerate((None, True, "changed")):
        folder = tmp_path / str(number)
        if resume:
            run = toys.Run(folder, epochs=5, extra=[toys.on(Events.EPOCH_STARTED(once=3), stop)])
            with pytest.raises(KeyboardInterrupt):
                run.trainer.run()
        run = toys.Run(folder, epochs=5, resume=resume or False)
        run.trainer.run()
        ends.append(run.result())
    assert toys.same(ends[0], ends[1])
    assert toys.same(ends[0], ends[2])


def test_moments_stay_and_hyper_parameters_are_the_new_ones(tmp_path: Path) -> None:
    def make(decay: float, beta: float) -> Any:
        return lambda parameters, rate: torch.optim.AdamW(parameters, rate, weight_decay=decay, betas=(beta, 0.99))

    first = Training(tmp_path, 2, optimizer=make(0.01, 0.9)).run()
    second = Training(tmp_path, 2, "changed", optimizer=make(0.1, 0.8)).run()   # nothing is left to do
    group = second.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.99))
    assert toys.same(first.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"])
    assert toys.same(first.network.state_dict(), second.network.state_dict())


@pytest.mark.parametrize("make", [
    lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9),
    lambda parameters, rate: torch.optim.AdamW(parameters, rate, amsgrad=True),
    lambda parameters, rate: torch.optim.AdamW([{"params": [one]} for one in parameters], rate),
])
def test_moments_that_do_not_fit_start_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any) -> None:
    Training(tmp_path, 2).run()
    run = Training(tmp_path, 3, "changed", optimizer=make).run()
    assert "The moments of optimizer start anew" in caplog.text
    assert run.trainer.state.iteration == 6


def test_a_head_that_is_another_one_starts_anew_with_its_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Training(tmp_path, 2, objects={"distill_loss": nn.Conv2d(2, 3, 1)}).run()
    head = nn.Conv2d(2, 4, 1)
    before = toys.state_of(head)
    Training(tmp_path, 3, "changed", objects={"distill_loss": head, "bank": nn.BatchNorm2d(2)}).run()
    assert toys.same(toys.state_of(head), before)
    assert "distill_loss starts anew" in caplog.text
    assert "bank starts anew" in caplog.text


def test_another_student_is_refused_even_then(tmp_path: Path) -> None:
    Training(tmp_path, 2).run()
    with pytest.raises(ValueError, match="epoch_00002.pt does not fit 'network' of this run"):
        Training(tmp_path, 3, "changed", network=toys.teacher()).run()


def test_more_data_change_the_number_of_steps_that_are_done(tmp_path: Path) -> None:
    def linear(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    Training(tmp_path, 2, data=toys.cases(4), schedule=linear, epoch_level=False).run()
    run = Training(tmp_path, 3, "changed", data=toys.cases(6), schedule=linear, epoch_level=False).run()
    assert run.trainer.state.iteration == 9
    assert run.rates == pytest.approx([0.1 / 7, 0.1 / 8, 0.1 / 9])


def test_a_schedule_that_depends_on_the_validation_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, 2).run()
    with pytest.raises(ValueError, match="`resume` must not be 'changed' with 'lr_scheduler', a ReduceLROnPlateau"):
        Training(tmp_path, 3, "changed", schedule=torch.optim.lr_scheduler.ReduceLROnPlateau).run()


def test_the_best_student_is_chosen_anew_on_other_validation_cases(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toys.Run(tmp_path, epochs=2).trainer.run()
    student = load_tensors(tmp_path / "model.pt")
    run = toys.Run(tmp_path, epochs=3, resume="changed")
    run.evaluator.data_loader.dataset.data = toys.cases(1)
    run.evaluator.state.epoch_length = 1
    run.trainer.run()
    assert run.evaluator.state.best_metric_epoch == 3
    assert "the best student is chosen anew" in caplog.text
    assert toys.same(load_tensors(tmp_path / "before_1/model.pt"), student)   # its Dice is of other cases


@pytest.mark.parametrize(("given", "meant"), [
    ("true", True), ("True", True), (True, True), ("false", False), (False, False), ("changed", "changed"),
])
def test_the_option_may_be_text_as_a_command_line_gives_it(given: Any, meant: Any) -> None:
    assert as_resume(given) is meant


def test_another_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`resume` must be one of false, true and changed, got 'yes'"):
        CheckpointHandler(tmp_path, {"network": toys.student()}, resume="yes")
