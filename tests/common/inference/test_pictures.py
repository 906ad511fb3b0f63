# SPDX-License-Identifier: Apache-2.0
"""Channels of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medkd.inference.pictures import GrayFromColord, PictureChannelsd, ThreeChannelsd

TRANSFORMS = [GrayFromColord, ThreeChannelsd]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_color_and_alpha_turn_to_gray(channels: int) -> None:
    gray = torch.tensor([[[10.0, 200.0]]])
    alpha = torch.full_like(gray, 255.0)
    colors = [gray - 10, gray, gray + 10]
    picture = torch.cat(([gray] if channels < 3 else colors) + ([alpha] if channels in (2, 4) else []))
    assert picture.shape[0] == channels
    assert torch.equal(GrayFromColord("image")({"image": picture})["image"], gray)


@pytest.mark.parametrize(("channels", "kept"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, MetaTensor])
def test_gray_is_repeated_and_transparency_is_dropped(kind: Callable[..., Any], channels: int, kept: list[int]) -> None:
    voxels = torch.arange(channels * 6, dtype=torch.uint8).reshape(channels, 2, 3)
    picture = kind(voxels)
    data = {"image": picture, "label": 1}
    result = ThreeChannelsd("image")(data)
    assert np.array_equal(np.asarray(result["image"]), voxels[kept].numpy())
    assert type(result["image"]) is type(picture)
    assert result["image"].dtype == picture.dtype
    assert data["image"] is picture
    assert picture.shape == (channels, 2, 3)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("channels", [1, 4])
def test_metadata_stay(transform: type[PictureChannelsd], channels: int) -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    picture = MetaTensor(torch.zeros(channels, 2, 3), affine=affine, meta={"filename_or_obj": "a.png"})
    result = transform("image")({"image": picture})["image"]
    assert torch.equal(result.affine, affine)
    assert result.meta["filename_or_obj"] == "a.png"


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_more_than_four_channels_are_no_picture(transform: type[PictureChannelsd]) -> None:
    with pytest.raises(ValueError, match="`image` must be a picture of 1 to 4 channels, got 5; save it as gray"):
        transform("image")({"image": torch.zeros(5, 2, 2)})


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_may_miss_its_key_only_if_told(transform: type[PictureChannelsd]) -> None:
    assert transform("image", allow_missing_keys=True)({"label": 1}) == {"label": 1}
    with pytest.raises(KeyError, match="image"):
        transform("image")({"label": 1})
