# SPDX-License-Identifier: Apache-2.0
"""What is trained for a bundle: arms (what is compared) and rows (on which data, how long), read from a JSON file.

`recipes/<bundle>.json` replaces keys of `recipes/default.json`:

    metric             file name of the main metric, as evaluate.json saves it
    higher_is_better   true or false
    default            id of the row that stands at the top level of the results
    distilled_from     arms of which the best one on validation, with the first seed, is called `distilled` and gets
                       the other seeds
    arms, ablations    name -> arm, below; ablations and arms with "seeds": 1 run with the first seed only
    helpers            name -> arm that is trained once and never evaluated, such as a head of the teacher
    rows               id -> row, below; the id is the name of the DATA folder, or the row names that as `data`

An arm is train.json with `overrides` (names of configs) and `options` (keys and values). With `candidates` (name ->
arm) the best one on validation, with the first seed, gets the other seeds. `weights_of` (config key -> arm) names the
weights it needs; an arm that distils needs {"teacher_path": "teacher"} unless it says otherwise.

A row has `overrides` (right behind train.json), `options`, `epochs` and `val_interval` (each {"teacher": n, "student":
n}), `seeds`, `preset`, `inference` and `evaluate` (config names), `arms` (what differs from the recipe's arms in this
row), `data` (the DATA folder, which rows may share with their trainings; its first row has the search), `test` (regular
expression: only test cases whose name it is found in count), `patient` (regular expression: cases with the same group
are averaged to one), `parts` (values of a case's parts, such as blocks, count as cases), `datalist` (arguments of
`medkd.data.datalist.make_datalist`), `ship` (copy the student into the bundle), `calibrate` (an option of the
evaluation -> values: every network is told about with the one that is best on validation), and `search` (name -> arm,
see `make results SEARCH=1`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

__all__ = ["TEACHER", "Arm", "Recipe", "Row", "read_recipe"]

TEACHER = "teacher"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arm:
    """One thing that is compared; see the top of this file."""

    overrides: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None
    candidates: Mapping[str, Arm] = field(default_factory=dict)
    weights_of: Mapping[str, str] | None = None

    def changed(self, more: Arm) -> Arm:
        """This arm with what `more` brings: its overrides and options come behind."""
        return Arm(
            (*self.overrides, *more.overrides),
            {**self.options, **more.options},
            more.seeds or self.seeds,
            {**self.candidates, **more.candidates},
            more.weights_of if more.weights_of is not None else self.weights_of,
        )


@dataclass(frozen=True)
class Row:
    """One data set and schedule; see the top of this file."""

    id: str
    data: str = ""
    preset: str = "default"
    overrides: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)
    val_interval: Mapping[str, int] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    inference: str = "inference.json"
    evaluate: Sequence[str] = ("evaluate",)
    arms: Mapping[str, Arm] = field(default_factory=dict)
    test: str | None = None
    patient: str | None = None
    parts: bool = False
    datalist: Mapping[str, Any] = field(default_factory=dict)
    ship: bool = False
    calibrate: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    search: Mapping[str, Arm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.calibrate) > 1:
            raise ValueError(f"`calibrate` of row {self.id!r} must name one option, got {sorted(self.calibrate)}.")
        object.__setattr__(self, "data", self.data or self.id)

    def schedule(self, arm: str) -> dict[str, int]:
        """Options of the length of a training."""
        kind = TEACHER if arm == TEACHER else "student"
        given = {"epochs": self.epochs, "val_interval": self.val_interval}
        return {name: numbers[kind] for name, numbers in given.items() if kind in numbers}


@dataclass(frozen=True)
class Recipe:
    """All of a bundle; see the top of this file."""

    metric: str
    higher_is_better: bool
    default: str | None
    distilled_from: Sequence[str]
    arms: Mapping[str, Arm]
    ablations: Mapping[str, Arm]
    helpers: Mapping[str, Arm]
    rows: Mapping[str, Row]

    def rows_of(self, data: str) -> list[Row]:
        """The rows of a DATA folder; one without a row of its own is run as the configs stand."""
        return [row for row in self.rows.values() if row.data == data] or [Row(data)]

    def arms_of(self, row: Row) -> dict[str, Arm]:
        """All that is trained for a row, the teacher first."""
        everything = {**self.helpers, **self.arms, **self.ablations}
        unknown = row.arms.keys() - everything.keys()
        if unknown:
            raise ValueError(f"`arms` of row {row.id!r} must be arms of the recipe, got {sorted(unknown)}.")
        changed = {name: arm.changed(row.arms[name]) if name in row.arms else arm for name, arm in everything.items()}
        return {TEACHER: changed.pop(TEACHER), **changed}

    def drop_idle_helpers(self, arms: Mapping[str, Arm]) -> dict[str, Arm]:
        """These arms without the helpers that none of them starts from."""
        wanted = {name for arm in arms.values() for name in (arm.weights_of or {}).values()}
        return {name: arm for name, arm in arms.items() if name not in self.helpers or name in wanted}


def read_recipe(bundle: Path, folder: Path = HERE / "recipes") -> Recipe:
    """Read the recipe of a bundle; without one, the default recipe with the arms whose configs the bundle has.

    Args:
        bundle: folder of the bundle.
        folder: where the recipes are.

    Raises:
        ValueError: an unknown key, or a config that the bundle does not have.
    """
    content = json.loads((folder / "default.json").read_text())
    own = folder / f"{bundle.name}.json"
    if own.exists():
        content |= json.loads(own.read_text())
    else:
        content["arms"] = {
            name: arm for name, arm in content["arms"].items()
            if all((bundle / "configs" / f"{config}.json").exists() for config in _configs(arm))
        }
    arms = {kind: _arms(content.pop(kind), kind) for kind in ("arms", "ablations", "helpers")}
    for kind in ("ablations", "helpers"):
        arms[kind] = {name: replace(arm, seeds=1) for name, arm in arms[kind].items()}
    rows = {name: _row(name, value) for name, value in content.pop("rows").items()}
    recipe: Recipe = _make(Recipe, content | arms | {"rows": rows}, own.name)
    if own.exists():
        _check_names(recipe, own.name)
    _check_configs(recipe, bundle)
    return recipe


def _check_names(recipe: Recipe, file: str) -> None:
    """Refuse what names no arm or row, before anything is trained."""
    needed = [name for arm in _all_arms(recipe) for name in (arm.weights_of or {}).values()]
    for key, names, known, what in (
        ("arms", [TEACHER], recipe.arms, "have an arm"),
        ("distilled_from", recipe.distilled_from, recipe.arms, "name arms"),
        ("weights_of", needed, recipe.arms | recipe.helpers, "name arms or helpers"),
        ("default", [recipe.default] if recipe.default else [], recipe.rows, "name a row"),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"`{key}` of {file} must {what}, got {name!r}; there are: {', '.join(known)}.")
    for row in recipe.rows.values():
        if row.patient and re.compile(row.patient).groups != 1:
            raise ValueError(f"`patient` of row {row.id} in {file} must have one group, got {row.patient!r}.")
        if any(arm.candidates or arm.seeds for arm in row.search.values()):
            raise ValueError(f"`search` of row {row.id} in {file} must have no `candidates` and no `seeds`.")


def _configs(arm: Mapping[str, Any]) -> list[str]:
    inner = [name for candidate in arm.get("candidates", {}).values() for name in _configs(candidate)]
    return [*arm.get("overrides", ()), *inner]


def _arms(content: Mapping[str, Any], what: str) -> dict[str, Arm]:
    made = {}
    for name, value in content.items():
        candidates = _arms(value.get("candidates", {}), f"{what} {name}")
        made[name] = _make(Arm, value | {"candidates": candidates}, f"{what} {name}")
    return made


def _row(name: str, content: Mapping[str, Any]) -> Row:
    arms = {key: _arms(content.get(key, {}), f"{key} of row {name}") for key in ("arms", "search")}
    made: Row = _make(Row, {**content, **arms, "id": name}, f"row {name}")
    return made


def _make(kind: Any, content: Mapping[str, Any], what: str) -> Any:
    known = {one.name for one in fields(kind)}
    if content.keys() - known:
        raise ValueError(f"{what} must have keys of {sorted(known)}, got {sorted(content.keys() - known)}.")
    return kind(**content)


def _all_arms(recipe: Recipe) -> list[Arm]:
    """Arms of the recipe and of its rows, with their candidates."""
    arms = [*recipe.arms.values(), *recipe.ablations.values(), *recipe.helpers.values()]
    for row in recipe.rows.values():
        arms += [*row.arms.values(), *row.search.values()]
    return arms + [candidate for arm in arms for candidate in arm.candidates.values()]


def _check_configs(recipe: Recipe, bundle: Path) -> None:
    names = {name for arm in _all_arms(recipe) for name in arm.overrides}
    for row in recipe.rows.values():
        names |= {*row.overrides, *row.evaluate, row.inference.removesuffix(".json")}
    for name in sorted(names):
        if not (bundle / "configs" / f"{name}.json").is_file():
            raise ValueError(f"`overrides` must name configs of {bundle.name}, got {name!r}: no configs/{name}.json.")
