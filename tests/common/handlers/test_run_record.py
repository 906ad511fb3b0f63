# SPDX-License-Identifier: Apache-2.0
"""What a run was made with, and how two runs differ in it."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.data.dataset import CacheDataset, Dataset
from torch.utils.data import Subset

import toys
from medkd.handlers.run_record import built_settings, describe_data, differences


def record(data: Any = None, built: Any = None, **settings: Any) -> dict[str, Any]:
    return {"settings": settings, "built": built or {}, "data": data or describe_data()}


def write(folder: Path, *names: str) -> list[dict[str, str]]:
    """Cases with an image and a label each."""
    result = []
    for name in names:
        case = {key: folder / key / f"{name}.nii.gz" for key in ("image", "label")}
        for file in case.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(10))
        result.append({key: str(file) for key, file in case.items()})
    return result


def test_a_file_with_other_content_of_the_same_size_is_told(tmp_path: Path) -> None:
    cases = write(tmp_path, "a", "b")
    old = described(cases)
    Path(cases[1]["label"]).write_bytes(b"123456789" + bytes(1))
    assert told(old, described(cases)) == ["training data: label/b.nii.gz has other content"]


def described(training: list[Any], validation: list[Any] = ()) -> dict[str, Any]:   # type: ignore[assignment]
    loaders = {"training": training, "validation": list(validation)}
    return describe_data(**{name: SimpleNamespace(dataset=Dataset(cases)) for name, cases in loaders.items()})


def told(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    assert json.loads(json.dumps(old)) == old                      # plain values, as checkpoints hold them
    return differences(record(old), record(new))


def test_settings_are_named_with_both_values() -> None:
    old, new = record(rate=0.1, seed=0, size=[1, 2], gone=True), record(rate=0.2, seed=0, size=[1, 3], added="x")
    assert differences(old, new) == [
        "rate: 0.1, now 0.2", "size: [1, 2], now [1, 3]", "gone: True, now not set", "added: not set, now 'x'",
    ]
    assert differences(old, old) == []
    assert differences(record(rate=1), record(rate=1.0)) == []


def test_of_many_settings_the_first_are_named_and_long_values_cut() -> None:
    lines = differences(record(**{f"k{n}": 0 for n in range(20)}), record(**{f"k{n}": "x" * 100 for n in range(20)}))
    assert len(lines) == 13
    assert lines[-1] == "... and 8 more settings"
    assert lines[0] == f"k0: 0, now '{'x' * 75} ..."


def test_settings_that_a_program_does_not_have_are_not_compared_but_what_it_has_built() -> None:
    assert differences(record(rate=0.1), record()) == []
    assert differences(record(built={"a": 1, "b": 1}), record(built={"a": 2, "c": 1})) == ["a: 1, now 2"]


def test_optimizers_and_schedules_tell_what_they_were_built_with_and_not_what_they_count() -> None:
    network = toys.student()

    def build(rate: float, steps: int) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"network": network, "optimizer": optimizer, "lr_scheduler": schedule}

    objects = build(0.1, 5)
    first = built_settings(objects)
    assert (first["optimizer#kind"], first["optimizer#groups#0#lr"], first["lr_scheduler#T_max"]) == ("AdamW", 0.1, 5)
    objects["optimizer"].step()
    objects["lr_scheduler"].step()
    later = built_settings(objects)
    assert {key for key in first if first[key] != later[key]} == {"optimizer#groups#0#lr"}   # hence taken at the start
    assert built_settings(build(0.1, 5)) == first
    changed = differences(record(built=first), record(built=built_settings(build(0.2, 7))))
    assert "optimizer#groups#0#lr: 0.1, now 0.2" in changed
    assert "lr_scheduler#T_max: 5, now 7" in changed


# ---- data ----------------------------------------------------------------------------------------------------------


def test_added_missing_and_changed_files_are_named(tmp_path: Path) -> None:
    cases = write(tmp_path, "a", "b", "c", "d")
    old = described(cases[:3], cases[3:])
    Path(cases[0]["label"]).write_bytes(bytes(1234))
    assert told(old, described([*cases[:2], cases[3]], cases[3:])) == [
        "training data: label/a.nii.gz has 1,234 bytes, had 10",
        "training data: image/c.nii.gz is missing",
        "training data: label/c.nii.gz is missing",
        "training data: image/d.nii.gz is new",
        "training data: label/d.nii.gz is new",
    ]
    Path(cases[0]["label"]).write_bytes(bytes(10))
    assert told(old, described(cases[:3], [])) == [
        "validation data: image/d.nii.gz is missing", "validation data: label/d.nii.gz is missing",
    ]


def test_data_that_have_moved_as_a_whole_are_the_same(tmp_path: Path) -> None:
    cases = write(tmp_path / "here", "a", "b")
    old = described(cases[:1], cases[1:])
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = write(tmp_path / "there", "a", "b")
    assert told(old, described(moved[:1], moved[1:])) == []
    assert told(old, described(moved, moved[1:])) == [
        "training data: image/b.nii.gz is new", "training data: label/b.nii.gz is new",
    ]


def test_a_case_from_another_folder_is_the_only_one_that_is_named(tmp_path: Path) -> None:
    cases = write(tmp_path / "set/part", "a", "b")
    other = write(tmp_path / "other", "a")
    assert told(described(cases), described([*cases, *other])) == [
        f"training data: {tmp_path}/other/image/a.nii.gz is new",
        f"training data: {tmp_path}/other/label/a.nii.gz is new",
    ]


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    cases = [*write(tmp_path / "p1", "scan"), *write(tmp_path / "p2", "scan")]
    old = described(cases)
    Path(cases[1]["image"]).write_bytes(bytes(11))
    assert told(old, described(cases)) == ["training data: p2/image/scan.nii.gz has 11 bytes, had 10"]


@pytest.mark.parametrize("change", ["order", "value", "twice"])
def test_order_values_and_repetition_of_cases_count(tmp_path: Path, change: str) -> None:
    cases = [{**case, "class": 0} for case in write(tmp_path, "a", "b")]
    other = {"order": cases[::-1], "value": [cases[0], {**cases[1], "class": 1}], "twice": [*cases, cases[0]]}[change]
    (line,) = told(described(cases), described(other))
    assert line == "training data: " + (
        "2 cases, now 3" if change == "twice" else "cases in another order, or with other values"
    )


def test_folders_wrappers_and_lists_of_files_are_cases_too(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom/1.dcm").touch()
    (case,) = write(tmp_path, "a")
    cases: list[Any] = [{"image": [case["image"], case["label"]], "label": tmp_path / "dicom", "patient": "p"}]
    dataset = Subset(CacheDataset(cases, transform=[], num_workers=None, progress=False), [0])
    found = describe_data(training=SimpleNamespace(dataset=dataset))
    assert found["root"] == str(tmp_path)
    mark = [10, zlib.crc32(bytes(20))]                              # its beginning and its end are the same
    assert found["lists"]["training"] == [[
        ["image", "image/a.nii.gz", mark], ["image", "label/a.nii.gz", mark], ["label", "dicom", [1, 0]],
        ["patient", "p", None],
    ]]


def test_a_word_is_no_file_even_where_something_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p1").mkdir()
    (case,) = write(tmp_path / "set", "a")
    found = described([{**case, "patient": "p1"}])
    assert found["root"] == str(tmp_path / "set")
    assert found["lists"]["training"][0][-1] == ["patient", "p1", None]


def test_data_without_files_are_compared_by_their_number() -> None:
    assert told(described(toys.cases(4)), described(toys.cases(4, seed=1))) == []
    assert told(described(toys.cases(4)), described(toys.cases(6))) == ["training data: 4 cases, now 6"]
    assert describe_data(training=object(), validation=None)["lists"] == {"training": [], "validation": []}
