# SPDX-License-Identifier: Apache-2.0
"""The two halves of `make standalone`, as far as they run without new environments."""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import pack_bundle
import standalone
import standalone_run

METADATA: dict[str, Any] = {
    "pytorch_version": "2.13.0",
    "monai_version": "1.6.1",
    "numpy_version": "2.4.6",
    "required_packages_version": {"nibabel": "5.4.2"},
}
CONFIGS: dict[str, Any] = {
    "metadata": METADATA,
    "train": {"rank": 3, "epochs": 9, "spacing": [1.0], "out_channels": 2},
    "inference": {"spacing": [1.0], "out_channels": 2, "output_dir": "eval"},
    "smoke": {"epochs": 1, "spacing": "$[8.0] * @rank", "out_channels": 7, "output_dir": "x", "ckpt_dir": "y"},
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "toy/configs").mkdir(parents=True)
    for name, config in CONFIGS.items():
        (tmp_path / f"toy/configs/{name}.json").write_text(json.dumps(config))
    return tmp_path / "toy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bundle", "nothing"], "BUNDLE must name a folder of .*, got 'nothing'; there are: "),
        (["--prepare", str(Path(__file__).parent)], "--prepare must name an empty or new folder, got .*; remove what"),
    ],
)
def test_a_wrong_name_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert standalone.main(words) == 1
    assert re.match(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_does_not_say_which_data_it_takes_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(standalone, "bundles", lambda root, name: [bundle])
    assert standalone.main(["--prepare", str(tmp_path / "work")]) == 1
    said = capfd.readouterr().err
    assert f"modality` of {bundle / 'configs/metadata.json'} must be one of CT, EM, microscopy, got null; it" in said
    assert "Traceback" not in said


def test_requirements_are_what_the_metadata_lists(bundle: Path) -> None:
    assert standalone_run.requirements(bundle) == ["torch==2.13.0", "monai==1.6.1", "numpy==2.4.6", "nibabel==5.4.2"]


def a_python(folder: Path, *lines: str) -> Path:
    """An interpreter that always does the same."""
    path = folder / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


def test_inference_gets_what_smoke_json_changes(bundle: Path, tmp_path: Path) -> None:
    python = a_python(tmp_path, "echo a warning", """echo '{"spacing": [8.0, 8.0], "out_channels": 7}'""")
    words = standalone_run.shared_options(bundle, python)
    assert words == ["--spacing", "[8.0, 8.0]", "--out_channels", "7"]
    inference, export = standalone_run.steps(bundle, bundle / "data", bundle, words)[3:]
    assert " ".join(words) in " ".join(inference.arguments)
    assert " ".join(words) in " ".join(export.arguments)


def test_values_of_smoke_json_are_worked_out(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", str(bundle), "spacing", "out_channels"])
    exec(standalone_run.RESOLVE, {})   # noqa: S102
    assert json.loads(capsys.readouterr().out) == {"spacing": [8.0, 8.0, 8.0], "out_channels": 7}


def test_smoke_json_that_cannot_be_worked_out_is_named(bundle: Path, tmp_path: Path) -> None:
    python = a_python(tmp_path, "echo why >&2", "exit 1")
    with pytest.raises(standalone_run.StepError, match="must have values for spacing, out_channels, got\nwhy"):
        standalone_run.shared_options(bundle, python)


def test_onnx_is_exported_where_the_metadata_lists_its_package(bundle: Path) -> None:
    assert [step.what for step in standalone_run.steps(bundle, bundle, bundle)][-1] == "TorchScript"
    packages = {"required_packages_version": {"onnxscript": "0.7"}}
    (bundle / "configs/metadata.json").write_text(json.dumps(METADATA | packages))
    assert [step.what for step in standalone_run.steps(bundle, bundle, bundle)][-1] == "ONNX"


def test_a_step_that_fails_shows_the_end_of_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('early\\n' * 50 + 'the reason'); raise SystemExit(3)"
    with pytest.raises(standalone_run.StepError, match=r"(?s)teacher ended with 3; all .* is in .*1.log.*the reason$"):
        standalone_run.call("teacher", [sys.executable, "-c", code], tmp_path, tmp_path / "1.log")
    standalone_run.call("student", [sys.executable, "-c", ""], tmp_path, tmp_path / "2.log")
    assert capsys.readouterr().out == "  teacher ...   student ... 0 s\n"


def test_steps_do_not_see_packages_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "x")
    assert "x" not in standalone_run.environment().values()
    assert standalone_run.environment()["PYTHONNOUSERSITE"] == "1"


def test_a_zip_that_differs_from_its_manifest_is_refused(tmp_path: Path) -> None:
    files = {"LICENSE": b"a", "docs/README.md": b"b"}
    manifest = pack_bundle.manifest(files)
    pack_bundle.write_zip(tmp_path / "good.zip", "toy", files | {"MANIFEST.sha256": manifest})
    assert standalone_run.unpack(tmp_path / "good.zip", tmp_path / "good", "toy") == tmp_path / "good/toy"
    pack_bundle.write_zip(tmp_path / "bad.zip", "toy", {"LICENSE": b"x", "new": b"", "MANIFEST.sha256": manifest})
    with pytest.raises(standalone_run.StepError, match="got other LICENSE, docs/README.md, new"):
        standalone_run.unpack(tmp_path / "bad.zip", tmp_path / "bad", "toy")


def test_the_second_half_imports_the_standard_library_only() -> None:
    nodes = ast.walk(ast.parse(standalone.SECOND_HALF.read_text()))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(standalone.SECOND_HALF.read_text()))
    named = {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert plain | named <= sys.stdlib_module_names
