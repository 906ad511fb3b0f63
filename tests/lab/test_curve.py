# SPDX-License-Identifier: Apache-2.0
"""The curve over labeled cases: nested trainings of one seed, rows' seeds where there are rows, labels' worth."""

from __future__ import annotations

from typing import Any

import pytest

from lab.curve import DISTILLED, PLAIN, alone_arms, complete_curves, labels_worth, make_curve, taught_arms
from lab.recipe import Arm, Row
from lab.regimes import Regime
from tests.lab.conftest import ARMS


def told(mean: float, *runs: float) -> dict[str, Any]:
    return {"mean": mean, "sd": 0.1 if runs else None, "runs": list(runs) or [mean]}


def test_a_curve_has_an_arm_for_each_number_and_kind_but_none_alone_without_labels() -> None:
    row = Row("a", curve=[0, 1, 4], arms=ARMS)
    alone, distilled = alone_arms(row, ARMS), taught_arms(row, DISTILLED, ARMS["logits_kd"], "foreground")
    plain = taught_arms(row, PLAIN, ARMS["logits_kd"], "uniform")

    assert [arm.regime for arm in alone.values()] == [Regime(1), Regime(4)]
    assert [arm.regime for arm in distilled.values()] == [Regime(n, unlabeled=True) for n in (0, 1, 4)]
    assert all(arm.seeds == 1 for arm in (*alone.values(), *distilled.values()))
    first = next(iter(distilled.values()))
    assert (first.overrides, first.options, first.candidates) == (("logits",), {"weighting": "f"}, {})
    assert next(iter(taught_arms(row, DISTILLED, Arm(("method",)), "").values())).overrides == ("method",)
    assert next(iter(plain.values())).options == {}                # of the other candidate
    values = {name: told(0.5) for name in (*alone, *distilled, *plain)}
    curve = make_curve(row, "logits_kd", "foreground", values)
    assert [sorted(point) for point in curve["points"]] == [
        ["distilled", "labels", "logits_kd"], *2 * [["distilled", "labels", "logits_kd", "student_alone"]]
    ]
    for name in [*plain, "student_alone_with_1_labels", "distilled_with_1_labels", "distilled_with_4_labels"]:
        del values[name]
    bare = make_curve(row, "logits_kd", "", values)
    assert [(point["labels"], "distilled" in point) for point in bare["points"]] == [(0, True), (1, False), (4, False)]
    (told_row,) = complete_curves([{"id": "a", "curve": bare}])
    assert [point["labels"] for point in told_row["curve"]["points"]] == [0, 4]      # 1 has no network at all


def make_rows() -> list[dict[str, Any]]:
    common = {"data": "d", "overrides": [], "metric": "dice", "higher_is_better": True}
    points = [{"labels": 0, "distilled": told(0.6)}]
    points += [{"labels": n, "student_alone": told(0.3 + n / 20), "distilled": told(0.7)} for n in (1, 4, 9)]
    whole = {"id": "all", "regime": {"name": "all", "labels": 9, "unlabeled": 5}, "student_alone": told(0.8, 0.7, 0.9),
             "distilled": told(0.85, 0.8, 0.9), "curve": {"arm": "method", "points": points}, **common}
    none = {"id": "none", "regime": {"name": "none", "labels": 0, "unlabeled": 5}, "student_alone": told(0.8),
            "distilled": told(0.65, 0.6, 0.7), **common}
    return [whole, none]


def test_points_that_are_rows_have_their_seeds_and_a_teacher_has_a_worth_in_labels() -> None:
    whole, none = complete_curves(make_rows())

    points = {point["labels"]: point for point in whole["curve"]["points"]}
    assert points[0] == {"labels": 0, "distilled": told(0.65, 0.6, 0.7), "row": "none"}
    assert points[9]["student_alone"] == told(0.8, 0.7, 0.9)
    assert points[4]["student_alone"] == told(0.5)
    assert none["labels_worth"] == {"value": 6}                    # half way from 0.5 with 4 to 0.8 with 9 labels
    assert "labels_worth" not in whole
    assert complete_curves([whole, none]) == [whole, none]


def test_a_row_gives_a_point_its_distilled_student_where_the_arm_is_the_same() -> None:
    whole, none = make_rows()
    whole["curve"]["points"][0] = {"labels": 0}
    for arm, names in (("method", {"labels", "row", "distilled"}), ("combined", {"labels", "row"})):
        none["distilled"]["arm"] = arm
        assert complete_curves([whole, none])[0]["curve"]["points"][0].keys() == names


def test_rows_of_other_data_or_old_ones_or_of_another_teacher_do_not_count() -> None:
    whole, none = make_rows()
    weaker = {**none, "regime": {**none["regime"], "labels_of_teacher": 1}}
    assert complete_curves([whole, weaker])[0]["curve"]["points"][0] == {"labels": 0, "distilled": told(0.6)}
    other = {**none, "data": "other"}
    old = {"id": "old", "data": "d", "metric": "dice", "overrides": []}
    assert complete_curves([whole, other, old])[1:] == [other, old]


@pytest.mark.parametrize(
    ("score", "points", "higher", "expected"),
    [
        (0.65, [(1, 0.5), (4, 0.6), (16, 0.7)], True, {"value": 8}),
        (0.55, [(1, 0.6), (2, 0.4), (9, 0.9)], True, {"value": None, "fewer_than": 1}),
        (0.6, [(1, 0.6)], True, {"value": 1}),
        (0.7, [(1, 0.5), (2, 0.65), (4, 0.6)], True, {"value": None, "more_than": 4}),
        (1.2, [(2, 1.5), (20, 1.0)], False, {"value": 8}),
        (0.5, [], True, {"value": None, "reason": "the student alone was not trained with fewer labels"}),
    ],
)
def test_labels_worth_is_read_off_the_curve(
    score: float, points: list[tuple[int, float]], higher: bool, expected: dict[str, Any]
) -> None:
    assert labels_worth(score, points, higher) == expected
