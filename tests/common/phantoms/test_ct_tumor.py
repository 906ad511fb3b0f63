# SPDX-License-Identifier: Apache-2.0
"""The phantom of CT tumors: same seed, same case; tumors in their organs, look-alikes without a label, no easy rule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from numpy.random import mtrand
from scipy import ndimage

from medkd.data.datalist import load_datalist
from medkd.metrics.connectivity import connected_components
from medkd.phantoms.canvas import Canvas, ellipsoid
from medkd.phantoms.ct import CTPhantom, ct_phantom, draw_abdomen
from medkd.phantoms.ct_tumor import TUMOR_LABELS, ct_tumor_phantom, write_ct_tumor_phantoms

SMALL = {"shape": (48, 40, 32), "spacing": (6.0, 6.0, 8.0)}
MIDDLE = {"shape": (96, 80, 64), "spacing": (3.0, 3.0, 4.0)}
LIVER, LEFT, RIGHT = 1, 3, 7


class Known(NamedTuple):
    """A case, the same patient without tumors, and where the organs are in both; shapes (*S)."""

    case: CTPhantom
    healthy: CTPhantom
    organs: np.ndarray

    @property
    def tumor(self) -> np.ndarray:
        return self.case.label > 0

    @property
    def change(self) -> np.ndarray:
        """HU that the tumors add."""
        return self.case.image.astype(float) - self.healthy.image


@pytest.fixture(scope="module")
def cases() -> list[Known]:
    known = []
    for number in range(10):
        seed = (0, 0, number)
        patient = draw_abdomen(np.random.default_rng(seed), **MIDDLE, spots=False, right_kidney=RIGHT)
        organs = np.where(np.isin(patient.canvas.label, (LIVER, LEFT, RIGHT)), patient.canvas.label, 0)
        known.append(Known(ct_tumor_phantom(seed, **MIDDLE), ct_tumor_phantom(seed, **MIDDLE, healthy=True), organs))
    return known


def diameters(case: CTPhantom) -> np.ndarray:
    """mm of balls of the volume of each piece of the label; shape (N,)."""
    pieces, _ = connected_components(case.label > 0)
    volumes = np.bincount(pieces.ravel())[1:] * abs(np.linalg.det(case.affine[:3, :3]))
    return np.asarray((6 * volumes / np.pi) ** (1 / 3))


def dice(pred: np.ndarray, label: np.ndarray) -> float:
    return float(2 * (pred & label).sum() / max(pred.sum() + label.sum(), 1))


def upright(values: np.ndarray, case: CTPhantom) -> np.ndarray:
    """Turned to RAS, and rolled so that the middle of the body is that of the grid."""
    turned, image = (
        np.asarray(nib.as_closest_canonical(nib.Nifti1Image(v, case.affine)).dataobj) for v in (values, case.image)
    )
    middle = ndimage.center_of_mass(image > -300)
    return np.roll(turned, [size // 2 - round(at) for size, at in zip(image.shape, middle, strict=True)], (0, 1, 2))


def test_same_seed_gives_the_same_case_and_another_seed_another() -> None:
    first, second, other = (ct_tumor_phantom(seed, **SMALL) for seed in (7, 7, 8))
    for one, same, different in zip(first, second, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != different).any()


def test_case_leaves_the_global_generator_alone() -> None:
    before = mtrand._rand.get_state()[1].copy()
    ct_tumor_phantom(0, **SMALL)
    np.testing.assert_array_equal(before, mtrand._rand.get_state()[1])


def test_types_and_shapes_are_those_of_a_ct(cases: list[Known]) -> None:
    for known in cases:
        assert known.case.image.dtype == np.int16
        assert known.case.label.dtype == np.uint8
        assert known.case.image.shape == known.case.label.shape == MIDDLE["shape"]
        assert set(np.unique(known.case.label)) == {0, 1}
        assert -1024 <= known.case.image.min() < -950


def test_a_healthy_patient_is_the_same_but_for_the_tumors(cases: list[Known]) -> None:
    for known in cases:
        assert not known.healthy.label.any()
        np.testing.assert_array_equal(known.case.affine, known.healthy.affine)
        near = ndimage.binary_dilation(known.tumor, np.ones((3, 3, 3)), iterations=3)
        assert (known.change[~near] == 0).mean() > 0.999           # the scanner blurs a little over the rim
        assert np.abs(known.change[~near]).max() <= 3
        assert (known.change[known.tumor] != 0).mean() > 0.8


def test_cases_have_one_to_five_tumors_of_six_to_thirty_millimeters() -> None:
    sizes = [diameters(ct_tumor_phantom((1, number), **MIDDLE)) for number in range(16)]
    counts = [len(size) for size in sizes]
    assert set(counts) <= set(range(1, 7))                         # a vessel of fat may part one
    assert min(counts) == 1
    assert max(counts) >= 4
    every = np.concatenate(sizes)
    assert 4 <= every.min() < 8                                    # of a tumor at the border its half may be left
    assert 22 < every.max() < 35
    assert np.median(every) < 18


def test_tumors_lie_in_the_liver_and_both_kidneys(cases: list[Known]) -> None:
    shares = {LIVER: 0, LEFT: 0, RIGHT: 0}
    for known in cases:
        pieces, box = connected_components(known.tumor)
        for number in range(1, pieces.max() + 1):
            within = known.organs[box][pieces == number]
            organ = np.bincount(within)[1:].argmax() + 1
            shares[int(organ)] += 1
            assert (within == organ).mean() > (0.99 if organ == LIVER else 0.1)    # a kidney's may bulge
    assert min(shares.values()) >= 1
    assert shares[LIVER] > shares[LEFT] + shares[RIGHT]


def test_a_tumor_is_a_little_darker_than_its_liver_and_less_than_a_cyst(cases: list[Known]) -> None:
    contrasts = []
    for known in cases:
        inside = ndimage.binary_erosion(known.tumor) & (known.organs == LIVER)
        if inside.sum() > 10:
            contrasts.append(-np.median(known.change[inside]))
    assert len(contrasts) >= 5
    assert min(contrasts) > 3
    assert max(contrasts) < 40
    assert np.ptp(contrasts) > 8


def test_organs_have_more_that_is_as_dark_and_no_tumor(cases: list[Known]) -> None:
    dark, tumors = 0, 0
    for known in cases:
        image = ndimage.gaussian_filter(known.healthy.image.astype(float), 1.0)
        inner = ndimage.binary_erosion(known.organs == LIVER, iterations=2)
        depth = np.median(known.healthy.image[inner]) - image
        dark += int((inner & (depth > 10)).sum())
        tumors += int((known.tumor & inner).sum())
    assert dark > tumors > 500


def test_some_organs_have_cysts_without_a_label(cases: list[Known]) -> None:
    found = 0
    for known in cases:
        liver = known.organs == LIVER
        smooth, share = (ndimage.gaussian_filter(v.astype(float), 0.8) for v in (known.healthy.image * liver, liver))
        water = liver & (smooth < 30 * share)                      # without what is beside the liver
        found += bool(ndimage.binary_opening(water).sum() >= 20)   # without cysts the rim has 14 at most
    assert 2 <= found < len(cases)


def test_no_window_of_hu_with_an_opening_finds_the_tumors(cases: list[Known]) -> None:
    """The best of many windows, chosen on the very cases that it is scored on."""
    some = cases[:5]
    smooth = [ndimage.gaussian_filter(known.case.image.astype(np.float32), 1.0) for known in some]
    best = 0.0
    for low, width in itertools.product(range(0, 140, 20), (20, 40)):
        scores = []
        for known, image in zip(some, smooth, strict=True):
            pieces, _ = ndimage.label(ndimage.binary_opening((image > low) & (image < low + width)))
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 10**6
            scores.append(dice((sizes < 900)[pieces], known.tumor))
        best = max(best, float(np.mean(scores)))
    assert best < 0.2


def test_the_place_does_not_give_them_away(cases: list[Known]) -> None:
    """The mean label of eight patients, cut at its best level for the two others."""
    labels = [upright(known.case.label, known.case) > 0 for known in cases]
    mean = ndimage.gaussian_filter(np.mean(labels[:8], axis=0, dtype=np.float32), 1.5)
    levels = [share * mean.max() for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)]
    assert max(np.mean([dice(mean > level, label) for label in labels[8:]]) for level in levels) < 0.2


def test_the_abdomen_is_that_of_the_organs_but_for_its_spots() -> None:
    """Until the liver's spots are drawn, or not, both draw the same numbers."""
    plain, marked = (
        draw_abdomen(np.random.default_rng(3), **SMALL, spots=False, right_kidney=value) for value in (0, RIGHT)
    )
    np.testing.assert_array_equal(plain.canvas.hu, marked.canvas.hu)
    np.testing.assert_array_equal(plain.canvas.label, np.where(marked.canvas.label == RIGHT, 0, marked.canvas.label))
    left, right = ((marked.canvas.label == value).sum() for value in (LEFT, RIGHT))
    assert 0.4 < left / right < 2.5
    assert plain.hu["kidney"] == marked.hu["kidney"]
    np.testing.assert_array_equal(ct_phantom(3, **SMALL).affine, plain.affine)


def test_a_soft_edge_is_wider_and_hu_may_vary_over_the_canvas() -> None:
    ball, steps = ellipsoid((60, 60, 60), (24, 24, 24)), np.diag([4.0, 4.0, 4.0, 1.0])
    between = []
    for soft in (0.0, 12.0):
        canvas = Canvas(np.random.default_rng(0), (32, 32, 32), steps)
        level = np.linspace(20, 60, 32, dtype=np.float32)[:, None, None] * np.ones((32, 32, 32), np.float32)
        canvas.paint(ball, level, 1, soft=soft)
        inner = ball.distance(canvas.points) < -9
        np.testing.assert_allclose(canvas.hu[inner], level[inner], rtol=1e-5)
        between.append(((canvas.hu > -990) & (canvas.hu < 0)).sum())
    assert between[1] > 2 * between[0] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must be an integer of 0 or more, or several of them, got -1"),
        ({"seed": 0, "shape": (8, 40, 32)}, r"`shape` must be three voxel counts.*\(8, 40, 32\)"),
        ({"seed": 0, "spacing": (3.0, 0.0, 4.0)}, "`spacing` must be three positive lengths in mm"),
    ],
)
def test_impossible_case_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ct_tumor_phantom(**arguments)


@pytest.mark.parametrize("seed", range(4))
def test_the_coarsest_grid_still_has_a_tumor(seed: int) -> None:
    assert ct_tumor_phantom(seed, shape=(16, 16, 16), spacing=(18.0, 15.0, 16.0)).label.any()


def test_written_set_has_all_lists_its_share_of_healthy_cases_and_label_names(tmp_path: Path) -> None:
    path = write_ct_tumor_phantoms(
        tmp_path / "set", training=4, validation=2, test=1, unlabeled=1, healthy=0.5, **SMALL
    )
    lists = {key: load_datalist(path, key) for key in ("training", "validation", "test", "unlabeled")}
    assert {key: len(items) for key, items in lists.items()} == {
        "training": 4, "validation": 2, "test": 1, "unlabeled": 1,
    }
    assert json.loads(path.read_text())["labels"] == TUMOR_LABELS
    assert "label" not in lists["unlabeled"][0]
    empty = {key: [not np.asarray(nib.load(item["label"]).dataobj).any() for item in lists[key]]
             for key in ("training", "validation", "test")}
    assert empty == {"training": [False, True, False, True], "validation": [False, True], "test": [False]}
    expected = ct_tumor_phantom((0, 0, 1), **SMALL, healthy=True)
    np.testing.assert_array_equal(np.asarray(nib.load(lists["training"][1]["image"]).dataobj), expected.image)
    assert nib.load(lists["training"][0]["image"]).header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("healthy", [-0.1, 1.5, True, "half"])
def test_a_share_that_is_none_is_refused_and_nothing_is_written(tmp_path: Path, healthy: object) -> None:
    with pytest.raises(ValueError, match="`healthy` must be the share of cases without a tumor, 0 to 1, got"):
        write_ct_tumor_phantoms(tmp_path / "set", healthy=healthy, **SMALL)
    with pytest.raises(ValueError, match="`training` must be 1 or more, got 0 in all lists"):
        write_ct_tumor_phantoms(tmp_path / "set", training=0, validation=0, test=0, **SMALL)
    assert not (tmp_path / "set").exists()
