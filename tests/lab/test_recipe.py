# SPDX-License-Identifier: Apache-2.0
"""Recipes inherit arms, change them by flat keys, and are refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lab.recipe import Arm, Recipe, Row, read_recipe
from lab.regimes import Regime
from tests.lab.conftest import ARMS

BUNDLE = "boundary_relation_ct_organs"


@pytest.fixture
def recipes(repository: Path, tmp_path: Path) -> Path:
    """A folder with the default recipe alone."""
    shutil.copy(repository / "results" / "recipes" / "default.json", tmp_path)
    return tmp_path


def read(repository: Path, recipes: Path, content: dict[str, Any]) -> Recipe:
    (recipes / f"{BUNDLE}.json").write_text(json.dumps(content))
    return read_recipe(repository / "bundles" / BUNDLE, recipes)


def test_the_recipes_of_the_repository_are_sound_and_short(repository: Path) -> None:
    for bundle in sorted((repository / "bundles").glob("*/")):
        recipe = read_recipe(bundle)
        assert next(iter(recipe.rows_of("unknown")[0].arms)) == "teacher"
        assert all(next(iter(row.arms)) == "teacher" and len(row.arms) > 3 for row in recipe.rows.values())
    for file in (repository / "results" / "recipes").glob("*.json"):
        assert len(file.read_text().splitlines()) < 120


def test_arms_are_inherited_and_changed_by_flat_keys(repository: Path, recipes: Path) -> None:
    recipe = read(repository, recipes, {
        "arms": {
            "teacher": {"learning_rate": 0.1},
            "logits_kd": {"candidates": {"as_it_is": {}, "more": {"distill_weights#logits": 2.0, "overrides": ["em"]}}},
            "method": {"overrides": []},
            "features_kd": None,
        },
        "ablations": {"small": {"overrides": ["method"], "distill_weights#boundary": 0.0}},
        "rows": {"a": {"arms": {"combined": {"distill_weights#boundary": 5}, "teacher": {"epochs": 3}}}, "b": {}},
    })

    assert recipe.arms == {
        "teacher": Arm(["teacher"], {"learning_rate": 0.1}, seeds=1),
        "student_alone": Arm(["baseline"]),
        "logits_kd": Arm(["logits"], candidates={
            "as_it_is": Arm(["logits"]), "more": Arm(["em"], {"distill_weights#logits": 2.0}),
        }),
        "method": Arm([]),
        "combined": Arm(),
        "small": Arm(["method"], {"distill_weights#boundary": 0.0}, seeds=1),
    }
    assert recipe.rows["b"].arms == recipe.arms
    changed = recipe.rows["a"].arms
    assert changed["combined"] == Arm((), {"distill_weights#boundary": 5})
    assert changed["teacher"] == Arm(["teacher"], {"learning_rate": 0.1, "epochs": 3}, seeds=1)
    assert changed["student_alone"] == recipe.arms["student_alone"]
    assert (recipe.metric, recipe.distilled_from) == ("val_mean_dice", ["method", "combined"])


def test_a_row_that_is_like_another_has_what_it_does_not_say_and_regimes_are_read(
    repository: Path, recipes: Path
) -> None:
    recipe = read(repository, recipes, {
        "arms": {"method": {"regime": {"labels": 3}}},
        "rows": {
            "a": {"data": "d", "epochs": {"student": 7}, "regime": {"unlabeled": True}, "curve": [0, 4],
                  "arms": {"combined": {"distill_weights#boundary": 5}}},
            "b": {"like": "a", "regime": {"labels": 0, "unlabeled": True}, "curve": []},
        },
    })

    first, second = recipe.rows["a"], recipe.rows["b"]
    assert (first.regime, second.regime) == (Regime("all", unlabeled=True), Regime(0, unlabeled=True))
    assert (second.id, second.data, second.epochs, second.curve) == ("b", "d", {"student": 7}, [])
    assert second.arms == first.arms
    assert first.arms["method"].regime == Regime(3)
    assert first.arms["combined"].regime is None


def test_without_combined_the_method_alone_is_distilled(repository: Path, recipes: Path) -> None:
    assert read(repository, recipes, {"arms": {"combined": None}}).distilled_from == ["method"]


def test_a_bundle_without_a_recipe_has_the_arms_whose_configs_it_has(recipes: Path, tmp_path: Path) -> None:
    for name in ("train", "evaluate", "teacher", "baseline"):
        file = tmp_path / "bundle" / "configs" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    recipe = read_recipe(tmp_path / "bundle", recipes)
    assert list(recipe.arms) == ["teacher", "student_alone", "combined"]
    assert recipe.rows_of("x")[0].arms == recipe.arms


def test_rows_may_share_their_data() -> None:
    rows = {"a": Row("a"), "easy": Row("easy", data="a", test="easy"), "b": Row("b")}
    recipe = Recipe("dice", True, "a", (), ARMS, rows=rows)
    assert [row.id for row in recipe.rows_of("a")] == ["a", "easy"]
    assert [row.data for row in recipe.rows_of("c")] == ["c"]


def test_helpers_are_trained_only_when_something_starts_from_them() -> None:
    arms = {**ARMS, "head": Arm(("head",)), "idle": Arm(("idle",)), "method": Arm(weights_of={"head_path": "head"})}
    recipe = Recipe("dice", True, "a", (), arms, helpers=frozenset({"head", "idle"}))
    assert recipe.drop_idle_helpers(arms).keys() == {*ARMS, "head"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metrik": 1}, "metrik"),
        ({"rows": {"a": {"epoch": 1}}}, "row a must have keys of .*got \\['epoch'\\]"),
        ({"rows": {"a": {"arms": {"tudent": {}}}}}, "`arms` of row 'a' must be arms of the recipe, got \\['tudent'\\]"),
        ({"arms": {"teacher": {"overrides": ["nowhere"]}}, "distilled_from": []}, "no configs/nowhere.json"),
        ({"arms": {"method": {"seedz": 1}}}, "'method' must have keys .* of train.json, got \\['seedz'\\]"),
        ({"rows": {"a": {"search": {"x": {"distil#y": 1}}}}}, "'x' must have keys .*got \\['distil#y'\\]"),
        ({"rows": {"a": {"options": {"network_def#chanels": 1}}}}, "'row a' must have .*got \\['network_def#chanels'"),
        ({"distilled_from": ["magic"]}, "must name arms, got 'magic'"),
        ({"arms": {"teacher": None}}, "must have an arm 'teacher', got"),
        ({"helpers": {"head": {"weights_of": {"teacher_path": "techer"}}}}, "must name arms or helpers, got 'techer'"),
        ({"default": "typo"}, "must name a row, got 'typo'"),
        ({"rows": {"a": {"inference": ["nope"]}}}, "no configs/nope.json"),
        ({"rows": {"a": {"patient": "liver"}}}, "must have one group, got 'liver'"),
        ({"rows": {"a": {"calibrate": {"x": [1], "y": [2]}}}}, "must name one option, got \\['x', 'y'\\]"),
        ({"rows": {"a": {"search": {"x": {"seeds": 2}}}}}, "must have no `candidates` and no `seeds`"),
        ({"rows": {"a": {}, "b": {"like": "c"}}}, "`like` of row 'b' must name a row .* of \\['a'\\], got 'c'"),
        ({"rows": {"a": {"like": "b"}, "b": {"like": "a"}}}, "`like` of row 'a' must name a row .*, got 'b'"),
        ({"rows": {"a": {"regime": {"labels": "few"}}}}, "'all', got 'few'"),
        ({"rows": {"a": {"curve": [4, 1]}}}, "`curve` of row 'a' must be rising numbers of cases, got \\[4, 1\\]"),
        ({"rows": {"a": {"calibrate": {"x": [1]}, "regime": {"labels": 0, "unlabeled": True}}}}, "no labels to choose"),
    ],
)
def test_a_wrong_recipe_is_refused(repository: Path, recipes: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(repository, recipes, content)
