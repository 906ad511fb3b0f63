# SPDX-License-Identifier: Apache-2.0
"""The check before training: one error that lists all that is wrong, and a report when nothing is."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medkd.data.check import DataError, check_data
from medkd.data.volumes import default_loading

SHAPE = (8, 7, 6)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
Make = Callable[..., dict[str, Any]]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-100, 100, SHAPE).astype(np.int16)


def marked(*values: float, dtype: type = np.uint8) -> np.ndarray:
    label = np.zeros(SHAPE, dtype)
    for place, value in enumerate(values):
        label[place] = value
    return label


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writer of one case; keywords replace its image, label, affine or the affine of its label."""
    def write(name: str, **new: Any) -> dict[str, Any]:
        item = {}
        affine = new.get("affine", AFFINE)
        for key, default in (("image", noise(len(name) + ord(name[-1]))), ("label", marked(1, 2))):
            volume = new.get(key, default)
            path = tmp_path / f"{name}_{key}.nii.gz"
            its = new.get("label_affine", affine) if key == "label" else affine
            nib.save(nib.Nifti1Image(volume, its), path)
            item[key] = str(path)
        return item
    return write


def test_sound_data_give_a_report(make: Make) -> None:
    report = check_data([make("a"), make("b")], [make("c")], num_classes=3, test=[make("d")])
    assert report.cases == {"training": 2, "validation": 1, "test": 1}
    assert report.voxels["training"] == {0: 6 * 42 * 2, 1: 84, 2: 84}
    assert report.voxels["validation"] == {0: 6 * 42, 1: 42, 2: 42}
    assert report.spacing == ((2.0, 2.0), (2.0, 2.0), (3.0, 3.0))
    assert report.shapes == ((8, 8), (7, 7), (6, 6))
    assert report.intensity == (-100.0, 99.0)
    assert report.orientations == ("RAS",)


def test_table_shows_numbers_by_list_and_class(make: Make) -> None:
    report = check_data([make("a"), make("b")], [make("c")])
    lines = report.table({"0": "background", "2": "liver"}).splitlines()
    assert lines[0].split() == ["training", "validation", "test"]
    assert lines[1].split() == ["cases", "2", "1", "0"]
    assert lines[2].split() == ["voxels", "of", "0", "background", "504", "252", "0"]
    assert lines[4].split() == ["voxels", "of", "2", "liver", "84", "42", "0"]
    assert lines[5].split(maxsplit=3)[-1] == "8 x 7 x 6"


def test_table_only_counts_the_values_of_instance_labels(make: Make) -> None:
    label = np.arange(8 * 7 * 6, dtype=np.uint16).reshape(SHAPE)
    table = check_data([make("a", label=label), make("b")], [make("c")]).table()
    assert "label values" in table
    assert len(table.splitlines()) == 7


def test_paths_may_be_pathlib_and_other_keys_are_ignored(make: Make) -> None:
    items = [{key: Path(value) for key, value in make(name).items()} | {"age": 7} for name in "ab"]
    assert check_data(items[:1], items[1:]).cases["training"] == 1


def test_keys_of_image_and_label_may_be_named(make: Make) -> None:
    items = [{"ct": item["image"], "seg": item["label"]} for item in (make("a"), make("b"))]
    assert check_data(items[:1], items[1:], image_key="ct", label_key="seg").cases["training"] == 1


def test_test_cases_and_unlabeled_images_need_no_label(make: Make) -> None:
    test, extra = {"image": make("c")["image"]}, {"image": make("d")["image"]}
    report = check_data([make("a")], [make("b")], num_classes=3, test=[test], unlabeled=[extra])
    assert report.cases == {"training": 1, "validation": 1, "test": 1, "unlabeled": 1}
    assert report.voxels["unlabeled"] == {}


def test_pictures_are_read_too(tmp_path: Path) -> None:
    items = []
    for number in range(2):
        item = {"image": str(tmp_path / f"i{number}.png"), "label": str(tmp_path / f"l{number}.png")}
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 255, (9, 6, 3), dtype=np.uint8)).save(item["image"])
        Image.fromarray(rng.integers(0, 2, (9, 6), dtype=np.uint8)).save(item["label"])
        items.append(item)
    report = check_data(items[:1], items[1:], num_classes=2)
    assert report.shapes == ((6, 6), (9, 9))
    assert sum(report.voxels["training"].values()) == 54


def test_voxels_of_a_label_too_large_for_one_pass_are_added_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    split = np.array_split
    monkeypatch.setattr(np, "array_split", lambda data, _parts, axis: split(data, 3, axis))
    assert check_data([make("a")], [make("b")]).voxels["training"] == {0: 252, 1: 42, 2: 42}


@pytest.mark.parametrize(("values", "counted"), [(20, False), (21, True)])
def test_table_names_up_to_twenty_values(make: Make, values: int, counted: bool) -> None:
    label = (np.arange(8 * 7 * 6, dtype=np.uint16) % values).reshape(SHAPE)
    table = check_data([make("a", label=label)], [make("b", label=label)]).table()
    assert ("label values" in table) is counted
    assert ("voxels of 19" in table) is not counted


def test_instances_are_not_bounded_by_classes(make: Make) -> None:
    label = np.zeros(SHAPE, np.uint32)
    label[1:] = 70_000 + np.arange(7, dtype=np.uint32)[:, None, None]
    report = check_data([make("a", label=label)], [make("b", label=label)], num_classes=None)
    assert set(report.voxels["training"]) == {0, *range(70_000, 70_007)}


@pytest.mark.parametrize("spatial_dims", [None, 3])
def test_volumes_pass_where_volumes_are_expected(make: Make, spatial_dims: int | None) -> None:
    assert check_data([make("a")], [make("b")], spatial_dims=spatial_dims).cases["training"] == 1


def test_cases_that_are_only_scored_are_checked_alone(make: Make) -> None:
    assert check_data([], [], num_classes=3, test=[make("a")]).cases == {"training": 0, "validation": 0, "test": 1}
    with pytest.raises(DataError, match=r"bad_label.nii.gz must have the affine of its image"):
        check_data([], [], num_classes=3, test=[make("a"), make("bad", label_affine=AFFINE * [[-1], [1], [1], [1]])])
    with pytest.raises(DataError, match="`validation` must have at least one case"):
        check_data([make("a")], [], num_classes=3, test=[make("b")])


# what is wrong with a case


def refused(make: Make, message: str, num_classes: int | None = 3, **new: Any) -> None:
    with pytest.raises(DataError, match=message):
        check_data([make("a"), make("bad", **new)], [make("c")], num_classes)


def test_label_of_another_shape_is_refused(make: Make) -> None:
    message = r"bad_label.nii.gz must have the shape of its image, \(8, 7, 6\), got \(8, 7, 5\); resample"
    refused(make, message, label=marked(1)[..., :5])


def test_label_of_another_affine_is_refused(make: Make) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] = 1.5
    refused(make, r"label.nii.gz must have the affine of its image.* up to 1.5 mm off", label_affine=shifted)
    flipped = AFFINE * [[-1], [1], [1], [1]]
    refused(make, r"bad_label.nii.gz must have the affine of its image", label_affine=flipped)


def test_label_of_another_spacing_is_refused(make: Make) -> None:
    message = r"bad_label.nii.gz must have the spacing of its image, \(2, 2, 3\), got \(2, 2, 2.5\); resample"
    refused(make, message, label_affine=np.diag([2.0, 2.0, 2.5, 1.0]))


def test_affine_that_differs_by_rounding_passes(make: Make) -> None:
    near = AFFINE.copy()
    near[:3, 3] += 0.01
    check_data([make("a"), make("b", label_affine=near)], [make("c")])
    near[0, 3] += 0.04                                             # 0.05 mm of voxels of 2 mm, not of 3 mm
    with pytest.raises(DataError, match=r"to 0.02 voxels, got one that is up to 0.052 mm off"):
        check_data([make("a"), make("b", label_affine=near)], [make("c")])


def test_label_of_another_direction_is_refused_for_its_far_corner(make: Make) -> None:
    turned = AFFINE.copy()
    turned[:3, 0] = [2.0 * np.cos(0.1), 2.0 * np.sin(0.1), 0.0]     # about the first voxel, by 0.1 of 14 mm
    refused(make, r"bad_label.nii.gz must have the affine of its image.* up to 1.4 mm off", label_affine=turned)


@pytest.mark.parametrize(
    ("num_classes", "expected"), [(2, "values in 0..1, got 2; map"), (1, "values in 0..0, got 1, 2")]
)
def test_label_value_outside_the_classes_is_refused(make: Make, num_classes: int, expected: str) -> None:
    with pytest.raises(DataError, match=f"a_label.nii.gz must have {expected}"):
        check_data([make("a")], [make("b")], num_classes)


@pytest.mark.parametrize("value", [-2, -100])
def test_negative_label_is_refused_even_without_classes(make: Make, value: int) -> None:
    message = f"bad_label.nii.gz must have values of 0 or more or -1, .* got {value}; map what is to be ignored to -1"
    refused(make, message, num_classes=None, label=marked(1, value, dtype=np.int16))


def test_ignored_voxels_of_instances_are_counted_apart(make: Make) -> None:
    report = check_data([make("a", label=marked(1, -1, dtype=np.int16))], [make("b")])
    assert report.voxels["training"][-1] == 42
    row = next(line for line in report.table().splitlines() if "ignored" in line)
    assert row.split() == ["voxels", "of", "-1", "ignored", "42", "0", "0"]


@pytest.mark.parametrize("value", [-1, -100, 255])
def test_ignored_voxels_of_classes_are_refused_with_the_reason(make: Make, value: int) -> None:
    message = f"must have values in 0..2, got {value}; .*voxels cannot be ignored here, as the supervised loss"
    refused(make, message, label=marked(1, value, dtype=np.int16))


def test_ignored_voxels_are_refused_where_a_step_does_not_know_them(make: Make) -> None:
    items = [make("a", label=marked(1, -1, dtype=np.int16))]
    with pytest.raises(DataError, match="must have values of 0 or more, got -1; no voxel can be ignored here"):
        check_data(items, [make("b")], allow_ignored=False)


def test_label_that_only_ignores_marks_nothing(make: Make) -> None:
    label = marked(-1, dtype=np.int16)
    with pytest.raises(DataError, match="All 1 training labels must mark something"):
        check_data([make("a", label=label)], [make("b")])


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_label_that_is_not_whole_is_refused(make: Make, value: float) -> None:
    message = f"bad_label.nii.gz must have whole numbers, got {value:g}; it may have been resampled"
    refused(make, message, label=marked(1, value, dtype=np.float32))


def test_whole_numbers_stored_as_float_pass(make: Make) -> None:
    report = check_data([make("a", label=marked(1, 2, dtype=np.float32))], [make("b")], 3)
    assert report.voxels["training"] == {0: 252, 1: 42, 2: 42}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_with_values_that_are_not_finite_is_refused(make: Make, value: float) -> None:
    image = noise(0).astype(np.float32)
    image[0, 0, :2] = value
    message = "bad_image.nii.gz must have finite values, got 2 NaN or infinite voxels; replace them"
    refused(make, message, image=image)


def test_constant_image_is_refused(make: Make) -> None:
    message = "bad_image.nii.gz must show something, got -1000 in all voxels"
    refused(make, message, image=np.full(SHAPE, -1000, np.int16))


@pytest.mark.parametrize("key", ["image", "label"])
def test_missing_file_is_refused(make: Make, tmp_path: Path, key: str) -> None:
    message = rf"none.nii.gz is the {key} of training\[1\], but there is no such file; correct it"
    with pytest.raises(DataError, match=message):
        check_data([make("a"), make("b") | {key: str(tmp_path / "none.nii.gz")}], [make("c")])


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_truncated_file_is_refused(make: Make, key: str, kept: float) -> None:
    item = make("bad")
    content = Path(item[key]).read_bytes()
    Path(item[key]).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=f"bad_{key}.nii.gz must be a readable {key}, got .*copy it again"):
        check_data([make("a"), item], [make("c")])


def test_uncompressed_truncated_file_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "cut.nii"
    nib.save(nib.Nifti1Image(noise(0), AFFINE), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="cut.nii must be a readable image"):
        check_data([make("a") | {"image": path}], [make("c")])


def test_unreadable_picture_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="broken.png must be a readable image"):
        check_data([make("a") | {"image": tmp_path / "broken.png"}], [make("c")])


def test_missing_label_of_a_validation_case_is_refused_by_the_name_of_the_case(make: Make) -> None:
    message = r"validation\[0\] \(.*_image.nii.gz\) must have the path of its label, got None; add it"
    with pytest.raises(DataError, match=message):
        check_data([make("a")], [{"image": make("b")["image"]}])


@pytest.mark.parametrize("value", [None, "", 7])
@pytest.mark.parametrize("needs_labels", [True, False])
def test_label_of_a_training_case_that_is_no_path_is_refused(make: Make, value: object, needs_labels: bool) -> None:
    with pytest.raises(DataError, match=r"training\[1\] \(.*\) must have the path of its label, got"):
        check_data([make("a"), make("b") | {"label": value}], [make("c")], needs_labels=needs_labels)


@pytest.mark.parametrize("value", [None, "", ["a.nii", "b.nii"], 7])
def test_image_that_is_no_path_is_refused(make: Make, value: object) -> None:
    with pytest.raises(DataError, match=r"training\[0\] must have the path of its image, got"):
        check_data([make("a") | {"image": value}], [make("b")])


def pictures(folder: Path, label: np.ndarray) -> list[dict[str, Any]]:
    items = []
    for number in range(2):
        item = {key: str(folder / f"{key}{number}.png") for key in ("image", "label")}
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (9, 6), dtype=np.uint8)).save(item["image"])
        Image.fromarray(label).save(item["label"])
        items.append(item)
    return items


def test_label_in_color_is_refused(tmp_path: Path) -> None:
    items = pictures(tmp_path, np.ones((9, 6, 3), np.uint8))
    with pytest.raises(DataError, match=r"label0.png must have one channel of class numbers, got 3; save .* as gray"):
        check_data(items[:1], items[1:])


def test_label_of_several_volumes_is_refused(make: Make) -> None:
    two = np.ones((*SHAPE, 2), np.uint8)
    refused(make, "bad_label.nii.gz must have one channel of class numbers, got 2", label=two)


def test_pictures_are_refused_where_volumes_are_expected(tmp_path: Path) -> None:
    items = pictures(tmp_path, np.ones((9, 6), np.uint8))
    check_data(items[:1], items[1:], spatial_dims=2)
    with pytest.raises(DataError, match=r"image0.png must have 3 spatial axes, got \(6, 9\); give volumes"):
        check_data(items[:1], items[1:], spatial_dims=3)


def test_volumes_are_refused_where_slices_are_expected(make: Make) -> None:
    with pytest.raises(DataError, match=r"a_image.nii.gz must have 2 spatial axes, got \(8, 7, 6\); save its sections"):
        check_data([make("a")], [make("b")], spatial_dims=2)
    one = {"image": noise(0)[..., :1], "label": marked(1)[..., :1]}
    message = r"c_image.nii.gz must have 2 spatial axes, got \(8, 7, 1\); save it without the axis of one voxel"
    with pytest.raises(DataError, match=message):
        check_data([make("c", **one)], [make("d", **one)], spatial_dims=2)


# what is wrong with the lists


def test_labels_empty_in_all_training_cases_are_refused(make: Make) -> None:
    empty = [make(name, label=marked()) for name in "ab"]
    with pytest.raises(DataError, match="All 2 training labels must mark something, got only 0 in each"):
        check_data(empty, [make("c")])


def test_labels_empty_in_all_validation_cases_are_refused(make: Make) -> None:
    with pytest.raises(DataError, match="All 1 validation labels must mark something, got only 0 in each"):
        check_data([make("a")], [make("c", label=marked())])


def test_no_validation_case_is_refused_with_the_way_to_one(make: Make) -> None:
    with pytest.raises(DataError, match=r"`validation` must have at least one case.*medkd datalist"):
        check_data([make("a")], [])


def test_no_training_case_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="`training` must have a case with a label, got no case; name one in "):
        check_data([], [make("a")])


def test_image_in_two_lists_is_refused_however_it_is_written(make: Make, tmp_path: Path) -> None:
    item = make("a")
    other = item | {"image": str(tmp_path / "x" / ".." / "a_image.nii.gz")}
    (tmp_path / "x").mkdir()
    message = r"`training` and `validation` must have no image in common, got .*a_image.nii.gz"
    with pytest.raises(DataError, match=message):
        check_data([item], [other])


def test_image_in_two_lists_is_refused_through_a_link(make: Make, tmp_path: Path) -> None:
    item = make("a")
    (tmp_path / "link.nii.gz").symlink_to(item["image"])
    with pytest.raises(DataError, match="must have no image in common"):
        check_data([item], [item | {"image": str(tmp_path / "link.nii.gz")}])


def test_broken_image_of_two_lists_is_told_of_once_by_its_first_place(make: Make, tmp_path: Path) -> None:
    item = make("a") | {"image": str(tmp_path / "none.nii")}
    with pytest.raises(DataError, match=r"1 problem\(s\):\n  .*none.nii is the image of training\[0\]"):
        check_data([item], [item], allow_shared=True)


def test_shared_image_can_be_allowed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    item = make("a")
    report = check_data([item], [item], test=[item], allow_shared=True)
    assert report.cases == {"training": 1, "validation": 1, "test": 1}
    assert "Allowed for a test, its scores mean nothing: `training` and `validation`" in caplog.text


def test_all_problems_come_in_one_error(make: Make, tmp_path: Path) -> None:
    bad = make("bad", image=np.zeros(SHAPE, np.int16), label=marked(1, 7))
    with pytest.raises(DataError) as caught:
        check_data([make("a"), bad, {"image": str(tmp_path / "none.nii")}], [], num_classes=3)
    text = str(caught.value)
    assert "4 problem(s)" in text
    for part in ("`validation`", "must show something", "values in 0..2, got 7", "none.nii"):
        assert part in text


def test_twenty_problems_are_all_listed(tmp_path: Path) -> None:
    items = [{"image": tmp_path / f"{number}.nii", "label": tmp_path / "l.nii"} for number in range(10)]
    with pytest.raises(DataError, match=r"20 problem\(s\)") as caught:
        check_data(items[:9], items[9:])
    assert len(str(caught.value).splitlines()) == 21


def test_unreadable_labels_are_not_taken_for_empty_ones(make: Make, tmp_path: Path) -> None:
    items = [make("a", label=marked()), make("b") | {"label": str(tmp_path / "none.nii")}]
    with pytest.raises(DataError, match=r"1 problem\(s\):\n  .*none.nii is the label"):
        check_data(items, [make("c")])


def test_five_values_are_named_and_more_are_counted(make: Make) -> None:
    for top, expected in ((6, r"got 2, 3, 4, 5, 6; map"), (7, r"got 2, 3, 4, 5, 6 and 1 more; map")):
        with pytest.raises(DataError, match=expected):
            check_data([make("a", label=marked(*range(1, top + 1)))], [make("c", label=marked(1))], num_classes=2)


def test_more_than_twenty_problems_are_counted(tmp_path: Path) -> None:
    items = [{"image": tmp_path / f"{number}.nii", "label": tmp_path / "l.nii"} for number in range(15)]
    with pytest.raises(DataError, match=r"31 problem\(s\)(?s:.*)\n  and 11 more\.$") as caught:
        check_data(items, [])
    assert len(str(caught.value).splitlines()) == 22


# what is handled with a log line


def one_line(caplog: pytest.LogCaptureFixture, text: str) -> None:
    assert len([record for record in caplog.records if text in record.getMessage()]) == 1


def test_empty_label_of_some_cases_is_named_in_one_line(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    check_data([make("a"), make("empty", label=marked())], [make("c")])
    one_line(caplog, "1 of 3 labels are empty, and used as they are: ")
    assert "empty_label.nii.gz" in caplog.text


def test_class_that_no_validation_case_shows_is_named(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    check_data([make("a"), make("b")], [make("c", label=marked(2))], num_classes=4)
    one_line(caplog, "No validation label has a voxel of the class(es) 1, 3.")
    one_line(caplog, "No training label has a voxel of the class(es) 3.")


def test_test_cases_that_cannot_be_evaluated_are_counted(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medkd")
    check_data([make("a"), make("b")], [make("c")], test=[make("d"), {"image": make("e")["image"]}])
    one_line(caplog, "1 of 2 test cases have no label: they can be predicted, not evaluated.")


def test_single_training_case_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    check_data([make("a")], [make("c")])
    one_line(caplog, "There is a single training case")


def test_mixed_spacing_and_orientation_are_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medkd")
    check_data([make("a"), make("b", affine=np.diag([-2.0, -2.0, 5.0, 1.0]))], [make("c")])
    one_line(caplog, "Spacing differs by case, 2 x 2 x 3 to 5; the transforms resample all to one.")
    one_line(caplog, "Orientation differs by case, LPS, RAS; the transforms turn all to one.")


def test_volumes_and_slices_are_told_of_together(make: Make, tmp_path: Path) -> None:
    flat = pictures(tmp_path, np.ones((9, 6), np.uint8))
    report = check_data([make("a"), flat[0]], [flat[1]])
    assert report.shapes == ((6, 8), (7, 9))
    assert report.spacing == ((1.0, 2.0), (1.0, 2.0))


def test_sound_data_log_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medkd")
    check_data([make("a"), make("b")], [make("c")])
    assert not caplog.records


# files are read as training reads them


def reads(scale: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A step that reads files into another unit, as that of a bundle does."""
    read = default_loading()

    def load(item: dict[str, Any]) -> dict[str, Any]:
        case = dict(read(item))
        for volume in case.values():
            volume.affine = torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64)) @ volume.affine
        return case

    return load


def test_spacing_is_that_of_the_reader_that_training_takes(make: Make) -> None:
    report = check_data([make("a")], [make("b")], loading=reads(1000.0))
    assert report.spacing == ((2000.0, 2000.0), (2000.0, 2000.0), (3000.0, 3000.0))


def test_affine_of_a_header_with_two_is_that_of_the_reader(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    item = make("a")
    file: Any = nib.load(item["label"])
    mirrored = AFFINE @ np.diag([-1.0, 1.0, 1.0, 1.0])
    file.set_qform(mirrored, 1)
    file.set_sform(mirrored * [[3], [3], [3], [1]], 1)           # its spacing is wrong: MONAI takes the qform
    nib.save(nib.Nifti1Image(np.asanyarray(file.dataobj), None, file.header), item["label"])
    with pytest.raises(DataError, match="a_label.nii.gz must have the affine of its image.* 28 mm off"):
        check_data([item], [make("b")])
    right = make("c")
    file = nib.load(right["image"])
    file.set_sform(AFFINE, 1)
    file.set_qform(mirrored, 1)
    nib.save(nib.Nifti1Image(np.asanyarray(file.dataobj), None, file.header), right["image"])
    check_data([right], [make("b")])
    one_line(caplog, "1 files have a qform and an sform that differ; all steps use the one that the reader takes")


def test_reader_that_fails_on_a_label_names_the_label(make: Make) -> None:
    read = default_loading()

    def load(item: dict[str, Any]) -> dict[str, Any]:
        if "bad_label" in str(item.get("label")):
            raise ValueError(f"{item['label']} must be something else, got this; do that.")
        return dict(read(item))

    message = r"1 problem\(s\):\n  .*bad_label.nii.gz must be something else, got this; do that\.$"
    with pytest.raises(DataError, match=message):
        check_data([make("a"), make("bad")], [make("c")], loading=load)


def test_label_is_still_looked_at_where_its_image_is_broken(make: Make) -> None:
    item = make("bad", label=marked(7))
    Path(item["image"]).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 problem\(s\)(?s:.*)bad_label.nii.gz must have values in 0..2, got 7"):
        check_data([make("a"), item], [make("c")], 3)


@pytest.mark.parametrize(("ending", "most"), [("png", 2), ("mha", 1)])
def test_files_that_itk_reads_are_read_one_at_a_time(make: Make, ending: str, most: int) -> None:
    now, peak = [0], [0]

    def load(item: dict[str, Any]) -> dict[str, Any]:
        if item["image"].endswith(f".gz.{ending}"):                    # one of the four
            now[0] += 1
            time.sleep(0.1)
            peak[0] = max(peak[0], now[0])
            now[0] -= 1
        raise ValueError(f"{item['image']} must be another file.")

    items = [{"image": f"{make(name)['image']}.{ending}"} for name in "abcd"]
    for item in items:
        Path(item["image"]).touch()
    with pytest.raises(DataError, match="must be another file"):
        check_data([make("e")], [make("f")], unlabeled=items, loading=load)
    assert min(peak[0], 2) == (most if len(os.sched_getaffinity(0)) > 1 else 1)
