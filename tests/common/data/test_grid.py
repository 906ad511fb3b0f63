# SPDX-License-Identifier: Apache-2.0
"""The grid of the network: units taken for others, too few voxels, more than fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from monai.data import MetaTensor

from medkd.data import grid
from medkd.data.check import DataError, check_data
from medkd.data.grid import grid_problems
from medkd.data.volumes import Volume

Write = Callable[..., dict[str, Any]]


def of(spacing: tuple[float, ...], shape: tuple[int, ...] = (20, 30, 40)) -> Volume:
    return Volume("x.nii", shape, np.diag([*spacing, 1.0]))


def problems(volume: Volume, target: tuple[float, ...], patch: tuple[int, ...] | None = None) -> list[str]:
    return list(grid_problems(volume, target, patch, range(len(volume.shape))))


@pytest.mark.parametrize(
    ("spacing", "target", "hint"),
    [
        ((3e-5, 3e-5, 3e-5), 10.0, "mm where nm are expected"),
        ((0.03, 0.01, 0.01), 10.0, "µm where nm, or m where mm are expected"),
        ((2e-8, 1e-8, 1e-8), 10.0, "m where nm are expected"),
        ((3000.0, 700.0, 700.0), 3.0, "µm where mm are expected"),
        ((1.0, 1.0, 1.0), 10.0, "1 on each axis is what a file without a spacing says"),
    ],
)
def test_spacing_in_another_unit_is_refused_with_the_factor(
    spacing: tuple[float, ...], target: float, hint: str
) -> None:
    (text,) = problems(of(spacing), (target,) * 3)
    wanted = ", ".join([f"{target:g}"] * 3)
    assert text.startswith(f"x.nii must be near the spacing of the network, ({wanted}), got (")
    assert hint in text


@pytest.mark.parametrize("factor", [8.0, 1 / 8.0])
def test_resampling_by_eight_passes_and_by_more_does_not(factor: float) -> None:
    assert not problems(of((factor, 1.0, 1.0), (80, 80, 80)), (1.0, 1.0, 1.0))
    assert problems(of((factor**1.01, 1.0, 1.0), (80, 80, 80)), (1.0, 1.0, 1.0))


def test_less_than_a_patch_by_the_resampling_is_refused() -> None:
    (text,) = problems(of((2.0, 2.0, 2.0), (100, 400, 400)), (10.0,) * 3, (24, 64, 64))
    assert "leaves 20 x 80 x 80 of 100 x 400 x 400 voxels, less than a patch" in text
    assert not problems(of((2.0, 2.0, 2.0), (20, 400, 400)), (10.0,) * 3, (24, 64, 64))   # it was thin before
    assert not problems(of((1.0, 1.0, 1.0), (60, 400, 400)), (3.0,) * 3, (48, 48, 48))    # thin slices of CT


def test_more_than_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "free_memory", lambda: 1e9)
    (text,) = problems(of((5.0, 5.0, 5.0), (300, 300, 300)), (1.0,) * 3)
    assert "makes 1,500 x 1,500 x 1,500 voxels, 13.5 GB, more than the 1 GB free" in text
    assert not problems(of((1.0, 1.0, 1.0), (300, 300, 300)), (1.0,) * 3)


def test_axis_without_a_target_is_left_alone() -> None:
    assert not problems(of((1e-6, 1e-6), (300, 300)), (-1.0, -1.0))




def test_spacing_is_compared_after_volumes_were_turned(volume: Write) -> None:
    rng = np.random.default_rng(0)
    items = [volume(name, rng.integers(0, 99, (40, 44, 9), np.uint8), spacing=(4.0, 4.0, 40.0)) for name in "ab"]

    def sections_first(case: dict[Any, Any]) -> dict[Any, Any]:
        turned = {}
        for key, voxels in case.items():
            affine = voxels.affine[:, [2, 0, 1, 3]]
            turned[key] = MetaTensor(voxels.as_tensor().permute(0, 3, 1, 2), affine=affine)
        return turned

    check_data(items[:1], items[1:], spacing=(40.0, 4.0, 4.0), orientation=sections_first)
    with pytest.raises(DataError, match=r"a_image.nii.gz must be near .* \(40, 4, 4\), got \(4, 4, 40\)"):
        check_data(items[:1], items[1:], spacing=(40.0, 4.0, 4.0))


def test_files_in_two_units_are_told_of_without_a_bundle(volume: Write, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 99, (9, 9, 9)).astype(np.uint8)
    items = [volume("a", image, spacing=(10.0,) * 3), volume("b", image, spacing=(0.01,) * 3, unit="micron")]
    check_data(items[:1], items[1:])
    assert "Spacing differs by more than 8 times between cases, as if in two units: (0.01, 0.01, 0.01)" in caplog.text
    assert "The spacing is declared in micron; a bundle reads it in its own units: " in caplog.text


def test_spacing_that_is_hardly_one_is_told_of_without_a_bundle(
    volume: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 99, (9, 9, 9)).astype(np.uint8)
    items = [volume(name, image, spacing=(3e-5,) * 3) for name in "ab"]
    check_data(items[:1], items[1:])
    assert "2 spacings are hardly in mm, nor in nm; look at the headers: " in caplog.text


def test_check_refuses_a_volume_in_another_unit_by_name(volume: Write) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 99, (30, 32, 34), np.uint8)
    items = [volume(name, image, spacing=(size,) * 3) for name, size in (("a", 10.0), ("b", 3e-5))]
    message = r"1 problem\(s\):\n  .*b_image.nii.gz must be near .* \(10, 10, 10\), got \(3e-05"
    with pytest.raises(DataError, match=message):
        check_data(items[:1], items[1:], spacing=(10.0, 10.0, 10.0), patch_size=(8, 8, 8))
