# SPDX-License-Identifier: Apache-2.0
"""Rows of the results: their keys, the choice by validation, and files whose other rows stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.recipe import Recipe, Row
from lab.record import (
    all_rows,
    complete,
    judge_leaks,
    make_row,
    merge_row,
    read_results,
    retention,
    rules_of,
    shipped_of,
    split_names,
    write_results,
)
from lab.training import Run, Trained
from tests.lab.conftest import ARMS

RECIPE = Recipe("dice", True, "a", ("method", "combined"), ARMS)


def scored(validation: float, *cases: float, seed: int = 0, **options: Any) -> Trained:
    run = Run("method", options.pop("candidate", ""), seed, ("train", "method"), {**options, "seed": seed})
    values = {"dice": {f"case{number}": value for number, value in enumerate(cases)}, "hd95": {"case0": 7.0}}
    return Trained(run, Path("key"), f"sha{seed}", "dice", validation, 1, 2.0, values=values)


def row_of(**changed: Any) -> dict[str, Any]:
    scores = {
        "teacher": {"": [scored(0.9, 0.8, 0.9, 0.8, 0.9)]},
        "student_alone": {"": [scored(0.5, 0.4, 0.5, 0.4, 0.5), scored(0.5, 0.5, 0.6, 0.5, 0.6, seed=1)]},
        "logits_kd": {
            name: [scored(*one, seed=seed, candidate=name) for seed, one in enumerate(values)]
            for name, values in {"uniform": [(0.4, 0.9)], "foreground": [(0.6, 0.3), (0.1, 0.2)]}.items()
        },
        "method": {"": [scored(0.7, 0.9, 0.9, 0.9, 0.9)]},
        "combined": {"": [scored(0.8, 0.6, 0.7, 0.6, 0.7, lr=1, size=3),
                          scored(0.7, 0.6, 0.7, 0.6, 0.7, seed=1, lr=1, size=3)]},
    }
    facts = {
        "splits": {"training": 1, "validation": 1, "test": 4}, "converged": {"reached": True}, "hardware": {},
        "classical": {"name": "f", "mean": 0.3}, "leaks": {"ellipsoid": {"mean": 0.9}},
        "parameters": {"teacher": 2000, "student": 10},
        "seconds_per_case": {"teacher": 0.5, "student": 0.1}, "versions": {}, "command": "make",
    }
    return make_row(RECIPE, Row("a", seeds=(0, 1), options={"size": 3}), scores, facts) | changed


def test_a_row_has_the_keys_of_the_protocol_and_chooses_by_validation_alone() -> None:
    row = row_of()

    assert {
        "data", "splits", "metric", "higher_is_better", "seeds", "converged", "classical", "leaks", "retention",
        "teacher", "student_alone", "logits_kd", "distilled",
        "gap_recovered", "parameters", "seconds_per_case", "hardware", "versions", "command", "method", "combined",
    } <= row.keys()
    assert row["student_alone"] | {"mean": 0.5, "sd": 0.0707, "runs": [0.45, 0.55]} == row["student_alone"]
    assert row["distilled"]["arm"] == "combined"           # the method is better on the test cases
    assert row["logits_kd"]["candidate"] == "foreground"
    assert set(row["logits_kd"]["candidates"]) == {"uniform", "foreground"}
    assert row["teacher"]["metrics"] == {"hd95": 7.0}
    assert row["options"] == {"size": 3}
    assert row["retention"] == round(0.65 / 0.85, 4)
    assert row["leaks"]["verdict"].startswith("ellipsoid is better than the teacher (0.900 against 0.850)")
    assert row["combined"]["options"] == {"lr": 1}
    assert row["method"]["configs"] == ["configs/train.json", "configs/method.json"]


def test_what_is_shipped_is_the_run_that_is_best_on_validation() -> None:
    best, told = shipped_of([scored(0.5, 0.9), scored(0.6, 0.1, seed=1)], RECIPE)

    assert best.run.seed == told["seed"] == 1
    assert told == {"seed": 1, "sha256": "sha1", "mean": 0.1, "per_case": {"case0": 0.1}}


def test_a_new_row_replaces_its_own_only_and_keeps_what_was_searched_last(tmp_path: Path) -> None:
    content = merge_row({}, "x", {"id": "b", "v": 1}, "a")
    assert (content["id"], content["rows"]) == ("b", [])    # until there is the default row
    content = merge_row(content, "x", {"id": "a", "v": 1}, "a")
    content = merge_row(content, "x", {"id": "a"}, "a", [{"name": "n", "validation": 1}])
    content = merge_row(content, "x", {"id": "a", "v": 2}, "a")
    content = merge_row(content, "x", {"id": "a"}, "a", [{"name": "m", "validation": 2}])

    assert [(row["id"], row["v"]) for row in all_rows(content)] == [("a", 2), ("b", 1)]
    assert [one["name"] for one in content["search"]] == ["m"]
    write_results(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content


def test_a_row_of_an_earlier_protocol_goes_or_says_so() -> None:
    recipe = Recipe("dice", True, "new", (), ARMS, rows={"new": Row("new", "d", detail=True), "kept": Row("kept")})
    old = {name: {"id": name, "data": name, "teacher": {}} for name in ("kept", "foreign")}
    content = {"bundle": "x", "id": "d", "data": "d", "teacher": {}, "rows": list(old.values())}
    content = merge_row(content, "x", {"id": "new", "data": "d", "teacher": {}, "converged": {}}, "new")

    found = complete(content, recipe)

    assert (found["bundle"], found["id"], [row["id"] for row in found["rows"]]) == ("x", "new", ["foreign", "kept"])
    assert "not_rerun" not in {key for key in found if key != "rows"}
    assert [row.get("detail") for row in all_rows(found)] == [True, None, None]
    assert all("earlier protocol" in row["not_rerun"] for row in found["rows"])
    assert complete(found, recipe) == found
    searched = {"bundle": "x", "id": "kept", "data": "kept", "search": [], "rows": []}
    assert complete(searched, recipe) == searched


def test_a_row_tells_how_much_better_the_distilled_student_is_drawn_over_the_recipes_patients() -> None:
    cases = [f"p{number // 2}_{number}" for number in range(8)]
    alone, better = ([dict.fromkeys(cases, value)] for value in (0.5, 0.6))
    row = {"id": "new", "data": "d", "higher_is_better": True, "teacher": {}, "converged": {},
           "student_alone": {"per_case": alone}, "logits_kd": {"per_case": better},
           "distilled": {"arm": "method", "per_case": better}}
    recipe = Recipe("dice", True, "new", (), ARMS, rows={"new": Row("new", "d", datalist={"patient": r"p(\d)_"})})
    told = complete({"bundle": "x", **row, "rows": []}, recipe)
    names = ("value", "low", "high")
    assert told["gained"] == {"student_alone": dict.fromkeys(names, 0.1), "logits_kd": dict.fromkeys(names, 0.0)}


def test_retention_is_a_share_of_the_teacher_whether_the_metric_rises_or_falls() -> None:
    assert (retention(0.6, 0.8), retention(2.0, 1.0, higher_is_better=False)) == (0.75, 0.5)
    assert retention(0.6, 0.0) is None


def test_a_rule_that_ignores_the_image_is_judged_by_the_networks_it_meets() -> None:
    networks = {"student_alone": {"mean": 0.5}, "teacher": {"mean": 0.7}}
    for mean, higher, word in ((0.4, True, "none: the best rule that ignores the image, b, has 0.400"),
                               (0.6, True, "b is better than the student alone (0.600 against 0.500)"),
                               (0.6, False, "b is better than the teacher (0.600 against 0.700)")):
        worse = {"mean": 0.1 if higher else 0.9}
        row = {"leaks": {"a": worse, "b": {"mean": mean}}, "higher_is_better": higher, **networks}
        assert judge_leaks(row).startswith(word)


def test_the_classical_arm_stands_apart_from_rules_that_ignore_the_image() -> None:
    found = {"sarcoma_muscle": {"mean": 0.3}, "mean_label": {"mean": 0.2}}
    row = Row("a", classical="sarcoma_muscle", leaks=["mean_label"])
    assert rules_of(row, found) == {
        "classical": {"name": "sarcoma_muscle", "mean": 0.3}, "leaks": {"mean_label": {"mean": 0.2}}
    }
    assert rules_of(Row("a"), {}) == {}


def test_rows_that_are_not_written_stay_byte_for_byte(repository: Path, tmp_path: Path) -> None:
    for file in sorted((repository / "results").glob("*.json")):
        content = read_results(file)
        default, bundle = content["id"], content["bundle"]
        for row in all_rows(content):
            write_results(tmp_path / "same.json", merge_row(content, bundle, row, default))
            assert (tmp_path / "same.json").read_bytes() == file.read_bytes()
        before = file.read_text().split('\n  "rows": [')
        for name, kept in ((default, 1), ("a_new_row", 0)):
            write_results(tmp_path / "new.json", merge_row(content, bundle, {"id": name, "value": 1}, default))
            assert (tmp_path / "new.json").read_text().split('\n  "rows": [')[kept] == before[kept]


def test_splits_name_the_test_cases_that_count_unless_they_are_many(tmp_path: Path) -> None:
    cases = [{"image": f"d/{name}.nii.gz"} for name in "abc"]
    (tmp_path / "d.json").write_text(json.dumps({"training": cases, "test": cases}))
    assert split_names(tmp_path / "d.json", "[ab]") == {
        "training": 3, "validation": 0, "test": 2, "test_cases": ["a", "b"]
    }
    (tmp_path / "d.json").write_text(json.dumps({"test": [{"image": f"{n}.png"} for n in range(21)]}))
    assert split_names(tmp_path / "d.json") == {"training": 0, "validation": 0, "test": 21}
