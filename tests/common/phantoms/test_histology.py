# SPDX-License-Identifier: Apache-2.0
"""The phantom of tissue: grades that only the order of nuclei tells, in one gland, and that averages hide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.random import mtrand
from scipy import ndimage
from skimage.io import imread

from medkd.data.check import check_data
from medkd.data.datalist import load_datalist
from medkd.phantoms.histology import GRADES, HistologyPhantom, histology_phantom, write_histology_phantoms

SMALL = {"shape": (96, 80)}
CASES, FOLDS = 40, 5


@pytest.fixture(scope="module")
def pictures() -> list[HistologyPhantom]:
    """All three grades of each case, one after the other."""
    return [
        histology_phantom((0, case, grade), grade, case_seed=(0, case)) for case in range(CASES) for grade in range(3)
    ]


def lower(picture: np.ndarray, scale: int) -> np.ndarray:
    """Averages of blocks. Shape (Y / scale, X / scale, C)."""
    y, x = (length // scale for length in picture.shape[:2])
    return picture[: y * scale, : x * scale].reshape(y, scale, x, scale, -1).mean((1, 3))


def accuracy(features: list[list[float]]) -> float:
    """Share that a linear classifier (LDA) tells right, in cross-validation over cases."""
    values, grade, right = np.array(features), np.tile(np.arange(3), CASES), 0
    fold = np.repeat(np.arange(CASES), 3) % FOLDS
    for number in range(FOLDS):
        train, test = fold != number, fold == number
        scaled = (values - values[train].mean(0)) / (values[train].std(0) + 1e-9)
        means = np.stack([scaled[train & (grade == one)].mean(0) for one in range(3)])
        rest = scaled[train] - means[grade[train]]
        weight = np.linalg.solve(rest.T @ rest / len(rest) + 0.1 * np.eye(values.shape[1]), means.T)
        right += int(((scaled[test] @ weight - 0.5 * (means.T * weight).sum(0)).argmax(1) == grade[test]).sum())
    return right / len(grade)


def order(picture: HistologyPhantom, scale: int) -> list[float]:
    """How borders lie to the center of the gland, and how much changes from pixel to pixel, for who knows the gland."""
    gray = lower(picture.image.astype(float), scale).mean(-1)
    lesion = lower(picture.lesion[..., None] / 255.0, scale)[..., 0]
    center = ndimage.center_of_mass(lesion)
    y, x = (axis - middle for axis, middle in zip(np.indices(gray.shape), center, strict=True))
    radius, reach = np.hypot(y, x) + 1e-6, np.sqrt(lesion.sum() / np.pi)
    wall = (lesion > 0.99) & (radius > 0.55 * reach) & (radius < 0.95 * reach)
    down, right = ndimage.sobel(gray, 0), ndimage.sobel(gray, 1)
    strength = down**2 + right**2
    outward = ((down * y + right * x) / radius) ** 2
    fine = gray - ndimage.gaussian_filter(gray, 1.0)
    return [outward[wall].sum() / (strength[wall].sum() + 1e-6), np.log(gray[wall].std() + 0.1),
            np.log(strength[wall].mean() + 1), np.log(fine[wall].std() + 0.1), gray[wall].mean()]


def test_same_seed_gives_the_same_picture_and_another_seed_another() -> None:
    first, second = (histology_phantom(5, 1, **SMALL) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.lesion, second.lesion)
    assert (first.image != histology_phantom(6, 1, **SMALL).image).any()
    assert first.image.shape == (96, 80, 3)
    assert first.image.dtype == first.lesion.dtype == np.uint8


def test_picture_leaves_the_global_generator_alone() -> None:
    before = mtrand._rand.get_state()[1].copy()
    histology_phantom(0, 0, **SMALL)
    np.testing.assert_array_equal(before, mtrand._rand.get_state()[1])


def test_one_small_gland_decides_wherever_it_lies(pictures: list[HistologyPhantom]) -> None:
    shares = [float((picture.lesion > 0).mean()) for picture in pictures]
    assert 0.05 < min(shares) < max(shares) < 0.25
    centers = np.array([ndimage.center_of_mass(picture.lesion) for picture in pictures])
    assert (centers.std(0) > 12).all()
    grades = [np.mean(shares[grade::3]) for grade in range(3)]
    assert max(grades) / min(grades) < 1.15                        # its size tells no grade


def test_grades_differ_only_within_their_gland() -> None:
    first, last = (histology_phantom(3, grade) for grade in (0, 2))
    differs = np.abs(first.image.astype(int) - last.image).max(-1) > 40
    near = ndimage.binary_dilation(first.lesion > 0, iterations=4)
    assert differs.sum() > 100
    assert not differs[~near].any()


def test_no_color_tells_the_grade(pictures: list[HistologyPhantom]) -> None:
    simple = []
    for picture in pictures:
        histograms = [np.histogram(picture.image[..., color], 16, (0, 256))[0] / 1e4 for color in range(3)]
        simple.append([*picture.image.mean((0, 1)), *picture.image.std((0, 1)), *np.concatenate(histograms)])
    assert accuracy(simple) < 0.46                                 # chance is 0.33 +- 0.04
    inside = [[picture.image[picture.lesion > 0].mean()] for picture in pictures]
    assert accuracy(inside) < 0.45


def test_the_order_within_the_gland_tells_it_and_lower_resolution_hides_it(pictures: list[HistologyPhantom]) -> None:
    full, fourth, eighth = (accuracy([order(picture, scale) for picture in pictures]) for scale in (1, 4, 8))
    assert full > 0.8
    assert fourth < full - 0.08
    assert eighth < fourth - 0.1


def test_color_is_that_of_the_case(pictures: list[HistologyPhantom]) -> None:
    means = np.array([picture.image.mean((0, 1)) for picture in pictures]).reshape(CASES, 3, 3)
    within, between = means.std(1).mean(0), means.mean(1).std(0)
    assert (between > 2 * within).all()


@pytest.mark.parametrize("grades", [2, 3, 4])
def test_written_sets_have_all_grades_by_name_and_pass_the_check(tmp_path: Path, grades: int) -> None:
    path = write_histology_phantoms(tmp_path, 2, 1, 1, 1, **SMALL, pictures=grades, grades=grades)
    content = json.loads(path.read_text())
    names = list(content["labels"].values())
    assert names == [name for name in GRADES if name in names]      # in their order
    assert len(names) == grades
    assert sorted(item["label"] for item in content["training"]) == sorted(2 * names)
    assert content["training"][0]["image"] == "images/case_000_0.png"
    assert set(content["unlabeled"][0]) == {"image"}
    lists = {name: load_datalist(path, name) for name in ("training", "validation", "test", "unlabeled")}
    assert sorted(item["label"] for item in lists["validation"]) == list(range(grades))
    assert set(np.unique(imread(lists["test"][0]["lesion_label"]))) == {0, 255}
    report = check_data(
        lists["training"], lists["validation"], grades, lists["test"], unlabeled=lists["unlabeled"], spatial_dims=2
    )
    assert report.voxels["training"] == dict.fromkeys(range(grades), 2)
    assert f"cases of 1 {names[1]}" in report.table(content["labels"])


def test_more_cases_of_one_list_leave_the_others_as_they_are(tmp_path: Path) -> None:
    few, many = (write_histology_phantoms(tmp_path / str(n), n, 1, 0, **SMALL, pictures=1) for n in (1, 2))
    same = [load_datalist(path, "validation")[0]["image"] for path in (few, many)]
    assert Path(same[0]).read_bytes() == Path(same[1]).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (192,)}, r"`shape` must be two pixel counts of 64 to 4096, such as 128,128, got \(192,\)"),
        ({"grades": 5}, "`grades` must be 2 to 4 classes, got 5"),
        ({"pictures": 0}, "`pictures` must be 1 to 20 of each case, got 0"),
        ({"training": -1}, "`training` must be a number of cases, 0 or more, got -1"),
        ({"seed": -1}, "`seed` must be an integer of 0 or more"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_histology_phantoms(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`grade` must be 0 to 2, got 3"):
        histology_phantom(0, 3)
