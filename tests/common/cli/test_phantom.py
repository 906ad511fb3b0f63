# SPDX-License-Identifier: Apache-2.0
"""`medkd phantom`: what it writes and says, and that mistakes do no work."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from medkd.cli import main, phantom
from medkd.phantoms.kinds import KINDS, Kind

Capture = pytest.CaptureFixture[str]
Refused = Callable[[list[str], str], None]


def test_phantoms_are_written_and_the_next_command_is_shown(
    tmp_path: Path, capsys: Capture, small: list[str]
) -> None:
    assert main(["phantom", "ct", str(tmp_path / "my data"), *small, "--seed=3"]) == 0
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


def test_phantoms_of_tumors_are_written_and_the_next_command_knows_their_classes(
    tmp_path: Path, capsys: Capture
) -> None:
    numbers = ["--training", "2", "--validation", "1", "--test", "1", "--healthy", "0.5", "--shape", "48,40,32"]
    assert main(["phantom", "ct_tumor", str(tmp_path), *numbers, "--spacing", "6,6,8"]) == 0
    assert f"Next: medkd check-data {tmp_path / 'datalist.json'} --num_classes 2" in capsys.readouterr().out
    assert main(["check-data", str(tmp_path / "datalist.json"), "--num_classes", "2"]) == 0
    assert "The data can be used." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainig", "3"], "`--trainig` is no option of `medkd phantom ct`; did you mean --training? see"),
        (["--train", "3"], "`--train` is no option of `medkd phantom ct`; did you mean --training? see"),
        (["--", "--training", "3"], "`--training` is no option of `medkd phantom ct`; see"),
        (["3", "4"], "`3` is no option of `medkd phantom ct`; see `medkd phantom ct --help`."),
        (["--training", "x"], "`training` must be a number of cases, 0 or more, got 'x'"),
        (["--shape", "64"], "`shape` must be three voxel counts of 16 or more, such as 96,80,64, got 64"),
        (["--spacing", "3,a,4"], "`spacing` must be three positive lengths in mm"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, refused: Refused, words: list[str], message: str
) -> None:
    refused(["phantom", "ct", str(tmp_path / "out"), *words], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["em", "--gap", "2"], "`gap` must be 0 or 1, got 2"),
        (["em", "--spacing", "10"], "`spacing` must be three lengths of 2 to 60 nm"),
        (["em", "--missing", "all"], "`missing` must be the share of lost sections, 0 to 0.5, got 'all'"),
        (["em", "--stained", "1"], "`--stained` is no option of `medkd phantom em`"),
        (["ct_tumor", "--healthy", "2"], "`healthy` must be the share of cases without a tumor, 0 to 1, got 2"),
        (["ct_tumor", "--shape", "64"], "`shape` must be three voxel counts of 16 or more"),
        (["ct", "--healthy", "1"], "`--healthy` is no option of `medkd phantom ct`"),
        (["nuclei", "--shape", "256"], "`shape` must be two pixel counts of 64 to 4096, such as 256,256, got 256"),
        (["histology", "--grades", "5"], "`grades` must be 2 to 4 classes, got 5"),
        (["nuclei", "--stained", "25"], "`stained` must be the share of stained pictures, 0 to 1, got 25"),
    ],
)
def test_wrong_options_of_the_other_phantoms_are_refused(
    tmp_path: Path, refused: Refused, words: list[str], message: str
) -> None:
    refused(["phantom", words[0], str(tmp_path / "out"), *words[1:]], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("ct", ["mm per voxel and axis", "(default: 3.0,3.0,4.0)", "up to 8 %", "training cases (default: 12)"]),
        ("ct_tumor", ["(default: 2.25,2.25,3.0)", "(default: 0.25)", "without a tumor, 0 to 1", "(default: 16)"]),
        ("em", ["nm per voxel and axis", "(default: 30.0,6.0,6.0)", "(default: 48,128,128)", "0 to 0.5"]),
        ("nuclei", ["pixels per axis", "(default: 256,256)", "(default: 0.25)", "(default: 24)", "0 to 1"]),
        ("histology", ["pixels per axis", "(default: 128,128)", "(default: 3)", "(default: 120)", "2 to 4"]),
    ],
)
def test_help_gives_units_and_defaults(capsys: Capture, kind: str, parts: list[str]) -> None:
    assert main(["phantom", kind, "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert page.startswith(f"usage: medkd phantom {kind} [-h]")
    assert all(part in page for part in [*parts, "OUTPUT folder to fill with images/, labels/ and datalist.json"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_options_and_defaults_of_a_kind_are_those_of_its_writer(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    module = import_module(f"medkd.phantoms.{kind.name}")
    function = f"write_{kind.name}_phantoms"
    writer = inspect.signature(getattr(module, function)).parameters.values()
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, function, lambda output_dir, **options: given.update(options))
    monkeypatch.setattr(phantom, "tell_written", lambda path: None)
    assert main(["phantom", kind.name, "folder"]) == 0
    assert given == {part.name: part.default for part in writer if part.name != "output_dir"}


@pytest.mark.parametrize("order", [["--for", "BUNDLE", "OUT"], ["OUT", "--for=BUNDLE"]])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_phantoms_for_a_bundle_are_of_its_kind(tmp_path: Path, kind: Kind, order: list[str]) -> None:
    (tmp_path / "bundle/configs").mkdir(parents=True)
    metadata = {"network_data_format": {"inputs": {"image": {"modality": kind.modality}}}, "phantoms": kind.name}
    (tmp_path / "bundle/configs/metadata.json").write_text(json.dumps(metadata))
    shape = ",".join("64" for _ in kind.options["shape"][0])
    few = ["--training", "1", "--validation", "0", "--test", "0", "--shape", shape]
    words = [word.replace("BUNDLE", str(tmp_path / "bundle")).replace("OUT", str(tmp_path / "out")) for word in order]
    assert main(["phantom", *words, *few]) == 0
    assert main(["phantom", kind.name, str(tmp_path / "by_name"), *few]) == 0
    written = [
        {file.relative_to(tmp_path / name): file.read_bytes() for file in sorted((tmp_path / name).rglob("*.*"))}
        for name in ("out", "by_name")
    ]
    assert written[0] == written[1]
    assert len(written[0]) >= 3                                     # an image, its label, and the list


def test_phantoms_for_no_bundle_are_refused(tmp_path: Path, refused: Refused) -> None:
    words = ["phantom", "--for", str(tmp_path), str(tmp_path / "out")]
    refused(words, f"`bundle` must be a folder with configs/metadata.json, got {tmp_path}")
    refused(["phantom", "--fro", *words[2:]], "`--fro` is no option of `medkd phantom`; did you mean --for? see")
    assert not (tmp_path / "out").exists()
