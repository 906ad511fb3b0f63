# SPDX-License-Identifier: Apache-2.0
"""`medkd datalist`: splits of a file or at random, and options that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medkd.cli import main
from medkd.data.datalist import load_datalist
from medkd.inference.cases import cases_to_predict

Capture = pytest.CaptureFixture[str]
Refused = Callable[[list[str], str], None]


def test_datalist_follows_a_splits_file(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    named = {"train": ["case_000", "case_001"], "007": ["case_002.nii.gz"]}
    (tmp_path / "splits.json").write_text(json.dumps(named))
    words = ["datalist", str(phantoms), str(tmp_path / "out"), "--splits", str(tmp_path / "splits.json")]
    assert main([*words, "--validation", "007", "--label_names", "background,liver, spleen"]) == 0
    assert "2 training, 1 validation, 0 test, 0 unlabeled" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert content["data_root"] == str(phantoms)
    assert content["validation"] == [{"image": "images/case_002.nii.gz", "label": "labels/case_002.nii.gz"}]
    assert content["labels"] == {"0": "background", "1": "liver", "2": "spleen"}


def test_datalist_draws_splits_by_shares(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["datalist", str(phantoms), str(tmp_path), "--fractions", "0.5,0.25,0.25"]
    assert main([*words, "--patient", r"_(\d+)$"]) == 0
    assert "2 training, 1 validation, 1 test" in capsys.readouterr().out


def test_splits_and_patients_that_are_not_used_are_told(tmp_path: Path, capsys: Capture) -> None:
    for name in ("a/1", "a/2", "b/1", "b/2"):
        file = tmp_path / f"set/images/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(file)
    splits = tmp_path / "set/splits.json"
    splits.write_text(json.dumps({"train": ["a/1.png", "b/1.png"], "val": ["a/2.png", "b/2.png"]}))
    words = ["datalist", str(tmp_path / "set"), str(tmp_path), "--class_folders"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"drawn at random, and {splits} is not used; --splits {splits} takes it." in said
    assert "each image counts as a patient of its own; --patient" in said
    assert main([*words, "--splits", str(splits)]) == 0
    assert "Note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fractions", "0.5,0.5"], "--fractions must be three shares with the sum 1"),
        (["--fractions", "0.5,0.5,0.5"], "--fractions must be three shares with the sum 1"),
        (["--test", "x"], "--test must name a split of a file, got no --splits; add it."),
        (["--splits", "s.json", "--seed", "1"], "--fractions and --seed must come without --splits"),
        (["--splits", "s.json"], "`splits` must name a file of splits, got 's.json', which is no file"),
        (["--no_labels", "--labels", "masks"], "--no_labels must come without --labels and --label_components, got"),
        (["--no_labels", "--label_components"], "--no_labels must come without --labels and --label_components, got"),
        (["--no_labels", "--few", "1"], "`labeled_cases` must come with labels, got 1 without; leave one out (--few, "),
        (["--few", "9"], "`labeled_cases` must be how many of the 2 training cases keep their labels, 0 to 2, got 9"),
        (["--exclude", "none.json"], "`exclude` must name a JSON file with a list of names, got 'none.json', which is"),
    ],
)
def test_datalist_refuses_options_that_do_not_fit(
    phantoms: Path, tmp_path: Path, refused: Refused, words: list[str], message: str
) -> None:
    refused(["datalist", str(phantoms), str(tmp_path / "out"), *words], message)
    assert not (tmp_path / "out").exists()


def test_datalist_makes_instances_of_masks(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["datalist", str(phantoms), str(tmp_path / "out"), "--fractions", "0.5,0.25,0.25", "--label_components"]
    assert main(words) == 0
    assert f"Wrote labels of instances to {tmp_path / 'out' / 'label_components'}." in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert Path(content["training"][0]["label"]).is_relative_to(tmp_path / "out" / "label_components" / "labels")


def test_datalist_of_images_only_is_for_a_teacher_and_says_how_it_is_checked(
    phantoms: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["datalist", str(phantoms), str(tmp_path / "out"), "--no_labels", "--label_names", "background,liver"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "0 training, 1 validation, 0 test, 3 unlabeled" in said
    assert said.endswith(f"Next: medkd check-data {tmp_path / 'out' / 'datalist.json'} --num_classes 2 --label_free\n")
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert all(list(item) == ["image"] for item in [*content["validation"], *content["unlabeled"]])
    assert main([*words, "--fractions", "0.5,0.5,0"]) == 0
    assert "0 training, 2 validation, 0 test, 2 unlabeled" in capsys.readouterr().out


def test_datalist_of_images_to_predict_has_nothing_to_check(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["datalist", str(phantoms), str(tmp_path), "--no_labels", "--fractions", "0,0,1"]) == 0
    assert capsys.readouterr().out == (
        f"Wrote {tmp_path / 'datalist.json'}: 0 training, 0 validation, 4 test, 0 unlabeled.\n"
    )
    paths = [case["image"] for case in cases_to_predict(tmp_path / "datalist.json", phantoms)]
    assert paths == [str(phantoms / "images" / f"case_{number:03}.nii.gz") for number in range(4)]


def test_datalist_of_labeled_cases_to_score_has_no_training(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["datalist", str(phantoms), str(tmp_path), "--fractions", "0,0,1"]) == 0
    assert capsys.readouterr().out == (
        f"Wrote {tmp_path / 'datalist.json'}: 0 training, 0 validation, 4 test, 0 unlabeled.\n"
    )
    assert len(load_datalist(tmp_path / "datalist.json", "test", labeled=True)) == 4
    assert main(["datalist", str(phantoms), str(tmp_path), "--fractions", "0,0,1", "--few", "1"]) == 2
    assert "`labeled_cases` must be" in capsys.readouterr().err


def test_datalist_keeps_few_labels_and_leaves_images_out(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "names.json").write_text('["case_003.nii.gz"]')
    (tmp_path / "splits.json").write_text('{"train": ["case_000", "case_001", "case_003"], "val": ["case_002"]}')
    words = ["datalist", str(phantoms), str(tmp_path / "out"), "--splits", str(tmp_path / "splits.json"), "--few", "1"]
    assert main([*words, "--exclude", str(tmp_path / "names.json")]) == 0
    said = capsys.readouterr().out
    assert "1 training, 1 validation, 0 test, 1 unlabeled" in said
    assert "--label_free" not in said
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert content["unlabeled"] == [{"image": "images/case_001.nii.gz"}]


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        (["case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "case_00210/imaging.nii.gz", "kits.json"],
         ("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "case_00210/imaging.nii.gz")),
        (["Batch 1/volume-0.nii", "Batch 1/segmentation-0.nii", "test/test-volume-0.nii"],
         ("Batch 1/volume-0.nii", "Batch 1/segmentation-0.nii", "test/test-volume-0.nii")),
    ],
    ids=["KiTS", "LiTS"],
)
def test_datalist_takes_sets_as_they_are_downloaded(
    tmp_path: Path, files: list[str], listed: tuple[str, str, str]
) -> None:
    for file in files:
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / file).touch()
    words = ["datalist", str(tmp_path / "set"), str(tmp_path), "--images", ".", "--labels", ".", "--unlabeled", "."]
    assert main([*words, "--fractions", "1,0,0"]) == 0
    content = json.loads((tmp_path / "datalist.json").read_text())
    assert content["training"] == [{"image": listed[0], "label": listed[1]}]
    assert content["unlabeled"] == [{"image": listed[2]}]


def pictures(folder: Path) -> Path:
    """Six patients, each with a picture of both classes."""
    for number in range(12):
        path = folder / "images" / ("low", "high")[number % 2] / f"p{number // 2}-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (8, 9, 3), np.uint8)
        Image.fromarray(values).save(path)
    return folder


def test_datalist_takes_the_folder_of_a_picture_for_its_class(tmp_path: Path, capsys: Capture) -> None:
    words = ["datalist", str(pictures(tmp_path / "data")), str(tmp_path / "out"), "--class_folders"]
    words += ["--patient", "/p([0-9]+)-", "--fractions", "0.5,0.25,0.25"]
    assert main([*words, "--label_names", "low,high"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"Next: medkd check-data {tmp_path / 'out' / 'datalist.json'} --num_classes 2\n")
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert content["labels"] == {"0": "low", "1": "high"}
    assert all(item["label"] in item["image"] for item in content["training"])
    assert main(["check-data", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "cases of 1 high" in said
    assert "The data can be used." in said
    training = [item | {"label": "low"} for item in content["training"] if item["label"] == "low"]
    (tmp_path / "out" / "datalist.json").write_text(json.dumps(content | {"training": training}))
    assert main(["check-data", str(tmp_path / "out")]) != 0
    assert "`training` must have a case of each class, got none of 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--no_labels"], ["--labels", "masks"], ["--few", "3"], ["--label_components"]])
def test_folders_of_classes_take_no_other_labels(tmp_path: Path, refused: Refused, words: list[str]) -> None:
    given = ["datalist", str(pictures(tmp_path / "data")), str(tmp_path / "out"), "--class_folders", *words]
    refused(given, f"--class_folders must come without {words[0]}, as the folder is the label; leave one out.")
    assert not (tmp_path / "out").exists()
