# SPDX-License-Identifier: Apache-2.0
"""The demo's steps: which commands they are, and what their results depend on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scores import ALONE, DISTILLED, RUNS, TEACHER
from steps import Step, content_of

from medkd.phantoms.ct import CT_LABELS

__all__ = ["PHANTOMS", "TRAININGS", "Run", "Sizes", "bundle_command", "copy_bundle", "folder_name", "make_steps"]


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
class Run:
    """A training: overrides of train.json, the folder of its weights, the folder of its evaluation."""

    overrides: tuple[str, ...]
    weights: str
    scores: str

    def configs(self, *more: str) -> list[str]:
        """Config files in their order."""
        return [f"configs/{name}.json" for name in ("train", *self.overrides, *more)]


PHANTOMS = {"out_channels": len(CT_LABELS), "spacing": [4.0, 4.0, 3.0]}   # options that the phantoms ask for

TRAININGS = {
    TEACHER: Run(("teacher",), "models/teacher", "runs/teacher/eval"),
    ALONE: Run(("baseline",), "runs/baseline", "runs/baseline/eval"),
    DISTILLED: Run((), "models", "eval"),
}


def folder_name(run: str) -> str:
    """Name of a run's folder of predictions."""
    return run.replace(" ", "_")


def copy_bundle(source: Path, target: Path) -> None:
    """Bring a bundle's own files up to date in the demo's copy; what runs wrote there stays."""
    for name in ("configs", "scripts", "docs"):
        shutil.rmtree(target / name, ignore_errors=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def make_steps(output: Path, sizes: Sizes, seed: int) -> list[Step]:
    """All steps up to the scores, in their order; the bundle lies in `output` already."""
    phantoms = _phantoms(output, sizes, seed)
    teacher = _training(output, TEACHER, sizes, seed, [phantoms.key])
    alone = _training(output, ALONE, sizes, seed, [phantoms.key])
    distilled = _training(output, DISTILLED, sizes, seed, [phantoms.key, teacher.key])
    keys = [step.key for step in (teacher, alone, distilled)]
    return [phantoms, teacher, alone, distilled, _evaluation(output, keys), _measuring(output, keys)]


def bundle_command(run_id: str, configs: Sequence[str], *more: str) -> list[str]:
    """A command of MONAI's bundles, as a user types it, with the classes of the phantoms and a grid that suits them."""
    listed = configs[0] if len(configs) == 1 else "[" + ",".join(f"'{name}'" for name in configs) + "]"
    start = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", listed]
    phantoms = [word for key, value in PHANTOMS.items() for word in (f"--{key}", str(value).replace(" ", ""))]
    return [*start, "--bundle_root", ".", "--dataset_dir", "../data", *phantoms, *more]


def _phantoms(output: Path, sizes: Sizes, seed: int) -> Step:
    command = [sys.executable, "-m", "medkd", "phantom", "ct", "../data", "--seed", str(seed)]
    for name in ("training", "validation", "test"):
        command += [f"--{name}", str(getattr(sizes, name))]
    for name in ("shape", "spacing"):
        command += [f"--{name}", ",".join(map(str, getattr(sizes, name)))]
    return Step("phantoms", [command], output / "bundle", output, command[1:], [output / "data"])


def _training(output: Path, name: str, sizes: Sizes, seed: int, needs: Sequence[str]) -> Step:
    run, bundle = TRAININGS[name], output / "bundle"
    epochs = sizes.teacher_epochs if name == TEACHER else sizes.student_epochs
    more = ("--epochs", str(epochs), "--val_interval", str(sizes.val_interval), "--seed", str(seed))
    command = bundle_command("training", run.configs(), *more)
    files = [bundle / path for path in run.configs()] + sorted(bundle.glob("scripts/**/*.py"))
    written = [bundle / run.weights / part for part in ("checkpoints", "logs", "model.pt", "model.json")]
    go_on = (("--resume", "true"), "epoch_*.pt")
    return Step(
        name, [command], bundle, output, [*needs, command[1:], content_of(files)], written, epochs, go_on
    )


def _evaluation(output: Path, needs: Sequence[str]) -> Step:
    """Score the three networks on the test cases, in their original geometry."""
    bundle = output / "bundle"
    commands = [bundle_command("evaluating", TRAININGS[name].configs("evaluate")) for name in RUNS]
    files = [bundle / "configs" / "evaluate.json"]
    written = [bundle / TRAININGS[name].scores for name in RUNS]
    return Step("evaluation", commands, bundle, output, [*needs, content_of(files)], written)


def _measuring(output: Path, needs: Sequence[str]) -> Step:
    """Predict the test cases for the pictures, count parameters, and time the networks."""
    bundle, program = output / "bundle", Path(__file__).resolve().with_name("measure.py")
    teacher, *students = (f"{folder_name(name)}={TRAININGS[name].weights}/model.pt" for name in RUNS)
    command = [sys.executable, os.path.relpath(program, bundle), "../predictions"]
    command += ["--teacher", teacher.split("=")[1], "--students", *students]
    files = [program, bundle / "configs" / "inference.json"]
    written = [output / "predictions"]
    return Step("prediction and speed", [command], bundle, output, [*needs, content_of(files)], written)
