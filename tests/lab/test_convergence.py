# SPDX-License-Identifier: Apache-2.0
"""A row says whether half its schedule would have done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.convergence import converged, half_arms, half_schedule, limit_of, steps_of
from lab.plan import make_run, train_all
from lab.recipe import Arm, Row
from lab.training import Study
from tests.lab.conftest import ARMS


@pytest.mark.parametrize("epochs", [2, 3, 11, 25, 100, 135])
@pytest.mark.parametrize("interval", [1, 2, 5, 9, 35, 135])
def test_half_a_schedule_ends_with_a_validation(epochs: int, interval: int) -> None:
    half = half_schedule(epochs, interval)
    assert half is not None
    assert half["epochs"] % half["val_interval"] == 0
    assert 0.45 * epochs - 1 < half["epochs"] <= epochs / 2


def run_half(make_study: Callable[..., Study], options: dict[str, Any], half: dict[str, Any], **recipe: Any) -> Any:
    """`converged` of a study whose full and half trainings find values."""
    arms = {"teacher": ARMS["teacher"], "student_alone": Arm(("baseline",), options, seeds=1)}
    study = make_study(row=Row("a", epochs={"student": 8}, val_interval={"student": 2}, arms=arms), **recipe)
    more = half_arms(study, arms)
    more["student_alone_at_half"].options.update(half)             # type: ignore[attr-defined]
    return converged(study, train_all(study, {**arms, **more}))


@pytest.mark.parametrize(("half", "reached"), [(0.795, True), (0.78, False), (0.9, True)])
def test_a_student_has_converged_when_the_second_half_brought_little(
    make_study: Callable[..., Study], half: float, reached: bool
) -> None:
    told = run_half(make_study, {"value": 0.8}, {"value": half})

    assert told == {
        "steps": 8, "validation": 0.8, "steps_at_half": 4, "validation_at_half": half, "reached": reached,
        "teacher": {"steps": 20, "validation": 0.5, "steps_at_half": 10, "validation_at_half": 0.5, "reached": True},
    }


def test_of_an_error_a_fall_counts_and_of_voi_more_is_allowed(make_study: Callable[..., Study]) -> None:
    told = run_half(make_study, {"value": 0.8}, {"value": 0.84}, higher_is_better=False)
    assert told["reached"] is False
    assert (limit_of("val_voi"), limit_of("val_mean_dice")) == (0.05, 0.01)


def test_one_epoch_cannot_be_halved_and_says_so(make_study: Callable[..., Study]) -> None:
    arms = {"teacher": Arm(("teacher",), {"epochs": 1}, seeds=1), "student_alone": Arm(("baseline",), {"epochs": 1})}
    study = make_study(row=Row("a", arms=arms, seeds=(0,)))
    assert half_arms(study, arms) == {}
    told = converged(study, train_all(study, arms))
    assert (told["reached"], told["teacher"]["reached"]) == (None, None)
    assert "one epoch" in told["reason"]


def test_steps_are_counted_by_the_cases_unless_an_epoch_has_a_length(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    cases = [{"image": f"{n}", "label": f"l{n}"} for n in range(5)]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": cases, "validation": cases[:1]}))
    study = make_study(row=Row("a", arms=ARMS))
    for options, steps in (({}, 9 * 3), ({"train#trainer#epoch_length": 7}, 9 * 7)):
        run = make_run(study, "student_alone", Arm(("baseline",), {"batch_size": 2, **options}), 0)
        assert steps_of(run, study) == steps


def test_the_teacher_at_half_has_all_labels(make_study: Callable[..., Study]) -> None:
    study = make_study(row=Row("a", regime={"labels": 2, "unlabeled": True}, arms=ARMS))
    halves = half_arms(study, ARMS)
    regimes = {name: make_run(study, name, arm, 0).regime.labels for name, arm in halves.items()}
    assert regimes == {"teacher_at_half": "all", "student_alone_at_half": 2}
