# SPDX-License-Identifier: Apache-2.0
"""Values of images: the window of intensities, channels, modes of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from monai.data.image_reader import PILReader
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from medkd.data.check import DataError, check_data

Write = Callable[..., dict[str, Any]]
HU_WINDOW = (-200, 300)


def hounsfield(seed: int = 0) -> np.ndarray:
    """Air around soft tissue with fat and bone."""
    rng = np.random.default_rng(seed)
    values = np.full((20, 20, 20), -1000, np.int16)
    values[4:16, 4:16, 4:16] = rng.normal(40, 30, (12, 12, 12))
    values[4:16, 4:16, 4:6] = rng.normal(-100, 10, (12, 12, 2))
    values[9:11, 9:11, 4:16] = rng.normal(700, 100, (2, 2, 12))
    return values


def eight_bit(seed: int = 0) -> np.ndarray:
    return np.clip(hounsfield(seed) / 4 + 100, 0, 255).astype(np.uint8)


def windowed(volume: Write, image: np.ndarray, window: tuple[int, int] = HU_WINDOW) -> None:
    items = [volume(name, hounsfield(number)) for number, name in enumerate("ab")]
    if window != HU_WINDOW:
        items = [volume(name, eight_bit(number)) for number, name in enumerate("ab")]
    check_data([items[0], volume("bad", image)], [items[1]], intensity_range=window)


def test_hounsfield_units_pass_the_window(volume: Write) -> None:
    windowed(volume, hounsfield(3))
    windowed(volume, hounsfield(3).astype(np.float32))


def test_ct_with_a_body_of_two_percent_passes(volume: Write) -> None:
    image = np.full((40, 40, 40), -1000, np.int16)
    image[:11, :11, :12] = np.random.default_rng(0).normal(40, 30, (11, 11, 12))    # 2.3 %
    windowed(volume, image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((hounsfield() + 1000) / 2000, r"got -?0\S* to 0\.\d+, like values scaled to 0..1, of which .* makes one gray"),
        (hounsfield() / 500.0, r"got -2 to .*, of which the window makes one gray; undo the scaling"),
        ((hounsfield() + 1024).astype(np.uint16), r"got 24 to \d+, like HU \+ 1024 without a sign; subtract 1024"),
        (
            (np.where(hounsfield() > -900, 3000, -1000) + np.arange(20)).astype(np.int16),
            r"got -1000 to 3015 with 0.0% of the voxels inside",
        ),
    ],
)
def test_values_in_another_unit_than_the_window_are_refused(volume: Write, image: np.ndarray, message: str) -> None:
    message = f"bad_image.nii.gz must have its values in `intensity_range`, -200 to 300, {message}"
    with pytest.raises(DataError, match=message):
        windowed(volume, np.asarray(image, np.float32 if image.dtype.kind == "f" else image.dtype))


def test_slices_of_16_bit_are_refused_for_a_window_of_8_bit(volume: Write) -> None:
    windowed(volume, eight_bit(3), (0, 255))
    with pytest.raises(DataError, match=r"0 to 255, got 24 to \d+ with \d+% of the voxels outside, like 12 or 16 bit"):
        windowed(volume, (hounsfield() + 1024).astype(np.uint16), (0, 255))
    with pytest.raises(DataError, match="0 to 255, got .*scaled to 0..1"):
        windowed(volume, np.clip((hounsfield() + 1000) / 2000, 0, 1).astype(np.float32), (0, 255))


def test_scaled_images_are_told_of_without_a_window(volume: Write, caplog: pytest.LogCaptureFixture) -> None:
    items = [volume(name, np.float32(np.clip((hounsfield(n) + 1000) / 2000, 0, 1))) for n, name in enumerate("ab")]
    check_data(items[:1], items[1:])
    assert "2 of 2 images have values in 0..1: they were scaled, and a bundle with a fixed window" in caplog.text


def test_images_of_8_bit_are_told_of_for_a_window_of_hounsfield_units(
    volume: Write, caplog: pytest.LogCaptureFixture
) -> None:
    items = [volume("a", hounsfield()), volume("b", eight_bit())]
    check_data(items[:1], items[1:], intensity_range=HU_WINDOW)
    assert "1 of 2 images look like 8 bit, windowed before, and not like the values of `intensity_range`" in caplog.text
    caplog.clear()
    check_data([volume("c", eight_bit())], items[1:], intensity_range=(0, 255))
    assert "8 bit" not in caplog.text


def test_image_of_three_channels_is_refused_by_name(volume: Write) -> None:
    gray = np.random.default_rng(0).integers(0, 99, (8, 9, 10)).astype(np.uint8)
    colors = volume("bad", np.stack([gray] * 3, -1), np.uint8(gray > 50))
    with pytest.raises(DataError, match=r"bad_image.nii.gz must have 1 channel\(s\), got 3; save it in gray"):
        check_data([volume("a", gray), colors], [volume("b", gray)], channels=[1], spatial_dims=3)


def test_channels_that_a_reader_makes_colors_of_are_counted(picture: Write) -> None:
    rng = np.random.default_rng(0)
    label, five = rng.integers(0, 3, (14, 12)).astype(np.uint8), rng.integers(0, 99, (14, 12, 5)).astype(np.uint8)
    item = picture("five", five, label, ".tif", photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"five.tif must have 1 or 3 or 4 channel\(s\), got 5"):
        check_data([item], [picture("a", five[..., 0].copy(), label)], channels=[1, 3, 4])


def test_pages_of_a_tiff_are_refused_for_a_picture(picture: Write) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (14, 12)).astype(np.uint8)
    flat = rng.integers(0, 99, (14, 12)).astype(np.uint8)
    pages = picture("pages", rng.integers(0, 99, (3, 14, 12)).astype(np.uint8), label, ".tif", photometric="minisblack")
    with pytest.raises(DataError, match=r"pages.tif must have 2 spatial axes, .*save its 3 pages as files"):
        check_data([picture("a", flat, label), pages], [picture("b", flat, label)], spatial_dims=2)


# modes of pictures

RNG = np.random.default_rng(0)
GRAY = np.kron(RNG.integers(0, 256, (6, 5)), np.ones((4, 4))).astype(np.uint8)
RGB = np.kron(RNG.integers(0, 256, (6, 5, 3)), np.ones((4, 4, 1))).astype(np.uint8)
LABEL = np.kron(np.arange(30).reshape(6, 5), np.ones((4, 4))).astype(np.uint16)
CONVERTED = {
    "palette": (Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE), ".png", "a palette"),
    "print": (Image.fromarray(RGB).convert("CMYK"), ".jpg", "CMYK colors"),
}
BY_MEANING = Compose([
    LoadImaged("image", reader=PILReader(converter=lambda picture: picture.convert("RGB"))),
    LoadImaged("label", allow_missing_keys=True),
    EnsureChannelFirstd(["image", "label"], allow_missing_keys=True),
])


@pytest.mark.parametrize("case", CONVERTED)
def test_colors_that_the_reader_takes_for_gray_are_refused(
    picture: Write, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    image, ending, mode = CONVERTED[case]
    lists = [[picture("bad", image, LABEL, ending)], [picture("a", GRAY, LABEL)]]
    with pytest.raises(DataError, match=f"bad{ending} must be gray or RGB, got {mode}, which the reader takes for"):
        check_data(*lists)
    caplog.set_level("INFO", "medkd")
    check_data(*lists, loading=BY_MEANING)
    assert f"Pictures with {mode} are read as what they show: " in caplog.text


def test_inverted_gray_is_refused_where_the_reader_does_not_invert_it(picture: Write) -> None:
    upside = picture("bad", GRAY, LABEL, ".tif", photometric="miniswhite")
    with pytest.raises(DataError, match="bad.tif must be gray or RGB, got white as 0, which the reader takes for"):
        check_data([upside], [picture("a", GRAY, LABEL)])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "I;16", "1"])
def test_common_modes_pass(picture: Write, mode: str) -> None:
    image = Image.fromarray(GRAY.astype(np.uint16) * 99) if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    check_data([picture("a", image, LABEL)], [picture("b", GRAY, LABEL)])
