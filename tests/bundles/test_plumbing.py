# SPDX-License-Identifier: Apache-2.0
"""What holds for every bundle because ci/skeleton pins it, shown once, by a toy bundle made from the skeleton."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bundle_runs
import format_json
import lint_configs
import sync_bundles
import toy_bundle
import toys
from bundle_runs import read, refused, scalars, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the skeleton and the toy bundle."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(toy_bundle.ROOT / "ci/skeleton", folder / "ci/skeleton")
    toy_bundle.write_toy_bundle(folder / "bundles" / toy_bundle.NAME)
    return folder


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return root / "bundles" / toy_bundle.NAME


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle.write_toy_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bundle's `scripts` are known by that name only, and its logging.conf is for the whole process."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(run_bundle: Callable[..., None], bundle: Path, data: Path) -> Run:
    """Run an id of the bundle with config files by name; gives its `ckpt_dir`."""

    def call(run_id: str, *configs: str, **options: Any) -> Path:
        run_bundle(run_id, *configs, **{"dataset_dir": str(data), **options})
        return Path(options.get("ckpt_dir", bundle / "models"))

    return call


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path) -> Path:
    return run("training", "train", "teacher", ckpt_dir=str(bundle / "models/teacher")) / "model.pt"


def test_toy_bundle_is_a_bundle_as_any_other(root: Path) -> None:
    for check in (sync_bundles, lint_configs, format_json):
        words = [] if check is lint_configs else ["--check"]
        assert check.main([*words, "--root", str(root)]) == 0


def test_training_without_the_teacher_stops_before_any_data_is_read(run: Run, tmp_path: Path) -> None:
    with refused("does not exist; train it with .*teacher.json"):
        run("training", "train", teacher_path=str(tmp_path / "model.pt"), datalist="nowhere.json")


def test_run_without_the_teacher_trains_with_labels_only_and_says_so(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = run("run", "train", ckpt_dir=str(tmp_path), teacher_path=str(tmp_path / "teacher/model.pt"))
    assert "it does NOT distil" in capsys.readouterr().out
    assert json.loads((folder / "model.json").read_text())["mode"] == "supervised"


def test_training_distils_and_leaves_the_teacher_as_it_is(run: Run, teacher: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(teacher.read_bytes()).hexdigest()
    folder = run("training", "train", ckpt_dir=str(tmp_path))
    terms = {tag.rpartition("kd/")[2]: value for tag, value in scalars(folder).items() if "kd/" in tag}
    assert terms.keys() == toy_bundle.TERMS.keys()
    assert all(np.isfinite(value).all() and np.max(np.abs(value)) > 0 for value in terms.values()), terms
    description = json.loads((folder / "model.json").read_text())
    assert description["mode"] == "distilled"
    assert description["teacher_sha256"] == before == hashlib.sha256(teacher.read_bytes()).hexdigest()


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_of_zero_equal_plain_training_bit_for_bit(
    run: Run, teacher: Path, bundle: Path, tmp_path: Path, workers: int
) -> None:
    off = run("training", "train", "baseline", ckpt_dir=str(tmp_path / "off"), num_workers=workers)
    handlers = json.loads((bundle / "configs/train.json").read_text())["train"]["handlers"]
    kept = bundle_runs.without_distillation(handlers)
    options = {"ckpt_dir": str(tmp_path / "plain"), "num_workers": workers, "train#handlers": kept}
    assert toys.same(weights(off), weights(run("run", "train", **options)))


def test_same_seed_gives_the_same_student(run: Run, teacher: Path, tmp_path: Path) -> None:
    first, second, other = (
        weights(run("training", "train", ckpt_dir=str(tmp_path / str(number)), seed=seed))
        for number, seed in enumerate((0, 0, 1))
    )
    assert toys.same(first, second)
    assert not toys.same(first, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_bit_identical(
    bundle: Path, data: Path, teacher: Path, tmp_path: Path, workers: int
) -> None:
    def start(name: str, **options: Any) -> Any:
        options |= {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / name), "num_workers": workers}
        return toys.start(bundle_runs.run, bundle, "training", "train", epochs=6, **options)

    whole = start("whole")
    handlers = json.loads((bundle / "configs/train.json").read_text())["train"]["handlers"]
    deadly = {"train#handlers": [*handlers, {"_target_": "toys.Killer", "epoch": 3}]}
    killed = start("killed", **deadly)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed/checkpoints/epoch_00002.pt").exists()
    assert not (tmp_path / "killed/checkpoints/epoch_00003.pt").exists()
    toys.finish(whole, start("killed", resume=True, **deadly))
    whole_state, state = (
        torch.load(tmp_path / name / "checkpoints/epoch_00006.pt", weights_only=True) for name in ("whole", "killed")
    )
    asked = [one["record"].pop("settings") for one in (whole_state, state)]
    assert toys.same(whole_state, state)
    assert {key for key in asked[1] if key not in asked[0]} == {"train#handlers#7#_target_", "train#handlers#7#epoch"}
    assert asked[0]["learning_rate"] == 0.05


def command(bundle: Path, data: Path, folder: Path, *options: str) -> list[str]:
    """A training as a user starts it."""
    return [
        sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json",
        "--bundle_root", ".", "--dataset_dir", str(data), "--ckpt_dir", str(folder), *options,
    ]


def test_options_of_a_command_line_win_or_are_refused_by_name_when_a_run_goes_on(
    bundle: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    def start(*options: str) -> subprocess.CompletedProcess[str]:
        words = command(bundle, data, tmp_path / "run", *options)
        return subprocess.run(words, cwd=bundle, capture_output=True, text=True, check=False)

    assert start().returncode == 0
    student = weights(tmp_path / "run")
    refused_one = start("--resume", "true", "--epochs", "4", "--learning_rate", "0.01")
    assert refused_one.returncode == 1
    end = refused_one.stderr[refused_one.stderr.rindex("\nError: ") :]
    assert "epoch_00002.pt must be made with the settings and data of this run" in end
    assert "\n  epochs: 2, now 4\n  learning_rate: 0.05, now 0.01\nGive the same again; or go on with the new " in end
    assert toys.same(weights(tmp_path / "run"), student)
    assert start("--resume", "changed", "--epochs", "4", "--learning_rate", "0.01").returncode == 0
    content = torch.load(tmp_path / "run/checkpoints/epoch_00003.pt", weights_only=True)["objects"]
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01 * (1 - 0.5**0.5) / 2)   # 3 of 4 epochs
    assert start("--resume", "true", "--epochs", "4", "--learning_rate", "0.01").returncode == 0   # it is of that now
    assert start("--resume", "no").returncode == 1


def test_a_second_run_into_the_folder_of_a_living_one_ends_with_its_owner(
    bundle: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    first = subprocess.Popen(
        command(bundle, data, tmp_path, "--epochs", "100000"), cwd=bundle, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(tmp_path.glob("checkpoints/*.pt")):
            assert first.poll() is None
            time.sleep(0.05)
        words = command(bundle, data, tmp_path)
        second = subprocess.run(words, cwd=bundle, capture_output=True, text=True, check=False)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1
    end = second.stderr[second.stderr.rindex("Error: ") :]
    assert f"belongs to a run that is alive (process {first.pid} on " in end
    assert not list(tmp_path.glob("before_*"))


def test_a_folder_that_cannot_be_written_to_ends_the_run_at_its_start(
    bundle: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file/run"
    result = subprocess.run(command(bundle, data, place), cwd=bundle, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"must be a folder that can be written to, got {place}/logs: Not a directory" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher_sha256": "00"}, "`teacher_sha256` must be the hash of"),
        ({"teacher_def#width": 3}, "must hold weights of the teacher's network"),
        ({"distill_weights": {"logit": 1.0}}, "must name terms of the loss, got 'logit'"),
        ({"teacher_input": "sharp"}, "`teacher_input` must be a key of the batch, got 'sharp'"),
        ({"teacher_check#metric": "dice"}, "`teacher_check#metric` must be a metric of the validation"),
    ],
)
def test_wrong_options_are_refused(
    run: Run, teacher: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with refused(message):
        run("training", "train", ckpt_dir=str(tmp_path), **overrides)


def test_teacher_that_says_one_class_everywhere_is_refused(run: Run, teacher: Path, tmp_path: Path) -> None:
    silent = {key: torch.zeros_like(value) for key, value in torch.load(teacher, weights_only=True).items()}
    torch.save(silent, tmp_path / "silent.pt")
    with refused("The teacher's val_mean_dice must be better than that of"):
        run("training", "train", ckpt_dir=str(tmp_path / "run"), teacher_path=str(tmp_path / "silent.pt"))


def test_broken_data_is_refused_before_the_first_iteration(run: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    listing = json.loads((data / "datalist.json").read_text())
    pixels, affine = read(data / listing["training"][1]["label"])
    bundle_runs.write(tmp_path / "short.nii.gz", pixels[:-1], affine)
    listing["training"][1]["label"] = str(tmp_path / "short.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({**listing, "data_root": str(data)}))
    with refused("shape"):
        run("training", "train", datalist=str(tmp_path / "datalist.json"), ckpt_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_ranks_end_with_one_student(bundle: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    configs = "['configs/train.json','configs/multi_gpu_train.json']"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle",
        "run", "training", "--config_file", configs, "--bundle_root", ".", "--dataset_dir", str(data),
        "--ckpt_dir", str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False,
                            timeout=200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert weights(tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2


def test_misspelled_option_of_the_command_line_is_refused(bundle: Path, data: Path) -> None:
    command = [
        sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json",
        "--bundle_root", ".", "--dataset_dir", str(data), "--epoch", "1",
    ]
    result = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last == "Error: Option `epoch` must exist in train.json, or be referred to there; did you mean 'epochs'?"
