# SPDX-License-Identifier: Apache-2.0
"""`medkd check-data`: the table, the next command, and all problems at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medkd.cli import main

Capture = pytest.CaptureFixture[str]
Refused = Callable[[list[str], str], None]
BUNDLES = Path(__file__).parents[3] / "bundles"
CT, EM = BUNDLES / "boundary_relation_ct_organs", BUNDLES / "graph_relation_em_neurons"
NUCLEI = BUNDLES / "graph_relation_nuclei"


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


# lists without labels


@pytest.fixture
def images_only(phantoms: Path, tmp_path: Path) -> Path:
    """A list of phantoms without labels, two for a teacher and one to validate."""
    content = json.loads((phantoms / "datalist.json").read_text())
    images = [{"image": item["image"]} for name in ("training", "validation") for item in content[name]]
    lists = {"training": [], "validation": images[2:], "unlabeled": images[:2]}
    (tmp_path / "datalist.json").write_text(json.dumps({"data_root": str(phantoms), **lists, "labels": {}}))
    return tmp_path


LEARNED = "No training case has a label: a student learns from a teacher alone, on 2 image(s); its weights are needed ("
CHOSEN = "The best model is chosen by agreement with the teacher on 1 validation image(s)."


def test_list_without_labels_is_refused_unless_a_teacher_is_said_to_come(
    images_only: Path, capsys: Capture, refused: Refused
) -> None:
    message = "`training` must have a case with a label, got none of 0 and 2 in `unlabeled`; add labels, or a teacher"
    refused(["check-data", str(images_only)], message)
    assert main(["check-data", str(images_only), "--label_free"]) == 0
    said = capsys.readouterr().out
    assert "The data can be used." in said
    assert LEARNED in said
    assert CHOSEN in said
    rows = {line.split("  ")[0]: line.split()[-4:] for line in said.splitlines()}
    assert rows["cases"] == rows["without a label"] == ["0", "1", "0", "2"]


def test_bundle_takes_a_list_without_labels_for_a_teacher_that_is_to_come(
    images_only: Path, capsys: Capture, refused: Refused
) -> None:
    words = ["check-data", str(images_only), "--bundle", str(CT), "--set", "spacing=[8,8,8]", "--num_classes", "7"]
    refused(words, "`training` must have a case with a label, got none of 0 and 2 in `unlabeled`; add labels, or a")
    for more in (["--label_free"], ["--set", "data_check#needs_labels=false"]):
        assert main([*words, *more]) == 0
        said = capsys.readouterr().out
        assert f"The data can be used to train {CT.name}." in said
        assert LEARNED in said
        assert CHOSEN in said
    content = json.loads((images_only / "datalist.json").read_text())
    del content["training"]
    content["validation"] = content["unlabeled"]
    (images_only / "datalist.json").write_text(json.dumps(content))
    refused(["check-data", str(images_only), "--label_free"], "`validation` and `unlabeled` must have no image in")


def test_cases_without_a_label_beside_labeled_ones_are_counted(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    content = json.loads((phantoms / "datalist.json").read_text())
    del content["training"][0]["label"]
    content |= {"data_root": str(phantoms), "unlabeled": [{"image": content["test"][0]["image"]}], "test": []}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    assert main(["check-data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 training case(s) teach by labels. With a teacher, 2 image(s) without are added." in said
    assert "agreement" not in said


def test_unlabeled_case_with_a_label_is_refused(phantoms: Path, tmp_path: Path, refused: Refused) -> None:
    content = json.loads((phantoms / "datalist.json").read_text()) | {"data_root": str(phantoms)}
    content |= {"unlabeled": content["test"], "test": []}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    refused(["check-data", str(tmp_path)], "must have images without a label, got one for 1 of 1: ")


# as the training of a bundle checks


def listed(folder: Path, image: np.ndarray, label: np.ndarray, spacing: float = 10.0) -> Path:
    """A list of two cases that look the same."""
    for name in "ab":
        for key, voxels in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([spacing] * 3 + [1.0])), folder / f"{name}_{key}.nii.gz")
    items = [{key: f"{name}_{key}.nii.gz" for key in ("image", "label")} for name in "ab"]
    (folder / "datalist.json").write_text(json.dumps({"training": items[:1], "validation": items[1:], "labels": {}}))
    return folder


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def test_a_bundle_checks_the_list_as_its_training_does(phantoms: Path, capsys: Capture) -> None:
    assert main(["check-data", str(phantoms), "--bundle", str(CT), "--set", "spacing=[8,8,8]"]) == 0
    said = capsys.readouterr().out
    assert f"The data can be used to train {CT.name}." in said
    assert "Not checked" not in said
    assert f"\nNext, in the folder of {CT}: python -m monai.bundle run training " in said
    assert said.rstrip().endswith(f"--dataset_dir {phantoms} --spacing '[8,8,8]' --out_channels 7")
    assert next(line for line in said.splitlines() if line.startswith("cases")).split() == ["cases", "2", "1", "1"]


def test_without_a_bundle_it_says_what_is_not_checked(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["check-data", str(phantoms)]) == 0
    assert "Not checked, as there is no bundle (--bundle FOLDER): size on its grid, window" in capsys.readouterr().out


def test_current_folder_is_taken_when_it_is_a_bundle(
    phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(CT)
    assert main(["check-data", str(phantoms), "--set", "spacing=[8,8,8]", "--set", "out_channels=8"]) == 0
    said = capsys.readouterr().out
    assert "The data can be used to train" in said
    assert "\nNext: python -m monai.bundle run training" in said
    assert said.rstrip().endswith("--spacing '[8,8,8]' --out_channels 8")
    assert main(["check-data", str(phantoms), "--bundle", ""]) == 0
    assert "Not checked, as there is no bundle" in capsys.readouterr().out


@pytest.mark.parametrize("spacing", [1.0, 3e-5, 1e6])
def test_spacing_out_of_all_measure_is_refused_for_a_bundle(
    tmp_path: Path, refused: Refused, spacing: float
) -> None:
    folder = listed(tmp_path, noise(30, 90, 90), np.uint8(noise(30, 90, 90) > 99), spacing)
    refused(["check-data", str(folder), "--bundle", str(EM)], "a_image.nii.gz must ")


def test_values_outside_of_the_window_are_refused_for_a_bundle(tmp_path: Path, refused: Refused) -> None:
    folder = listed(tmp_path, np.float32(noise(60, 60, 60) / 255), np.uint8(noise(60, 60, 60) > 99), 3.0)
    words = ["check-data", str(folder), "--bundle", str(CT), "--num_classes", "2"]
    message = "a_image.nii.gz must have its values in `intensity_range`, -200 to 300, got 0 to 0.996078, like values"
    refused(words, f"{message} scaled to 0..1")


def test_window_of_a_config_file_and_of_an_option_is_taken(tmp_path: Path, refused: Refused, capsys: Capture) -> None:
    folder = listed(tmp_path, noise(60, 60, 60), np.uint8(noise(60, 60, 60) > 99), 10.0)
    words = ["check-data", str(folder), "--bundle", str(CT), "--config_file", "em"]
    assert main(words) == 0
    assert "--config_file \"['configs/train.json','configs/em.json']\" --bundle_root ." in capsys.readouterr().out
    refused([*words, "--set", "intensity_range=[3000,4000]"], "`intensity_range`, 3000 to 4000, got 0 to 254, of which")


def test_colors_are_refused_for_a_bundle_of_volumes_by_name(tmp_path: Path, refused: Refused) -> None:
    image = np.stack([noise(30, 90, 90)] * 3, -1)
    folder = listed(tmp_path, image, np.uint8(image[..., 0] > 99))
    refused(["check-data", str(folder), "--bundle", str(EM)], "a_image.nii.gz must have 1 channel(s), got 3")


def test_pictures_pass_for_the_bundle_of_pictures(tmp_path: Path, capsys: Capture) -> None:
    items = []
    for name, channels in (("a", 3), ("b", 4)):
        item = {key: f"{name}_{key}.png" for key in ("image", "label")}
        Image.fromarray(noise(40, 50, channels)).save(tmp_path / item["image"])
        Image.fromarray(np.kron(np.arange(20).reshape(4, 5), np.ones((10, 10))).astype(np.uint16)).save(
            tmp_path / item["label"]
        )
        items.append(item)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items[:1], "validation": items[1:]}))
    assert main(["check-data", str(tmp_path), "--bundle", str(NUCLEI)]) == 0
    assert f"The data can be used to train {NUCLEI.name}." in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--bundle", str(EM)], ["--bundle", str(CT), "--config_file", "em"]])
def test_voxels_to_ignore_are_counted(tmp_path: Path, capsys: Capture, words: list[str]) -> None:
    folder = listed(tmp_path, noise(30, 90, 90), np.int16(noise(30, 90, 90) // 64) - 1)
    assert main(["check-data", str(folder), *words]) == 0
    assert "voxels of -1 ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bundle", "nowhere"], "--bundle must be the folder of a bundle, got 'nowhere', which has no configs/"),
        (["--bundle", "", "--set", "epochs=1"], "--set must come with a bundle, got none; name its folder by --bundle"),
        (["--bundle", str(CT), "--set", "spacing"], "--set must be KEY=VALUE, got 'spacing'; such as spacing=[2,2,2]."),
        (["--bundle", str(CT), "--set", "spacng=1"], "--set must name a key of the configs, got 'spacng', which"),
        (["--bundle", str(CT), "--config_file", "3d"], "--config_file must name a file, or a config of "),
    ],
)
def test_options_that_do_not_fit_are_refused(
    phantoms: Path, refused: Refused, words: list[str], message: str
) -> None:
    refused(["check-data", str(phantoms), *words], message)
