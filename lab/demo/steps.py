# SPDX-License-Identifier: Apache-2.0
"""The demo's steps as jobs: which commands they are, and what their results depend on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from monai.bundle.config_parser import ConfigParser

from lab.bundle import ROOT, BundleRun
from lab.demo.scores import ALONE, DISTILLED, RUNS, TEACHER
from lab.execute import Job, bundle_job
from lab.keys import code_hash, content_hash, run_key
from lab.measure import cpu_dtype
from lab.networks import program_words
from lab.training import check_model
from medkd.phantoms.ct import CT_LABELS

PHANTOMS = {                            # options that the phantoms ask for
    "out_channels": len(CT_LABELS), "spacing": [5.0, 5.0, 4.0], "patch_size": [40, 40, 40],
}
TEACHER_LEARNING_RATE = 0.002           # students have that of the config
THEIRS, OWN = "../teacher_data", "../data"   # sets of cases: of whoever trained the teacher, and of the user
SPEED = "prediction and speed"


@dataclass(frozen=True)
class Sizes:
    """How much is done: cases, voxels, mm, epochs, and steps in each of these, however many cases there are."""

    teacher_labels: int                 # cases with a label that the teacher had, and the user has not
    labels: int                         # cases with a label that the user has
    unlabeled: int                      # and further images
    validation: int
    test: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    teacher_epochs: int
    alone_epochs: int                   # of a student alone, until more of them bring no more
    distilled_epochs: int               # whose steps see twice the crops
    val_interval: int
    steps: int
    more_labels: tuple[int, ...] = ()   # of the teacher's cases that further students alone get: what a label is worth


@dataclass(frozen=True)
class Training:
    """A network: overrides of train.json, the data it learns from, and where it leaves weights and scores."""

    overrides: tuple[str, ...]
    weights: str
    scores: str
    labels: int
    unlabeled: int = 0
    data: str = OWN
    options: Mapping[str, Any] = field(default_factory=dict)


def make_trainings(sizes: Sizes) -> dict[str, Training]:
    """All networks by their names, in the order in which they are trained; the last one learns from the teacher."""
    more = {}
    for count in sizes.more_labels:
        weights = f"runs/alone_{count}"
        options = {
            "ckpt_dir": weights, "output_dir": f"{weights}/eval",
            "train#dataset#data": f"$@load_datalist(@datalist, 'training')[:{count}]",
        }
        more[f"{ALONE} with {count} labels"] = Training(
            ("baseline",), weights, options["output_dir"], count, data=THEIRS, options=options
        )
    return {
        TEACHER: Training(("teacher",), "models/teacher", "runs/teacher/eval", sizes.teacher_labels, data=THEIRS),
        ALONE: Training(("baseline",), "runs/baseline", "runs/baseline/eval", sizes.labels),
        **more,
        DISTILLED: Training(("logits",), "runs/logits", "runs/logits/eval", sizes.labels, sizes.unlabeled),
    }


def folder_of(name: str, output: Path, kind: str = "steps") -> Path:
    """Folder of a step's log and state, or of a network's `predictions`."""
    return output / kind / name.replace(" ", "_")


def make_jobs(output: Path, sizes: Sizes, seed: int) -> list[Job]:
    """All steps up to the scores, in their order; the bundle lies in `output` already."""
    theirs, own = jobs = _phantoms(output, sizes, seed)
    trainings = make_trainings(sizes)
    for name, one in trainings.items():
        epochs = {TEACHER: sizes.teacher_epochs, DISTILLED: sizes.distilled_epochs}.get(name, sizes.alone_epochs)
        rate = {"learning_rate": TEACHER_LEARNING_RATE} if name == TEACHER else {}
        run = _run(output, "training", ["train", *one.overrides], dataset_dir=one.data, **{
            "epochs": epochs, "val_interval": sizes.val_interval, "train#trainer#epoch_length": sizes.steps,
            "cpu_dtype": cpu_dtype(), "seed": seed, **rate, **one.options,
        })
        needs = [(own if one.data == OWN else theirs).key]
        needs += [job.key for job in jobs if job.name == TEACHER and name == DISTILLED]
        weights = run.folder / one.weights
        jobs.append(bundle_job(
            name, folder_of(name, output), run_key(run, needs), [run],
            writes=[weights / part for part in ("logs", "model.pt", "model.json")],
            checkpoints=weights / "checkpoints", progress=[weights / "progress.json"],
            check=partial(check_model, weights),
        ))
    keys = [job.key for job in jobs]
    return [*jobs, _evaluation(output, trainings, keys), _speed(output, trainings, keys)]


def plan_lanes(jobs: Sequence[Job]) -> list[list[list[Job]]]:
    """What runs beside what: stages, one after the other, of lanes, whose jobs follow each other."""
    theirs, own, teacher, *students, distilled, evaluation, speed = jobs
    return [[[theirs], [own]], [[teacher, distilled], students], [[evaluation, speed]]]   # times need a quiet machine


def duration(jobs: Sequence[Job]) -> float:
    """Seconds of all jobs, side by side as planned."""
    return sum(max(sum(job.seconds for job in lane) for lane in lanes) for lanes in plan_lanes(jobs))


def _run(output: Path, run_id: str, configs: Sequence[str], **options: Any) -> BundleRun:
    return BundleRun(output / "bundle", run_id, configs, {"dataset_dir": OWN, **PHANTOMS, **options})


def _phantoms(output: Path, sizes: Sizes, seed: int) -> list[Job]:
    """The two sets of phantoms, of seeds that no other demo has."""
    grid = {name: ",".join(map(str, getattr(sizes, name))) for name in ("shape", "spacing")}
    both = {"validation": sizes.validation, **grid}
    counts = {
        THEIRS: {"seed": 2 * seed + 1, "training": sizes.teacher_labels, "test": 0, **both},
        OWN: {"seed": 2 * seed, "training": sizes.labels, "unlabeled": sizes.unlabeled, "test": sizes.test, **both},
    }
    run, jobs = _run(output, "phantoms", ()), []
    for name, (folder, options) in zip(("phantoms of the teacher", "your phantoms"), counts.items(), strict=True):
        words = ["-m", "medkd", "phantom", "ct", folder]
        words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        key = content_hash([words, code_hash({"code": "medkd.phantoms.ct"}, run)])[:12]
        command = [sys.executable, *words]
        written = [output / Path(folder).name]
        jobs.append(Job(name, folder_of(name, output), key, [command], run.folder, written, run.environment))
    return jobs


def _evaluation(output: Path, trainings: Mapping[str, Training], needs: Sequence[str]) -> Job:
    """Score all networks on the test cases, in their original geometry."""
    runs = [
        _run(output, "evaluating", ["train", *one.overrides, "evaluate"],
             **{name: place for name, place in one.options.items() if name in ("ckpt_dir", "output_dir")})
        for one in trainings.values()
    ]
    folders = [output / "bundle" / one.scores for one in trainings.values()]
    return bundle_job(
        "evaluation", folder_of("evaluation", output), content_hash([run_key(run, needs) for run in runs])[:12],
        runs, writes=folders, progress=[folder / "progress.json" for folder in folders],
    )


def inference(output: Path, training: Training, target: str) -> BundleRun:
    """The bundle's own inference with one of the networks, into a folder relative to the bundle's."""
    own = {"ckpt_path": f"{training.weights}/model.pt"}
    if "teacher" in training.overrides:
        teacher = ConfigParser.load_config_file(str(output / "bundle" / "configs" / "train.json"))["teacher_def"]
        own |= {f"network_def#{name}": value for name, value in teacher.items() if name != "_mode_"}
    return _run(output, "evaluating", ["inference"], output_dir=target, **own)


def _speed(output: Path, trainings: Mapping[str, Training], needs: Sequence[str]) -> Job:
    """Predict the test cases for the pictures, count parameters, and time the networks."""
    folder = folder_of(SPEED, output)
    runs = [inference(output, trainings[name], str(folder_of(name, Path(".."), "predictions"))) for name in RUNS]
    networks = {
        name: {"configs": ["train", *trainings[run].overrides], "options": PHANTOMS}
        for name, run in (("teacher", TEACHER), ("student", DISTILLED))
    }
    options = [run.options for run in runs]
    known = {"configs": ["inference"], "options": options[-1]}
    request = {"networks": networks, "inference": known, "predictions": options}
    words, answer = program_words("time", folder, runs[0].folder, request)
    key = content_hash([needs, [run_key(run) for run in runs], request])[:12]
    return Job(SPEED, folder, key, [words], ROOT, [output / "predictions", answer], runs[0].environment)
