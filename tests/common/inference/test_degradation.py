# SPDX-License-Identifier: Apache-2.0
"""Low resolution is an average of blocks on the right place, teacher and student see one tissue, and there is a way
back to the full grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, set_track_meta
from monai.transforms import (
    Compose,
    Invertd,
    RandAffined,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityd,
    ScaleIntensityRanged,
)
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medkd.inference.degradation import DegradeResolutiond, PairResolutionsd, area_average


def rotated(degrees: Sequence[float] = (3, -7, 12), spacing: Sequence[float] = (0.7, 0.9, 2.5)) -> torch.Tensor:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = [-120.7, 88.1, -881.3]
    return torch.as_tensor(affine)


def slow_average(image: np.ndarray, scale: Sequence[int]) -> np.ndarray:
    """The sum of the voxels at each place of a block, one place after the other."""
    shape = [length // step for length, step in zip(image.shape[1:], scale, strict=True)]
    result = np.zeros((len(image), *shape))
    for place in product(*map(range, scale)):
        result += image[(slice(None), *(slice(at, None, step) for at, step in zip(place, scale, strict=True)))]
    return result / np.prod(scale)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((3, 8, 6), (2, 2)), ((1, 9, 8), (3, 4)), ((2, 4, 6, 8), (2, 2, 2)), ((1, 5, 3, 8), (1, 1, 4))],
)
def test_area_averaging_is_that_of_a_loop_and_keeps_the_mean(shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    image = torch.randn(shape) * 300 - 200
    low = area_average(image, scale)
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low, slow_average(image.double().numpy(), scale), rtol=1e-5, atol=1e-4)
    assert low.mean().item() == pytest.approx(image.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (3, -7, 12), (31, 14, -8)])
@pytest.mark.parametrize("scale", [(2, 2, 2), (1, 1, 4), (3, 2, 1)])
def test_a_block_lies_at_the_mean_of_its_voxels_in_the_patient(
    degrees: tuple[float, ...], scale: tuple[int, ...]
) -> None:
    affine = rotated(degrees)
    low = DegradeResolutiond("image", scale)({"image": MetaTensor(torch.rand(1, 6, 4, 8), affine=affine)})["image"]
    for place in product(*(range(length) for length in low.shape[1:])):
        inside = [np.arange(at * step, (at + 1) * step) for at, step in zip(place, scale, strict=True)]
        voxels = np.stack(np.meshgrid(*inside, indexing="ij")).reshape(3, -1)
        expected = (affine[:3, :3].numpy() @ voxels + affine[:3, 3:].numpy()).mean(1)
        np.testing.assert_allclose(low.affine[:3] @ torch.tensor([*place, 1.0], dtype=torch.float64), expected)
    np.testing.assert_allclose(low.pixdim, np.array([0.7, 0.9, 2.5]) * scale)


@pytest.mark.parametrize("image", [np.uint8(np.arange(16).reshape(1, 4, 4)), torch.arange(16).reshape(1, 4, 4)])
def test_an_image_without_metadata_gets_a_grid_of_unit_voxels(image: Any) -> None:
    low = DegradeResolutiond("image", 2)({"image": image})["image"]
    assert low.as_tensor().tolist() == [[[2.5, 4.5], [10.5, 12.5]]]
    assert low.affine[:2, :2].tolist() == [[2, 0], [0, 2]]
    assert low.affine[:2, -1].tolist() == [0.5, 0.5]


def test_without_tracking_of_metadata_a_tensor_comes() -> None:
    set_track_meta(False)
    try:
        low = DegradeResolutiond("image", 2)({"image": torch.ones(1, 4, 4)})["image"]
    finally:
        set_track_meta(True)
    assert not isinstance(low, MetaTensor)
    assert low.shape == (1, 2, 2)


def test_the_input_stays_as_it_was() -> None:
    image = MetaTensor(torch.rand(1, 4, 4, 4), affine=rotated(), meta={"filename_or_obj": "a.nii.gz"})
    values, data = image.as_tensor().clone(), {"image": image}
    low = DegradeResolutiond("image", 2)(data)["image"]
    assert torch.equal(image.as_tensor(), values)
    assert torch.equal(image.affine, rotated())
    assert not image.applied_operations
    assert low.meta["filename_or_obj"] == "a.nii.gz"


def test_hounsfield_units_are_averaged_before_a_window_cuts_them_off() -> None:
    edge = torch.tensor([[[-1000.0, 300.0]]])                       # air beside contrast agent
    low = DegradeResolutiond("image", (1, 2))({"image": edge})
    window = ScaleIntensityRanged("image", a_min=-160, a_max=240, b_min=0, b_max=1, clip=True)
    assert window(low)["image"].item() == 0.0                       # -350 HU
    assert area_average(window({"image": edge})["image"], (1, 2)).item() == 0.5


def test_what_is_left_over_is_a_block_of_the_last_voxels_repeated_and_the_inverse_cuts_it_off() -> None:
    transform = DegradeResolutiond("image", (2, 4), pad=True)
    image = MetaTensor(torch.tensor([[[1.0, 2, 3, 4, 5, 9]] * 3]), affine=torch.diag(torch.tensor([2.0, 3, 1, 1])))
    low = transform({"image": image})["image"]
    assert low.as_tensor().tolist() == [[[2.5, 8.0], [2.5, 8.0]]]   # (5 + 9 + 9 + 9) / 4
    back = transform.inverse({"image": low})["image"]
    assert back.shape == image.shape
    np.testing.assert_allclose(back.affine, image.affine, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 7, 9), (2, 7, 6, 9)])
def test_a_ramp_comes_back_as_it_was_away_from_the_border(shape: tuple[int, ...]) -> None:
    image = MetaTensor(torch.zeros(shape) + 4.0 * torch.arange(shape[-1]))
    transform = Compose([DegradeResolutiond("image", 2, pad=True)])
    low = transform({"image": image})
    result = Invertd("pred", transform, "image", nearest_interp=False)({**low, "pred": low["image"].clone()})["pred"]
    assert result.shape == shape
    torch.testing.assert_close(result.as_tensor()[..., 1:-2], image.as_tensor()[..., 1:-2])
    assert not result.applied_operations


def test_classes_come_back_by_the_nearest_voxel_on_the_grid_of_a_rotated_volume() -> None:
    image = MetaTensor(torch.rand(1, 5, 6, 7), affine=rotated())
    transform = Compose([DegradeResolutiond("image", (2, 1, 3), pad=True)])
    low = transform({"image": image})
    classes = MetaTensor(torch.randint(0, 5, (1, *low["image"].shape[1:]), dtype=torch.uint8))
    for nearest in (True, False):                                   # integers are never interpolated
        inverted = Invertd("pred", transform, "image", nearest_interp=nearest)({**low, "pred": classes})["pred"]
        assert inverted.shape == image.shape
        assert inverted.dtype == torch.uint8
        for place in product(*map(range, image.shape[1:])):
            assert inverted[(0, *place)] == classes[0, place[0] // 2, place[1], place[2] // 3]
        np.testing.assert_allclose(inverted.affine, rotated(), atol=1e-9)


def test_the_way_back_leads_through_the_steps_before() -> None:
    transform = Compose([RandFlipd("image", prob=1.0, spatial_axis=0), DegradeResolutiond("image", 2)])
    low = transform({"image": torch.arange(8.0).reshape(1, 4, 2)})
    inverted = Invertd("pred", transform, "image")({**low, "pred": low["image"].clone()})["pred"]
    assert inverted[0, :, 0].tolist() == [1.5, 1.5, 5.5, 5.5]


@pytest.mark.parametrize("shape", [(8, 6, 9), (7, 6, 8)])
def test_what_is_on_the_full_grid_already_gets_its_place_and_its_extent(shape: tuple[int, ...]) -> None:
    image = MetaTensor(torch.rand(1, *shape), affine=rotated())
    transform = Compose([DegradeResolutiond("image", (2, 1, 3), pad=True)])
    low = transform({"image": image})
    covered = [step * length for step, length in zip((2, 1, 3), low["image"].shape[1:], strict=True)]
    full = torch.randint(0, 5, (1, *covered), dtype=torch.uint8)
    inverted = Invertd("pred", transform, "image")({**low, "pred": MetaTensor(full.clone())})["pred"]
    assert torch.equal(inverted.as_tensor(), full[:, : shape[0], : shape[1], : shape[2]])
    np.testing.assert_allclose(inverted.affine, rotated(), atol=1e-9)


def test_a_volume_that_was_cropped_to_nothing_passes_both_ways() -> None:
    transform = Compose([DegradeResolutiond("image", (2, 1, 4))])
    low = transform({"image": MetaTensor(torch.zeros(1, 0, 0, 0, dtype=torch.int16), affine=rotated())})
    assert (low["image"].shape, low["image"].dtype) == ((1, 0, 0, 0), torch.float32)
    classes = MetaTensor(torch.zeros(1, 0, 0, 0, dtype=torch.uint8))
    assert Invertd("pred", transform, "image")({**low, "pred": classes})["pred"].shape == (1, 0, 0, 0)


def test_a_result_of_another_grid_is_not_brought_back() -> None:
    transform = DegradeResolutiond("image", 2)
    low = transform({"image": torch.rand(1, 8, 8)})["image"]
    wrong = MetaTensor(torch.rand(2, 5, 4), applied_operations=low.applied_operations)
    with pytest.raises(ValueError, match=r"the grid of the degraded image, \[4, 4\], .*\[8, 8\], got \[5, 4\]"):
        transform.inverse({"image": wrong})


@pytest.mark.parametrize(("align_corners", "error"), [(False, 0.0), (True, 0.5)])
def test_the_upsampled_image_keeps_its_grid_and_moves_only_with_aligned_corners(
    align_corners: bool, error: float
) -> None:
    image = MetaTensor(torch.arange(16.0).expand(1, 4, 16).clone(), affine=torch.diag(torch.tensor([3.0, 2, 1, 1])))
    transform = DegradeResolutiond("image", 2, "upsampled", align_corners=align_corners)
    low = transform({"image": image})["image"]
    assert low.shape == image.shape
    assert torch.equal(low.affine, image.affine)
    assert (low - image).abs()[..., 1:-1].max().item() == pytest.approx(error * 13 / 15, abs=1e-5)
    back = transform.inverse({"image": low})["image"]
    assert torch.equal(back.as_tensor(), low.as_tensor())
    assert not back.applied_operations


def test_an_upsampled_image_that_is_not_divisible_keeps_its_size() -> None:
    low = DegradeResolutiond("image", 4, "upsampled", pad=True)({"image": torch.rand(3, 10, 9)})["image"]
    assert low.shape == (3, 10, 9)


def test_a_scale_of_one_changes_nothing() -> None:
    image = torch.rand(1, 5, 7)
    for mode in ("native", "upsampled"):
        assert torch.equal(DegradeResolutiond("image", 1, mode)({"image": image})["image"].as_tensor(), image)


@pytest.mark.parametrize("scale", [0, -1, 1.5, (2, 0.5), (2, 2, 2, 2), True, "2", ()])
def test_a_scale_that_is_none_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="`scale` must be a whole number of 1 or more, one for all axes or for each"):
        DegradeResolutiond("image", scale)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"image": torch.rand(1, 6, 6)}, ValueError, r"`image` must have shape \(C, \*S\) with 3 spatial.*1, 6, 6"),
        ({"image": torch.rand(1, 6, 6, 5)}, ValueError, r"`image` must be divisible by `scale` 2x2x2 .*\(6, 6, 5\)"),
        ({"label": torch.rand(1, 6, 6, 6)}, KeyError, r"`image` must be in the data .* got the keys \['label'\]"),
    ],
)
def test_images_that_cannot_be_degraded_are_refused(data: Any, error: type[Exception], message: str) -> None:
    for transform in (DegradeResolutiond("image", (2, 2, 2)), PairResolutionsd((2, 2, 2))):
        with pytest.raises(error, match=message):
            transform(data)
    assert DegradeResolutiond("image", 2, allow_missing_keys=True)({"label": 1}) == {"label": 1}


def test_modes_and_keys_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="`mode` must be one of native, upsampled, got 'pyramid'"):
        DegradeResolutiond("image", 2, "pyramid")
    with pytest.raises(ValueError, match='`align_corners` must come with mode "upsampled"'):
        DegradeResolutiond("image", 2, align_corners=True)
    with pytest.raises(ValueError, match="`teacher_key` must differ from `student_key`, got 'image' twice"):
        PairResolutionsd(2, teacher_key="image")


def random_chain(source: str, scale: Sequence[int], mode: str) -> Compose:
    """Random steps as bundles have them, then the pair, and intensity that both share."""
    keys, rank = [source, "label"], len(scale)
    return Compose([
        RandFlipd(keys, prob=0.5, spatial_axis=0),
        RandFlipd(keys, prob=0.5, spatial_axis=1),
        RandRotate90d(keys, prob=0.5, max_k=3, spatial_axes=(0, 1)),
        RandAffined(keys, prob=0.5, rotate_range=[0.15] * (1 if rank == 2 else 3), scale_range=[0.1] * rank,
                    translate_range=[3] * rank, mode=["bilinear", "nearest"], padding_mode="border"),
        PairResolutionsd(scale, mode, source=source),
        RandScaleIntensityd(["image", "teacher_image"], factors=0.1, prob=0.5),
    ])


def center(image: torch.Tensor) -> np.ndarray:
    """Center of mass of what is bright, in voxels."""
    return np.array(ndimage.center_of_mass(np.clip(image[0].numpy() - 0.01, 0, None)))


@pytest.mark.parametrize(("mode", "source"), [("native", "image"), ("native", "teacher_image"), ("upsampled", "image")])
@pytest.mark.parametrize(("shape", "scale"), [((48, 40), (4, 4)), ((24, 24, 16), (2, 2, 2)), ((20, 20, 24), (1, 1, 4))])
def test_teacher_and_student_see_the_bright_block_at_one_place_in_100_random_draws(
    shape: tuple[int, ...], scale: tuple[int, ...], mode: str, source: str
) -> None:
    chain, random = random_chain(source, scale, mode), np.random.RandomState(0)
    chain.set_random_state(0)
    moved = 0
    for _ in range(100):
        image = torch.zeros(1, *shape)
        corner = [random.randint(0.2 * length, 0.65 * length) for length in shape]
        image[(0, *(slice(at, at + 4) for at in corner))] = 1.0
        pair = chain({source: image + 0.001 * torch.rand(image.shape), "label": image})
        teacher, student = pair["teacher_image"], pair["image"]
        expected = slow_average(teacher.numpy(), scale)
        if mode == "native":
            assert student.argmax() == expected.argmax()
            np.testing.assert_allclose(student, expected, atol=1e-5)
            assert student.mean().item() == pytest.approx(teacher.mean().item(), rel=1e-5)
        else:
            assert student.shape == teacher.shape
            np.testing.assert_allclose(center(student), center(teacher), atol=0.1 * max(scale))
        assert (pair["label"].as_tensor() * teacher.as_tensor()).sum() > 0.5 * teacher.sum() - 0.001 * teacher.numel()
        moved += teacher.shape != image.shape or bool((teacher.as_tensor() - image).abs().max() > 0.5)
    assert moved > 50                                               # else the chain would prove nothing


def test_independent_chains_would_fail_that_test() -> None:
    """What the pairing prevents: the same steps drawn twice."""
    steps = Compose([RandFlipd("image", prob=0.5, spatial_axis=0), RandRotate90d("image", prob=0.5)])
    steps.set_random_state(0)
    image = torch.zeros(1, 16, 16)
    image[0, 2:4, 9:11] = 1.0
    apart = 0
    for _ in range(20):
        first, second = (area_average(steps({"image": image})["image"].as_tensor(), (2, 2)) for _ in range(2))
        apart += int(first.argmax() != second.argmax())
    assert apart > 5


def test_the_pair_has_affines_of_one_tissue_and_the_teacher_that_of_the_file() -> None:
    image = MetaTensor(torch.rand(1, 4, 6, 8), affine=rotated())
    pair = PairResolutionsd((2, 2, 4))({"image": image})
    assert torch.equal(pair["teacher_image"].as_tensor(), image.as_tensor())
    assert torch.equal(pair["teacher_image"].affine, rotated())
    for corner in ((0, 0, 0), (2, 3, 2)):                           # the edges of voxels, where both boxes end
        low, full = (torch.tensor([*np.multiply(corner, step), 2.0], dtype=torch.float64) - 0.5
                     for step in ((1, 1, 1), (2, 2, 4)))
        low[-1] = full[-1] = 1.0
        torch.testing.assert_close(pair["image"].affine @ low, rotated() @ full)
