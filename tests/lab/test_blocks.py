# SPDX-License-Identifier: Apache-2.0
"""Blocks of a volume as cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from lab.training import find_datalist

SHAPE = (5, 6, 4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three volumes of voxel numbers; an instance of the first is whole only outside its upper half."""
    folder = tmp_path / "data"
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    label = np.ones(SHAPE, np.int32)
    label[2:, 1] = 0
    label[3, 4, 0] = -1
    for name in ("a_train", "b_val", "c_test"):
        for kind, voxels in (("images", np.arange(120, dtype=np.int16).reshape(SHAPE)), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / kind / f"{name}.nii.gz")
    splits = {"train": ["a_train"], "val": ["b_val"], "test": ["c_test"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def listed(data: Path, lists: Path, **blocks: Any) -> tuple[dict[str, Any], Path]:
    made = find_datalist(data, lists, {"blocks": {"case": "a_train", **blocks}})
    content = json.loads(made.read_text())
    return content, made.parent / content["data_root"]


def test_blocks_cover_the_volume_and_know_where_they_are(data: Path, tmp_path: Path) -> None:
    content, root = listed(data, tmp_path / "lists", parts=[2, 1, 3])
    assert len(content["training"]) == 6
    assert [Path(case["image"]).name for case in content["validation"]] == ["b_val.nii.gz"]
    found = np.zeros(SHAPE, int)
    for case in content["training"]:
        image, label = (nibabel.load(root / case[key]) for key in ("image", "label"))
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        start = np.rint(image.affine[:3, 3] / (2, 3, 4)).astype(int)
        box = tuple(slice(one, one + length) for one, length in zip(start, image.shape, strict=True))
        found[box] += np.asarray(image.dataobj)
    assert np.array_equal(found, np.arange(120).reshape(SHAPE))


def test_an_instance_in_pieces_is_as_many_and_ignored_voxels_stay(data: Path, tmp_path: Path) -> None:
    content, root = listed(data, tmp_path / "lists", parts=[2, 1, 1])
    upper, lower = (np.asarray(nibabel.load(root / case["label"]).dataobj) for case in content["training"])
    assert np.unique(upper).tolist() == [1]                        # whole around the cut in the last of its planes
    assert np.unique(lower).tolist() == [-1, 0, 1, 2]
    assert (lower[:, 1] == 0).all()
    assert lower[1, 4, 0] == -1


def test_chosen_blocks_validate_and_the_others_train(data: Path, tmp_path: Path) -> None:
    content, _ = listed(data, tmp_path / "lists", parts=[1, 3, 1], validation=[1])
    names = {key: [Path(case["image"]).name for case in content[key]] for key in ("training", "validation", "test")}
    assert names == {
        "training": ["a_train_0_image.nii.gz", "a_train_2_image.nii.gz"], "validation": ["a_train_1_image.nii.gz"],
        "test": ["c_test.nii.gz"],
    }


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"case": "b_val", "parts": [1, 1, 1]}, r"`case` .* one of \['a_train'\], got 'b_val'"),
        ({"parts": [2, 2]}, r"`parts` of `blocks` must divide \(5, 6, 4\) voxels of a_train.nii.gz, got \[2, 2\]"),
        ({"parts": [1, 7, 1]}, "`parts` of `blocks` must divide"),
        ({"parts": [1, 1, 2], "validation": [2]}, r"must be numbers below 2, got \[2\]"),
    ],
)
def test_blocks_that_cannot_be_are_refused(data: Path, tmp_path: Path, blocks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(data, tmp_path / "lists", **blocks)
