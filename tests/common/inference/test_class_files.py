# SPDX-License-Identifier: Apache-2.0
"""Classes of whole images as a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from medkd.inference.class_files import SaveClassesd, class_names_of


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_table_is_begun_anew_by_each_run_and_checks_its_names(tmp_path: Path) -> None:
    case = {"pred": torch.tensor([0.2, 0.8]), "image": MetaTensor(torch.ones(1), meta={"filename_or_obj": "x.png"})}
    for _ in range(2):
        save = SaveClassesd("pred", tmp_path)
        save(case)
        save(case)
        assert [row["class"] for row in table(tmp_path / "predictions.csv")] == ["1", "1"]
    with pytest.raises(ValueError, match="`pred` must be the probabilities of 3 classes, a, b, c, got shape"):
        SaveClassesd("pred", tmp_path, ["a", "b", "c"])(case)


def test_classes_are_named_by_the_datalist_or_numbered(tmp_path: Path) -> None:
    file = tmp_path / "datalist.json"
    assert class_names_of(str(file), 2) == ["0", "1"]
    file.write_text(json.dumps({"test": [], "labels": {"1": "b", "0": "a"}}))
    assert class_names_of(str(file), 2) == ["a", "b"]
    with pytest.raises(ValueError, match="must name the classes 0, 1, 2, got 1, 0; correct them, or give"):
        class_names_of(str(file), 3)
