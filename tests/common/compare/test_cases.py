# SPDX-License-Identifier: Apache-2.0
"""Cases: their names, and that image and label are read as the bundle does and belong together."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medkd.compare.cases import check_labels, choose_cases, read_case
from medkd.compare.networks import Network

BUNDLES = Path(__file__).parents[3] / "bundles"
CT, NUCLEI, HISTOLOGY = (Network(name, BUNDLES / name) for name in (
    "boundary_relation_ct_organs", "graph_relation_nuclei", "inter_resolution_histology_classification",
))


def volume(file: Path, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(np.zeros((200, 3, 4), np.uint8), affine), file)
    return str(file)


def test_cases_have_the_shortest_names_that_tell_them_apart(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/ct.nii.gz", "b/ct.nii.gz", "b/c.d.nii")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    found = choose_cases([{"image": str(file)} for file in files])
    assert list(found) == ["a/ct", "b/ct", "b/c.d"]
    assert list(choose_cases(list(found.values()), ["b/ct"])) == ["b/ct"]


@pytest.mark.parametrize("endings", [("png", "png"), ("tif", "tif"), ("png", "tif"), ("tif", "png")])
def test_a_picture_and_its_label_may_be_files_of_two_kinds(endings: tuple[str, str], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (20, 31), dtype=np.uint8)
    files = {key: str(tmp_path / f"{key}.{ending}") for key, ending in zip(("image", "label"), endings, strict=True)}
    for key, values in (("image", pixels), ("label", pixels // 50)):
        Image.fromarray(values).save(files[key])
    case = read_case(NUCLEI, "one", files)
    assert np.array_equal(case.frame.cut(case.image, 0), pixels)     # as a viewer shows it
    assert np.array_equal(case.frame.cut(case.label, 0), pixels // 50)


def test_a_label_whose_voxels_are_a_little_larger_is_refused(tmp_path: Path) -> None:
    affine = np.diag([1.0, 2.0, 2.0, 1.0])
    image = volume(tmp_path / "image.nii", affine)
    larger = volume(tmp_path / "label.nii", np.diag([1.1, 2.0, 2.0, 1.0]))
    message = r"The label of one must lie where its image does, .* up to 19.9 voxels off, with voxels of \[1\.1, 2\.0"
    with pytest.raises(ValueError, match=message):
        read_case(CT, "one", {"image": image, "label": larger})
    rounded = volume(tmp_path / "near.nii", np.diag([1.00004, 2.0, 2.0, 1.0]))
    assert read_case(CT, "one", {"image": image, "label": rounded}).label.shape == (200, 3, 4)


def test_labels_of_whole_images_are_numbers_and_those_of_others_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    cases = choose_cases([{"image": str(tmp_path / "a.png"), "label": 0}])      # 0 is a class, and no missing file
    check_labels(HISTOLOGY, cases)
    with pytest.raises(ValueError, match=r"The label of a must be a file, as `boundary_\w+` finds classes .* class 0;"):
        check_labels(CT, cases)
    with pytest.raises(ValueError, match=r"a must have a class in 0\.\.2 as label, got 3"):
        check_labels(HISTOLOGY, {"a": {"image": "a.png", "label": 3}})
    with pytest.raises(ValueError, match=r"The label of a must be a class, .* got b\.png; .*--class_folders"):
        check_labels(HISTOLOGY, {"a": {"image": "a.png", "label": "b.png"}})
    check_labels(HISTOLOGY, {"a": {"image": "a.png"}})


def test_a_transparent_picture_has_its_colors(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 4), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1:9, :3] = 0, 255                        # black, and white enough for the scale of colors
    Image.fromarray(pixels).save(tmp_path / "a.png")
    case = read_case(HISTOLOGY, "a", {"image": str(tmp_path / "a.png")})
    assert case.image.shape == (31, 20, 3)
    np.testing.assert_allclose(case.frame.cut(case.image[..., 2], 0), pixels[..., 2] / 255, atol=0.01)
