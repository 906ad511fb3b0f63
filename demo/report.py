# SPDX-License-Identifier: Apache-2.0
"""The demo's report: one HTML file that loads nothing, for a phone and a desktop, light and dark."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from curves import curve_figure, epoch_means
from pictures import (
    COLORS,
    DIFFERENT,
    Plane,
    Volume,
    best_slice,
    contour_picture,
    difference_picture,
    differing_share,
    load,
)
from scores import ALONE, DISTILLED, RUNS, TEACHER, Result, gap_text, table, verdict

__all__ = ["Case", "Report", "read_cases", "write_report"]

PLANES: tuple[Plane, Plane] = ("axial", "coronal")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; vertical-align: bottom; } tr.total td { font-weight: 600; }
.facts td { text-align: left; } .hd { border-left: 1px solid var(--line); }
.grid { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 46%), 1fr)); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.plots svg { width: 100%; height: auto; }
figure { margin: 0; min-width: 0; } figure img { width: 100%; display: block; border-radius: 4px; background: #000; }
figcaption { font-size: .85rem; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em;
  vertical-align: -.08em; outline: 1px solid var(--line); }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .82rem; border-radius: 4px; }
@media (max-width: 34rem) { th, td { padding: .2rem .28rem; font-size: .8rem; } }
"""


@dataclass(frozen=True)
class Case:
    """A test case: its name, image, label, and the prediction of each run."""

    name: str
    image: Volume
    label: Volume
    predictions: Mapping[str, Volume]


@dataclass(frozen=True)
class Report:
    """All that the report shows.

    Attributes:
        results: run -> scores.
        organs: names of the labels 1, 2, ...
        cases: test cases, of which the first two are shown.
        curves: run -> tag -> points (epoch, value).
        facts: pairs such as ("seed", "0") for the section on repeating it.
        commands: what was run, one line each.
    """

    results: Mapping[str, Result]
    organs: Sequence[str]
    cases: Sequence[Case]
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    facts: Sequence[tuple[str, str]]
    commands: Sequence[str]


def read_cases(data: Path, predictions: Mapping[str, Path]) -> list[Case]:
    """Read the test cases of a datalist.json with their predictions, turned alike."""
    cases = []
    for item in json.loads((data / "datalist.json").read_text())["test"]:
        stem = Path(item["image"]).name.removesuffix(".nii.gz")
        found = {run: load(folder / f"{stem}_seg.nii.gz") for run, folder in predictions.items()}
        cases.append(Case(stem.replace("_", " "), load(data / item["image"]), load(data / item["label"]), found))
    return cases


def write_report(report: Report, path: Path) -> None:
    """Write the report as one file."""
    parts = [
        "<h1>MedKD demo: a large teacher, a small student</h1>", _summary(report), _table(report), _slices(report),
        _differences(report), _curves(report), _repeat(report),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>MedKD demo</title>\n<style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    teacher, student = report.results[TEACHER], report.results[DISTILLED]
    return (
        f"<p><strong>{html.escape(verdict(report.results))}</strong> A student of "
        f"{student.parameters / 1e6:.2f} M parameters, {100 * student.parameters / teacher.parameters:.1f} % of its "
        f"teacher's {teacher.parameters / 1e6:.2f} M, was trained twice with the same data, schedule and number of "
        "steps: alone with the labels, and with the teacher's help (boundary and relation distillation). The student "
        f"takes {student.seconds_per_case:.2f} s per case, the teacher {teacher.seconds_per_case:.2f} s, on two CPU "
        f"threads. All three networks saw {len(student.dice)} test cases once, at the end, in their original geometry. "
        "The data are procedural CT phantoms, and this is one run with one seed: a demonstration, not a benchmark.</p>"
    )


def _table(report: Report) -> str:
    head = "".join(f"<th{_edge(n)}>{run}</th>" for n, run in enumerate([*RUNS, *RUNS]))
    rows = []
    for row in table(report.results, report.organs):
        cells = "".join(f"<td{_edge(n)}>{cell}</td>" for n, cell in enumerate(row[1:]))
        rows.append(f"<tr{' class=total' if row[0] == 'mean' else ''}><td>{html.escape(row[0])}</td>{cells}</tr>")
    return (
        "<h2>Results on the test cases</h2>\n<div class=wide><table><thead>"
        "<tr><th></th><th colspan=3>Dice, higher is better</th>"
        f"<th colspan=3 class=hd>HD95 in mm, lower is better</th></tr><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
        f"<p>Gap recovered: {gap_text(report.results)}. HD95 is the 95th percentile of the Hausdorff distance; an "
        "organ that was missed altogether counts with the diagonal of the image. Only the left kidney and the left "
        "adrenal are labeled; the right ones look alike on purpose.</p>"
    )


def _edge(column: int) -> str:
    return " class=hd" if column == len(RUNS) else ""


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _legend(report: Report) -> str:
    items = (f"<span><i style='background:{c}'></i>{o}</span>" for o, c in zip(report.organs, COLORS, strict=False))
    return f"<p class=legend>{''.join(items)}</p>"


def _slices(report: Report) -> str:
    parts = [
        "<h2>What the networks see</h2>", _legend(report),
        "<p>Window 40/400 HU. R, L, A, P, S, I: the patient's right, left, front, back, head and feet.</p>",
    ]
    for case in report.cases[:2]:
        for plane in PLANES:
            position = best_slice(case.label.data, plane)
            labels = {"truth": case.label, **case.predictions}
            figures = [
                _figure(contour_picture(case.image, label, plane, position), f"{case.name}, {plane}: {name}")
                for name, label in labels.items()
            ]
            parts.append(f"<div class=grid>{''.join(figures)}</div><br>")
    return "\n".join(parts)


def _differences(report: Report) -> str:
    predictions = {run: [case.predictions[run] for case in report.cases] for run in RUNS}
    shares = {run: differing_share(predictions, run, TEACHER) for run in (ALONE, DISTILLED)}
    before, after = (sum(shares[run]) / len(shares[run]) for run in (ALONE, DISTILLED))
    parts = [
        "<h2>Where student and teacher differ</h2>",
        f"<p class=legend><span><i style='background:{DIFFERENT}'></i>student and teacher differ</span>"
        "<span><i style='background:#fff'></i>outline of the teacher's organs</span></p>"
        "<p>Of the voxels that either of the two calls an organ, the student alone differs from the teacher in "
        f"{before:.1f} %, the distilled student in {after:.1f} % (mean of the test cases).</p>",
    ]
    for number, case in enumerate(report.cases[:2]):
        figures = []
        for plane in PLANES:
            position = best_slice(case.label.data, plane)
            for run, word in zip((ALONE, DISTILLED), ("student alone (before)", "distilled (after)"), strict=True):
                pair = (case.predictions[run], case.predictions[TEACHER])
                png = difference_picture(case.image, pair, plane, position)
                figures.append(_figure(png, f"{case.name}, {plane}: {word}; {shares[run][number]:.0f} % of the case"))
        parts.append(f"<div class=grid>{''.join(figures)}</div><br>")
    return "\n".join(parts)


def _curves(report: Report) -> str:
    def of(tag: str, average: bool = True) -> dict[str, Sequence[tuple[float, float]]]:
        found = {run: tags[tag] for run, tags in report.curves.items() if tags.get(tag)}
        return {run: epoch_means(points) for run, points in found.items()} if average else found

    terms = sorted({tag for tags in report.curves.values() for tag in tags if tag.startswith("kd/")})
    plots = [
        curve_figure(of("val_mean_dice", average=False), "mean Dice on the validation cases", marks=True),
        curve_figure(of("supervised_loss"), "supervised loss (Dice and cross entropy)"),
        curve_figure(of("loss"), "total loss"),
        *(curve_figure(of(tag), f"distillation term: {tag[3:]}, unweighted") for tag in terms),
    ]
    return (
        "<h2>How training went</h2>\n<p>Losses are means over the steps of an epoch. The total loss is the supervised "
        f"one plus the weighted distillation terms.</p><div class=plots>{''.join(plots)}</div>"
    )


def _repeat(report: Report) -> str:
    facts = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in report.facts)
    commands = html.escape("\n".join(report.commands))
    return (
        f"<h2>Repeat it</h2>\n<div class=wide><table class=facts>{facts}</table></div>\n"
        f"<p>The command above did this, each time from the repository's root:</p><pre>{commands}</pre>"
    )
