# SPDX-License-Identifier: Apache-2.0
"""Label maps become files of the kind that their images have."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medkd.inference.like_image import SaveLikeImaged

OPTIONS = {"output_postfix": "seg", "separate_folder": False, "resample": False, "print_log": False}


@pytest.mark.parametrize(("name", "saved"), [("a.JPG", "a_seg.png"), ("b.png", "b_seg.png")])
def test_label_of_a_picture_is_saved_as_png(tmp_path: Path, name: str, saved: str) -> None:
    label = torch.arange(6, dtype=torch.uint8).reshape(1, 3, 2)        # (1, columns, rows), as MONAI reads pictures
    meta = {"filename_or_obj": name, "spatial_shape": (3, 2)}
    save = SaveLikeImaged("pred", output_dir=tmp_path, **OPTIONS)
    save({"pred": MetaTensor(label, meta=meta)})
    assert np.asarray(Image.open(tmp_path / saved)).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_label_of_a_slice_is_saved_as_nifti_without_its_axis_of_one_voxel(tmp_path: Path) -> None:
    label = torch.arange(6, dtype=torch.uint8).reshape(1, 3, 2)
    meta = {"filename_or_obj": "c.dcm", "spatial_shape": (3, 2, 1), "original_channel_dim": float("nan")}
    affine = torch.diag(torch.tensor([1.5, 2.0, 1.0, 1.0]))
    save = SaveLikeImaged("pred", output_dir=tmp_path, **OPTIONS)
    save({"pred": MetaTensor(label, affine=affine, meta=meta)})
    file = nib.load(tmp_path / "c_seg.nii.gz")
    assert np.asarray(file.dataobj).tolist() == [[0, 1], [2, 3], [4, 5]]
    np.testing.assert_allclose(file.affine, affine)
