# SPDX-License-Identifier: Apache-2.0
"""Presets, class heads and rare tumors at work on toy data; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from bundle_runs import parsed, refused, scalars, weights, write_neurons, write_slices

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore:(Mean of empty|All-NaN) slice:RuntimeWarning",   # a metric that no toy case defines
)
Run = Callable[..., Path]
LISTS = {"training": 3, "validation": 1, "test": 2}
FORM = {"kidney_2d": ["slices"], "liver_2d": ["slices"], "em": []}   # volumes: volumes.py
SMALL = {
    "kidney_2d": {"spacing": [-1, -1], "intensity_range": [0, 255]},
    "liver_2d": {"spacing": [-1, -1], "intensity_range": [0, 255]},
    "em": {"spacing": [10.0] * 3},
}


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose organ is 1; half of it is a tumor, 2."""
    folder = write_slices(tmp_path_factory.mktemp("slices"), LISTS)
    for file in folder.glob("*_label.png"):
        label = np.asarray(Image.open(file)).copy()
        label[:20] *= 2
        Image.fromarray(label).save(file)
    return folder


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_neurons(tmp_path_factory.mktemp("neurons"), LISTS)


@pytest.fixture(scope="module", params=sorted(SMALL))
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def data(preset: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("neurons" if preset == "em" else "slices")


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path, preset: str, data: Path) -> Path:
    options = {"into": bundle / "models/teacher" / preset, "dataset_dir": str(data), "epochs": 1}
    return run("training", "train", preset, *FORM[preset], "smoke", "teacher", **options, **SMALL[preset]) / "model.pt"


def test_a_preset_trains_evaluates_and_infers(
    run: Run, bundle: Path, teacher: Path, preset: str, data: Path, tmp_path: Path
) -> None:
    options = {"into": tmp_path, "dataset_dir": str(data), **SMALL[preset]}
    run("training", "train", preset, *FORM[preset], "smoke", epochs=1, **options)
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["mode"] == "distilled"
    assert teacher.parent.name == preset
    assert (tmp_path / "class_heads/model.pt").is_file()
    network = parsed(bundle, "train", preset).get_parsed_content("network_def")
    assert weights(tmp_path).keys() == network.state_dict().keys()  # no head
    run("evaluating", "train", preset, *FORM[preset], "evaluate", **options)
    rows = (tmp_path / "eval/val_mean_dice_raw.csv").read_text().splitlines()
    assert len(rows) == 1 + LISTS["test"]
    options |= {"ckpt_path": str(tmp_path / "model.pt")}
    forms = [f"inference_{form}" for form in FORM[preset]]
    run("evaluating", "inference", f"inference_{preset}", *forms, **options)
    cases = json.loads((data / "datalist.json").read_text())["test"]
    for case in cases:
        stem, suffix = case["image"].split(".", 1)
        assert (tmp_path / f"eval/{stem}_seg.{suffix}").is_file()


@pytest.mark.parametrize("override", ["baseline", "logits", "features", "method"])
def test_every_override_trains(run: Run, slices: Path, bundle: Path, tmp_path: Path, override: str) -> None:
    small = {"dataset_dir": str(slices), "epochs": 1, **SMALL["kidney_2d"]}
    teacher = bundle / "models/teacher/kidney_2d"
    if not (teacher / "model.pt").is_file():
        run("training", "train", "kidney_2d", "slices", "smoke", "teacher", into=teacher, **small)
    run("training", "train", "kidney_2d", "slices", "smoke", override, into=tmp_path, **small)
    mode = json.loads((tmp_path / "model.json").read_text())["mode"]
    assert mode == ("supervised" if override == "baseline" else "distilled")
    assert (tmp_path / "class_heads").is_dir() == (override == "method")   # fitted only where a loss asks for them


def test_the_published_networks_and_loss_train(run: Run, slices: Path, tmp_path: Path) -> None:
    small = {
        "dataset_dir": str(slices), "epochs": 1, "batch_size": 2, "patch_size": [64, 64], **SMALL["kidney_2d"],
        "teacher_def#filters": [4, 8, 8, 8, 8],
        "teacher_path": str(tmp_path / "teacher/model.pt"), "teacher_check#mode": "warn", "val_interval": 1,
        "data_check#allow_shared": True,
    }
    run("training", "train", "kidney_2d", "slices", "paper", "teacher", into=tmp_path / "teacher", **small)
    small["network_def#filters"] = [8, 16, 16, 16]   # of 4, torch 2.13 writes beyond its memory on CPUs with AVX2 alone
    run("training", "train", "kidney_2d", "slices", "paper", into=tmp_path / "student", **small)
    terms = {tag.rpartition("kd/")[2]: value for tag, value in scalars(tmp_path / "student").items() if "kd/" in tag}
    assert terms.keys() == {"ufd", "ifd", "upd", "ipd"}
    assert all(np.isfinite(value).all() for value in terms.values())


@pytest.mark.parametrize("preset_2d", ["kidney_2d", "liver_2d"])
def test_the_tumor_of_kits_and_lits_is_class_one_wherever_labels_are_loaded(
    bundle: Path, slices: Path, preset_2d: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    label = np.asarray(Image.open(slices / "0_label.png")).copy()
    assert np.unique(label).tolist() == [0, 1, 2]
    label[0, 0] = 3                                                # a cyst, in newer versions of KiTS
    Image.fromarray(label).save(tmp_path / "label.png")
    case = {"image": str(slices / "0.png"), "label": str(tmp_path / "label.png")}
    loaded = parsed(bundle, "train", preset_2d, "slices").get_parsed_content("loading")(case)["label"][0].numpy()
    assert np.array_equal((loaded == 1).sum(), (label == 2).sum())
    assert set(np.unique(loaded)) == ({0, 1} if preset_2d == "kidney_2d" else {0, 1, 3})


@pytest.fixture(scope="module", params=["none", "voxel"])
def rare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes without a tumor, or with one of a single voxel."""
    folder = tmp_path_factory.mktemp(request.param)
    content: dict[str, list[dict[str, str]]] = {}
    for number, name in enumerate(["training", "training", "validation", "test"]):
        rng = np.random.default_rng(number)
        image, label = rng.normal(40, 20, (36, 36, 34)).astype(np.int16), np.zeros((36, 36, 34), np.uint8)
        if request.param == "voxel":
            label[tuple(rng.integers(4, 30, 3))] = 1
        for kind, voxels in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([8.0, 8.0, 8.0, 1.0])), folder / f"{number}_{kind}.nii.gz")
        content.setdefault(name, []).append({"image": f"{number}_image.nii.gz", "label": f"{number}_label.nii.gz"})
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


def test_no_tumor_and_a_tumor_of_one_voxel_train_with_finite_terms(run: Run, rare: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(rare), "epochs": 1, "teacher_path": str(tmp_path / "teacher/model.pt")}
    if rare.name.startswith("none"):
        with refused("All 2 training labels must mark something, got only 0 in each"):
            run("training", "train", "smoke", "teacher", into=tmp_path / "teacher", **options)
        return
    run("training", "train", "smoke", "teacher", into=tmp_path / "teacher", **options)
    run("training", "train", "smoke", into=tmp_path / "student", **options)
    values = scalars(tmp_path / "student")
    assert all(np.isfinite(value).all() for tag, value in values.items() if "kd/" in tag)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "student").values())
