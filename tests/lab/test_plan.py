# SPDX-License-Identifier: Apache-2.0
"""The pool trains what a row needs, once, in order, whatever fails or interrupts it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.execute import Executor
from lab.plan import RowFailedError, all_parallel, count_runs, train_all, wanted_runs
from lab.recipe import Arm, Row, read_recipe
from lab.training import Study
from tests.lab.conftest import ARMS, TRAIN, write_bundle

Make = Callable[..., Study]


def test_the_better_candidate_gets_the_other_seeds_and_finished_runs_are_not_repeated(make_study: Make) -> None:
    candidates = {name: Arm(("logits",), {"value": value}) for name, value in (("u", 0.55), ("f", 0.6))}
    better = {**ARMS, "logits_kd": Arm(candidates=candidates), "combined": Arm((), {"value": 0.7})}
    study = make_study(workers=2, row=Row("a", epochs={"teacher": 7, "student": 5}))

    finished = train_all(study, better)
    again = train_all(study, better)

    assert len(finished) == count_runs(study, better) == 1 + 3 + 4 + 1 + 3
    assert {name for name in finished if name[0] == "logits_kd"} == {
        ("logits_kd", "u", 0), ("logits_kd", "f", 0), ("logits_kd", "f", 1), ("logits_kd", "f", 2)
    }
    assert [sum(name[0] == arm for name in finished) for arm in ("method", "combined")] == [1, 3]
    assert all(one.new for one in finished.values())
    assert not any(one.new for one in again.values())
    assert {(one.folder / "ran").read_text() for one in again.values()} == {";"}
    options = json.loads((finished["combined", "", 2].folder / "model.pt").read_text())
    teacher = finished["teacher", "", 0].folder
    assert (options["epochs"], options["seed"]) == (5, 2)
    assert (study.source / options["teacher_path"]).resolve() == teacher.resolve() / "model.pt"
    assert json.loads((teacher / "model.pt").read_text())["epochs"] == 7


def test_a_row_without_the_method_alone_gives_all_seeds_to_the_combination(make_study: Make) -> None:
    arms = {name: arm for name, arm in ARMS.items() if name != "method"}
    study = make_study()

    finished = train_all(study, arms)

    assert sum(name[0] == "combined" for name in finished) == 3
    assert len(finished) == count_runs(study, arms)


def test_two_bundles_share_the_trainings_that_are_the_same(make_study: Make, tmp_path: Path) -> None:
    other = {
        **TRAIN, "distill_loss": {"_target_": "medkd.losses.new.New"}, "distill_weights": {"z": 3.0},
        "distill_ramp": 0.5, "own": 1,
    }
    second = write_bundle(tmp_path / "another_name", other, losses__new="class New:\n    pass\n")

    one, two = (train_all(make_study(source), ARMS) for source in (None, second))

    new = {name for name, trained in two.items() if trained.new}
    assert {name[0] for name in new} == {"method", "combined"}      # teacher, alone and plain KD are the first bundle's
    assert {one[name].folder for name in one.keys() & two.keys() - new} == {
        two[name].folder for name in two.keys() - new
    }
    assert {(trained.folder / "ran").read_text() for trained in two.values()} == {";"}


def test_bundles_whose_code_differs_do_not_share(make_study: Make, tmp_path: Path) -> None:
    train_all(make_study(), {"teacher": ARMS["teacher"]})
    other = write_bundle(tmp_path / "other", handlers__distillation="class DistillationHandler:\n    x = 1\n")
    assert train_all(make_study(other), {"teacher": ARMS["teacher"]})["teacher", "", 0].new


def test_a_run_that_distils_needs_the_teacher_and_others_do_not(study: Study) -> None:
    runs = {run.arm: run for run in wanted_runs(study, ARMS, {})}

    assert {name for name, run in runs.items() if run.weights_of} == {"logits_kd", "method", "combined"}


def test_a_failed_run_shows_its_log_and_leaves_the_others(
    make_study: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(workers=2)
    arms = {**ARMS, "method": Arm(("method",), {"fail": True}, seeds=1)}

    with pytest.raises(RowFailedError, match="not trained: method, seed 0"):
        train_all(study, arms)

    said = capsys.readouterr().out
    assert "method, seed 0: FAILED, 'method, seed 0' failed with exit code 1" in said
    assert "the reason" in said
    assert len(list(study.folder.glob("*/model.pt"))) == 1 + 3 + 4 + 1


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"saved": True, "epoch": 3}, "a model that was not validated"),
        ({"saved": False, "reason": "disk full"}, "a model that could not be saved \\(disk full\\)"),
        ({"epoch": 3, "validation": {"dice": 1.0}}, "a model that could not be saved"),
        ({"saved": True, "epoch": 3, "validation": {"voi": 1.0}}, "must be taken by dice, .* got voi"),
    ],
)
def test_a_training_without_the_model_that_is_asked_for_has_failed(
    study: Study, capsys: pytest.CaptureFixture[str], told: dict[str, Any], message: str
) -> None:
    arms = {"teacher": Arm(("teacher",), {"description": told}, seeds=1)}
    for _ in range(2):
        with pytest.raises(RowFailedError, match="not trained: teacher, seed 0"):
            train_all(study, arms)
        assert re.search(f"teacher, seed 0: FAILED, .*{message}", capsys.readouterr().out)


def test_an_interrupted_run_goes_on_from_its_checkpoint(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        while not any(study.folder.glob("*/checkpoints/*.pt")):
            time.sleep(0.05)
        raise KeyboardInterrupt

    arms = {"teacher": Arm(("teacher",), {"wait": True}, seeds=1)}
    monkeypatch.setattr("lab.plan.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_all(study, arms)
    monkeypatch.setattr("lab.plan.wait", wait)

    finished = train_all(replace(study, executor=Executor()), arms)

    folder = finished["teacher", "", 0].folder
    assert (folder / "ran").read_text() == ";--resume True;"
    assert not (folder / "checkpoints").exists()


def test_what_is_finished_is_given_without_training_the_rest(
    make_study: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study()
    train_all(study, {name: replace(ARMS[name], seeds=1) for name in ("teacher", "student_alone")})
    resting = replace(study, executor=Executor(trains=False))
    capsys.readouterr()

    finished = train_all(resting, ARMS)

    assert set(finished) == {("teacher", "", 0), ("student_alone", "", 0)}
    said = capsys.readouterr().out
    assert "student_alone, seed 0: was finished before" in said
    assert "student_alone, seed 1: left out, it is not finished" in said
    assert "method, seed 0: left out, it is not finished" in said
    assert not [path for path in study.folder.glob("*/run.json") if '"done": true' not in path.read_text()]

    with pytest.raises(RowFailedError, match="not trained: teacher, seed 7"):
        train_all(replace(resting, row=replace(study.row, seeds=(7,))), {"teacher": ARMS["teacher"]})


def test_an_error_in_one_of_several_works_is_raised_at_once() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    assert all_parallel(work, [1, 3], 2, Executor()) == [1, 3]
    with pytest.raises(ValueError, match="two"):
        all_parallel(work, [1, 2], 2, Executor())


def test_the_rows_of_the_repository_have_a_run_of_each_arm_and_seed(repository: Path, study: Study) -> None:
    for bundle in sorted((repository / "bundles").glob("*/")):
        recipe = read_recipe(bundle)
        for row in recipe.rows.values():
            assert {"teacher", "student_alone", "logits_kd"} <= row.arms.keys()
            runs = count_runs(replace(study, recipe=recipe, row=row), row.arms)
            assert runs >= len(row.arms) + 2 * (len(row.seeds) - 1)    # student alone and plain KD have all seeds
