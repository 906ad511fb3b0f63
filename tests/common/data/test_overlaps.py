# SPDX-License-Identifier: Apache-2.0
"""Cases whose results would bear one name: told apart by folders, refused within one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medkd.data.check import DataError, check_data

Item = dict[str, Any]


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Item]:
    """Writer of a case whose image has the given name."""
    voxels = np.random.default_rng(0).integers(0, 99, (9, 8, 7)).astype(np.uint8)

    def write(name: str) -> Item:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        shutil.copy(path, label := path.with_name(f"label_{path.name}"))
        return {"image": str(path), "label": str(label)}

    return write


def test_test_cases_of_one_name_but_for_the_ending_are_refused(case: Callable[[str], Item]) -> None:
    test = [case("t/x.nii"), case("t/x.nii.gz"), case("t/y.nii")]
    message = r"`test` must have one name per case without its ending, got .*t/x.nii, .*t/x.nii.gz; rename one"
    with pytest.raises(DataError, match=message):
        check_data([case("a.nii")], [case("b.nii")], test=test)


def test_such_training_cases_are_told_of(case: Callable[[str], Item], caplog: pytest.LogCaptureFixture) -> None:
    check_data([case("t/x.nii"), case("t/x.nii.gz")], [case("b.nii")])
    assert "`training` must have one name per case without its ending, got " in caplog.text


def test_one_image_twice_in_test_is_refused(case: Callable[[str], Item], caplog: pytest.LogCaptureFixture) -> None:
    one, other = case("x.nii"), case("y.nii")
    with pytest.raises(DataError, match=r"`test` must have each image once, got .*x.nii twice; leave one out"):
        check_data([case("a.nii")], [case("b.nii")], test=[one, other, one])
    check_data([one, one], [other])
    assert "`training` must have each image once, got " in caplog.text


def test_one_name_in_several_folders_is_told_apart(
    case: Callable[[str], Item], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "medkd")
    check_data([case("a.nii")], [case("b.nii")], test=[case("p1/image.nii"), case("p2/image.nii")])
    assert "In `test` image is the name of files in 2 folders; the results are told apart by the fold" in caplog.text
