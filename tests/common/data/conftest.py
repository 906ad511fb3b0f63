# SPDX-License-Identifier: Apache-2.0
"""Cases of volumes and pictures, written for the check to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

Item = dict[str, Any]


@pytest.fixture
def volume(tmp_path: Path) -> Callable[..., Item]:
    """Writer of a case of NIfTI: its name, voxels of the image, of the label, spacing, unit of the header."""

    def write(
        name: str, image: np.ndarray, label: np.ndarray | None = None, spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        unit: str = "unknown",
    ) -> Item:
        given = {"image": image, "label": np.uint8(image > np.median(image)) if label is None else label}
        for key, voxels in given.items():
            file = nib.Nifti1Image(voxels, np.diag([*spacing, 1.0]), dtype=voxels.dtype)
            file.header.set_xyzt_units(unit)
            nib.save(file, tmp_path / f"{name}_{key}.nii.gz")
        return {key: str(tmp_path / f"{name}_{key}.nii.gz") for key in given}

    return write


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Item]:
    """Writer of a case of pictures: its name, the picture (of Pillow, or an array), numbers of the label; both of an
    ending, where that is no JPEG.
    """

    def write(name: str, image: Any, label: np.ndarray, ending: str = ".png", **options: Any) -> Item:
        kind = ".tif" if ending == ".tif" else ".png"
        item = {"image": str(tmp_path / f"{name}{ending}"), "label": str(tmp_path / f"{name}_label{kind}")}
        if ending == ".tif":
            tifffile.imwrite(item["image"], image, **options)
        else:
            (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(item["image"])
        if kind == ".tif":
            tifffile.imwrite(item["label"], label)
        else:
            Image.fromarray(label).save(item["label"])
        return item

    return write
