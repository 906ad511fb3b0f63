# SPDX-License-Identifier: Apache-2.0
"""The picture of a results file: small, for any number of rows, and the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.figure import draw, draw_curve


def row(name: str) -> dict[str, Any]:
    arms = {"teacher": [0.85], "student_alone": [0.45, 0.55], "logits_kd": [0.25], "distilled": [0.6, 0.7, 0.65]}
    told = {arm: {"mean": sum(runs) / len(runs), "runs": runs} for arm, runs in arms.items()}
    return {"id": name, "metric": "val_mean_dice", **told}


def test_the_figure_is_small_and_drawn_for_any_number_of_rows(tmp_path: Path) -> None:
    for count in (1, 3, 4):
        content = {"bundle": "x", **row("a"), "rows": [row(f"ct_some_long_name_{n}") for n in range(1, count)]}
        draw(content, tmp_path / f"{count}.png")
        assert 5_000 < (tmp_path / f"{count}.png").stat().st_size < 200_000


def test_rows_that_were_only_searched_are_not_drawn(tmp_path: Path) -> None:
    draw({"rows": [{"id": "only searched"}]}, tmp_path / "none.png")

    assert not (tmp_path / "none.png").exists()


def test_the_figure_is_the_same_twice(tmp_path: Path) -> None:
    for name in "ab":
        draw(row("x"), tmp_path / f"{name}.png")

    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_curve_is_drawn_where_a_row_has_one_and_the_same_twice(tmp_path: Path) -> None:
    value = {"mean": 0.5, "sd": None, "runs": [0.5]}
    points: list[dict[str, Any]] = [{"labels": 0, "distilled": {**value, "sd": 0.02}}]
    points += [{"labels": n, "student_alone": value, "distilled": value} for n in (1, 4)]
    with_curve = {**row("x"), "data": "d", "curve": {"points": points}, "classical": {"mean": 0.3}}

    draw_curve({**row("y"), "rows": []}, tmp_path / "none.png")
    for name in "ab":
        draw_curve({**row("y"), "rows": [with_curve]}, tmp_path / f"{name}.png")

    assert not (tmp_path / "none.png").exists()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 5_000
