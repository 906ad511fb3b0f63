# SPDX-License-Identifier: Apache-2.0
"""Few labels, or none: what a bundle made from ci/skeleton does with images that nobody has labeled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bundle_runs
import toy_bundle
import toys
from bundle_runs import refused, scalars, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]
Options = dict[str, Any]

PLAIN = ("train", "logits")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    toy_bundle.write_toy_bundle(folder / "bundles" / toy_bundle.NAME)
    return folder


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return root / "bundles" / toy_bundle.NAME


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle.write_toy_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(run_bundle: Callable[..., None], bundle: Path, data: Path) -> Path:
    """Trained with all labels, by somebody else."""
    folder = bundle / "models/teacher"
    run_bundle("training", "train", "teacher", dataset_dir=str(data), ckpt_dir=str(folder))
    return folder / "model.pt"


@pytest.fixture(scope="module")
def few(data: Path) -> Path:
    """One label, three images without."""
    content = json.loads((data / "datalist.json").read_text())
    first, *others = content["training"]
    return write_list(data, "few", training=[first], unlabeled=[without_label(item) for item in others])


@pytest.fixture(scope="module")
def none(data: Path) -> Path:
    """Images alone, for validation, too."""
    content = json.loads((data / "datalist.json").read_text())
    images = {name: [without_label(item) for item in content[name]] for name in ("training", "validation")}
    return write_list(data, "none", training=[], unlabeled=images["training"], validation=images["validation"])


def without_label(item: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in item.items() if key != "label"}


def write_list(data: Path, name: str, **lists: Any) -> Path:
    content = json.loads((data / "datalist.json").read_text())
    path = data / f"{name}.json"
    path.write_text(json.dumps({**content, **lists}))
    return path


@pytest.fixture
def run(run_bundle: Callable[..., None], bundle: Path, data: Path, tmp_path: Path) -> Run:
    def call(*configs: str, run_id: str = "training", **options: Any) -> Path:
        options = {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / "run"), **options}
        run_bundle(run_id, *configs, **options)
        return Path(options["ckpt_dir"])

    return call


def description(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return content


def test_images_without_labels_are_distilled_beside_those_with(run: Run, teacher: Path, few: Path) -> None:
    folder = run("train", datalist=str(few))
    told = description(folder)
    assert told["mode"] == "distilled"
    assert told["predictions"] == "live"                           # the losses tap layers
    assert told["validation"].keys() == {"val_mean_dice"}
    terms = {tag.rpartition("kd/")[2]: value for tag, value in scalars(folder).items() if "kd/" in tag}
    assert all(np.isfinite(value).all() for value in terms.values())
    assert np.min(scalars(folder)["supervised_loss"]) > 0


def test_unlabeled_images_change_what_the_student_learns(run: Run, teacher: Path, few: Path, tmp_path: Path) -> None:
    mixed, alone, baseline, again = (
        weights(run(*configs, datalist=str(few), ckpt_dir=str(tmp_path / str(number)), **options))
        for number, (configs, options) in enumerate((
            (PLAIN, {}), (PLAIN, {"unlabeled_ratio": 0}),
            (("train", "baseline"), {}), (("train", "baseline"), {"unlabeled_ratio": 0}),
        ))
    )
    assert not toys.same(mixed, alone)
    assert toys.same(baseline, again)                              # without a teacher they teach nothing


def test_no_label_at_all_is_needed(run: Run, teacher: Path, none: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run(*PLAIN, datalist=str(none))
    told = description(folder)
    assert told["mode"] == "distilled"
    assert told["predictions"] == "cached"
    ((metric, value),) = told["validation"].items()
    assert metric == "val_mean_dice_with_teacher"
    assert 0 < value <= 1
    assert all(value == 0 for value in scalars(folder)["supervised_loss"])
    assert "val_mean_dice_with_teacher" in scalars(folder)


def test_a_student_that_is_the_teacher_agrees_with_it_wholly(run: Run, teacher: Path, none: Path) -> None:
    copy: Options = {"network_def#width": toys.TEACHER_WIDTH, "network_def#dropout": 0.0, "learning_rate": 1e-12}
    loaded = {"network": f"$(lambda n: (n.load_state_dict(torch.load('{teacher}')), n)[1])(@network_def).to(@device)"}
    told = description(run(*PLAIN, datalist=str(none), **copy, **loaded))
    assert told["validation"]["val_mean_dice_with_teacher"] == pytest.approx(1.0, abs=0.1)   # its batch statistics move


def test_training_cases_may_lack_their_labels(run: Run, teacher: Path, data: Path, few: Path, tmp_path: Path) -> None:
    content = json.loads(few.read_text())
    items = [*content["training"], *content["unlabeled"]]
    listed = write_list(data, "in_training", training=items, unlabeled=[])
    mixed, other = (
        weights(run(*PLAIN, datalist=str(path), ckpt_dir=str(tmp_path / path.stem))) for path in (listed, few)
    )
    assert toys.same(mixed, other)
    supervised = run("train", "baseline", datalist=str(listed), ckpt_dir=str(tmp_path / "alone"))
    assert description(supervised)["mode"] == "supervised"


def test_cached_teacher_says_what_the_live_one_says(run: Run, teacher: Path, data: Path, tmp_path: Path) -> None:
    """On whole images without augmentation there is no difference but that of 8 bits."""
    still: Options = {
        "train#random_transforms": [
            toy_bundle.SOFT_LABELS,
            {"_target_": "medkd.data.soft_labels.UnpackSoftLabeld", "soft_labels": "@soft_labels"},
        ],
        "patch_size": [toys.SIZE, toys.SIZE], "network_def#dropout": 0.0,
    }
    values = []
    for cache in (True, False):
        folder = run(*PLAIN, ckpt_dir=str(tmp_path / str(cache)), cache_teacher=cache, epochs=1, **still)
        assert description(folder)["predictions"] == ("cached" if cache else "live")
        values.append(scalars(folder)["kd/logits"])
    assert values[0] == pytest.approx(values[1], rel=0.02, abs=1e-4)
    assert values[0] != values[1]


def test_soft_labels_are_made_once_and_beside_the_teacher(run: Run, teacher: Path, none: Path, tmp_path: Path) -> None:
    place = tmp_path / "soft"
    run(*PLAIN, datalist=str(none), soft_label_dir=str(place))
    files = {path: path.stat().st_mtime_ns for path in place.glob("*/*.npz")}
    assert len(files) == 4
    run(*PLAIN, datalist=str(none), soft_label_dir=str(place), ckpt_dir=str(tmp_path / "again"))
    assert {path: path.stat().st_mtime_ns for path in place.glob("*/*.npz")} == files


@pytest.mark.parametrize("regime", ["few", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_without_labels_resumes_bit_identical(
    bundle: Path, data: Path, teacher: Path, tmp_path: Path, few: Path, none: Path, workers: int, regime: str
) -> None:
    listed = {"few": few, "none": none}[regime]

    def start(name: str, **options: Any) -> Any:
        options |= {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / name), "num_workers": workers}
        return toys.start(bundle_runs.run, bundle, "training", *PLAIN, datalist=str(listed), epochs=5, **options)

    whole = start("whole")
    handlers = json.loads((bundle / "configs/train.json").read_text())["train"]["handlers"]
    deadly = {"train#handlers": [*handlers, {"_target_": "toys.Killer", "epoch": 3}]}
    killed = start("killed", **deadly)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    toys.finish(whole, start("killed", resume=True, **deadly))
    first, second = (
        torch.load(tmp_path / name / "checkpoints/epoch_00005.pt", weights_only=True) for name in ("whole", "killed")
    )
    for state in (first, second):
        state["record"].pop("settings")
    assert toys.same(first, second)


@pytest.mark.parametrize("regime", ["few", "none"])
def test_two_ranks_share_images_without_labels(
    bundle: Path, data: Path, teacher: Path, tmp_path: Path, few: Path, none: Path, regime: str
) -> None:
    configs = "['configs/train.json','configs/logits.json','configs/multi_gpu_train.json']"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle",
        "run", "training", "--config_file", configs, "--bundle_root", ".", "--dataset_dir", str(data),
        "--ckpt_dir", str(tmp_path), "--datalist", str({"few": few, "none": none}[regime]),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False,
                            timeout=200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert weights(tmp_path)
    suffix = "_with_teacher" if regime == "none" else ""
    assert description(tmp_path)["validation"].keys() == {f"val_mean_dice{suffix}"}


def test_label_free_training_without_a_teacher_is_refused(
    run: Run, bundle: Path, none: Path, tmp_path: Path, teacher: Path
) -> None:
    absent = str(tmp_path / "absent/model.pt")
    with refused("does not exist; train it with .*teacher.json"):
        run(*PLAIN, datalist=str(none), teacher_path=absent)
    for run_id, configs in (("run", ("train",)), ("training", ("train", "baseline"))):
        with refused("`training` must have a case with a label, got no case; .* a teacher, which needs none"):
            run(*configs, run_id=run_id, datalist=str(none), teacher_path=absent)


def test_list_without_anything_to_train_on_is_refused(run: Run, data: Path, teacher: Path) -> None:
    listed = write_list(data, "nothing", training=[], unlabeled=[])
    with refused("at least one"):
        run(*PLAIN, datalist=str(listed))


def test_unlabeled_case_that_is_listed_with_a_label_is_refused(run: Run, data: Path, teacher: Path) -> None:
    content = json.loads((data / "datalist.json").read_text())
    listed = write_list(data, "labeled_twice", training=content["training"][:1], unlabeled=content["training"][1:])
    with refused("`unlabeled`.*`training`"):
        run(*PLAIN, datalist=str(listed))


@pytest.mark.parametrize("ratio", [-1, 17, "many", True])
def test_proportion_out_of_range_is_refused(run: Run, teacher: Path, few: Path, ratio: Any) -> None:
    with refused("ratio` must be a number"):
        run(*PLAIN, datalist=str(few), unlabeled_ratio=ratio)


def test_soft_labels_of_another_teacher_are_refused(run: Run, teacher: Path, none: Path, tmp_path: Path) -> None:
    place = tmp_path / "soft"
    run(*PLAIN, datalist=str(none), soft_label_dir=str(place))
    (folder,) = place.iterdir()
    other = tmp_path / "other/model.pt"
    other.parent.mkdir()
    torch.save({key: value * 2 for key, value in weights(teacher.parent).items()}, other)
    options: Options = {"soft_label_dir": str(place), "teacher_path": str(other), "ckpt_dir": str(tmp_path / "b")}
    run(*PLAIN, datalist=str(none), **options)
    (own,) = (one for one in place.iterdir() if one != folder)
    for file in own.glob("*.npz"):
        shutil.copy(next(folder.glob("*.npz")), file)
    with refused("`soft_label_dir` must hold soft labels of the teacher"):
        run(*PLAIN, datalist=str(none), **options)


def test_teacher_that_finds_nothing_is_refused_without_labels(
    run: Run, teacher: Path, none: Path, tmp_path: Path
) -> None:
    silent = {key: torch.zeros_like(value) for key, value in weights(teacher.parent).items()}
    (tmp_path / "silent").mkdir()
    torch.save(silent, tmp_path / "silent/model.pt")
    with refused("The teacher must find something in the validation images"):
        run(*PLAIN, datalist=str(none), teacher_path=str(tmp_path / "silent/model.pt"))
