# SPDX-License-Identifier: Apache-2.0
"""The main metric against the number of labeled cases: student alone, distilled, and plain distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lab.recipe import ALONE, Arm, Row
from lab.regimes import Regime

__all__ = [
    "DISTILLED", "PLAIN", "TOLD", "alone_arms", "alone_values", "complete_curves", "labels_worth", "make_curve",
    "taught_arms",
]

DISTILLED, PLAIN = "distilled", "logits_kd"
TOLD = ("mean", "sd", "runs", "seeds", "validation", "metrics", "keys")      # of a training, in a point of a curve


def alone_arms(row: Row, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Student alone with each number of labeled cases but none, one seed."""
    if ALONE not in arms:
        return {}
    return {_name(ALONE, n): replace(arms[ALONE], seeds=1, regime=Regime(n)) for n in row.curve if n}


def taught_arms(row: Row, kind: str, chosen: Arm, candidate: str) -> dict[str, Arm]:
    """An arm, or one of its candidates, as `DISTILLED` or `PLAIN`, with each number of labeled cases, one seed."""
    arm = replace(chosen.candidates.get(candidate, chosen), candidates={}, seeds=1)
    return {_name(kind, n): replace(arm, regime=Regime(n, unlabeled=True)) for n in row.curve}


def make_curve(row: Row, arm: str, candidate: str, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the results tell of a curve; `values`: name of an arm of `alone_arms` or `taught_arms` -> summary."""
    names = (ALONE, DISTILLED, PLAIN)
    points = [
        {"labels": n, **{name: values[_name(name, n)] for name in names if _name(name, n) in values}} for n in row.curve
    ]
    return {"arm": arm, **({"candidate": candidate} if candidate else {}), "points": points}


def alone_values(points: Mapping[int, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Summaries of the student alone by labeled cases, as `make_curve` names them."""
    return {_name(ALONE, labels): value for labels, value in points.items()}


def _name(arm: str, labels: int) -> str:
    return f"{arm}_with_{labels}_labels"


def complete_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what they tell of each other.

    A point of a curve that is the regime of a row has its seeds and its plain distillation, and a regime without labels
    says what its teacher is worth.
    """
    made = [dict(row) for row in rows]
    for row in made:
        if "curve" in row:
            points = [_point(point, row, made) for point in row["curve"]["points"]]
            row["curve"] = {**row["curve"], "points": [point for point in points if len(point) > 1]}
    for row in made:
        curves = [one["curve"] for one in made if "curve" in one and _same_task(one, row)]
        if curves and DISTILLED in row and row.get("regime", {}).get("name") == "none":
            alone = [(one["labels"], one[ALONE]["mean"]) for one in curves[0]["points"] if ALONE in one]
            row["labels_worth"] = labels_worth(row[DISTILLED]["mean"], alone, row["higher_is_better"])
    return made


def _point(point: Mapping[str, Any], row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for other in rows:
        regime = other.get("regime")
        if not regime or "labels_of_teacher" in regime:            # of a teacher of its own
            continue
        if regime["labels"] == point["labels"] and regime["unlabeled"] and _same_task(row, other):
            same = (DISTILLED,) if other.get(DISTILLED, {}).get("arm") == row["curve"]["arm"] else ()
            names = [name for name in (ALONE, DISTILLED, PLAIN) if name in other and name in (*point, PLAIN, *same)]
            taken = {name: {key: other[name][key] for key in TOLD if key in other[name]} for name in names}
            return {**point, **taken, "row": other["id"]}
    return dict(point)


def _same_task(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("data", "overrides", "metric"))


def labels_worth(score: float, points: Sequence[tuple[int, float]], higher_is_better: bool = True) -> dict[str, Any]:
    """Number of labeled cases for which the student alone has a score: lines between its points, labels as logarithm.

    Args:
        score: of a student that was distilled.
        points: number of labeled cases, rising, 1 or more, and the score of the student alone with them.
        higher_is_better: of the score.

    Returns:
        `value`, or None with `more_than` or `fewer_than` where the score is beyond the points.

    Example:
        >>> labels_worth(0.65, [(1, 0.5), (4, 0.6), (9, 0.7)]), labels_worth(0.8, [(1, 0.5), (4, 0.6)])
        ({'value': 6}, {'value': None, 'more_than': 4})
    """
    sign = 1 if higher_is_better else -1
    if not points:
        return {"value": None, "reason": "the student alone was not trained with fewer labels"}
    before: tuple[int, float] | None = None
    for labels, value in points:
        if sign * value >= sign * score:
            if before is None:
                return {"value": labels} if value == score else {"value": None, "fewer_than": labels}
            share = (score - before[1]) / (value - before[1])
            return {"value": round(before[0] * (labels / before[0]) ** share)}
        before = labels, value
    return {"value": None, "more_than": points[-1][0]}
