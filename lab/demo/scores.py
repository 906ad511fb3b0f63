# SPDX-License-Identifier: Apache-2.0
"""What the demo measured: scores per organ and case, the share of the gap that was recovered, and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lab.score import gap_recovered, read_table

TEACHER, ALONE, DISTILLED = RUNS = ("teacher", "student alone", "distilled student")
NOISE = 0.005  # mean Dice; a smaller difference of two runs says nothing


@dataclass(frozen=True)
class Result:
    """What one network reached on the test cases."""

    dice: Sequence[Sequence[float]]   # of each case (outer) and organ (inner), 0 to 1; NaN where the label has none
    hd95: Sequence[Sequence[float]]   # 95th percentile of the Hausdorff distance in mm, in the same order
    parameters: int
    seconds: float                    # of the network per case, median

    def organs(self, metric: str) -> list[float]:
        """Mean of `dice` or `hd95` over the cases, for each organ."""
        return [_mean(column) for column in zip(*getattr(self, metric), strict=True)]

    def cases(self, metric: str) -> list[float]:
        """Mean of `dice` or `hd95` over the organs, for each case."""
        return [_mean(row) for row in getattr(self, metric)]

    def overall(self, metric: str) -> float:
        """Mean of the organs' means."""
        return _mean(self.organs(metric))


def _mean(values: Sequence[float]) -> float:
    """Average what is there; NaN when nothing is."""
    found = [value for value in values if not math.isnan(value)]
    return fmean(found) if found else math.nan


def organ_names(datalist: Path) -> list[str]:
    """Names of the labels 1, 2, ... in a datalist.json, for people."""
    labels = json.loads(datalist.read_text())["labels"]
    return [labels[number].replace("_", " ") for number in sorted(labels, key=int) if int(number)]


def read_result(folder: Path, parameters: int, seconds: float) -> Result:
    """Read what `evaluate.json` left in its `output_dir`."""
    dice, hd95 = (
        [organs for organs, _ in read_table(folder / f"val_{name}_raw.csv").values()] for name in ("mean_dice", "hd95")
    )
    return Result(dice, hd95, parameters, seconds)


def _gap(results: Mapping[str, Result]) -> Any:
    """Recovered share of the gap in Dice, with one seed; None where the teacher is not ahead."""
    teacher, alone, distilled = (results[run].cases("dice") for run in RUNS)
    return gap_recovered(teacher, [alone], [distilled])["value"]


def gap_text(results: Mapping[str, Result]) -> str:
    """The recovered gap in mean Dice, or why there is none."""
    gap = _gap(results)
    if gap is None:
        return "not defined: the teacher is not better than the student alone"
    return f"{100 * gap:.0f} % of {results[TEACHER].overall('dice') - results[ALONE].overall('dice'):.3f} mean Dice"


def verdict(results: Mapping[str, Result]) -> str:
    """Say in one sentence whether distillation helped in this run, whatever the answer is."""
    teacher, alone, distilled = (results[run].overall("dice") for run in RUNS)
    cases = zip(results[ALONE].cases("dice"), results[DISTILLED].cases("dice"), strict=True)
    better = [after > before for before, after in cases]
    numbers = f"mean Dice {alone:.3f} alone, {distilled:.3f} distilled, teacher {teacher:.3f}"
    gap = _gap(results)
    if gap is None:
        return f"The teacher is not better than the student alone, so there was nothing to distil: {numbers}."
    if abs(distilled - alone) < NOISE:
        return f"Distillation made no difference in this run: {numbers}."
    if distilled < alone:
        return f"Distillation did not help in this run, the student got worse: {numbers}."
    return (
        f"Distillation helped in this run: {numbers}, better in {sum(better)} of {len(better)} test cases; "
        f"{100 * gap:.0f} % of the gap to the teacher recovered."
    )


def table(results: Mapping[str, Result], organs: Sequence[str]) -> list[list[str]]:
    """Rows of the result table as text: organs and their mean, Dice and then HD95 in mm; parameters; seconds."""
    shown = [results[run] for run in RUNS]
    columns = [
        ["-" if math.isnan(value) else f"{value:.{digits}f}" for value in (*one.organs(metric), one.overall(metric))]
        for metric, digits in (("dice", 3), ("hd95", 1)) for one in shown
    ]
    return [
        *map(list, zip([*organs, "mean"], *columns, strict=True)),
        ["parameters", *(f"{one.parameters / 1e6:.2f} M" for one in shown)],
        ["seconds per case", *(f"{one.seconds:.2f}" for one in shown)],
    ]
