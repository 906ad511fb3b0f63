# SPDX-License-Identifier: Apache-2.0
"""`medkd check-data`: the table, the next command, and all problems at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medkd.cli import main

Capture = pytest.CaptureFixture[str]
Refused = Callable[[list[str], str], None]


def test_check_counts_instance_numbers_and_lists_classes_that_are_given(tmp_path: Path, capsys: Capture) -> None:
    label = np.arange(30, dtype=np.uint16).reshape(2, 3, 5)
    for name, volume in (("a", label), ("b", label + 1), ("label", label)):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii")
    items = {key: [{"image": f"{key[0]}.nii", "label": "label.nii"}] for key in ("a training", "b validation")}
    lists = {key.split()[1]: item for key, item in items.items()}
    (tmp_path / "datalist.json").write_text(json.dumps({**lists, "labels": {}}))
    assert main(["check-data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "voxels of" not in said
    assert next(line for line in said.splitlines() if "label values" in line).split()[-3:] == ["30", "30", "0"]
    assert main(["check-data", str(tmp_path), "--num_classes", "30"]) == 0
    assert "voxels of 29 " in capsys.readouterr().out


def test_check_shows_the_table_with_label_names_and_the_next_command(
    phantoms: Path, capsys: Capture
) -> None:
    assert main(["check-data", str(phantoms / "datalist.json"), "--num_classes", "7"]) == 0
    said = capsys.readouterr().out
    assert "voxels of 5 pancreas" in said
    assert "The data can be used." in said
    assert f"--dataset_dir {phantoms}" in said


def test_check_takes_the_folder_and_bounds_labels_by_their_names(
    phantoms: Path, tmp_path: Path, capsys: Capture, refused: Refused
) -> None:
    assert main(["check-data", str(phantoms)]) == 0
    content = json.loads((phantoms / "datalist.json").read_text())
    content |= {"data_root": str(phantoms), "labels": {"0": "background", "1": "liver"}}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    capsys.readouterr()
    refused(["check-data", str(tmp_path)], "must have values in 0..1, got 2, 3, 4, 5, 6")


def test_check_lists_all_problems(phantoms: Path, tmp_path: Path, capsys: Capture, refused: Refused) -> None:
    image = nib.load(phantoms / "images" / "case_000.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), tmp_path / "zero.nii.gz")
    item = {"image": "zero.nii.gz", "label": str(phantoms / "labels" / "case_000.nii.gz")}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [item]}))
    refused(["check-data", str(tmp_path)], "zero.nii.gz must show something, got 0 in all voxels")
    assert main(["check-data", str(tmp_path)]) == 2
    assert "`validation` must have at least one case" in capsys.readouterr().err


def test_wrong_number_of_classes_is_refused(phantoms: Path, refused: Refused) -> None:
    words = ["check-data", str(phantoms), "--num_classes", "1"]
    refused(words, "--num_classes must be an integer of 2 or more, got 1")
