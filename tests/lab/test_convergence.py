# SPDX-License-Identifier: Apache-2.0
"""A row says what twice its schedule would have brought."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.convergence import converged, doubled_arms, limit_of, steps_of
from lab.plan import make_run, train_all
from lab.recipe import Arm, Row
from lab.training import Study
from tests.lab.conftest import ARMS


def run_doubled(
    make_study: Callable[..., Study], options: dict[str, Any], doubled: dict[str, Any], **recipe: Any
) -> Any:
    """`converged` of a study whose trainings and doubled ones find values."""
    arms = {"teacher": ARMS["teacher"], "student_alone": Arm(("baseline",), options, seeds=1)}
    study = make_study(row=Row("a", epochs={"student": 8}, val_interval={"student": 2}, arms=arms), **recipe)
    more = doubled_arms(study, arms)
    more["student_alone_doubled"].options.update(doubled)          # type: ignore[attr-defined]
    return converged(study, train_all(study, {**arms, **more}))


@pytest.mark.parametrize(("doubled", "reached"), [(0.805, True), (0.82, False), (0.7, True)])
def test_a_student_has_converged_when_twice_the_steps_bring_little(
    make_study: Callable[..., Study], doubled: float, reached: bool
) -> None:
    told = run_doubled(make_study, {"value": 0.8}, {"value": doubled})

    assert told == {
        "steps": 16, "validation": doubled, "steps_at_half": 8, "validation_at_half": 0.8, "reached": reached,
        "teacher": {"steps": 40, "validation": 0.5, "steps_at_half": 20, "validation_at_half": 0.5, "reached": True},
    }


def test_of_an_error_a_fall_counts_and_of_voi_more_is_allowed(make_study: Callable[..., Study]) -> None:
    told = run_doubled(make_study, {"value": 0.8}, {"value": 0.76}, higher_is_better=False)
    assert told["reached"] is False
    assert (limit_of("val_voi"), limit_of("val_mean_dice")) == (0.05, 0.01)


def test_validations_are_as_many_in_twice_the_schedule(make_study: Callable[..., Study]) -> None:
    study = make_study(row=Row("a", epochs={"student": 8}, val_interval={"student": 2}, arms=ARMS))
    options = doubled_arms(study, ARMS)["student_alone_doubled"].options
    assert (options["epochs"], options["val_interval"]) == (16, 4)


def test_steps_are_counted_by_the_cases_unless_an_epoch_has_a_length(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    cases = [{"image": f"{n}", "label": f"l{n}"} for n in range(5)]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": cases, "validation": cases[:1]}))
    study = make_study(row=Row("a", arms=ARMS))
    for options, steps in (({}, 9 * 3), ({"train#trainer#epoch_length": 7}, 9 * 7)):
        run = make_run(study, "student_alone", Arm(("baseline",), {"batch_size": 2, **options}), 0)
        assert steps_of(run, study) == steps


def test_the_doubled_teacher_has_all_labels(make_study: Callable[..., Study]) -> None:
    study = make_study(row=Row("a", regime={"labels": 2, "unlabeled": True}, arms=ARMS))
    doubled = doubled_arms(study, ARMS)
    regimes = {name: make_run(study, name, arm, 0).regime.labels for name, arm in doubled.items()}
    assert regimes["teacher_doubled"] == "all"
    assert regimes["student_alone_doubled"] == 2
