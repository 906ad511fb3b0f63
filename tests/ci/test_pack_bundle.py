# SPDX-License-Identifier: Apache-2.0
"""What goes into a packed bundle, and that the same files give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import pack_bundle
import vendor

MODULES = {
    "__init__": "__version__ = '1'",
    "checks": "import torch\ndef check(): ...",
    "cli": "from medkd.losses import graph",
    "losses/__init__": "",
    "losses/base": "from medkd.checks import check",
    "losses/graph": "import medkd.losses.base\ndef late():\n    from medkd.ops import affinity",
    "losses/other": "class Other: ...",
    "ops/__init__": "from medkd.ops.edges import edges",
    "ops/affinity": "import math",
    "ops/edges": "edges = 1",
    "data/__init__": "",
    "data/lists": "def load(): ...",
}
TRAIN = {"load": {"_target_": "medkd.data.lists.load", "_mode_": "callable"}, "epochs": 2}
BUNDLE = {
    "LICENSE": "Apache-2.0",
    "configs/metadata.json": '{"version": "0.2.0", "note": "medkd.nothing.at.all"}',
    "configs/train.json": json.dumps(TRAIN),
    "configs/logging.conf": "[loggers]",
    "docs/README.md": "See medkd.cli.",
    "models/model.pt": "weights",
    "models/teacher/model.pt": "heavy weights",
}
WRITTEN_BY_RUNS = [
    "models/model.json", "models/model.ts", "models/checkpoints/epoch_1.pt", "models/logs/events",
    "runs/smoke/model.pt", "eval/case_seg.nii.gz",
    "data/images/case.nii.gz", "scripts/__pycache__/networks.cpython-311.pyc", "docs/.cache",
    "scripts/_vendor/medkd/stale.py",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        write(tmp_path / f"common/medkd/{name}.py", text)
    for name, text in BUNDLE.items():
        write(tmp_path / "bundles/toy" / name, text)
    return tmp_path


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def packed(root: Path, teacher: bool = False) -> dict[str, bytes]:
    path = pack_bundle.pack(root / "bundles/toy", root, root / "dist", teacher)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def vendored(root: Path) -> set[str]:
    package = root / "common/medkd"
    return {
        file.relative_to(package).with_suffix("").as_posix()
        for file in vendor.needed_files(vendor.named_by(root / "bundles/toy"), package)
    }


def test_the_zip_holds_the_bundle_and_what_it_needs_of_medkd(root: Path) -> None:
    for path in WRITTEN_BY_RUNS:
        write(root / "bundles/toy" / path)
    files = packed(root)
    own = {f"toy/{name}" for name in BUNDLE if name != "models/teacher/model.pt"}
    needed = {f"toy/scripts/_vendor/medkd/{name}.py" for name in ("__init__", "data/__init__", "data/lists")}
    assert set(files) == own | needed | {"toy/scripts/__init__.py", "toy/MANIFEST.sha256"}
    assert files["toy/models/model.pt"] == b"weights"
    assert (root / "dist/toy_v0.2.0.zip").is_file()
    assert os.listdir(root / "dist") == ["toy_v0.2.0.zip"]


def test_own_scripts_are_packed_as_they_are(root: Path) -> None:
    write(root / "bundles/toy/scripts/__init__.py", "# mine")
    write(root / "bundles/toy/scripts/parts/networks.py", "import torch")
    files = packed(root)
    assert files["toy/scripts/__init__.py"] == b"# mine"
    assert files["toy/scripts/parts/networks.py"] == b"import torch"


def test_the_teacher_is_packed_on_request_and_what_was_fitted_to_it_too(root: Path) -> None:
    head = root / "bundles/toy/models/teacher/boundary_head/model.pt"
    head.parent.mkdir()
    head.write_bytes(b"a head")
    (head.parent / "model.json").write_text("{}")
    files = packed(root, teacher=True)
    assert files["toy/models/teacher/model.pt"] == b"heavy weights"
    assert files["toy/models/teacher/boundary_head/model.pt"] == b"a head"
    assert "toy/models/teacher/boundary_head/model.json" not in files
    assert not any("teacher/" in name for name in packed(root))


def test_the_manifest_is_what_sha256sum_checks(root: Path) -> None:
    files = packed(root)
    lines = files.pop("toy/MANIFEST.sha256").decode().splitlines()
    assert lines == [
        f"{hashlib.sha256(files[name]).hexdigest()}  {name.removeprefix('toy/')}" for name in sorted(files)
    ]
    shutil.unpack_archive(root / "dist/toy_v0.2.0.zip", root / "unpacked")
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "MANIFEST.sha256"]
        subprocess.run(command, cwd=root / "unpacked/toy", check=True, stdout=subprocess.DEVNULL)


def test_the_same_files_give_the_same_bytes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    packed(root)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder in ("common", "bundles"):                           # other times, other modes, another order
        shutil.copytree(root / folder, elsewhere / folder, copy_function=shutil.copyfile)
    os.chmod(elsewhere / "bundles/toy/LICENSE", 0o600)
    os.utime(elsewhere / "bundles/toy/LICENSE", (0, 0))
    packed(elsewhere)
    name = "dist/toy_v0.2.0.zip"
    assert (root / name).read_bytes() == (elsewhere / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({"a": {"_target_": "medkd.losses.base.Loss"}}, {"losses/__init__", "losses/base", "checks"}),
        ({"a": "$medkd.checks.check(@epochs)"}, {"checks"}),
        ({"a": [{"b": "$import medkd.ops.affinity"}]}, {"ops/__init__", "ops/edges", "ops/affinity"}),
        ({"a": "$from medkd.losses import other"}, {"losses/__init__", "losses/other"}),
        ({"a": "@bundle_root/medkd.cli", "b": "not_medkd.cli", "c": "medkd"}, set()),
    ],
    ids=["target", "expression", "import", "import of a module", "no names"],
)
def test_configs_name_what_is_needed(root: Path, config: object, modules: set[str]) -> None:
    texts = {"checks": "def check(): ...", "losses/base": "from medkd.checks import check\nclass Loss: ..."}
    for name, text in texts.items():
        write(root / f"common/medkd/{name}.py", text)
    write(root / "bundles/toy/configs/other.json", json.dumps(config))
    assert vendored(root) == modules | {"__init__", "data/__init__", "data/lists"}


def test_imports_lead_on_from_scripts_through_functions_and_packages(root: Path) -> None:
    write(root / "bundles/toy/scripts/inferers.py", "def infer():\n    from medkd.losses.graph import late")
    losses = {"losses/__init__", "losses/graph", "losses/base", "checks"}
    ops = {"ops/__init__", "ops/affinity", "ops/edges"}
    assert vendored(root) == {"__init__", "data/__init__", "data/lists"} | losses | ops


def test_relative_imports_lead_on_within_medkd_and_not_from_scripts(root: Path) -> None:
    write(root / "common/medkd/ops/__init__.py", "from . import affinity")
    write(root / "common/medkd/ops/affinity.py", "from .edges import edges\nfrom ..checks import check")
    write(root / "bundles/toy/scripts/inferers.py", "from . import losses\nimport medkd.ops")
    write(root / "bundles/toy/scripts/losses.py")
    ops = {"ops/__init__", "ops/affinity", "ops/edges", "checks"}
    assert vendored(root) == {"__init__", "data/__init__", "data/lists"} | ops


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("configs/other.json", '{"a": "$medkd.losses.graf.X"}', "names medkd.losses.graf.X, but .* no 'graf'"),
        ("configs/other.json", '{"a": "$medkd.data.lists.save"}', "lists.py holds no 'save'; correct the name"),
        ("scripts/a.py", "from .. import b", "a.py: must import what is in its package, got 'from .. import b'"),
        ("configs/other.json", '{"a": "$from . import b"}', "what is in its package, got 'from . import b'"),
    ],
)
def test_a_name_that_medkd_does_not_have_is_an_error(root: Path, file: str, text: str, message: str) -> None:
    write(root / "bundles/toy" / file, text)
    with pytest.raises(ValueError, match=message):
        vendored(root)


@pytest.mark.parametrize(
    ("missing", "way_out"),
    [
        ("LICENSE", "copy the repository's"),
        ("models/model.pt", "train the student, or bring it back with git checkout"),
        ("models/teacher/model.pt", "train it with configs/teacher.json, .* or pack without TEACHER=1"),
    ],
)
def test_a_missing_file_is_an_error_with_the_way_out(
    root: Path, capsys: pytest.CaptureFixture[str], missing: str, way_out: str
) -> None:
    (root / "bundles/toy" / missing).unlink()
    with pytest.raises(ValueError, match=f"toy: must have {missing} to be packed, got none; {way_out}"):
        packed(root, teacher=True)
    assert pack_bundle.main(["--root", str(root), "--teacher"]) == 1
    assert f"must have {missing}" in capsys.readouterr().err
    assert not (root / "dist").exists()


@pytest.mark.parametrize("name", ["a:b.md", "a\rb.md", "a\nb.md"])
def test_a_name_that_a_manifest_cannot_hold_is_refused(root: Path, name: str) -> None:
    write(root / "bundles/toy/docs" / name)
    with pytest.raises(ValueError, match="no backslash, colon or control character in its name; rename it"):
        packed(root)


def test_the_command_packs_one_bundle_or_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "bundles/toy", root / "bundles/second")
    assert pack_bundle.main(["--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "second_v0.2.0.zip: 10 files, 0.0 MB, SHA-256 " in said
    assert said.splitlines()[-1] == "Check a copy with: medkd verify second_v0.2.0.zip"
    assert len(list((root / "dist").iterdir())) == 2
    assert pack_bundle.main(["--root", str(root), "--bundle", "toy", "--output", str(root / "out")]) == 0
    assert [path.name for path in (root / "out").iterdir()] == ["toy_v0.2.0.zip"]
    assert pack_bundle.main(["--root", str(root), "--bundle", "tot"]) == 1
    assert "got 'tot'; there are: second, toy." in capsys.readouterr().err
