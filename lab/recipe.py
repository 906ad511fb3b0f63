# SPDX-License-Identifier: Apache-2.0
"""What is trained for a bundle: arms (what is compared) and rows (on which data, how long), read from a JSON file.

`results/recipes/<bundle>.json` says what differs from `results/recipes/default.json`. Its keys are the fields of
`Recipe`; `helpers`, `arms` and `ablations` hold name -> arm, and `rows` id -> row. The keys of a row are the fields of
`Row`, those of an arm the fields of `Arm`, and options, that is keys of train.json, such as
"distill_weights#boundary": 5. A `regime` is {"labels": "all" or a number, "unlabeled": true or false}. A row that is
`like` another has from that what it does not say. What an arm does not say it has from the arm of the same name in
default.json, a candidate from its arm, and an arm of a row from that of the recipe: options come to those, the rest
replaces it. null takes an inherited arm away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lab.bundle import ROOT
from lab.classical import RULES
from lab.keys import lookup
from lab.regimes import ALL_LABELS, Regime, make_regime

__all__ = ["ALONE", "TEACHER", "Arm", "Recipe", "Row", "read_recipe"]

TEACHER, ALONE = "teacher", "student_alone"
_OF_AN_ARM = ("overrides", "seeds", "candidates", "weights_of", "regime")


@dataclass(frozen=True)
class Arm:
    """One thing that is compared."""

    overrides: Sequence[str] = ()                                      # names of configs
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None                                           # with 1 it runs with the first seed only
    candidates: Mapping[str, Arm] = field(default_factory=dict)        # best on validation with seed 1 gets the others
    weights_of: Mapping[str, str] | None = None    # config key -> arm; None: {"teacher_path": "teacher"} if it distils
    regime: Regime | None = None                                       # None: the row's; of the teacher all labels


@dataclass(frozen=True)
class Row:
    """One data set and schedule."""

    id: str
    data: str = ""                         # name of the DATA folder, else the id; rows of one folder share trainings
    preset: str = "default"
    overrides: Sequence[str] = ()                                      # right behind train.json
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)            # {"teacher": n, "student": n}
    val_interval: Mapping[str, int] = field(default_factory=dict)      # likewise
    seeds: Sequence[int] = (0, 1, 2)
    regime: Regime = ALL_LABELS            # of what distils; what learns from labels alone has all where there are none
    curve: Sequence[int] = ()              # labeled cases with which student alone and `distilled` are trained
    classical: str | None = None           # name in `lab.classical.RULES`: the best that filters without training do
    leaks: Sequence[str] = ()              # likewise: rules that ignore the image
    inference: Sequence[str] = ()                                      # overrides of inference.json
    evaluate: Sequence[str] = ("evaluate",)                            # overrides of train.json, for the evaluation
    arms: Mapping[str, Arm] = field(default_factory=dict)              # what differs in this row; here complete
    test: str | None = None                # regular expression: only test cases whose name it is found in count
    patient: str | None = None             # regular expression: cases with the same group are averaged to one
    datalist: Mapping[str, Any] = field(default_factory=dict)          # arguments of `make_datalist`; `class_folders`
    ship: bool = False                                                 # copy the student into the bundle
    detail: bool = False                   # told on the bundle's page of results alone, such as a row of ablations
    borrow: str = ""                       # bundle, or bundle/row, whose results tell arms of the same training already
    calibrate: Mapping[str, Sequence[Any]] = field(default_factory=dict)   # option of the evaluation -> values; told
    #                                        about every network is the one that is best on validation
    search: Mapping[str, Arm] = field(default_factory=dict)            # for `make results SEARCH=1`, in the first row

    def __post_init__(self) -> None:
        if len(self.calibrate) > 1:
            raise ValueError(f"`calibrate` of row {self.id!r} must name one option, got {sorted(self.calibrate)}.")
        if self.patient and re.compile(self.patient).groups != 1:
            raise ValueError(f"`patient` of row {self.id!r} must have one group, got {self.patient!r}.")
        if any(arm.candidates or arm.seeds for arm in self.search.values()):
            raise ValueError(f"`search` of row {self.id!r} must have no `candidates` and no `seeds`.")
        object.__setattr__(self, "data", self.data or self.id)
        object.__setattr__(self, "regime", make_regime(self.regime))
        if self.calibrate and self.regime.labels == 0:
            raise ValueError(f"`calibrate` of row {self.id!r} must be absent where there are no labels to choose by.")
        if list(self.curve) != sorted({*self.curve}) or any(one < 0 for one in self.curve):
            raise ValueError(f"`curve` of row {self.id!r} must be rising numbers of cases, got {list(self.curve)}.")
        unknown = [name for name in (self.classical, *self.leaks) if name and name not in RULES]
        if unknown:
            raise ValueError(f"`classical` and `leaks` of row {self.id!r} must be of {sorted(RULES)}, got {unknown}.")

    def schedule(self, arm: str) -> dict[str, int]:
        """Options of the length of a training."""
        kind = TEACHER if arm == TEACHER else "student"
        given = {"epochs": self.epochs, "val_interval": self.val_interval}
        return {name: numbers[kind] for name, numbers in given.items() if kind in numbers}


@dataclass(frozen=True)
class Recipe:
    """All of a bundle."""

    metric: str                            # file name of the main metric, as evaluate.json saves it
    higher_is_better: bool
    default: str | None                    # id of the row that stands at the top level of the results
    distilled_from: Sequence[str]          # arms; `distilled` is the best on validation, and gets the other seeds
    arms: Mapping[str, Arm]                # those of a row without changes, of all three kinds, the teacher first
    ablations: frozenset[str] = frozenset()    # names of arms with the first seed only
    helpers: frozenset[str] = frozenset()      # names of arms that are trained once and never evaluated
    rows: Mapping[str, Row] = field(default_factory=dict)

    def rows_of(self, data: str) -> list[Row]:
        """The rows of a DATA folder; one without a row of its own is run as the configs stand."""
        return [row for row in self.rows.values() if row.data == data] or [Row(data, arms=self.arms)]

    def drop_idle_helpers(self, arms: Mapping[str, Arm]) -> dict[str, Arm]:
        """These arms without the helpers that none of them starts from."""
        wanted = {name for arm in arms.values() for name in (arm.weights_of or {}).values()}
        return {name: arm for name, arm in arms.items() if name not in self.helpers or name in wanted}


def read_recipe(bundle: Path, folder: Path = ROOT / "results" / "recipes") -> Recipe:
    """Read the recipe of a bundle; without one, the default recipe with the arms whose configs the bundle has.

    Raises:
        ValueError: an unknown key, or a config that the bundle does not have.
    """
    content = json.loads((folder / "default.json").read_text())
    file = folder / f"{bundle.name}.json"
    own = json.loads(file.read_text()) if file.exists() else {}
    if not own:
        there = {path.stem for path in (bundle / "configs").glob("*.json")}
        content["arms"] = {name: arm for name, arm in content["arms"].items() if there >= {*arm.get("overrides", ())}}
    kinds = {kind: _inherit(content.pop(kind), own.pop(kind, {})) for kind in ("helpers", "arms", "ablations")}
    once = {"seeds": 1}
    arms = {name: arm if kind == "arms" else arm | once for kind, of in kinds.items() for name, arm in of.items()}
    if TEACHER not in arms:
        raise ValueError(f"`arms` of {file.name} must have an arm {TEACHER!r}, got {sorted(arms)}.")
    rows = {name: _row(name, row, arms) for name, row in _likened(own.pop("rows", {})).items()}
    content["distilled_from"] = [name for name in content["distilled_from"] if name in arms]
    told = content | own | {kind: frozenset(kinds[kind]) for kind in ("ablations", "helpers")}
    recipe: Recipe = _make(Recipe, told | {"arms": _arms(arms), "rows": rows}, file.name)
    _check(recipe, bundle, file.name)
    return recipe


def _inherit(before: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arms with what `own` changes, all as in the file."""
    together = {**before, **own}
    return {name: {**before.get(name, {}), **(arm or {})} for name, arm in together.items() if arm is not None}


def _likened(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows with what they have from the row that they are `like`."""
    made = {}
    for name, row in rows.items():
        like = row.get("like")
        if like is not None and ("like" in rows.get(like, {"like": like})):
            known = [one for one, other in rows.items() if "like" not in other]
            raise ValueError(f"`like` of row {name!r} must name a row that is like no other, of {known}, got {like!r}.")
        made[name] = {**(rows[like] if like else {}), **{key: row[key] for key in row if key != "like"}}
    return made


def _arms(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Arm]:
    """Arms as objects, the teacher first; a candidate has from its arm what it does not say."""
    made = {}
    for name in sorted(content, key=lambda name: name != TEACHER):
        inherited = {key: value for key, value in content[name].items() if key != "candidates"}
        candidates = {one: {**inherited, **own} for one, own in content[name].get("candidates", {}).items()}
        told = {key: inherited.pop(key) for key in _OF_AN_ARM if key in inherited}
        told |= {"regime": make_regime(told["regime"])} if told.get("regime") else {}
        made[name] = Arm(options=inherited, candidates=_arms(candidates), **told)
    return made


def _row(name: str, content: Mapping[str, Any], arms: Mapping[str, Any]) -> Row:
    unknown = content.get("arms", {}).keys() - arms.keys()
    if unknown:
        raise ValueError(f"`arms` of row {name!r} must be arms of the recipe, got {sorted(unknown)}.")
    own = {"arms": _arms(_inherit(arms, content.get("arms", {}))), "search": _arms(content.get("search", {}))}
    made: Row = _make(Row, {**content, **own, "id": name}, f"row {name}")
    return made


def _make(kind: Any, content: Mapping[str, Any], what: str) -> Any:
    known = {one.name for one in fields(kind)}
    if content.keys() - known:
        raise ValueError(f"{what} must have keys of {sorted(known)}, got {sorted(content.keys() - known)}.")
    return kind(**content)


def _check(recipe: Recipe, bundle: Path, file: str) -> None:
    """Refuse what names no arm, row, config or option, before anything is trained."""
    rows = recipe.rows.values()
    groups = [recipe.arms, *(row.arms for row in rows), *(row.search for row in rows)]
    arms = [item for group in groups for item in group.items()]
    arms += [(f"{name} {candidate}", one) for name, arm in arms for candidate, one in arm.candidates.items()]
    configs = [name for _, arm in arms for name in arm.overrides]
    configs += [name for row in rows for name in (*row.overrides, *row.evaluate, *row.inference)]
    needed = [name for _, arm in arms for name in (arm.weights_of or {}).values()]
    for key, names, known, what in (
        ("distilled_from", recipe.distilled_from, recipe.arms.keys() - recipe.helpers, "name arms"),
        ("weights_of", needed, recipe.arms.keys(), "name arms or helpers"),
        ("default", [recipe.default] if recipe.default else [], recipe.rows.keys(), "name a row"),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"`{key}` of {file} must {what}, got {name!r}; there are: {', '.join(known)}.")
    for name in sorted(configs):
        if not (bundle / "configs" / f"{name}.json").is_file():
            raise ValueError(f"`overrides` must name configs of {bundle.name}, got {name!r}: no configs/{name}.json.")
    train = json.loads((bundle / "configs" / "train.json").read_text())
    options = [(name, arm.options) for name, arm in arms] + [(f"row {row.id}", row.options) for row in rows]
    for name, told in options:
        wrong = sorted(key for key in told if not lookup(train, key))
        if wrong:
            raise ValueError(f"{name!r} must have keys {_OF_AN_ARM} or options of train.json, got {wrong}.")
