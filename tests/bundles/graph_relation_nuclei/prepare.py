# SPDX-License-Identifier: Apache-2.0
"""Preparing public sets; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from monai.transforms import LoadImage
from PIL import Image

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from medkd.data.check import check_data
from medkd.data.datalist import load_datalist
from scripts.prepare import CVPPP_VALIDATION, main, prepare_bbbc039, prepare_celegans, prepare_cvppp

SHAPE = (24, 30)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def check(path: Path) -> dict[str, list[dict[str, str]]]:
    lists = {name: load_datalist(path, name) for name in ("training", "validation", "test", "unlabeled")}
    check_data(**lists, spatial_dims=2)
    assert json.loads(path.read_text())["labels"] == {}
    assert "data_root" not in path.read_text()
    return lists


def stems(items: Iterable[dict[str, str]]) -> list[str]:
    return [Path(item["image"]).stem for item in items]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def drawn(*boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    """Boxes (top, bottom, left, right, value) on 0, later ones over earlier ones."""
    picture = np.zeros(SHAPE, np.uint8)
    for top, bottom, left, right, value in boxes:
        picture[top:bottom, left:right] = value
    return picture


# two that touch, of different values; one apart, of the first one's value again; a micronucleus of 4 pixels
NUCLEI = drawn((2, 10, 2, 10, 1), (2, 10, 10, 18, 2), (14, 20, 3, 9, 1), (21, 23, 26, 28, 3))


def bbbc039(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    lists = {"training": 4, "validation": 2, "test": 3}
    for name in ("images", "masks", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, (name, count) in enumerate(lists.items()):
        cases = [f"IXMtest_A{number:02d}_s{case}_w1-0F-{name}" for case in range(count)]
        (folder / f"metadata/{name}.txt").write_text("".join(f"{case}.png\n" for case in cases))
        for case in cases:
            image = generator.integers(100, 1000, SHAPE).astype(np.uint16)
            image[0, :2] = 90, 4095
            tifffile.imwrite(folder / f"images/{case}.tif", image)
            other = np.full(SHAPE, 255, np.uint8)                  # blue and alpha say nothing
            mask = np.stack([NUCLEI, np.zeros_like(NUCLEI), other, other], axis=-1)
            Image.fromarray(mask).save(folder / f"masks/{case}.png")
    (folder / "images/unused.tif").write_bytes(b"")
    return folder


def test_bbbc039_keeps_its_lists_and_numbers_nuclei_by_value_and_connection(tmp_path: Path) -> None:
    source = bbbc039(tmp_path / "source")
    before = files(source)
    lists = check(prepare_bbbc039(source, tmp_path / "data"))
    assert files(source) == before
    assert {name: len(items) for name, items in lists.items()} == {
        "training": 4, "validation": 2, "test": 3, "unlabeled": 0
    }
    assert stems(lists["validation"]) == ["IXMtest_A01_s0_w1-0F-validation", "IXMtest_A01_s1_w1-0F-validation"]
    label = pixels(lists["test"][0]["label"])
    assert label.dtype == np.uint16
    expected = drawn((2, 10, 2, 10, 1), (2, 10, 10, 18, 2), (14, 20, 3, 9, 3))
    assert np.array_equal(label, expected)


def test_micronuclei_are_kept_if_asked_for(tmp_path: Path) -> None:
    lists = check(prepare_bbbc039(bbbc039(tmp_path / "source"), tmp_path / "data", min_size=0))
    assert np.unique(pixels(lists["test"][0]["label"])).tolist() == [0, 1, 2, 3, 4]


def test_sixteen_bits_become_eight_from_the_darkest_to_the_brightest_pixel(tmp_path: Path) -> None:
    source = bbbc039(tmp_path / "source")
    lists = check(prepare_bbbc039(source, tmp_path / "data"))
    image = pixels(lists["training"][0]["image"])
    raw = tifffile.imread(source / "images" / f"{stems(lists['training'])[0]}.tif").astype(float)
    assert image.dtype == np.uint8
    assert image[0, :2].tolist() == [0, 255]
    assert np.abs(image - (raw - 90) / (4095 - 90) * 255).max() <= 0.5


def test_bbbc039_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    source, output = bbbc039(tmp_path / "source"), tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=r"`source` must be a folder, got '.*none'; unpack the archive\."):
        prepare_bbbc039(tmp_path / "none", output)
    for inside in (source, source / "data"):
        with pytest.raises(ValueError, match=r"`output` must lie outside .*source, which stays as it is, got"):
            prepare_bbbc039(source, inside)
    mask = next((source / "masks").glob("*test.png"))
    Image.fromarray(NUCLEI[1:]).save(mask)
    with pytest.raises(ValueError, match=r"The label of IXMtest.* shape of its picture, \(24, 30\), got \(23, 30\)\."):
        prepare_bbbc039(source, output)
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"`source` must hold IXMtest_A02_.*test.png, got no .*masks"):
        prepare_bbbc039(source, output)
    (source / "metadata/test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold metadata/test.txt, got no .*; unpack metadata.zip\."):
        prepare_bbbc039(source, output)
    assert not (output / "datalist.json").exists()


LEAVES = drawn((4, 12, 4, 12, 3), (8, 16, 10, 20, 7))


def plant(folder: Path, number: str, labeled: bool = True) -> None:
    """A plant as the archives have it: color, foreground, and leaves as indices of a palette."""
    folder.mkdir(parents=True, exist_ok=True)
    color = np.stack([LEAVES * 20, LEAVES * 30, LEAVES + int(number) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(color).save(folder / f"plant{number}_rgb.png")
    Image.fromarray((LEAVES > 0).astype(np.uint8)).save(folder / f"plant{number}_fg.png")
    if labeled:
        label = Image.new("P", SHAPE[::-1])
        label.putdata(LEAVES.ravel().tolist())
        label.putpalette([0, 0, 0, *([200, 10, 10] * 255)])         # colors that tell no leaves apart
        label.save(folder / f"plant{number}_label.png")


def a1(folder: Path) -> Path:
    for number in (*CVPPP_VALIDATION, "001", "003", "160"):
        plant(folder, number)
    return folder


def test_cvppp_holds_out_the_plants_of_the_papers_code(tmp_path: Path) -> None:
    source = a1(tmp_path / "training/A1")
    before = files(source)
    lists = check(prepare_cvppp(source, tmp_path / "data"))
    assert files(source) == before
    assert stems(lists["training"]) == ["plant001", "plant003", "plant160"]
    assert stems(lists["validation"]) == [f"plant{number}" for number in CVPPP_VALIDATION]
    assert (lists["test"], lists["unlabeled"]) == ([], [])
    item = lists["training"][2]
    assert np.array_equal(pixels(item["image"]), pixels(source / "plant160_rgb.png"))
    assert np.array_equal(pixels(item["label"]), drawn((4, 12, 4, 12, 1), (8, 16, 10, 20, 2)))


def test_without_background_instances_are_still_numbered_from_one_on(tmp_path: Path) -> None:
    source = a1(tmp_path / "A1")
    Image.fromarray(LEAVES + 4).save(source / "plant003_label.png")
    lists = check(prepare_cvppp(source, tmp_path / "data"))
    assert np.unique(pixels(lists["training"][1]["label"])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16", "tiff"])
def test_labels_are_read_in_every_way_that_numbers_are_stored(tmp_path: Path, mode: str) -> None:
    source = a1(tmp_path / "A1")
    path = source / "plant003_label.png"
    if mode == "I;16":
        Image.fromarray(LEAVES.astype(np.uint16) * 9_000).save(path)
    elif mode == "tiff":
        Image.fromarray(LEAVES.astype(np.int32) * 100_000).save(path, format="tiff")
    elif mode != "P":
        Image.fromarray(LEAVES).convert(mode).save(path)
    lists = check(prepare_cvppp(source, tmp_path / "data"))
    label = pixels(next(item["label"] for item in lists["training"] if "plant003" in item["label"]))
    assert np.array_equal(label, np.searchsorted([0, 3, 7], LEAVES))


def test_more_instances_than_a_png_holds_are_kept(tmp_path: Path) -> None:
    source = a1(tmp_path / "A1")
    numbers = np.arange(270 * 260, dtype=np.int32).reshape(270, 260)
    Image.fromarray(np.zeros((270, 260, 3), np.uint8)).save(source / "plant003_rgb.png")
    Image.fromarray(numbers).save(source / "plant003_label.png", format="tiff")
    path = prepare_cvppp(source, tmp_path / "data")
    item = next(item for item in load_datalist(path, "training") if "plant003" in item["label"])
    assert item["label"].endswith("labels/plant003.tif")
    label = LoadImage(dtype=torch.int64)(item["label"])
    assert np.array_equal(label.numpy().T, numbers)


def gray_picture(path: Path, mode: str) -> np.ndarray:
    """One picture of gray values, stored in some way; the values."""
    gray = np.arange(24 * 30, dtype=np.uint8).reshape(SHAPE)
    if mode == "P":
        picture = Image.fromarray(255 - gray).convert("P")
        picture.putpalette([255 - place // 3 for place in range(768)])       # indices run against what they mean
    elif mode == "MINISWHITE":
        tifffile.imwrite(path, 255 - gray, photometric="miniswhite")
        return gray
    else:
        picture = Image.fromarray(gray).convert(mode)
    picture.save(path)
    return gray


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "MINISWHITE"])
def test_gray_pictures_are_read_in_every_way_that_they_are_stored(tmp_path: Path, mode: str) -> None:
    source = bbbc039(tmp_path / "source")
    name = "IXMtest_A00_s0_w1-0F-training"
    gray = gray_picture(source / f"images/{name}.tif", mode)
    lists = check(prepare_bbbc039(source, tmp_path / "data"))
    found = pixels(lists["training"][0]["image"])
    assert np.array_equal(found if found.ndim == 2 else found[..., 0], gray)
    assert found.ndim == 2 or (found == found[..., :1]).all()


def test_worms_fit_pictures_that_are_stored_in_colors(tmp_path: Path) -> None:
    images, masks = bbbc010(tmp_path, plate(20))
    for path in images.glob("1649*_w2_*.tif"):
        Image.fromarray(np.stack([WORMS[1]] * 3, axis=-1)).save(path)
    lists = check(prepare_celegans(images, masks, tmp_path / "data"))
    expected = drawn((3, 6, 2, 28, 1), (1, 20, 10, 13, 2), (15, 18, 20, 26, 3))
    assert np.array_equal(pixels(lists["test"][0]["label"]), expected)


def test_pictures_of_several_pages_are_refused_by_name(tmp_path: Path) -> None:
    source = bbbc039(tmp_path / "source")
    path = source / "images/IXMtest_A00_s0_w1-0F-training.tif"
    tifffile.imwrite(path, np.zeros((3, *SHAPE), np.uint16), photometric="minisblack")
    with pytest.raises(ValueError, match=r"s0_w1-0F-training.tif must be one picture, got 3 pages; save them as files"):
        prepare_bbbc039(source, tmp_path / "data")


def test_test_plants_without_a_label_are_unlabeled(tmp_path: Path) -> None:
    for number, labeled in (("004", False), ("005", True), ("006", False)):
        plant(tmp_path / "testing/A1", number, labeled)
    lists = check(prepare_cvppp(a1(tmp_path / "training/A1"), tmp_path / "data", tmp_path / "testing/A1"))
    assert stems(lists["test"]) == ["plant005"]
    assert stems(lists["unlabeled"]) == ["plant004", "plant006"]
    assert all("label" not in item for item in lists["unlabeled"])


def test_cvppp_that_is_not_a1_is_refused(tmp_path: Path) -> None:
    source, output = a1(tmp_path / "A1"), tmp_path / "data"
    with pytest.raises(ValueError, match=r"A1b must have other plants than .*A1, got some of the same name\."):
        prepare_cvppp(source, output, shutil.copytree(source, tmp_path / "A1b"))
    Image.fromarray(np.stack([LEAVES, LEAVES, LEAVES // 2], axis=-1)).save(source / "plant003_label.png")
    with pytest.raises(ValueError, match=r"label of plant003 must have one channel .*, got \(24, 30, 3\)\."):
        prepare_cvppp(source, output)
    (source / "plant003_label.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"`source` must hold plant003_label.png, got no .*A1"):
        prepare_cvppp(source, output)
    for number in ("016", "159"):
        (source / f"plant{number}_rgb.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"plants for validation, got none of plant016, plant159\."):
        prepare_cvppp(source, output)


WORMS = [drawn((3, 6, 2, 28, 255)), drawn((1, 20, 10, 13, 255)), drawn((15, 18, 20, 26, 255))]   # the first two cross


def bbbc010(folder: Path, wells: Iterable[str], without_worms: Iterable[str] = ()) -> tuple[Path, Path]:
    images, masks = folder / "BBBC010_v2_images", folder / "BBBC010_v1_foreground_eachworm"
    images.mkdir(parents=True)
    masks.mkdir()
    generator = np.random.default_rng(0)
    for well in wells:
        for channel, high in ((1, 300), (2, 4000)):
            image = generator.integers(0, high, SHAPE).astype(np.uint16)
            name = f"1649_1109_0003_Amp5-1_B_20070424_{well}_w{channel}_15ADF48D-C09E-47DE-B763-5BC479534681.tif"
            tifffile.imwrite(images / name, image)
        for number, worm in enumerate(WORMS if well not in without_worms else [], 1):
            Image.fromarray(np.stack([worm] * 3, axis=-1)).save(masks / f"{well}_{number:02d}_ground_truth.png")
    (images / "._1649_1109_0003_Amp5-1_B_20070424_A01_w2_15ADF48D.tif").touch()
    return images, masks


def plate(count: int) -> list[str]:
    return [f"{row}{column:02d}" for row in "ABCDE" for column in range(1, 25)][:count]


def test_celegans_splits_the_wells_in_their_order(tmp_path: Path) -> None:
    wells = plate(100)
    images, masks = bbbc010(tmp_path, reversed(wells))
    before = files(tmp_path)
    lists = check(prepare_celegans(images, masks, tmp_path / "data"))
    assert before.items() <= files(tmp_path).items()
    assert stems(lists["validation"]) == ["A10", "A20", "B06", "B16", "C02"]
    assert sorted(stems(lists["training"]) + stems(lists["validation"])) == wells[:50]
    assert stems(lists["test"]) == wells[50:]


def test_worms_are_numbered_and_the_later_one_lies_on_top(tmp_path: Path) -> None:
    lists = check(prepare_celegans(*bbbc010(tmp_path, plate(20)), tmp_path / "data"))
    expected = drawn((3, 6, 2, 28, 1), (1, 20, 10, 13, 2), (15, 18, 20, 26, 3))
    assert np.array_equal(pixels(lists["test"][0]["label"]), expected)


@pytest.mark.parametrize(("channel", "options"), [(2, []), (1, ["--channel", "1"])])
def test_bright_field_is_taken_unless_fluorescence_is_asked_for(
    tmp_path: Path, channel: int, options: list[str]
) -> None:
    images, masks = bbbc010(tmp_path, plate(20))
    assert main(["celegans", str(images), str(masks), str(tmp_path / "data"), *options]) == 0
    image = pixels(check(tmp_path / "data/datalist.json")["test"][0]["image"])
    raw = tifffile.imread(next(images.glob(f"1649*_A11_w{channel}_*.tif"))).astype(float)
    assert np.abs(image - (raw - raw.min()) / np.ptp(raw) * 255).max() <= 0.5


def test_wells_without_worms_are_unlabeled(tmp_path: Path) -> None:
    lists = check(prepare_celegans(*bbbc010(tmp_path, plate(22), ["A03", "A07"]), tmp_path / "data"))
    assert stems(lists["unlabeled"]) == ["A03", "A07"]
    assert [len(lists[name]) for name in ("training", "validation", "test")] == [9, 1, 10]


def test_bbbc010_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    images, masks = bbbc010(tmp_path, plate(20))
    output = tmp_path / "data"
    with pytest.raises(ValueError, match=r"must hold .*w2_.*, got 0 wells in .*eachworm and 0 in .*images; give"):
        prepare_celegans(masks, images, output)
    with pytest.raises(ValueError, match=r"`output` must lie outside .*eachworm, which stays as it is"):
        prepare_celegans(images, masks, masks)
    (tmp_path / "set/images").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"`output` must lie outside .*set/images, which stays as it is"):
        prepare_celegans(tmp_path / "set/images", masks, tmp_path / "set")
    Image.fromarray(WORMS[0][1:]).save(masks / "A04_02_ground_truth.png")
    with pytest.raises(ValueError, match=r"A04_02_ground_truth.png must have .* \(24, 30\), got \(23, 30\)\."):
        prepare_celegans(images, masks, output)
    next(images.glob("1649*_A05_w2_*.tif")).unlink()
    with pytest.raises(FileNotFoundError, match=r"a picture of each well with masks, got none of A05\."):
        prepare_celegans(images, masks, output)


def test_the_command_line_tells_errors_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["bbbc039", "none"], ["cvppp", "none", "--test", "no"], ["celegans", "none", "no"]):
        with pytest.raises(SystemExit, match="2"):
            main([*words, str(tmp_path / "data")])
        assert capsys.readouterr().err.startswith("python -m scripts.prepare: error: `source` must be a folder, got 'n")
