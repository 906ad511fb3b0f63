# SPDX-License-Identifier: Apache-2.0
"""2-D networks on volumes as KiTS and LiTS have them; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from bundle_runs import parsed, refused, scalars, weights
from medkd.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore:(Mean of empty|All-NaN) slice:RuntimeWarning",   # a metric that no toy case defines
)
Run = Callable[..., Path]
PRESETS = {"kits": "kidney_2d", "lits": "liver_2d"}
SMALL = {"epochs": 1, "spacing": [-1, -1, -1]}
SPACING = (0.8, 0.7, 5.0)                                          # mm, of voxels (x, y, z)
AIR, BODY, ORGAN, TUMOR = -1000, 20, 80, 130                       # HU, within both windows
FOUND = 105                                                        # HU, above which `see_tumors` finds a tumor


def volume(number: int, slices: int = 5, tumor: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A body in air with an organ in all slices and a tumor in one of them, and the label: (x, y, z)."""
    rng = np.random.default_rng(number)
    image = np.full((44, 40, slices), AIR, np.int16)
    image[4:40, 5:36] = BODY
    label = np.zeros(image.shape, np.uint8)
    label[10:28, 12:30] = 1
    left, top = rng.integers(12, 18, 2)
    label[left : left + 7, top : top + 6, tumor] = 2
    image += np.array([0, ORGAN - BODY, TUMOR - BODY], np.int16)[label]
    return image + rng.integers(-8, 9, image.shape).astype(np.int16), label


def save(file: Path, voxels: np.ndarray, layout: str) -> None:
    """As the sets have them: KiTS with slices first, which its affine says; LiTS with slices last."""
    file.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    if layout == "kits":
        voxels, affine = voxels.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]
    affine[:3, 3] = (31.0, 22.0, -400.0)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(voxels), affine), file)


def names(layout: str, number: int) -> tuple[str, str]:
    if layout == "kits":
        return f"case_{number:05}/imaging.nii.gz", f"case_{number:05}/segmentation.nii.gz"
    folder = f"Training Batch {1 + number % 2}"
    return f"{folder}/volume-{number}.nii", f"{folder}/segmentation-{number}.nii"


@pytest.fixture(scope="module", params=sorted(PRESETS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def downloaded(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six volumes, two of them thinner: of two slices, and of one."""
    folder = tmp_path_factory.mktemp(layout)
    for number, slices in enumerate((5, 2, 4, 1, 5, 6)):
        pair = volume(number, slices, min(1, slices - 1))
        for name, voxels in zip(names(layout, number), pair, strict=True):
            save(folder / name, voxels, layout)
    return folder


@pytest.fixture(scope="module")
def data(downloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list that `medkd datalist` makes of them."""
    folder = tmp_path_factory.mktemp("list")
    words = ["--images", ".", "--labels", ".", "--fractions", "0.5,0.2,0.3"]
    assert main(["datalist", str(downloaded), str(folder), *words]) == 0
    return folder


def cases(data: Path, name: str) -> list[dict[str, str]]:
    content = json.loads((data / "datalist.json").read_text())
    return [{key: str(Path(content["data_root"], file)) for key, file in case.items()} for case in content[name]]


@pytest.fixture(scope="module")
def preset(layout: str) -> str:
    return PRESETS[layout]


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path, preset: str, data: Path) -> Path:
    into = bundle / "models/teacher" / preset
    return run("training", "train", preset, "smoke", "teacher", into=into, dataset_dir=str(data), **SMALL)


@pytest.fixture(scope="module")
def student(run: Run, teacher: Path, preset: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("student")
    return run("training", "train", preset, "smoke", into=into, dataset_dir=str(data), **SMALL)


def test_all_cases_of_a_download_are_listed_with_their_labels(layout: str, data: Path) -> None:
    found = [case for name in ("training", "validation", "test") for case in cases(data, name)]
    root = Path(json.loads((data / "datalist.json").read_text())["data_root"])
    assert sorted((case["image"], case["label"]) for case in found) == sorted(
        tuple(str(root / name) for name in names(layout, number)) for number in range(6)
    )


def test_the_check_before_a_training_takes_volumes_and_names_slices(
    bundle: Path, preset: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["check-data", str(data), "--bundle", str(bundle), "--config_file", preset]
    assert main(words) == 0
    assert "The data can be used" in capsys.readouterr().out
    image, label = volume(0)
    for name, voxels in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(voxels[..., 0], np.eye(4)), tmp_path / f"{name}.nii.gz")
    case = {"image": "image.nii.gz", "label": "label.nii.gz"}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [case], "validation": [case]}))
    assert main([words[0], str(tmp_path), *words[2:], "--allow_shared"]) != 0
    assert "must have 3 spatial axes, got (44, 40)" in capsys.readouterr().err


def test_crops_are_slices_of_all_volumes_most_of_them_with_a_tumor(
    bundle: Path, preset: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "train", preset)
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(data), "distill_weights": {}, **SMALL})
    prepare = parser.get_parsed_content("train#preprocessing")
    prepare.set_random_state(0)
    crops = [crop for case in cases(data, "training") * 8 for crop in prepare(case)]
    assert len(crops) == len(cases(data, "training")) * 8 * 4
    assert {tuple(crop[key].shape) for crop in crops for key in ("image", "label")} == {(1, 192, 192)}
    assert {float(value) for crop in crops for value in crop["label"].unique()} == {0.0, 1.0}   # the tumor alone
    share = float(np.mean([bool((crop["label"] == 1).any()) for crop in crops]))
    assert 0.6 < share < 1.0                                       # two thirds by choice, some by chance


def test_a_student_is_distilled_scored_on_whole_volumes_and_predicts_them(
    run: Run, bundle: Path, preset: str, data: Path, teacher: Path, student: Path
) -> None:
    assert json.loads((student / "model.json").read_text())["mode"] == "distilled"
    assert (student / "class_heads/model.pt").is_file()
    terms = {tag.rpartition("kd/")[2]: value for tag, value in scalars(student).items() if "kd/" in tag}
    assert {"ufd", "ifd", "upd", "ipd", "soft_target"} <= terms.keys()
    assert all(np.isfinite(value).all() and np.abs(value).max() > 0 for value in terms.values())
    run("evaluating", "train", preset, "smoke", "evaluate", into=student, dataset_dir=str(data), **SMALL)
    rows = (student / "eval/val_mean_dice_raw.csv").read_text().splitlines()
    assert len(rows) == 1 + len(cases(data, "test"))
    options = {"ckpt_path": str(student / "model.pt"), "dataset_dir": str(data)}
    run("evaluating", "inference", f"inference_{preset}", into=student, **options)   # resampled within slices
    predicted = sorted((student / "eval").rglob("*_seg.nii.gz"))
    assert len(predicted) == len(cases(data, "test"))
    shapes = sorted(nib.load(case["image"]).shape for case in cases(data, "test"))
    assert sorted(nib.load(file).shape for file in predicted) == shapes
    network = parsed(bundle, "train", preset).get_parsed_content("network_def")
    assert weights(student).keys() == network.state_dict().keys()


def test_a_training_goes_on_where_it_was(run: Run, preset: str, data: Path, student: Path, tmp_path: Path) -> None:
    if preset == "liver_2d":
        pytest.skip("differs in the window only")
    options = {"into": tmp_path, "dataset_dir": str(data), **SMALL}
    run("training", "train", preset, "smoke", **options)
    run("training", "train", preset, "smoke", **options | {"epochs": 2, "resume": "changed"})
    assert sorted(file.name for file in (tmp_path / "checkpoints").glob("*.pt"))[-1] == "epoch_00002.pt"
    assert not list(tmp_path.glob("before_*"))


@pytest.mark.parametrize("override", ["baseline", "features", "method"])
def test_every_override_trains_on_volumes(
    run: Run, preset: str, data: Path, teacher: Path, tmp_path: Path, override: str
) -> None:
    if preset == "liver_2d":
        pytest.skip("differs in the window only")
    run("training", "train", preset, "smoke", override, into=tmp_path, dataset_dir=str(data), **SMALL)
    mode = json.loads((tmp_path / "model.json").read_text())["mode"]
    assert mode == ("supervised" if override == "baseline" else "distilled")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_volumes_without_labels_teach_by_soft_labels_of_all_their_slices(
    run: Run, preset: str, downloaded: Path, teacher: Path, tmp_path: Path
) -> None:
    assert main(["datalist", str(downloaded), str(tmp_path), "--images", ".", "--no_labels"]) == 0
    options = {"dataset_dir": str(tmp_path), "soft_label_dir": str(tmp_path / "soft"), **SMALL}
    run("training", "train", preset, "smoke", "logits", into=tmp_path / "run", **options)
    told = json.loads((tmp_path / "run/model.json").read_text())
    assert told["mode"] == "distilled"
    files = list((tmp_path / "soft").glob("*/*.npz"))
    images = cases(tmp_path, "unlabeled")
    slices = [min(nib.load(case["image"]).shape) for case in images]
    stored = [np.load(file)["values"].shape for file in files]     # (K, *S) of the whole body
    assert sorted(shape[-1] for shape in stored) == sorted(slices)
    assert {shape[1:3] for shape in stored} == {(36, 31)}


@pytest.mark.parametrize("form", ["volumes", "slices"])
def test_the_published_networks_see_eight_slices_a_step(bundle: Path, form: str) -> None:
    names = ["train", "kidney_2d", *(["slices"] if form == "slices" else []), "paper"]
    parser = parsed(bundle, *names)
    crops, batch = (parser.get_parsed_content(key) for key in ("sampling#num_samples", "batch_size"))
    assert crops * batch == 8
    assert parser.get_parsed_content("crop_size") == ([384, 384, 1] if form == "volumes" else [384, 384])


def test_the_published_networks_train_on_volumes(run: Run, preset: str, data: Path, tmp_path: Path) -> None:
    if preset == "liver_2d":
        pytest.skip("differs in the window only")
    small = {
        "dataset_dir": str(data), "epochs": 1, "batch_size": 1, "patch_size": [64, 64], "val_interval": 1,
        "teacher_def#filters": [4, 8, 8, 8, 8], "teacher_path": str(tmp_path / "teacher/model.pt"),
        "teacher_check#mode": "warn",
    }
    run("training", "train", preset, "paper", "teacher", into=tmp_path / "teacher", **small)
    small["network_def#filters"] = [8, 16, 16, 16]   # of 4, torch 2.13 writes beyond its memory on CPUs with AVX2 alone
    run("training", "train", preset, "paper", into=tmp_path / "student", **small)
    terms = {tag.rpartition("kd/")[2]: value for tag, value in scalars(tmp_path / "student").items() if "kd/" in tag}
    assert terms.keys() == {"ufd", "ifd", "upd", "ipd"}
    assert all(np.isfinite(value).all() for value in terms.values())


def see_tumors(folder: Path, window: tuple[int, int]) -> dict[str, Any]:
    """Options for a network of slices that finds what is brighter than `FOUND`."""
    threshold = (FOUND - window[0]) / (window[1] - window[0])
    network = torch.nn.Conv2d(1, 2, 1)
    network.load_state_dict(
        {"weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), "bias": torch.tensor([0.0, -threshold])}
    )
    torch.save(network.state_dict(), folder / "model.pt")
    definition = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    return {"network_def": definition, "spacing": [-1, -1, -1]}


WINDOWS = {"kidney_2d": (-200, 300), "liver_2d": (-40, 160)}


def test_evaluation_counts_all_slices_and_tells_distances_in_mm(
    run: Run, layout: str, preset: str, tmp_path: Path
) -> None:
    """One prediction is right, one has as many voxels too much in a slice without a tumor, one lies a slice off."""
    listed = []
    for number, kind in enumerate(("right", "too much", "off")):
        image, label = volume(7, slices=5, tumor=1)
        tumor = label[..., 1] == 2
        if kind == "off":
            image[..., 1][tumor] = ORGAN
        if kind != "right":
            image[..., {"too much": 4, "off": 2}[kind]][tumor] = TUMOR
        pair = dict(zip(("image", "label"), names(layout, number), strict=True))
        for key, voxels in (("image", image), ("label", label)):
            save(tmp_path / pair[key], voxels, layout)
        listed.append(pair)
    (tmp_path / "datalist.json").write_text(json.dumps({"test": listed}))
    options = {"into": tmp_path, "dataset_dir": str(tmp_path), **see_tumors(tmp_path, WINDOWS[preset])}
    run("evaluating", "train", preset, "evaluate", **options)

    def scores(metric: str) -> list[float]:
        rows = (tmp_path / f"eval/{metric}_raw.csv").read_text().splitlines()[1:]
        return [float(row.split(",")[1]) for row in rows]

    assert scores("val_mean_dice") == pytest.approx([1.0, 2 / 3, 0.0], abs=1e-4)
    assert scores("val_relative_volume_difference") == pytest.approx([0.0, 1.0, 0.0], abs=1e-4)
    assert scores("val_assd")[2] == pytest.approx(SPACING[2], abs=1e-3)
    assert scores("val_false_positive_lesions") == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("slices", [5, 1])
def test_prediction_of_a_volume_lies_on_it_voxel_by_voxel(
    run: Run, layout: str, preset: str, tmp_path: Path, slices: int
) -> None:
    name = names(layout, 3)[0]
    save(tmp_path / name, volume(3, slices, slices // 2)[0], layout)
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": name}]}))
    options = {"dataset_dir": str(tmp_path), "ckpt_path": str(tmp_path / "model.pt")}
    options |= see_tumors(tmp_path, WINDOWS[preset])
    run("evaluating", "inference", f"inference_{preset}", into=tmp_path, **options)
    (file,) = (tmp_path / "eval").rglob("*_seg.nii.gz")
    image, pred = nib.load(tmp_path / name), nib.load(file)
    assert pred.shape == image.shape
    np.testing.assert_allclose(pred.affine, image.affine, atol=1e-4)
    assert np.array_equal(np.asarray(pred.dataobj), np.asarray(image.dataobj) > FOUND)
    assert np.asarray(pred.dataobj).any()


def test_slices_are_never_resampled_and_a_spacing_of_two_axes_is_refused(
    bundle: Path, run: Run, preset: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "inference", f"inference_{preset}")
    parser["bundle_root"] = str(bundle)
    case = cases(data, "test")[0]
    prepared = parser.get_parsed_content("preprocessing")({"image": case["image"]})["image"]
    assert prepared.shape[-1] == min(nib.load(case["image"]).shape)
    np.testing.assert_allclose(np.asarray(prepared.pixdim), [1.5, 1.5, SPACING[2]], rtol=1e-5)
    options = {"dataset_dir": str(data), **see_tumors(tmp_path, WINDOWS[preset])}
    options |= {"spacing": [1.5, 1.5], "ckpt_path": str(tmp_path / "model.pt")}
    with refused("`spacing` must have a length for each of 3 axes"):
        run("evaluating", "inference", f"inference_{preset}", into=tmp_path, **options)
