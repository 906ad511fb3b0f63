# SPDX-License-Identifier: Apache-2.0
"""What the demo measured: scores per organ and case, what the teacher was worth, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lab.curve import labels_worth
from lab.score import gap_recovered, read_table

TEACHER, ALONE, DISTILLED = RUNS = ("teacher", "student alone", "distilled student")   # the others are ALONE too
NOISE = 0.005  # mean Dice; a smaller difference of two runs says nothing


@dataclass(frozen=True)
class Result:
    """What one network reached on the test cases."""

    dice: Sequence[Sequence[float]]   # of each case (outer) and organ (inner), 0 to 1; NaN where the label has none
    hd95: Sequence[Sequence[float]]   # 95th percentile of the Hausdorff distance in mm, in the same order
    volume: Sequence[Sequence[float]]   # predicted / true volume
    labels: int                       # cases with a label that it learned from
    unlabeled: int                    # and without
    parameters: int
    seconds: float                    # of the network per case, median

    def organs(self, metric: str) -> list[float]:
        """Mean of `dice`, `hd95` or `volume` over the cases, for each organ."""
        return [_mean(column) for column in zip(*getattr(self, metric), strict=True)]

    def cases(self, metric: str) -> list[float]:
        """Mean of `dice`, `hd95` or `volume` over the organs, for each case."""
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


def read_result(folder: Path, labels: int, unlabeled: int, parameters: int, seconds: float) -> Result:
    """Read what `evaluate.json` left in its `output_dir`."""
    names = ("mean_dice", "hd95", "volume_ratio")
    dice, hd95, volume = (
        [organs for organs, _ in read_table(folder / f"val_{name}_raw.csv").values()] for name in names
    )
    return Result(dice, hd95, volume, labels, unlabeled, parameters, seconds)


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


def worth(results: Mapping[str, Result]) -> tuple[int, str]:
    """Number of labeled cases with which a student alone is as good as the distilled one, and a word about it.

    It is read off the students alone of the same run. The word is "about", or where the distilled student is outside of
    what they reached "more than" or "fewer than".
    """
    students = sorted((one.labels, one.overall("dice")) for name, one in results.items() if name.startswith(ALONE))
    told = labels_worth(results[DISTILLED].overall("dice"), students)
    if told["value"] is not None:
        return told["value"], "about"
    return next((number, key.replace("_", " ")) for key, number in told.items() if key != "value")


def worth_text(results: Mapping[str, Result]) -> str:
    """What the teacher saved, in labeled cases."""
    count, word = worth(results)
    has = results[DISTILLED].labels
    if word == "fewer than" or results[DISTILLED].overall("dice") - results[ALONE].overall("dice") < NOISE:
        return "nothing: the student alone with the same labels is as good"
    return f"a student alone needs {word} {count} labeled cases to be as good as the distilled one with {has}"


def verdict(results: Mapping[str, Result]) -> str:
    """Say in one sentence what distillation gained in this run, whatever the answer is."""
    teacher, alone, distilled = (results[run].overall("dice") for run in RUNS)
    cases = zip(results[ALONE].cases("dice"), results[DISTILLED].cases("dice"), strict=True)
    better = [after > before for before, after in cases]
    numbers = f"mean Dice {alone:.3f} alone, {distilled:.3f} distilled, teacher {teacher:.3f}"
    if _gap(results) is None:
        return f"The teacher is not better than the student alone, so there was nothing to distil: {numbers}."
    if abs(distilled - alone) < NOISE:
        return f"Distillation made no difference in this run: {numbers}."
    if distilled < alone:
        return f"Distillation did not help in this run, the student got worse: {numbers}."
    mine = results[DISTILLED]
    return (
        f"With {mine.labels} labeled cases, a teacher and {mine.unlabeled} images without labels took the student from "
        f"{alone:.3f} to {distilled:.3f} mean Dice (teacher {teacher:.3f}), better in {sum(better)} of {len(better)} "
        f"test cases; {worth_text(results)}."
    )


def summary_table(results: Mapping[str, Result]) -> tuple[list[str], list[list[str]]]:
    """Head and a row per network as text: what it learned from, its scores, its size."""
    head = ["", "labels", "unlabeled", "Dice", "HD95, mm", "volume", "parameters", "s per case"]
    return head, [
        [
            ALONE if name.startswith(ALONE) else name, str(one.labels), str(one.unlabeled or "-"),
            f"{one.overall('dice'):.3f}", f"{one.overall('hd95'):.1f}", f"{one.overall('volume'):.2f}",
            f"{one.parameters / 1e6:.2f} M", f"{one.seconds:.2f}",
        ]
        for name, one in results.items()
    ]


def organ_table(results: Mapping[str, Result], organs: Sequence[str]) -> list[list[str]]:
    """Rows as text: each organ and their mean, Dice and then HD95 in mm of teacher, student alone and distilled."""
    columns = [
        ["-" if math.isnan(value) else f"{value:.{digits}f}" for value in (*one.organs(metric), one.overall(metric))]
        for metric, digits in (("dice", 3), ("hd95", 1)) for one in (results[run] for run in RUNS)
    ]
    return list(map(list, zip([*organs, "mean"], *columns, strict=True)))
