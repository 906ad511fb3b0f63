# SPDX-License-Identifier: Apache-2.0
"""Labels of instances: numbers that are lost, and masks in their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from medkd.data.check import DataError, check_data
from medkd.data.components import label_components
from medkd.data.datalist import load_datalist

Write = Callable[..., dict[str, Any]]
NOISE = np.random.default_rng(0).integers(0, 99, (12, 12, 12)).astype(np.uint8)


def numbered(first: int, kind: type) -> np.ndarray:
    label = np.zeros(NOISE.shape, kind)
    label[2:5], label[6:9] = kind(first), kind(first + 2)
    return label


@pytest.mark.parametrize(
    ("first", "kind", "message"),
    [
        (2**24, np.float32, r"must have numbers below 16,777,216, as it stores float32, got 16,777,218"),
        (2**53, np.float64, r"must have numbers below 9,007,199,254,740,992, as it stores float64"),
        (2**63, np.uint64, r"must have numbers below 2\^63, got up to 9,223,372,036,854,775,810 in uint64"),
        (2**64 - 3, np.uint64, r"must have numbers below 2\^63, got up to 18,446,744,073,709,551,615 in uint64"),
    ],
)
def test_numbers_that_a_type_loses_are_refused_by_name(volume: Write, first: int, kind: type, message: str) -> None:
    with pytest.raises(DataError, match=f"bad_label.nii.gz {message}"):
        check_data([volume("bad", NOISE, numbered(first, kind))], [volume("a", NOISE)])


@pytest.mark.parametrize(
    ("first", "kind"), [(2**24 - 3, np.float32), (2**24, np.uint32), (2**40, np.int64), (2**62, np.uint64)]
)
def test_numbers_that_a_type_holds_pass(volume: Write, first: int, kind: type) -> None:
    report = check_data([volume("a", NOISE, numbered(first, kind))], [volume("b", NOISE)])
    assert set(report.voxels["training"]) == {0, first, first + 2}


def test_numbers_that_the_reader_loses_are_refused(volume: Write) -> None:
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    keys = ["image", "label"]
    loading = Compose([LoadImaged(keys, allow_missing_keys=True), EnsureChannelFirstd(keys, allow_missing_keys=True)])
    with pytest.raises(DataError, match="numbers below 16,777,216, as it is read as float32, got 16,777,2"):
        check_data([volume("bad", NOISE, numbered(2**24, np.int32))], [volume("a", NOISE)], loading=loading)


def dots(kind: type = np.uint8) -> np.ndarray:
    mask = np.zeros(NOISE.shape, kind)
    mask[1::4, 1::4, 1::4] = 255
    return mask


def test_mask_in_place_of_instances_is_told_of_with_the_way_out(
    volume: Write, caplog: pytest.LogCaptureFixture
) -> None:
    check_data([volume("mask", NOISE, dots())], [volume("a", NOISE, numbered(1, np.uint8))])
    assert "1 of 2 labels look like masks, not like instances: in " in caplog.text
    assert "mask_label.nii.gz one number has 27 separate parts, and would be one instance" in caplog.text
    assert "--label_components" in caplog.text


def test_masks_of_few_parts_are_told_of_when_all_labels_are_such(
    volume: Write, caplog: pytest.LogCaptureFixture
) -> None:
    mask = dots()
    mask[:, :, 4:] = 0
    mask[:, 4:] = 0
    mask[1:3, 9:11, 9:11] = mask[5:7, 9:11, 9:11] = 255                # five parts
    check_data([volume(name, NOISE, mask) for name in "ab"], [volume("c", NOISE, mask)])
    assert "3 of 3 labels look like masks" in caplog.text


@pytest.mark.parametrize("num_classes", [None, 256])
def test_instances_and_classes_are_no_masks(
    volume: Write, caplog: pytest.LogCaptureFixture, num_classes: int | None
) -> None:
    label = numbered(1, np.uint8) if num_classes is None else dots()
    check_data([volume("a", NOISE, label)], [volume("b", NOISE, label)], num_classes)
    assert "look like masks" not in caplog.text


def test_more_instances_than_a_png_holds_are_told_of(picture: Write, caplog: pytest.LogCaptureFixture) -> None:
    image = np.random.default_rng(0).integers(0, 255, (260, 260)).astype(np.uint8)
    many, few = np.arange(260 * 260, dtype=np.uint32).reshape(260, 260), np.eye(260, dtype=np.uint8)
    check_data([picture("many", image, many, ".tif")], [picture("few", image, few, ".tif")])
    assert "1 labels have more than 65,535 instances; a prediction with as many" in caplog.text
    assert "is written as TIFF: " in caplog.text


@pytest.mark.parametrize("ending", [".nii.gz", ".png", ".tif"])
def test_label_components_numbers_parts_in_new_files(tmp_path: Path, ending: str) -> None:
    mask = np.zeros((8, 9), np.uint8)
    mask[0:2, 0:2] = mask[3, 3] = mask[4, 4] = 255                     # two parts: corners touch
    mask[6:, 6:] = 7
    affine = np.diag([2.0, 3.0, 1.0, 1.0])
    (tmp_path / "set/labels").mkdir(parents=True)
    old = tmp_path / f"set/labels/x{ending}"
    if ending == ".nii.gz":
        nib.save(nib.Nifti1Image(mask, affine), old)
    elif ending == ".png":
        Image.fromarray(mask).save(old)
    else:
        tifffile.imwrite(old, mask)
    before = old.read_bytes()
    item = {"image": f"images/x{ending}", "label": f"labels/x{ending}"}
    content = {"data_root": str(tmp_path / "set"), "training": [item], "labels": {}}
    (tmp_path / "out").mkdir()
    path = tmp_path / "out/datalist.json"
    path.write_text(json.dumps(content))
    folder = label_components(path)
    (found,) = load_datalist(path, "training")
    assert found["image"] == str(tmp_path / "set" / item["image"])
    assert Path(found["label"]).is_relative_to(folder)
    assert old.read_bytes() == before
    file = nib.load(found["label"]) if ending == ".nii.gz" else None
    numbers = np.asarray(Image.open(found["label"])) if file is None else np.asarray(file.dataobj)
    assert [int((numbers == number).sum()) for number in (1, 2, 3)] == [6, 4, 2]
    assert numbers.max() == 3
    if file is not None:
        np.testing.assert_allclose(file.affine, affine)


def test_label_components_refuses_a_label_in_color(tmp_path: Path) -> None:
    Image.fromarray(np.ones((5, 5, 3), np.uint8)).save(tmp_path / "x.png")
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": "i.png", "label": "x.png"}]}))
    with pytest.raises(ValueError, match=r"x.png must be gray, one channel and one page, got the shape \(5, 5, 3\)"):
        label_components(path)
