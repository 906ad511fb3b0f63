# SPDX-License-Identifier: Apache-2.0
"""The phantom of nuclei: same seed, same picture; clusters that touch, bright and dark pictures, gray and stained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.random import mtrand
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.io import imread
from skimage.measure import label as connected

from medkd.data.check import check_data
from medkd.data.datalist import load_datalist
from medkd.phantoms.nuclei import NucleiPhantom, nuclei_phantom, write_nuclei_phantoms

SMALL = {"shape": (96, 80)}
LEAST = 30


@pytest.fixture(scope="module")
def gray() -> list[NucleiPhantom]:
    return [nuclei_phantom((0, 0, number)) for number in range(10)]


@pytest.fixture(scope="module")
def stained() -> list[NucleiPhantom]:
    return [nuclei_phantom((0, 0, number), stained=True) for number in range(4)]


def touching(label: np.ndarray) -> int:
    """Number of pairs of nuclei that share an edge."""
    pairs = set()
    for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
        where = (a != b) & (a > 0) & (b > 0)
        pairs |= {frozenset(pair) for pair in zip(a[where].tolist(), b[where].tolist(), strict=True)}
    return len(pairs)


def test_same_seed_gives_the_same_picture_and_another_seed_another() -> None:
    for in_color in (False, True):
        first, second = (nuclei_phantom(5, **SMALL, stained=in_color) for _ in range(2))
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.label, second.label)
        assert (first.label != nuclei_phantom(6, **SMALL, stained=in_color).label).any()


def test_picture_leaves_the_global_generator_alone() -> None:
    before = mtrand._rand.get_state()[1].copy()
    nuclei_phantom(0, **SMALL)
    np.testing.assert_array_equal(before, mtrand._rand.get_state()[1])


def test_types_and_shapes_are_those_of_pictures(gray: list[NucleiPhantom], stained: list[NucleiPhantom]) -> None:
    assert {(case.image.shape, case.image.dtype.name) for case in gray} == {((256, 256), "uint8")}
    assert {(case.image.shape, case.image.dtype.name) for case in stained} == {((256, 256, 3), "uint8")}
    assert {(case.label.shape, case.label.dtype.name) for case in gray + stained} == {((256, 256), "uint16")}


def test_numbers_have_no_gap_and_each_is_one_piece_of_enough_pixels(
    gray: list[NucleiPhantom], stained: list[NucleiPhantom]
) -> None:
    for case in gray + stained:
        sizes = np.bincount(case.label.ravel())
        assert 15 <= len(sizes) - 1 <= 90
        assert sizes.min() >= LEAST
        assert connected(case.label, background=0, connectivity=1).max() == len(sizes) - 1


def test_nuclei_touch_in_every_picture_and_differ_in_size(
    gray: list[NucleiPhantom], stained: list[NucleiPhantom]
) -> None:
    assert all(touching(case.label) >= 3 for case in gray + stained)
    areas = [np.median(np.bincount(case.label.ravel())[1:]) for case in gray]
    assert max(areas) > 3 * min(areas)


def test_components_of_a_threshold_merge_nuclei(gray: list[NucleiPhantom]) -> None:
    for case in gray:
        smooth = ndimage.gaussian_filter(case.image.astype(float), 1)
        pieces, count = ndimage.label(smooth > threshold_otsu(smooth))
        sizes = np.bincount(pieces.ravel())[1:]
        assert count - (sizes < LEAST).sum() < 0.9 * case.label.max()


def test_fluorescence_is_bright_on_black_with_peaks_from_50_to_255(gray: list[NucleiPhantom]) -> None:
    for case in gray:
        assert case.image[case.label > 0].mean() > 1.8 * np.median(case.image[case.label == 0])
    peaks = [int(nuclei_phantom((1, number), shape=(64, 64)).image.max()) for number in range(24)]
    assert min(peaks) < 65
    assert max(peaks) > 180


def test_some_nuclei_are_much_dimmer_than_others(gray: list[NucleiPhantom]) -> None:
    ratios = []
    for case in gray:
        levels = ndimage.median(case.image, case.label, np.arange(1, case.label.max() + 1))
        ratios.append(np.percentile(levels, 5) / np.median(levels))
    assert min(ratios) < 0.6


def test_stained_nuclei_are_dark_and_blue_on_a_bright_ground(stained: list[NucleiPhantom]) -> None:
    for case in stained:
        inside, outside = case.image[case.label > 0].mean(0), case.image[case.label == 0].mean(0)
        assert (inside < outside - 20).any()
        assert inside[2] > inside[1]
        assert outside.mean() > 140


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer of 0 or more, or several of them, got -1"),
        ({"shape": (32, 64)}, r"`shape` must be two pixel counts of 64 to 4096, such as 256,256, got \(32, 64\)"),
        ({"shape": (64, 64, 64)}, "`shape` must be two pixel counts of 64 to 4096"),
        ({"shape": 256}, "`shape` must be two pixel counts of 64 to 4096"),
    ],
)
def test_impossible_picture_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nuclei_phantom(**{"seed": 0} | arguments)


def test_written_set_has_all_lists_a_share_of_color_and_passes_the_check(tmp_path: Path) -> None:
    path = write_nuclei_phantoms(
        tmp_path / "set", training=5, validation=4, test=1, unlabeled=2, shape=(64, 72), stained=0.5
    )
    lists = {key: load_datalist(path, key) for key in ("training", "validation", "test", "unlabeled")}
    sizes = {key: len(items) for key, items in lists.items()}
    assert sizes == {"training": 5, "validation": 4, "test": 1, "unlabeled": 2}
    assert json.loads(path.read_text())["labels"] == {}
    axes = {key: [imread(item["image"]).ndim for item in items] for key, items in lists.items()}
    assert axes == {"training": [2, 3, 2, 3, 2], "validation": [2, 3, 2, 3], "test": [2], "unlabeled": [2, 3]}
    item = lists["training"][1]
    assert item["label"].endswith("labels/case_001.png")
    expected = nuclei_phantom((0, 0, 1), (64, 72), stained=True)
    np.testing.assert_array_equal(imread(item["image"]), expected.image)
    np.testing.assert_array_equal(imread(item["label"]), expected.label)
    assert not (tmp_path / "set" / "labels" / "case_011.png").exists()
    report = check_data(lists["training"], lists["validation"], test=lists["test"], unlabeled=lists["unlabeled"])
    assert len(report.shapes) == 2


def test_more_training_cases_leave_the_test_cases_as_they_are(tmp_path: Path) -> None:
    few = write_nuclei_phantoms(tmp_path / "few", training=1, validation=0, test=4, **SMALL)
    many = write_nuclei_phantoms(tmp_path / "many", training=4, validation=0, test=4, **SMALL)
    for one, other in zip(load_datalist(few, "test"), load_datalist(many, "test"), strict=True):
        assert Path(one["image"]).read_bytes() == Path(other["image"]).read_bytes()
        assert Path(one["label"]).read_bytes() == Path(other["label"]).read_bytes()


def test_impossible_sets_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`unlabeled` must be a number of cases, 0 or more, got 1.5"):
        write_nuclei_phantoms(tmp_path / "set", unlabeled=1.5)
    with pytest.raises(ValueError, match="`training` must be 1 or more, got 0 in all lists"):
        write_nuclei_phantoms(tmp_path / "set", training=0, validation=0, test=0)
    with pytest.raises(ValueError, match="`stained` must be the share of stained pictures, 0 to 1, got 2"):
        write_nuclei_phantoms(tmp_path / "set", stained=2)
    assert not (tmp_path / "set").exists()
