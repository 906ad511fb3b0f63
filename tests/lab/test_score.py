# SPDX-License-Identifier: Apache-2.0
"""Score files, names of cases, and the recovered gap with its interval."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lab.score import columns_of, gained, gap_recovered, read_scores, read_table


def test_scores_are_read_per_case_and_averaged_per_patient(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text(
        "filename,class0,mean\n/d/liver_1_7.nii.gz,1,0.2\n/d/liver_1_8.nii.gz,1,0.4\n/d/liver_2_1.nii.gz,nan,nan\n"
    )

    assert read_scores(tmp_path, "classes") == {"val_x": {"liver_1_7": 0.2, "liver_1_8": 0.4}}
    assert read_scores(tmp_path, "classes", r"liver_(\d+)")["val_x"] == {"1": pytest.approx(0.3)}


def test_blocks_of_chosen_cases_count_as_cases(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text(
        "filename,class0,class1,mean\n/d/cube_a.nii.gz,0.1,0.3,0.2\n/d/cube_b.nii.gz,nan,0.7,0.7\n"
    )

    assert read_scores(tmp_path, "case", test="_a$") == {"val_x": {"cube_a": 0.2}}
    assert read_scores(tmp_path, "blocks")["val_x"] == {"cube_a 1": 0.1, "cube_a 2": 0.3, "cube_b 2": 0.7}
    assert read_scores(tmp_path, "blocks", test="_b$") == {"val_x": {"cube_b 2": 0.7}}


def test_cases_of_one_name_in_different_folders_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text("filename,mean\n/d/p1/ct.nii.gz,0.2\n/d/p2/ct.nii.gz,0.4\n")

    assert read_scores(tmp_path, "case")["val_x"] == {"p1/ct": 0.2, "p2/ct": 0.4}
    assert read_scores(tmp_path, "case", r"^p(\d)")["val_x"] == {"1": 0.2, "2": 0.4}


def test_the_columns_of_a_score_file_are_read_in_the_order_of_their_classes(tmp_path: Path) -> None:
    path = tmp_path / "val_mean_dice_raw.csv"
    path.write_text("filename,class0,class10,class2,mean\na,0.1,0.3,0.2,0.2\nb,1.0,nan,0.5,0.75\n")

    first, second = read_table(path).values()

    assert first == ([0.1, 0.2, 0.3], 0.2)
    assert second[0][:2] == [1.0, 0.5]
    assert math.isnan(second[0][2])


def test_a_metric_of_all_cases_has_one_value(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text("filename,class0,mean\na.png,1.0,1.0\n")
    (tmp_path / "metrics.csv").write_text("val_x,0.9\nval_auc,0.75\nval_kappa,nan\n")
    assert read_scores(tmp_path, "classes") == {"val_x": {"a": 1.0}, "val_auc": {"all": 0.75}}
    assert read_scores(tmp_path, "classes", test="a") == {"val_x": {"a": 1.0}}


@pytest.mark.parametrize("config", [{}, {"score_columns": "organs"}, {"score_columns": None}])
def test_an_evaluation_that_does_not_say_what_its_columns_are_is_refused(config: dict[str, str]) -> None:
    assert columns_of({"score_columns": "blocks"}) == "blocks"
    with pytest.raises(ValueError, match=r"`score_columns` of evaluate.json must be of \('classes', 'blocks'"):
        columns_of(config)


def test_the_gap_of_equal_cases_and_seeds_has_no_spread() -> None:
    gap = gap_recovered([0.8] * 4, [[0.4] * 4] * 2, [[0.6] * 4] * 2)

    assert gap == {"value": 0.5, "low": 0.5, "high": 0.5, "left_out": 0.0}


def test_the_interval_of_two_seeds_is_that_of_their_four_pairs() -> None:
    # seeds of the distilled student give 0.25 and 0.75 of the gap; a draw is 0.25, 0.5 or 0.75 with 1/4, 1/2, 1/4
    gap = gap_recovered([0.8] * 4, [[0.4] * 4] * 2, [[0.5] * 4, [0.7] * 4])

    assert (gap["value"], gap["low"], gap["high"]) == (0.5, 0.25, 0.75)


def test_the_gap_is_the_same_every_time_and_for_a_metric_that_falls() -> None:
    teacher, alone, distilled = [0.8, 0.9, 0.7, 0.6], [[0.4, 0.5, 0.6, 0.3]], [[0.5, 0.6, 0.6, 0.4]]
    flipped = [[[1 - value for value in run] for run in runs] for runs in ([teacher], alone, distilled)]

    first = gap_recovered(teacher, alone, distilled)
    second = gap_recovered(flipped[0][0], flipped[1], flipped[2], higher_is_better=False)

    assert first == gap_recovered(teacher, alone, distilled)
    assert (first["value"], first["low"], first["high"]) == (second["value"], second["low"], second["high"])
    assert first["low"] < first["value"] < first["high"]


def test_cases_of_one_patient_are_drawn_together() -> None:
    teacher, alone, distilled = [0.8, 0.9, 0.7, 0.6], [[0.4, 0.5, 0.6, 0.3]], [[0.5, 0.6, 0.6, 0.4]]
    twice = [teacher * 2, [alone[0] * 2], [distilled[0] * 2]]

    first = gap_recovered(teacher, alone, distilled, groups=["a", "b", "c", "d"])

    assert first == gap_recovered(teacher, alone, distilled)
    assert gap_recovered(*twice, groups=["a", "b", "c", "d"] * 2) == first
    assert gap_recovered(*twice)["high"] < first["high"]
    assert gap_recovered(*twice, groups=["a", "b", "c", "c"] * 2)["low"] is None


def test_a_student_may_become_worse() -> None:
    assert gap_recovered([0.75], [[0.5]], [[0.25]])["value"] == -1.0
    assert gap_recovered([0.75], [[0.5]], [[0.625]])["value"] == 0.5
    assert gap_recovered([0.5], [[0.5]], [[0.6]])["value"] is None


def test_there_is_no_gap_when_the_teacher_is_not_better_by_more_than_the_sd() -> None:
    gap = gap_recovered([0.5] * 4, [[0.3] * 4, [0.6] * 4], [[0.9] * 4])

    assert gap["value"] is gap["low"] is None
    assert "0.0500 against 0.2121" in gap["reason"]


def test_three_cases_have_no_interval() -> None:
    gap = gap_recovered([0.8] * 3, [[0.4] * 3], [[0.6] * 3])

    assert (gap["value"], gap["low"]) == (0.5, None)
    assert "too few" in gap["reason"]


def test_draws_without_a_gap_are_left_out_and_counted() -> None:
    gap = gap_recovered([0.9, 0.1, 0.9, 0.1], [[0.4, 0.5, 0.4, 0.5]], [[0.5, 0.5, 0.5, 0.5]])

    assert gap["value"] == pytest.approx(1.0)
    assert gap["low"] is None
    assert "30 % of the draws of cases and seeds the teacher is not better" in gap["reason"]
    rarely = gap_recovered([0.9, 0.38, 0.9, 0.9], [[0.4, 0.5, 0.4, 0.5]], [[0.5, 0.5, 0.5, 0.5]])
    assert 0 < rarely["left_out"] < 0.025
    assert rarely["low"] < rarely["value"] < rarely["high"]


def test_a_gain_is_drawn_over_patients_and_not_over_their_pictures() -> None:
    """Two patients of each kind; drawn one by one, the pictures of a patient would tell more than they do."""
    one, other = [[1.0] * 20 + [0.0] * 20], [[0.5] * 40]
    patients = [f"p{number // 10}" for number in range(40)]
    found, by_picture = gained(one, other, patients), gained(one, other, [str(number) for number in range(40)])
    assert found == {"value": 0.0, "low": -0.5, "high": 0.5}
    assert by_picture["high"] < 0.2
    assert gained(one, other, patients, higher_is_better=False)["value"] == 0.0
    assert gained(one, other, ["a"] * 20 + ["b"] * 20) == {"value": 0.0, "low": None, "high": None}


def test_a_gain_is_drawn_over_seeds_too() -> None:
    found = gained([[0.6] * 4, [0.8] * 4], [[0.5] * 4], list("abcd"))
    assert found == {"value": 0.2, "low": 0.1, "high": 0.3}
    falls = gained([[0.6] * 4, [0.8] * 4], [[0.5] * 4], list("abcd"), higher_is_better=False)
    assert falls == {"value": -0.2, "low": -0.3, "high": -0.1}
