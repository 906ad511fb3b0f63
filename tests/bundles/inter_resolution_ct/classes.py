# SPDX-License-Identifier: Apache-2.0
"""Classes of whole volumes at two resolutions, on toy data; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from bundle_runs import parsed, refused, scalars, weights
from medkd.cli import datalist as datalist_command
from medkd.cli import main
from medkd.cli.parser import Parser
from medkd.inference.degradation import area_average

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]
COUNTS = {"training": 10, "validation": 4, "test": 4}
PLACES: dict[str, Any] = {"spacing": [12.0] * 3, "patch_size": [32] * 3}
SIZES: dict[str, Any] = {**PLACES, "pairing_check#stride": 4, "teacher_def#filters": [8, 12, 16], "batch_size": 5}
STUDENT: dict[str, Any] = {"network_def#filters": [6, 8, 12]}
TERMS = {"attention", "feature"}


def write_chest(file: Path, number: int, ill: bool, codes: str = "LPS") -> None:
    """A body with two lungs, of a size, spacing and orientation of its own; bright nodules in the lungs if ill."""
    rng = np.random.default_rng(number)
    shape, spacing = rng.integers(44, 60, 3), rng.uniform(5.0, 7.0, 3)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * spacing / (shape * spacing)   # 0 to 1
    volume = np.full(shape, -1000.0)
    volume[(((grid - 0.5) / (0.46, 0.4, 0.48)) ** 2).sum(-1) < 1] = 40.0
    for side in (0.3, 0.7):
        volume[(((grid - (side, 0.5, 0.5)) / (0.14, 0.25, 0.35)) ** 2).sum(-1) < 1] = -850.0
    for _ in range(8 if ill else 0):
        middle = (rng.choice((0.3, 0.7)), *rng.uniform(0.4, 0.6, 2))
        volume[(((grid - middle) * shape * spacing / 32.0) ** 2).sum(-1) < 1] = 300.0
    volume += rng.normal(0, 15, shape)
    save_as(file, volume.astype(np.int16), np.diag([*spacing, 1.0]), codes)


def save_as(file: Path, voxels: np.ndarray, affine: np.ndarray, codes: str) -> None:
    """The same volume with its axes in another order and direction."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    turned = nib.orientations.apply_orientation(voxels, turn)
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(turned, affine @ inv_ornt_aff(turn, voxels.shape)), file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes in a folder per class, listed by the command."""
    source, output = tmp_path_factory.mktemp("volumes"), tmp_path_factory.mktemp("data")
    splits: dict[str, list[str]] = {}
    for number, name in enumerate(name for name, count in COUNTS.items() for _ in range(count)):
        ill = bool(number % 2)
        case = f"{'ill' if ill else 'healthy'}/{number}"
        write_chest(source / f"images/{case}.nii.gz", number, ill, ("LPS", "RAS", "ASL")[number % 3])
        splits.setdefault(name, []).append(case)
    (output / "splits.json").write_text(json.dumps(splits))
    words = [str(source), str(output), "--class_folders", "--splits", str(output / "splits.json")]
    datalist_command.run(Parser("medkd datalist"), words)
    return output


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path, data: Path) -> Path:
    folder = bundle / "models/teacher/classify"
    options = {"into": folder, "dataset_dir": str(data), "epochs": 40, "learning_rate": 0.01, **SIZES}
    run("training", "train", "classify", "teacher", **options)
    return folder / "model.pt"


@pytest.fixture(scope="module")
def student(run: Run, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"into": tmp_path_factory.mktemp("student"), "dataset_dir": str(data), "epochs": 40}
    return run("training", "train", "classify", **options, learning_rate=0.01, **SIZES, **STUDENT)


@pytest.fixture(scope="module")
def predict(run: Run, student: Path) -> Callable[..., list[dict[str, str]]]:
    """Rows that the student's inference writes for the list `test` of a folder."""

    def call(folder: Path, into: Path, **options: Any) -> list[dict[str, str]]:
        options |= {"dataset_dir": str(folder), "ckpt_path": str(student / "model.pt"), **PLACES, **STUDENT}
        run("evaluating", "inference", "inference_classify", into=into, **options)
        return table(into / "eval/predictions.csv")

    return call


@pytest.fixture
def parser(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConfigParser]:
    """Config files of the bundle by name, with the sizes of these tests."""
    monkeypatch.syspath_prepend(str(bundle))

    def call(*names: str) -> ConfigParser:
        found = parsed(bundle, *names)
        found.update({"bundle_root": str(bundle), **PLACES})
        return found

    return call


def terms(folder: Path) -> dict[str, list[float]]:
    return {tag.rpartition("kd/")[2]: values for tag, values in scalars(folder).items() if "kd/" in tag}


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def listed(data: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((data / "datalist.json").read_text())
    return content


# ---- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "count"), [(32, 3_513_634), (16, 878_994), (8, 220_042)])
def test_networks_have_the_known_numbers_of_parameters(
    parser: Callable[..., ConfigParser], width: int, count: int
) -> None:
    config = parser("train", "classify")
    config["network_def"] |= {"filters": [width, 2 * width, 4 * width, 8 * width], "norm": None}
    network = config.get_parsed_content("network_def")
    assert sum(one.numel() for one in network.parameters()) == count
    assert network.features[:9](torch.zeros(1, 1, 16, 16, 16)).shape[2:] == (2, 2, 2)


def test_the_student_is_a_small_part_of_the_teacher(parser: Callable[..., ConfigParser]) -> None:
    configs = [parser("train", "classify", *more) for more in ((), ("teacher",))]
    networks = [config.get_parsed_content("network_def") for config in configs]
    student, teacher = (sum(one.numel() for one in network.parameters()) for network in networks)
    assert (student, teacher) == (39_678, 879_474)
    assert 0.01 < student / teacher < 0.06


def test_an_untrained_network_without_a_norm_tells_volumes_apart(parser: Callable[..., ConfigParser]) -> None:
    """Signals neither fade nor grow with depth: torch's default initialization leaves a hundredth of them."""
    torch.manual_seed(0)
    config = parser("train", "classify")
    config["network_def"]["norm"] = None
    features = config.get_parsed_content("network_def").features
    with torch.no_grad():
        found = features(torch.randn(2, 1, 24, 24, 24))
    assert 0.1 < float(found.std()) < 10.0


@pytest.mark.parametrize(
    ("filters", "convolutions"), [([], 2), ([4, 8], [2]), ([4, 8], [2, 0]), ([4, 8], 0)]
)
def test_levels_that_are_none_are_refused(
    parser: Callable[..., ConfigParser], filters: list[int], convolutions: Any
) -> None:
    from scripts.networks import VolumeClassifier

    with pytest.raises(ValueError, match="`convolutions` must be 1 or more for each of the levels"):
        VolumeClassifier(2, filters, convolutions)


# ---- what networks see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 40, 44), (20, 60, 33)])
def test_the_random_chain_shows_both_networks_one_tissue_of_any_body(
    parser: Callable[..., ConfigParser], shape: tuple[int, ...]
) -> None:
    """Every voxel of the student is the mean of the teacher's, in HU: all steps are drawn once for both."""
    config = parser("train", "classify")
    config["noise"]["prob"] = 0.0                                  # air is at the end of the window, which would cut it
    chain = Compose(config.get_parsed_content("train#random_transforms")).set_random_state(seed=0)
    case = {"image": MetaTensor(100 * torch.rand(1, *shape)), "label": 1}
    found = [chain(case) for _ in range(12)]
    for one in found:
        assert one.keys() == {"image", "teacher_image", "label"}
        assert one["teacher_image"].shape == (1, 32, 32, 32)
        torch.testing.assert_close(
            one["image"].as_tensor(), area_average(one["teacher_image"].as_tensor(), (2, 2, 2)), rtol=0, atol=1e-5
        )
    assert len({float(one["image"].sum()) for one in found}) == len(found)


def test_hounsfield_units_are_averaged_before_the_window_cuts_them_off(parser: Callable[..., ConfigParser]) -> None:
    """Metal beside air: 250 HU for a scanner of thick voxels, the middle of the window for an average of cut values."""
    full = torch.full((1, 32, 32, 32), -1000.0)
    full[..., ::2] = 1500.0
    config = parser("train", "classify")
    steps = [config.get_parsed_content(name) for name in ("padding", "pairing", "intensity")]
    result = Compose(steps)({"image": MetaTensor(full)})
    assert result["image"].unique().tolist() == pytest.approx([(250 + 1000) / 1500])
    assert result["teacher_image"].unique().tolist() == [0.0, 1.0]


def test_validation_and_inference_see_the_middle_of_the_body_alike_each_time(
    parser: Callable[..., ConfigParser], data: Path
) -> None:
    case = listed(data)["test"][1]
    item = {"image": str(Path(listed(data)["data_root"], case["image"])), "label": 1}
    validation = parser("train", "classify").get_parsed_content("validate#preprocessing")
    inference = parser("inference", "inference_classify").get_parsed_content("preprocessing")
    first, second = validation(item), validation(item)
    assert first["image"].shape == (1, 16, 16, 16)
    assert torch.equal(first["image"], second["image"])
    torch.testing.assert_close(inference({"image": item["image"]})["image"].as_tensor(), first["image"].as_tensor())
    weight = first["teacher_image"][0] > 0.5                       # tissue
    center = torch.nonzero(weight.as_tensor()).float().mean(0)
    torch.testing.assert_close(center, torch.full((3,), 15.5), rtol=0, atol=2.0)
    assert first["label"].dtype == torch.int64
    assert first["label"].item() == 1


# ---- training and evaluation ---------------------------------------------------------------------------------------


def test_a_student_is_distilled_from_a_teacher_that_is_better_than_a_constant(
    parser: Callable[..., ConfigParser], student: Path, teacher: Path
) -> None:
    told = json.loads((teacher.parent / "model.json").read_text())
    assert (told["mode"], told["validation"]) == ("supervised", {"val_balanced_accuracy": 1.0})
    told = json.loads((student / "model.json").read_text())
    assert (told["mode"], told["validation"]) == ("distilled", {"val_balanced_accuracy": 1.0})
    found = terms(student)
    assert found.keys() == TERMS
    assert all(np.isfinite(values).all() and min(values) > 0 for values in found.values())
    assert found["attention"][-1] < 0.7 * found["attention"][0]
    config = parser("inference", "inference_classify")
    config.update(STUDENT)
    assert weights(student).keys() == config.get_parsed_content("network_def").state_dict().keys()


def test_scores_are_those_of_the_predictions_that_inference_writes(
    run: Run, data: Path, student: Path, predict: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    run("evaluating", "train", "classify", "evaluate_classify", into=student, dataset_dir=str(data), **SIZES, **STUDENT)
    rows = predict(data, tmp_path)
    cases = listed(data)["test"]
    assert [(Path(row["image"]).name, row["class"]) for row in rows] == [
        (Path(case["image"]).name, case["label"]) for case in cases   # the toy data are easy
    ]
    assert list(rows[0]) == ["image", "class", "healthy", "ill"]
    for row in rows:
        chances = {name: float(row[name]) for name in ("healthy", "ill")}
        assert sum(chances.values()) == pytest.approx(1.0, abs=1e-5)
        assert row["class"] == max(chances, key=lambda name: chances[name])
    scores = dict(line.split(",") for line in (student / "eval/metrics.csv").read_text().splitlines())
    names = ("balanced_accuracy", "quadratic_kappa", "macro_f1", "auc", "accuracy")
    assert set(scores) == {f"val_{name}" for name in names}
    assert {float(value) for value in scores.values()} == {1.0}
    assert (student / "eval/confusion_matrix.csv").read_text().splitlines() == [
        r"label \ prediction,healthy,ill", "healthy,2,0", "ill,0,2",
    ]
    assert len(table(student / "eval/val_balanced_accuracy_raw.csv")) == len(cases)


def test_the_evaluation_of_segmentations_says_which_one_is_for_classes(
    run: Run, data: Path, student: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": str(data), **SIZES, **STUDENT}
    shutil.copy(student / "model.pt", tmp_path)
    with refused("a class of the whole image has none: take a config for classes, like evaluate_classify.json"):
        run("evaluating", "train", "classify", "evaluate", into=tmp_path, **options)


def test_teacher_and_student_of_classes_are_compared(
    bundle: Path, data: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    sizes = [f"{key}={json.dumps(value)}" for key, value in STUDENT.items()]
    networks = [f"teacher={teacher}+classify+teacher", "+".join([f"student={student / 'model.pt'}+classify", *sizes])]
    chosen = {**PLACES, "teacher_def#filters": SIZES["teacher_def#filters"]}
    words = [word for key, value in chosen.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    page = tmp_path / "compare.html"
    words += ["--bundle", str(bundle), "--data", str(data), "--output", str(page)]
    assert main(["compare", *networks, *words]) == 0
    assert "balanced accuracy" in page.read_text()


@pytest.mark.parametrize(
    ("arm", "expected"),
    [("baseline", set()), ("logits", {"soft_target"}), ("features", {"feature"}), ("method", {"attention"})],
)
def test_every_override_trains_behind_the_preset(
    run: Run, data: Path, teacher: Path, tmp_path: Path, arm: str, expected: set[str]
) -> None:
    options = {"dataset_dir": str(data), "epochs": 1, "val_interval": 1, **SIZES, **STUDENT}
    run("training", "train", "classify", arm, into=tmp_path, **options)
    found = terms(tmp_path)
    assert found.keys() == expected
    assert all(np.isfinite(values).all() and min(values) > 0 for values in found.values())
    assert json.loads((tmp_path / "model.json").read_text())["mode"] == ("distilled" if expected else "supervised")


def test_the_preset_runs_in_seconds_at_the_sizes_of_smoke_classify(
    run: Run, bundle: Path, data: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": str(data), "epochs": 1, "teacher_path": str(tmp_path / "teacher/model.pt")}
    run("training", "train", "classify", "smoke_classify", "teacher", into=tmp_path / "teacher", **options)
    run("training", "train", "classify", "smoke_classify", into=tmp_path, **options)
    assert terms(tmp_path).keys() == TERMS
    assert parsed(bundle, "train", "classify", "smoke_classify")["out_channels"] == 2


def test_volumes_without_a_class_teach_the_student(run: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    content = listed(data)
    first, second = content["training"][:2], [{"image": case["image"]} for case in content["training"][2:5]]
    (tmp_path / "list.json").write_text(json.dumps({**content, "training": first, "unlabeled": second}))
    options = {"datalist": str(tmp_path / "list.json"), "epochs": 1, **SIZES, **STUDENT}
    run("training", "train", "classify", into=tmp_path, **options)
    assert all(np.isfinite(values).all() and min(values) > 0 for values in terms(tmp_path).values())
    assert json.loads((tmp_path / "model.json").read_text())["mode"] == "distilled"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": [16, 16, 16]}, r"`tap` must have 27 positions or more, .* got maps of size \(2, 2, 2\)"),
        ({"patch_size": [36, 32, 32]}, r"`image` must be divisible by the stride \(4, 4, 4\) .* got \(18, 16, 16\)"),
        ({"distill_weights": {"dice": 1.0}}, "`weights` must name terms of the loss, got 'dice'; there are 'att"),
        ({"out_channels": 3}, r"`teacher_path` must hold weights .* 'head.weight' is \(2, 16\) instead of \(3, 16\)"),
        ({"out_channels": 1}, r"1.nii.gz must have a class in 0..0 as label, got 1; correct it"),
    ],
)
def test_what_cannot_be_trained_ends_the_run_with_the_reason(
    run: Run, data: Path, teacher: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = {"epochs": 1, "teacher_check#mode": "off", **SIZES, **STUDENT, **options}
    with refused(message):
        run("training", "train", "classify", into=tmp_path, dataset_dir=str(data), **options)
    assert not (tmp_path / "model.pt").exists()


def spoil(content: dict[str, Any], folder: Path, fault: str) -> None:
    """Put something wrong into a list; files of its own lie in a folder."""
    first = content["training"][0]
    if fault == "name":
        first["label"] = "sick"
    elif fault == "lone":
        content["training"] = [case for case in content["training"] if case["label"] == "ill"]
    elif fault == "cut":
        whole = Path(content["data_root"], first["image"]).read_bytes()
        (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
        first["image"] = str(folder / "cut.nii.gz")
    elif fault == "constant":
        nib.save(nib.Nifti1Image(np.full((30, 30, 30), 7, np.int16), np.diag([9.0, 9, 9, 1])), folder / "flat.nii.gz")
        first["image"] = str(folder / "flat.nii.gz")
    elif fault == "flat":
        nib.save(nib.Nifti1Image(np.arange(900, dtype=np.int16).reshape(30, 30), np.eye(4)), folder / "slice.nii.gz")
        first["image"] = str(folder / "slice.nii.gz")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("name", r"training\[0\] must have a class as `label`, as others have, got 'sick'; .*'healthy'"),
        ("lone", "`training` must have a case of each class, got none of 0"),
        ("cut", "cut.nii.gz must be a readable image"),
        ("constant", "flat.nii.gz must show something, got 7 in all voxels"),
        ("flat", "slice.nii.gz must have 3 spatial axes"),
    ],
)
def test_data_that_cannot_be_used_are_named_before_the_first_step(
    run: Run, data: Path, tmp_path: Path, fault: str, message: str
) -> None:
    content = listed(data)
    spoil(content, tmp_path, fault)
    (tmp_path / "list.json").write_text(json.dumps(content))
    options = {"datalist": str(tmp_path / "list.json"), **SIZES}
    with refused(f"(?s){message}"):
        run("training", "train", "classify", "teacher", into=tmp_path / "run", **options)
    assert not (tmp_path / "run/model.pt").exists()


# ---- inference -----------------------------------------------------------------------------------------------------


def test_a_volume_has_its_class_in_any_orientation_spacing_and_resolution(
    data: Path, predict: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    content = listed(data)
    case = content["test"][1]
    image = nib.load(Path(content["data_root"], case["image"]))
    voxels, affine = np.asarray(image.dataobj), image.affine
    codes = ("RAS", "LPS", "SAR", "PLI")
    for one in codes:
        save_as(tmp_path / f"{one}.nii.gz", voxels, affine, one)
    fine = voxels.repeat(2, 0).repeat(2, 1)
    step = np.diag([0.5, 0.5, 1.0, 1.0])
    step[:2, 3] = -0.25
    save_as(tmp_path / "fine.nii.gz", fine, affine @ step, "RAS")
    names = [*codes, "fine"]
    (tmp_path / "datalist.json").write_text(
        json.dumps({"test": [{"image": f"{name}.nii.gz"} for name in names], "labels": content["labels"]})
    )
    rows = predict(tmp_path, tmp_path / "out")
    assert [Path(row["image"]).stem for row in rows] == [f"{name}.nii" for name in names]
    assert {row["class"] for row in rows} == {case["label"]}
    chances = np.array([float(row["ill"]) for row in rows])
    np.testing.assert_allclose(chances[:4], chances[0], atol=1e-3)
    np.testing.assert_allclose(chances[4], chances[0], atol=0.05)


def test_a_file_of_low_resolution_is_seen_as_one_that_is_degraded(
    parser: Callable[..., ConfigParser], tmp_path: Path
) -> None:
    voxels = torch.full((1, 32, 28, 36), -1000.0)
    voxels[:, 4:28, 6:26, 2:30] = 100 * torch.rand(1, 24, 20, 28)
    low = area_average(voxels, (2, 2, 2))
    affine, step = np.diag([12.0, 12.0, 12.0, 1.0]), np.diag([2.0, 2.0, 2.0, 1.0])
    step[:3, 3] = 0.5
    seen = []
    for is_high, image, place in ((True, voxels, affine), (False, low, affine @ step)):
        file = tmp_path / f"{is_high}.nii.gz"
        nib.save(nib.Nifti1Image(image[0].numpy(), place), file)
        config = parser("inference", "inference_classify")
        config["input_is_high_res"] = is_high
        seen.append(config.get_parsed_content("preprocessing")({"image": str(file)})["image"].as_tensor())
    assert seen[0].shape == (1, 16, 16, 16)
    torch.testing.assert_close(*seen)


def test_a_volume_that_cannot_be_read_is_named_and_the_others_have_their_class(
    data: Path, predict: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    content = listed(data)
    whole = Path(content["data_root"], content["test"][0]["image"])
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:2000])
    images = [{"image": str(tmp_path / "cut.nii.gz")}, {"image": str(whole)}]
    (tmp_path / "datalist.json").write_text(json.dumps({"test": images, "labels": content["labels"]}))
    with refused("1 of 2 cases have no result, the others are done:\n.*cut.nii.gz, which cannot be read"):
        predict(tmp_path, tmp_path / "out")
    assert [row["class"] for row in table(tmp_path / "out/eval/predictions.csv")] == [content["test"][0]["label"]]


def test_air_has_a_class_as_any_volume_and_a_warning(
    predict: Callable[..., list[dict[str, str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nib.save(nib.Nifti1Image(np.full((20, 21, 22), -1000, np.int16), np.diag([9.0, 9, 9, 1])), tmp_path / "air.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": "air.nii.gz"}]}))
    (row,) = predict(tmp_path, tmp_path / "out")
    assert row["class"] in ("0", "1")
    assert "air.nii.gz is nearly constant within -1000..500" in "".join(capsys.readouterr())


def test_names_of_other_classes_than_the_network_has_are_refused(
    data: Path, predict: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    content = listed(data)
    (tmp_path / "datalist.json").write_text(json.dumps({**content, "labels": {"0": "a", "1": "b", "2": "c"}}))
    with refused("`labels` of .*datalist.json must name the classes 0, 1, got 0, 1, 2"):
        predict(tmp_path, tmp_path / "out")
