# SPDX-License-Identifier: Apache-2.0
"""Preparing CREMI and AC3/AC4; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

from __future__ import annotations

import builtins
import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from medkd.data.check import check_data
from medkd.data.datalist import load_datalist
from scripts import prepare
from scripts.prepare import main, prepare_ac3ac4, prepare_cremi

OUTSIDE, INVALID, TRANSPARENT = 2**64 - 3, 2**64 - 2, 2**64 - 1


def neuropil(sections: int, seed: int = 0, rows: int = 12, columns: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Gray values, and instance numbers whose borders are dark; they move from section to section."""
    generator = np.random.default_rng(seed)
    ids = np.empty((sections, rows, columns), np.int64)
    for section in ids:
        cuts = np.sort(generator.choice(np.arange(2, columns - 1), 2, replace=False))
        section[:] = 10 + 7 * np.searchsorted(cuts, np.arange(columns), side="right")
    image = generator.integers(150, 200, ids.shape).astype(np.uint8)
    image[:, :, 1:][ids[:, :, 1:] != ids[:, :, :-1]] = 20
    return image, ids


def cremi_file(path: Path, image: np.ndarray, ids: np.ndarray, offset: tuple[float, ...] | None = None) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.attrs["file_format"] = "0.2"
        file["volumes/raw"] = image
        file["volumes/labels/neuron_ids"] = ids.astype(np.uint64)
        for name in ("volumes/raw", "volumes/labels/neuron_ids"):
            file[name].attrs["resolution"] = (40.0, 4.0, 4.0)
        if offset:
            file["volumes/labels/neuron_ids"].attrs["offset"] = offset
    return path


def voxels(path: str) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def check(path: Path) -> dict[str, list[dict[str, str]]]:
    lists = {name: load_datalist(path, name) for name in ("training", "validation", "test", "unlabeled")}
    check_data(lists["training"], lists["validation"], test=lists["test"], spatial_dims=3)
    assert json.loads(path.read_text())["labels"] == {}
    assert "data_root" not in path.read_text()
    return lists


def test_cremi_becomes_a_slab_per_list_and_sample(tmp_path: Path) -> None:
    pairs = {name: neuropil(125, seed) for seed, name in enumerate("AB")}
    files = [cremi_file(tmp_path / f"sample_{name}_20160501.hdf", *pair) for name, pair in pairs.items()]
    before = [file.read_bytes() for file in files]
    lists = check(prepare_cremi(files, tmp_path / "data"))
    assert [file.read_bytes() for file in files] == before
    for name, start, stop in (("training", 0, 50), ("validation", 100, 125), ("test", 50, 100)):
        for item, (image, ids) in zip(lists[name], pairs.values(), strict=True):
            assert np.array_equal(voxels(item["image"]), image[start:stop])
            assert same_partition(voxels(item["label"]), ids[start:stop])
    assert lists["unlabeled"] == []
    assert Path(lists["test"][1]["image"]).name == "sample_B_20160501_050_100.nii.gz"


def test_headers_tell_the_spacing_and_the_place_of_a_slab(tmp_path: Path) -> None:
    file = cremi_file(tmp_path / "sample_A.hdf", *neuropil(125))
    item = check(prepare_cremi([file], tmp_path / "data"))["validation"][0]
    image, label = nib.load(item["image"]), nib.load(item["label"])
    assert image.header.get_zooms() == (40.0, 4.0, 4.0)
    assert image.affine[:3, 3].tolist() == [4000.0, 0.0, 0.0]
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.uint8, np.int32)
    assert np.array_equal(image.affine, label.affine)


def test_instances_of_a_slab_are_numbered_from_one_on_and_reserved_numbers_are_background(tmp_path: Path) -> None:
    image, ids = neuropil(125)
    ids = ids.astype(np.uint64)
    ids[:50][ids[:50] == 17] = 0
    ids[0, 0, :3] = [OUTSIDE, INVALID, TRANSPARENT]
    ids[60] = 2**40                                                # far above what int32 holds
    file = cremi_file(tmp_path / "sample_C.hdf", image, ids)
    lists = check(prepare_cremi([file], tmp_path / "data"))
    training, test = (voxels(lists[name][0]["label"]) for name in ("training", "test"))
    assert np.unique(training).tolist() == [0, 1, 2]
    assert training[0, 0, :3].tolist() == [0, 0, 0]
    assert np.array_equal(training == 0, np.isin(ids[:50], [0, OUTSIDE, INVALID, TRANSPARENT]))
    assert np.unique(test).tolist() == [1, 2, 3, 4]
    assert (test[10] == 4).all()


def test_the_labels_of_a_padded_sample_are_found_in_its_image(tmp_path: Path) -> None:
    image, ids = neuropil(125)
    padded = np.pad(image, ((38, 38), (9, 4), (5, 6)))
    file = cremi_file(tmp_path / "sample_A_padded.hdf", padded, ids, offset=(38 * 40.0, 9 * 4.0, 5 * 4.0))
    lists = check(prepare_cremi([file], tmp_path / "data"))
    assert np.array_equal(voxels(lists["test"][0]["image"]), image[50:100])


def test_a_sample_that_is_not_what_it_should_be_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    image, ids = neuropil(125)
    output = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=r"`source` must be a file or a folder, got '.*none.hdf', which"):
        prepare_cremi([tmp_path / "none.hdf"], output)
    (tmp_path / "page.hdf").write_text("<html>")
    with pytest.raises(ValueError, match=r"page.hdf must be an HDF5 file, got another or a damaged one; copy it again"):
        prepare_cremi([tmp_path / "page.hdf"], output)
    with h5py.File(tmp_path / "test.hdf", "w") as file:
        file["volumes/raw"] = image
    with pytest.raises(ValueError, match=r"must have a dataset 'volumes/labels/neuron_ids', got volumes/raw\."):
        prepare_cremi([tmp_path / "test.hdf"], output)
    with pytest.raises(ValueError, match=r"label of its image's shape, \(125, 12, 10\), got \(125, 12, 9\)\."):
        prepare_cremi([cremi_file(tmp_path / "a.hdf", image, ids[..., 1:])], output)
    with pytest.raises(ValueError, match=r"inside its image of \(125, 12, 10\), got \(125, 12, 10\) from \(1, 0, 0\)"):
        prepare_cremi([cremi_file(tmp_path / "b.hdf", image, ids, offset=(40.0, 0.0, 0.0))], output)
    with pytest.raises(ValueError, match=r"c must have at least 125 sections, got 124; give the whole volume\."):
        prepare_cremi([cremi_file(tmp_path / "c.hdf", image[1:], ids[1:])], output)
    with pytest.raises(ValueError, match=r"uint8 as image and integers as label, got float32 and uint64\."):
        prepare_cremi([cremi_file(tmp_path / "d.hdf", image.astype(np.float32), ids)], output)
    with pytest.raises(ValueError, match=r"`sources` must have names of their own, got e, e; rename a file\."):
        prepare_cremi([tmp_path / "e.hdf", tmp_path / "other/e.hdf"], output)


def test_without_h5py_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def absent(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return found(name, *arguments, **options)

    (tmp_path / "sample_A.hdf").touch()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"needs h5py, which is not installed; run `pip install h5py`\."):
        prepare_cremi([tmp_path / "sample_A.hdf"], tmp_path / "data")


def tiff(path: Path, stack: np.ndarray) -> Path:
    tifffile.imwrite(path, stack, photometric="minisblack")
    return path


def ac_tiffs(folder: Path) -> tuple[list[Path], list[np.ndarray]]:
    arrays = [*neuropil(100), *neuropil(130, seed=1)]
    kinds = [np.uint8, np.uint16, np.uint8, np.uint32]
    names = ["AC4_inputs", "AC4_labels", "AC3_inputs", "AC3_labels"]
    return [tiff(folder / f"{n}.tif", a.astype(k)) for n, a, k in zip(names, arrays, kinds, strict=True)], arrays


def test_ac4_is_for_training_and_validation_and_ac3_for_the_test(tmp_path: Path) -> None:
    files, (image4, ids4, image3, ids3) = ac_tiffs(tmp_path)
    lists = check(prepare_ac3ac4(*files, tmp_path / "data"))
    expected = {"training": (image4[:80], ids4[:80]), "validation": (image4[80:], ids4[80:]),
                "test": (image3[:100], ids3[:100])}
    for name, (image, ids) in expected.items():
        assert np.array_equal(voxels(lists[name][0]["image"]), image)
        assert same_partition(voxels(lists[name][0]["label"]), ids)
        assert nib.load(lists[name][0]["image"]).header.get_zooms() == (30.0, 6.0, 6.0)


@pytest.mark.parametrize("dataset", ["main", "data"])
def test_hdf5_gives_what_tiff_gives(tmp_path: Path, dataset: str) -> None:
    h5py = pytest.importorskip("h5py")
    tiffs, arrays = ac_tiffs(tmp_path)
    files = [file.with_suffix(".h5") for file in tiffs]
    for path, array in zip(files, arrays, strict=True):
        with h5py.File(path, "w") as file:
            file[dataset] = array
    lists = check(prepare_ac3ac4(*files, tmp_path / "from_hdf5"))
    expected = check(prepare_ac3ac4(*tiffs, tmp_path / "from_tiff"))
    for name in ("training", "validation", "test"):
        for key in ("image", "label"):
            assert np.array_equal(voxels(lists[name][0][key]), voxels(expected[name][0][key]))


def package(folder: Path, pattern: str, stack: np.ndarray, first: int, backwards: bool) -> Path:
    """Sections as AC3AC4Package.zip has them: numbers of labels as colors, the last section first."""
    folder.mkdir()
    for number, section in enumerate(stack):
        name = pattern % (len(stack) - number if backwards else number + first)
        if backwards:
            colors = np.stack([section >> 16 & 255, section >> 8 & 255, section & 255], axis=-1)
            Image.fromarray(colors.astype(np.uint8)).save(folder / name)
        else:
            Image.fromarray(section.astype(np.uint8)).save(folder / name)
    return folder


def test_sections_of_the_published_package_run_against_their_labels(tmp_path: Path) -> None:
    image4, ids4 = neuropil(100)
    image3, ids3 = neuropil(256, seed=1)
    ids4 = ids4 * 300                                              # more than one channel
    folders = [
        package(tmp_path / "ac4_EM", "affinecropped4_inv_%04d.png", image4, 1, backwards=False),
        package(tmp_path / "ac4_seg_daniel", "ac4_daniel_s%04d.png", ids4, 1, backwards=True),
        package(tmp_path / "ac3_EM", "Thousand_highmag_256slices_2kcenter_1k_inv_%04d.png", image3, 0, backwards=False),
        package(tmp_path / "ac3_dbseg_images", "ac3_daniel_s%04d.png", ids3, 1, backwards=True),
    ]
    lists = check(prepare_ac3ac4(*folders, tmp_path / "data", reverse_labels=True))
    for name, image, ids in (("training", image4[:80], ids4[:80]), ("test", image3[:100], ids3[:100])):
        assert np.array_equal(voxels(lists[name][0]["image"]), image)
        assert same_partition(voxels(lists[name][0]["label"]), ids)
    with pytest.raises(ValueError, match=r"AC4 must have labels whose borders are dark .*; add --reverse_labels\."):
        prepare_ac3ac4(*folders, tmp_path / "data")
    with pytest.raises(ValueError, match=r"`output` must lie outside .*ac4_EM, which stays as it is"):
        prepare_ac3ac4(*folders, tmp_path / "ac4_EM" / "data", reverse_labels=True)


def test_labels_that_run_the_right_way_must_not_be_reversed(tmp_path: Path) -> None:
    files, _ = ac_tiffs(tmp_path)
    with pytest.raises(ValueError, match=r"in reverse order; drop --reverse_labels\."):
        prepare_ac3ac4(*files, tmp_path / "data", reverse_labels=True)


WAYS = ["ZYX1", "Z1YX", "1ZYX", "ZYXRGB", "ZYXRGBA", "ZRGBYX", "ZYXLA", "palette", "miniswhite"]


def stored(path: Path, gray: np.ndarray, way: str) -> Path:
    """A stack as TIFF, in one of the ways in which gray values are stored."""
    alpha = np.full_like(gray, gray.max())
    whole = {
        "ZYX1": gray[..., None], "Z1YX": gray[:, None], "1ZYX": gray[None], "ZYXRGB": np.stack([gray] * 3, -1),
        "ZYXRGBA": np.stack([gray] * 3 + [alpha], -1), "ZRGBYX": np.stack([gray] * 3, 1),
        "ZYXLA": np.stack([gray, alpha], -1),
    }
    if way == "palette":                                           # indices run against the gray values that they mean
        colors = np.repeat(np.arange(255, -1, -1, dtype=np.uint16)[None] * 257, 3, 0)
        tifffile.imwrite(path, 255 - gray, photometric="palette", colormap=colors)
    elif way == "miniswhite":
        tifffile.imwrite(path, 255 - gray, photometric="miniswhite")
    else:
        tifffile.imwrite(path, whole[way], photometric="rgb" if way.startswith("ZYXRGB") else "minisblack")
    return path


@pytest.mark.parametrize("way", WAYS)
def test_stacks_are_read_in_every_way_that_gray_is_stored(tmp_path: Path, way: str) -> None:
    files, (image, ids, *_) = ac_tiffs(tmp_path)
    stored(files[0], image.astype(np.uint8), way)
    if way not in ("palette", "miniswhite"):
        stored(files[1], ids.astype(np.uint16), way)
    lists = check(prepare_ac3ac4(*files, tmp_path / "data"))
    assert np.array_equal(voxels(lists["training"][0]["image"]), image[:80])
    assert same_partition(voxels(lists["training"][0]["label"]), ids[:80])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_sections_are_read_in_every_way_that_gray_is_stored(tmp_path: Path, mode: str) -> None:
    stack = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    folder = tmp_path / "EM"
    folder.mkdir()
    for number, section in enumerate(stack):
        picture = Image.fromarray(255 - section if mode == "P" else section).convert(mode)
        if mode == "P":
            picture.putpalette([255 - place // 3 for place in range(768)])
        picture.save(folder / f"{number}.png")
    assert np.array_equal(prepare._read_stack(folder), stack)
    if mode != "P":
        assert np.array_equal(prepare._read_stack(folder, is_label=True), stack)


def test_gray_and_color_of_a_label_stay_apart(tmp_path: Path) -> None:
    colors = np.array([[[5, 5, 5], [0, 0, 5], [0, 0, 0]], [[0, 5, 0], [5, 5, 5], [255, 255, 255]]], np.uint8)
    ids = np.array([[1, 2, 0], [3, 1, 4]])
    colors, ids = np.stack([colors, colors[:, ::-1]]), np.stack([ids, ids[:, ::-1]])
    for label in (colors, colors.astype(np.uint16) * 257):
        tifffile.imwrite(tmp_path / "label.tif", label, photometric="rgb")
        found = prepare._read_stack(tmp_path / "label.tif", is_label=True)
        assert same_partition(found, ids)
        assert np.array_equal(found == 0, ids == 0)


def test_images_in_color_and_further_axes_are_refused_by_name(tmp_path: Path) -> None:
    files, (image, *_) = ac_tiffs(tmp_path)
    color = tmp_path / "color.tif"
    tifffile.imwrite(color, np.stack([image, image, 255 - image], -1).astype(np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match=r"color.tif must be gray, got colors; save it with one channel\."):
        prepare_ac3ac4(color, *files[1:], tmp_path / "data")
    times = tiff(tmp_path / "times.tif", np.stack([image] * 5).astype(np.uint8))
    with pytest.raises(ValueError, match=r"times.tif must have sections, rows and columns, got \(5, 100, 12, 10\)"):
        prepare_ac3ac4(times, *files[1:], tmp_path / "data")
    (tmp_path / "cut.tif").write_bytes(b"II*")
    with pytest.raises(ValueError, match=r"cut.tif must be a TIFF, got a file that cannot be read"):
        prepare_ac3ac4(tmp_path / "cut.tif", *files[1:], tmp_path / "data")
    pages = tmp_path / "pages"
    pages.mkdir()
    tiff(pages / "1.tif", image[:3].astype(np.uint8))
    with pytest.raises(ValueError, match=r"1.tif must be one section, got 3 pages; give the file itself"):
        prepare_ac3ac4(pages, *files[1:], tmp_path / "data")
    sizes = package(tmp_path / "sizes", "%d.png", image[:2].astype(np.uint8), 1, backwards=False)
    Image.fromarray(image[0, :5].astype(np.uint8)).save(sizes / "3.png")
    with pytest.raises(ValueError, match=r"sizes must hold sections of one size, got another one in 3.png"):
        prepare_ac3ac4(sizes, *files[1:], tmp_path / "data")


def test_sections_without_leading_zeros_are_read_in_their_order(tmp_path: Path) -> None:
    stack = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 3, 4), np.uint8)
    assert np.array_equal(prepare._read_stack(package(tmp_path / "EM", "%d.png", stack, 1, backwards=False)), stack)


def test_a_stack_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    files, (image4, *_) = ac_tiffs(tmp_path)
    output = tmp_path / "data"
    (tmp_path / "notes.vss").touch()
    with pytest.raises(ValueError, match=r"must be a TIFF, HDF5 \(.*\) or a folder of sections, got '.vss'\."):
        prepare_ac3ac4(tmp_path / "notes.vss", *files[1:], output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must hold sections as PNG or TIFF, got none\."):
        prepare_ac3ac4(tmp_path / "empty", *files[1:], output)
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file["stack"] = image4
    with pytest.raises(ValueError, match=r"stack.h5 must have a dataset 'main' or 'data', got stack\."):
        prepare_ac3ac4(tmp_path / "stack.h5", *files[1:], output)
    cut = [tiff(tmp_path / f"cut_{file.name}", tifffile.imread(file)[1:]) for file in files[:2]]
    with pytest.raises(ValueError, match=r"AC4 must have at least 100 sections, got 99"):
        prepare_ac3ac4(*cut, *files[2:], output)
    with pytest.raises(ValueError, match=r"AC4 must have three axes, got \(12, 10\) for the image"):
        prepare_ac3ac4(tiff(tmp_path / "flat.tif", image4[0]), *files[1:], output)
    assert not (output / "datalist.json").exists()


def test_the_command_line_prepares_and_tells_errors_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, _ = ac_tiffs(tmp_path)
    assert main(["ac3ac4", *map(str, files), str(tmp_path / "data")]) == 0
    check(tmp_path / "data/datalist.json")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["cremi", str(tmp_path / "A.hdf"), str(tmp_path / "B.hdf"), str(tmp_path / "data")])
    assert capsys.readouterr().err.startswith("python -m scripts.prepare: error: `source` must be a file or a folder")
