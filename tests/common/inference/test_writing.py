# SPDX-License-Identifier: Apache-2.0
"""Results that lie on the files of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import SaveImage, Spacing

from medkd.inference.instances import SaveInstancesd
from medkd.inference.reading import LoadImageFilesd
from medkd.inference.writing import LikeFileWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
OPTIONS: dict[str, Any] = {"output_postfix": "seg", "separate_folder": False, "resample": False, "print_log": False}


def save(path: Path, shape: tuple[int, ...], spacing: tuple[float, ...] = (10.0, 10.0, 10.0), unit: str = "mm") -> Path:
    voxels = np.random.default_rng(0).integers(0, 9, shape).astype(np.uint8)
    affine = np.array([[0, -spacing[1], 0, 5], [spacing[0], 0, 0, -4], [0, 0, spacing[2], 3], [0, 0, 0, 1.0]])
    file = nib.Nifti1Image(voxels, affine)
    file.header.set_xyzt_units(unit)
    nib.save(file, path)
    return path


@pytest.mark.parametrize("shape", [(40, 50, 1), (40, 1, 1), (1, 40, 50), (40, 50), (8, 9, 10), (1, 1, 1), (8, 9, 7, 1)])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_result_has_the_axes_of_its_file(tmp_path: Path, shape: tuple[int, ...], rank: int) -> None:
    path = save(tmp_path / "a.nii.gz", shape)
    if rank == 2 and len([size for size in shape[2:] if size > 1]):
        rank = 3
    image = LoadImageFilesd("image", spatial_dims=rank)({"image": str(path)})["image"]
    SaveImage(tmp_path / "out", output_dtype=np.uint8, writer=LikeFileWriter, **OPTIONS)(image)
    SaveInstancesd("image", output_dir=tmp_path / "instances", **OPTIONS)({"image": image})
    for folder in ("out", "instances"):
        found = nib.load(tmp_path / folder / "a_seg.nii.gz")
        assert found.shape == shape
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(nib.load(path).dataobj))
        np.testing.assert_allclose(found.affine, nib.load(path).affine)


def test_channels_stay_behind_the_axes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", (40, 50, 1))
    image = LoadImageFilesd("image")({"image": str(path)})["image"]
    SaveInstancesd("image", output_dir=tmp_path, **OPTIONS)({"image": torch.cat([image, image + 0.5])})
    assert nib.load(tmp_path / "a_seg.nii.gz").shape == (40, 50, 1, 2)


@pytest.mark.parametrize(
    ("unit", "bundle", "spacing"),
    [("micron", "mm", (1500, 1500, 3000)), ("meter", "nm", (3e-8, 6e-9, 6e-9)), ("mm", "nm", (3e-5, 6e-6, 6e-6)),
     ("micron", "nm", (0.03, 0.006, 0.006)), ("mm", "mm", (1.5, 1.5, 3))],
)
def test_a_result_has_the_affine_and_the_unit_of_its_file(
    tmp_path: Path, unit: str, bundle: str, spacing: tuple[float, ...]
) -> None:
    path = save(tmp_path / "a.nii.gz", (8, 9, 10), spacing, unit)
    image = LoadImageFilesd("image", unit=bundle)({"image": str(path)})["image"]   # type: ignore[arg-type]
    SaveImage(tmp_path, output_dtype=np.uint8, writer=LikeFileWriter, **OPTIONS)(image)
    found, file = nib.load(tmp_path / "a_seg.nii.gz"), nib.load(path)
    np.testing.assert_allclose(found.affine, file.affine, rtol=1e-6)
    assert found.get_data_dtype() == np.uint8
    assert found.header.get_xyzt_units()[0] == unit


def test_a_result_on_another_grid_is_in_the_unit_of_its_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", (8, 8, 8), (0.01, 0.01, 0.01), "micron")
    image = LoadImageFilesd("image", unit="nm")({"image": str(path)})["image"]
    SaveImage(tmp_path, writer=LikeFileWriter, **OPTIONS)(Spacing([20.0, 20.0, 20.0])(image))
    found = nib.load(tmp_path / "a_seg.nii.gz")
    assert max(found.shape) < 8
    np.testing.assert_allclose(found.header.get_zooms(), [0.02] * 3, rtol=1e-6)
