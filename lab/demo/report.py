# SPDX-License-Identifier: Apache-2.0
"""The demo's report: what it says about the networks, in which order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from lab.demo import scores
from lab.demo.scores import ALONE, DISTILLED, RUNS, TEACHER, Result
from lab.demo.steps import Training, folder_of
from medkd.report import page, pictures
from medkd.report.curves import Curve, curve_figure, epoch_means, read_curves
from medkd.report.pictures import difference_picture, outline_picture

PLANES: tuple[pictures.Plane, pictures.Plane] = ("axial", "coronal")
SHOWN = 2   # test cases


@dataclass(frozen=True)
class Case:
    """A test case."""

    name: str
    image: pictures.Volume
    label: pictures.Volume
    predictions: Mapping[str, pictures.Volume]   # of each run

    def views(self) -> list[tuple[pictures.Plane, int]]:
        """Planes, and the slice that is shown of each."""
        return [(plane, pictures.best_slice(self.label.data, plane)) for plane in PLANES]

    def difference(self, run: str) -> float:
        """Percent in which a run differs from the teacher."""
        return pictures.disagreement(self.predictions[run].data, self.predictions[TEACHER].data)


def write_report(
    path: Path, output: Path, results: Mapping[str, Result], trainings: Mapping[str, Training],
    repeat: tuple[Sequence[tuple[str, str]], Sequence[str]],
) -> None:
    """Write the report of what is in `output` as one file.

    Args:
        path: of the file.
        output: folder of the demo.
        results: of each network.
        trainings: of each network.
        repeat: facts such as ("seed", "0"), and the commands of all steps.
    """
    datalist = output / "data" / "datalist.json"
    cases = [_read_case(output, item) for item in json.loads(datalist.read_text())["test"]]
    curves = {run: read_curves(output / "bundle" / one.weights / "logs") for run, one in trainings.items()}
    facts, commands = repeat
    organs, listed = scores.organ_names(datalist), escape("\n".join(commands))
    page.write_page(path, "MedKD demo", [
        "<h1>MedKD demo: what a teacher without its data is worth</h1>", _summary(results), *_scores(results, organs),
        *_slices(cases, organs), *_differences(cases), *_curves(curves),
        "<h2>Repeat it</h2>", page.facts(facts),
        "<p>The command above did this, each time from the repository's root, with its environment (<code>. "
        f".venv/bin/activate</code>):</p><pre>{listed}</pre>",
    ])


def _read_case(output: Path, item: Mapping[str, str]) -> Case:
    """A case of a datalist.json with its predictions, turned alike."""
    image, label = (pictures.load(output / "data" / item[name]) for name in ("image", "label"))
    stem = Path(item["image"]).name.removesuffix(".nii.gz")
    found = {run: pictures.load(folder_of(run, output, "predictions") / f"{stem}_seg.nii.gz") for run in RUNS}
    return Case(stem.replace("_", " "), image, label, found)


def _summary(results: Mapping[str, Result]) -> str:
    teacher, student = results[TEACHER], results[DISTILLED]
    return (
        f"<p><strong>{escape(scores.verdict(results))}</strong> Somebody trained a teacher of "
        f"{teacher.parameters / 1e6:.2f} M parameters with {teacher.labels} labeled cases. You have its weights, none "
        f"of its cases, {student.labels} labeled cases of your own and {student.unlabeled} images without labels. A "
        f"student of {student.parameters / 1e6:.2f} M parameters was trained alone with your labels, and with the "
        "teacher's help: each step then sees crops of an image without a label too, and learns what the teacher says "
        "of it. Alone it takes twice the steps, so that both see as many crops. The student takes "
        f"{student.seconds:.2f} s per case, the teacher {teacher.seconds:.2f} s, on two CPU threads. All networks saw "
        f"{len(student.dice)} test cases once, at the end, in their original geometry. The data are procedural CT "
        "phantoms, and this is one run with one seed: a demonstration, not a benchmark.</p>"
    )


def _scores(results: Mapping[str, Result], organs: Sequence[str]) -> list[str]:
    groups = [("Dice, higher is better", len(RUNS)), ("HD95 in mm, lower is better", len(RUNS))]
    head, rows = scores.summary_table(results)
    return [
        "<h2>Results on the test cases</h2>",
        page.table(rows, head, strong=[DISTILLED]),
        "<p>What the teacher is worth in labeled cases is read off the students alone in the table, on straight lines "
        "between their Dice over the logarithm of their labels; those with more labels than yours got the teacher's. "
        "Volume is the predicted one over the true one: 1 is right.</p>",
        page.table(scores.organ_table(results, organs), ["", *RUNS, *RUNS], groups, strong=["mean"]),
        f"<p>Gap recovered: {scores.gap_text(results)}. HD95 is the 95th percentile of the Hausdorff distance; an "
        "organ that was missed altogether counts with the diagonal of the image. Only the left kidney and the left "
        "adrenal are labeled; the right ones look alike on purpose.</p>",
    ]


def _slices(cases: Sequence[Case], organs: Sequence[str]) -> list[str]:
    return [
        "<h2>What the networks see</h2>",
        page.legend({organ: pictures.class_color(number) for number, organ in enumerate(organs, start=1)}),
        "<p>Window 40/400 HU. R, L, A, P, S, I: the patient's right, left, front, back, head and feet.</p>",
        *(
            page.grid(
                page.figure(outline_picture(case.image, label, plane, position), f"{case.name}, {plane}: {run}")
                for run, label in {"truth": case.label, **case.predictions}.items()
            )
            for case in cases[:SHOWN] for plane, position in case.views()
        ),
    ]


def _differences(cases: Sequence[Case]) -> list[str]:
    words = {ALONE: "student alone (before)", DISTILLED: "distilled (after)"}
    alone, distilled = (fmean(case.difference(run) for case in cases) for run in words)
    parts = [
        "<h2>Where student and teacher differ</h2>",
        page.legend({"student and teacher differ": pictures.DIFFERENT, "outline of the teacher's organs": "#fff"}),
        "<p>Of the voxels that either of the two calls an organ, the student alone differs from the teacher in "
        f"{alone:.1f} %, the distilled student in {distilled:.1f} % (mean of the test cases).</p>",
    ]
    for case in cases[:SHOWN]:
        teacher = case.predictions[TEACHER]
        parts.append(page.grid(
            page.figure(
                difference_picture(case.image, case.predictions[run], teacher, plane, position),
                f"{case.name}, {plane}: {word}; {case.difference(run):.0f} % of the case",
            )
            for plane, position in case.views() for run, word in words.items()
        ))
    return parts


def _curves(curves: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    def means(tag: str, label: str) -> str:
        return curve_figure({run: epoch_means(tags.get(tag, [])) for run, tags in curves.items()}, label)

    dice = {run: tags.get("val_mean_dice", []) for run, tags in curves.items()}
    terms = sorted({tag for tags in curves.values() for tag in tags if tag.startswith("kd/")})
    plots = [
        curve_figure(dice, "mean Dice on the validation cases", marks=True),
        means("supervised_loss", "supervised loss (Dice and cross entropy)"),
        means("loss", "total loss"),
        *(means(tag, f"distillation term: {tag[3:]}, unweighted") for tag in terms),
    ]
    return [
        "<h2>How training went</h2>",
        "<p>Losses are means over the steps of an epoch. The total loss is the supervised one plus the weighted "
        "distillation terms.</p>",
        page.grid(plots, "plots"),
    ]
