# SPDX-License-Identifier: Apache-2.0
"""Volumes with holes, of other units, of other files; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from monai.transforms import Compose
from skimage.metrics import variation_of_information

from bundle_runs import parsed, refused
from medkd.phantoms.em import em_phantom

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
Run = Callable[..., None]
SHAPE = (24, 120, 110)
PHANTOM = em_phantom(1, SHAPE, (10.0, 10.0, 10.0))


def save(path: Path, voxels: np.ndarray, spacing: float = 10.0, unit: str = "unknown") -> str:
    file = nib.Nifti1Image(voxels, np.diag([spacing, spacing, spacing, 1.0]))
    file.header.set_xyzt_units(unit)
    nib.save(file, path)
    return path.name


def infer(run_bundle: Run, folder: Path, *images: str, **options: Any) -> list[nib.Nifti1Image]:
    """Run the committed student; gives what it writes, in the order of the images."""
    (folder / "datalist.json").write_text(json.dumps({"test": [{"image": name} for name in images]}))
    options = {"dataset_dir": str(folder), "output_dir": str(folder / "eval")} | options
    run_bundle("evaluating", "inference", **options)
    names = [name.partition(".")[0] for name in images]
    return [nib.load(folder / f"eval/{name}_seg.nii.gz") for name in names]


def damaged(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The phantom's image with a hole, and where that holds data."""
    image, valid = PHANTOM.image.copy(), np.ones(SHAPE, bool)
    if kind == "sections":
        image[[6, 15]] = 0                                         # the label goes through
    elif kind == "corner":
        rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
        valid[:, rows + columns < 70] = False
    else:
        valid[:, :40] = False
    image[~valid] = 255 if kind == "white margin" else 0
    return image, valid


def information(found: np.ndarray, valid: np.ndarray) -> float:
    return float(sum(variation_of_information(PHANTOM.label[valid], found[valid])))


def test_holes_cost_little_beside_them_and_are_background(run_bundle: Run, tmp_path: Path) -> None:
    kinds = ["sections", "margin", "white margin", "corner"]
    names = [save(tmp_path / "whole.nii.gz", PHANTOM.image)]
    names += [save(tmp_path / f"{kind.replace(' ', '_')}.nii.gz", damaged(kind)[0]) for kind in kinds]
    whole, *others = [np.asarray(file.dataobj) for file in infer(run_bundle, tmp_path, *names)]
    for kind, found in zip(kinds, others, strict=True):
        valid = damaged(kind)[1]
        assert not found[~valid].any(), kind
        assert information(found, valid) < information(whole, valid) + 0.3, kind


def test_training_ignores_what_holds_no_data_and_keeps_bridged_sections(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    image, valid = damaged("margin")
    image[9] = 0
    case = {"image": save(tmp_path / "a.nii.gz", image), "label": save(tmp_path / "l.nii.gz", PHANTOM.label)}
    parser = parsed(bundle, "train")
    fixed, random = (parser.get_parsed_content(f"train#{name}_transforms") for name in ("deterministic", "random"))
    result = Compose(fixed)({key: str(tmp_path / name) for key, name in case.items()})
    assert np.array_equal(result["label"][0].numpy() == -1, ~valid)
    assert (result["label"][0, 9, 40:] > 0).all()
    own = result["image"][0].numpy()[valid]
    assert abs(own.mean()) < 0.02
    assert abs(own.std() - 1) < 0.02
    patches = Compose(random)(result)
    assert [patch.keys() for patch in patches] == [{"image", "label"}] * 2


@pytest.mark.parametrize("shape", [(40, 50, 1), (12, 50, 1), (1, 50, 40)])
def test_a_volume_of_one_section_comes_back_with_its_shape(
    run_bundle: Run, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    (found,) = infer(run_bundle, tmp_path, save(tmp_path / "a.nii.gz", voxels))
    assert found.shape == shape
    np.testing.assert_allclose(found.affine, np.diag([10.0, 10.0, 10.0, 1.0]))


def test_the_result_does_not_depend_on_the_unit_of_the_header(run_bundle: Run, tmp_path: Path) -> None:
    units = {"unknown": 10.0, "mm": 1e-5, "micron": 0.01, "meter": 1e-8}
    image = PHANTOM.image[:, :60, :60]
    names = [save(tmp_path / f"{unit}.nii.gz", image, length, unit) for unit, length in units.items()]
    names.append(save(tmp_path / "nm_as_mm.nii.gz", image, 10.0, "mm"))
    first, *others = infer(run_bundle, tmp_path, *names)
    assert np.asarray(first.dataobj).max() > 1
    for name, found in zip(names[1:], others, strict=True):
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(first.dataobj)), name
        np.testing.assert_allclose(found.affine, nib.load(tmp_path / name).affine, rtol=1e-5)


@pytest.mark.parametrize("config", ["train", "inference"])
def test_a_spacing_of_nothing_known_is_refused_with_both(
    run_bundle: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    case = {"image": str(tmp_path / save(tmp_path / "a.nii.gz", PHANTOM.image, 3e-5))}
    if config == "train":
        case["label"] = str(tmp_path / save(tmp_path / "label.nii.gz", PHANTOM.label, 3e-5))
    parser = parsed(bundle, config)
    key = "preprocessing" if config == "inference" else "train#deterministic_transforms"
    steps = parser.get_parsed_content(key)
    with refused(r"a\.nii\.gz must have a spacing near 10 x 10 x 10 nm, got 3e-05 x 3e-05 x 3e-05 nm: .* 3\.33e\+05"):
        (Compose(steps) if isinstance(steps, list) else steps)(case)
    parser = parsed(bundle, config)
    parser["file_spacing"] = [10.0, 10.0, 10.0]
    steps = parser.get_parsed_content(key)
    assert (Compose(steps) if isinstance(steps, list) else steps)(case)["image"].shape == (1, *SHAPE)


def write_files(folder: Path) -> dict[str, dict[str, str]]:
    """The phantom as files of the field: name of a case -> its files."""
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr", minversion="3")
    cases = {}
    with h5py.File(folder / "cremi.hdf", "w") as file:
        for name, voxels in (("raw", PHANTOM.image), ("labels/neuron_ids", PHANTOM.label.astype(np.uint64))):
            file.create_dataset(f"volumes/{name}", data=voxels).attrs["resolution"] = [10.0, 10.0, 10.0]
    cases["cremi"] = {"image": "cremi.hdf", "label": "cremi.hdf"}
    group = zarr.open_group(folder / "store.zarr", mode="w")
    for name, voxels in (("raw", PHANTOM.image), ("labels", PHANTOM.label.astype(np.int64))):
        one = group.create_array(name, shape=voxels.shape, dtype=voxels.dtype)
        one[...] = voxels
        one.attrs["resolution"] = [10, 10, 10]
    cases["store"] = {"image": "store.zarr", "label": "store.zarr"}
    for name, voxels in (("stack", PHANTOM.image), ("stack_label", PHANTOM.label)):
        tifffile.imwrite(
            folder / f"{name}.tif", voxels.astype(np.uint16), imagej=True, resolution=(100, 100),
            metadata={"spacing": 0.01, "unit": "um", "axes": "ZYX"},
        )
    cases["stack"] = {"image": "stack.tif", "label": "stack_label.tif"}
    save(folder / "nifti.nii.gz", PHANTOM.image)
    save(folder / "nifti_label.nii.gz", PHANTOM.label)
    return cases | {"nifti": {"image": "nifti.nii.gz", "label": "nifti_label.nii.gz"}}


def test_files_of_the_field_give_what_the_same_nifti_gives(
    run_bundle: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    cases = write_files(tmp_path)
    steps = Compose(parsed(bundle, "train").get_parsed_content("train#deterministic_transforms"))
    read = {
        name: steps({key: str(tmp_path / file) for key, file in case.items()}) for name, case in cases.items()
    }
    for name, case in read.items():
        for key in ("image", "label"):
            assert torch.equal(case[key].as_tensor(), read["nifti"][key].as_tensor()), (name, key)
            torch.testing.assert_close(case[key].affine, read["nifti"][key].affine)
    results = infer(run_bundle, tmp_path, *(case["image"] for case in cases.values()))
    for found in results:
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(results[-1].dataobj))
        np.testing.assert_allclose(found.affine, np.diag([10.0, 10.0, 10.0, 1.0]))


def test_an_array_is_named_by_an_option(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["first"], file["second"] = PHANTOM.image, 255 - PHANTOM.image
    parser = parsed(bundle, "inference")
    with refused(r"a\.h5 must hold one volume.*--image_dataset"):
        parser.get_parsed_content("loading")({"image": str(tmp_path / "a.h5")})
    parser["image_dataset"] = "second"
    loaded = parser.get_parsed_content("loading")({"image": str(tmp_path / "a.h5")})
    assert np.array_equal(loaded["image"][0].numpy(), 255 - PHANTOM.image)
