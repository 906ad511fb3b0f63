# SPDX-License-Identifier: Apache-2.0
"""Two resolutions of one tissue at work on toy data; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from monai.transforms import Compose
from scipy.spatial.transform import Rotation

from bundle_runs import parsed, read, refused, scalars, weights, write_small_phantoms
from medkd.inference.degradation import area_average

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore:(Mean of empty|All-NaN) slice:RuntimeWarning",   # a metric that no toy case defines
)
Run = Callable[..., Path]
SCALES = [(2, 2, 2), (1, 1, 4)]


@pytest.fixture(scope="module")
def data(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_phantoms(bundle, tmp_path_factory.mktemp("data"), training=2, validation=1, test=1)


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path, data: Path) -> Path:
    folder = run("training", "train", "smoke", "teacher", into=bundle / "models/teacher", dataset_dir=str(data))
    return folder / "model.pt"


@pytest.fixture
def parser(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigParser:
    monkeypatch.syspath_prepend(str(bundle))
    return parsed(bundle, "train")


def terms(folder: Path) -> set[str]:
    return {tag.rpartition("kd/")[2] for tag in scalars(folder) if "kd/" in tag}


def box(shape: tuple[int, ...]) -> np.ndarray:
    """A bright box, off center, whose faces are on no grid of the student."""
    result = np.zeros(shape, bool)
    result[tuple(slice(length // 4 + 1, length * 3 // 4) for length in shape)] = True
    return result


# ---- the pair ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_the_random_chain_shows_both_networks_and_the_label_one_tissue(
    parser: ConfigParser, scale: tuple[int, ...]
) -> None:
    """Every voxel of the student is the mean of the teacher's in 100 crops: all steps are drawn once for both."""
    parser.update({"scale": list(scale), "patch_size": [16, 16, 16]})
    shape = (28, 24, 24)
    bright = torch.as_tensor(box(shape))[None]
    full = torch.where(bright, 150.0, 0.0) + 20 * torch.rand(1, *shape)                # HU, far from both ends
    keys = ("image", "teacher_image", "full_image")                # the first two are for centers of unlabeled cases
    case = {key: MetaTensor(full.clone()) for key in keys} | {"label": MetaTensor(bright.float())}
    chain = Compose(parser.get_parsed_content("train#random_transforms")).set_random_state(seed=0)
    crops = [crop for _ in range(50) for crop in chain(case)]
    seen = set()
    for crop in crops:
        image, other, label = (crop[key].as_tensor() for key in ("image", "teacher_image", "label"))
        assert other.shape == label.shape == (1, 16, 16, 16)
        torch.testing.assert_close(image, area_average(other, scale), rtol=0, atol=1e-5)
        inside = label > 0
        if 0.05 < inside.float().mean() < 0.95:
            assert other[inside].mean() > other[~inside].mean() + 0.15
        place = np.unravel_index(int(image.argmax()), image.shape[1:])
        blocks = area_average(other, scale)[0]
        assert blocks[place] == pytest.approx(float(blocks.max()), abs=1e-5)
        seen.add(place)
        assert "full_image" not in crop
    assert len(crops) == 100
    assert len(seen) > 50


def test_hounsfield_units_are_averaged_before_the_window_cuts_them_off(parser: ConfigParser) -> None:
    """Bone beside air: 0 HU for a scanner of thick voxels, the middle of the window for an average of cut values."""
    full = torch.full((1, 8, 8, 8), -1000.0)
    full[..., ::2] = 900.0
    steps = [parser.get_parsed_content(name) for name in ("full_resolution", "pairing", "intensity")]
    result = Compose(steps)({"image": MetaTensor(full), "label": MetaTensor(full * 0)})
    assert result["image"].unique().tolist() == pytest.approx([(-50 + 200) / 500])
    assert result["teacher_image"].unique().tolist() == [0.0, 1.0]


def test_a_body_of_any_size_is_cropped_to_whole_blocks(parser: ConfigParser) -> None:
    full = torch.full((1, 21, 15, 10), -900.0)
    full[:, 1:, 2:, :9] = 0.0
    case = {"image": MetaTensor(full), "label": MetaTensor(full * 0)}
    names = ("crop", "full_resolution", "pairing")
    result = Compose([parser.get_parsed_content(name) for name in names])(case)
    assert result["label"].shape[1:] == result["teacher_image"].shape[1:] == (20, 14, 10)
    assert result["image"].shape[1:] == (10, 7, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": [0, 2, 2]}, "`scale` must be a whole number of 1 or more"),
        ({"scale": [2, 2]}, r"`scale` must have a number for each of the 3 axes of `patch_size`, got \[2, 2\]"),
        ({"scale": [3, 2, 2]}, r"`patch_size` must be divisible by `scale` \[3, 2, 2\] .*\[32, 32, 32\]"),
        ({"pairing_check#scale": [1, 1, 2]}, r"`teacher_image` must have \(1, 1, 2\) times `image`, .*\(32, 32, 32\)"),
        (
            {"patch_size": [48, 32, 40]},
            r"got \[48, 32, 40\], of which the student sees \[24, 16, 20\] .*take \[48, 32, 32\]",
        ),
        ({"scale": [4, 4, 4]}, r"got \[32, 32, 32\], of which the student sees \[8, 8, 8\]"),
        ({"pairing_check#stride": 32}, r"`image` must be divisible by the stride \(32, 32, 32\) .* got \(16, 16, 16\)"),
        (
            {"brightness": {"_target_": "DeleteItemsd", "keys": "teacher_image"}},
            r"`teacher_image` must be in the batch, got the keys \[.*'image'",
        ),
        ({"pairing#teacher_key": "sharp"}, "teacher_image"),
    ],
)
def test_a_pair_that_cannot_be_made_ends_the_run_with_the_reason(
    run: Run, data: Path, teacher: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with refused(message):
        run("training", "train", "smoke", into=tmp_path, dataset_dir=str(data), epochs=1, **options)
    assert not (tmp_path / "model.pt").exists()


# ---- networks ------------------------------------------------------------------------------------------------------


def test_logits_are_interpolated_to_the_grid_of_the_label(parser: ConfigParser) -> None:
    for step in ("train", "validate"):
        inferer = parser.get_parsed_content(f"{step}#inferer")
        ramp = torch.arange(24.0).view(1, 1, 24, 1, 1).expand(1, 1, 24, 24, 24)
        logits = inferer(ramp, torch.nn.Identity())
        assert logits.shape == (1, 1, 48, 48, 48)
        torch.testing.assert_close(logits[0, 0, 1:-1, 5, 7], torch.arange(46.0) / 2 + 0.25)   # centers of half voxels


@pytest.mark.parametrize("scale", [[2, 0, 2], [2.0, 2, 2], [2], [True, 2]])
def test_a_factor_that_is_none_is_refused(parser: ConfigParser, scale: list[Any]) -> None:
    from scripts.full_grid import FullGridInferer

    with pytest.raises(ValueError, match="`scale` must be a whole number of 1 or more for each of 2 or 3 axes"):
        FullGridInferer(SimpleInferer(), scale)
    with pytest.raises(ValueError, match="`scale` must have a number for each of the 3 axes of the image"):
        FullGridInferer(SimpleInferer(), [2, 2])(torch.zeros(1, 1, 4, 4, 4), torch.nn.Identity())


@pytest.mark.parametrize("options", [{}, {"scale": [4, 4, 4]}])
def test_the_teacher_is_trained_at_full_resolution(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "train", "teacher", **options)
    assert parser.get_parsed_content("pairing").scale == (1, 1, 1)
    assert parser.get_parsed_content("student_patch_size") == parser["patch_size"]
    network = parser.get_parsed_content("network_def")
    assert sum(p.numel() for p in network.parameters()) == 3_151_226


@pytest.mark.parametrize("arm", ["method", "features"])
def test_an_exported_student_has_nothing_of_the_distillation(
    run: Run, bundle: Path, data: Path, teacher: Path, tmp_path: Path, arm: str
) -> None:
    run("training", "train", "smoke", arm, into=tmp_path, dataset_dir=str(data), epochs=1)
    assert terms(tmp_path) == {"attention" if arm == "method" else "feature"}
    network = parsed(bundle, "inference").get_parsed_content("network_def")
    assert weights(tmp_path).keys() == network.state_dict().keys()
    content = torch.load(next((tmp_path / "checkpoints").glob("*.pt")), weights_only=True)["objects"]
    assert ("distill_loss" in content and bool(content["distill_loss"])) is (arm == "features")   # its projection


def test_an_image_without_a_label_teaches_by_attention_at_both_resolutions(
    run: Run, data: Path, teacher: Path, tmp_path: Path
) -> None:
    content = json.loads((data / "datalist.json").read_text())
    first, second = content["training"]
    content |= {"training": [first], "unlabeled": [{"image": second["image"]}], "data_root": str(data)}
    (tmp_path / "list.json").write_text(json.dumps(content))
    run("training", "train", "smoke", into=tmp_path, datalist=str(tmp_path / "list.json"), epochs=1)
    told = scalars(tmp_path)
    assert terms(tmp_path) == {"attention", "soft_target"}
    assert all(np.isfinite(values).all() and min(values) > 0 for tag, values in told.items() if "kd/" in tag)
    assert list((teacher.parent / "soft_labels").rglob("*.npz"))   # they tell where to cut crops from it


def test_thick_slices_are_trained_evaluated_and_predicted(
    run: Run, bundle: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    options = {"into": tmp_path, "dataset_dir": str(data)}
    run("training", "train", "thick_slices", "smoke", epochs=1, **options)
    assert json.loads((tmp_path / "model.json").read_text())["mode"] == "distilled"
    assert terms(tmp_path) == {"attention", "soft_target"}
    run("evaluating", "train", "thick_slices", "smoke", "evaluate", **options)
    assert len((tmp_path / "eval/val_mean_dice_raw.csv").read_text().splitlines()) == 2
    options |= {"ckpt_path": str(tmp_path / "model.pt"), "out_channels": 7, "spacing": [8.0, 8.0, 8.0]}
    run("evaluating", "inference", "inference_thick_slices", **options)
    image = json.loads((data / "datalist.json").read_text())["test"][0]["image"]
    (file,) = (tmp_path / "eval").glob("*_seg.nii.gz")
    assert read(file)[0].shape == read(data / image)[0].shape


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def threshold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network of two classes that says 1 above 100 HU: what it finds tells where it looked."""
    file = tmp_path_factory.mktemp("network") / "model.pt"
    slope = torch.tensor([-1.0, 1.0])
    torch.save({"weight": 10 * slope.view(2, 1, 1, 1, 1), "bias": -6 * slope}, file)
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    return {"network_def": network, "ckpt_path": str(file)}


def write_ball(folder: Path, shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A volume of soft tissue with a bright ball, off center and turned in space; the ball, and the affine.

    Its surface meets the voxels at all places, so that its center tells a shift of a part of a voxel.
    """
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (4, -7, 11), degrees=True).as_matrix() * np.array(spacing) * (-1, 1, 1)
    affine[:3, 3] = (80.5, -61.2, -300.7)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * spacing
    middle = (np.array(shape) * spacing) * (0.47, 0.55, 0.51)
    inside = np.linalg.norm(grid - middle, axis=-1) < 0.36 * min(middle) * 2
    nib.save(nib.Nifti1Image(np.where(inside, 220, -20).astype(np.int16), affine), folder / "ball.nii.gz")
    (folder / "datalist.json").write_text(json.dumps({"test": [{"image": "ball.nii.gz"}]}))
    return inside, affine


@pytest.mark.parametrize(
    ("preset", "is_high", "shape", "spacing", "least"),
    [
        ([], True, (61, 47, 53), (3.1, 2.3, 2.9), 0.93),
        ([], False, (37, 29, 31), (5.9, 6.0, 6.1), 0.93),
        (["inference_thick_slices"], True, (61, 47, 53), (3.1, 2.3, 2.9), 0.9),
        (["inference_thick_slices"], False, (55, 49, 17), (3.0, 2.9, 12.0), 0.93),
    ],
)
def test_what_is_found_lies_on_the_grid_of_a_file_of_either_resolution(
    run: Run, threshold: dict[str, Any], tmp_path: Path, preset: list[str], is_high: bool, shape: tuple[int, ...],
    spacing: tuple[float, ...], least: float,
) -> None:
    inside, affine = write_ball(tmp_path, shape, spacing)
    options = {"dataset_dir": str(tmp_path), "input_is_high_res": is_high, **threshold}
    run("evaluating", "inference", *preset, into=tmp_path, **options)
    pred, found = read(tmp_path / "eval/ball_seg.nii.gz")
    assert pred.shape == shape
    np.testing.assert_allclose(found, affine, atol=1e-4)
    overlap = 2 * np.logical_and(pred == 1, inside).sum() / (inside.sum() + (pred == 1).sum())
    assert overlap > least
    centers = [np.argwhere(one).mean(0) for one in (inside, pred == 1)]
    np.testing.assert_allclose(*centers, atol=0.25)                # voxels; half a block off would be 0.5 and more


def test_slices_of_any_number_are_taken_as_they_are(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nine thick slices are what 36 of full resolution are averaged to: none is added to make whole blocks."""
    monkeypatch.syspath_prepend(str(bundle))
    file = tmp_path / "thick.nii.gz"
    nib.save(nib.Nifti1Image(np.full((48, 48, 9), 50, np.int16), np.diag([3.0, 3.0, 12.0, 1.0])), file)
    parser = parsed(bundle, "inference", "inference_thick_slices", input_is_high_res=False)
    assert parser.get_parsed_content("preprocessing")({"image": str(file)})["image"].shape == (1, 48, 48, 9)


@pytest.mark.parametrize(
    ("is_high", "spacing", "message"),
    [
        (True, (6.0, 6.0, 5.5), "has voxels of 6 x 6 x 5.5, as coarse as the student's 6 x 6 x 6"),
        (True, (3.0, 3.0, 6.0), None),
        (False, (1.5, 6.0, 6.0), "has voxels of 1.5 x 6 x 6, finer than the student's 6 x 6 x 6"),
        (False, (5.0, 7.0, 12.0), None),
    ],
)
def test_a_file_of_the_other_resolution_is_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_high: bool,
    spacing: tuple[float, ...], message: str | None,
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    check = parsed(bundle, "inference", input_is_high_res=is_high).get_parsed_content("resolution_check")
    check({"image": MetaTensor(torch.zeros(1, 9, 9, 9), torch.diag(torch.tensor([*spacing, 1.0])))})
    assert [message in said for said in caplog.messages] == ([True] if message else [])


@pytest.mark.parametrize("is_high", [True, False])
def test_a_volume_of_air_is_background(
    run: Run, threshold: dict[str, Any], tmp_path: Path, is_high: bool
) -> None:
    nib.save(nib.Nifti1Image(np.full((20, 21, 22), -1000, np.int16), np.diag([3.0, 3, 3, 1])), tmp_path / "air.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": "air.nii.gz"}]}))
    options = {"dataset_dir": str(tmp_path), "input_is_high_res": is_high, **threshold}
    run("evaluating", "inference", into=tmp_path, **options)
    pred, _ = read(tmp_path / "eval/air_seg.nii.gz")
    assert pred.shape == (20, 21, 22)
    assert not pred.any()


def test_classes_are_chosen_between_the_voxels_of_the_small_image(
    run: Run, threshold: dict[str, Any], tmp_path: Path
) -> None:
    """Blocks of the small image, brought back by the nearest voxel, could not follow a slope."""
    shape = (48, 48, 48)
    height = np.add.outer(np.arange(48), np.arange(48))[..., None].repeat(48, axis=2)
    image = (12.5 * (height - 46) + 100).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([3.0, 3.0, 3.0, 1.0])), tmp_path / "slope.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": "slope.nii.gz"}]}))
    options = {"dataset_dir": str(tmp_path), "intensity_range": [-1000, 1000], **threshold}
    content = torch.load(threshold["ckpt_path"], weights_only=True)
    content["bias"] = -5.5 * torch.tensor([-1.0, 1.0])             # 100 HU of the wider window
    torch.save(content, tmp_path / "model.pt")
    run("evaluating", "inference", into=tmp_path, **{**options, "ckpt_path": str(tmp_path / "model.pt")})
    pred, _ = read(tmp_path / "eval/slope_seg.nii.gz")
    assert pred.shape == shape
    inner = (slice(4, -4),) * 3
    wrong = (pred != (height > 46))[inner] & (np.abs(height - 46) > 1)[inner]
    assert not wrong.any()
