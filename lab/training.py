# SPDX-License-Identifier: Apache-2.0
"""One training of a row, the choice of its calibrated option, and its evaluation on the test cases.

A training lies in `runs/lab/<key>`, whatever row or bundle it was started for: what is the same there is trained once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.blocks import cut_blocks
from lab.bundle import ROOT, BundleRun
from lab.execute import ExecutionError, Executor, Job, bundle_job, read_state
from lab.keys import content_hash, data_hash, file_hash, run_distils, run_key
from lab.measure import cpu_dtype
from lab.networks import program_words
from lab.recipe import Recipe, Row
from lab.regimes import ALL_LABELS, Regime, regime_list, supervised_list
from lab.score import AGREEMENT, columns_of, read_scores
from medkd.data.datalist import SplitsFile, make_class_datalist, make_datalist, write_datalist

__all__ = [
    "Run", "Study", "Trained", "check_model", "check_test_list", "evaluate", "find_datalist", "ranked", "train",
]

_WRITING = threading.Lock()                # trainings of one row start at once, and may want one list


@dataclass(frozen=True)
class Run:
    """A training that a row asks for."""

    arm: str
    candidate: str                       # which of the arm's candidates, empty if there are none
    seed: int
    configs: Sequence[str]               # names of config files in their order
    options: Mapping[str, Any]           # with the seed
    weights_of: Mapping[str, str] = field(default_factory=dict)   # config key -> arm whose weights it starts from
    regime: Regime = ALL_LABELS

    @property
    def id(self) -> tuple[str, str, int]:
        """Arm, candidate and seed."""
        return self.arm, self.candidate, self.seed

    @property
    def label(self) -> str:
        """What the user reads."""
        return f"{' '.join(filter(None, (self.arm, self.candidate)))}, seed {self.seed}"


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    run: Run
    folder: Path                         # with `model.pt`; its name is the key
    sha256: str                          # of the weights
    metric: str                          # by which the best model was taken
    validation: float                    # its best value on the validation cases
    epoch: int                           # where that was
    minutes: float                       # all attempts together
    new: bool = True                     # False when it was finished before
    calibrated: Mapping[str, Any] = field(default_factory=dict)   # option of the evaluation, with its best value
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)   # metric -> test case -> value


@dataclass(frozen=True)
class Study:
    """A row that is worked on."""

    recipe: Recipe
    row: Row
    source: Path                         # copy of the bundle's configs and scripts and of medkd
    folder: Path                         # for the runs of all bundles
    datalist: Path
    executor: Executor
    workers: int = 1                     # trainings at once

    def bundle_run(self, run_id: str, run: Run, *more: str, **options: Any) -> BundleRun:
        """A run with a training's configs and options, and more; it runs in `source`, so paths become relative.

        A training in bfloat16 is one in float32 on a processor that only emulates it.
        """
        together = {**run.options, **options}
        if together.get("cpu_dtype") == "bfloat16":
            together["cpu_dtype"] = cpu_dtype()
        told = {key: os.path.relpath(one, self.source) if isinstance(one, Path) else one
                for key, one in together.items()}
        return BundleRun(self.source, run_id, [*run.configs, *more], told)

    def distils(self, run: Run) -> bool:
        """Whether a training learns from a teacher."""
        return run_distils(self.bundle_run("training", run))

    def datalist_of(self, run: Run) -> Path:
        """The list that a training reads: the data's own, or one made of it for the regime."""
        content, regime = json.loads(self.datalist.read_text()), run.regime
        if self.distils(run):
            made = regime_list(content, regime.labels, regime.unlabeled)
        else:
            made = supervised_list(content, regime.labels)
        if made == content:
            return self.datalist
        made["data_root"] = str((self.datalist.parent / content.get("data_root", "")).resolve())
        path = self.folder / "data" / content_hash(made)[:12] / "datalist.json"
        with _WRITING:
            return path if path.is_file() else write_datalist(path, made)

    def metric_of(self, run: Run) -> str:
        """Name of the value by which a training takes its best model: where it has no labels, agreement."""
        labeled = run.regime.labels != 0 or not self.distils(run)
        return self.recipe.metric if labeled else f"{self.recipe.metric}{AGREEMENT}"


def find_datalist(data: Path, folder: Path, options: Mapping[str, Any]) -> Path:
    """The data's own datalist.json, or one made in `folder` by `make_datalist`, with `options`, from its folders.

    With the option `class_folders` true it is made by `make_class_datalist`, from a folder per class; `blocks` are the
    arguments of `cut_blocks`.
    """
    if (data / "datalist.json").is_file():
        return (data / "datalist.json").resolve()
    if not (data / "splits.json").is_file():
        raise FileNotFoundError(
            f"DATA must have a datalist.json, or images/, labels/ and splits.json, got {data}; "
            "`medkd datalist` makes one."
        )
    target = folder / content_hash([str(data), options])[:12]
    told = {"splits": SplitsFile(data / "splits.json"), **options}
    make = make_class_datalist if told.pop("class_folders", False) else make_datalist
    blocks = told.pop("blocks", None)
    made = make(data, target, **told).resolve()
    return cut_blocks(made, **blocks) if blocks else made


def check_test_list(datalist: Path) -> None:
    """Refuse a list whose test cases are none, or are trained with."""
    content = json.loads(datalist.read_text())
    names = ("training", "validation", "unlabeled", "test")
    images = {name: {case["image"] for case in content.get(name, [])} for name in names}
    if not images["test"]:
        raise ValueError(f"`test` of {datalist.name} must have cases, got none: results are told on test cases.")
    shared = sorted(images["test"] & set().union(*(images[name] for name in names[:-1])))
    if shared:
        raise ValueError(
            f"`test` of {datalist.name} must have cases of its own, got {len(shared)} of another list: "
            f"{', '.join(shared[:5])}."
        )


def ranked(runs: Iterable[Trained], recipe: Recipe) -> list[Trained]:
    """Runs by their validation, the best one first; equal ones stay in their order."""
    return sorted(runs, key=lambda run: -run.validation if recipe.higher_is_better else run.validation)


def train(run: Run, study: Study, weights: Mapping[str, Path], say: Callable[[str], None] = lambda _: None) -> Trained:
    """Train, go on with an interrupted training, or take a finished one; `say` and errors are those of `Executor.do`.

    `weights` are those that it starts from: config key -> file.
    """
    recipe = study.recipe
    hashes = {name: file_hash(path) for name, path in weights.items()}
    datalist = study.datalist_of(run)
    data = data_hash(datalist, ("training", "validation", "unlabeled"))
    key = run_key(study.bundle_run("training", run), data, hashes)
    folder = study.folder / key
    places = {"datalist": datalist, "ckpt_dir": folder, "output_dir": folder / "eval", **_cache(run, study, weights)}
    training = study.bundle_run("training", run, **places, **weights)
    job = bundle_job(
        run.label, folder, key, [training], writes=[folder / name for name in ("model.pt", "model.json")],
        checkpoints=folder / "checkpoints", check=lambda: check_model(folder),
    )
    new = study.executor.do(job, say)
    model = read_state(folder / "model.json")
    metric, value = next(iter(model["validation"].items()))
    if metric != study.metric_of(run) and run.arm not in recipe.helpers:
        raise ExecutionError(
            f"the best model must be taken by {study.metric_of(run)}, as the recipe says, got {metric}; "
            "change `metric` of the recipe or `validate#key_metric` of train.json."
        )
    told = file_hash(folder / "model.pt"), metric, value, model["epoch"], job.seconds / 60
    trained = Trained(run, folder, *told, new)
    return _calibrated(trained, study, places) if study.row.calibrate else trained


def _cache(run: Run, study: Study, weights: Mapping[str, Path]) -> dict[str, Path]:
    """Place of the teacher's soft labels, which all trainings that start from it share, where the bundle keeps them."""
    if "teacher_path" not in weights or "soft_label_dir" not in study.bundle_run("training", run).config:
        return {}
    return {"soft_label_dir": weights["teacher_path"].parent / "soft_labels"}


def check_model(folder: Path) -> str:
    """Say what is wrong with what a training left that ended well; nothing if it is a validated model."""
    told = read_state(folder / "model.json")
    if told.get("saved") and told.get("validation") and (folder / "model.pt").is_file():
        return ""
    unsaved = f"a model that could not be saved ({told.get('reason', 'no word why')})"
    return (
        "the training must leave a model and its validation, got "
        f"{'a model that was not validated' if told.get('saved') else unsaved}; "
        "free the disk, set `val_interval` to at most `epochs`, and start again."
    )


def _calibrated(trained: Trained, study: Study, places: Mapping[str, Path]) -> Trained:
    """The training with the value of the row's option that is best on validation, the first of equal ones."""
    ((key, values),) = study.row.calibrate.items()
    run = study.bundle_run("training", trained.run, **places)
    weights = os.path.relpath(trained.folder / "model.pt", study.source)
    request = {"configs": run.configs, "options": run.options, "weights": weights, "metric": trained.metric}
    wanted = content_hash([key, values])[:12]
    folder = trained.folder / f"calibration_{wanted}"
    words, answer = program_words("calibrate", folder, study.source, {**request, "values": {key: list(values)}})
    study.executor.do(Job(trained.run.label, folder, wanted, [words], ROOT, [answer], run.environment))
    scores = read_state(answer)[key]
    best = (max if study.recipe.higher_is_better else min)(scores)
    return replace(trained, calibrated={key: values[scores.index(best)]}, validation=best)


def evaluate(trained: Trained, study: Study) -> Trained:
    """Score a training on the test cases, once, and give it with its values."""
    row, options = study.row, trained.calibrated
    run = study.bundle_run("evaluating", trained.run, *row.evaluate, **options)
    key = run_key(run, data_hash(study.datalist, ("test",)), trained.sha256)
    folder = trained.folder / f"eval_{key}"
    places = {"datalist": study.datalist, "ckpt_dir": trained.folder, "output_dir": folder / "scores"}
    placed = study.bundle_run("evaluating", trained.run, *row.evaluate, **options, **places)
    study.executor.do(bundle_job(trained.run.label, folder, key, [placed], writes=[folder / "scores"]))
    return replace(trained, values=read_scores(folder / "scores", columns_of(run.config), row.patient, row.test))
