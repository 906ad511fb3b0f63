# SPDX-License-Identifier: Apache-2.0
"""Resampling out of all measure."""

from __future__ import annotations

import re

import pytest
import torch
from monai.data import MetaTensor

from medkd.inference import resampling
from medkd.inference.machine import free_memory
from medkd.inference.resampling import EnsureResamplabled, resampling_problem

SHAPE = (40, 250, 250)


def image(*spacing: float) -> MetaTensor:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    return MetaTensor(torch.zeros(1, 4, 5, 6), affine=affine, meta={"filename_or_obj": "here/a.nii.gz"})


@pytest.mark.parametrize("spacing", [(10.0, 10.0, 10.0), (80.0, 10.0, 10.0), (10.0, 10.0, 3.0), (50.0, 4.0, 4.0)])
def test_what_files_have_is_resampled(spacing: tuple[float, ...]) -> None:
    assert resampling_problem(SHAPE, spacing, (10.0, 10.0, 10.0), (20, 81, 81)) is None


def test_small_images_that_the_factor_does_not_make_small_are_resampled() -> None:
    assert resampling_problem((6, 30, 30), (10.0, 10.0, 10.0), (20.0, 20.0, 20.0), (20, 81, 81)) is None
    assert resampling_problem((60, 30, 30), (10.0, 10.0, 10.0), (35.0, 35.0, 35.0), (20, 81, 81)) is None


@pytest.mark.parametrize(
    ("spacing", "said"),
    [
        ((3e-05, 3e-05, 3e-05), r"by a factor of 3\.33e\+05, to 1 x 1 x 1 voxels"),
        ((1e4, 1e4, 1e4), r"by a factor of 1e\+03"),
        ((1.0, 10.0, 10.0), "by a factor of 10, to 4 x 250 x 250 voxels"),
        ((10.0, 10.0, 1.9), "by a factor of 5.26 to 40 x 250 x 48 voxels, less than a patch, 81 along an axis"),
    ],
)
def test_a_factor_of_a_wrong_unit_is_a_problem(spacing: tuple[float, ...], said: str) -> None:
    problem = resampling_problem(SHAPE, spacing, (10.0, 10.0, 10.0), (20, 81, 81))
    assert problem is not None
    assert re.search(said, problem), problem


def test_an_axis_that_is_left_as_it_is_has_no_factor() -> None:
    assert resampling_problem((100, 100), (1e-5, 3000.0), (-1, -1), (192, 192)) is None


def test_what_does_not_fit_into_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "free_memory", lambda: 2**30)
    problem = resampling_problem((400, 400, 400), (40.0, 20.0, 20.0), (10.0, 10.0, 10.0))
    assert problem == "to 1600 x 800 x 800 voxels, 3.8 GiB of 1.0 GiB that are free"
    assert resampling_problem((40, 40, 40), (40.0, 20.0, 20.0), (10.0, 10.0, 10.0)) is None


def test_free_memory_is_a_number_of_bytes_or_unknown() -> None:
    free = free_memory()
    assert free is None or free > 2**20


def test_the_error_names_the_file_both_spacings_and_the_way_out() -> None:
    ensure = EnsureResamplabled("image", pixdim=[10.0, 10.0, 10.0], unit="nm")
    with pytest.raises(
        ValueError,
        match=r"here/a\.nii\.gz must have a spacing near 10 x 10 x 10 nm, got 3e-05 x 3e-05 x 3e-05 nm: .* factor of "
        r"3\.33e\+05.*--file_spacing",
    ):
        ensure({"image": image(3e-05, 3e-05, 3e-05)})


def test_a_spacing_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`spacing` must have a length for each of 3 axes, got \[10.0, 10.0\]; -1 "):
        EnsureResamplabled("image", pixdim=[10.0, 10.0])({"image": image(10.0, 10.0, 10.0)})


def test_a_healthy_image_passes_as_it_is_and_a_key_may_miss_only_if_told() -> None:
    data = {"image": image(12.0, 8.0, 8.0)}
    assert EnsureResamplabled("image", pixdim=[10.0, 10.0, 10.0])(data)["image"] is data["image"]
    assert EnsureResamplabled("image", pixdim=[1.0], allow_missing_keys=True)({"label": 1}) == {"label": 1}
    with pytest.raises(KeyError, match="image"):
        EnsureResamplabled("image", pixdim=[1.0])({"label": 1})
