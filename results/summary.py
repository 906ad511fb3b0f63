# SPDX-License-Identifier: Apache-2.0
"""Numbers of a row from its runs: means over seeds, the choice by validation, the recovered gap with an interval."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from trainings import Trained

__all__ = ["Scored", "arm_summary", "case_names", "choose", "gap_recovered", "read_scores"]

DRAWS = 10_000
LEAST_CASES = 4
TAIL = 0.025      # on each side of the interval


@dataclass(frozen=True)
class Scored:
    """A training and its values on the test cases: metric -> case -> value."""

    trained: Trained
    values: dict[str, dict[str, float]]


def read_scores(
    folder: Path, patient: str | None = None, test: str | None = None, parts: bool = False
) -> dict[str, dict[str, float]]:
    """Read what MONAI's MetricsSaver left.

    Args:
        folder: with `<metric>_raw.csv`: a row per case, whose column `mean` is the mean over the classes it has.
        patient: regular expression; the cases in whose name its group is the same are averaged to one.
        test: regular expression; only cases in whose name it is found are read.
        parts: the columns before the mean are parts of the case, and each counts as a case.

    Returns:
        Metric -> case -> value; a case without a value is left out.
    """
    metrics = {}
    for file in sorted(folder.glob("*_raw.csv")):
        groups: dict[str, list[float]] = {}
        with file.open(newline="") as lines:
            table = list(csv.DictReader(lines))
        names = case_names([line["filename"] for line in table])
        for line, name in zip(table, names, strict=True):
            if test and not re.search(test, name):
                continue
            found = re.search(patient, name) if patient else None
            case = found[1] if found else name
            columns = [key for key in line if key not in ("filename", "mean")] if parts else ["mean"]
            for number, column in enumerate(columns, start=1):
                if not math.isnan(value := float(line[column])):
                    groups.setdefault(f"{case} {number}" if parts else case, []).append(value)
        metrics[file.name.removesuffix("_raw.csv")] = {case: fmean(values) for case, values in groups.items()}
    return metrics


def case_names(files: Sequence[str]) -> list[str]:
    """Names of cases: the shortest ends of their paths that tell them apart, without the extension.

    Example:
        >>> case_names(["d/a.nii.gz", "d/b.png"]), case_names(["d/p1/ct.nii.gz", "d/p2/ct.nii.gz"])
        (['a', 'b'], ['p1/ct', 'p2/ct'])
    """
    paths = [Path(re.sub(r"\.(nii\.gz|\w+)$", "", file)).parts for file in files]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def arm_summary(runs: Sequence[Scored], metric: str) -> dict[str, Any]:
    """What the results tell of one arm.

    Args:
        runs: with different seeds.
        metric: the main one.

    Returns:
        `mean` and `sd` over the seeds of the mean over the cases, `runs` (one value per seed), the same for
        validation, means of all other metrics, values per case, and how it was trained.
    """
    values = [fmean(run.values[metric].values()) for run in runs]
    validation = [run.trained.validation for run in runs]
    others = sorted({name for run in runs for name in run.values} - {metric})
    return {
        **_spread(values),
        "seeds": [run.trained.run.seed for run in runs],
        "validation": _spread(validation),
        "metrics": {
            name: _rounded(fmean(fmean(run.values[name].values()) for run in runs if run.values.get(name)))
            for name in others if any(run.values.get(name) for run in runs)
        },
        "per_case": [{case: _rounded(value) for case, value in run.values[metric].items()} for run in runs],
        "epochs": [run.trained.epoch for run in runs],
        **({"calibrated": [dict(run.trained.calibrated) for run in runs]} if runs[0].trained.calibrated else {}),
        "minutes": [round(run.trained.minutes, 1) for run in runs],
        "configs": runs[0].trained.run.configs(),
        "options": dict(runs[0].trained.run.options),
        "keys": [run.trained.key for run in runs],
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": _rounded(fmean(values)),
        "sd": _rounded(stdev(values)) if len(values) > 1 else None,
        "runs": [_rounded(value) for value in values],
    }


def _rounded(value: float) -> float:
    return round(value, 4)


def choose(validation: dict[str, float], higher_is_better: bool) -> str:
    """Name of the best value; of equal ones the first.

    Example:
        >>> choose({"method": 0.5, "combined": 0.6}, higher_is_better=True)
        'combined'
    """
    sign = 1 if higher_is_better else -1
    return max(validation, key=lambda name: sign * validation[name])


def gap_recovered(
    teacher: Sequence[float], alone: Sequence[Sequence[float]], distilled: Sequence[Sequence[float]],
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """Share of the distance from student alone to teacher that distillation made good, with a 95 % interval.

    A draw of the bootstrap takes as many cases as there are, the same for all three networks, and as many seeds of
    each student, with replacement. Draws in which the teacher is not better than the student alone have no share;
    they are left out and counted, and with more than 2.5 % of them there is no interval.

    Args:
        teacher: value of each case.
        alone: value of each seed (outer) and case (inner), in the same order of cases.
        distilled: likewise.
        higher_is_better: of the metric.

    Returns:
        `value`, `low`, `high`, and `reason` where one of them is None; `left_out`, the share of such draws.
    """
    values = [np.asarray(one, dtype=float) for one in (teacher, alone, distilled)]
    gap = (values[0].mean() - values[1].mean()) * (1 if higher_is_better else -1)
    spread = float(values[1].mean(axis=1).std(ddof=1)) if len(alone) > 1 else 0.0
    if gap <= spread:
        reason = f"the teacher is not better than the student alone by more than its sd: {gap:.4f} against {spread:.4f}"
        return {"value": None, "low": None, "high": None, "reason": reason}
    value = (values[2].mean() - values[1].mean()) / (values[0].mean() - values[1].mean())
    if len(teacher) < LEAST_CASES:
        reason = f"{len(teacher)} test cases are too few for an interval"
        return {"value": round(float(value), 3), "low": None, "high": None, "reason": reason}
    draws, left_out = _draw(*values, higher_is_better)
    if left_out > TAIL:
        reason = f"in {100 * left_out:.0f} % of the draws the teacher is not better, so there is no interval"
        return {"value": round(float(value), 3), "low": None, "high": None, "reason": reason}
    low, high = np.quantile(draws, (TAIL, 1 - TAIL))
    bounds = {"low": round(float(low), 3), "high": round(float(high), 3)}
    return {"value": round(float(value), 3), **bounds, "left_out": round(left_out, 4)}


def _draw(
    teacher: np.ndarray, alone: np.ndarray, distilled: np.ndarray, higher_is_better: bool
) -> tuple[np.ndarray, float]:
    """Shares of `DRAWS` resamples of cases and seeds that have one, and how many have none."""
    generator = np.random.default_rng(0)
    cases = generator.integers(len(teacher), size=(DRAWS, len(teacher)))
    top = teacher[cases].mean(axis=1)                              # (DRAWS,)
    students = []
    for values in (alone, distilled):
        seeds = generator.integers(len(values), size=(DRAWS, len(values)))
        students.append(values[seeds[:, :, None], cases[:, None, :]].mean(axis=(1, 2)))
    gaps = top - students[0]
    valid = gaps > 0 if higher_is_better else gaps < 0
    return (students[1] - students[0])[valid] / gaps[valid], float(1 - valid.mean())
