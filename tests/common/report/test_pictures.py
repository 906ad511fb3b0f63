# SPDX-License-Identifier: Apache-2.0
"""Pictures: radiological whatever the file's axes, the slice with most to see, the window, outlines and differences."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medkd.phantoms.ct import ct_phantom
from medkd.report.pictures import (
    DIFFERENT,
    Volume,
    best_slice,
    class_color,
    cut,
    difference_picture,
    disagreement,
    load,
    outline_picture,
)

LIVER, SPLEEN, AORTA = 1, 2, 4


def pixels_of(png: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(pixels: NDArray[Any], color: str) -> NDArray[Any]:
    wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    return np.asarray(np.abs(pixels - wanted).max(axis=2) < 40)


def cube(value: int) -> Volume:
    """A cube in the middle of 20 x 20 x 20 voxels of 1 mm."""
    data = np.zeros((20, 20, 20), dtype=np.int16)
    data[6:14, 6:14, 6:14] = value
    return Volume(data, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("seed", range(4))
def test_pictures_are_radiological_whatever_the_orientation_of_the_file(seed: int, tmp_path: Path) -> None:
    case = ct_phantom(seed, shape=(48, 40, 32), spacing=(6.0, 6.0, 8.0))
    nib.save(nib.Nifti1Image(case.label, case.affine), tmp_path / "label.nii.gz")
    label = load(tmp_path / "label.nii.gz")

    def middle(organ: int, plane: str) -> tuple[float, float]:
        axis = 2 if plane == "axial" else 1
        position = int(np.argwhere(label.data == organ)[:, axis].mean())
        pixels, _ = cut(label, plane, position)  # type: ignore[arg-type]
        row, column = np.argwhere(pixels == organ).mean(axis=0)
        return row / pixels.shape[0], column / pixels.shape[1]

    for plane in ("axial", "coronal"):
        assert middle(LIVER, plane)[1] < 0.45 < 0.6 < middle(SPLEEN, plane)[1]
    assert middle(AORTA, "axial")[0] > 0.5    # before the spine, behind the middle
    assert middle(LIVER, "coronal")[0] < 0.5  # under the diaphragm, the top of the picture


def test_a_pixel_has_the_size_of_its_voxel() -> None:
    volume = Volume(np.zeros((4, 5, 6)), (1.0, 2.0, 3.0))

    axial, axial_pixel = cut(volume, "axial", 0)
    coronal, coronal_pixel = cut(volume, "coronal", 0)

    assert (axial.shape, axial_pixel) == ((5, 4), (2.0, 1.0))
    assert (coronal.shape, coronal_pixel) == ((6, 4), (3.0, 1.0))


def test_the_slice_with_most_organs_is_chosen() -> None:
    label = np.zeros((6, 6, 6), dtype=np.uint8)
    label[:, :, 1] = 1
    label[0, :, 4], label[1, :, 4] = 2, 3

    assert best_slice(label, "axial") == 4


def test_disagreement_counts_the_voxels_that_either_calls_an_organ() -> None:
    assert disagreement(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 0])) == pytest.approx(100 * 2 / 3)
    assert disagreement(np.zeros(3), np.zeros(3)) == 0.0


@pytest.mark.parametrize(("level", "gray"), [(100.0, 128), (0.0, 255), (200.0, 0)])
def test_the_window_decides_the_gray_of_a_value(level: float, gray: int) -> None:
    png = outline_picture(cube(100), cube(0), "axial", 10, window=(level, 100.0))

    assert np.median(pixels_of(png)[260:300, 240:320]) == pytest.approx(gray, abs=2)


@pytest.mark.parametrize("number", [1, 8, 9, 13])
def test_every_class_has_an_outline_in_its_color(number: int) -> None:
    pixels = pixels_of(outline_picture(cube(0), cube(number), "coronal", 10))

    there = np.argwhere(near(pixels, class_color(number)))
    assert there.min(axis=0) == pytest.approx([168, 168], abs=4)    # 6 of 20 voxels on 560 pixels
    assert there.max(axis=0) == pytest.approx([392, 392], abs=4)


def test_colors_repeat_after_eight_classes() -> None:
    assert len({class_color(number) for number in range(1, 9)}) == 8
    assert class_color(9) == class_color(1)


def test_a_difference_is_marked_where_it_is() -> None:
    image, second = cube(0), cube(1)
    first = Volume(second.data.copy(), second.spacing)
    first.data[6:10] = 0   # toward the patient's left, which is the right half of the picture

    pixels = pixels_of(difference_picture(image, first, second, "axial", 10))
    same = pixels_of(difference_picture(image, second, second, "axial", 10))

    magenta = [pixels[..., 0] - pixels[..., 1] > 100, same[..., 0] - same[..., 1] > 100]
    assert DIFFERENT == "#ff2fd0"
    assert not magenta[1].any()
    assert np.argwhere(magenta[0])[:, 1].min() > 270
    assert magenta[0].sum() == pytest.approx(4 * 8 * 28**2, rel=0.1)
