# SPDX-License-Identifier: Apache-2.0
"""Pages: each gets its table between its markers, and the committed ones are what the committed results give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lab.pages import fill, full_tables, readme_cell, summary_table

RESULTS = sorted((Path(__file__).parents[2] / "results").glob("*.json"), key=lambda file: file.name)


def arm(*runs: float, validation: float = 0.5, **more: Any) -> dict[str, Any]:
    sd = 0.05 if len(runs) > 1 else None
    told = {"mean": sum(runs) / len(runs), "sd": sd, "runs": list(runs), "metrics": {"val_hd95": 12.34}}
    return {**told, "validation": {"mean": validation, "sd": sd, "runs": [validation]}, "per_case": [], **more}


def content(**more: Any) -> dict[str, Any]:
    """Results with one row; `more` adds to it."""
    combined = arm(0.65, 0.65, validation=0.75)
    tried = {name: arm(0.2, validation=value) for name, value in (("uniform", 0.3), ("foreground", 0.6))}
    return {
        "bundle": "x", "id": "a", "metric": "val_mean_dice", "higher_is_better": True, "seeds": [0, 1],
        "splits": {"training": 3, "validation": 1, "test": 2}, "teacher": arm(0.85), "student_alone": arm(0.4, 0.6),
        "logits_kd": arm(0.2, 0.3, candidate="foreground", candidates=tried), "method": arm(0.5, validation=0.7),
        "combined": combined, "distilled": {"arm": "combined", **combined}, "ablations": {"one_term": arm(0.45)},
        "rows": [], **more,
    }


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The project's README, and a bundle's two pages, which have no markers yet."""
    found = tmp_path / "README.md", tmp_path / "docs" / "README.md", tmp_path / "docs" / "results.md"
    found[1].parent.mkdir()
    found[0].write_text("| <!-- results:y -->y<!-- /results --> |\n| a <!-- results:x -->old<!-- /results --> b |")
    for page in found[1:]:
        page.write_text("no markers")
    return found


def test_each_page_is_filled_between_its_markers_and_the_same_twice(pages: tuple[Path, Path, Path]) -> None:
    readme, short, full = pages
    assert fill(content(), readme, short) == [short, full]

    for page in (short, full):
        page.write_text("before\n<!-- results -->\n<!-- /results -->\nafter")
    assert fill(content(), readme, short) == []
    first = [page.read_text() for page in pages]
    assert fill(content(), readme, short) == []

    assert first == [page.read_text() for page in pages] == [
        "| <!-- results:y -->y<!-- /results --> |\n"
        f"| a <!-- results:x -->{readme_cell(content())}<!-- /results --> b |",
        f"before\n<!-- results -->\n{summary_table(content())}\n<!-- /results -->\nafter",
        f"before\n<!-- results -->\n{full_tables(content())}\n<!-- /results -->\nafter",
    ]


def test_the_cell_of_the_readme_is_short() -> None:
    assert readme_cell(content()) == "a: - / 0.500 ± 0.050 / 0.250 ± 0.050 / 0.650 ± 0.050 / 0.850"


@pytest.mark.parametrize(("higher", "word"), [(True, "higher"), (False, "lower")])
def test_the_short_table_has_a_line_per_data_set_and_the_main_metric(higher: bool, word: str) -> None:
    other = content(id="b", logits_kd=arm(0.3)) | {"distilled": None}
    only_searched = {"id": "c", "search": []}

    table = summary_table(content(higher_is_better=higher, rows=[other, only_searched]))

    assert table.splitlines() == [
        f"| test Dice, {word} is better | student alone | plain KD | distilled | teacher |",
        "| --- | --- | --- | --- | --- |",
        "| a | 0.500 ± 0.050 | 0.250 ± 0.050 | 0.650 ± 0.050 | 0.850 |",
        "| b | 0.500 ± 0.050 | 0.300 | - | 0.850 |",
    ]
    assert summary_table({"bundle": "x", **only_searched}) == ""


def test_the_full_table_has_all_arms_and_metrics_and_says_what_is_distilled() -> None:
    lines = full_tables(content()).splitlines()

    assert lines[0] == "| a | validation Dice | test Dice | HD95 |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:8]] == [
        "teacher", "student alone", "plain KD (foreground)", "method alone", "method and plain KD (= distilled)",
        "one term",
    ]
    assert lines[2] == "| teacher | 0.500 | 0.850 | 12.3 |"
    told = "3 training, 1 validation, 2 test cases; seeds 0, 1 (mean ± sd; one seed where no ± stands)."
    assert lines[9].startswith(told)


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ({"value": 0.5, "low": 0.25, "high": 0.75}, "Gap recovered: 50 % of 0.350 (95 %: 25 to 75 %)."),
        (
            {"value": 0.5, "low": None, "high": None, "reason": "too few cases"},
            "Gap recovered: 50 % of 0.350. Too few cases.",
        ),
        ({"value": None, "low": None, "high": None, "reason": "no gap"}, "stands). No gap."),
    ],
)
def test_the_sentence_tells_the_gap_or_why_there_is_none(gap: dict[str, Any], words: str) -> None:
    measured = {"parameters": {"teacher": 2000, "student": 10}, "seconds_per_case": {"teacher": 2, "student": 0.5}}

    told = full_tables(content(gap_recovered=gap, **measured))

    assert words in told
    assert told.endswith("Teacher 2,000 parameters, student 10; 2.00 and 0.50 s per case.")


def test_what_was_chosen_on_validation_is_told_seed_by_seed() -> None:
    chosen = {name: arm(0.5, calibrated=[{"bias": n}, {"bias": 1}]) for n, name in enumerate(("teacher", "method"))}

    assert "Chosen on validation, `bias`: teacher 0, 1; method alone 1, 1." in full_tables(content(**chosen))


def test_all_that_was_tried_is_listed_from_the_best_on() -> None:
    told = full_tables(content(search=[{"name": "no_ramp", "validation": 0.4567}]))

    tried = told[told.index("| first seed only | validation Dice |") :]
    assert tried.splitlines()[2:] == [
        "| method and plain KD | 0.750 |", "| method alone | 0.700 |", "| plain KD (foreground) | 0.600 |",
        "| student alone | 0.500 |", "| no ramp | 0.457 |", "| plain KD (uniform) | 0.300 |",
    ]


def new_row(**more: Any) -> dict[str, Any]:
    """Results of the protocol with regimes."""
    half = {"steps": 1800, "validation": 0.7, "steps_at_half": 900, "validation_at_half": 0.65}
    stages = {"load": {"teacher": 0.1, "student": 0.2}, "network_openvino": {"teacher": 3.0, "student": 1.0}}
    told: dict[str, Any] = {
        "classical": {"name": "filters", "mean": 0.31, "per_case": {}, "metrics": {}, "validation": 0.3},
        "leaks": {"ellipsoid": {"mean": 0.3, "metrics": {}, "validation": 0.2}, "verdict": "none: it has 0.300"},
        "retention": 0.971, "regime": {"name": "none", "labels": 0, "unlabeled": 66, "labels_of_student_alone": 18},
        "converged": {**half, "reached": False, "teacher": {**half, "reached": True}},
        "steps": {"student_alone": 1800, "teacher": 900, "other": 7},
        "labels_worth": {"value": 6}, "parameters": {"teacher": 2000, "student": 10}, "seconds_per_case": stages,
    }
    return content(**{**told, **more})


def test_short_tables_have_the_classical_arm_and_retention_where_a_row_has_them() -> None:
    old = content(id="b", not_rerun="trained before")
    table = summary_table(new_row(rows=[old]))

    assert table.splitlines() == [
        "| test Dice, higher is better | classical | student alone | plain KD | distilled | teacher | retention |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a (not converged) | 0.310 | 0.500 ± 0.050 | 0.250 ± 0.050 | 0.650 ± 0.050 | 0.850 | 97 % |",
        "| b (not rerun) | - | 0.500 ± 0.050 | 0.250 ± 0.050 | 0.650 ± 0.050 | 0.850 | - |",
        "",
        "Not rerun: trained before.",
    ]
    assert readme_cell(new_row()).endswith("0.310 / 0.500 ± 0.050 / 0.250 ± 0.050 / 0.650 ± 0.050 / 0.850")


def test_a_row_whose_student_alone_was_not_trained_twice_as_long_says_so() -> None:
    assert "| a (convergence unchecked) |" in summary_table(new_row(converged={"teacher": {"reached": True}}))


def test_a_row_that_is_not_finished_says_what_is_missing() -> None:
    row = new_row(not_trained=["combined, seed 1", "method, seed 0"])
    assert "| a (not finished, not converged) |" in summary_table(row)
    assert " Not trained: combined, seed 1; method, seed 0." in full_tables(row)
    one = {"mean": 0.5}
    points = [{"labels": 0, "distilled": one}, {"labels": 1, "student_alone": one}, {"labels": 2, "distilled": one}]
    curve = {"arm": "combined", "points": points}
    told = " Not trained: distilled with 1 label; student alone with 2 labels."
    assert told in full_tables(new_row(curve=curve))


def test_a_row_tells_the_gain_of_the_distilled_student() -> None:
    alone = {"value": 0.054, "low": 0.037, "high": 0.072}
    gained = {"student_alone": alone, "logits_kd": {"value": -0.005, "low": None}}
    said = " Gain of the distilled over student alone +0.054 (95 %: +0.037 to +0.072), over plain KD -0.005."
    assert said in full_tables(new_row(gained=gained))


def test_a_row_whose_teacher_has_other_labels_says_how_many() -> None:
    regime = {"name": "few", "labels": 4, "unlabeled": 80, "labels_of_student_alone": 4, "labels_of_teacher": 2}
    assert "(4 labeled cases and 80 images without a label; the teacher has 2)." in full_tables(new_row(regime=regime))


def test_a_row_that_is_a_detail_stands_in_the_full_tables_alone() -> None:
    told = new_row(rows=[{**new_row(), "id": "terms", "detail": True}])
    assert [name in summary_table(told) for name in ("a", "terms")] == [True, False]
    assert [name in readme_cell(told) for name in ("a", "terms")] == [True, False]
    assert "| terms |" in full_tables(told)


def test_a_row_whose_crop_gives_the_answer_away_says_so() -> None:
    verdict = "ellipsoid is better than the teacher (0.900 against 0.850): this set cannot show what a network is worth"
    row = new_row(leaks={"ellipsoid": {"mean": 0.9, "metrics": {}, "validation": 0.8}, "verdict": verdict})

    assert "| a (not converged, leak) |" in summary_table(row)
    assert f"Leaks: {verdict}." in full_tables(row)


def test_the_full_table_tells_regime_convergence_rules_and_stages() -> None:
    told = full_tables(new_row())

    assert "| classical | 0.300 | 0.310 | - |" in told
    assert "| ellipsoid (ignores the image) | 0.200 | 0.300 | - |" in told
    labels = "none (0 labeled cases and 66 images without a label; the student alone has 18 labeled cases)"
    assert f"Labels: {labels}." in told
    assert "worth about 6 labeled cases: so many does a student alone need to be as good." in told
    assert "Student alone NOT converged (0.650 on validation after 900 steps, 0.700 after 1,800); teacher conv" in told
    assert "s per case with one thread: load 0.100 and 0.200, network with OpenVINO 3.000 and 1.000." in told
    assert "Steps: teacher 900, student alone 1,800. " in told
    assert "Retention: 97.1 % (student alone: 58.8 %)." in told
    assert "worth more than 18 labeled cases" in full_tables(new_row(labels_worth={"value": None, "more_than": 18}))


def test_agreement_with_the_teacher_is_not_shown_as_a_score_by_labels() -> None:
    agreed = {"mean": 0.9, "sd": None, "runs": [0.9], "metric": "val_mean_dice_with_teacher"}
    combined = {**arm(0.65), "validation": agreed}
    tried = {"name": "other", "validation": 0.8}
    told = full_tables(new_row(combined=combined, distilled={"arm": "combined", **combined}, search=[tried]))

    assert "| method and plain KD (= distilled) | 0.900 (agreement) | 0.650 |" in told
    assert told[told.index("| first seed only | validation Dice (agreement) |"):].splitlines()[2:] == [
        "| method and plain KD | 0.900 |", "| other | 0.800 |",
    ]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_committed_pages_are_what_the_committed_results_give(file: Path, repository: Path, tmp_path: Path) -> None:
    readme = shutil.copy(repository / "README.md", tmp_path)
    docs = shutil.copytree(repository / "bundles" / file.stem / "docs", tmp_path / "docs")
    before = {page: page.read_text() for page in (Path(readme), docs / "README.md", docs / "results.md")}

    assert fill(json.loads(file.read_text()), Path(readme), docs / "README.md") == []

    assert {page: page.read_text() for page in before} == before
