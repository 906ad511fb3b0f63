# SPDX-License-Identifier: Apache-2.0
"""Files of all kinds, read as they are meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from PIL import Image

from medkd.inference.pictures import GrayFromColord
from medkd.inference.reading import ChannelsFirstd, LoadImageFilesd

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (17, 19)).astype(np.uint8)
COLOR = RNG.integers(0, 256, (17, 19, 3)).astype(np.uint8)
IDS = (GRAY // 50).astype(np.int64)
VOXELS = RNG.integers(1, 256, (6, 10, 12)).astype(np.uint8)


def read(path: Path, **options: Any) -> MetaTensor:
    image: MetaTensor = LoadImageFilesd("image", **options)({"image": str(path)})["image"]
    return image


def read_label(path: Path, **options: Any) -> MetaTensor:
    return read(path, dtype=torch.int64, is_label=True, **options)


def rows(image: MetaTensor) -> np.ndarray:
    """Rows and columns of a picture, as Python has them."""
    pixels = image.numpy().transpose(2, 1, 0)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def palette() -> Image.Image:
    """Colors whose indices say nothing of their brightness."""
    picture = Image.fromarray(GRAY // 64, "P")
    picture.putpalette([250, 250, 250, 10, 10, 10, 180, 170, 160, 60, 90, 30])
    return picture


SHOWN: dict[str, tuple[Callable[[Path], Any], np.ndarray]] = {
    "palette.png": (lambda path: palette().save(path), np.asarray(palette().convert("RGB"))),
    "palette.bmp": (lambda path: palette().save(path), np.asarray(palette().convert("RGB"))),
    "palette.tif": (lambda path: palette().save(path), np.asarray(palette().convert("RGB"))),
    "bit.png": (lambda path: Image.fromarray(GRAY > 99).save(path), np.where(GRAY > 99, 255, 0)),
    "bit.tif": (lambda path: tifffile.imwrite(path, GRAY > 99, photometric="minisblack"), np.where(GRAY > 99, 255, 0)),
    "fax.tif": (
        lambda path: Image.fromarray(GRAY > 99).save(path, compression="group4"), np.where(GRAY > 99, 255, 0)
    ),
    "bitwhite.tif": (
        lambda path: tifffile.imwrite(path, GRAY > 99, photometric="miniswhite"), np.where(GRAY > 99, 0, 255)
    ),
    "white.tif": (lambda path: tifffile.imwrite(path, GRAY, photometric="miniswhite"), 255 - GRAY),
    "white16.tif": (
        lambda path: tifffile.imwrite(path, GRAY.astype(np.uint16) * 200, photometric="miniswhite"),
        65535 - GRAY.astype(np.uint16) * 200,
    ),
    "color16.tif": (
        lambda path: tifffile.imwrite(path, COLOR.astype(np.uint16) * 200, photometric="rgb"),
        COLOR.astype(np.uint16) * 200,
    ),
    "half.tif": (lambda path: tifffile.imwrite(path, GRAY.astype(np.float16)), GRAY),
    "double.tif": (lambda path: tifffile.imwrite(path, GRAY.astype(np.float64)), GRAY),
    "long.tif": (lambda path: tifffile.imwrite(path, GRAY.astype(np.int64)), GRAY),
    "signed.tif": (lambda path: tifffile.imwrite(path, (GRAY // 2).astype(np.int8) - 20), GRAY // 2 - 20.0),
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("unit", [None, "mm"])
def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path: Path, name: str, unit: Any) -> None:
    write, shown = SHOWN[name]
    write(tmp_path / name)
    found = read(tmp_path / name, unit=unit)
    assert np.array_equal(rows(found), shown.astype(np.float32))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_print_colors_become_light(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    ink = Image.merge("CMYK", [Image.fromarray(np.zeros_like(ramp))] * 3 + [Image.fromarray(ramp)])
    ink.save(tmp_path / f"a.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    gray = rows(GrayFromColord("image")({"image": read(tmp_path / f"a.{suffix}")})["image"])
    np.testing.assert_allclose(gray, 255.0 - ramp, atol=4)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("gray.png", lambda path: Image.fromarray(GRAY).save(path)),
        ("gray16.png", lambda path: Image.fromarray(GRAY.astype(np.uint16) * 99).save(path)),
        ("alpha.png", lambda path: Image.fromarray(np.stack([GRAY, GRAY], -1), "LA").save(path)),
        ("color.png", lambda path: Image.fromarray(COLOR).save(path)),
        ("color.jpg", lambda path: Image.fromarray(COLOR).save(path)),
        ("gray.tif", lambda path: tifffile.imwrite(path, GRAY)),
        ("color.tif", lambda path: tifffile.imwrite(path, COLOR, photometric="rgb")),
        ("planar.tif", lambda path: tifffile.imwrite(
            path, COLOR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")),
        ("lzw.tif", lambda path: Image.fromarray(GRAY).save(path, compression="tiff_lzw")),
        ("tiled.tif", lambda path: tifffile.imwrite(path, np.pad(GRAY, (0, 15)), tile=(16, 16))),
        ("float.tif", lambda path: tifffile.imwrite(path, GRAY.astype(np.float32) / 7)),
        ("short.tif", lambda path: tifffile.imwrite(path, GRAY.astype(np.int16) - 300)),
    ],
)
def test_what_was_read_rightly_before_stays_the_same_bit_for_bit(
    tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    write(tmp_path / name)
    before = LoadImage(ensure_channel_first=True)(tmp_path / name)
    for unit in (None, "mm"):
        found = read(tmp_path / name, unit=unit)
        assert torch.equal(found.as_tensor(), before.as_tensor())
        assert torch.equal(found.affine, before.affine)


def test_labels_keep_the_numbers_of_a_palette_and_of_inverted_gray(tmp_path: Path) -> None:
    palette().save(tmp_path / "a.png")
    palette().save(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", IDS.astype(np.uint8), photometric="miniswhite")
    tifffile.imwrite(tmp_path / "mask.tif", IDS > 2)                 # which tifffile declares inverted
    assert np.array_equal(rows(read_label(tmp_path / "mask.tif")), IDS > 2)
    for name in ("a.png", "a.tif"):
        assert np.array_equal(rows(read_label(tmp_path / name)), GRAY // 64)
        assert np.array_equal(rows(read(tmp_path / name, is_label=True)), GRAY // 64)
    assert np.array_equal(rows(read_label(tmp_path / "b.tif")), IDS)


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_labels_of_64_bits_lie_on_pictures_that_itk_reads(tmp_path: Path, kind: type[Any]) -> None:
    tifffile.imwrite(tmp_path / "label.tif", (IDS * 2**40).astype(kind), resolution=(300, 150), resolutionunit="INCH")
    tifffile.imwrite(tmp_path / "image.tif", GRAY, resolution=(300, 150), resolutionunit="INCH")
    label, image = read_label(tmp_path / "label.tif"), read(tmp_path / "image.tif")
    assert np.array_equal(rows(label), IDS * 2**40)
    assert label.dtype == torch.int64
    torch.testing.assert_close(label.affine, image.affine)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([0, 2**63], np.uint64), r"numbers up to 9,223,372,036,854,775,807, got 9,223,372,036,854,775,808"),
        (np.array([0.0, 1.5], np.float32), "must have whole numbers, got 1.5; .*nearest-neighbor"),
        (np.array([0.0, np.nan], np.float32), "must have whole numbers, got nan"),
        (np.array([0.0, 2**24 + 4], np.float32), r"numbers up to 16,777,216 as float32, got 16777220, where this type"),
    ],
)
def test_numbers_that_a_type_of_instances_cannot_hold_are_refused(
    tmp_path: Path, values: np.ndarray, said: str
) -> None:
    nib.save(nib.Nifti1Image(np.tile(values, (4, 5, 1)), np.eye(4), dtype=values.dtype), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=rf"a\.nii\.gz .*{said}"):
        read_label(tmp_path / "a.nii.gz")
    if np.isfinite(values).all():
        assert read(tmp_path / "a.nii.gz").dtype == torch.float32


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_with_values_that_are_no_numbers_is_refused(tmp_path: Path, value: float) -> None:
    voxels = np.ones((4, 5, 6), np.float32)
    voxels[1, 2, 3] = value
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"a\.nii\.gz must have finite values, got 1 NaN or infinite voxels; replace"):
        read(tmp_path / "a.nii.gz")


def save_nifti(path: Path, spacing: tuple[float, ...], unit: str) -> Path:
    file = nib.Nifti1Image(VOXELS, np.diag([*spacing, 1.0]))
    file.header.set_xyzt_units(unit)
    nib.save(file, path)
    return path


@pytest.mark.parametrize(
    ("spacing", "declared", "unit", "expected"),
    [
        ((3e-05, 6e-06, 6e-06), "mm", "nm", (30, 6, 6)),
        ((0.03, 0.006, 0.006), "micron", "nm", (30, 6, 6)),
        ((3e-08, 6e-09, 6e-09), "meter", "nm", (30, 6, 6)),
        ((30, 6, 6), "mm", "nm", (30, 6, 6)),
        ((30, 6, 6), "unknown", "nm", (30, 6, 6)),
        ((1500, 1500, 3000), "micron", "mm", (1.5, 1.5, 3)),
        ((0.0015, 0.0015, 0.003), "meter", "mm", (1.5, 1.5, 3)),
        ((1.5, 1.5, 3), "mm", "mm", (1.5, 1.5, 3)),
    ],
)
def test_the_affine_of_a_nifti_is_in_the_unit_of_the_bundle(
    tmp_path: Path, spacing: tuple[float, ...], declared: str, unit: Any, expected: tuple[float, ...]
) -> None:
    image = read(save_nifti(tmp_path / "a.nii.gz", spacing, declared), unit=unit)
    assert np.diag(image.affine).tolist() == [*expected, 1.0]
    np.testing.assert_allclose(np.diag(image.meta["original_affine"])[:3], spacing, rtol=1e-6)
    assert np.array_equal(image[0].numpy(), VOXELS)


def test_the_whole_affine_is_scaled_and_without_a_unit_nothing(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 5e-6, 1e-3], [0, -4e-6, 0, -2e-3], [4e-5, 0, 0, 3e-3], [0, 0, 0, 1.0]])
    file = nib.Nifti1Image(VOXELS, affine)
    file.header.set_xyzt_units("mm")
    nib.save(file, tmp_path / "a.nii.gz")
    scaled = read(tmp_path / "a.nii.gz", unit="nm").affine.numpy()
    np.testing.assert_allclose(scaled[:3], affine[:3] * 1e6, rtol=1e-5)
    np.testing.assert_allclose(read(tmp_path / "a.nii.gz").affine.numpy(), affine, rtol=1e-6)


def test_a_given_spacing_takes_the_place_of_that_of_the_file(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", (1, 1, 1), "unknown")
    assert np.diag(read(path, unit="nm", spacing=[30, 6, 6]).affine)[:3].tolist() == [30, 6, 6]
    with pytest.raises(ValueError, match=r"`spacing` must be 3 lengths above 0, got \[30\.0, 6\.0\]"):
        read(path, unit="nm", spacing=[30, 6])


TIFF_STACKS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "plain": ({}, (1, 1, 1)),
    "imagej": (
        {"imagej": True, "resolution": (1 / 0.006, 1 / 0.006),
         "metadata": {"spacing": 0.03, "unit": "um", "axes": "ZYX"}},
        (30, 6, 6),
    ),
    "ome": (
        {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 6, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 6,
                                   "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": 0.03, "PhysicalSizeZUnit": "\u00b5m"}},
        (30, 6, 6),
    ),
    "dots": ({"resolution": (72, 72), "resolutionunit": "INCH"}, (1, 1, 1)),
}


@pytest.mark.parametrize("kind", TIFF_STACKS)
def test_a_tiff_stack_of_em_is_a_volume_with_sections_first(tmp_path: Path, kind: str) -> None:
    options, spacing = TIFF_STACKS[kind]
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    tifffile.imwrite(path, VOXELS, **options)
    image = read(path, unit="nm", spatial_dims=3)
    assert np.array_equal(image[0].numpy(), VOXELS)
    if kind != "dots":
        np.testing.assert_allclose(np.diag(image.affine)[:3], spacing, rtol=1e-6)
    tifffile.imwrite(tmp_path / "label.tif", VOXELS.astype(np.int64) * 2**35)
    label = read_label(tmp_path / "label.tif", unit="nm")
    assert np.array_equal(label[0].numpy(), VOXELS.astype(np.int64) * 2**35)


def test_gray_stored_as_colors_is_gray_and_colors_are_refused_in_a_volume(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "gray.tif", np.stack([VOXELS] * 3, -1), photometric="rgb")
    assert np.array_equal(read(tmp_path / "gray.tif", unit="nm")[0].numpy(), VOXELS)
    tifffile.imwrite(tmp_path / "color.tif", np.stack([VOXELS, VOXELS, 255 - VOXELS], -1), photometric="rgb")
    with pytest.raises(ValueError, match=r"color\.tif must have one channel, got 3 that differ"):
        read(tmp_path / "color.tif", unit="nm")


def test_axes_of_one_voxel_are_dropped_for_pictures_and_added_for_volumes(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(GRAY[..., None], np.eye(4)), tmp_path / "thick.nii.gz")
    nib.save(nib.Nifti1Image(GRAY, np.eye(4)), tmp_path / "flat.nii.gz")
    for name in ("thick", "flat"):
        path = tmp_path / f"{name}.nii.gz"
        assert read(path, spatial_dims=2).shape == (1, *GRAY.shape)
        assert read(path, spatial_dims=3).shape == (1, *GRAY.shape, 1)
    assert list(read(tmp_path / "thick.nii.gz", spatial_dims=2).meta["spatial_shape"]) == [*GRAY.shape]
    path = save_nifti(tmp_path / "volume.nii.gz", (1, 1, 1), "mm")
    with pytest.raises(ValueError, match=r"volume\.nii\.gz must have 2 spatial axes, got \(6, 10, 12\); save"):
        read(path, spatial_dims=2)


def test_what_a_server_hands_in_stays_and_channels_come_first_once(tmp_path: Path) -> None:
    tensor = MetaTensor(torch.zeros(4, 5, 6), meta={"original_channel_dim": float("nan")})
    assert LoadImageFilesd("image", unit="nm", spatial_dims=3)({"image": tensor})["image"] is tensor
    path = save_nifti(tmp_path / "a.nii.gz", (1, 1, 1), "mm")
    first = ChannelsFirstd("image")
    assert first(LoadImageFilesd("image")({"image": str(path)}))["image"].shape == (1, *VOXELS.shape)
    assert first({"image": tensor})["image"].shape == (1, 4, 5, 6)
    loader = LoadImageFilesd("image")
    loader._loader.image_only = False                              # as MONAI Label sets it
    assert loader({"image": str(path)}).keys() == {"image", "image_meta_dict"}
    assert LoadImageFilesd("label", allow_missing_keys=True)({"image": 1}) == {"image": 1}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.nii.gz", r"none\.nii\.gz must be there to be read, got no such file"),
        ("cut.nii.gz", r"cut\.nii\.gz must be a readable image, got 'Compressed file ended.*'; it is cut: copy it"),
        ("text.png", r"text\.png must be a readable image, got .cannot identify.*it is no such file"),
        ("text.tif", r"text\.tif must be a readable image, got 'Could not create IO object.*it is no such file"),
        ("text.h5", r"text\.h5 must be HDF5, got another or a damaged file"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason_and_the_way_out(tmp_path: Path, name: str, said: str) -> None:
    pytest.importorskip("h5py")
    nib.save(nib.Nifti1Image(RNG.integers(0, 255, (40, 40, 40)).astype(np.uint8), np.eye(4)), tmp_path / "cut.nii.gz")
    cut(tmp_path / "cut.nii.gz")
    for suffix in ("png", "tif", "h5"):
        (tmp_path / f"text.{suffix}").write_text("no picture " * 20)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
