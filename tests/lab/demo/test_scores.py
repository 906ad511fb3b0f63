# SPDX-License-Identifier: Apache-2.0
"""What the demo says of its scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lab.demo.scores import ALONE, DISTILLED, RUNS, TEACHER, Result, gap_text, read_result, table, verdict


def results(teacher: float, alone: float, distilled: float) -> dict[str, Result]:
    dice = {TEACHER: teacher, ALONE: alone, DISTILLED: distilled}
    return {run: Result([[dice[run], math.nan]] * 2, [[3.0, 4.0]] * 2, 10**6, 2.0) for run in RUNS}


def test_a_gap_to_a_weak_teacher_is_not_defined_and_the_text_says_why() -> None:
    assert gap_text(results(0.4, 0.5, 0.6)) == "not defined: the teacher is not better than the student alone"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.8, 0.5, 0.7), "helped in this run: mean Dice 0.500 alone, 0.700 distilled"),
        ((0.8, 0.5, 0.7), "better in 2 of 2 test cases; 67 % of the gap"),
        ((0.8, 0.5, 0.4), "did not help"),
        ((0.8, 0.5, 0.502), "made no difference"),
        ((0.4, 0.5, 0.7), "nothing to distil"),
    ],
)
def test_the_verdict_is_honest(scores: tuple[float, float, float], words: str) -> None:
    assert words in verdict(results(*scores))


def test_the_table_has_a_row_per_organ_and_a_dash_for_an_organ_that_no_case_has() -> None:
    rows = table(results(0.8, 0.5, 0.7), ["liver", "spleen"])

    assert rows[0] == ["liver", "0.800", "0.500", "0.700", "3.0", "3.0", "3.0"]
    assert rows[1] == ["spleen", "-", "-", "-", "4.0", "4.0", "4.0"]
    assert rows[2] == ["mean", "0.800", "0.500", "0.700", "3.5", "3.5", "3.5"]
    assert rows[3:] == [["parameters"] + ["1.00 M"] * 3, ["seconds per case"] + ["2.00"] * 3]


def test_the_gap_is_that_of_the_results() -> None:
    assert gap_text(results(0.75, 0.5, 0.25)) == "-100 % of 0.250 mean Dice"


def test_scores_are_read_by_case_and_organ(tmp_path: Path) -> None:
    for name in ("mean_dice", "hd95"):
        (tmp_path / f"val_{name}_raw.csv").write_text("filename,class0,class1,mean\na,0.1,0.3,0.2\nb,nan,0.5,0.5\n")

    result = read_result(tmp_path, 7, 2.0)

    assert result.organs("dice") == [0.1, 0.4]
    assert result.cases("hd95") == [0.2, 0.5]
    assert (result.overall("dice"), result.parameters, result.seconds) == (0.25, 7, 2.0)
