# SPDX-License-Identifier: Apache-2.0
"""Datalists of images only, of few labels, and without what a user leaves out."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from medkd.data.datalist import LISTS, RandomSplits, SplitsFile, load_datalist, make_datalist

Log = pytest.LogCaptureFixture


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def splits_file(folder: Path, content: object) -> SplitsFile:
    (folder / "splits.json").write_text(json.dumps(content))
    return SplitsFile(folder / "splits.json")


def listed(path: Path) -> dict[str, list[str]]:
    """Names of the cases of each list; those with a label are followed by a star."""
    return {
        name: [Path(item["image"]).name.removesuffix(".nii.gz") + "*" * ("label" in item)
               for item in load_datalist(path, name)]
        for name in (*LISTS, "unlabeled")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten images of five patients with labels, and two images without in another folder."""
    names = [f"p{patient}_{scan}" for patient in range(5) for scan in "ab"]
    fill(tmp_path / "source" / "images", *names)
    fill(tmp_path / "source" / "labels", *names)
    fill(tmp_path / "source" / "more", "x", "y")
    return tmp_path / "source"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Ten images of five patients, and nothing else."""
    fill(tmp_path / "bare" / "images", *[f"p{patient}_{scan}" for patient in range(5) for scan in "ab"])
    return tmp_path / "bare"


def make(source: Path, tmp_path: Path, **options: Any) -> dict[str, list[str]]:
    return listed(make_datalist(source, tmp_path / "out", **options))


# training cases without a label


def test_training_cases_without_a_label_become_unlabeled_and_are_named(
    source: Path, tmp_path: Path, caplog: Log
) -> None:
    fill(source / "images", "lone")
    lists = make(source, tmp_path, splits=splits_file(tmp_path, {"train": ["p0_a", "lone"], "val": ["p1_a"]}))
    assert lists == {"training": ["p0_a*"], "validation": ["p1_a*"], "test": [], "unlabeled": ["lone"]}
    told = "1 of 2 training cases have no label of their name, and become `unlabeled`: images/lone.nii.gz."
    assert next(record.getMessage() for record in caplog.records) == told
    assert "have no label of their name, and are left out" not in caplog.text


@pytest.mark.parametrize("name", ["val", "test"])
def test_cases_for_scores_without_a_label_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    fill(source / "images", "lone")
    splits = splits_file(tmp_path, {"train": ["p0_a"], name: ["lone"]})
    with pytest.raises(ValueError, match=r"must have a label for each image, got none for 'lone'; .* \(--no_labels\)"):
        make(source, tmp_path, splits=splits)


# few labels


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_only_the_first_training_cases_keep_their_labels(source: Path, tmp_path: Path, count: int) -> None:
    names = ["p3_a", "p0_a", "p1_a"]
    splits = splits_file(tmp_path, {"train": names, "val": ["p2_a"], "test": ["p4_a"]})
    lists = make(source, tmp_path, splits=splits, unlabeled="more", labeled_cases=count)
    assert lists["training"] == [f"{name}*" for name in names[:count]]
    assert lists["unlabeled"] == [*names[count:], "x", "y"]
    assert (lists["validation"], lists["test"]) == (["p2_a*"], ["p4_a*"])


@pytest.mark.parametrize("count", [-1, 4, True, 1.5, "2"])
def test_number_of_labels_out_of_range_is_refused(source: Path, tmp_path: Path, count: Any) -> None:
    splits = splits_file(tmp_path, {"train": ["p3_a", "p0_a", "p1_a"], "val": ["p2_a"]})
    message = rf"`labeled_cases` must be how many of the 3 training cases keep their labels, 0 to 3, got {count!r} "
    with pytest.raises(ValueError, match=message):
        make(source, tmp_path, splits=splits, labeled_cases=count)


# images only


def test_images_without_labels_are_divided_by_patient(bare: Path, tmp_path: Path) -> None:
    plan = RandomSplits(validation=0.2, test=0.0, seed=3)
    lists = make(bare, tmp_path, splits=plan, labels=None, patient=r"^(p\d)_", label_names="background,liver")
    assert {name: len(cases) for name, cases in lists.items()} == {
        "training": 0, "validation": 2, "test": 0, "unlabeled": 8}
    assert lists["validation"][0][:2] == lists["validation"][1][:2]
    assert not any(name.endswith("*") for cases in lists.values() for name in cases)
    assert json.loads((tmp_path / "out" / "datalist.json").read_text())["labels"]["1"] == "liver"


def test_images_without_labels_are_divided_by_the_usual_shares(bare: Path, tmp_path: Path) -> None:
    lists = make(bare, tmp_path, labels=None)
    assert {name: len(cases) for name, cases in lists.items()} == {
        "training": 0, "validation": 2, "test": 0, "unlabeled": 8}
    lists = make(bare, tmp_path, labels=None, splits=RandomSplits(0.1, 0.2))
    assert {name: len(cases) for name, cases in lists.items()} == {
        "training": 0, "validation": 1, "test": 2, "unlabeled": 7}
    lists = make(bare, tmp_path, labels=None, splits=RandomSplits(0.0, 1.0))
    assert {name: len(cases) for name, cases in lists.items()} == {
        "training": 0, "validation": 0, "test": 10, "unlabeled": 0}


def test_labels_that_are_there_are_not_used_where_none_are_wanted(source: Path, tmp_path: Path) -> None:
    lists = make(source, tmp_path, labels=None, unlabeled="more")
    assert len(lists["unlabeled"]) == 10
    assert lists["unlabeled"][-2:] == ["x", "y"]
    assert lists["training"] == []
    assert "*" not in str(lists)


def test_splits_file_of_images_without_labels_is_followed(bare: Path, tmp_path: Path, caplog: Log) -> None:
    named = {"val": ["p1_a"], "test": ["p2_a"]}
    lists = make(bare, tmp_path, labels=None, splits=splits_file(tmp_path, named))
    assert (lists["validation"], lists["test"], len(lists["unlabeled"])) == (["p1_a"], ["p2_a"], 8)
    assert not caplog.records
    lists = make(bare, tmp_path, labels=None, splits=splits_file(tmp_path, {"train": ["p0_a"], **named}))
    assert (lists["training"], lists["unlabeled"]) == ([], ["p0_a"])
    assert "7 of 10 images are in no split, and left out: images/p0_b.nii.gz" in caplog.text


def test_images_all_of_which_are_for_scores_are_refused(bare: Path, tmp_path: Path) -> None:
    everything = [path.name for path in (bare / "images").iterdir()]
    with pytest.raises(ValueError, match="must leave at least one image to learn from, got 10 validation and 0 test"):
        make(bare, tmp_path, labels=None, splits=splits_file(tmp_path, {"val": everything}))
    with pytest.raises(ValueError, match="must have enough patients for training, got 10 with 10 for validation"):
        make(bare, tmp_path, labels=None, splits=RandomSplits(1.0, 0.0))


def test_pattern_of_patients_has_to_match_images_without_labels(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`patient` must match every case, got .* for 'p0_b'"):
        make(bare, tmp_path, labels=None, patient=r"^(p\d)_a")


def test_number_of_labels_is_refused_where_there_are_none(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`labeled_cases` must come with labels, got 2 without; leave one out"):
        make(bare, tmp_path, labels=None, labeled_cases=2)


def test_missing_labels_are_told_with_the_way_to_a_list_without(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it has 'images'; where there are no labels, give --no_labels"):
        make(bare, tmp_path)


def test_labels_among_images_are_not_taken_for_images(tmp_path: Path, caplog: Log) -> None:
    fill(tmp_path / "set", "a", "a_seg", "b_gt", "c", "labels/a", "p1/ct", "p1/mask", "segments")
    lists = make(tmp_path / "set", tmp_path, images=".", labels=None, splits=RandomSplits(0.2, 0.0))
    assert sorted([*lists["validation"], *lists["unlabeled"]]) == ["a", "b_gt", "c", "ct", "segments"]
    assert "3 files are labels by their names, and left out: " in caplog.text
    fill(tmp_path / "other", "labels/a", "labels/b")
    with pytest.raises(ValueError, match="`images` must hold images, got .*other, whose files are labels by "):
        make(tmp_path / "other", tmp_path, images=".", labels=None)


def test_channels_of_images_without_labels_are_refused_and_numbers_of_cases_are_not(tmp_path: Path) -> None:
    fill(tmp_path / "one" / "images", "a_0000", "a_0001", "b_0000", "b_0001")
    with pytest.raises(ValueError, match=r"one channel per case, got 'images/a_0000.nii.gz', 'images/a_0001.nii.gz'; "):
        make(tmp_path / "one", tmp_path, labels=None)
    fill(tmp_path / "two" / "images", *[f"case_{number:04}" for number in range(4)])
    assert len(make(tmp_path / "two", tmp_path, labels=None)["unlabeled"]) == 3
    fill(tmp_path / "three" / "images", "a_0000", "b_0000")
    lists = make(tmp_path / "three", tmp_path, labels=None, splits=splits_file(tmp_path, {"val": ["b"]}))
    assert (lists["validation"], lists["unlabeled"]) == (["b_0000"], ["a_0000"])


# patients


@pytest.mark.parametrize("has_labels", [True, False])
def test_images_of_patients_that_are_scored_do_not_become_unlabeled(
    source: Path, tmp_path: Path, has_labels: bool, caplog: Log
) -> None:
    fill(source / "more", "p1_c", "p2_c", "p3_c")
    splits = splits_file(tmp_path, {"train": ["p0_a"], "val": ["p1_a"], "test": ["p2_a"]})
    labels = "labels" if has_labels else None
    lists = make(source, tmp_path, splits=splits, unlabeled="more", patient=r"^(p\d)_", labels=labels)
    assert lists["unlabeled"] == [*([] if has_labels else ["p0_a"]), "p3_c", "x", "y"]
    told = "2 images without a label are of patients of validation or test, and left out: more/p1_c.nii.gz, more/p2_c"
    assert told in caplog.text


# what is left out


def excluded(folder: Path, content: object) -> Path:
    (folder / "names.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "names.json"


def test_names_in_a_file_are_left_out_of_all_lists(source: Path, tmp_path: Path, caplog: Log) -> None:
    caplog.set_level(logging.INFO, "medkd")
    names = ["p0_a.nii.gz", "labels/p1_a.nii.gz", "p2_a", "more/x.nii.gz"]
    splits = splits_file(tmp_path, {"train": ["p0_a", "p0_b"], "val": ["p1_a", "p1_b"], "test": ["p2_a", "p2_b"]})
    lists = make(source, tmp_path, splits=splits, unlabeled="more", exclude=excluded(tmp_path, names))
    assert lists == {"training": ["p0_b*"], "validation": ["p1_b*"], "test": ["p2_b*"], "unlabeled": ["y"]}
    assert "4 images are left out, as `exclude` names them." in caplog.text
    assert "p0_a" not in caplog.text


@pytest.mark.parametrize("labels", ["labels", None])
def test_what_is_left_out_is_not_drawn(source: Path, tmp_path: Path, labels: str | None) -> None:
    names = [f"p{patient}_{scan}" for patient in (1, 2, 3) for scan in "ab"]
    shares = RandomSplits(0.5, 0.0)
    lists = make(source, tmp_path, splits=shares, labels=labels, exclude=names, patient=r"^(p\d)_")
    assert len(lists["validation"]) == len(lists["training" if labels else "unlabeled"]) == 2
    assert {name[:2] for cases in lists.values() for name in cases} == {"p0", "p4"}


def test_file_of_names_is_found_here_and_in_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded(source / "more", ["x"])
    assert make(source, tmp_path, unlabeled="more", exclude="more/names.json")["unlabeled"] == ["y"]
    monkeypatch.chdir(tmp_path)
    excluded(tmp_path, ["y"])
    assert make(source, tmp_path, unlabeled="more", exclude="names.json")["unlabeled"] == ["x"]


def test_name_that_several_folders_have_is_left_out_of_all(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "images", "p1/ct", "p2/ct", "p2/mr", "p3/mr")
    splits = RandomSplits(0.5, 0.0)
    lists = make(tmp_path / "set", tmp_path, labels=None, splits=splits, exclude=["ct.nii.gz"])
    assert [len(lists["validation"]), len(lists["unlabeled"])] == [1, 1]
    lists = make(tmp_path / "set", tmp_path, labels=None, splits=splits, exclude=["p1/ct.nii.gz"])
    assert len(lists["validation"]) + len(lists["unlabeled"]) == 3


def test_names_to_leave_out_that_are_no_images_are_told_and_refused_if_none_is_one(
    source: Path, tmp_path: Path, caplog: Log
) -> None:
    make(source, tmp_path, exclude=["p0_a", "q0_a", "q1_a"])
    assert "2 of 3 names to leave out are no images here: q0_a, q1_a." in caplog.text
    message = rf"`exclude` must name images of {re.escape(str(source))}, got 'x.nii.gz', .* \(--images, --unlabeled\)"
    with pytest.raises(ValueError, match=message):
        make(source, tmp_path, exclude=["x.nii.gz"])
    assert len(make(source, tmp_path, exclude=["x.nii.gz"], unlabeled="more")["unlabeled"]) == 1
    assert make(source, tmp_path, exclude=[]) == make(source, tmp_path)


def test_leaving_out_all_training_cases_is_refused(source: Path, tmp_path: Path) -> None:
    splits = splits_file(tmp_path, {"train": ["p0_a"], "val": ["p1_a"]})
    with pytest.raises(ValueError, match="`splits` must leave at least one training case, got 0 training, 1 va"):
        make(source, tmp_path, splits=splits, exclude=["p0_a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": ["p0_a"]}, r"`exclude` must be a list of names, such as \[\"a.nii.gz\"\], got {\"names\""),
        ([1], r"`exclude` must be a list of names, such as .*, got \[1\]"),
        ("[p0_a]", "`exclude` must name a list of names in JSON, got .*names.json"),
    ],
)
def test_file_that_is_no_list_of_names_is_refused(
    source: Path, tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(source, tmp_path, exclude=excluded(tmp_path, content))


def test_missing_file_of_names_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`exclude` must name a JSON file with a list of names, got 'none.js"):
        make(source, tmp_path, exclude="none.json")
