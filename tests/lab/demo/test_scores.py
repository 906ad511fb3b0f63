# SPDX-License-Identifier: Apache-2.0
"""What the demo says of its scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lab.demo.scores import (
    ALONE,
    DISTILLED,
    TEACHER,
    Result,
    gap_text,
    organ_table,
    read_result,
    summary_table,
    verdict,
    worth,
    worth_text,
)


def results(teacher: float, alone: float, distilled: float, **more: float) -> dict[str, Result]:
    """Results with 48, 4 and 4 labels; `more` holds students alone, such as _16=0.6."""
    dice = {TEACHER: (teacher, 48, 0), ALONE: (alone, 4, 0)}
    dice |= {f"{ALONE} with {name[1:]} labels": (value, int(name[1:]), 0) for name, value in more.items()}
    dice[DISTILLED] = distilled, 4, 40
    return {
        run: Result([[value, math.nan]] * 2, [[3.0, 4.0]] * 2, [[1.1, math.nan]] * 2, *counts, 10**6, 2.0)
        for run, (value, *counts) in dice.items()
    }


def test_a_gap_to_a_weak_teacher_is_not_defined_and_the_text_says_why() -> None:
    assert gap_text(results(0.4, 0.5, 0.6)) == "not defined: the teacher is not better than the student alone"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.8, 0.5, 0.7), "With 4 labeled cases, a teacher and 40 images without labels took the student from 0.500"),
        ((0.8, 0.5, 0.7), "to 0.700 mean Dice (teacher 0.800), better in 2 of 2 test cases; a student alone needs"),
        ((0.8, 0.5, 0.4), "did not help"),
        ((0.8, 0.5, 0.502), "made no difference"),
        ((0.4, 0.5, 0.7), "nothing to distil"),
    ],
)
def test_the_verdict_is_honest(scores: tuple[float, float, float], words: str) -> None:
    assert words in verdict(results(*scores))


@pytest.mark.parametrize(
    ("distilled", "answer"),
    [
        (0.45, (4, "fewer than")), (0.5, (4, "about")), (0.55, (8, "about")), (0.65, (28, "about")),
        (0.7, (48, "about")), (0.71, (48, "more than")),
    ],
)
def test_the_teacher_is_worth_the_labels_that_a_student_alone_needs(distilled: float, answer: tuple[int, str]) -> None:
    assert worth(results(0.8, 0.5, distilled, _16=0.6, _48=0.7)) == answer


def test_a_student_alone_that_got_worse_with_more_labels_does_not_hide_a_later_crossing() -> None:
    assert worth(results(0.8, 0.5, 0.6, _16=0.45, _48=0.7)) == (31, "about")


def test_the_worth_is_said_in_words() -> None:
    for distilled in (0.4, 0.504):
        text = worth_text(results(0.8, 0.5, distilled, _16=0.6))
        assert text == "nothing: the student alone with the same labels is as good"
    text = worth_text(results(0.8, 0.5, 0.55, _16=0.6))
    assert text == "a student alone needs about 8 labeled cases to be as good as the distilled one with 4"


def test_the_summary_has_a_row_per_network_with_what_it_learned_from() -> None:
    head, rows = summary_table(results(0.8, 0.5, 0.7, _16=0.6))

    assert head[1:4] == ["labels", "unlabeled", "Dice"]
    assert rows == [
        ["teacher", "48", "-", "0.800", "3.5", "1.10", "1.00 M", "2.00"],
        ["student alone", "4", "-", "0.500", "3.5", "1.10", "1.00 M", "2.00"],
        ["student alone", "16", "-", "0.600", "3.5", "1.10", "1.00 M", "2.00"],
        ["distilled student", "4", "40", "0.700", "3.5", "1.10", "1.00 M", "2.00"],
    ]


def test_the_table_has_a_row_per_organ_and_a_dash_for_an_organ_that_no_case_has() -> None:
    rows = organ_table(results(0.8, 0.5, 0.7), ["liver", "spleen"])

    assert rows == [
        ["liver", "0.800", "0.500", "0.700", "3.0", "3.0", "3.0"],
        ["spleen", "-", "-", "-", "4.0", "4.0", "4.0"],
        ["mean", "0.800", "0.500", "0.700", "3.5", "3.5", "3.5"],
    ]


def test_the_gap_is_that_of_the_results() -> None:
    assert gap_text(results(0.75, 0.5, 0.25)) == "-100 % of 0.250 mean Dice"


def test_scores_are_read_by_case_and_organ(tmp_path: Path) -> None:
    for name in ("mean_dice", "hd95", "volume_ratio"):
        (tmp_path / f"val_{name}_raw.csv").write_text("filename,class0,class1,mean\na,0.1,0.3,0.2\nb,nan,0.5,0.5\n")

    result = read_result(tmp_path, 4, 40, 7, 2.0)

    assert result.organs("dice") == [0.1, 0.4]
    assert result.cases("hd95") == [0.2, 0.5]
    assert (result.overall("volume"), result.labels, result.unlabeled) == (0.25, 4, 40)
    assert (result.overall("dice"), result.parameters, result.seconds) == (0.25, 7, 2.0)
