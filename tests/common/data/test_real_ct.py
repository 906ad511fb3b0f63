# SPDX-License-Identifier: Apache-2.0
"""The way from a folder of real CT to a checked data list. Skipped where the data are not there.

The folder is named by the variable MEDKD_DATA, or lies beside the repository in shared/data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from medkd.data.check import DataError, check_data
from medkd.data.datalist import SplitsFile, load_datalist, make_datalist

DATA = Path(os.environ.get("MEDKD_DATA", Path(__file__).parents[4] / "shared/data"))


def found(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not in the data folder; set MEDKD_DATA")
    return DATA / name


def listed(name: str, tmp_path: Path, **splits: str) -> Path:
    source = found(name)
    return make_datalist(source, tmp_path, splits=SplitsFile(source / "splits.json", **splits))


def test_head_and_neck_ct_passes_the_check(tmp_path: Path) -> None:
    path = listed("ct_headneck_openkbp", tmp_path)
    cases = {key: load_datalist(path, key) for key in ("training", "validation")}
    report = check_data(cases["training"], cases["validation"], num_classes=8)
    assert len(cases["training"]) == 18
    assert "18" in report.table()


@pytest.mark.parametrize("labeled_cases", [None, 4, 0])
def test_scans_without_labels_join_those_that_keep_theirs_and_pass_the_check(
    tmp_path: Path, labeled_cases: int | None
) -> None:
    source = found("ct_headneck_openkbp")
    path = make_datalist(
        source, tmp_path, splits=SplitsFile(source / "splits.json"), unlabeled="extra_unlabeled/images",
        exclude="extra_unlabeled/blanked.json", labeled_cases=labeled_cases,
    )
    lists = {key: load_datalist(path, key) for key in ("training", "validation", "test", "unlabeled")}
    kept = 18 if labeled_cases is None else labeled_cases
    assert {key: len(items) for key, items in lists.items()} == {
        "training": kept, "validation": 4, "test": 4, "unlabeled": 66 + 18 - kept}
    if labeled_cases == 4:
        report = check_data(**lists, num_classes=8, needs_labels=False, intensity_range=(-200, 300))
        assert report.without_label == {"training": 0, "validation": 0, "test": 0, "unlabeled": 80}


def test_label_outside_the_classes_is_refused_on_real_ct(tmp_path: Path) -> None:
    path = listed("ct_headneck_openkbp", tmp_path)
    with pytest.raises(DataError, match="7"):
        check_data(load_datalist(path, "training")[:2], load_datalist(path, "validation")[:1], num_classes=7)


def test_one_case_in_all_lists_is_refused_unless_allowed(tmp_path: Path) -> None:
    split = "smoke_test"
    path = listed("ct_torso_totalsegmentator", tmp_path, training=split, validation=split, test=split)
    case = load_datalist(path, "training")
    with pytest.raises(DataError, match="no image in common"):
        check_data(case, case, num_classes=17)
    check_data(case, case, num_classes=17, allow_shared=True)
    assert json.loads(path.read_text())["data_root"] == str((DATA / "ct_torso_totalsegmentator").resolve())
