# SPDX-License-Identifier: Apache-2.0
"""One scan, stored and turned in six ways, has one mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from medkd.phantoms.ct import write_ct_phantoms

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# name -> axis codes of storage, degrees by which the header turns the volume
WAYS = {
    "upright": ("RAS", 0), "lps": ("LPS", 0), "sagittal": ("AIL", 0),
    "turned": ("RAS", 10), "turned_far": ("RAS", 24), "turned_lps": ("LPS", 17),
}


def test_one_scan_in_six_orientations_has_one_mask(run_bundle: Callable[..., None], tmp_path: Path) -> None:
    size = {"shape": (72, 64, 48), "spacing": (2.2, 2.2, 4.1)}
    write_ct_phantoms(tmp_path / "source", training=1, validation=1, test=1, **size)
    case = json.loads((tmp_path / "source/datalist.json").read_text())["test"][0]["image"]
    source = nibabel.load(tmp_path / "source" / case)
    upright = nibabel.Nifti1Image(np.asarray(source.dataobj), np.diag([*source.header.get_zooms(), 1.0]))
    for name, (codes, degrees) in WAYS.items():
        wanted = nibabel.orientations.axcodes2ornt(codes)
        stored = upright.as_reoriented(nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(upright.affine), wanted))
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_euler("y", degrees, degrees=True).as_matrix()
        nibabel.save(nibabel.Nifti1Image(np.asarray(stored.dataobj), turn @ stored.affine), tmp_path / f"{name}.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": f"{name}.nii.gz"} for name in WAYS]}))
    run_bundle("evaluating", "inference", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    masks = {}
    for name in WAYS:
        mask = nibabel.load(tmp_path / f"out/{name}_seg.nii.gz")
        np.testing.assert_allclose(mask.affine, nibabel.load(tmp_path / f"{name}.nii.gz").affine, atol=1e-4)
        back = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt(WAYS[name][0]), nibabel.orientations.axcodes2ornt("RAS"))
        masks[name] = nibabel.orientations.apply_orientation(np.asarray(mask.dataobj), back) > 0
    first = masks["upright"]
    assert first.sum() > 100
    for name, mask in masks.items():
        assert 2 * (first & mask).sum() / (first.sum() + mask.sum()) > 0.99, name
