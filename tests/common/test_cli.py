# SPDX-License-Identifier: Apache-2.0
"""The console command as its users see it: what it prints, what it returns, and that mistakes do no work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medkd import __version__
from medkd.cli import main

Capture = pytest.CaptureFixture[str]

SMALL = ["--shape", "32,32,32", "--spacing", "9,7.5,8", "--training", "2", "--validation", "1", "--test", "1"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    assert main(["phantom", "ct", str(folder), *SMALL]) == 0
    return folder


def refused(capsys: Capture, words: list[str], message: str) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("medkd: error: ")
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_phantoms_are_written_and_the_next_command_is_shown(tmp_path: Path, capsys: Capture) -> None:
    assert main(["phantom", "ct", str(tmp_path / "my data"), *SMALL, "--seed=3"]) == 0
    said = capsys.readouterr().out
    assert "2 training, 1 validation, 1 test, 0 unlabeled" in said
    assert f"Next: medkd check-data '{tmp_path / 'my data' / 'datalist.json'}' --num_classes 7" in said
    assert (tmp_path / "my data" / "images" / "case_003.nii.gz").exists()


@pytest.mark.parametrize(
    ("kind", "shape", "options", "facts"),
    [
        ("em", "16,40,32", ["--missing", "0.1", "--gap", "1"], ["16 x 40 x 32", "30 x 6 x 6"]),
        ("nuclei", "96,80", ["--stained", "0.5"], ["80 x 96"]),   # rows are the second axis of what is read
    ],
)
def test_phantoms_of_instances_are_written_and_pass_the_check(
    tmp_path: Path, capsys: Capture, kind: str, shape: str, options: list[str], facts: list[str]
) -> None:
    numbers = ["--training", "2", "--validation", "1", "--test", "1", "--unlabeled", "1"]
    assert main(["phantom", kind, str(tmp_path), "--shape", shape, *numbers, *options]) == 0
    said = capsys.readouterr().out
    assert "2 training, 1 validation, 1 test, 1 unlabeled" in said
    assert said.endswith(f"Next: medkd check-data {tmp_path / 'datalist.json'}\n")
    assert main(["check-data", str(tmp_path / "datalist.json")]) == 0
    said = capsys.readouterr().out
    assert all(fact in said for fact in [*facts, "The data can be used."])


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
    phantoms: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["check-data", str(phantoms)]) == 0
    content = json.loads((phantoms / "datalist.json").read_text())
    content |= {"data_root": str(phantoms), "labels": {"0": "background", "1": "liver"}}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    capsys.readouterr()
    refused(capsys, ["check-data", str(tmp_path)], "must have values in 0..1, got 2, 3, 4, 5, 6")


def test_check_lists_all_problems(phantoms: Path, tmp_path: Path, capsys: Capture) -> None:
    image = nib.load(phantoms / "images" / "case_000.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), tmp_path / "zero.nii.gz")
    item = {"image": "zero.nii.gz", "label": str(phantoms / "labels" / "case_000.nii.gz")}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [item]}))
    refused(capsys, ["check-data", str(tmp_path)], "zero.nii.gz must show something, got 0 in all voxels")
    assert main(["check-data", str(tmp_path)]) == 2
    assert "`validation` must have at least one case" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fractions", "0.5,0.5"], "--fractions must be three shares with the sum 1"),
        (["--fractions", "0.5,0.5,0.5"], "--fractions must be three shares with the sum 1"),
        (["--test", "x"], "--test must name a split of a file, got no --splits; add it."),
        (["--splits", "s.json", "--seed", "1"], "--fractions and --seed must come without --splits"),
        (["--splits", "s.json"], "`splits` must name a file of splits, got 's.json', which is no file"),
    ],
)
def test_datalist_refuses_options_that_do_not_fit(
    phantoms: Path, tmp_path: Path, capsys: Capture, words: list[str], message: str
) -> None:
    refused(capsys, ["datalist", str(phantoms), str(tmp_path / "out"), *words], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainig", "3"], "`--trainig` is no option of `medkd phantom ct`; did you mean --training? see"),
        (["3", "4"], "`3` is no option of `medkd phantom ct`; see `medkd phantom ct --help`."),
        (["--training", "x"], "`training` must be a number of cases, 0 or more, got 'x'"),
        (["--shape", "64"], "`shape` must be three voxel counts of 16 or more, such as 96,80,64, got 64"),
        (["--spacing", "3,a,4"], "`spacing` must be three positive lengths in mm"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, capsys: Capture, words: list[str], message: str
) -> None:
    refused(capsys, ["phantom", "ct", str(tmp_path / "out"), *words], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["em", "--gap", "2"], "`gap` must be 0 or 1, got 2"),
        (["em", "--spacing", "10"], "`spacing` must be three lengths of 2 to 60 nm"),
        (["em", "--missing", "all"], "`missing` must be the share of lost sections, 0 to 0.5, got 'all'"),
        (["em", "--stained", "1"], "`--stained` is no option of `medkd phantom em`"),
        (["nuclei", "--shape", "256"], "`shape` must be two pixel counts of 64 to 4096, such as 256,256, got 256"),
        (["nuclei", "--stained", "25"], "`stained` must be the share of stained pictures, 0 to 1, got 25"),
    ],
)
def test_wrong_options_of_the_other_phantoms_are_refused(
    tmp_path: Path, capsys: Capture, words: list[str], message: str
) -> None:
    refused(capsys, ["phantom", words[0], str(tmp_path / "out"), *words[1:]], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["phantm"], "`phantm` is no command of `medkd`, which has phantom, datalist, check-data"),
        (["phantom", "mri", "x"], "`mri` is no command of `medkd phantom`, which has ct, em, nuclei; see"),
        (["phantom", "ct"], "`medkd phantom ct` needs OUTPUT, got none; see `medkd phantom ct --help`."),
        (["check-data", "none.json"], "`path` must name a datalist, got 'none.json', which is no file"),
        (["check-data", "none.json", "--num_classes", "x"], "`path` must name a datalist"),
    ],
)
def test_wrong_commands_are_refused(capsys: Capture, words: list[str], message: str) -> None:
    refused(capsys, words, message)


def test_wrong_number_of_classes_is_refused(phantoms: Path, capsys: Capture) -> None:
    words = ["check-data", str(phantoms), "--num_classes", "1"]
    refused(capsys, words, "--num_classes must be an integer of 2 or more, got 1")


@pytest.mark.parametrize(
    ("words", "command"), [([], "check-data"), (["--help"], "datalist"), (["phantom"], "ct")]
)
def test_help_lists_the_commands(capsys: Capture, words: list[str], command: str) -> None:
    assert main(words) == 0
    assert f"\n     {command}\n" in capsys.readouterr().out


def test_help_of_a_command_gives_units_and_defaults(capsys: Capture) -> None:
    assert main(["phantom", "ct", "--help"]) == 0
    page = capsys.readouterr().out
    for part in ("mm per voxel and axis", "Default: (3.0, 3.0, 4.0)", "Type: int", "ct OUTPUT <flags>"):
        assert part in page
    assert "FIRE" not in page
    assert "Optional" not in page


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("em", ["nm per voxel and axis", "Default: (30.0, 6.0, 6.0)", "Default: (48, 128, 128)", "em OUTPUT <flags>"]),
        ("nuclei", ["pixels per axis", "Default: (256, 256)", "Default: 0.25", "Default: 24", "0 to 1"]),
    ],
)
def test_help_of_the_other_phantoms_gives_units_and_defaults(capsys: Capture, kind: str, parts: list[str]) -> None:
    assert main(["phantom", kind, "--help"]) == 0
    page = capsys.readouterr().out
    assert all(part in page for part in parts)


def test_version_is_shown(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"medkd {__version__}\n"


def test_module_runs_as_a_program_and_help_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'monai', 'numpy'} & set(sys.modules)"
    code = f"import sys, medkd.cli; medkd.cli.main(['--help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    words = [sys.executable, "-m", "medkd", "bogus"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("medkd: error: `bogus` is no command")
