# SPDX-License-Identifier: Apache-2.0
"""Contrast of pictures, also of nearly empty ones."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRangePercentilesd
from numpy.typing import NDArray
from PIL import Image

from medkd.inference.contrast import StretchContrastd
from medkd.phantoms.nuclei import nuclei_phantom

Array = NDArray[Any]
DATA = Path(os.environ.get("MEDKD_DATA", Path(__file__).parents[4] / "shared/data"))
PLAIN = ScaleIntensityRangePercentilesd("image", 1.0, 99.8, 0.0, 1.0, clip=True)


def stretched(picture: Array, **options: Any) -> torch.Tensor:
    """A gray picture, stretched."""
    return stretched_colors(picture[None], **options)[0]


def stretched_colors(picture: Array, **options: Any) -> torch.Tensor:
    """A picture of shape (C, H, W), stretched; no warning is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.as_tensor(StretchContrastd("image", **options)({"image": picture})["image"])


def nucleus(shape: tuple[int, int] = (520, 696), radius: float = 9.0) -> Array:
    """One soft disk of 253 pixels, range [0, 1]."""
    row, column = np.mgrid[: shape[0], : shape[1]]
    return 1.0 / (1.0 + np.exp(np.hypot(row - 100, column - 120) - radius))   # type: ignore[no-any-return]


def assert_as_monai(picture: torch.Tensor) -> None:
    found, plain = StretchContrastd("image")({"image": picture})["image"], PLAIN({"image": picture})["image"]
    assert type(found) is type(plain)
    assert found.dtype == plain.dtype
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(plain))


@pytest.mark.parametrize("tiles", [1, 7])
@pytest.mark.parametrize("meta", [False, True])
def test_usual_pictures_are_scaled_as_by_monai_to_the_last_bit(tiles: int, meta: bool) -> None:
    """Above a million values, percentiles are those of another function."""
    for seed in range(4):
        image = torch.from_numpy(nuclei_phantom(seed, shape=(96, 112)).image).float()
        image = image.permute(2, 0, 1) if image.dim() == 3 else image[None].repeat(3, 1, 1)
        image = image.repeat(1, tiles, tiles)
        assert_as_monai(MetaTensor(image) if meta else image)


@pytest.mark.parametrize("picture", [nuclei_phantom(0, shape=(64, 64)).image, np.zeros((64, 64), np.uint8)])
def test_metadata_stays(picture: Array) -> None:
    image = MetaTensor(torch.from_numpy(picture).float().reshape(-1, 64, 64), meta={"filename_or_obj": "case.png"})
    assert StretchContrastd("image")({"image": image})["image"].meta["filename_or_obj"] == "case.png"
    assert image.max() == picture.max()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_bright_ground_becomes_dark_and_a_dark_one_stays(channels: int) -> None:
    tint = np.linspace(1.0, 0.6, channels)[:, None, None]
    dark = (200.0 * nucleus((160, 160)) * tint).astype(np.float32)
    bright = 255.0 - dark
    for picture, expected in ((dark, stretched_colors(dark)), (bright, 1.0 - stretched_colors(bright))):
        assert torch.equal(stretched_colors(picture, dark_ground=True), expected)
    found = stretched_colors(bright, dark_ground=True)
    assert found[:, 100, 120].min() > 0.5 > found[:, :40, :40].max()


def test_a_constant_picture_has_a_dark_ground() -> None:
    for value in (0.0, 255.0):
        assert not stretched(np.full((32, 32), value, np.float32), dark_ground=True).any()


def test_real_pictures_are_scaled_as_by_monai_to_the_last_bit() -> None:
    paths = sorted((DATA / "nuclei_dsb2018/images").glob("*.png"))[::32]
    if not paths:
        pytest.skip("nuclei_dsb2018 is not in the data folder; set MEDKD_DATA")
    for path in paths:
        pixels = np.asarray(Image.open(path), np.float32)
        assert_as_monai(torch.from_numpy(pixels[None].repeat(3, 0) if pixels.ndim == 2 else pixels[..., :3].T.copy()))


@pytest.mark.parametrize("deviation", [0.3, 1.0, 20.0, 300.0])
@pytest.mark.parametrize("level", [5.0, 500.0])
def test_noise_alone_stays_dim(deviation: float, level: float) -> None:
    noise = np.random.default_rng(0).normal(level, deviation, (300, 400))
    for picture in (np.rint(noise).astype(np.float32), noise.astype(np.float32)):
        assert stretched(picture).std() < 0.06
        assert stretched(picture).max() < 0.4


@pytest.mark.parametrize("value", [0.0, 1.0, 255.0, 65_535.0, -3.5])
def test_constant_picture_becomes_zero(value: float) -> None:
    found = stretched(np.full((40, 50), value, np.float32))
    assert found.dtype == torch.float32
    assert not found.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_smallest_pictures_have_a_result(size: tuple[int, int]) -> None:
    assert not stretched(np.full(size, 7.0, np.float32)).any()
    assert torch.isfinite(stretched(np.arange(np.prod(size), dtype=np.float32).reshape(size))).all()


@pytest.mark.parametrize(
    ("level", "deviation", "height"), [(10, 0, 100), (10, 2, 100), (500, 20, 4000), (0, 0, 200), (500, 20, 700)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_nucleus_spans_the_range_over_noise_that_is_dim(
    level: float, deviation: float, height: float, sign: int
) -> None:
    """Percentiles lie in the noise, as 253 of 361,920 pixels are above it; also a dark one on white."""
    shape = nucleus()
    noise = np.random.default_rng(0).normal(0.0, 1.0, shape.shape) * deviation
    picture = np.rint(sign * (level + noise + height * shape) + 60_000 * (sign < 0)).astype(np.float32)
    found = stretched(picture).numpy()
    inside, outside = found[shape > 0.9], found[shape < 0.01]
    assert abs(inside.mean() - outside.mean()) > 0.75
    assert outside.std() < 0.06


def test_hot_pixels_do_not_hide_the_nucleus() -> None:
    picture = np.rint(500 + 20 * np.random.default_rng(0).normal(0.0, 1.0, (520, 696)) + 4000 * nucleus())
    picture[[3, 200, 410], [50, 500, 20]] = 65_535
    found = stretched(picture.astype(np.float32)).numpy()
    assert found[nucleus() > 0.9].min() > 0.8


@pytest.mark.parametrize(("lower", "upper"), [(-1.0, 99.0), (50.0, 50.0), (1.0, 101.0)])
def test_percentiles_that_do_not_ascend_are_refused(lower: float, upper: float) -> None:
    with pytest.raises(ValueError, match=f"`lower` and `upper` must be ascending.*, got {lower} and {upper}"):
        StretchContrastd("image", lower, upper)


def test_key_may_be_missed_only_if_told() -> None:
    assert StretchContrastd("image", allow_missing_keys=True)({"label": 1}) == {"label": 1}
    with pytest.raises(KeyError, match="image"):
        StretchContrastd("image")({"label": 1})
