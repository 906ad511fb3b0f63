# SPDX-License-Identifier: Apache-2.0
"""Images and labels that belong together by their names, and what belongs nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medkd.data.datalist import RandomSplits, SplitsFile, make_datalist
from medkd.data.naming import plain
from medkd.data.pairs import find_pairs


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def source(folder: Path, images: list[str], labels: list[str]) -> Path:
    fill(folder / "set" / "images", images)
    fill(folder / "set" / "labels", labels)
    return folder / "set"


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("liver_07_0000", "liver_07"),                                 # nnU-Net
        ("liver_07_0000", "liver_07_seg"),
        ("liver_07", "liver_07_seg"),
        ("liver_07", "liver_07-seg"),
        ("liver_07", "liver_07_label"),
        ("liver_07", "liver_07_labels"),
        ("liver_07", "liver_07_Mask"),
        ("liver_07", "liver_07_gt"),
        ("liver_07", "liver_07.segmentation"),
        ("liver_07", "labels_liver_07"),
        ("liver_07_image", "liver_07_mask"),
        ("img0007", "label0007"),                                      # BTCV
        ("volume-7", "segmentation-7"),                                # LiTS
        ("case_00000/imaging", "case_00000/segmentation"),             # KiTS
        ("p1/image", "p1/label"),
        ("p1/scan", "p1/manual_mask"),
        ("segments_07", "segments_07"),
    ],
)
def test_usual_names_of_a_pair_are_understood(tmp_path: Path, image: str, label: str) -> None:
    pairs = find_pairs(source(tmp_path, [f"{image}.nii.gz"], [f"{label}.nii.gz"]), "images", "labels")
    (case,) = pairs.images
    assert pairs.images[case] == f"images/{image}.nii.gz"
    assert pairs.labels == {case: f"labels/{label}.nii.gz"}
    for name in (image, label, f"{image}.nii.gz", f"{label}.nii.gz", case):
        assert pairs.case(name) == case


@pytest.mark.parametrize(
    ("image", "label"), [("liver_07", "liver_08"), ("a_0001", "a"), ("heart", "hearts"), ("x", "y_seg")]
)
def test_other_names_are_no_pair(tmp_path: Path, image: str, label: str) -> None:
    folder = source(tmp_path, [f"{image}.nii"], [f"{label}.nii"])
    with pytest.raises(ValueError, match="`labels` must have the names of `images`, got 'labels/.*' for 'images/"):
        find_pairs(folder, "images", "labels")


def test_one_name_goes_before_what_words_allow(tmp_path: Path) -> None:
    pairs = find_pairs(source(tmp_path, ["a.nii", "a_0000.nii"], ["a.nii", "a_0000_seg.nii"]), "images", "labels")
    assert pairs.labels == {"a": "labels/a.nii", "a_0000": "labels/a_0000_seg.nii"}


def test_numbers_from_zero_are_no_channels(tmp_path: Path) -> None:
    names = [f"slice_{number:04}" for number in range(3)]
    folder = source(tmp_path, [f"{name}.png" for name in names], [f"{name}_seg.png" for name in names])
    pairs = find_pairs(folder, "images", "labels")
    assert pairs.labels == {name: f"labels/{name}_seg.png" for name in names}


def test_several_channels_of_a_case_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, ["a_0000.nii", "a_0001.nii", "b_0000.nii"], ["a.nii", "b.nii"])
    message = "`images` must have one channel per case, got 'images/a_0000.nii', 'images/a_0001.nii'; move the others"
    with pytest.raises(ValueError, match=message):
        find_pairs(folder, "images", "labels")


def test_two_labels_of_an_image_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, ["a.nii"], ["a_seg.nii", "a_mask.nii"])
    message = "must hold one label per image, got 'labels/a_mask.nii', 'labels/a_seg.nii' for 'images/a.nii'; move one"
    with pytest.raises(ValueError, match=message):
        find_pairs(folder, "images", "labels")


def test_images_and_labels_may_share_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "set", ["all/p1/ct.nii", "all/p1/ct_seg.nii", "all/p2/ct.nii", "all/p2/ct_seg.nii"])
    pairs = find_pairs(tmp_path / "set", "all", "all")
    assert pairs.labels == {"p1/ct": "all/p1/ct_seg.nii", "p2/ct": "all/p2/ct_seg.nii"}
    assert list(pairs.images) == ["p1/ct", "p2/ct"]


def test_folders_within_are_searched_and_zarr_is_a_file(tmp_path: Path) -> None:
    fill(tmp_path / "set", ["images/a/x.zarr/0/.zarray", "images/labels/a/x.zarr/c.bin", "images/.cache/y.nii"])
    pairs = find_pairs(tmp_path / "set", "images", "images/labels")
    assert pairs.images == {"a/x": "images/a/x.zarr"}
    assert pairs.labels == {"a/x": "images/labels/a/x.zarr"}


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "medkd")
    folder = source(tmp_path, ["a.nii", "b.nii", "c.nii", "read.me"], ["a_seg.nii", "b_seg.nii", "d_seg.nii"])
    make_datalist(folder, tmp_path / "out", RandomSplits(0.5, 0))
    assert "1 of 3 images have no label of their name, and are left out: images/c.nii; " in caplog.text
    assert "1 of 3 labels have no image of their name, and are left out: labels/d_seg.nii; " in caplog.text
    assert "1 files of images are of another kind, and left out: read.me." in caplog.text


def test_images_that_become_unlabeled_are_not_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = source(tmp_path, ["a.nii", "b.nii", "c.nii"], ["a.nii", "b.nii"])
    path = make_datalist(folder, tmp_path / "out", RandomSplits(0.5, 0), unlabeled="images")
    assert json.loads(path.read_text())["unlabeled"] == [{"image": "images/c.nii"}]
    assert "left out" not in caplog.text


def test_labeled_cases_in_no_split_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = source(tmp_path, ["a.nii", "b.nii", "c.nii"], ["a.nii", "b.nii", "c.nii"])
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    make_datalist(folder, tmp_path / "out", SplitsFile(tmp_path / "splits.json"))
    assert "1 labeled cases are in no split, and left out: images/c.nii." in caplog.text


def test_splits_may_name_cases_as_nnunet_does(tmp_path: Path) -> None:
    folder = source(tmp_path, ["a_0000.nii", "b_0000.nii"], ["a.nii", "b.nii"])
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "val": ["b_0000.nii"]}))
    content = json.loads(make_datalist(folder, tmp_path / "out", SplitsFile(tmp_path / "splits.json")).read_text())
    assert content["training"] == [{"image": "images/a_0000.nii", "label": "labels/a.nii"}]
    assert content["validation"] == [{"image": "images/b_0000.nii", "label": "labels/b.nii"}]


def test_unlabeled_channels_beside_the_first_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, ["a_0000.nii", "b_0000.nii"], ["a.nii", "b.nii"])
    fill(folder / "imagesTs", ["c_0000.nii", "c_0001.nii"])
    with pytest.raises(ValueError, match="`unlabeled` must have one channel per case, got 'imagesTs/c_0001.nii'"):
        make_datalist(folder, tmp_path / "out", RandomSplits(0.5, 0), unlabeled="imagesTs")


def test_words_are_no_name() -> None:
    assert plain("mask", label=True) == ""
    assert plain("p1/mask", label=True) == plain("p1/image", label=False) == "p1"
    assert plain("masked_07", label=True) == "masked_07"
