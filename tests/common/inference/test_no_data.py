# SPDX-License-Identifier: Apache-2.0
"""Voxels that hold no data: found, filled, left out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity

from medkd.inference.no_data import ClearNoDatad, FillNoDatad, NormalizeDatad, bridged, filled, find_no_data
from medkd.phantoms.em import em_phantom
from medkd.phantoms.nuclei import nuclei_phantom

SHAPE = (20, 60, 64)
REAL = Path(os.environ.get("MEDKD_DATA", Path(__file__).parents[4] / "shared/data"))


def tissue(seed: int = 0, low: int = 1, high: int = 255) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, SHAPE).astype(np.float32)


def corner(size: int = 30) -> np.ndarray:
    """A triangle in each section."""
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    return np.broadcast_to(rows + columns < size, SHAPE)


def region(kind: str) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    if kind == "sections":
        mask[[4, 9, 10]] = True
    elif kind == "margin":
        mask[:, :20] = True
    elif kind == "thin margin":
        mask[:, :, -2:] = True
    elif kind == "corner":
        mask |= corner()
    elif kind == "corner of a section":
        mask[7] = corner()[7]
    elif kind == "frame and sections":
        mask[:, :9] = mask[:, :, 50:] = mask[5] = mask[-1] = True
    return mask


KINDS = ["sections", "margin", "thin margin", "corner", "corner of a section", "frame and sections"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_black_and_white_regions_are_found_exactly_whatever_the_axis(kind: str, value: int, axis: int) -> None:
    mask = region(kind)
    image = np.where(mask, value, tissue())
    found = find_no_data(np.moveaxis(image, 0, axis), axis)
    assert found is not None
    assert np.array_equal(np.moveaxis(found, axis, 0), mask)


def test_sections_of_any_one_number_and_margins_of_another_are_found_together() -> None:
    mask = region("margin")
    image = np.where(mask, 0, tissue())
    image[6], mask[6] = 128, True
    found = find_no_data(image)
    assert found is not None
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(30, 6, 6), (10, 10, 10)])
def test_healthy_phantoms_have_none_and_missing_sections_are_all_found(seed: int, spacing: tuple[int, ...]) -> None:
    shape = (24, 64, 64)
    assert find_no_data(em_phantom(seed, shape, spacing).image.astype(np.float32)) is None
    image = em_phantom(seed, shape, spacing, missing=0.2).image
    found = find_no_data(image.astype(np.float32))
    assert found is not None
    assert np.array_equal(found.all((1, 2)), (image == 0).all((1, 2)))
    assert not found[~found.all((1, 2))].any()


@pytest.mark.parametrize("path", sorted(REAL.glob("em_*/*images/*.nii.gz")) or [None], ids=str)
def test_real_volumes_have_none(path: Path | None) -> None:
    if path is None:
        pytest.skip("no shared/data beside the repository")
    file = nib.load(path)
    axis = int(np.argmax(file.header.get_zooms()))
    assert find_no_data(np.asarray(file.dataobj).astype(np.float32), axis) is None


def test_what_is_dark_or_saturated_in_tissue_is_data() -> None:
    noise = tissue(1, 0, 256)
    clipped = np.clip(noise, 60, 200)                              # a quarter of it at each end
    spot = noise.copy()
    spot[:, 20:40, 20:40] = noise[:, 20:40, 20:40] // 25           # inside, nearly black: a vessel
    small = noise.copy()
    small[:, :5, :5] = 0                                           # at the edge, but small
    binary = (noise > 128).astype(np.float32)
    constant = np.full(SHAPE, 7.0, np.float32)
    grid = noise.copy()
    grid[10] = grid[:, 30] = grid[:, :, 20:23] = 0                 # drawn, along all axes
    for image in (noise, grid, clipped, spot, small, binary, constant, np.full(SHAPE, np.nan, np.float32)):
        assert find_no_data(image) is None


def test_a_section_alone_a_line_and_a_tiny_volume_are_handled() -> None:
    for shape in ((40, 50, 1), (1, 40, 50), (1, 1, 1), (3, 3, 3), (500, 1, 1)):
        image = np.random.default_rng(0).integers(1, 255, shape).astype(np.float32)
        assert find_no_data(image, int(np.argmin(shape))) is None


def test_margins_of_pictures_are_found_and_dark_backgrounds_are_not() -> None:
    noise = np.random.default_rng(0).integers(5, 250, (80, 90)).astype(np.float32)
    for value, dark in ((255, False), (0, True), (255, True)):
        image = noise.copy()
        image[:12] = image[:, -20:] = value
        found = find_no_data(image, dark=dark)
        assert found is not None
        assert np.array_equal(found, image == value)
    image[:50] = 255
    assert find_no_data(image) is None                             # more than half of it: what it shows is white
    dark = np.zeros((80, 90), np.float32)                          # fluorescence, clipped: 0 where nothing is
    dark[30:50, 20:60] = noise[30:50, 20:60]
    assert find_no_data(dark) is None
    for seed in range(4):
        assert find_no_data(nuclei_phantom(seed).image.astype(np.float32)) is None
        stained = nuclei_phantom(seed, stained=True).image.astype(np.float32)
        assert FillNoDatad("image")({"image": torch.as_tensor(stained.transpose(2, 0, 1))}).keys() == {"image"}


def test_short_gaps_repeat_the_nearest_section_and_long_ones_stay() -> None:
    image = tissue()
    mask = np.zeros(SHAPE, bool)
    mask[[0, 4, 8, 9, 13, 14, 15]] = True
    result, left = bridged(image, mask, axis=0, most=2)
    assert np.flatnonzero(left.all((1, 2))).tolist() == [0, 13, 14, 15]
    assert np.array_equal(result[4], image[3])
    assert np.array_equal(result[8], image[7])
    assert np.array_equal(result[9], image[10])
    for section in (0, 1, 13, 14, 15):
        assert np.array_equal(result[section], image[section])
    assert np.array_equal(bridged(image, mask, axis=0, most=0)[1], mask)


def test_gaps_along_another_axis_are_bridged_if_whole_planes_are_missing() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[:, :, 30] = True
    mask[:, :20] = True                                            # a margin, which stays
    result, left = bridged(tissue(), mask, axis=0, most=2)
    assert np.array_equal(left, region("margin"))
    assert np.array_equal(result[:, 20:, 30], tissue()[:, 20:, 29])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_filled_has_numbers_of_what_has_data(kind: str) -> None:
    mask = region(kind)
    image = np.where(mask, -1e6, tissue())
    result = filled(image, mask, axis=0)
    assert result.min() >= 1
    assert np.array_equal(result[~mask], image[~mask])
    if kind == "margin":
        assert np.array_equal(result[:, 3], image[:, 20])
    if kind == "sections":
        assert np.array_equal(result[9], image[8])


def case(mask: np.ndarray, spacing: tuple[float, ...] = (30.0, 6.0, 6.0), value: float = 0.0) -> dict[str, Any]:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    voxels = torch.as_tensor(np.where(mask, value, tissue()).astype(np.float32))[None]
    label = torch.ones(1, *SHAPE, dtype=torch.int32)
    return {
        "image": MetaTensor(voxels, affine=affine, meta={"filename_or_obj": "here/a.nii.gz"}),
        "label": MetaTensor(label, affine=affine),
    }


def test_a_mask_lies_beside_the_image_and_labels_are_ignored_there(caplog: pytest.LogCaptureFixture) -> None:
    data = case(region("frame and sections"))
    before = {key: value.clone() for key, value in data.items()}
    with caplog.at_level(logging.WARNING):
        result = FillNoDatad("image")(data)
    frame = np.zeros(SHAPE, bool)
    frame[:, :9] = frame[:, :, 50:] = frame[-1] = True
    assert np.array_equal(result["no_data"][0].numpy(), frame)
    assert result["no_data"].dtype == torch.uint8
    assert torch.equal(result["no_data"].affine, data["image"].affine)
    assert np.array_equal(result["label"][0].numpy() == -1, frame)
    assert (result["label"][0].numpy()[~frame] == 1).all()         # of the bridged section, too
    assert (result["image"] > 0).all()
    assert all(torch.equal(data[key], before[key]) for key in before)
    share = 100 * frame.mean()
    assert f"here/a.nii.gz: 2 of 20 sections are missing, 1 bridged; {share:.2g} % of voxels hold no" in caplog.text


def test_bridged_sections_alone_leave_no_mask(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = FillNoDatad("image")(case(region("sections")))
    assert result.keys() == {"image", "label"}
    assert (result["label"] == 1).all()
    assert "3 of 20 sections are missing, 3 bridged." in caplog.text
    assert "no_data" in FillNoDatad("image", bridge=1)(case(region("sections")))
    with pytest.raises(ValueError, match="`bridge` must be a number of sections of at least 0, got -1"):
        FillNoDatad("image", bridge=-1)


def test_a_healthy_image_stays_the_same_object_and_no_label_is_needed() -> None:
    data = case(np.zeros(SHAPE, bool))
    result = FillNoDatad("image")(data)
    assert result.keys() == data.keys()
    assert result["image"] is data["image"]
    alone = FillNoDatad("image")({"image": case(region("margin"))["image"], "label": "a_path.nii.gz"})
    assert alone.keys() == {"image", "label", "no_data"}
    other = FillNoDatad("image", ignored=None)(case(region("margin")))
    assert (other["label"] == 1).all()


def test_sections_lie_along_the_largest_spacing() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[:, :, 30] = True
    mask[:, :3] = True
    data = case(mask, spacing=(6.0, 6.0, 30.0))
    result = FillNoDatad("image")(data)
    assert np.array_equal(result["no_data"][0].numpy().any((0, 2)), np.arange(60) < 3)
    assert torch.equal(result["image"][..., 30][:, :, 3:], data["image"][..., 29][:, :, 3:])


@pytest.mark.parametrize("value", [0, 255])
def test_margins_of_pictures_in_color_are_found(value: int) -> None:
    colors = torch.as_tensor(np.random.default_rng(0).integers(5, 250, (3, 80, 90)).astype(np.float32))
    colors[:, :, :30] = value
    result = FillNoDatad("image")({"image": MetaTensor(colors)})
    assert np.array_equal(result["no_data"][0].numpy(), np.broadcast_to(np.arange(90) < 30, (80, 90)))
    assert float((result["image"] == value).sum()) == 0


def test_statistics_are_those_of_the_voxels_with_data() -> None:
    mask = region("margin")
    data = FillNoDatad("image")(case(mask, value=255.0))
    result = NormalizeDatad("image")(data)["image"][0].numpy()
    own = tissue()[~mask]
    np.testing.assert_allclose(result[~mask], (own - own.mean()) / own.std(), atol=1e-4)


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_without_a_mask_normalization_is_that_of_monai_bit_for_bit(kind: type[Any]) -> None:
    image = MetaTensor(torch.as_tensor(tissue().astype(kind))[None], meta={"filename_or_obj": "a"})
    for options in ({}, {"subtrahend": 3.0}, {"divisor": 7.0}, {"subtrahend": 0.0, "divisor": 1.0}):
        result = NormalizeDatad("image", **options)({"image": image})["image"]
        assert torch.equal(result, NormalizeIntensity(**options)(image))
        assert result.meta["filename_or_obj"] == "a"


@pytest.mark.parametrize("value", [0.0, 0.1, 255.0, 60_000.3])
def test_a_constant_image_becomes_zero(value: float) -> None:
    image = MetaTensor(torch.full((1, 30, 40, 50), value))
    result = NormalizeDatad("image")({"image": image})["image"]
    assert torch.equal(result.as_tensor(), torch.zeros(1, 30, 40, 50))


def test_results_are_zero_where_there_is_no_data() -> None:
    mask = torch.zeros(1, 4, 5, 6, dtype=torch.uint8)
    mask[:, 2] = 1
    pred = torch.ones(3, 4, 5, 6)
    result = ClearNoDatad("pred")({"pred": pred, "no_data": mask})["pred"]
    assert result.sum(dim=(0, 2, 3)).tolist() == [90, 90, 0, 90]
    assert pred.min() == 1
    assert ClearNoDatad("pred")({"pred": pred})["pred"] is pred


@pytest.mark.parametrize("kind", ["margin", "slanted", "sections", "rare"])
def test_a_filling_that_was_compressed_is_found(kind: str) -> None:
    image = tissue(3, 20)
    mask = region("margin" if kind == "rare" else kind) if kind != "slanted" else np.zeros(SHAPE, bool)
    for row in range(SHAPE[1]) if kind == "slanted" else ():
        mask[:, row, : 18 + row // 4] = True
    noise = np.random.default_rng(1)
    image[mask] = noise.random(mask.sum()) < 0.02 if kind == "rare" else noise.integers(0, 3, mask.sum())
    assert np.array_equal(find_no_data(image), mask)


def test_a_black_hole_within_is_found() -> None:
    image = tissue(4)
    mask = np.zeros(SHAPE, bool)
    mask[:, 20:40, 20:40] = True
    image[mask] = 0
    assert np.array_equal(find_no_data(image), mask)
