# SPDX-License-Identifier: Apache-2.0
"""What headers say: how values are stored, units, two affines, modes of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from medkd.data.headers import Header, ending, read_header
from medkd.data.labels import stored_numbers

GRAY = np.random.default_rng(0).integers(0, 99, (9, 8)).astype(np.uint8)


@pytest.mark.parametrize(
    ("path", "expected"), [("a.b/x.NII.GZ", ".nii.gz"), ("x.nii", ".nii"), ("x.zarr/", ".zarr"), ("x", "")]
)
def test_ending_is_that_of_the_kind(path: str, expected: str) -> None:
    assert ending(path) == expected


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float32, np.float64])
def test_type_of_a_volume_is_that_of_its_file(tmp_path: Path, kind: type) -> None:
    nib.save(nib.Nifti1Image(GRAY.astype(kind), np.eye(4), dtype=kind), tmp_path / "x.nii.gz")
    np.save(tmp_path / "x.npy", GRAY.astype(kind))
    tifffile.imwrite(tmp_path / "x.tif", GRAY.astype(kind))
    for name in ("x.nii.gz", "x.npy", "x.tif"):
        assert read_header(str(tmp_path / name)).stored == kind


def test_scaled_volume_holds_floats(tmp_path: Path) -> None:
    file = nib.Nifti1Image(GRAY, np.eye(4))
    file.header.set_slope_inter(0.5, 3.0)
    nib.save(file, tmp_path / "x.nii")
    assert read_header(str(tmp_path / "x.nii")).stored == np.float64


@pytest.mark.parametrize("unit", ["mm", "micron", "meter", "unknown"])
def test_unit_of_a_volume_is_read(tmp_path: Path, unit: str) -> None:
    file = nib.Nifti1Image(GRAY, np.eye(4))
    file.header.set_xyzt_units(unit)
    nib.save(file, tmp_path / "x.nii")
    assert read_header(str(tmp_path / "x.nii")).unit == unit.replace("unknown", "")


def test_unit_and_pages_of_an_imagej_stack_are_read(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.stack([GRAY] * 3), imagej=True, metadata={"unit": "micron", "axes": "ZYX"})
    header = read_header(str(tmp_path / "x.tif"))
    assert (header.unit, header.pages) == ("micron", 3)


@pytest.mark.parametrize(
    ("place", "change", "differ"), [((0, 0), -2.0, True), ((0, 3), 1.0, True), ((0, 3), 1e-4, False)]
)
def test_two_affines_differ_beyond_rounding(
    tmp_path: Path, place: tuple[int, int], change: float, differ: bool
) -> None:
    file = nib.Nifti1Image(GRAY, np.eye(4))
    form = np.eye(4)
    form[place] += change
    file.set_qform(np.eye(4), 1)
    file.set_sform(form, 1)
    nib.save(file, tmp_path / "x.nii")
    assert read_header(str(tmp_path / "x.nii")).two_affines is differ
    file.set_sform(form, 0)
    nib.save(file, tmp_path / "x.nii")
    assert not read_header(str(tmp_path / "x.nii")).two_affines


@pytest.mark.parametrize(("mode", "expected"), [("P", "a palette"), ("1", "1 bit"), ("L", ""), ("RGBA", "")])
def test_mode_of_a_picture_is_told(tmp_path: Path, mode: str, expected: str) -> None:
    Image.fromarray(GRAY).convert(mode).save(tmp_path / "x.png")
    assert read_header(str(tmp_path / "x.png")).mode == expected


def test_mode_of_a_tiff_is_told(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", GRAY, photometric="miniswhite")
    assert read_header(str(tmp_path / "x.tif")).mode == "white as 0"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s0/.zarray", {"shape": [4, 4, 4], "dtype": "<f4"}),
        ("s0/zarr.json", {"shape": [4, 4, 4], "data_type": "float32", "node_type": "array"}),
    ],
)
def test_type_of_zarr_is_that_of_its_arrays(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    (tmp_path / "x.zarr" / name).parent.mkdir(parents=True)
    (tmp_path / "x.zarr" / name).write_text(json.dumps(content))
    (tmp_path / "x.zarr/.zarray").write_text(json.dumps({"shape": [4], "dtype": "<i8"}))
    assert read_header(str(tmp_path / "x.zarr")) == Header(np.dtype(np.float32))


def test_fractions_of_a_file_without_a_header_of_ours_are_found(tmp_path: Path) -> None:
    path = str(tmp_path / "x.mha")
    itk.imwrite(itk.image_from_array(GRAY.astype(np.float32)), path)
    assert stored_numbers(path, read_header(path).stored) == (np.float32, None)
    itk.imwrite(itk.image_from_array(GRAY + np.float32(0.5)), path)
    assert "x.mha must have whole numbers, got 0.5, 1.5," in str(stored_numbers(path, None)[1])
