# SPDX-License-Identifier: Apache-2.0
"""Files that cannot be read: the line that says why, and the way out that fits."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from medkd.data.check import DataError, check_data
from medkd.data.reasons import unreadable

VOXELS = np.random.default_rng(0).integers(0, 99, (9, 8, 7)).astype(np.uint8)


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    for key in ("image", "label"):
        nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), tmp_path / f"{key}.nii.gz")
    return {key: str(tmp_path / f"{key}.nii.gz") for key in ("image", "label")}


def whole(path: Path) -> bytes:
    """Bytes of a volume or picture of that ending."""
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), path)
    else:
        Image.fromarray(VOXELS[0]).save(path)
    return path.read_bytes()


def cut_after(share: float, name: str, folder: Path) -> bytes:
    content = whole(folder / name)
    return content[: int(share * len(content))]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")   # readers leave broken files open
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.nii.gz", 0.5, "end-of-stream marker was reached'; it is cut or damaged: copy it again"),
        ("x.nii.gz", 0.05, "end-of-stream marker was reached'; it is cut or damaged: copy it again"),
        ("x.nii", 0.9, r"got 'Expected \d+ bytes, got \d+ bytes from x.nii'; it is cut or damaged"),
        ("x.png", 0.5, "'image file is truncated.*; it is cut or damaged: copy it again"),
        ("x.nii.gz", b"", "it is empty: copy it again"),
        ("x.nii.gz", b"no volume" * 9, "its content is not what its name says"),
        ("x.nii.gz", gzip.compress(b"no volume" * 99, mtime=0), "its content is not what its name says"),
        ("x.png", b"no picture", "its content is not what its name says"),
        ("x.tif", b"no picture", "its content is not what its name says"),
        ("x.mha", b"no picture", "must be a readable image, got "),
    ],
)
def test_file_that_cannot_be_read_is_named_with_a_way_out_that_fits(
    case: dict[str, Any], tmp_path: Path, name: str, content: bytes | float, message: str
) -> None:
    broken = content if isinstance(content, bytes) else cut_after(content, name, tmp_path)
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(DataError, match=message) as caught:
        check_data([case | {"image": str(tmp_path / name)}], [case], allow_shared=True)
    assert f"{tmp_path / name} must be a readable image, got " in str(caught.value)
    assert not any(part in str(caught.value) for part in (".cxx", "ITK ERROR", "0x", "applying transform"))


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_label_of_64_bit_as_tiff_says_in_which_types_to_save_it(tmp_path: Path, kind: type) -> None:
    picture = np.random.default_rng(0).integers(0, 99, (9, 8)).astype(np.uint8)
    items = []
    for name in "ab":
        item = {"image": str(tmp_path / f"{name}.tif"), "label": str(tmp_path / f"{name}_label.tif")}
        tifffile.imwrite(item["image"], picture)
        tifffile.imwrite(item["label"], picture.astype(kind if name == "b" else np.uint8))
        items.append(item)
    message = "b_label.tif must be a readable label, got .*64-bit samples'; save it in a type that the reader knows"
    with pytest.raises(DataError, match=message):
        check_data(items[:1], items[1:])


def test_sentence_of_a_reader_is_left_as_it_is(tmp_path: Path) -> None:
    error = RuntimeError("applying transform <monai.transforms.Compose object at 0x1>")
    error.__cause__ = ValueError("/d/x.h5 must have one volume, got 3: a, b, c; name one by --dataset_name.")
    assert unreadable("/d/x.h5", "image", error) == str(error.__cause__)


def test_message_without_words_gives_the_kind_of_error() -> None:
    assert "got 'MemoryError'" in unreadable("/d/x.nii", "image", MemoryError())
