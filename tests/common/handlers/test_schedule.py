# SPDX-License-Identifier: Apache-2.0
"""Weights that change during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events

import toys
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.schedule import WeightSchedule
from medkd.losses.logits import SoftLabelLoss


def factors_of(
    *schedules: WeightSchedule, epochs: int = 5, extra: tuple[Any, ...] = (), losses: Any = None
) -> list[dict[str, float]]:
    """The factors of each step, at the moment when the terms are added; two steps per epoch."""
    losses = losses or [SoftLabelLoss(), toys.hint_loss()]
    seen: list[dict[str, float]] = []
    note = toys.on(DistillationEvents.TERMS_COMPLETED, lambda engine: seen.append(dict(engine.state.distill_factors)))
    weights = {"logits": 1.0, "features": 1.0}
    handler = DistillationHandler(toys.teacher(), losses, weights)
    toys.make_trainer(toys.student(), [handler, *schedules, note, *extra], epochs=epochs).run()
    return seen


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.5, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (0.25, [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0.01, [1.0] * 10),
        (0.0, [1.0] * 10),
    ],
)
def test_the_ramp_starts_above_zero_and_ends_at_one(fraction: float, expected: list[float]) -> None:
    schedule = WeightSchedule(fraction)
    assert [schedule.factor(step, steps=10) for step in range(1, 11)] == pytest.approx(expected)


def test_a_run_has_the_factors_of_its_steps() -> None:
    assert [seen["features"] for seen in factors_of(WeightSchedule(0.5))] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    )


def test_only_named_terms_are_ramped_and_two_schedules_may_share_a_run() -> None:
    seen = factors_of(WeightSchedule(1.0, ["logits"]), WeightSchedule(0.5, ["features"]), epochs=2)
    assert seen == [
        {"logits": 0.25, "features": 0.5}, {"logits": 0.5, "features": 1.0},
        {"logits": 0.75, "features": 1.0}, {"logits": 1.0, "features": 1.0},
    ]


def test_a_resumed_run_goes_on_with_the_same_factors(tmp_path: Path) -> None:
    whole = factors_of(WeightSchedule(1.0))

    def stop(engine: Any) -> None:
        raise KeyboardInterrupt

    losses = [SoftLabelLoss(), toys.hint_loss()]
    objects = {"network": toys.student(), "distill_loss": losses}
    extra = CheckpointHandler(tmp_path, objects), toys.on(Events.EPOCH_STARTED(once=3), stop)
    with pytest.raises(KeyboardInterrupt):
        factors_of(WeightSchedule(1.0), extra=extra, losses=losses)
    extra = (CheckpointHandler(tmp_path, objects, resume=True),)
    assert factors_of(WeightSchedule(1.0), extra=extra, losses=losses) == whole[4:]


def test_the_ramp_takes_a_twentieth_of_the_steps_unless_told_otherwise() -> None:
    assert [WeightSchedule().factor(step, steps=100) for step in (1, 5, 6)] == pytest.approx([0.2, 1.0, 1.0])


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"`fraction` must be between 0 and 1 of all steps, got {fraction}"):
        WeightSchedule(fraction)


def test_an_unknown_term_is_refused_at_start_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="`terms` must be terms of the loss, got 'logit'; did you mean 'logits'"):
        factors_of(WeightSchedule(0.5, ["logit"]))


def test_a_schedule_without_a_distillation_handler_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="`WeightSchedule` must stand behind a `DistillationHandler` in the list"):
        toys.make_trainer(toys.student(), [WeightSchedule(0.5)]).run()
