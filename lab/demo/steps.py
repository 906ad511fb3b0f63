# SPDX-License-Identifier: Apache-2.0
"""The demo's steps as jobs: which commands they are, and what their results depend on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from monai.bundle.config_parser import ConfigParser

from lab.bundle import ROOT, BundleRun
from lab.demo.scores import ALONE, DISTILLED, RUNS, TEACHER
from lab.execute import Job, bundle_job
from lab.keys import code_hash, content_hash, run_key
from lab.networks import program_words
from lab.training import check_model
from medkd.phantoms.ct import CT_LABELS

PHANTOMS = {"out_channels": len(CT_LABELS), "spacing": [4.0, 4.0, 3.0]}   # options that the phantoms ask for
SPEED = "prediction and speed"


@dataclass(frozen=True)
class Sizes:
    """How much is done: cases, voxels, mm, epochs."""

    training: int
    validation: int
    test: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    teacher_epochs: int
    student_epochs: int
    val_interval: int


@dataclass(frozen=True)
class Training:
    """Overrides of train.json, and where they leave the weights and the scores."""

    overrides: tuple[str, ...]
    weights: str
    scores: str


TRAININGS = {
    TEACHER: Training(("teacher",), "models/teacher", "runs/teacher/eval"),
    ALONE: Training(("baseline",), "runs/baseline", "runs/baseline/eval"),
    DISTILLED: Training((), "models", "eval"),
}


def folder_of(name: str, output: Path, kind: str = "steps") -> Path:
    """Folder of a step's log and state, or of a network's `predictions`."""
    return output / kind / name.replace(" ", "_")


def make_jobs(output: Path, sizes: Sizes, seed: int) -> list[Job]:
    """All steps up to the scores, in their order; the bundle lies in `output` already."""
    jobs = [_phantoms(output, sizes, seed)]
    for name, training in TRAININGS.items():
        epochs = sizes.teacher_epochs if name == TEACHER else sizes.student_epochs
        options = {"epochs": epochs, "val_interval": sizes.val_interval, "seed": seed}
        run = _run(output, "training", ["train", *training.overrides], **options)
        needs = [job.key for job in (jobs if name == DISTILLED else jobs[:1])]
        weights = run.folder / training.weights
        jobs.append(bundle_job(
            name, folder_of(name, output), run_key(run, needs), [run],
            writes=[weights / part for part in ("logs", "model.pt", "model.json")],
            checkpoints=weights / "checkpoints", progress=[weights / "progress.json"],
            check=partial(check_model, weights),
        ))
    keys = [job.key for job in jobs]
    return [*jobs, _evaluation(output, keys), _speed(output, keys)]


def _run(output: Path, run_id: str, configs: Sequence[str], **options: Any) -> BundleRun:
    return BundleRun(output / "bundle", run_id, configs, {"dataset_dir": "../data", **PHANTOMS, **options})


def _phantoms(output: Path, sizes: Sizes, seed: int) -> Job:
    words = ["-m", "medkd", "phantom", "ct", "../data", "--seed", str(seed)]
    for name in ("training", "validation", "test", "shape", "spacing"):
        value = getattr(sizes, name)
        words += [f"--{name}", str(value) if isinstance(value, int) else ",".join(map(str, value))]
    run = _run(output, "phantoms", ())
    key = content_hash([words, code_hash({"code": "medkd.phantoms.ct"}, run)])[:12]
    folder, command = folder_of("phantoms", output), [sys.executable, *words]
    return Job("phantoms", folder, key, [command], run.folder, [output / "data"], run.environment)


def _evaluation(output: Path, needs: Sequence[str]) -> Job:
    """Score the three networks on the test cases, in their original geometry."""
    runs = [_run(output, "evaluating", ["train", *one.overrides, "evaluate"]) for one in TRAININGS.values()]
    folders = [output / "bundle" / one.scores for one in TRAININGS.values()]
    return bundle_job(
        "evaluation", folder_of("evaluation", output), content_hash([run_key(run, needs) for run in runs])[:12],
        runs, writes=folders, progress=[folder / "progress.json" for folder in folders],
    )


def inference(output: Path, run: str, target: str) -> BundleRun:
    """The bundle's own inference with one of the three networks, into a folder relative to the bundle's."""
    own = {} if run == DISTILLED else {"ckpt_path": f"{TRAININGS[run].weights}/model.pt"}
    if run == TEACHER:
        teacher = ConfigParser.load_config_file(str(output / "bundle" / "configs" / "train.json"))["teacher_def"]
        own |= {f"network_def#{name}": value for name, value in teacher.items() if name != "_mode_"}
    return _run(output, "evaluating", ["inference"], output_dir=target, **own)


def _speed(output: Path, needs: Sequence[str]) -> Job:
    """Predict the test cases for the pictures, count parameters, and time the networks."""
    folder = folder_of(SPEED, output)
    runs = [inference(output, name, str(folder_of(name, Path(".."), "predictions"))) for name in RUNS]
    networks = {
        name: {"configs": ["train", *TRAININGS[run].overrides], "options": PHANTOMS}
        for name, run in (("teacher", TEACHER), ("student", DISTILLED))
    }
    options = [run.options for run in runs]
    known = {"configs": ["inference"], "options": options[-1]}
    request = {"networks": networks, "inference": known, "predictions": options}
    words, answer = program_words("time", folder, runs[0].folder, request)
    key = content_hash([needs, [run_key(run) for run in runs], request])[:12]
    return Job(SPEED, folder, key, [words], ROOT, [output / "predictions", answer], runs[0].environment)
