# SPDX-License-Identifier: Apache-2.0
"""What the demo measured: scores per organ and case, the share of the gap that was recovered, and the table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

__all__ = [
    "ALONE", "DISTILLED", "RUNS", "TEACHER", "Result", "gap_recovered", "gap_text", "mean", "organ_names",
    "read_cases", "read_result", "table", "verdict",
]

TEACHER, ALONE, DISTILLED = RUNS = ("teacher", "student alone", "distilled student")
NOISE = 0.005  # mean Dice; a smaller difference of two runs says nothing


@dataclass(frozen=True)
class Result:
    """What one network reached on the test cases.

    Attributes:
        dice: Dice of each case (outer) and organ (inner), 0 to 1; NaN where the label has no such organ.
        hd95: 95th percentile of the Hausdorff distance in mm, in the same order.
        parameters: number of weights.
        seconds: time of the network per case, in seconds.
    """

    dice: Sequence[Sequence[float]]
    hd95: Sequence[Sequence[float]]
    parameters: int
    seconds: Sequence[float]

    @property
    def seconds_per_case(self) -> float:
        """Median over the cases."""
        return median(self.seconds)

    def organs(self, metric: str) -> list[float]:
        """Mean of `dice` or `hd95` over the cases, for each organ."""
        return [mean(column) for column in zip(*getattr(self, metric), strict=True)]

    def cases(self, metric: str) -> list[float]:
        """Mean of `dice` or `hd95` over the organs, for each case."""
        return [mean(row) for row in getattr(self, metric)]

    def overall(self, metric: str) -> float:
        """Mean of the organs' means."""
        return mean(self.organs(metric))


def mean(values: Sequence[float]) -> float:
    """Average what is there; NaN when nothing is.

    Example:
        >>> mean([0.5, float("nan"), 1.0])
        0.75
    """
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def organ_names(datalist: Path) -> list[str]:
    """Names of the labels 1, 2, ... in a datalist.json, for people."""
    labels = json.loads(datalist.read_text())["labels"]
    return [labels[number].replace("_", " ") for number in sorted(labels, key=int) if int(number)]


def read_cases(path: Path) -> list[list[float]]:
    """Read a `<metric>_raw.csv` of MONAI's MetricsSaver: a row per case, a column per organ."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name.startswith("class")]
    return [[float(row[name]) for name in sorted(columns, key=lambda name: int(name[5:]))] for row in rows]


def read_result(folder: Path, parameters: int, seconds: Sequence[float]) -> Result:
    """Read what `evaluate.json` left in its `output_dir`."""
    metrics = [read_cases(folder / f"val_{name}_raw.csv") for name in ("mean_dice", "hd95")]
    return Result(metrics[0], metrics[1], parameters, seconds)


def gap_recovered(teacher: float, alone: float, distilled: float) -> float | None:
    """Share of the distance from student alone to teacher that distillation made good, in percent.

    Returns:
        None when the teacher is not better than the student alone: there is no gap then.

    Example:
        >>> gap_recovered(teacher=0.75, alone=0.5, distilled=0.625)
        50.0
    """
    return 100 * (distilled - alone) / (teacher - alone) if teacher > alone else None


def gap_text(results: Mapping[str, Result]) -> str:
    """The recovered gap in mean Dice, or why there is none."""
    dice = [results[run].overall("dice") for run in RUNS]
    gap = gap_recovered(*dice)
    if gap is None:
        return "not defined: the teacher is not better than the student alone"
    return f"{round(gap)} % of {dice[0] - dice[1]:.3f} mean Dice"


def verdict(results: Mapping[str, Result]) -> str:
    """Say in one sentence whether distillation helped in this run, whatever the answer is."""
    teacher, alone, distilled = (results[run].overall("dice") for run in RUNS)
    rows = zip(results[ALONE].cases("dice"), results[DISTILLED].cases("dice"), strict=True)
    better = [after > before for before, after in rows]
    numbers = f"mean Dice {alone:.3f} alone, {distilled:.3f} distilled, teacher {teacher:.3f}"
    if teacher <= alone:
        return f"The teacher is not better than the student alone, so there was nothing to distil: {numbers}."
    if abs(distilled - alone) < NOISE:
        return f"Distillation made no difference in this run: {numbers}."
    if distilled < alone:
        return f"Distillation did not help in this run, the student got worse: {numbers}."
    return (
        f"Distillation helped in this run: {numbers}, better in {sum(better)} of {len(better)} test cases; "
        f"{round(gap_recovered(teacher, alone, distilled) or 0)} % of the gap to the teacher recovered."
    )


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def table(results: Mapping[str, Result], organs: Sequence[str]) -> list[list[str]]:
    """Rows of the result table as text: organ, then Dice and then HD95 in mm of the three networks.

    Returns:
        A row per organ, and the rows `mean`, `parameters` and `seconds per case` (the latter two fill three columns).
    """
    rows = []
    for position, organ in enumerate(organs):
        dice = [_number(results[run].organs("dice")[position], 3) for run in RUNS]
        rows.append([organ, *dice, *(_number(results[run].organs("hd95")[position], 1) for run in RUNS)])
    overall = [_number(results[run].overall("dice"), 3) for run in RUNS]
    rows.append(["mean", *overall, *(_number(results[run].overall("hd95"), 1) for run in RUNS)])
    rows.append(["parameters", *(f"{results[run].parameters / 1e6:.2f} M" for run in RUNS)])
    rows.append(["seconds per case", *(f"{results[run].seconds_per_case:.2f}" for run in RUNS)])
    return rows
