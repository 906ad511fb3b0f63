# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: one HTML file, the table first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from medkd.compare.cases import read_case
from medkd.compare.comparison import METRICS, Compared, Comparison, number
from medkd.compare.figures import INSTANCES, CaseFigures
from medkd.report import page
from medkd.report.pictures import DIFFERENT, class_color

__all__ = ["network_parts", "time_meaning", "write_parts", "write_report"]


def write_report(
    path: Path, found: Comparison, command: str, exponent: float = 4.0, window: tuple[float, float] | None = None,
    slices: int = 3, shown: int = 3, told: Callable[[str], None] = lambda case: None,
) -> None:
    """Write the report; files of one case at a time are read for it.

    Args:
        path: of the HTML file.
        found: what it tells.
        command: that repeats it.
        exponent: of the attention maps.
        window: level and width of gray values in the unit of the images; None for the networks' own.
        slices: shown of each case.
        shown: cases with pictures, the first ones, as `compare` had it.
        told: called with each case whose pictures are drawn.
    """
    overlays, attention, left_out = list[str](), list[str](), list(_left_out(found))
    focus: list[dict[tuple[int, str], float]] = []
    for case in list(found.cases)[:shown]:
        figures = CaseFigures(found, read_case(found.first, case, found.cases[case]), window, slices)
        told(case)
        overlays += [f"<h3>{escape(case)}</h3>", *figures.overlays()]
        attention += [f"<h3>{escape(figures.attention_text())}</h3>", *figures.attention()]
        if figures.foreground is not None and found.first.config.get("unit") != "nm":
            focus.append(found.focus(case, figures.foreground, figures.case.frame.affine))
    if len(found.cases) > shown:
        left_out.append(f"Pictures of {len(found.cases) - shown} more case(s); --pictures N draws those of N.")
    write_parts(path, found, [
        *_summary(found), *network_parts(found), *_scores(found),
        *(["<h2>What the networks find</h2>", *_legend(found, slices), *overlays] if overlays else []),
        *(["<h2>Where the networks look</h2>", _attention_words(found, exponent), *_focus(found, focus), *attention]
          if found.rows and attention else []),
    ], left_out, command)


def write_parts(
    path: Path, found: Compared[Any], parts: Sequence[str], left_out: Sequence[str], command: str
) -> None:
    """Write a page of parts, between its title and what is left out."""
    title = "Comparison of networks: " + ", ".join(found.names)
    page.write_page(path, title, [
        f"<h1>{escape(title)}</h1>", *parts,
        *(["<h2>What is left out</h2>", "<ul>", *(f"<li>{escape(one)}</li>" for one in left_out), "</ul>"]
          if left_out else []),
        "<h2>Repeat it</h2>", f"<pre>{escape(command)}</pre>",
    ])


def _left_out(found: Comparison) -> Sequence[str]:
    known = [reason for name in found.names for reason in found.outcomes[name].left_out]
    if found.first.kind == "instances" and found.first.config.get("unit") == "nm":
        known.append("Attention inside of instances: they fill the volume, so there is no outside to compare with.")
    return known


def _summary(found: Comparison) -> list[str]:
    head, rows = found.summary()
    meanings = [(found.title(metric), METRICS[metric].about) for metric in found.metrics]
    meanings += [("best in cases", f"cases in which no other network has a better {METRICS[found.metrics[0]].name}")
                 ] if found.metrics else []
    meanings.append(time_meaning(found))
    labeled = len(found.labeled)
    cases = f"{len(found.cases)} case(s), {labeled} of them with a label" if labeled < len(found.cases) else (
        f"{labeled} case(s), each with a label")
    return [
        f"<p><strong>{escape(found.verdict())}</strong></p>", page.table(rows, head),
        f"<p>{cases}. Scores are means over the cases with a label, computed as the bundle of each network evaluates "
        "it, on the grid of the files. A case without anything to find has no score.</p>", page.facts(meanings),
    ]


def time_meaning(found: Compared[Any]) -> tuple[str, str]:
    """How the time of a case is measured."""
    devices = ", ".join(sorted({outcome.device for outcome in found.outcomes.values()}))
    return "s per case", ("of the network with its windows, without reading and writing; device "
                          f"{devices}, one CPU thread, measured once per case: rough")


def network_parts(found: Compared[Any]) -> list[str]:
    """What each network is."""
    parts = ["<h2>What each network is</h2>"]
    for network in found.networks:
        outcome, others = found.outcomes[network.name], [one for one in found.networks if one is not network]
        parts += [f"<h3>{escape(network.name)}</h3>",
                  page.facts(network.facts(others, outcome.layer, outcome.parameters))]
    return parts


def _scores(found: Comparison) -> list[str]:
    parts = ["<h2>Case by case</h2>"]
    if found.metrics and found.labeled:
        head, rows, groups = found.case_table()
        parts.append(page.table(rows, head, groups))
        if found.first.kind == "classes" and found.first.classes > 2:
            head, rows, groups = found.class_table()
            parts += ["<h3>Class by class, means over the cases that have it</h3>", page.table(rows, head, groups)]
    head, rows = found.agreement_table()
    what = "mean Dice of the classes that either has" if found.first.kind == "classes" else "panoptic quality"
    return [*parts, "<h3>How much the networks agree</h3>", page.table(rows, head),
            f"<p>With each other, whatever the label says: {what} of one prediction measured against the other; 1 is "
            "the same. Agreement is not correctness: two networks may make the same error.</p>"]


def _legend(found: Comparison, slices: int) -> list[str]:
    classes = range(1, found.first.classes) if found.first.kind == "classes" else ()
    colors = {found.class_name(number): class_color(number) for number in classes} or {"instances": INSTANCES}
    labeled = len(found.labeled)
    words = "wrong, or without a label: the networks differ" if 0 < labeled < len(found.cases) else (
        "wrong" if labeled else "the networks differ")
    is_patient = found.first.config.get("unit") == "mm"
    letters = " R, L, A, P: the patient's right, left, front and back." if is_patient else ""
    rule = {
        "classes": "Each class has the slice with most of it, or with most disagreement where there is no label; of "
                   f"these the {slices} with most marked voxels are shown.",
        "instances": "The slices with most errors are shown, or with most disagreement where there is no label. Of two "
                     "instances that are joined the smaller one is marked, and of one that is cut the smaller part.",
    }[found.first.kind]
    return [page.legend({**colors, words: DIFFERENT}),
            f"<p>{rule} Slices and gray values are the same for all networks.{letters}</p>"]


def _attention_words(found: Comparison, exponent: float) -> str:
    outline = " The white line is what the label, or without one all networks, call foreground." if (
        found.first.kind == "classes") else ""
    logits = " Where a layer is the network's output, its channels are the logits: bright is where one of them, " \
        "that of the background too, is far from 0." if any(row.logits for row in found.rows) else ""
    return (
        f"<p>Mean over the channels of a layer of |x|<sup>{exponent:g}</sup>, divided by its L2 norm over the whole "
        "case: where the layer reacts most, in bright colors. In a row, colors mean the same for all networks. Rows "
        f"are layers of the same share of the image's size.{outline}{logits} A bright place is where a layer reacts; "
        "that the network decides by it does not follow.</p>"
    )


def _focus(found: Comparison, focus: Sequence[dict[tuple[int, str], float]]) -> list[str]:
    """How strong attention is in the foreground, a row per level; means over the cases with pictures."""
    rows = []
    for place, row in enumerate(found.rows):
        values = [[one[place, name] for one in focus if not math.isnan(one.get((place, name), math.nan))]
                  for name in found.names]
        if any(values):
            rows.append([row.title, *(number(fmean(each), 1) if each else "-" for each in values)])
    if not rows:
        return []
    return [page.table(rows, ["layer", *found.names]),
            "<p>Attention inside the foreground as a multiple of the mean of the whole image: 1 is no preference. Mean "
            "of the cases below.</p>"]
