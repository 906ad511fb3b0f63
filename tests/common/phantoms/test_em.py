# SPDX-License-Identifier: Apache-2.0
"""The EM phantom: same seed, same block; every number one piece, membranes between them, and what looks like them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.random import mtrand
from scipy import ndimage
from skimage.measure import label as connected

from medkd.data.check import check_data
from medkd.data.datalist import load_datalist
from medkd.metrics.instances import contingency, variation_of_information
from medkd.phantoms.em import EMPhantom, em_phantom, write_em_phantoms
from medkd.phantoms.instances import number_instances

SECTIONS = {"shape": (20, 72, 64), "spacing": (30.0, 6.0, 6.0)}
CUBES = {"shape": (32, 56, 48), "spacing": (10.0, 10.0, 10.0)}
LEAST = 200


@pytest.fixture(scope="module")
def cases() -> list[EMPhantom]:
    return [em_phantom((0, 0, number), **kind) for number in range(2) for kind in (SECTIONS, CUBES)]


def faces(label: np.ndarray, axes: tuple[int, ...] = (0, 1, 2)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both sides of all pairs of neighbors along some axes."""
    for axis in axes:
        turned = np.moveaxis(label, axis, 0)
        yield turned[:-1], turned[1:]


def borders(label: np.ndarray) -> np.ndarray:
    """Voxels with another instance beside them in their section."""
    marked = np.zeros(label.shape, bool)
    for axis in (1, 2):
        for step in (1, -1):
            marked |= np.roll(label, step, axis) != label
    return marked


def test_same_seed_gives_the_same_block_and_another_seed_another(cases: list[EMPhantom]) -> None:
    again, other = em_phantom((0, 0, 0), **SECTIONS), em_phantom((0, 0, 7), **SECTIONS)
    np.testing.assert_array_equal(cases[0].image, again.image)
    np.testing.assert_array_equal(cases[0].label, again.label)
    assert (cases[0].image != other.image).mean() > 0.5
    assert (cases[0].label != other.label).mean() > 0.5


def test_block_leaves_the_global_generator_alone() -> None:
    before = mtrand._rand.get_state()[1].copy()
    em_phantom(0, shape=(16, 32, 32))
    np.testing.assert_array_equal(before, mtrand._rand.get_state()[1])


def test_types_shapes_and_affines_are_those_of_em(cases: list[EMPhantom]) -> None:
    for case, kind in zip(cases, (SECTIONS, CUBES) * 2, strict=True):
        assert case.image.dtype == np.uint8
        assert case.label.dtype == np.uint16
        assert case.image.shape == case.label.shape == kind["shape"]
        np.testing.assert_array_equal(case.affine, np.diag([*kind["spacing"], 1.0]))
        assert case.image.min() > 0
        assert 85 < case.image.mean() < 165
        assert 18 < case.image.std() < 60


def test_numbers_have_no_gap_and_each_is_one_piece_of_enough_voxels(cases: list[EMPhantom]) -> None:
    for case in cases:
        sizes = np.bincount(case.label.ravel())
        assert sizes[0] == 0
        assert len(sizes) > 12
        assert sizes[1:].min() >= LEAST
        assert connected(case.label, background=0, connectivity=1).max() == len(sizes) - 1


@pytest.mark.parametrize("spacing", [(30.0, 6.0, 6.0), (10.0, 10.0, 10.0)])
def test_block_of_the_default_size_holds_many_processes_of_varied_caliber(spacing: tuple[float, ...]) -> None:
    sizes = np.bincount(em_phantom(3, spacing=spacing).label.ravel())[1:]
    assert 40 <= len(sizes) <= 150
    assert np.percentile(sizes, 95) > 20 * np.percentile(sizes, 10)


def test_neighbors_touch_without_a_gap_and_membranes_between_them_are_dark(cases: list[EMPhantom]) -> None:
    for case in cases:
        border = borders(case.label)
        deep = ndimage.binary_erosion(~border, np.ones((1, 5, 5)))
        smooth = ndimage.gaussian_filter(case.image.astype(float), (0, 0.7, 0.7))
        assert smooth[border].mean() < smooth[deep].mean() - 0.7 * smooth.std()


def test_inside_of_neurites_has_voxels_as_dark_as_membranes(cases: list[EMPhantom]) -> None:
    shares = []
    for case in cases:
        border = borders(case.label)
        deep = ndimage.binary_erosion(~border, np.ones((1, 7, 7)))
        smooth = ndimage.gaussian_filter(case.image.astype(float), (0, 0.7, 0.7))
        shares.append((smooth[deep] < np.median(smooth[border])).mean())
    assert np.mean(shares) > 0.01, shares


def test_threshold_and_components_are_far_from_the_labels(cases: list[EMPhantom]) -> None:
    for case in cases:
        smooth = ndimage.gaussian_filter(case.image.astype(float), (0, 1, 1))
        scores = []
        for share in (20, 30, 40, 50, 60):
            pieces = connected(smooth > np.percentile(smooth, share), connectivity=1)
            nearest = ndimage.distance_transform_edt(pieces == 0, return_distances=False, return_indices=True)
            table = contingency(pieces[tuple(nearest)].astype(np.int64), case.label.astype(np.int64))
            scores.append(sum(variation_of_information(table)))
        assert min(scores) > 1.0


def test_sections_differ_in_brightness_and_cubic_voxels_do_not(cases: list[EMPhantom]) -> None:
    steps = [np.abs(np.diff(case.image.mean((1, 2)))).mean() for case in cases]
    assert min(steps[0::2]) > 2 * max(steps[1::2])


def test_line_of_zeros_parts_neighbors_within_sections_only(cases: list[EMPhantom]) -> None:
    case = em_phantom((0, 0, 0), **SECTIONS, gap=1)
    np.testing.assert_array_equal(case.image, cases[0].image)
    assert 0.02 < (case.label == 0).mean() < 0.35
    assert not any(((a != b) & (a > 0) & (b > 0)).any() for a, b in faces(case.label, (1, 2)))
    assert any(((a != b) & (a > 0) & (b > 0)).any() for a, b in faces(case.label, (0,)))
    assert np.bincount(case.label.ravel()).min() >= LEAST


def test_line_of_zeros_parts_cubic_neighbors_on_all_sides() -> None:
    label = em_phantom((0, 0, 0), **CUBES, gap=1).label
    assert not any(((a != b) & (a > 0) & (b > 0)).any() for a, b in faces(label))
    sizes = np.bincount(label.ravel())
    assert sizes.min() >= LEAST
    assert connected(label, background=0, connectivity=1).max() == len(sizes) - 1


def test_missing_sections_are_black_and_the_rest_stays(cases: list[EMPhantom]) -> None:
    case = em_phantom((0, 0, 0), **SECTIONS, missing=0.4)
    lost = (case.image == 0).all((1, 2))
    assert 1 <= lost.sum() < 20
    np.testing.assert_array_equal(case.image[~lost], cases[0].image[~lost])
    np.testing.assert_array_equal(case.label, cases[0].label)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer of 0 or more, or several of them, got -1"),
        ({"shape": (8, 64, 64)}, r"`shape` must be three voxel counts of 16 or more, sections first.*\(8, 64, 64\)"),
        ({"shape": (128, 128)}, "`shape` must be three voxel counts"),
        ({"spacing": (6.0, 6.0, 30.0)}, "`spacing` must be three lengths of 2 to 60 nm, that of the sections"),
        ({"spacing": (0.03, 0.006, 0.006)}, "`spacing` must be three lengths of 2 to 60 nm"),
        ({"spacing": (30.0, float("nan"), 6.0)}, "`spacing` must be three lengths of 2 to 60 nm"),
        ({"shape": (48, 16, 16)}, "`shape` times `spacing` must be 180 nm or more along each axis, got .*take more"),
        ({"missing": 0.6}, "`missing` must be the share of lost sections, 0 to 0.5, got 0.6"),
        ({"missing": "x"}, "`missing` must be the share of lost sections, 0 to 0.5, got 'x'"),
        ({"gap": 2}, "`gap` must be 0 or 1, got 2"),
    ],
)
def test_impossible_block_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        em_phantom(**{"seed": 0} | arguments)


def test_fragments_go_to_what_they_touch_and_lone_ones_to_background() -> None:
    label = np.array([[1, 1, 1, 2, 0, 3], [1, 1, 4, 2, 0, 0], [5, 5, 5, 5, 5, 5], [1, 1, 1, 0, 0, 0]])
    ids, moved = number_instances(label, least=2)
    assert ids.tolist() == [[1, 1, 1, 2, 0, 0], [1, 1, 3, 2, 0, 0], [3, 3, 3, 3, 3, 3], [4, 4, 4, 0, 0, 0]]
    assert np.argwhere(moved).tolist() == [[0, 5], [1, 2]]


def test_numbers_that_do_not_fit_into_16_bit_get_32() -> None:
    label = np.arange(1, 70_001).reshape(100, 700)
    assert number_instances(label[:60], 1)[0].dtype == np.uint16
    ids, _ = number_instances(label, 1)
    assert ids.dtype == np.uint32
    assert ids.max() == 70_000


def test_map_without_a_large_enough_piece_becomes_background() -> None:
    ids, moved = number_instances(np.array([[1, 2], [3, 4]]), 5)
    assert ids.tolist() == [[0, 0], [0, 0]]
    assert moved.all()


def test_written_set_has_all_lists_plain_nanometers_and_passes_the_check(tmp_path: Path) -> None:
    path = write_em_phantoms(
        tmp_path / "set", training=2, validation=1, test=1, unlabeled=1, shape=(16, 40, 32), missing=0.1
    )
    lists = {key: load_datalist(path, key) for key in ("training", "validation", "test", "unlabeled")}
    assert [len(items) for items in lists.values()] == [2, 1, 1, 1]
    assert json.loads(path.read_text())["labels"] == {}
    item = lists["training"][0]
    image, label = nib.load(item["image"]), nib.load(item["label"])
    assert item["image"].endswith("images/case_000.nii.gz")
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.uint8, np.uint16)
    assert image.header.get_xyzt_units()[0] == "unknown"
    np.testing.assert_array_equal(image.affine, np.diag([30, 6, 6, 1]))
    np.testing.assert_array_equal(image.affine, label.affine)
    np.testing.assert_array_equal(label.dataobj, em_phantom((0, 0, 0), (16, 40, 32)).label)
    assert not (tmp_path / "set" / "labels" / "case_004.nii.gz").exists()
    report = check_data(lists["training"], lists["validation"], test=lists["test"], unlabeled=lists["unlabeled"])
    assert report.spacing == ((30.0, 30.0), (6.0, 6.0), (6.0, 6.0))


def test_more_training_cases_leave_the_test_cases_as_they_are(tmp_path: Path) -> None:
    small = {"validation": 0, "test": 1, "shape": (16, 32, 32)}
    few = write_em_phantoms(tmp_path / "few", training=1, **small)
    many = write_em_phantoms(tmp_path / "many", training=2, **small)
    volumes = [np.asarray(nib.load(load_datalist(path, "test")[0]["image"]).dataobj) for path in (few, many)]
    np.testing.assert_array_equal(*volumes)


def test_impossible_sets_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`test` must be a number of cases, 0 or more, got -1"):
        write_em_phantoms(tmp_path / "set", test=-1)
    with pytest.raises(ValueError, match="`training` must be 1 or more, got 0 in all lists"):
        write_em_phantoms(tmp_path / "set", training=0, validation=0, test=0)
    with pytest.raises(ValueError, match="`gap` must be 0 or 1, got 0.5"):
        write_em_phantoms(tmp_path / "set", gap=0.5)
    assert not (tmp_path / "set").exists()
