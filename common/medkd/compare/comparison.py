# SPDX-License-Identifier: Apache-2.0
"""All that was found out about some networks on some cases, as tables and words."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from medkd.compare.cases import Files
from medkd.compare.errors import agreement
from medkd.compare.evaluating import Kept
from medkd.compare.frames import on_other_grid
from medkd.compare.levels import Row
from medkd.compare.networks import Network
from medkd.compare.running import AFFINITY, Outcome

__all__ = ["METRICS", "Compared", "Comparison", "Metric", "number"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """What a metric of a bundle is called, and is."""

    name: str
    about: str
    best: float        # the perfect value
    digits: int = 3


METRICS = {
    "val_mean_dice": Metric("Dice", "share of overlap with the label; 1 is perfect, 0 is none", 1),
    "val_volume_ratio": Metric("volume", "predicted volume over the true one; 1 is right, 2 twice as much", 1, 2),
    "val_hd95": Metric("HD95", "95 % of the two surfaces are nearer to each other than this; 0 is perfect; what was "
                       "missed altogether counts with the diagonal of the image", 0, 1),
    "val_pq": Metric("PQ", "panoptic quality: how many are found, times how well; 1 is perfect", 1),
    "val_voi": Metric("VOI", "variation of information, split and merge errors together; 0 is perfect", 0),
    "val_voi_split": Metric("VOI split", "what is cut apart that belongs together; 0 is perfect", 0),
    "val_voi_merge": Metric("VOI merge", "what is joined that does not belong together; 0 is perfect", 0),
    "val_arand": Metric("ARAND", "adapted Rand error; 0 is perfect", 0),
}


@dataclass(frozen=True)
class Compared(ABC, Generic[Kept]):
    """Networks, cases and what came of them."""

    networks: Sequence[Network]
    outcomes: Mapping[str, Kept]           # of each network, by its name
    cases: Mapping[str, Files]
    class_names: Mapping[int, str]

    @property
    def names(self) -> list[str]:
        """Of the networks."""
        return [network.name for network in self.networks]

    @property
    def first(self) -> Network:
        """The network whose bundle reads the files that are shown."""
        return self.networks[0]

    @property
    def labeled(self) -> list[str]:
        """Cases with a label."""
        return [case for case, files in self.cases.items() if "label" in files]

    def seconds(self, name: str) -> float:
        """Mean over the cases."""
        return fmean(self.outcomes[name].seconds.values())

    def class_name(self, value: int) -> str:
        """Name of a label value."""
        return self.class_names.get(value) or f"class {value}"

    @abstractmethod
    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the first table: a row per network."""

    @abstractmethod
    def verdict(self) -> str:
        """One or two sentences: who is best, by how much, at what price."""

    def price(self, digits: int = 2) -> str:
        """What the smallest network saves, a sentence behind a space; empty where all are of one size."""
        sizes = {name: self.outcomes[name].parameters for name in self.names}
        small, large = min(sizes, key=lambda name: sizes[name]), max(sizes, key=lambda name: sizes[name])
        if sizes[small] == sizes[large]:
            return ""
        return (f" {small} has {100 * sizes[small] / sizes[large]:.2g} % of the parameters of {large} and takes "
                f"{self.seconds(small):.{digits}f} s per case instead of {self.seconds(large):.{digits}f} s.")


@dataclass(frozen=True)
class Comparison(Compared[Outcome]):
    """Networks that segment, cases and what came of them."""

    rows: Sequence[Row]                    # levels that belong together

    @property
    def metrics(self) -> list[str]:
        """Metrics that all networks have and that have a name here, the bundle's main one first."""
        own = self.first.config["validate"]["key_metric"]
        shared = [key for key in own if all(self.outcomes[name].scores.get(key) for name in self.names)]
        return [key for key in shared if key in METRICS]

    def title(self, metric: str) -> str:
        """Name of a metric with its unit."""
        length = self.first.config.get("unit") or "pixels"
        return f"{METRICS[metric].name}, {length}" if metric == "val_hd95" else METRICS[metric].name

    def mean(self, metric: str, name: str) -> float:
        """Mean over the labeled cases that have a value."""
        values = [self.outcomes[name].score(metric, case) for case in self.labeled]
        found = [value for value in values if not math.isnan(value)]
        return fmean(found) if found else math.nan

    def best(self, metric: str, case: str) -> list[str]:
        """The networks that are nearest to the perfect value in a case."""
        far = {name: abs(self.outcomes[name].score(metric, case) - METRICS[metric].best) for name in self.names}
        least = min((value for value in far.values() if not math.isnan(value)), default=math.nan)
        return [name for name, value in far.items() if value <= least + 1e-9]

    # ---- tables: head, rows ----------------------------------------------------------------------------------------

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """A row per network: means of the metrics, in how many cases it is the best, size and time."""
        metrics = self.metrics
        head = ["network", *(self.title(metric) for metric in metrics), *(["best in cases"] if metrics else []),
                "parameters", "s per case"]
        rows = []
        for name in self.names:
            wins = [sum(name in self.best(metrics[0], case) for case in self.labeled)] if metrics else []
            rows.append([
                name, *(number(self.mean(metric, name), METRICS[metric].digits) for metric in metrics),
                *(f"{count} of {len(self.labeled)}" for count in wins),
                f"{self.outcomes[name].parameters / 1e6:.3f} M", number(self.seconds(name), 2),
            ])
        return head, rows

    def case_table(self) -> tuple[list[str], list[list[str]], list[tuple[str, int]]]:
        """A row per labeled case, a group of columns per metric; head, rows, groups."""
        metrics = self.metrics[:3]
        rows = [
            [case, *(number(self.outcomes[name].score(metric, case), METRICS[metric].digits)
                     for metric in metrics for name in self.names)]
            for case in self.labeled
        ]
        groups = [(self.title(metric), len(self.names)) for metric in metrics]
        return ["case", *self.names * len(metrics)], rows, groups

    def class_table(self) -> tuple[list[str], list[list[str]], list[tuple[str, int]]]:
        """A row per class, means over the cases that have it."""
        metrics = self.metrics[:3]
        rows = []
        for column in range(self.first.classes - 1):
            cells = [number(self._column_mean(metric, name, column), METRICS[metric].digits)
                     for metric in metrics for name in self.names]
            rows.append([self.class_name(column + 1), *cells])
        return ["class", *self.names * len(metrics)], rows, [(self.title(one), len(self.names)) for one in metrics]

    def _column_mean(self, metric: str, name: str, column: int) -> float:
        rows = self.outcomes[name].scores[metric].values()
        values = [row[column] for row in rows if column < len(row) and not math.isnan(row[column])]
        return fmean(values) if values else math.nan

    def agreement_table(self) -> tuple[list[str], list[list[str]]]:
        """A row per case, a column per pair of networks."""
        pairs = list(combinations(self.names, 2))
        rows = []
        for case in self.cases:
            found = {name: self.outcomes[name].prediction(case) for name in self.names}
            cells = []
            for one, other in pairs:
                first, second = found[one], found[other]
                if first is None or second is None:
                    cells.append("-")
                else:
                    cells.append(number(agreement(first, second, self.first.kind, self.first.classes)))
            rows.append([case, *cells])
        return ["case", *(f"{one} and {other}" for one, other in pairs)], rows

    def focus(self, case: str, mask: Array, affine: Array) -> dict[tuple[int, str], float]:
        """How strong attention is inside of a mask, as a multiple of that anywhere: (row, network) -> value.

        Args:
            case: its name.
            mask: shape (*S) of the file's grid, bool.
            affine: of that grid.
        """
        values = {}
        grids: dict[Any, Array] = {}
        for place, row in enumerate(self.rows):
            for name, path in row.paths.items():
                seen = self.outcomes[name].seen[case]
                if path == AFFINITY or path not in seen.files:
                    continue
                attention = seen.load(path)
                key = (attention.shape, seen.affine.tobytes())
                if key not in grids:
                    grids[key] = on_other_grid(mask.astype(np.uint8), affine, seen.affine, attention.shape) > 0
                inside, mean = grids[key], float(attention.mean())
                values[place, name] = float(attention[inside].mean()) / mean if inside.any() and mean > 0 else math.nan
        return values

    # ---- words -----------------------------------------------------------------------------------------------------

    def verdict(self) -> str:
        """One or two sentences: who is best, by how much, at what price."""
        metrics, cases = self.metrics, len(self.labeled)
        if not metrics or not cases:
            return (f"{len(self.names)} networks on {len(self.cases)} case(s) without scores: that one is better than "
                    "another cannot be told here, only where they differ.")
        key = metrics[0]
        means = {name: self.mean(key, name) for name in self.names}
        known = {name: value for name, value in means.items() if not math.isnan(value)}
        if not known:
            return f"None of {cases} case(s) has a {METRICS[key].name}: there is nothing in their labels."
        best = min(known, key=lambda name: abs(known[name] - METRICS[key].best))
        if len(known) == len(means) and max(known.values()) - min(known.values()) < 1e-9:
            return (f"All networks have the same mean {METRICS[key].name}, {number(known[best])}: none is nearer to "
                    "the labels.")
        others = ", ".join(f"{number(value)} of {name}" for name, value in means.items() if name != best)
        wins = sum(best in self.best(key, case) for case in self.labeled)
        text = (f"{best} is nearest to the labels: mean {METRICS[key].name} {number(known[best])}, against {others}; "
                f"it is the best in {wins} of {cases} case(s).")
        text += self.price()
        return text if cases >= 5 else f"{text} So few cases say little about others."


def number(value: float, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
