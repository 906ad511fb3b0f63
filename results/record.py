# SPDX-License-Identifier: Apache-2.0
"""The file results/<bundle>.json: its default row at the top level, all others in `rows`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from recipe import TEACHER, Recipe, Row
from summary import Scored, arm_summary, case_names, choose, gap_recovered

__all__ = [
    "ARMS", "all_rows", "choose_distilled", "chosen_runs", "make_row", "merge_row", "read_results", "shipped_of",
    "speed_facts", "split_names", "write_results",
]

ALONE, DISTILLED = "student_alone", "distilled"
ARMS = (TEACHER, ALONE, "logits_kd", "features_kd", DISTILLED)     # what every row has, for tables and pictures
Scores = Mapping[str, Mapping[str, Sequence[Scored]]]   # arm -> candidate ("" if there are none) -> runs


def make_row(recipe: Recipe, row: Row, scores: Scores, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that the results tell of a row.

    Args:
        recipe: of the bundle.
        row: of the recipe.
        scores: all runs of all arms that were evaluated.
        facts: further keys: splits, speed, hardware, versions, command.
    """
    arms = {name: _arm(candidates, recipe) for name, candidates in scores.items()}
    common = dict(row.options)
    for one in [told for arm in arms.values() for told in (arm, *arm.get("candidates", {}).values())]:
        one["options"] = {key: value for key, value in one["options"].items() if common.get(key, one) != value}
    content: dict[str, Any] = {
        "id": row.id, "data": row.data, "preset": row.preset, "splits": facts["splits"],
        "overrides": list(row.overrides), "options": common, "metric": recipe.metric,
        "higher_is_better": recipe.higher_is_better, "seeds": list(row.seeds),
    }
    content |= {name: arm for name, arm in arms.items() if name not in recipe.ablations}
    chosen = choose_distilled(recipe, arms)
    if chosen:
        content[DISTILLED] = {"arm": chosen, **arms[chosen]}
        content["gap_recovered"] = _gap(recipe, scores, arms, chosen)
    content["ablations"] = {name: arm for name, arm in arms.items() if name in recipe.ablations}
    return content | {name: facts[name] for name in facts if name != "splits"}


def chosen_runs(candidates: Mapping[str, Sequence[Scored]], recipe: Recipe) -> Sequence[Scored]:
    """The runs of an arm; of several candidates those of the best on validation."""
    return candidates[_best(candidates, recipe)]


def _best(candidates: Mapping[str, Sequence[Scored]], recipe: Recipe) -> str:
    """The candidate that the schedule chose: on validation, with the first seed."""
    first = {name: runs[0].trained.validation for name, runs in candidates.items()}
    return choose(first, recipe.higher_is_better)


def _arm(candidates: Mapping[str, Sequence[Scored]], recipe: Recipe) -> dict[str, Any]:
    best = _best(candidates, recipe)
    summary = arm_summary(candidates[best], recipe.metric)
    if len(candidates) > 1:
        tried = {name: arm_summary(runs[:1], recipe.metric) for name, runs in candidates.items()}
        kept = ("mean", "validation", "metrics", "options")
        others = {name: {key: one[key] for key in kept} for name, one in tried.items()}
        return {"candidate": best, **summary, "candidates": others}
    return summary


def choose_distilled(recipe: Recipe, arms: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The arm that is called `distilled`: on validation, with the first seed, as the schedule chose."""
    found = {name: arms[name]["validation"]["runs"][0] for name in recipe.distilled_from if name in arms}
    return choose(found, recipe.higher_is_better) if found else None


def _gap(recipe: Recipe, scores: Scores, arms: Mapping[str, Any], chosen: str) -> dict[str, Any]:
    runs = [chosen_runs(scores[name], recipe) for name in (TEACHER, ALONE, chosen)]
    tables = [[run.values[recipe.metric] for run in of_arm] for of_arm in runs]
    cases = [case for case in tables[0][0] if all(case in table for of_arm in tables for table in of_arm)]
    teacher, alone, distilled = ([[table[case] for case in cases] for table in of_arm] for of_arm in tables)
    return gap_recovered(teacher[0], alone, distilled, recipe.higher_is_better)


def shipped_of(runs: Sequence[Scored], recipe: Recipe) -> tuple[Scored, dict[str, Any]]:
    """The distilled run that is best on validation, and what the results tell of it."""
    sign = 1 if recipe.higher_is_better else -1
    best = max(runs, key=lambda run: sign * run.trained.validation)
    values = best.values[recipe.metric]
    return best, {
        "seed": best.trained.run.seed, "sha256": best.trained.sha256, "mean": round(fmean(values.values()), 4),
        "per_case": {case: round(value, 4) for case, value in values.items()},
    }


def split_names(datalist: Path, test: str | None = None) -> dict[str, Any]:
    """Number of training and validation cases, names of the test cases, those in whose name `test` is found."""
    content = json.loads(datalist.read_text())
    names = case_names([case["image"] for case in content.get("test", [])])
    names = [name for name in names if not test or re.search(test, name)]
    counts = {name: len(content.get(name, [])) for name in ("training", "validation")} | {"test": len(names)}
    return {**counts, "test_cases": names} if len(names) <= 20 else counts


def speed_facts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and the median of the seconds."""
    seconds = {name: round(median(values), 3) for name, values in measured["seconds"].items()}
    return {"parameters": measured["parameters"], "seconds_per_case": seconds}


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file; {} when there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def all_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All rows of a results file, the default one first."""
    top = {name: value for name, value in content.items() if name not in ("bundle", "rows")}
    return ([top] if top else []) + list(content.get("rows", []))


def merge_row(
    content: Mapping[str, Any], bundle: str, row: Mapping[str, Any], default: str | None, searched: Any = None
) -> dict[str, Any]:
    """Put a row into the results; all others stay as they are.

    Args:
        content: of the file, may be empty.
        bundle: name.
        row: new content of the row; with `searched` its id is enough.
        default: id of the row at the top level; None, or a row that is not there yet, takes the first one.
        searched: configurations that were tried on validation, in place of what was tried before.
    """
    rows = {one["id"]: one for one in all_rows(content)}
    before = rows.get(row["id"], {})
    if searched is None:
        merged = {**row, **({"search": before["search"]} if "search" in before else {})}
    else:
        merged = {**(before or row), "search": searched}
    rows[row["id"]] = merged
    top = rows.pop(default if default in rows else next(iter(rows)))
    return {"bundle": bundle, **top, "rows": [rows[name] for name in sorted(rows)]}


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write a results file as a whole, numbers of one list on one line."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(_layout(content) + "\n")
    draft.replace(path)


def _layout(value: Any, indent: str = "") -> str:
    """JSON whose small lists and objects stand on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or (len(indent) + len(flat) <= 110 and indent):
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(str(key))}: {_layout(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _layout(item, inner) for item in value) + f"\n{indent}]"
