# SPDX-License-Identifier: Apache-2.0
"""The grid of a resampled volume begins at its first voxel, however the volume is turned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd
from scipy.spatial.transform import Rotation

from medkd.inference.spacing import ExactSpacingd, straightened

SPACING = (1.953124, 0.9765625, 3.27)


def header(degrees: tuple[float, float, float], spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    """An affine of a rotated volume as a NIfTI header holds it."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = [-120.7, 88.1, -881.3]
    return affine.astype(np.float32).astype(np.float64)


def volume(affine: np.ndarray) -> MetaTensor:
    values = torch.rand(1, 21, 34, 17, generator=torch.Generator().manual_seed(3))
    return MetaTensor(values, affine=torch.as_tensor(affine))


@pytest.mark.parametrize("degrees", [(5, 0, 0), (0, 10, 0), (0, 0, 20), (3, -7, 12), (31, 14, -8), (0.02, 0, 0.3)])
def test_a_rotated_volume_has_the_grid_of_the_same_voxels_without_rotation(degrees: tuple[float, ...]) -> None:
    transform = ExactSpacingd("image", (1.5, 1.5, 2.0))
    upright = transform({"image": volume(header((0, 0, 0)))})["image"]
    affine = header(degrees)
    turned = transform({"image": volume(affine)})["image"]
    assert turned.shape == upright.shape
    np.testing.assert_allclose(turned.affine[:3, 3], affine[:3, 3], atol=1e-5)   # its first voxel
    torch.testing.assert_close(turned.as_tensor(), upright.as_tensor(), rtol=0, atol=1e-4)


def test_a_volume_that_monai_moves_is_among_them() -> None:
    affine = header((3, -7, 12))
    moved = Spacingd("image", (1.5, 1.5, 2.0))({"image": volume(affine)})["image"]
    assert np.abs(moved.affine[:3, 3].numpy() - affine[:3, 3]).max() > 0.1


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_an_upright_volume_is_resampled_as_by_monai_bit_for_bit(signs: tuple[int, ...]) -> None:
    affine = header((0, 0, 0))
    affine[:3, :3] *= signs
    ours = ExactSpacingd("image", (1.5, 1.5, 2.0))({"image": volume(affine)})["image"]
    monais = Spacingd("image", (1.5, 1.5, 2.0))({"image": volume(affine)})["image"]
    assert torch.equal(ours.as_tensor(), monais.as_tensor())
    assert torch.equal(ours.affine, monais.affine)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (3, -7, 12)])
def test_the_inverse_has_the_affine_of_the_file(degrees: tuple[float, ...]) -> None:
    transform, affine = ExactSpacingd("image", (1.5, 1.5, 2.0)), header(degrees)
    image = volume(affine)
    back = transform.inverse(transform({"image": image}))["image"]
    assert back.shape == image.shape
    np.testing.assert_allclose(back.affine, affine, rtol=0, atol=0 if any(degrees) else 1e-12)
    np.testing.assert_array_equal(image.affine, affine)            # the input stays as it was


def test_a_shear_on_purpose_is_kept() -> None:
    tilted = header((0, 0, 0))
    tilted[1, 2] = 0.8                                             # the gantry of a CT scanner
    assert straightened(tilted) is tilted
    singular = header((5, 5, 5))
    singular[:3, 1] = 0
    assert straightened(singular) is singular


def test_what_has_no_affine_is_left_to_monai() -> None:
    with pytest.warns(UserWarning, match="not of type MetaTensor"):
        result = ExactSpacingd("image", (2.0, 2.0))({"image": torch.rand(1, 8, 8)})["image"]
    assert result.shape == (1, 4, 4)
