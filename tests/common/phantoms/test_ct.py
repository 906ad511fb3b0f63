# SPDX-License-Identifier: Apache-2.0
"""The CT phantom: same seed, same case; every organ in it, on its side of the world, with its look-alikes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.random import mtrand
from scipy import ndimage

from medkd.data.datalist import load_datalist
from medkd.phantoms.canvas import Canvas, carve, ellipsoid, join, tube
from medkd.phantoms.ct import CT_LABELS, CTPhantom, ct_phantom, write_ct_phantoms

SMALL = {"shape": (48, 40, 32), "spacing": (6.0, 6.0, 8.0)}
LIVER, SPLEEN, KIDNEY, AORTA, PANCREAS, ADRENAL = range(1, 7)


@pytest.fixture(scope="module")
def cases() -> list[CTPhantom]:
    return [ct_phantom((0, 0, number)) for number in range(5)]


def world_center(case: CTPhantom, mask: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(case.affine, np.argwhere(mask).mean(0))


def test_same_seed_gives_the_same_case_and_another_seed_another() -> None:
    first, second, other = ct_phantom(7, **SMALL), ct_phantom(7, **SMALL), ct_phantom(8, **SMALL)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.label, second.label)
    np.testing.assert_array_equal(first.affine, second.affine)
    assert (first.image != other.image).any()
    assert (first.affine != other.affine).any()


def test_case_leaves_the_global_generator_alone() -> None:
    before = mtrand._rand.get_state()[1].copy()
    ct_phantom(0, **SMALL)
    np.testing.assert_array_equal(before, mtrand._rand.get_state()[1])


def test_types_and_shapes_are_those_of_a_ct(cases: list[CTPhantom]) -> None:
    for case in cases:
        assert case.image.dtype == np.int16
        assert case.label.dtype == np.uint8
        assert case.image.shape == case.label.shape == (96, 80, 64)
        assert -1024 <= case.image.min() < -950
        assert 250 < case.image.max() <= 3071


def test_every_organ_is_in_every_case_with_enough_voxels(cases: list[CTPhantom]) -> None:
    least = {LIVER: 8000, SPLEEN: 700, KIDNEY: 700, AORTA: 500, PANCREAS: 350, ADRENAL: 70}
    for case in cases:
        counts = np.bincount(case.label.ravel())
        assert len(counts) == len(CT_LABELS)
        assert all(counts[value] >= number for value, number in least.items())


def test_adrenal_keeps_forty_voxels_of_4_by_4_by_3_mm() -> None:
    for number in range(10):
        case = ct_phantom((3, number))
        volume = (case.label == ADRENAL).sum() * abs(np.linalg.det(case.affine[:3, :3]))
        assert volume / 48 > 40


def test_liver_lies_right_and_spleen_left_in_world_space(cases: list[CTPhantom]) -> None:
    for case in cases:
        middle = world_center(case, case.image > -500)
        assert world_center(case, case.label == LIVER)[0] > middle[0] + 15
        for organ in (SPLEEN, KIDNEY, ADRENAL):
            assert world_center(case, case.label == organ)[0] < middle[0] - 15


def test_adrenal_lies_above_its_kidney_and_pancreas_before_the_aorta(cases: list[CTPhantom]) -> None:
    for case in cases:
        centers = {value: world_center(case, case.label == value) for value in range(1, 7)}
        assert centers[ADRENAL][2] > centers[KIDNEY][2] + 20
        assert centers[PANCREAS][1] > centers[AORTA][1] + 10


def test_affines_are_oblique_with_mixed_axes_and_varied_spacing(cases: list[CTPhantom]) -> None:
    spacing = np.array([np.linalg.norm(case.affine[:3, :3], axis=0) for case in cases])
    assert (np.abs(spacing / (3, 3, 4) - 1) <= 0.0801).all()
    assert np.ptp(spacing[:, 0]) > 0.05
    assert len({nib.aff2axcodes(case.affine) for case in cases}) > 1
    for case in cases:
        axes = case.affine[:3, :3] / np.linalg.norm(case.affine[:3, :3], axis=0)
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
        assert 0 < np.abs(axes - np.diag(np.diag(axes))).max() < 0.25
        assert np.abs(case.affine[:3, 3]).min() > 0


def test_organs_have_realistic_hu(cases: list[CTPhantom]) -> None:
    expected = {
        LIVER: (45, 130), SPLEEN: (35, 145), KIDNEY: (20, 220), AORTA: (30, 310), PANCREAS: (25, 115),
    }
    for case in cases:
        for value, (low, high) in expected.items():
            assert low < np.median(case.image[case.label == value]) < high


def test_cases_are_of_all_contrast_phases_from_native_to_arterial() -> None:
    aorta = [np.median(case.image[case.label == AORTA]) for case in (ct_phantom((5, n), **SMALL) for n in range(16))]
    assert min(aorta) < 80
    assert max(aorta) > 200


def test_patients_differ_in_size_so_that_a_few_do_not_show_them_all() -> None:
    cases = [ct_phantom((6, number), **SMALL) for number in range(16)]
    for value, least in ((LIVER, 1.6), (SPLEEN, 2.0), (KIDNEY, 1.8), (PANCREAS, 1.8)):
        volumes = [(case.label == value).sum() * abs(np.linalg.det(case.affine[:3, :3])) for case in cases]
        assert max(volumes) / min(volumes) > least


def test_right_kidney_looks_like_the_left_one_and_is_not_labeled(cases: list[CTPhantom]) -> None:
    for case in cases:
        left = case.label == KIDNEY
        level = np.median(case.image[left])
        index = np.argwhere((case.label == 0) & (np.abs(case.image - level) < 45))
        world = nib.affines.apply_affine(case.affine, index)
        middle, center = world_center(case, case.image > -500), world_center(case, left)
        mirrored = (2 * middle[0] - center[0], center[1], center[2] - 10)
        assert (np.linalg.norm(world - mirrored, axis=1) < 30).sum() > 0.3 * left.sum()


def test_noise_has_the_deviation_of_a_ct(cases: list[CTPhantom]) -> None:
    for case in cases:
        kidney = case.image[case.label == AORTA]
        assert 15 < 1.4826 * np.median(np.abs(kidney - np.median(kidney))) < 45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer of 0 or more, or several of them, got -1"),
        ({"seed": "x"}, "`seed` must be an integer of 0 or more"),
        ({"seed": 0, "shape": (8, 40, 32)}, r"`shape` must be three voxel counts.*\(8, 40, 32\)"),
        ({"seed": 0, "shape": 96}, "`shape` must be three voxel counts"),
        ({"seed": 0, "spacing": (3.0, 0.0, 4.0)}, "`spacing` must be three positive lengths in mm"),
        ({"seed": 0, "spacing": (3.0, float("nan"), 4.0)}, "`spacing` must be three positive lengths in mm"),
    ],
)
def test_impossible_case_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ct_phantom(**arguments)


def test_written_set_has_all_lists_files_and_label_names(tmp_path: Path) -> None:
    path = write_ct_phantoms(tmp_path / "set", training=2, validation=1, test=1, unlabeled=1, **SMALL)
    assert path == tmp_path / "set" / "datalist.json"
    sizes = {key: len(load_datalist(path, key)) for key in ("training", "validation", "test", "unlabeled")}
    assert sizes == {"training": 2, "validation": 1, "test": 1, "unlabeled": 1}
    item = load_datalist(path, "training")[0]
    image, label = nib.load(item["image"]), nib.load(item["label"])
    assert item["image"].endswith("images/case_000.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.affine, label.affine)
    np.testing.assert_allclose(image.affine, ct_phantom((0, 0, 0), **SMALL).affine, atol=1e-4)
    assert not (tmp_path / "set" / "labels" / "case_004.nii.gz").exists()
    assert "label" not in load_datalist(path, "unlabeled")[0]


def test_more_training_cases_leave_the_test_cases_as_they_are(tmp_path: Path) -> None:
    few = write_ct_phantoms(tmp_path / "few", training=1, validation=0, test=1, **SMALL)
    many = write_ct_phantoms(tmp_path / "many", training=2, validation=0, test=1, **SMALL)
    volumes = [np.asarray(nib.load(load_datalist(path, "test")[0]["image"]).dataobj) for path in (few, many)]
    np.testing.assert_array_equal(*volumes)


def test_impossible_numbers_of_cases_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`test` must be a number of cases, 0 or more, got -1"):
        write_ct_phantoms(tmp_path / "set", test=-1)
    with pytest.raises(ValueError, match="`training` must be 1 or more, got 0 in all lists"):
        write_ct_phantoms(tmp_path / "set", training=0, validation=0, test=0)
    assert not (tmp_path / "set").exists()


def test_solids_have_signed_distances_in_mm() -> None:
    points = np.array([[0, 12, 0], [0, 0, 30], [0, 0, 0]], np.float32).reshape(3, 3, 1, 1)
    ball, rod = ellipsoid((0, 0, 0), (10, 10, 10)), tube([(0, 0, 0), (0, 25, 0)], [4, 4])
    np.testing.assert_allclose(ball.distance(points).ravel(), [-10, 2, 20], atol=1e-3)
    np.testing.assert_allclose(rod.distance(points).ravel(), [-4, 8, 1], atol=1e-5)
    np.testing.assert_allclose(carve(ball, rod).distance(points).ravel(), [4, 2, 20], atol=1e-3)
    assert (join(ball, rod).distance(points) <= np.minimum(ball.distance(points), rod.distance(points))).all()


def test_painting_changes_only_the_solid_and_the_voxels_at_its_edge() -> None:
    canvas = Canvas(np.random.default_rng(0), (32, 32, 32), np.diag([4.0, 4.0, 4.0, 1.0]))
    canvas.paint(ellipsoid((60, 60, 60), (20, 20, 20)), 50.0, label=3)
    distance = ellipsoid((60, 60, 60), (20, 20, 20)).distance(canvas.points)
    assert ((canvas.label == 3) == (distance < 0)).all()
    assert (canvas.hu[distance > 2] == -1000).all()
    assert (canvas.hu[distance < -2] == 50).all()


def test_the_liver_is_one_piece() -> None:
    for seed in range(6):
        _, pieces = ndimage.label(ct_phantom(seed, shape=(64, 56, 40), spacing=(4.5, 4.5, 6.0)).label == 1)
        assert pieces == 1
