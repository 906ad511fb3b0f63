# SPDX-License-Identifier: Apache-2.0
"""One training and its evaluation on the test cases: a command of the bundle, in a folder named by a key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from commands import CommandError, Commands
from keys import content_hash, data_hash, distils, effective_config, file_hash, needed_part, run_key
from recipe import TEACHER
from steps import read_state, show_words

from medkd.data.datalist import SplitsFile, make_datalist

__all__ = [
    "Place", "Run", "Trained", "check_test_list", "copy_source", "evaluate", "find_datalist", "needs_of", "train",
]

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        arm: name in the recipe.
        candidate: which of the arm's candidates, empty if there are none.
        seed: of the run.
        overrides: configs behind train.json, in their order.
        options: keys and values that come last.
        weights_of: config key -> arm whose weights it takes; None: the teacher's, if the run distils.
    """

    arm: str
    candidate: str
    seed: int
    overrides: Sequence[str]
    options: Mapping[str, Any] = field(hash=False)
    weights_of: Mapping[str, str] | None = field(hash=False, default=None)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{'-'.join(filter(None, (self.arm, self.candidate)))}_seed{self.seed}"

    @property
    def label(self) -> str:
        """What the user reads."""
        return f"{' '.join(filter(None, (self.arm, self.candidate)))}, seed {self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Options with the seed."""
        return {**self.options, "seed": self.seed}

    def configs(self, *more: str) -> list[str]:
        """Config files in their order."""
        return [f"configs/{name}.json" for name in ("train", *self.overrides, *more)]


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        run: what was trained.
        folder: with `model.pt`.
        key: of the run.
        metric: by which the best model was taken.
        validation: its best value on the validation cases.
        epoch: where that was.
        minutes: of training, all attempts together.
        sha256: of the weights.
        new: False when it was finished before.
        calibrated: option of its evaluation, with the value that is best on the validation cases.
    """

    run: Run
    folder: Path
    key: str
    metric: str
    validation: float
    epoch: int
    minutes: float
    sha256: str
    new: bool
    calibrated: Mapping[str, Any] = field(hash=False, default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a row is worked on.

    Attributes:
        source: copy of the bundle's configs and scripts and of medkd.
        folder: for the row's runs.
        datalist: of its data.
        evaluate: configs that make an evaluation of a training.
        threads: of each command, 0 leaves it to torch.
        commands: runs them.
        calibrate: option of the evaluation -> values, of which every training gets the best.
        higher_is_better: of the main metric.
    """

    source: Path
    folder: Path
    datalist: Path
    evaluate: Sequence[str]
    threads: int
    commands: Commands
    calibrate: Mapping[str, Sequence[Any]] = field(hash=False, default_factory=dict)
    higher_is_better: bool = True

    def environment(self) -> dict[str, str]:
        """Variables of a command."""
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, ("package", os.environ.get("PYTHONPATH"))))}
        if self.threads:
            variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(self.threads))
            variables["OMP_WAIT_POLICY"] = "PASSIVE"
        return variables

    def path(self, target: Path) -> str:
        """A path as the commands need it, which run in `source`."""
        return os.path.relpath(target, self.source)


def copy_source(bundle: Path, package: Path, folder: Path) -> Path:
    """Copy configs and scripts of a bundle, and medkd, to a folder named by their content.

    Args:
        bundle: the bundle.
        package: the folder `medkd`.
        folder: for all copies.
    """
    parts = {name: bundle / name for name in ("configs", "scripts")} | {"package/medkd": package}
    files = {
        f"{name}/{file.relative_to(origin)}": file
        for name, origin in parts.items() for file in sorted(origin.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
    digest = hashlib.sha256()
    content = {name: file.read_bytes() for name, file in files.items()}
    for name, data in content.items():
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    target = folder / digest.hexdigest()[:12]
    if not target.exists():
        draft = folder / f".{target.name}.{os.getpid()}"
        for name, data in content.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(data)
        try:
            draft.rename(target)
        except OSError:
            if not target.exists():
                raise
            shutil.rmtree(draft)       # another process was faster
    return target


def find_datalist(data: Path, folder: Path, options: Mapping[str, Any]) -> Path:
    """The data's own datalist.json, or one made in `folder` from images/, labels/ and splits.json.

    Args:
        data: folder of the data; nothing is written there.
        folder: for a new list.
        options: further arguments of `make_datalist`.
    """
    if (data / "datalist.json").is_file():
        return (data / "datalist.json").resolve()
    if not (data / "splits.json").is_file():
        raise FileNotFoundError(
            f"DATA must have a datalist.json, or images/, labels/ and splits.json, got {data}; "
            "`medkd datalist` makes one."
        )
    return make_datalist(data, folder, **{"splits": SplitsFile(data / "splits.json"), **options}).resolve()


def check_test_list(datalist: Path) -> None:
    """Refuse a list whose test cases are none, or are trained with.

    Raises:
        ValueError: no test case, or one that stands in another list too.
    """
    content = json.loads(datalist.read_text())
    images = {name: {case["image"] for case in content.get(name, [])} for name in ("training", "validation", "test")}
    if not images["test"]:
        raise ValueError(f"`test` of {datalist.name} must have cases, got none: results are told on test cases.")
    shared = sorted(images["test"] & (images["training"] | images["validation"]))
    if shared:
        raise ValueError(
            f"`test` of {datalist.name} must have cases of its own, got {len(shared)} of another list: "
            f"{', '.join(shared[:5])}."
        )


def needs_of(run: Run, place: Place) -> Mapping[str, str]:
    """Config key -> arm whose weights a run starts from."""
    if run.weights_of is not None:
        return run.weights_of
    return {"teacher_path": TEACHER} if distils(_config(run, place)) else {}


def _config(run: Run, place: Place, *more: str) -> dict[str, Any]:
    return effective_config([place.source / name for name in run.configs(*more)], run.settings)


def train(
    run: Run, place: Place, weights: Mapping[str, Path], say: Callable[[str], None] = lambda text: None
) -> Trained:
    """Train, go on with an interrupted training, or take a finished one.

    Args:
        run: what to train.
        place: where.
        weights: config key -> weights that it starts from.
        say: told once when the training starts, goes on or waits.

    Raises:
        CommandError: it failed.
        StoppedError: the user interrupted.
    """
    part = needed_part(_config(run, place), ("initialize", "training"))
    hashes = {name: file_hash(path) for name, path in weights.items()}
    key = run_key(part, place.source, data_hash(place.datalist, ("training", "validation")), hashes)
    folder = next(place.folder.glob(f"*_{key}"), place.folder / f"{run.name}_{key}")
    with place.commands.locked(folder, lambda: say("waits for another process that trains it")) as lock:
        new = not read_state(folder / "run.json").get("done")
        if new:
            _train(run, place, folder, weights, lock, say)
        state, model = read_state(folder / "run.json"), read_state(folder / "model.json")
        metric, value = next(iter(model["validation"].items()))
        chosen: dict[str, Any] = {}
        if place.calibrate:
            chosen, value = _calibrate(run, place, folder, metric, lock)
        weight_hash = file_hash(folder / "model.pt")
        return Trained(run, folder, key, metric, value, model["epoch"], state["seconds"] / 60, weight_hash, new, chosen)


def _train(
    run: Run, place: Place, folder: Path, weights: Mapping[str, Path], lock: int, say: Callable[[str], None]
) -> None:
    go_on = any((folder / "checkpoints").glob("epoch_*.pt"))
    options = {
        **run.settings, "datalist": str(place.datalist),
        "ckpt_dir": place.path(folder), "output_dir": place.path(folder / "eval"),
        **{name: place.path(path) for name, path in weights.items()},
    }
    words = _command(run, place, "training", folder / "options.json", options)
    words += ["--resume", "true"] if go_on else []
    before = float(read_state(folder / "run.json").get("seconds", 0.0))
    start = time.monotonic()

    def note(**more: Any) -> None:
        content = {"command": show_words(words), "seconds": round(before + time.monotonic() - start, 1), **more}
        _write(folder / "run.json", content)

    note()
    say("goes on" if go_on else "starts")
    log = folder / "train.log"
    old = log.stat().st_size if log.exists() else 0
    place.commands.run(words, place.source, log, place.environment(), note, lock)
    _check_model(folder, log.read_bytes()[old:])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)      # nothing goes on from a finished run
    note(done=True)


def _check_model(folder: Path, log: bytes) -> None:
    """Refuse a training that ended well and left no model, or an older one."""
    missing = [name for name in ("model.pt", "model.json") if not (folder / name).is_file()]
    if missing or b"The student was NOT saved" in log or not read_state(folder / "model.json").get("validation"):
        found = f"no {' and no '.join(missing)}" if missing else "a model that could not be saved or was not validated"
        raise CommandError(
            f"the training must leave a model and its validation, got {found}; see {folder / 'train.log'}, free "
            "the disk, set `val_interval` to at most `epochs`, and start again."
        )


def _calibrate(run: Run, place: Place, folder: Path, metric: str, lock: int) -> tuple[dict[str, Any], float]:
    """Give the value of the row's option that is best on validation, and its score; the first of equal ones."""
    ((key, values),) = place.calibrate.items()
    wanted = content_hash([key, values])[:12]
    request, found = (folder / f"calibration_{wanted}{end}.json" for end in ("_request", ""))
    if not found.exists():
        options = {**run.settings, "datalist": str(place.datalist), "ckpt_dir": place.path(folder)}
        content = {
            "configs": run.configs(), "options": options, "weights": place.path(folder / "model.pt"),
            "metric": metric, "values": {key: values},
        }
        _write(request, content)
        words = [sys.executable, str(HERE / "calibrate.py"), *(place.path(file) for file in (request, found))]
        place.commands.run(words, place.source, folder / "calibration.log", place.environment(), lock=lock)
    scores = json.loads(found.read_text())[key]
    best = (max if place.higher_is_better else min)(scores)
    return {key: values[scores.index(best)]}, best


def evaluate(trained: Trained, place: Place) -> Path:
    """Score a training on the test cases, once.

    Args:
        trained: the training.
        place: where.

    Returns:
        Folder of the files `<metric>_raw.csv`.
    """
    run = replace(trained.run, options={**trained.run.options, **trained.calibrated})
    part = needed_part(_config(run, place, *place.evaluate), ("initialize", "evaluating"))
    key = run_key(part, place.source, data_hash(place.datalist, ("test",)), trained.sha256)
    target = trained.folder / f"eval_{key}"
    with place.commands.locked(trained.folder) as lock:
        if not (target / "done").exists():
            shutil.rmtree(target, ignore_errors=True)
            options = {
                **run.settings, "datalist": str(place.datalist),
                "ckpt_dir": place.path(trained.folder), "output_dir": place.path(target),
            }
            file = trained.folder / f"options_{target.name}.json"
            words = _command(run, place, "evaluating", file, options, *place.evaluate)
            log = trained.folder / "eval.log"
            place.commands.run(words, place.source, log, place.environment(), lock=lock)
            (target / "done").touch()
    return target


def _command(
    run: Run, place: Place, run_id: str, file: Path, options: Mapping[str, Any], *more: str
) -> list[str]:
    """A command of MONAI's bundles; the options lie in a config file of their own, as some are lists of objects."""
    _write(file, options)
    listed = ",".join(f"'{name}'" for name in (*run.configs(*more), place.path(file)))
    return [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", f"[{listed}]", "--bundle_root", "."]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)
