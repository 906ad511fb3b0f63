# SPDX-License-Identifier: Apache-2.0
"""An arm that another bundle trained alike is taken from its results; one that differs in anything is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.borrow import Borrowed, borrow
from lab.recipe import Row, read_recipe
from lab.training import Study
from tests.lab.conftest import TRAIN, write_bundle

SCORED = {"mean": 0.5, "seeds": [0, 1, 2], "per_case": [{"a": 0.5}]}
ARMS = {"teacher": {"overrides": ["teacher"], "seeds": 1}, "student_alone": {"overrides": ["baseline"]},
        "logits_kd": {"overrides": ["logits"]}, "combined": {}}
DEFAULT = {"metric": "dice", "higher_is_better": True, "default": "a", "distilled_from": ["combined"],
           "helpers": {}, "ablations": {}, "arms": ARMS}
HALF = {"steps": 18, "reached": True}


@pytest.fixture
def make(
    tmp_path: Path, make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Borrowed]:
    """Gives what the toy row borrows of another bundle; arguments are what differs in that, or here (`row`)."""
    monkeypatch.setattr("lab.borrow.freeze_bundle", lambda bundle, folder: bundle)    # it has its own toy medkd

    def find(
        row: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, results: dict[str, Any] | None = None,
        arms: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **changed: str,
    ) -> Borrowed:
        write_bundle(tmp_path / "bundles" / "own")
        write_bundle(tmp_path / "bundles" / "other", {**TRAIN, **(train or {})}, **changed)
        recipes = tmp_path / "recipes"
        recipes.mkdir(exist_ok=True)
        (tmp_path / "results").mkdir(exist_ok=True)
        (recipes / "default.json").write_text(json.dumps(DEFAULT))
        (recipes / "own.json").write_text(json.dumps({"rows": {"a": {"borrow": "other", **(row or {})}}}))
        (recipes / "other.json").write_text(json.dumps({"arms": arms or {}, "rows": {"a": {}, **(recipe or {})}}))
        scored = dict.fromkeys(("teacher", "student_alone", "logits_kd", "combined"), SCORED)
        points = [{"labels": 0}, {"labels": 4, "student_alone": {"mean": 0.4}, "distilled": {"mean": 0.6}}]
        told = {"id": "a", "steps": {"teacher": 20, "student_alone": 9, "logits_kd": 9, "combined": 9},
                "converged": {**HALF, "teacher": HALF, "logits_kd": HALF}, "curve": {"points": points}}
        told |= scored
        (tmp_path / "results" / "other.json").write_text(json.dumps({"bundle": "other", **told, **(results or {})}))
        whole = read_recipe(tmp_path / "bundles" / "own", recipes)
        study = make_study(tmp_path / "bundles" / "own", row=whole.rows["a"])
        return borrow(replace(study, recipe=whole), tmp_path, recipes)

    return find


def test_the_same_arms_are_taken_with_steps_convergence_and_curve(make: Callable[..., Borrowed]) -> None:
    found = make()

    assert found.arms == {"student_alone": SCORED}                 # all others start from a teacher, or teach
    assert found.steps == {"student_alone": 9}
    assert found.converged == {**HALF, "teacher": HALF, "logits_kd": HALF}
    assert found.alone == {4: {"mean": 0.4}}
    assert found.told() == {"borrowed": {"bundle": "other", "arms": ["student_alone"]}}


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"losses__plain": "class Plain:\n    x = 2\n"}, {"teacher"}),
        ({"train": {"teacher_def": {"width": 8}}}, set()),         # it learns from another teacher
        ({"recipe": {"a": {"epochs": {"teacher": 7}}}}, set()),
    ],
)
def test_of_convergence_what_is_trained_alike_is_known(
    make: Callable[..., Borrowed], changes: dict[str, Any], known: set[str]
) -> None:
    found = make(**changes)
    assert list(found.arms) == ["student_alone"]
    assert found.converged.keys() - HALF.keys() == known


@pytest.mark.parametrize(
    "changes",
    [
        {"handlers__distillation": "class DistillationHandler:\n    x = 2\n"},
        {"arms": {"student_alone": {"value": 0.9}}},
        {"results": {"steps": {"student_alone": 5}}},              # it was trained before the recipe changed
        {"results": {"student_alone": {**SCORED, "seeds": [0]}}},
        {"recipe": {"a": {"regime": {"labels": 1}}}},
        {"recipe": {"a": {"patient": "(.)"}}},
        {"row": {"arms": {"student_alone": None}}},
    ],
)
def test_what_differs_is_not_taken(make: Callable[..., Borrowed], changes: dict[str, Any]) -> None:
    assert make(**changes).told() == {}


def test_another_row_may_be_named_and_one_that_is_not_there_is_refused(make: Callable[..., Borrowed]) -> None:
    other = {"a": {"epochs": {"student": 7}}, "b": {"data": "a"}}
    rows = {"rows": [{"id": "b", "steps": {"student_alone": 9, "logits_kd": 9}, "converged": {},
                      **dict.fromkeys(("teacher", "student_alone"), SCORED)}]}
    assert list(make({"borrow": "other/b"}, other, rows).arms) == ["student_alone"]
    with pytest.raises(ValueError, match="`borrow` of row 'a' must name a finished row of another bundle, got 'other/"):
        make({"borrow": "other/c"})


def test_a_row_that_borrows_nothing_tells_nothing(study: Study) -> None:
    assert borrow(replace(study, row=Row("a", arms=study.recipe.arms)), Path(), Path()).told() == {}
