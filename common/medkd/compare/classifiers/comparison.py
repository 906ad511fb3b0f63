# SPDX-License-Identifier: Apache-2.0
"""All that was found out about some classifiers on some cases, as tables and words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from medkd.compare.classifiers.running import ClassOutcome
from medkd.compare.comparison import Compared, Metric, number
from medkd.metrics.classification import confusion_matrix

__all__ = ["CLASS_METRICS", "ClassComparison"]

Rows = list[list[str]]
Marked = list[tuple[int, int]]     # row and column of cells that are wrong

CLASS_METRICS = {
    "val_balanced_accuracy": Metric("balanced accuracy", "mean over the classes of the share that is found; 1 is "
                                    "perfect", 1),
    "val_quadratic_kappa": Metric("quadratic kappa", "agreement with the labels on classes in their order: a slip by "
                                  "two weighs four times one by a single class; 1 is perfect, 0 is chance", 1),
    "val_macro_f1": Metric("macro F1", "mean over the classes of 2 TP / (2 TP + FP + FN); 1 is perfect", 1),
    "val_auc": Metric("AUC", "mean over the classes of the area under the ROC curve, one class against the others; "
                      "1 is perfect, 0.5 is chance", 1),
    "val_accuracy": Metric("accuracy", "share of the cases whose class is right; 1 is perfect", 1),
}
_FEW = 30                          # cases, below which a share is known to 0.1 at best
_DIGITS = 3                        # of seconds: one pass over a picture is short


@dataclass(frozen=True)
class ClassComparison(Compared[ClassOutcome]):
    """Networks that classify whole images, cases and what came of them."""

    def predicted(self, name: str, case: str) -> int:
        """The class that a network gives a case."""
        return int(self.outcomes[name].probabilities[case].argmax())

    def label(self, case: str) -> int | None:
        """The class of a case; None where it is unknown."""
        return self.cases[case].get("label")

    def is_wrong(self, name: str, case: str) -> bool:
        """Whether a case has a label, and a network gives it another class."""
        return self.label(case) not in (None, self.predicted(name, case))

    @property
    def metrics(self) -> list[str]:
        """Metrics that all networks have and that have a name here, the bundle's main one first."""
        own = self.first.config["validate"]["key_metric"] if self.labeled else {}
        return [key for key in own if key in CLASS_METRICS and all(key in one.totals for one in self.outcomes.values())]

    @cached_property
    def ranked(self) -> list[str]:
        """Cases on which the networks differ, then those that they get wrong, then the others, each in their order."""
        def rank(case: str) -> int:
            if len({self.predicted(name, case) for name in self.names}) > 1:
                return 0
            return 1 if self.is_wrong(self.names[0], case) else 2

        return sorted(self.cases, key=rank)

    def right(self, name: str) -> int:
        """Number of cases with a label that a network gets right."""
        return sum(not self.is_wrong(name, case) for case in self.labeled)

    # ---- tables: head, rows ----------------------------------------------------------------------------------------

    def summary(self) -> tuple[list[str], Rows]:
        """A row per network: metrics, right cases, size and time."""
        metrics, cases = self.metrics, len(self.labeled)
        head = ["network", *(CLASS_METRICS[metric].name for metric in metrics), *(["right"] if cases else []),
                "parameters", "s per case"]
        rows = []
        for name in self.names:
            outcome = self.outcomes[name]
            rows.append([
                name, *(number(outcome.totals[metric]) for metric in metrics),
                *([f"{self.right(name)} of {cases}"] if cases else []),
                f"{outcome.parameters / 1e6:.3f} M", number(self.seconds(name), _DIGITS),
            ])
        return head, rows

    def case_table(self) -> tuple[list[str], Rows, Marked]:
        """A row per case, those that matter first: its class, and what each network takes it for, how surely."""
        rows, marked = [], []
        for line, case in enumerate(self.ranked):
            label = self.label(case)
            cells = [case, *([self._name(label)] if self.labeled else [])]
            for name in self.names:
                if self.is_wrong(name, case):
                    marked.append((line, len(cells)))
                predicted = self.predicted(name, case)
                cells.append(f"{self.class_name(predicted)} {self.outcomes[name].probabilities[case][predicted]:.2f}")
            rows.append(cells)
        return ["case", *(["label"] if self.labeled else []), *self.names], rows, marked

    def _name(self, label: int | None) -> str:
        return "-" if label is None else self.class_name(label)

    def confusion_table(self, name: str) -> tuple[list[str], Rows, Marked]:
        """A row per true class, a column per predicted one; the last one is the share that is found."""
        classes = self.first.classes
        labels = [int(self.cases[case]["label"]) for case in self.labeled]
        counts = confusion_matrix(labels, [self.predicted(name, case) for case in self.labeled], classes)
        rows = [
            [self.class_name(true), *map(str, line), number(line[true] / sum(line) if sum(line) else math.nan)]
            for true, line in enumerate(counts.tolist())
        ]
        marked = [(true, 1 + other) for true, line in enumerate(counts.tolist())
                  for other, count in enumerate(line) if count and other != true]
        return ["label", *(self.class_name(one) for one in range(classes)), "found"], rows, marked

    def agreement_table(self) -> tuple[list[str], Rows]:
        """A row per pair of networks: in how many cases they give the same class, and which of both is right."""
        rows = []
        for one, other in combinations(self.names, 2):
            same = sum(self.predicted(one, case) == self.predicted(other, case) for case in self.cases)
            wrong = [(self.is_wrong(one, case), self.is_wrong(other, case)) for case in self.labeled]
            counts = [wrong.count(pair) for pair in ((False, False), (False, True), (True, False), (True, True))]
            rows.append([f"{one} and {other}", f"{same} of {len(self.cases)}", *(map(str, counts) if wrong else [])])
        right = ["both are right", "only the first is", "only the second is", "none is"] if self.labeled else []
        return ["networks", "same class", *right], rows

    # ---- words -----------------------------------------------------------------------------------------------------

    def verdict(self) -> str:
        """One or two sentences: who is best, by how much, at what price."""
        cases = len(self.labeled)
        known = [metric for metric in self.metrics
                 if not any(math.isnan(outcome.totals[metric]) for outcome in self.outcomes.values())]
        if not known:
            return (f"{len(self.names)} networks on {len(self.cases)} case(s) without scores: that one is better than "
                    "another cannot be told here, only where they differ.")
        text = self._best(known[0], cases) + self.price(_DIGITS)
        return text if cases >= _FEW else f"{text} So few cases say little about others."

    def _best(self, metric: str, cases: int) -> str:
        what, values = CLASS_METRICS[metric].name, {name: self.outcomes[name].totals[metric] for name in self.names}
        if max(values.values()) - min(values.values()) < 1e-9:
            return f"All networks have the same {what}, {number(values[self.names[0]])}: none is nearer to the labels."
        best = max(values, key=lambda name: values[name])
        others = ", ".join(f"{number(value)} of {name}" for name, value in values.items() if name != best)
        return (f"{best} is nearest to the labels: {what} {number(values[best])}, against {others}; it is right in "
                f"{self.right(best)} of {cases} case(s), "
                f"{', '.join(f'{name} in {self.right(name)}' for name in self.names if name != best)}.")
