# SPDX-License-Identifier: Apache-2.0
"""Datalists: paths become absolute, splits are honoured, and the source folder is left as it was."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medkd.data.datalist import RandomSplits, SplitsFile, load_datalist, make_datalist, write_datalist


def fill(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def splits_file(folder: Path, content: object) -> Path:
    path = folder / "splits.json"
    path.write_text(json.dumps(content))
    return path


def stems(path: Path, key: str) -> list[str]:
    return [Path(item["image"]).name.removesuffix(".nii.gz") for item in load_datalist(path, key)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    names = [f"p{patient}_{scan}.nii.gz" for patient in range(5) for scan in "ab"]
    fill(tmp_path / "source" / "images", [*names, "extra.nii.gz", "._p0_a.nii.gz", "notes.txt"])
    fill(tmp_path / "source" / "labels", names)
    return tmp_path / "source"


# load_datalist


def test_paths_are_relative_to_the_file_without_a_data_root(tmp_path: Path) -> None:
    item = {"image": "a/x.nii", "label": "b/x.nii", "age": "7"}
    path = write_datalist(tmp_path / "list.json", {"training": [item]})
    expected = {"image": str(tmp_path / "a/x.nii"), "label": str(tmp_path / "b/x.nii"), "age": "7"}
    assert load_datalist(path, "training") == [expected]


@pytest.mark.parametrize("absolute", [True, False])
def test_paths_are_relative_to_the_data_root(tmp_path: Path, absolute: bool) -> None:
    root = str(tmp_path / "data") if absolute else "../data"
    path = write_datalist(tmp_path / "lists" / "list.json", {"data_root": root, "test": [{"image": "x.nii"}]})
    assert load_datalist(path, "test") == [{"image": str(tmp_path / "data" / "x.nii")}]


def test_absolute_paths_and_further_images_of_an_item_are_kept(tmp_path: Path) -> None:
    item = {"image": str(tmp_path / "x.nii"), "teacher_image": "full/x.nii"}
    path = write_datalist(tmp_path / "list.json", {"data_root": "elsewhere", "training": [item]})
    expected = {"image": item["image"], "teacher_image": str(tmp_path / "elsewhere/full/x.nii")}
    assert load_datalist(path, "training") == [expected]


def test_missing_file_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path` must name a datalist, got .*none.json.*medkd data"):
        load_datalist(tmp_path / "none.json", "training")


def test_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("{training: ")
    with pytest.raises(ValueError, match=r"must name a datalist in JSON, got .*list.json"):
        load_datalist(tmp_path / "list.json", "training")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        load_datalist(tmp_path / "list.json", "training")


def test_missing_list_names_the_lists_that_exist(tmp_path: Path) -> None:
    path = write_datalist(tmp_path / "list.json", {"train": [], "val": [], "labels": {}})
    with pytest.raises(ValueError, match=r"`key` must name a list .* got 'training'; it has 'train', 'val'"):
        load_datalist(path, "training")


@pytest.mark.parametrize("item", [{"label": "x.nii"}, "x.nii", {"image": ""}])
def test_item_without_an_image_is_refused_by_its_place(tmp_path: Path, item: object) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": [{"image": "a.nii"}, item]})
    with pytest.raises(ValueError, match=r"training\[1\] must be an object with the path of its `image`"):
        load_datalist(path, "training")


def test_item_with_several_paths_as_label_is_refused(tmp_path: Path) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": [{"image": "a.nii", "label": ["b.nii"]}]})
    with pytest.raises(ValueError, match=r"training\[0\] must have one path as `label`"):
        load_datalist(path, "training")


def test_labeled_list_needs_a_label_and_files_of_each_case(tmp_path: Path) -> None:
    fill(tmp_path, ["a.nii", "b.nii"])
    whole, lone = {"image": "a.nii", "label": "b.nii"}, {"image": "b.nii"}
    content = {"test": [whole], "lone": [whole, lone], "gone": [whole | {"label": "none.nii"}], "empty": []}
    path = write_datalist(tmp_path / "list.json", content)
    assert load_datalist(path, "test", labeled=True) == load_datalist(path, "test")
    with pytest.raises(ValueError, match=r"`lone` of .* got none for 1 of 2: .*b.nii; add them, or predict"):
        load_datalist(path, "lone", labeled=True)
    with pytest.raises(ValueError, match=r"`gone` of .* must name files that exist, got 1 that do not: .*none.nii"):
        load_datalist(path, "gone", labeled=True)
    with pytest.raises(ValueError, match=r"`empty` of .* must have at least one case, got none"):
        load_datalist(path, "empty", labeled=True)


def test_label_without_a_path_is_refused(tmp_path: Path) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": [{"image": "a.nii", "label": ""}]})
    with pytest.raises(ValueError, match=r'training\[0\] must have one path as `label`, got ""; leave it out'):
        load_datalist(path, "training")


def test_absent_list_or_file_gives_nothing_where_that_is_allowed(tmp_path: Path) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": [{"image": "a.nii"}], "labels": {}, "unlabeled": 3})
    assert load_datalist(path, "test", missing_ok=True) == []
    assert load_datalist(tmp_path / "none" / "list.json", "unlabeled", missing_ok=True) == []
    assert load_datalist(path, "training", missing_ok=True) == load_datalist(path, "training")
    with pytest.raises(ValueError, match="`key` must name a list of"):
        load_datalist(path, "unlabeled", missing_ok=True)
    (tmp_path / "list.json").write_text("{unlabeled: ")
    with pytest.raises(ValueError, match="must name a datalist in JSON"):
        load_datalist(path, "unlabeled", missing_ok=True)


def test_case_without_labels_that_has_one_is_refused_by_name(tmp_path: Path) -> None:
    items = [{"image": "a.nii"}, {"image": "b.nii", "label": "c.nii"}]
    path = write_datalist(tmp_path / "list.json", {"training": items, "unlabeled": items})
    assert len(load_datalist(path, "training")) == 2
    message = (r"`unlabeled` of .*list.json must have images without a label, got one for 1 of 2: .*b.nii; "
               "list these cases as `training`, or take their `label` away")
    with pytest.raises(ValueError, match=message):
        load_datalist(path, "unlabeled")


# write_datalist


def test_failed_write_keeps_the_old_file_and_leaves_no_draft(tmp_path: Path) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": []})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_datalist(path, {"training": [object()]})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["list.json"]


def test_a_list_is_whole_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, disk: list[tuple[str, int, int]]
) -> None:
    file = write_datalist(tmp_path / "list.json", {"training": []}).stat()
    assert disk == [("synced", file.st_ino, file.st_size), ("renamed", file.st_ino, file.st_size)]


# make_datalist


def test_splits_file_with_synonyms_and_bare_names_is_followed(source: Path, tmp_path: Path) -> None:
    named = {"train": ["p0_a", "p1_a.nii.gz"], "val": ["p2_a"], "testing": ["p3_a"], "x": ["?"]}
    splits = splits_file(tmp_path, named)
    path = make_datalist(source, tmp_path / "out", SplitsFile(splits))
    assert path == tmp_path / "out" / "datalist.json"
    assert stems(path, "training") == ["p0_a", "p1_a"]
    assert stems(path, "validation") == ["p2_a"]
    assert stems(path, "test") == ["p3_a"]
    content = json.loads(path.read_text())
    assert content["data_root"] == str(source)
    assert content["training"][0] == {"image": "images/p0_a.nii.gz", "label": "labels/p0_a.nii.gz"}
    assert content["unlabeled"] == []
    assert content["labels"] == {}


def test_source_folder_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    before = sorted(source.rglob("*"))
    make_datalist(source, tmp_path / "list.json")
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("output", ["source", "source/lists/list.json", "source/images/../x.json"])
def test_output_inside_the_source_is_refused(source: Path, tmp_path: Path, output: str) -> None:
    with pytest.raises(ValueError, match="`output` must lie outside `source`"):
        make_datalist(source, tmp_path / output)


def test_one_split_named_for_several_lists_is_used_for_all(source: Path, tmp_path: Path) -> None:
    splits = splits_file(tmp_path, {"smoke_test": ["p0_a"]})
    plan = SplitsFile(splits, training="smoke_test", validation="smoke_test", test="smoke_test")
    path = make_datalist(source, tmp_path / "out", plan)
    assert stems(path, "training") == stems(path, "validation") == stems(path, "test") == ["p0_a"]


def test_lists_share_a_case_only_when_both_were_named(source: Path, tmp_path: Path) -> None:
    splits = splits_file(tmp_path, {"mine": ["p0_a"], "Val": ["p0_a"]})
    for validation in (None, "Val"):
        plan = SplitsFile(splits, training="mine", validation=validation)
        if validation:
            assert stems(make_datalist(source, tmp_path / "out", plan), "validation") == ["p0_a"]
            continue
        with pytest.raises(ValueError, match="keep training and validation apart, got 'p0_a' in both"):
            make_datalist(source, tmp_path / "out", plan)


def test_split_that_nobody_named_is_an_error_with_the_option(source: Path, tmp_path: Path) -> None:
    splits = splits_file(tmp_path, {"smoke_test": ["p0_a"]})
    with pytest.raises(ValueError, match=r"one split for training.* got 'smoke_test'.*--training NAME"):
        make_datalist(source, tmp_path / "out", SplitsFile(splits))
    with pytest.raises(ValueError, match=r"`test` must be a split of .* got 'smoke'; it has 'smoke_test'"):
        make_datalist(source, tmp_path / "out", SplitsFile(splits, training="smoke_test", test="smoke"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["p0_a"], "val": ["p0_a"]}, "keep training and validation apart, got 'p0_a' in both"),
        ({"train": ["p0_a"], "val": ["p1_a"], "test": ["p1_a"]}, "keep validation and test apart"),
        ({"train": ["p9_z"]}, "must name images that exist, got 'p9_z' in 'train'"),
        ({"train": ["p0_a", "p0_a.nii.gz"]}, "must name each case once, got 'p0_a' twice in 'train'"),
        ({"train": ["extra"]}, "training must have a label for each image, got none for 'extra'"),
        ({"train": []}, "must leave at least one training case, got 0 training"),
        ({"train": "p0_a"}, "must hold a list of names as 'train', got \"p0_a\""),
        ({"train": ["p0_a"], "training": ["p1_a"]}, "must have one split for training"),
        ({"train": ["p0_a"], "val": ["p1_a"], "valid": ["p2_a"]}, "must have one split for validation"),
        (["p0_a"], "must hold a JSON object, got a list"),
    ],
)
def test_wrong_splits_are_refused(source: Path, tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_datalist(source, tmp_path / "out", SplitsFile(splits_file(tmp_path, content)))
    assert not (tmp_path / "out").exists()


def test_missing_splits_file_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`splits` must name a file of splits, got .*none.json"):
        make_datalist(source, tmp_path / "out", SplitsFile(tmp_path / "none.json"))


def test_random_splits_keep_patients_together_and_repeat_by_seed(source: Path, tmp_path: Path) -> None:
    plan = RandomSplits(validation=0.2, test=0.2, seed=3)
    path = make_datalist(source, tmp_path / "a.json", plan, patient=r"^(p\d)_")
    lists = {key: stems(path, key) for key in ("training", "validation", "test")}
    assert {key: len(names) for key, names in lists.items()} == {"training": 6, "validation": 2, "test": 2}
    owners = [{name[:2] for name in names} for names in lists.values()]
    assert not owners[0] & owners[1]
    assert not owners[0] & owners[2]
    assert not owners[1] & owners[2]
    again = make_datalist(source, tmp_path / "b.json", plan, patient=r"^(p\d)_")
    assert again.read_text() == path.read_text()
    other = make_datalist(source, tmp_path / "c.json", RandomSplits(0.2, 0.2, seed=4), patient=r"^(p\d)_")
    assert other.read_text() != path.read_text()


def test_random_splits_do_not_depend_on_the_process(tmp_path: Path) -> None:
    patients = [f"p{number:02}" for number in range(20)]
    for folder in ("images", "labels"):
        fill(tmp_path / "set" / folder, [f"{name}.nii.gz" for name in patients])
    np.random.default_rng(0).shuffle(patients)
    path = make_datalist(tmp_path / "set", tmp_path / "out")       # 15 % and 20 %
    found = [stems(path, key) for key in ("validation", "test", "training")]
    assert found == [sorted(patients[:3]), sorted(patients[3:7]), sorted(patients[7:])]


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        fill(tmp_path / "set" / folder, ["a.PNG", "b.Nii.GZ"])
    path = make_datalist(tmp_path / "set", tmp_path / "out", RandomSplits(0.5, 0))
    assert {load_datalist(path, key)[0]["image"][-4:] for key in ("training", "validation")} == {".PNG", "i.GZ"}


def test_paths_are_absolute_when_the_list_is_named_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_datalist(tmp_path / "list.json", {"training": [{"image": "x.nii"}]})
    monkeypatch.chdir(tmp_path)
    assert load_datalist("list.json", "training") == [{"image": str(tmp_path / "x.nii")}]


def test_random_splits_take_labeled_cases_only_and_at_least_one_each(source: Path, tmp_path: Path) -> None:
    path = make_datalist(source, tmp_path / "out", RandomSplits(validation=0.01, test=0.0))
    assert [len(stems(path, key)) for key in ("training", "validation", "test")] == [9, 1, 0]
    assert "extra" not in stems(path, "training")


def test_splits_file_that_divides_a_patient_is_refused(source: Path, tmp_path: Path) -> None:
    splits = SplitsFile(splits_file(tmp_path, {"train": ["p0_a"], "val": ["p0_b"]}))
    make_datalist(source, tmp_path / "out", splits)
    with pytest.raises(ValueError, match="keep training and validation apart, got 'p0' in both"):
        make_datalist(source, tmp_path / "out", splits, patient=r"^(p\d)_")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"^(p\d", "`patient` must be a regular expression"),
        (r"^p\d", "`patient` must have one group, the patient, got .* with 0"),
        (r"^(q\d)", "`patient` must match every labeled case, got .* for 'p0_a', 'p0_b'"),
        (r"^(q)?p", "`patient` must match every labeled case, got .* for 'p0_a', 'p0_b'"),
    ],
)
def test_wrong_patient_pattern_is_refused(source: Path, tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_datalist(source, tmp_path / "out", patient=pattern)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RandomSplits(validation=0.5, test=0.5), "must have enough labeled patients .* got 10 with 5"),
        (RandomSplits(validation=1.5), "`validation` must be a share of the patients, 0 to 1, got 1.5"),
        (RandomSplits(test=-0.5), "`test` must be a share of the patients, 0 to 1, got -0.5"),
    ],
)
def test_impossible_shares_are_refused(
    source: Path, tmp_path: Path, plan: RandomSplits, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_datalist(source, tmp_path / "out", plan)


def test_missing_validation_split_is_warned_of(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_datalist(source, tmp_path / "out", SplitsFile(splits_file(tmp_path, {"train": ["p0_a"]})))
    assert "No validation case" in caplog.text


def test_unlabeled_images_exclude_what_is_labeled_or_split(source: Path, tmp_path: Path) -> None:
    fill(source / "more", ["new.nii.gz", "p0_a.nii.gz"])
    splits = SplitsFile(splits_file(tmp_path, {"train": ["p0_a"], "val": ["p1_a"]}))
    assert stems(make_datalist(source, tmp_path / "a", splits, unlabeled="more"), "unlabeled") == ["new"]
    assert stems(make_datalist(source, tmp_path / "b", splits, unlabeled="images"), "unlabeled") == ["extra"]


def test_further_folders_are_trained_with_behind_the_others(source: Path, tmp_path: Path) -> None:
    fill(source / "more/images", ["q0.nii.gz", "q1.nii.gz", "p3_c.nii.gz", "q2.nii.gz", "lone.nii.gz"])
    fill(source / "more/labels", ["q0.nii.gz", "q1.nii.gz", "p3_c.nii.gz", "q2.nii.gz"])
    splits = SplitsFile(splits_file(tmp_path, {"train": ["p0_a", "p1_a"], "val": ["p2_a"], "test": ["p3_a"]}))
    options = {"splits": splits, "more": ["more"], "exclude": ["q1"], "patient": "^([a-z]+[0-9]+)"}
    path = make_datalist(source, tmp_path / "list", **options)
    assert stems(path, "training") == ["p0_a", "p1_a", "q0", "q2"]  # p3 is tested with, q1 excluded
    assert load_datalist(path, "training")[2]["label"] == str(source / "more/labels/q0.nii.gz")
    few = make_datalist(source, tmp_path / "few", labeled_cases=3, **options)
    assert (stems(few, "training"), stems(few, "unlabeled")) == (["p0_a", "p1_a", "q0"], ["q2"])
    drawn = make_datalist(source, tmp_path / "drawn", more=["more"], exclude=["p3_c"])
    assert stems(drawn, "training")[-3:] == ["q0", "q1", "q2"]
    assert not {"q0", "q1", "q2"} & {*stems(drawn, "validation"), *stems(drawn, "test")}


def test_further_folders_need_labels_and_names_of_their_own(source: Path, tmp_path: Path) -> None:
    fill(source / "more/images", ["p0_a.nii.gz"])
    fill(source / "more/labels", ["p0_a.nii.gz"])
    with pytest.raises(ValueError, match=r"`more` must hold cases of other names, got .*p0_a.* in 'more', too"):
        make_datalist(source, tmp_path / "list", more=["more"])
    with pytest.raises(ValueError, match=r"`more` must come with labels, got \['more'\] without"):
        make_datalist(source, tmp_path / "list", labels=None, more=["more"])
    with pytest.raises(FileNotFoundError, match="'nothing/images'"):
        make_datalist(source, tmp_path / "list", more=["nothing"])


def test_other_folder_names_and_other_label_formats_are_found(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "imagesTr", ["a.nii.gz", "b.nii.gz"])
    fill(tmp_path / "set" / "labelsTr", ["a.nii", "b.nrrd"])
    path = make_datalist(tmp_path / "set", tmp_path / "out", RandomSplits(0.5, 0), "imagesTr", "labelsTr")
    found = {Path(load_datalist(path, key)[0]["label"]).name for key in ("training", "validation")}
    assert found == {"a.nii", "b.nrrd"}


def test_missing_folders_are_named_with_those_that_exist(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`source` must be a folder with images and labels, .*none"):
        make_datalist(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"`labels` must be a folder of .* it has 'images', 'labels'"):
        make_datalist(source, tmp_path / "out", labels="labelsTr")


def test_folder_without_volumes_or_with_a_case_twice_is_refused(source: Path, tmp_path: Path) -> None:
    fill(source / "empty", ["notes.txt"])
    with pytest.raises(ValueError, match=r"`images` must hold volumes or images, got .*empty"):
        make_datalist(source, tmp_path / "out", images="empty")
    fill(source / "twice", ["a.nii", "a.nii.gz"])
    message = r"`images` must hold one file per case, got 'twice/a.nii' and 'a.nii.gz'"
    with pytest.raises(ValueError, match=message):
        make_datalist(source, tmp_path / "out", images="twice")


@pytest.mark.parametrize(
    "names",
    [
        "background, liver,spleen",
        ["background", "liver", "spleen"],
        {"0": "background", "1": "liver", "2": "spleen"},
        {"background": 0, "liver": 1, "spleen": 2},
        "file",
    ],
)
def test_label_names_come_in_several_forms(source: Path, tmp_path: Path, names: object) -> None:
    if names == "file":
        names = tmp_path / "dataset.json"
        labels = {"0": "background", "1": "liver", "2": "spleen"}
        names.write_text(json.dumps({"labels": labels, "name": "x"}))
    path = make_datalist(source, tmp_path / "out", label_names=names)
    assert json.loads(path.read_text())["labels"] == {"0": "background", "1": "liver", "2": "spleen"}


@pytest.mark.parametrize("names", ["", "background,,liver", {"1": "liver"}, {"a": "b"}])
def test_wrong_label_names_are_refused(source: Path, tmp_path: Path, names: object) -> None:
    message = re.escape("`label_names` must name the values from 0, the background, on")
    with pytest.raises(ValueError, match=message):
        make_datalist(source, tmp_path / "out", label_names=names)


def test_a_list_that_two_threads_write_is_whole_at_every_moment(tmp_path: Path) -> None:
    content = {"training": [{"image": f"{number}.nii.gz"} for number in range(300)]}
    path = tmp_path / "datalist.json"

    def write_and_read(_: int) -> bool:
        return bool(json.loads(write_datalist(path, content).read_text()) == content)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(200)))
