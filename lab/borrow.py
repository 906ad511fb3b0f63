# SPDX-License-Identifier: Apache-2.0
"""Arms that another bundle's results tell already, because the training is the same there: they are not repeated.

The same is what has the same key on both bundles (see `lab.keys`) and starts from no weights: a teacher that is
trained anew, on another processor, is not the one that taught the other bundle's students.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.bundle import freeze_bundle
from lab.convergence import WATCHED, steps_of
from lab.keys import run_key
from lab.plan import make_run
from lab.recipe import ALONE, TEACHER, Row, read_recipe
from lab.record import all_rows, read_results
from lab.training import Run, Study

__all__ = ["Borrowed", "borrow"]


@dataclass(frozen=True)
class Borrowed:
    """What a row takes from another bundle's results."""

    bundle: str = ""
    arms: Mapping[str, dict[str, Any]] = field(default_factory=dict)   # as they stand in the results
    steps: dict[str, int] = field(default_factory=dict)                # of these
    converged: Mapping[str, Any] = field(default_factory=dict)         # with the student alone, what its row says
    alone: Mapping[int, dict[str, Any]] = field(default_factory=dict)  # its curve: labeled cases -> summary

    def told(self) -> dict[str, Any]:
        """What the row says of it; nothing where nothing was borrowed."""
        return {"borrowed": {"bundle": self.bundle, "arms": list(self.arms)}} if self.arms else {}


def borrow(study: Study, root: Path, recipes: Path) -> Borrowed:
    """Find the arms of a row that the results of `row.borrow` hold; of a row that borrows nothing there are none.

    Args:
        study: the row.
        root: of the repository, with `bundles` and `results`.
        recipes: folder of the recipes.

    Raises:
        ValueError: the other bundle has no such row, in its recipe or in its results.
    """
    if not study.row.borrow:
        return Borrowed()
    bundle, _, told = study.row.borrow.partition("/")
    row_id = told or study.row.id
    recipe = read_recipe(root / "bundles" / bundle, recipes)
    rows = {row["id"]: row for row in all_rows(read_results(root / "results" / f"{bundle}.json"))}
    if row_id not in recipe.rows or TEACHER not in rows.get(row_id, {}):
        raise ValueError(
            f"`borrow` of row {study.row.id!r} must name a finished row of another bundle, got {study.row.borrow!r}."
        )
    source = freeze_bundle(root / "bundles" / bundle, study.folder / "source")
    other, row = replace(study, recipe=recipe, row=recipe.rows[row_id], source=source), rows[row_id]
    alike = {name for name in study.row.arms if name in row and _is_alike(name, study, other, row)}
    free = [name for name in study.row.arms if name in alike and name != TEACHER and not _first(name, study).weights_of]
    arms, steps = {name: row[name] for name in free}, {name: row["steps"][name] for name in free}
    if ALONE not in arms:
        return Borrowed(bundle, arms, steps)
    other_arms = {*WATCHED} - (alike if TEACHER in alike else {ALONE})     # whose convergence may be another here
    converged = {key: value for key, value in row["converged"].items() if key not in other_arms}
    points = row.get("curve", {}).get("points", ())
    alone = {point["labels"]: point[ALONE] for point in points if ALONE in point}
    return Borrowed(bundle, arms, steps, converged, alone)


def _is_alike(name: str, study: Study, other: Study, told: Mapping[str, Any]) -> bool:
    """Whether an arm is trained alike in both, and told as it would be now."""
    if name not in other.row.arms or study.row.arms[name].candidates or not _same_data(study.row, other.row):
        return False
    run, there = _first(name, study), _first(name, other)
    seeds = list(study.row.seeds[: study.row.arms[name].seeds])
    if told[name]["seeds"][: len(seeds)] != seeds or told["steps"].get(name) != steps_of(run, study):
        return False
    key, key_there = run_key(study.bundle_run("training", run)), run_key(other.bundle_run("training", there))
    return run.regime == there.regime and key == key_there


def _first(name: str, study: Study) -> Run:
    return make_run(study, name, study.row.arms[name], study.row.seeds[0])


def _same_data(one: Row, other: Row) -> bool:
    return (one.data, one.datalist, one.test, one.patient) == (other.data, other.datalist, other.test, other.patient)
