# SPDX-License-Identifier: Apache-2.0
"""Scores on test cases: reading what MONAI's MetricsSaver left, and the recovered gap with its interval."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AGREEMENT", "METRICS", "Columns", "case_names", "columns_of", "gained", "gap_recovered", "read_scores",
    "read_table",
]

Columns = Literal["classes", "blocks", "case"]   # what a column is: a label value, a part of the case, all of it
METRICS = {
    "val_mean_dice": "Dice", "val_hd95": "HD95", "val_assd": "ASSD", "val_surface_dice": "surface Dice",
    "val_volume_ratio": "volume ratio", "val_wrong_components": "wrong components", "val_wrong_volume": "wrong volume",
    "val_lesion_sensitivity": "lesion sensitivity", "val_false_positive_lesions": "false lesions per case",
    "val_relative_volume_difference": "\\|RVD\\|", "val_voi": "VOI", "val_voi_split": "VOI split",
    "val_voi_merge": "VOI merge", "val_arand": "ARAND", "val_pq": "PQ", "val_aji": "AJI", "val_sbd": "SBD",
    "val_dic": "\\|DiC\\|", "val_balanced_accuracy": "accuracy",   # of cases: balanced where classes have as many
}
AGREEMENT = "_with_teacher"       # how the name of a metric ends that takes the teacher's prediction for the label
DRAWS = 10_000
LEAST_CASES = 4
TAIL = 0.025      # on each side of the interval


def columns_of(config: Mapping[str, Any]) -> Columns:
    """What the columns of the score files of an evaluation are, as `score_columns` of its merged config says."""
    found: Columns = config.get("score_columns", "")
    if found not in get_args(Columns):
        raise ValueError(f"`score_columns` of evaluate.json must be of {get_args(Columns)}, got {found!r}.")
    return found


def read_table(file: Path) -> dict[str, tuple[list[float], float]]:
    """Read a `<metric>_raw.csv`: case -> value of each column in the order of their numbers, and the mean of those.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "val_mean_dice_raw.csv")
        >>> _ = file.write_text("filename,class0,class10,class2,mean\\nd/a.nii.gz,0.1,0.3,0.2,0.2\\n")
        >>> read_table(file)
        {'a': ([0.1, 0.2, 0.3], 0.2)}
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = sorted((name for name in rows[0] if re.fullmatch(r"class\d+", name)), key=lambda name: int(name[5:]))
    names = case_names([row["filename"] for row in rows])
    return {
        name: ([float(row[column]) for column in columns], float(row["mean"]))
        for name, row in zip(names, rows, strict=True)
    }


def read_scores(
    folder: Path, columns: Columns, patient: str | None = None, test: str | None = None
) -> dict[str, dict[str, float]]:
    """Read all `<metric>_raw.csv` in the `output_dir` of an evaluation: metric -> case -> value, where there is one.

    A metric that has only one value of all cases, as AUC, is the value of a case "all", where no case is left out.

    Args:
        folder: the files' place.
        columns: blocks of a case count as cases; of classes the mean over those that a case has is taken.
        patient: regular expression; the cases in whose name its group is the same are averaged to one.
        test: regular expression; only cases in whose name it is found are read.
    """
    metrics = {}
    for file in sorted(folder.glob("*_raw.csv")):
        groups: dict[str, list[float]] = {}
        for name, (parts, mean) in read_table(file).items():
            found = re.search(patient, name) if patient else None
            case = found[1] if found else name
            values = {f"{case} {n}": part for n, part in enumerate(parts, 1)} if columns == "blocks" else {case: mean}
            for part, value in values.items():
                if re.search(test or "", name) and not math.isnan(value):
                    groups.setdefault(part, []).append(value)
        metrics[file.name.removesuffix("_raw.csv")] = {case: fmean(values) for case, values in groups.items()}
    whole = folder / "metrics.csv"
    if whole.is_file() and not patient and not test:
        told = [line.split(",") for line in whole.read_text().splitlines() if line]
        others = {name: float(value) for name, value in told if name not in metrics}
        metrics |= {name: {"all": value} for name, value in others.items() if not math.isnan(value)}
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


def gap_recovered(
    teacher: Sequence[float], alone: Sequence[Sequence[float]], distilled: Sequence[Sequence[float]],
    higher_is_better: bool = True, groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Share of the distance from student alone to teacher that distillation made good, with a 95 % interval.

    A draw of the bootstrap takes as many groups of cases as there are, the same for all three networks, and as many
    seeds of each student, with replacement. Draws in which the teacher is not better than the student alone have no
    share; they are left out and counted, and with more than 2.5 % of them there is no interval.

    Args:
        teacher: value of each case.
        alone: value of each seed (outer) and case (inner), in the same order of cases.
        distilled: likewise.
        higher_is_better: of the metric.
        groups: of each case, what it shares with others, such as a patient; they are drawn together. None: nothing.

    Returns:
        `value`, `low`, `high`, and `reason` where one of them is None; `left_out`, the share of such draws.
    """
    sign = 1 if higher_is_better else -1
    networks = [sign * np.asarray(one, dtype=float) for one in (teacher, alone, distilled)]
    means = [float(one.mean()) for one in networks]
    gap, nothing = means[0] - means[1], {"low": None, "high": None}
    spread = float(networks[1].mean(axis=1).std(ddof=1)) if len(alone) > 1 else 0.0
    if gap <= spread:
        reason = f"the teacher is not better than the student alone by more than its sd: {gap:.4f} against {spread:.4f}"
        return {"value": None, **nothing, "reason": reason}
    value = round((means[2] - means[1]) / gap, 3)
    members = _members(groups or list(map(str, range(len(teacher)))))
    if len(members) < LEAST_CASES:
        return {"value": value, **nothing, "reason": f"{len(members)} test cases are too few for an interval"}
    teachers, without, with_it = _draw([networks[0][None], *networks[1:]], members)
    gaps = teachers - without
    draws = (with_it - without) / np.where(gaps > 0, gaps, np.nan)
    left_out = float(np.isnan(draws).mean())
    if left_out > TAIL:
        share = f"in {100 * left_out:.0f} % of the draws of cases and seeds"
        return {"value": value, **nothing, "reason": f"{share} the teacher is not better, so there is no interval"}
    low, high = (round(float(bound), 3) for bound in np.nanquantile(draws, (TAIL, 1 - TAIL)))
    return {"value": value, "low": low, "high": high, "left_out": round(left_out, 4)}


def gained(
    better: Sequence[Sequence[float]], other: Sequence[Sequence[float]], groups: Sequence[str],
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """By how much one network is better than another, with a 95 % interval.

    A draw of the bootstrap takes as many groups of cases as there are, the same for both networks, and as many seeds of
    each, with replacement.

    Args:
        better: value of each seed (outer) and case (inner).
        other: likewise, in the same order of cases.
        groups: of each case, what it shares with others, such as a patient; they are drawn together.
        higher_is_better: of the metric.

    Returns:
        `value`, above 0 where the first is better, `low` and `high`, None with fewer than four groups.

    Example:
        >>> gained([[0.8, 0.7, 0.9, 0.6]], [[0.7, 0.6, 0.8, 0.5]], ["a", "b", "c", "d"])
        {'value': 0.1, 'low': 0.1, 'high': 0.1}
    """
    sign = 1 if higher_is_better else -1
    networks = [sign * np.asarray(one, dtype=float) for one in (better, other)]
    value = round(float(networks[0].mean() - networks[1].mean()), 4)
    members = _members(groups)
    if len(members) < LEAST_CASES:
        return {"value": value, "low": None, "high": None}
    means = _draw(networks, members)
    low, high = (round(float(bound), 4) for bound in np.quantile(means[0] - means[1], (TAIL, 1 - TAIL)))
    return {"value": value, "low": low, "high": high}


def _members(groups: Sequence[str]) -> NDArray[Any]:
    """Which cases are in which group, 0 or 1, shape (groups, cases)."""
    return np.asarray([[group == name for group in groups] for name in dict.fromkeys(groups)], dtype=float)


def _draw(networks: Sequence[NDArray[Any]], members: NDArray[Any]) -> list[NDArray[Any]]:
    """Means of networks, each of values (seeds, cases), in draws of groups of cases and of seeds, shape (DRAWS,)."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(members), size=(DRAWS, len(members)))
    counts = members.sum(axis=1)[drawn].sum(axis=1)
    means = []
    for values in networks:
        seeds = generator.integers(len(values), size=(DRAWS, len(values)))
        sums = (values @ members.T)[seeds[:, :, None], drawn[:, None, :]].mean(axis=1).sum(axis=1)
        means.append(sums / counts)
    return means
