# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison of classifiers: one HTML file, the table first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from statistics import fmean

from medkd.compare.cases import read_case
from medkd.compare.classifiers.comparison import CLASS_METRICS, ClassComparison
from medkd.compare.classifiers.figures import KNOWN, TRUE, ClassFigures
from medkd.compare.comparison import number
from medkd.compare.report import network_parts, time_meaning, write_parts
from medkd.report import page
from medkd.report.pictures import DIFFERENT

__all__ = ["write_class_report"]

Alike = dict[tuple[str, str, int, int], float]


def write_class_report(
    path: Path, found: ClassComparison, command: str, window: tuple[float, float] | None = None,
    shown: int = 3, told: Callable[[str], None] = lambda case: None,
) -> None:
    """Write the report; one picture at a time is read for it.

    Args:
        path: of the HTML file.
        found: what it tells.
        command: that repeats it.
        window: level and width of gray values; None for the networks' own.
        shown: cases with pictures, as `compare_classifiers` had it.
        told: called with each case whose pictures are drawn.
    """
    pictures, alike = list[str](), list[Alike]()
    left_out = [reason for name in found.names for reason in found.outcomes[name].left_out]
    cases = found.ranked[:shown] if _can_be_drawn(found, left_out) else []
    for case in cases:
        told(case)
        figures = ClassFigures(found, read_case(found.first, case, {"image": found.cases[case]["image"]}), window)
        pictures += [f"<h3>{escape(figures.title)}</h3>", *figures.rows()]
        alike.append(figures.alike())
    if len(found.cases) > shown:
        left_out.append(f"Pictures of {len(found.cases) - shown} more case(s); --pictures N draws those of N.")
    write_parts(path, found, [
        *_summary(found), *network_parts(found), *_scores(found),
        *(["<h2>Where the networks look</h2>", *_words(found), *_alike(found, alike), *pictures] if pictures else []),
    ], left_out, command)


def _can_be_drawn(found: ClassComparison, left_out: list[str]) -> bool:
    if found.first.axes == 3:
        left_out.append("Pictures: the cases are volumes, and maps of classes are drawn over pictures only.")
    return found.first.axes == 2 and any(outcome.layers for outcome in found.outcomes.values())


def _summary(found: ClassComparison) -> list[str]:
    head, rows = found.summary()
    meanings = [(CLASS_METRICS[metric].name, CLASS_METRICS[metric].about) for metric in found.metrics]
    meanings.append(time_meaning(found))
    labeled, every = len(found.labeled), len(found.cases)
    cases = f"{every} case(s), {labeled} of them with a label" if labeled < every else (
        f"{labeled} case(s), each with a label")
    return [
        f"<p><strong>{escape(found.verdict())}</strong></p>", page.table(rows, head),
        f"<p>{cases}. Scores are of all cases with a label together, computed as the bundle of each network evaluates "
        "them.</p>", page.facts(meanings),
    ]


def _scores(found: ClassComparison) -> list[str]:
    head, rows, marked = found.case_table()
    order = "Cases on which the networks differ stand first"
    order += ", then those that they get wrong. What is wrong is marked." if found.labeled else "."
    parts = ["<h2>Case by case</h2>", f"<p>{order} Numbers are the probability of the class that is named.</p>",
             page.table(rows, head, marked=marked), "<h3>How much the networks agree</h3>"]
    head, rows = found.agreement_table()
    parts.append(page.table(rows, head))
    if not found.labeled:
        return parts
    parts += ["<h2>Which classes are taken for which</h2>", "<p>A row for each class of the labels, a column for each "
              "that is predicted, in cases; of these the share that is found.</p>"]
    for name in found.names:
        head, rows, marked = found.confusion_table(name)
        parts += [f"<h3>{escape(name)}</h3>", page.table(rows, head, marked=marked)]
    return parts


def _words(found: ClassComparison) -> list[str]:
    layers = "; ".join(f"{name}: {', '.join(outcome.layers) or 'none'}" for name, outcome in found.outcomes.items())
    labels = {"predicted, and right": TRUE, "predicted, and wrong": DIFFERENT} if found.labeled else {}
    unknown = {"predicted; there is no label": KNOWN} if len(found.labeled) < len(found.cases) else {}
    dashed = " A dashed border is round the class of the label where another one is predicted." if labels else ""
    return [
        page.legend({**labels, **unknown}),
        f"<p>The evidence for each class: features of a layer ({escape(layers)}) times their weight for the score of "
        "the class, summed where the product is positive, as the loss AT+ compares them. In a case colors mean the "
        "same for all classes of a network, from its least value, without color, to its greatest, the brightest; those "
        "of two networks can be compared in their places, not in their values. The number is the probability of the "
        f"class.{dashed} A network with fewer cells has a coarser map. A bright place speaks for a class; that it does "
        "so rightly does not follow.</p>",
    ]


def _alike(found: ClassComparison, alike: Sequence[Alike]) -> list[str]:
    """How alike the maps of networks are, a row per class and layer; means over the cases with pictures."""
    pairs, rows = list(combinations(found.names, 2)), []
    layers = max(len(outcome.layers) for outcome in found.outcomes.values())
    for layer in range(layers):
        for one in range(found.first.classes):
            means = []
            for pair in pairs:
                values = [case.get((*pair, layer, one), math.nan) for case in alike]
                known = [value for value in values if not math.isnan(value)]
                means.append(number(fmean(known), 2) if known else "-")
            rows.append([found.class_name(one) + (f", layer {layer + 1}" if layers > 1 else ""), *means])
    return [page.table(rows, ["class", *(f"{one} and {other}" for one, other in pairs)]),
            "<p>Correlation of the maps of two networks over the pixels of a case: 1 is the same places, 0 is none in "
            "common. Mean of the cases below.</p>"]
