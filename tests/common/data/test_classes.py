# SPDX-License-Identifier: Apache-2.0
"""Classes of whole images: in a datalist, from folders, drawn by class and patient, and checked before training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medkd.data.check import DataError, check_data
from medkd.data.datalist import RandomSplits, SplitsFile, load_datalist, make_class_datalist
from medkd.data.soft_labels import FillLabeld
from medkd.handlers.agreement import TeacherAgreement
from medkd.ops.ignored import UNLABELED

CLASSES = ("polyp", "low", "high")
PATIENT = r"/[a-z]*(\d+)-"


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """12 patients with 3 to 6 pictures of several classes, as in EBHI; 12, 24 and 12 pictures of the classes."""
    number = 0
    for patient in range(12):
        for kind, count in (("polyp", 1), ("low", 2), ("high", int(patient < 4) * 3)):
            for place in range(count):
                number += 1
                draw(tmp_path / "data/images" / kind / f"gt{2000 + patient}-1-{place}.png", number)
    return tmp_path / "data"


def lists_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: load_datalist(path, name) for name in ("training", "validation", "test")}


def write(folder: Path, labels: list[Any], names: Any = None, name: str = "training") -> Path:
    items = [{"image": f"{place}.png"} | ({} if label is None else {"label": label})
             for place, label in enumerate(labels)]
    path = folder / "datalist.json"
    path.write_text(json.dumps({name: items, "labels": dict(enumerate(CLASSES)) if names is None else names}))
    return path


def test_numbers_and_names_of_classes_are_read_as_numbers(tmp_path: Path) -> None:
    items = load_datalist(write(tmp_path, ["high", 0, None, "polyp"]), "training")
    assert [item.get("label") for item in items] == [2, 0, None, 0]
    assert items[0]["image"] == str(tmp_path / "0.png")
    assert "label" not in items[2]


def test_labels_that_are_files_stay_files_whatever_their_names(tmp_path: Path) -> None:
    items = load_datalist(write(tmp_path, ["labels/high.png", "polyp.png"]), "training")
    assert [item["label"] for item in items] == [str(tmp_path / "labels/high.png"), str(tmp_path / "polyp.png")]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["high", "polip"], r"\[1\] must have a class as `label`, as others have, got 'polip'; did you mean 'polyp'"),
        ([1, "a.png"], r"training\[1\] must have a class as `label`, .* got 'a.png'; there are 'polyp', 'low', 'high'"),
        ([1, True], r"training\[1\] must have a class as `label`, .* got True"),
        ([1.5], r"training\[0\] must have one path as `label`, got 1.5"),
    ],
)
def test_a_label_that_is_no_class_is_refused_where_others_are(tmp_path: Path, labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_datalist(write(tmp_path, labels), "training")


def test_an_evaluation_takes_class_zero_as_a_label(tmp_path: Path) -> None:
    path = write(tmp_path, [0, 0])
    draw(tmp_path / "0.png")
    draw(tmp_path / "1.png")
    assert [item["label"] for item in load_datalist(path, "training", labeled=True)] == [0, 0]
    with pytest.raises(ValueError, match="must have a label for each image, .* got none for 1 of 2"):
        load_datalist(write(tmp_path, [0, None]), "training", labeled=True)
    with pytest.raises(ValueError, match="`unlabeled` .* must have images without a label, got one for 1 of 2"):
        load_datalist(write(tmp_path, [None, 0], name="unlabeled"), "unlabeled")


def test_random_lists_have_their_share_of_each_class_and_no_patient_in_common(folders: Path, tmp_path: Path) -> None:
    path = make_class_datalist(folders, tmp_path / "out", RandomSplits(0.25, 0.25), patient=PATIENT)
    lists = lists_of(path)
    owners = {name: {Path(item["image"]).name.split("-")[0] for item in items} for name, items in lists.items()}
    assert sum(map(len, owners.values())) == len(set.union(*owners.values())) == 12
    total = Counter(item["label"] for items in lists.values() for item in items)
    assert total == {0: 12, 1: 24, 2: 12}                           # high, low, polyp: sorted by name
    for name, share in (("training", 0.5), ("validation", 0.25), ("test", 0.25)):
        counts = Counter(item["label"] for item in lists[name])
        assert all(abs(counts[kind] - share * total[kind]) <= 3 for kind in total), (name, counts)
    again = make_class_datalist(folders, tmp_path / "again", RandomSplits(0.25, 0.25), patient=PATIENT)
    assert path.read_text() == again.read_text()
    other = make_class_datalist(folders, tmp_path / "other", RandomSplits(0.25, 0.25, seed=1), patient=PATIENT)
    assert path.read_text() != other.read_text()


def test_the_order_of_the_classes_is_that_of_the_names(folders: Path, tmp_path: Path) -> None:
    path = make_class_datalist(folders, tmp_path / "out", label_names=",".join(CLASSES), patient=PATIENT)
    content = json.loads(path.read_text())
    assert content["labels"] == {"0": "polyp", "1": "low", "2": "high"}
    assert content["training"][0]["label"] in CLASSES
    for items in lists_of(path).values():
        assert all(CLASSES[item["label"]] == Path(item["image"]).parent.name for item in items)


def test_a_file_of_splits_decides_and_must_keep_patients_apart(folders: Path, tmp_path: Path) -> None:
    splits = {"train": ["polyp/gt2000-1-0.png", "low/gt2000-1-0"], "val": ["high/gt2001-1-0.png"], "test": []}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    split = SplitsFile(tmp_path / "splits.json")
    lists = lists_of(make_class_datalist(folders, tmp_path / "out", split, patient=PATIENT))
    assert [(Path(item["image"]).name, item["label"]) for item in lists["training"]] == [
        ("gt2000-1-0.png", 2), ("gt2000-1-0.png", 1)
    ]
    (tmp_path / "splits.json").write_text(json.dumps(splits | {"val": ["high/gt2000-1-0.png"]}))
    with pytest.raises(ValueError, match="must keep training and validation apart, got '2000'"):
        make_class_datalist(folders, tmp_path / "out", split, patient=PATIENT)


def test_images_may_be_left_out(folders: Path, tmp_path: Path) -> None:
    path = make_class_datalist(folders, tmp_path / "out", patient=PATIENT, exclude=["polyp/gt2003-1-0.png"])
    images = [item["image"] for items in lists_of(path).values() for item in items]
    assert len(images) == 47
    assert not any(image.endswith("polyp/gt2003-1-0.png") for image in images)


def test_folders_that_hold_no_classes_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`label_names` must be the folders of the classes, 'high', 'low', 'polyp', "):
        make_class_datalist(folders, tmp_path / "out", label_names="polyp,low")
    with pytest.raises(ValueError, match="`images` must hold a folder per class, two or more, got .* beside them"):
        make_class_datalist(folders / "images", tmp_path / "out", images="low")
    with pytest.raises(ValueError, match="`patient` must match every image, got"):
        make_class_datalist(folders, tmp_path / "out", patient="x([0-9]+)")
    with pytest.raises(ValueError, match="`test` must be a share|`training` must be a share"):
        make_class_datalist(folders, tmp_path / "out", RandomSplits(0.8, 0.8))
    with pytest.raises(ValueError, match="`output` must lie outside `source`"):
        make_class_datalist(folders, folders / "out")


def test_the_check_counts_cases_by_class(folders: Path, tmp_path: Path) -> None:
    lists = lists_of(make_class_datalist(folders, tmp_path / "out", patient=PATIENT))
    report = check_data(lists["training"], lists["validation"], 3, lists["test"], spatial_dims=2, channels=[3])
    assert report.by_case
    assert report.voxels["training"] == Counter(item["label"] for item in lists["training"])
    assert report.without_label == {"training": 0, "validation": 0, "test": 0}
    table = report.table(dict(zip("012", sorted(CLASSES), strict=True)))
    assert "cases of 2 polyp" in table
    assert "voxels of" not in table


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")   # Pillow leaves the broken file open
def test_the_check_lists_wrong_classes_broken_pictures_and_classes_without_a_training_case(tmp_path: Path) -> None:
    for name in "abcd":
        draw(tmp_path / f"{name}.png", ord(name))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:100])
    labels = {"a": 0, "b": 1, "c": 4, "d": -1}
    items = [{"image": str(tmp_path / f"{name}.png"), "label": label} for name, label in labels.items()]
    with pytest.raises(DataError) as error:
        check_data(items, [{"image": str(tmp_path / "c.png"), "label": 0}], 3, allow_shared=True)
    said = str(error.value)
    assert f"{tmp_path}/c.png must have a class in 0..2 as label, got 4; correct it" in said
    assert f"{tmp_path}/d.png must have a class in 0..2 as label, got -1" in said
    assert f"{tmp_path}/b.png" in said
    assert "`training` must have a case of each class, got none of 2; move some there" in said


def test_a_teacher_may_know_classes_that_no_training_case_has(tmp_path: Path) -> None:
    for name in "ab":
        draw(tmp_path / f"{name}.png", ord(name))
    first, second = ({"image": str(tmp_path / f"{name}.png"), "label": 0} for name in "ab")
    check_data([first], [second], 3, needs_labels=False)
    with pytest.raises(DataError, match="got none of 1, 2;"):
        check_data([first], [second], 3)
    with pytest.raises(DataError, match=r"got none of 1;"):
        check_data([first], [second | {"label": 1}])                # without a number: classes that occur


def test_classes_and_maps_do_not_mix(tmp_path: Path) -> None:
    for name in "ab":
        draw(tmp_path / f"{name}.png", ord(name))
    items = [{"image": str(tmp_path / "a.png"), "label": 0}]
    with pytest.raises(DataError, match="Labels must be all classes or all files, got 1 files beside classes: "):
        check_data(items, [{"image": str(tmp_path / "b.png"), "label": str(tmp_path / "b.png")}], 1)


def test_a_case_without_a_class_shares_a_batch_with_others() -> None:
    fill = FillLabeld(dtype="class")
    image = torch.rand(3, 4, 4)
    labels = [fill(item)["label"] for item in ({"image": image, "label": 2}, {"image": image})]
    batch = torch.stack(labels)
    assert batch.tolist() == [2, UNLABELED]
    assert batch.dtype == torch.int64


@pytest.mark.parametrize(("labels", "replaces"), [([0, 0], False), ([None, None], True)])
def test_validation_cases_of_class_zero_are_labeled(labels: list[Any], replaces: bool) -> None:
    data = [{"image": "a.png"} | ({} if label is None else {"label": label}) for label in labels]

    class Loader:
        dataset = type("Data", (), {"data": data})()

    evaluator = type("Evaluator", (), {"data_loader": Loader()})()
    assert TeacherAgreement(evaluator).is_needed is replaces
