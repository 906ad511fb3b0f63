# SPDX-License-Identifier: Apache-2.0
"""The bundle's own transforms, alone and in its configs; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, MapTransform, Spacingd
from monai.utils import SpaceKeys
from numpy.typing import NDArray

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from scripts import instances as decoding
from scripts.transforms import RandMissingSectionsd, RandShiftedSectionsd, SectionsFirstd

Array = NDArray[Any]
Run = Callable[..., None]
AS_THEY_ARE = {"intensity#subtrahend": 0.0, "intensity#divisor": 1.0}   # options that leave intensities alone
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
pytestmark = pytest.mark.usefixtures("one_thread")


def geometry(kind: str, spacing: tuple[float, float, float]) -> Array:
    """An affine with a given length of each axis."""
    affine = np.diag([*spacing, 1.0])
    if kind == "flipped":
        affine[:, [0, 2]] *= -1
    elif kind == "swapped":
        affine[:3] = affine[[1, 2, 0]]
    elif kind == "oblique":
        turn = np.linalg.qr(np.array([[1.0, 0.3, -0.2], [-0.3, 1.0, 0.1], [0.2, -0.1, 1.0]]))[0]
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = [7.0, -8.0, 9.5]
    return affine


def volume(affine: Array, channels: int = 1, **meta: Any) -> MetaTensor:
    voxels = torch.arange(channels * 4 * 5 * 6, dtype=torch.float32).reshape(channels, 4, 5, 6)
    return MetaTensor(voxels, affine=torch.from_numpy(affine), meta=meta or None)


@pytest.mark.parametrize("kind", ["straight", "flipped", "swapped", "oblique"])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("sections", [0, 1, 2])
def test_axis_of_the_largest_spacing_comes_first_and_nothing_else_moves(kind: str, unit: float, sections: int) -> None:
    """In nm, µm and mm; the first of the new axes is the section, the other two keep their order and direction."""
    spacing = [4.0 * unit, 5.0 * unit, 6.0 * unit]
    spacing[sections] = 40.0 * unit
    image = volume(geometry(kind, (spacing[0], spacing[1], spacing[2])))
    turned = SectionsFirstd("image")({"image": image})["image"]
    order = [sections, *(axis for axis in range(3) if axis != sections)]
    assert torch.equal(turned.as_tensor(), image.as_tensor().permute(0, *(axis + 1 for axis in order)))
    expected = image.affine[:, [*order, 3]]
    torch.testing.assert_close(turned.affine, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("spacing", [(10.0, 10.0, 10.0), (10.0, 10.0, 10.0001), (8.0, 8.0, 4.0), (30.0, 6.0, 30.0)])
@pytest.mark.parametrize("kind", ["straight", "flipped", "swapped", "oblique"])
def test_of_equal_spacings_the_earliest_axis_counts(kind: str, spacing: tuple[float, float, float]) -> None:
    image = volume(geometry(kind, spacing))
    turned = SectionsFirstd("image")({"image": image})["image"]
    assert torch.equal(turned.as_tensor(), image.as_tensor())
    torch.testing.assert_close(turned.affine, image.affine, atol=1e-9, rtol=0)


def test_space_of_the_metadata_flips_nothing() -> None:
    image = volume(geometry("straight", (4.0, 5.0, 40.0)), space=SpaceKeys.LPS)
    turned = SectionsFirstd("image")({"image": image})["image"]
    assert torch.equal(turned.as_tensor(), image.as_tensor().permute(0, 3, 1, 2))
    back = SectionsFirstd("image").inverse({"image": turned})["image"]
    assert torch.equal(back.as_tensor(), image.as_tensor())


@pytest.mark.parametrize("kind", ["straight", "flipped", "swapped", "oblique"])
@pytest.mark.parametrize("sections", [0, 1, 2])
def test_inversion_by_another_object_brings_a_prediction_back_exactly(kind: str, sections: int) -> None:
    spacing = [4.0, 5.0, 6.0]
    spacing[sections] = 40.0
    image = volume(geometry(kind, (spacing[0], spacing[1], spacing[2])))
    forward = Compose([SectionsFirstd("image")])
    turned = forward({"image": image})["image"]
    pred = MetaTensor(torch.cat([turned.as_tensor(), turned.as_tensor() + 1]))     # of another number of channels
    invert = Invertd("pred", Compose([SectionsFirstd("image")]), orig_keys="image", nearest_interp=True)
    back = invert({"image": turned, "pred": pred})["pred"]
    assert torch.equal(back.as_tensor(), torch.cat([image.as_tensor(), image.as_tensor() + 1]))
    torch.testing.assert_close(back.affine, image.affine, atol=1e-9, rtol=0)
    assert not back.applied_operations


def test_inversion_works_behind_resampling() -> None:
    image = volume(geometry("flipped", (10.0, 10.0, 40.0)))
    transform = Compose([SectionsFirstd("image"), Spacingd("image", pixdim=[20.0, 10.0, 10.0], mode="nearest")])
    turned = transform({"image": image})["image"]
    assert turned.shape == (1, 11, 4, 5)
    back = transform.inverse({"image": turned})["image"]
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, image.affine, atol=1e-6, rtol=0)
    assert torch.equal(back.as_tensor(), image.as_tensor())


def test_image_and_label_turn_alike_and_the_input_stays() -> None:
    image = volume(geometry("straight", (4.0, 5.0, 40.0)))
    data = {"image": image, "label": image.clone().int(), "name": "a"}
    result = SectionsFirstd(["image", "label"])(data)
    assert torch.equal(result["image"].int().as_tensor(), result["label"].as_tensor())
    assert result["label"].dtype == torch.int32
    assert data["image"] is image
    assert image.shape == (1, 4, 5, 6)
    assert not image.applied_operations
    assert SectionsFirstd("mask", allow_missing_keys=True)(data).keys() == data.keys()
    with pytest.raises(KeyError, match="mask"):
        SectionsFirstd("mask")(data)


def test_threads_of_a_cache_do_not_mix_cases(tmp_path: Path) -> None:
    """Each case is turned its own way by one object, and back."""
    cases = []
    for number in range(12):
        spacing = [4.0, 5.0, 6.0]
        spacing[number % 3] = 40.0
        affine = geometry(["straight", "flipped", "oblique"][number // 4], (spacing[0], spacing[1], spacing[2]))
        voxels = np.random.default_rng(number).integers(0, 255, (4 + number, 5, 6), dtype=np.uint8)
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / f"{number}.nii.gz")
        cases.append({"image": str(tmp_path / f"{number}.nii.gz")})
    transform = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), SectionsFirstd("image")])
    dataset = CacheDataset(cases, transform, num_workers=4, progress=False)
    for number, case in enumerate(cases):
        file = nib.load(case["image"])
        cached = dataset[number]["image"]
        expected = np.moveaxis(np.asarray(file.dataobj), number % 3, 0)
        assert np.array_equal(cached[0].numpy(), expected)
        back = Invertd("pred", transform, orig_keys="image")({"image": cached, "pred": cached.clone()})["pred"]
        assert np.array_equal(back[0].numpy(), np.asarray(file.dataobj))
        np.testing.assert_allclose(back.affine, file.affine, atol=1e-4)


def test_labels_are_loaded_as_integers_that_hold_any_id(bundle: Path) -> None:
    steps = json.loads((bundle / "configs/train.json").read_text())["loading"]["transforms"]
    assert [step.get("dtype") for step in steps if step["keys"] == "label"] == ["$torch.int64"]


DAMAGES = [RandMissingSectionsd, RandShiftedSectionsd]


def sections(count: int = 20) -> MetaTensor:
    """Sections none of which is constant or equals another."""
    voxels = torch.rand(1, count, 9, 11, generator=torch.Generator().manual_seed(0)) + 1.0
    return MetaTensor(voxels, affine=torch.diag(torch.tensor([40.0, 4.0, 4.0, 1.0])))


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Sections that differ."""
    return [section for section in range(before.shape[1]) if not torch.equal(before[:, section], after[:, section])]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_the_same_for_the_same_state_and_spares_the_label(kind: type[Any]) -> None:
    data = {"image": sections(), "label": sections()}
    results = []
    for seed in (3, 3, 4):
        transform = kind("image", prob=1.0, share=0.4)
        transform.set_random_state(seed)
        results.append([transform(data) for _ in range(3)])
    for first, second in zip(*results[:2], strict=True):
        assert torch.equal(first["image"], second["image"])
        assert first["label"] is data["label"]
    assert not torch.equal(results[0][0]["image"], results[0][1]["image"])
    assert not torch.equal(results[0][0]["image"], results[2][0]["image"])
    assert torch.equal(data["image"], sections())
    assert torch.equal(results[0][0]["image"].affine, data["image"].affine)


@pytest.mark.parametrize("kind", DAMAGES)
def test_never_all_sections_are_damaged(kind: type[Any]) -> None:
    for count in (1, 2, 20):
        transform = kind("image", prob=1.0, share=1.0)
        transform.set_random_state(0)
        image = sections(count)
        hit = changed(image, transform({"image": image})["image"])
        assert count - 1 not in hit
        assert len(hit) <= count - 1


@pytest.mark.parametrize("kind", DAMAGES)
def test_share_is_the_expected_part_of_the_sections(kind: type[Any]) -> None:
    transform = kind("image", prob=1.0, share=0.25)
    transform.set_random_state(0)
    image = sections(400)
    assert 70 < len(changed(image, transform({"image": image})["image"])) < 130


@pytest.mark.parametrize("kind", DAMAGES)
def test_probability_decides_whether_anything_happens(kind: type[Any]) -> None:
    image = sections()
    assert kind("image", prob=0.0, share=1.0)({"image": image})["image"] is image
    transform = kind("image", prob=0.5, share=0.5)
    transform.set_random_state(0)
    hits = [bool(changed(image, transform({"image": image})["image"])) for _ in range(100)]
    assert 30 < sum(hits) < 70


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_hits_all_keys_alike_and_may_miss_one_only_if_told(kind: type[Any]) -> None:
    transform: MapTransform = kind(["image", "other"], prob=1.0, share=0.5)
    transform.set_random_state(0)   # type: ignore[attr-defined]
    result = transform({"image": sections(), "other": sections() * 2})
    torch.testing.assert_close(result["image"] * 2, result["other"])
    assert kind("image", prob=1.0, allow_missing_keys=True)({"label": 1}) == {"label": 1}
    with pytest.raises(KeyError, match="image"):
        kind("image", prob=1.0)({"label": 1})


def test_missing_sections_are_as_dark_as_the_darkest_voxel() -> None:
    transform = RandMissingSectionsd("image", prob=1.0, share=0.5)
    transform.set_random_state(0)
    image = (sections() * 100).to(torch.uint8)
    result = transform({"image": image})["image"]
    hit = changed(image, result)
    assert 5 <= len(hit) <= 15
    assert result.dtype == torch.uint8
    assert (result[:, hit] == image.min()).all()


def test_shifted_sections_repeat_their_border() -> None:
    transform = RandShiftedSectionsd("image", prob=1.0, share=0.9, largest=3)
    transform.set_random_state(0)
    image = sections()
    result = transform({"image": image})["image"]
    seen = set()
    for section in range(20):
        before, after = image[0, section].numpy(), result[0, section].numpy()
        fits = [
            (down, right) for down in range(-3, 4) for right in range(-3, 4)
            if np.array_equal(after, np.roll(np.pad(before, 3, mode="edge"), (down, right), (0, 1))[3:-3, 3:-3])
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 10
    assert {-3, 3} <= {step for steps in seen for step in steps}


def test_shifts_larger_than_the_section_and_of_nothing_are_defined() -> None:
    for largest in (0, 50):
        transform = RandShiftedSectionsd("image", prob=1.0, share=1.0, largest=largest)
        transform.set_random_state(0)
        result = transform({"image": sections()})["image"]
        assert result.shape == (1, 20, 9, 11)
        assert (not changed(sections(), result)) == (largest == 0)


def tissue(seed: int) -> tuple[Array, Array]:
    """Bright cells between dark membranes of three voxels, sections last: image of 0 and 1, and instance numbers."""
    rng = np.random.default_rng(seed)
    lines = [np.repeat(np.arange(3), rng.permutation([9, 10, length])) for length in (11, 13, 9)]
    label = 1 + sum(axis * 3**place for place, axis in enumerate(np.meshgrid(*lines, indexing="ij")))
    edge = np.zeros(label.shape, bool)
    for axis in range(3):
        for step in (-1, 1):
            moved = np.roll(label, step, axis)
            border = np.take(label, [-1 if step < 0 else 0], axis)
            np.put_along_axis(moved, np.full(border.shape, -1 if step < 0 else 0), border, axis)
            edge |= moved != label
    thick = edge.copy()
    for axis in range(3):
        thick[tuple(slice(1, None) if one == axis else slice(None) for one in range(3))] |= np.take(
            edge, range(edge.shape[axis] - 1), axis
        )
    label = np.where(thick, 0, label)
    return (label > 0).astype(np.uint8), label


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes: sections last and axes flipped; the second one has a black section, too."""
    folder = tmp_path_factory.mktemp("neurons")
    cases = []
    for number, kind in enumerate(["flipped", "oblique"]):
        image, label = tissue(number)
        if number == 1:
            image[:, :, 4] = 0
        affine = geometry(kind, (10.0, 10.0, 40.0))
        for name, voxels in (("image", image), ("label", (label * 3000).astype(np.uint32))):
            nib.save(nib.Nifti1Image(voxels, affine), folder / f"{number}_{name}.nii.gz")
        cases.append({"image": f"{number}_image.nii.gz", "label": f"{number}_label.nii.gz"})
    content = {"training": cases[:1], "validation": cases[:1], "test": cases}
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


def see_brightness(path: Path, output: str) -> dict[str, Any]:
    """Options for a network that joins neighbors that are both 1; it gives affinities, or an embedding without bias."""
    channels = 3 if output == "affinity" else 2
    network = torch.nn.Conv3d(1, channels, 3, padding=1)
    weight, bias = torch.zeros_like(network.weight), torch.zeros(channels)
    weight[:, 0, 1, 1, 1] = 1.0
    if output == "affinity":
        for axis in range(3):
            weight[(axis, 0, *(0 if axis == other else 1 for other in range(3)))] = 1.0
        bias -= 1.0                                                # of two that are 1: 1; of one: 0
    torch.save({"weight": weight, "bias": bias}, path)
    target = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": channels, "kernel_size": 3, "padding": 1}
    return {"network_def": target, "spacing": [40.0, 10.0, 10.0]}


def infer(run_bundle: Run, bundle: Path, neurons: Path, into: Path) -> list[nib.Nifti1Image]:
    options = see_brightness(into / "seen.pt", "affinity") | AS_THEY_ARE
    run_bundle(
        "evaluating", "inference", dataset_dir=str(neurons), output_dir=str(into / "eval"),
        ckpt_path=str(into / "seen.pt"), **options,
    )
    return [nib.load(into / f"eval/{number}_image_seg.nii.gz") for number in range(2)]


def is_same_partition(found: Array, label: Array) -> bool:
    pairs = set(zip(found[label > 0].tolist(), label[label > 0].tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@quiet
def test_inference_gives_whole_numbers_in_the_geometry_of_the_volume(
    run_bundle: Run, bundle: Path, neurons: Path, tmp_path: Path
) -> None:
    for number, pred in enumerate(infer(run_bundle, bundle, neurons, tmp_path)):
        image = nib.load(neurons / f"{number}_image.nii.gz")
        label = np.asarray(nib.load(neurons / f"{number}_label.nii.gz").dataobj)
        assert pred.get_data_dtype() == np.int32
        assert pred.shape == image.shape
        np.testing.assert_allclose(pred.affine, image.affine, atol=1e-4)
        found = np.asarray(pred.dataobj)
        behind = 5 * number                                        # the black section
        assert is_same_partition(found[:, :, behind:], label[:, :, behind:])


@quiet
def test_black_section_gives_a_defined_result(run_bundle: Run, bundle: Path, neurons: Path, tmp_path: Path) -> None:
    """Each voxel of it belongs to something, and what is on its sides stays apart within them."""
    found = np.asarray(infer(run_bundle, bundle, neurons, tmp_path)[1].dataobj)
    assert found.min() == 1
    label = np.asarray(nib.load(neurons / "1_label.nii.gz").dataobj)
    for side in (slice(0, 4), slice(5, None)):
        assert is_same_partition(found[:, :, side], label[:, :, side])


@quiet
def test_inference_without_the_package_saves_affinities_and_tells_what_to_install(
    run_bundle: Run, bundle: Path, neurons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(decoding, "find_spec", lambda name: None)
    maps = infer(run_bundle, bundle, neurons, tmp_path)
    assert capsys.readouterr().out.count("pip install waterz") == 1
    for number, pred in enumerate(maps):
        image = nib.load(neurons / f"{number}_image.nii.gz")
        assert pred.shape == (*image.shape, 3)
        assert pred.get_data_dtype() == np.float32
        np.testing.assert_allclose(pred.affine, image.affine, atol=1e-4)
        assert np.isfinite(pred.get_fdata()).all()


@quiet
@pytest.mark.filterwarnings("ignore:(Mean of empty|All-NaN) slice:RuntimeWarning")
def test_evaluation_compares_with_the_label_as_it_lies_in_its_file(
    run_bundle: Run, bundle: Path, neurons: Path, tmp_path: Path
) -> None:
    options = see_brightness(tmp_path / "model.pt", "embedding") | AS_THEY_ARE
    run_bundle(
        "evaluating", "train", "smoke", "evaluate", dataset_dir=str(neurons), ckpt_dir=str(tmp_path),
        output_dir=str(tmp_path / "eval"), out_channels=2, **options,
    )
    with (tmp_path / "eval/val_voi_raw.csv").open() as file:
        rows = [[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    assert len(rows) == 2
    np.testing.assert_allclose(rows[0], 0.0, atol=1e-6)
