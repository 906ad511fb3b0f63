# SPDX-License-Identifier: Apache-2.0
"""Paraphrasers, discriminator and presets at work on toy data; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bundle_runs import parsed, refused, scalars, weights, write_neurons, write_slices
from medkd.weights import load_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore:(Mean of empty|All-NaN) slice:RuntimeWarning",   # a metric that no toy case defines
)
Run = Callable[..., Path]
LISTS = {"training": 3, "validation": 1, "test": 2}
SMALL: dict[str, dict[str, Any]] = {
    "2d": {"spacing": [-1, -1], "patch_size": [64, 64]},
    "em": {"spacing": [10.0] * 3},
}
FLOW = {"node", "edge", "soft_target"}
METHOD = {"node", "edge", "adversarial"}


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slices(tmp_path_factory.mktemp("slices"), LISTS)


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_neurons(tmp_path_factory.mktemp("neurons"), LISTS)


def small(preset: str) -> dict[str, Any]:
    """Options of a run of seconds."""
    return {"epochs": 1, "out_channels": 2, **SMALL[preset]}


@pytest.fixture(scope="module", params=sorted(SMALL))
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def data(preset: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"2d": "slices", "em": "neurons"}[preset])


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path, preset: str, data: Path) -> Path:
    folder = bundle / "models/teacher" / preset
    return run("training", "train", preset, "smoke", "teacher", into=folder, dataset_dir=str(data), **small(preset))


def terms(folder: Path) -> set[str]:
    """Distillation terms that a run has written down, all finite."""
    found = {tag.rpartition("kd/")[2]: values for tag, values in scalars(folder).items() if "kd/" in tag}
    assert all(np.isfinite(values).all() for values in found.values())
    return set(found)


def test_a_preset_trains_evaluates_and_infers(
    run: Run, bundle: Path, teacher: Path, preset: str, data: Path, tmp_path: Path
) -> None:
    options = {"into": tmp_path, "dataset_dir": str(data), **small(preset)}
    run("training", "train", preset, "smoke", **options)
    assert terms(tmp_path) == FLOW
    assert (teacher / "paraphrasers/model.pt").is_file()
    network = parsed(bundle, "train", preset).get_parsed_content("network_def")
    assert weights(tmp_path).keys() == network.state_dict().keys()
    run("evaluating", "train", preset, "evaluate", **options)
    rows = (tmp_path / "eval/val_pooled_hd95_raw.csv").read_text().splitlines()
    assert len(rows) == 1 + LISTS["test"]
    options = {"into": tmp_path, "dataset_dir": str(data), "ckpt_path": str(tmp_path / "model.pt"), **SMALL[preset]}
    run("evaluating", "inference", f"inference_{preset}", **options)
    for case in json.loads((data / "datalist.json").read_text())["test"]:
        stem, suffix = case["image"].split(".", 1)
        assert (tmp_path / f"eval/{stem}_seg.{suffix}").is_file()


@pytest.fixture(scope="module")
def flat_teacher(run: Run, bundle: Path, slices: Path) -> Path:
    folder = bundle / "models/teacher/2d"
    if not (folder / "model.pt").is_file():
        run("training", "train", "2d", "smoke", "teacher", into=folder, dataset_dir=str(slices), **small("2d"))
    return folder


@pytest.mark.parametrize(("override", "expected"), [
    ("baseline", set()), ("logits", {"soft_target"}), ("features", {"features"}), ("method", METHOD),
])
def test_every_override_trains_and_fits_paraphrasers_only_for_the_method(
    run: Run, slices: Path, flat_teacher: Path, tmp_path: Path, override: str, expected: set[str]
) -> None:
    place = tmp_path / "paraphrasers/model.pt"
    options = {"into": tmp_path, "dataset_dir": str(slices), "paraphraser_path": str(place), **small("2d")}
    run("training", "train", "2d", "smoke", override, **options)
    assert terms(tmp_path) == expected
    assert place.is_file() == (override == "method")
    kept = load_tensors(max((tmp_path / "checkpoints").glob("*.pt")))["objects"]
    assert ("discriminator" in kept) == (override in ("baseline", "method"))


def test_the_paraphraser_stage_fits_what_a_training_then_finds(
    run: Run, slices: Path, flat_teacher: Path, tmp_path: Path
) -> None:
    place = tmp_path / "fitted/model.pt"
    options = {"into": tmp_path, "dataset_dir": str(slices), "paraphraser_path": str(place), **small("2d")}
    run("training", "train", "2d", "smoke", "paraphraser", **options)
    assert not (tmp_path / "model.pt").exists()                    # no student
    content = place.read_bytes()
    run("training", "train", "2d", "smoke", "method", **options)
    assert place.read_bytes() == content


def test_the_discriminator_and_its_optimizer_resume_bit_identical(
    run: Run, slices: Path, flat_teacher: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": str(slices), **small("2d"), "epochs": 2, "val_interval": 1}
    whole = run("training", "train", "2d", "smoke", "method", into=tmp_path / "whole", **options)
    half = tmp_path / "half"
    shutil.copytree(whole / "checkpoints", half / "checkpoints")
    (half / "checkpoints/epoch_00002.pt").unlink()
    run("training", "train", "2d", "smoke", "method", into=half, resume=True, **options)
    ends = [load_tensors(folder / "checkpoints/epoch_00002.pt")["objects"] for folder in (whole, half)]
    assert "adversarial" in terms(half)
    for name in ("network", "discriminator", "optimizer", "discriminator_optimizer"):
        torch.testing.assert_close(*(end[name] for end in ends), rtol=0, atol=0)


def test_without_any_label_the_method_teaches_from_images_alone(
    run: Run, slices: Path, flat_teacher: Path, tmp_path: Path
) -> None:
    content = json.loads((slices / "datalist.json").read_text())
    lists = {"unlabeled": content["training"], "validation": content["validation"], "training": []}
    bare = {name: [{"image": case["image"]} for case in cases] for name, cases in lists.items()}
    (tmp_path / "datalist.json").write_text(json.dumps({**bare, "data_root": str(slices)}))
    options = {"into": tmp_path / "run", "dataset_dir": str(tmp_path), **small("2d")}
    run("training", "train", "2d", "smoke", **options)
    assert terms(tmp_path / "run") == FLOW
    assert [*json.loads((tmp_path / "run/model.json").read_text())["validation"]] == ["val_mean_dice_with_teacher"]


def test_layers_of_other_channels_without_paraphrasers_are_refused(
    run: Run, bundle: Path, slices: Path, flat_teacher: Path, tmp_path: Path
) -> None:
    bare = {"paraphrasers": None, "distill_handlers": ["@gradient_norms", "@discriminator_training"]}
    (bundle / "configs/bare.json").write_text(json.dumps(bare))   # MONAI takes no None as an option
    with refused("`paraphrasers` must bring the teacher's layer 'model.1.submodule.0' to the 8 channels"):
        run("training", "train", "2d", "smoke", "bare", into=tmp_path, dataset_dir=str(slices), **small("2d"))


def test_layers_of_two_strides_are_refused(run: Run, slices: Path, flat_teacher: Path, tmp_path: Path) -> None:
    options = {"into": tmp_path, "dataset_dir": str(slices), **small("2d"),
               "flows": [["model.0", "model.1.submodule.1.submodule.2"]]}
    with refused("`flows` must be of layers of one stride|`channels` .* of a paraphraser must be"):
        run("training", "train", "2d", "smoke", **options)


def test_the_small_network_of_enets_design_is_a_student_in_3d(
    run: Run, bundle: Path, neurons: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": str(neurons), **small("em"), "patch_size": [32, 32, 32]}
    folder = bundle / "models/teacher/em"
    if not (folder / "model.pt").is_file():
        run("training", "train", "em", "smoke", "teacher", into=folder, **options)
    run("training", "train", "em", "smoke", "enet", into=tmp_path, **options)
    assert terms(tmp_path) == FLOW
    network = parsed(bundle, "train", "enet").get_parsed_content("network_def")
    assert weights(tmp_path).keys() == network.state_dict().keys()
    options = {"into": tmp_path, "dataset_dir": str(neurons), "ckpt_path": str(tmp_path / "model.pt"), **SMALL["em"]}
    run("evaluating", "inference", "inference_em", "inference_enet", **options)
    assert len(list((tmp_path / "eval").glob("*_seg.nii.gz"))) == LISTS["test"]


@pytest.fixture(scope="module")
def published_teacher(run: Run, slices: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options with which the published students train on toy data, a narrow FANet trained among them."""
    folder = tmp_path_factory.mktemp("fanet")
    options = {
        "dataset_dir": str(slices), "batch_size": 2, "patch_size": [64, 64], "spacing": [-1, -1], "epochs": 1,
        "val_interval": 1, "out_channels": 2, "intensity_range": [0, 255], "teacher_def#filters": [4, 4, 8, 8],
        "teacher_path": str(folder / "model.pt"), "teacher_check#mode": "warn", "data_check#allow_shared": True,
        "discriminator#width": 4, "discriminator#layers": 3, "paraphraser_fitting#steps": 2,
    }
    run("training", "train", "2d", "paper", "teacher", into=folder, **options)
    return options


@pytest.mark.parametrize(("student", "channels"), [([], 24), (["paper_enet"], 64), (["paper_erfnet"], 64)])
def test_the_published_students_and_loss_train_and_predict(
    run: Run, published_teacher: dict[str, Any], tmp_path: Path, student: list[str], channels: int
) -> None:
    options = {**published_teacher, "flow_channels": [[8, channels]], "paraphraser_path": str(tmp_path / "fitted.pt")}
    run("training", "train", "2d", "paper", *student, into=tmp_path, **options)
    assert terms(tmp_path) == {"node", "edge", "adversarial", "logits"}
    kept = {key: published_teacher[key] for key in ("dataset_dir", "patch_size", "spacing", "intensity_range")}
    configs = ["inference", "inference_2d", *(f"inference_{name}" for name in ("paper", *student))]
    run("evaluating", *configs, into=tmp_path, ckpt_path=str(tmp_path / "model.pt"), **kept)
    assert len(list((tmp_path / "eval").glob("*_seg.*"))) == LISTS["test"]


@pytest.mark.parametrize(("override", "expected"), [
    ("baseline", {}), ("paper_logits", {"logits": 1.0}),
    ("paper_method", {"node": 1e-5, "edge": 1e-9, "adversarial": 0.1}),
])
def test_the_published_set_up_has_its_own_weights_behind_every_override(
    bundle: Path, override: str, expected: dict[str, float]
) -> None:
    parser = parsed(bundle, "train", "2d", "paper", override)
    assert parser.get_parsed_content("distill_weights") == expected


def test_a_layer_may_be_in_two_flows(bundle: Path) -> None:
    parser = parsed(bundle, "train")
    first, second, third = "model.1.submodule.0", "model.1.submodule.1.submodule.2", "model.1.submodule.1.submodule.1"
    parser["flows"] = [[first, second], [first, ["model.1.submodule.1.submodule.0", third]]]
    parser["flow_channels"] = [[48, 8], [48, 8]]
    paraphrasers = parser.get_parsed_content("paraphrasers")
    assert paraphrasers.taps == (first, second, third)
    assert paraphrasers.channels == ((48, 8),) * 3
