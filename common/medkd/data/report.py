# SPDX-License-Identifier: Apache-2.0
"""What the data look like: numbers of cases and voxels, and ranges, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medkd.data.volumes import Case

__all__ = ["DataReport", "numbers", "ranges", "report", "span"]

_MOST_ROWS = 130          # label values with names in a table; more are instances, and only counted
_MOST_UNNAMED = 20        # the same where none has a name, as in a datalist of instances


@dataclass(frozen=True)
class DataReport:
    """What the data look like.

    Attributes:
        cases: number of cases by list.
        voxels: list -> label value -> voxels, over the labeled cases; -1 are those to ignore.
        spacing: smallest and largest spacing per axis, in the units of the reader (mm for CT).
        shapes: smallest and largest voxel count per axis.
        intensity: smallest and largest value of all images.
        orientations: axis codes of volumes that occur, such as RAS.
        without_label: number of cases without a label by list, of those of `cases`.
        by_case: labels are classes of whole images, and `voxels` counts cases.
    """

    cases: dict[str, int]
    voxels: dict[str, dict[int, int]]
    spacing: tuple[tuple[float, float], ...]
    shapes: tuple[tuple[int, int], ...]
    intensity: tuple[float, float]
    orientations: tuple[str, ...]
    without_label: dict[str, int] = field(default_factory=dict)
    by_case: bool = False

    def table(self, names: Mapping[str, str] | None = None) -> str:
        """Lay the report out as text; `names` maps label values to names, as `labels` in a datalist does.

        Where there are too many values to be classes, more than 130, or 20 without any name, they are only counted.
        """
        names = names or {}
        most = _MOST_ROWS if names else _MOST_UNNAMED
        values = sorted({value for counts in self.voxels.values() for value in counts if value >= 0})
        rows = [["", *self.cases], ["cases", *map(str, self.cases.values())]]
        if any(self.without_label.values()):
            rows.append(["without a label", *(f"{self.without_label.get(name, 0)}" for name in self.cases)])
        if len(values) > most:
            counted = ({value for value in counts if value >= 0} for counts in self.voxels.values())
            rows.append(["label values", *(f"{len(found):,}" for found in counted)])
        counted_in = "cases" if self.by_case else "voxels"
        for value in values if len(values) <= most else []:
            rows.append(self._row(f"{counted_in} of {value} {names.get(str(value), '')}".rstrip(), value))
        if any(-1 in counts for counts in self.voxels.values()):
            rows.append(self._row("voxels of -1 ignored", -1))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        facts = {
            "voxels per axis": ranges(self.shapes), "spacing": ranges(self.spacing),
            "intensity": ranges([self.intensity]), "orientation": ", ".join(self.orientations),
        }
        lines += [f"{name.ljust(widths[0])}  {text}".rstrip() for name, text in facts.items()]
        return "\n".join(lines)

    def _row(self, title: str, value: int) -> list[str]:
        return [title, *(f"{self.voxels[name].get(value, 0):,}" for name in self.cases)]


def report(cases: Mapping[str, Sequence[Case]]) -> DataReport:
    """Sum up inspected cases, each with an image."""
    voxels: dict[str, Counter[int]] = {name: Counter() for name in cases}
    for name, group in cases.items():
        for label in (case.label for case in group if case.label):
            voxels[name].update({int(value): count for value, count in label.counts.items()})
        voxels[name].update(case.category for case in group if case.category is not None)
    images = [case.image for group in cases.values() for case in group if case.image]
    rank = min(len(image.shape) for image in images)
    return DataReport(
        cases={name: len(group) for name, group in cases.items()},
        voxels={name: dict(sorted(counts.items())) for name, counts in voxels.items()},
        spacing=span([image.spacing[:rank] for image in images]),
        shapes=tuple((int(a), int(b)) for a, b in span([image.shape[:rank] for image in images])),
        intensity=(min(image.low for image in images), max(image.high for image in images)),
        orientations=tuple(sorted({image.orientation for image in images} - {""})),
        without_label={name: sum(not case.is_labeled for case in group) for name, group in cases.items()},
        by_case=any(case.category is not None for group in cases.values() for case in group),
    )


def span(rows: Any) -> tuple[tuple[float, float], ...]:
    """Smallest and largest value of each column."""
    values = np.asarray(rows, dtype=np.float64)   # (cases, axes)
    return tuple((float(a), float(b)) for a, b in zip(values.min(0), values.max(0), strict=True))


def ranges(pairs: Iterable[tuple[float, float]]) -> str:
    """Write ranges as "2 x 2 x 3 to 5"."""
    shown = [f"{a:.4g}" if f"{a:.4g}" == f"{b:.4g}" else f"{a:.4g} to {b:.4g}" for a, b in pairs]
    return " x ".join(shown)


def numbers(values: Iterable[float]) -> str:
    """Write a tuple of numbers to five digits."""
    return "(" + ", ".join(f"{value:.5g}" for value in values) + ")"
