# SPDX-License-Identifier: Apache-2.0
"""The file results/<bundle>.json: its default row at the top level, all others in `rows`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lab.curve import PLAIN, TOLD, complete_curves
from lab.recipe import ALONE, TEACHER, Recipe, Row
from lab.score import case_names, gained, gap_recovered
from lab.training import Trained, ranked

__all__ = [
    "ALONE", "Scores", "all_rows", "choose_distilled", "chosen_runs", "complete", "judge_leaks", "make_row",
    "merge_row", "read_results", "retention", "rules_of", "shipped_of", "split_names", "summarize", "write_results",
]

DISTILLED = "distilled"
NOT_RERUN = "trained by an earlier protocol, on a short schedule that was not checked to have converged"
Scores = Mapping[str, Mapping[str, Sequence[Trained]]]   # arm -> candidate ("" if there are none) -> runs


def make_row(
    recipe: Recipe, row: Row, scores: Scores, facts: Mapping[str, Any], borrowed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All that the results tell of a row: its arms, with those `borrowed` of other results, and `facts`.

    Facts are splits, regime, steps, speed, hardware, versions and the command.
    """
    arms = {name: _arm(candidates, recipe, row.options) for name, candidates in scores.items()}
    arms |= borrowed or {}
    content: dict[str, Any] = {
        "id": row.id, "data": row.data, "preset": row.preset, "splits": facts["splits"],
        "overrides": list(row.overrides), "options": dict(row.options), "metric": recipe.metric,
        "higher_is_better": recipe.higher_is_better, "seeds": list(row.seeds),
    }
    content |= {name: facts[name] for name in ("regime", "steps", "converged", "classical", "leaks") if name in facts}
    content |= {name: arm for name, arm in arms.items() if name not in recipe.ablations}
    chosen = choose_distilled(recipe, scores)
    if chosen:
        content[DISTILLED] = {"arm": chosen, **arms[chosen]}
        pair = [arms[name] for name in (TEACHER, ALONE, chosen)]
        content["gap_recovered"] = _gap(pair, recipe.higher_is_better, _patient(row))
        content["retention"] = retention(arms[chosen]["mean"], arms[TEACHER]["mean"], recipe.higher_is_better)
    if "leaks" in content:
        content["leaks"]["verdict"] = judge_leaks(content)
    content["ablations"] = {name: arm for name, arm in arms.items() if name in recipe.ablations}
    return content | {name: facts[name] for name in facts if name not in content}


def retention(student: float, teacher: float, higher_is_better: bool = True) -> float | None:
    """Share of the teacher's score that a student keeps: student / teacher, of errors (VOI) teacher / student.

    Example:
        >>> retention(0.7, 0.8), retention(1.25, 1.0, higher_is_better=False)
        (0.875, 0.8)
    """
    part, whole = (student, teacher) if higher_is_better else (teacher, student)
    return round(part / whole, 4) if whole > 0 else None


def rules_of(row: Row, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`classical` and `leaks` of a row of what `lab.classical.scoring` found."""
    told: dict[str, Any] = {}
    if row.classical:
        told["classical"] = {"name": row.classical, **found[row.classical]}
    if row.leaks:
        told["leaks"] = {name: dict(found[name]) for name in row.leaks}
    return told


def judge_leaks(row: Mapping[str, Any]) -> str:
    """Say whether a rule that ignores the image does what a network is needed for: it is as good as student or teacher.

    Example:
        >>> means = {"student_alone": {"mean": 0.4}, "teacher": {"mean": 0.7}}
        >>> judge_leaks({"leaks": {"ellipsoid": {"mean": 0.8}}, **means, "higher_is_better": True})
        'ellipsoid is better than the teacher (0.800 against 0.700): this set cannot show what a network is worth'
    """
    sign = 1 if row["higher_is_better"] else -1
    rules = {name: one["mean"] for name, one in row["leaks"].items() if name != "verdict"}
    name = max(rules, key=lambda one: sign * rules[one])
    for network, mean in ((one, row[one]["mean"]) for one in (TEACHER, ALONE) if one in row):
        if sign * rules[name] >= sign * mean:
            return (f"{name} is better than the {network.replace('_', ' ')} ({rules[name]:.3f} against {mean:.3f}): "
                    "this set cannot show what a network is worth")
    return f"none: the best rule that ignores the image, {name}, has {rules[name]:.3f}"


def summarize(candidates: Mapping[str, Sequence[Trained]], recipe: Recipe) -> dict[str, Any]:
    """Means on the test and validation cases of an arm of no own row, such as a point of a curve."""
    told = _summary(chosen_runs(candidates, recipe), recipe.metric, {})
    return {key: told[key] for key in TOLD}


def _best(groups: Mapping[str, Sequence[Trained]], recipe: Recipe) -> str:
    """Name of the runs that are best on validation with the first seed, as the plan chose."""
    first = ranked((runs[0] for runs in groups.values()), recipe)[0]
    return next(name for name, runs in groups.items() if runs[0] is first)


def chosen_runs(candidates: Mapping[str, Sequence[Trained]], recipe: Recipe) -> Sequence[Trained]:
    """The runs of an arm; of several candidates those of the best."""
    return candidates[_best(candidates, recipe)]


def choose_distilled(recipe: Recipe, scores: Scores) -> str | None:
    """The arm that is called `distilled`."""
    rivals = {name: chosen_runs(scores[name], recipe) for name in recipe.distilled_from if name in scores}
    return _best(rivals, recipe) if rivals else None


def _arm(candidates: Mapping[str, Sequence[Trained]], recipe: Recipe, common: Mapping[str, Any]) -> dict[str, Any]:
    chosen = chosen_runs(candidates, recipe)
    summary = _summary(chosen, recipe.metric, common)
    if len(candidates) == 1:
        return summary
    first = {name: _summary(runs[:1], recipe.metric, common) for name, runs in candidates.items()}
    kept = ("mean", "validation", "metrics", "options")
    tried = {name: {key: one[key] for key in kept} for name, one in first.items()}
    return {"candidate": chosen[0].run.candidate, **summary, "candidates": tried}


def _summary(runs: Sequence[Trained], metric: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """What the results tell of runs that differ in their seeds; of the options those that the row has not."""
    first, cases = runs[0], [run.values[metric] for run in runs]
    means = {
        name: [fmean(run.values[name].values()) for run in runs if run.values.get(name)]
        for name in sorted({name for run in runs for name in run.values} - {metric})
    }
    own = {key: value for key, value in first.run.options.items() if key not in common or common[key] != value}
    own.pop("seed", None)
    other = {} if first.metric == metric else {"metric": first.metric}
    return {
        **_spread([fmean(values.values()) for values in cases]),
        "seeds": [run.run.seed for run in runs],
        "validation": {**_spread([run.validation for run in runs]), **other},
        "metrics": {name: round(fmean(values), 4) for name, values in means.items() if values},
        "per_case": [_rounded(values) for values in cases],
        "epochs": [run.epoch for run in runs],
        **({"calibrated": [dict(run.calibrated) for run in runs]} if first.calibrated else {}),
        "minutes": [round(run.minutes, 1) for run in runs],
        "configs": [f"configs/{name}.json" for name in first.run.configs],
        "options": own,
        "keys": [run.folder.name for run in runs],
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and the value of each."""
    sd = round(stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(fmean(values), 4), "sd": sd, "runs": [round(value, 4) for value in values]}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _gap(arms: Sequence[Mapping[str, Any]], higher_is_better: bool, patient: str | None) -> dict[str, Any]:
    cases, (teacher, alone, distilled) = _by_case(arms)
    return gap_recovered(teacher[0], alone, distilled, higher_is_better, _groups(cases, patient))


def _patient(row: Row) -> str | None:
    """Regular expression of the patient in the name of a case."""
    found: str | None = row.patient or row.datalist.get("patient")
    return found


def _groups(cases: Sequence[str], patient: str | None) -> list[str]:
    """The patient of each case, or its name where that tells none."""
    return [match[1] if patient and (match := re.search(patient, case)) else case for case in cases]


def _by_case(arms: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[list[float]]]]:
    """The cases that all runs of all arms have a value of, and the values: arm, seed, case."""
    tables = [arm["per_case"] for arm in arms]
    cases = [case for case in tables[0][0] if all(case in table for of_arm in tables for table in of_arm)]
    return cases, [[[table[case] for case in cases] for table in of_arm] for of_arm in tables]


def _gained(row: Mapping[str, Any], patient: str | None) -> dict[str, Any]:
    """How much better the distilled student is than the student alone and plain distillation, where there are such."""
    found = {}
    for name in (ALONE, PLAIN):
        if "per_case" not in row.get(name, {}) or row[DISTILLED]["arm"] == name:
            continue
        cases, (better, other) = _by_case([row[DISTILLED], row[name]])
        found[name] = gained(better, other, _groups(cases, patient), row["higher_is_better"])
    return found


def shipped_of(runs: Sequence[Trained], recipe: Recipe) -> tuple[Trained, dict[str, Any]]:
    """The distilled run that is best on validation, and what the results tell of it."""
    best = ranked(runs, recipe)[0]
    values = best.values[recipe.metric]
    told = {"seed": best.run.seed, "sha256": best.sha256, "mean": round(fmean(values.values()), 4)}
    return best, {**told, "per_case": _rounded(values)}


def split_names(datalist: Path, test: str | None = None) -> dict[str, Any]:
    """Number of training and validation cases, names of the test cases, those in whose name `test` is found."""
    content = json.loads(datalist.read_text())
    names = case_names([case["image"] for case in content.get("test", [])])
    names = [name for name in names if not test or re.search(test, name)]
    counts = {name: len(content.get(name, [])) for name in ("training", "validation")} | {"test": len(names)}
    return {**counts, "test_cases": names} if len(names) <= 20 else counts


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
    """Put a row, or what was `searched` for it (then its id is enough), into the results; all others stay as they are.

    The row whose id is `default` stands at the top level, the first one if it is not there yet.
    """
    rows = {one["id"]: one for one in all_rows(content)}
    before = rows.get(row["id"], {})
    if searched is None:
        rows[row["id"]] = {**row, **{key: before[key] for key in before if key == "search"}}
    else:
        rows[row["id"]] = {**(before or row), "search": searched}
    top = rows.pop(default if default in rows else next(iter(rows)))
    return {"bundle": bundle, **top, "rows": [rows[name] for name in sorted(rows)]}


def complete(content: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What rows tell of each other: curves and what a teacher is worth; and which rows the recipe's protocol made.

    Rows of data that the recipe now has other rows for go. One that was trained before the protocol asked whether it
    converged says so, and one that is a detail of the recipe.
    """
    told = {row.data for row in recipe.rows.values()}
    kept = [row for row in all_rows(content) if row["id"] in recipe.rows or row["data"] not in told]
    rows = []
    for row in complete_curves(kept):
        old = TEACHER in row and "converged" not in row
        plain = {key: value for key, value in row.items() if key != "detail"}     # the recipe may have changed its mind
        known = recipe.rows.get(row["id"])
        detail = known is not None and known.detail
        if DISTILLED in row:
            plain["gained"] = _gained(row, None if known is None else _patient(known))
        rows.append({**plain, **({"not_rerun": NOT_RERUN} if old else {}), **({"detail": True} if detail else {})})
    top, others = rows[:1], rows[1:]
    return {"bundle": content["bundle"], **(top[0] if top else {}), "rows": others}


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
