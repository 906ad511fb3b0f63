# SPDX-License-Identifier: Apache-2.0
"""A packed bundle trains where medkd is not installed. `make standalone` does it all, with packages from an index."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

import pack_bundle
import standalone_run
import toy_bundle
import toys
from bundle_runs import write_small_phantoms
from medkd.verify import verify

ROOT = Path(__file__).parents[2]
BUNDLES = pack_bundle.bundles(ROOT)

# For each pair of a bundle and its data a process, forked where nothing but torch and MONAI is imported. It does what
# MONAI Label's trainer does: train.json alone, its own lists of cases, no `dataset_dir`, bundle on the path. Then it
# distils a student from an untrained teacher.
LABEL_SERVER = """
import importlib.util, json, os, sys
import torch
import torch.utils.tensorboard
from monai.bundle import ConfigParser, run

def work(root, data):
    assert importlib.util.find_spec("medkd") is None
    train, smoke = (f"{root}/configs/{name}.json" for name in ("train", "smoke"))
    options = {key: value for key, value in json.load(open(smoke)).items() if key not in ("ckpt_dir", "output_dir")}
    cases = json.load(open(f"{data}/datalist.json"))
    classes = {name: int(number) for number, name in cases["labels"].items()}   # of whole images
    for part, key in (("train", "training"), ("validate", "validation")):
        options[f"{part}#dataset#data"] = [
            {k: classes.get(v, f"{data}/{v}") for k, v in case.items()} for case in cases[key]
        ]
    files = {"meta_file": f"{root}/configs/metadata.json", "config_file": train}
    sys.path.insert(0, root)
    run(run_id="run", init_id=None, final_id=None, **files, bundle_root=root, device="cpu", **options)
    sys.path.remove(root)
    import medkd
    print("medkd from", medkd.__file__)
    parser = ConfigParser()
    parser.read_config(train)
    parser.update({"bundle_root": root, **options})
    os.mkdir(f"{root}/models/teacher")
    torch.save(parser.get_parsed_content("teacher_def")().state_dict(), f"{root}/models/teacher/model.pt")
    run(run_id="training", config_file=[train, smoke], bundle_root=root, dataset_dir=data)

for root, data in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{root}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
        work(root, data)
        break
    os.wait()
"""


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda folder: folder.name)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_bundle.pack(request.param, ROOT, tmp_path_factory.mktemp("zips"))


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    return standalone_run.unpack(packed, tmp_path / "alone", packed.name.rpartition("_v")[0])


@pytest.fixture(scope="module")
def packed_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    return pack_bundle.pack(toy_bundle.write_toy_bundle(folder / toy_bundle.NAME), ROOT, folder)


@pytest.fixture
def unpacked_toy(packed_toy: Path, tmp_path: Path) -> Path:
    return standalone_run.unpack(packed_toy, tmp_path / "alone", toy_bundle.NAME)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to all that is installed but medkd, however that is."""
    folder = tmp_path_factory.mktemp("packages")
    for place in (Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")):
        for item in place.iterdir():
            is_hidden = item.suffix == ".pth" or item.name.startswith(("medkd", "__editable__"))
            if not is_hidden and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


def run_without_medkd(packages: Path, words: Sequence[str], folder: Path) -> str:
    """Start Python with no packages but these; returns what it prints, and fails if it fails."""
    environment = os.environ | {"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", *words]                       # -S: no site-packages of its own
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_zip_is_whole_alike_each_time_and_names_no_place(packed: Path, unpacked: Path, tmp_path: Path) -> None:
    bundle = ROOT / "bundles" / unpacked.name
    assert verify(packed) == verify(unpacked)
    assert pack_bundle.pack(bundle, ROOT, tmp_path / "again").read_bytes() == packed.read_bytes()
    assert str(ROOT).encode() not in packed.read_bytes()
    config = unpacked / "configs/train.json"
    config.write_bytes(config.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(ValueError, match="configs/train.json: changed"):
        verify(unpacked)


def test_what_is_packed_needs_the_packages_of_the_metadata_only(unpacked: Path) -> None:
    listed = {requirement.partition("==")[0] for requirement in standalone_run.requirements(unpacked)}
    installed = packages_distributions()
    known = sys.stdlib_module_names | {"medkd", "scripts"}
    found = [
        f"{file.relative_to(unpacked)} imports {name}"
        for file in sorted(unpacked.glob("scripts/**/*.py"))
        for name in imported_at_once(file.read_text())
        if name not in known and not listed & {n.lower() for n in installed.get(name, [])}
    ]
    assert found == []


def imported_at_once(code: str) -> Iterator[str]:
    """Packages that importing a module imports, leaving out what stands in functions, `if` and `try`."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:   # else it stays in its package
            yield node.module.split(".")[0]


def test_steps_name_configs_of_the_bundle(unpacked: Path, tmp_path: Path) -> None:
    steps = standalone_run.steps(unpacked, tmp_path, tmp_path)
    assert [step.what.split(",")[0] for step in steps[:5]] == [
        "teacher", "student", "evaluation", "inference", "TorchScript",
    ]
    for step in steps:
        given = step.arguments[step.arguments.index("--config_file") + 1]
        for name in ast.literal_eval(given) if given.startswith("[") else [given]:
            assert (step.folder / name).is_file()


@pytest.fixture(scope="module")
def trained(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of each bundle, unpacked and trained without medkd, one after the other."""
    folder = tmp_path_factory.mktemp("trained")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    words, bundles = ["-c", LABEL_SERVER], dict[str, Path]()
    for bundle in BUNDLES:
        root = standalone_run.unpack(pack_bundle.pack(bundle, ROOT, folder), folder, bundle.name)
        data = write_small_phantoms(bundle, folder / f"{bundle.name}_data", training=2, validation=1, test=1)
        words += [str(root), str(data)]
        bundles[bundle.name] = root
    run_without_medkd(packages, words, elsewhere)
    assert os.listdir(elsewhere) == []
    return bundles


@pytest.mark.parametrize("name", [bundle.name for bundle in BUNDLES])
def test_packed_bundle_trains_and_distils_without_medkd(trained: dict[str, Path], name: str) -> None:
    root = trained[name]
    said = root.with_suffix(".log").read_text()
    assert f"medkd from {root / 'scripts/_vendor/medkd/__init__.py'}" in said, said[-6000:]
    assert json.loads((root / "models/model.json").read_text())["mode"] == "supervised"
    assert (root / "runs/smoke/model.json").is_file(), said[-6000:]
    assert json.loads((root / "runs/smoke/model.json").read_text())["mode"] == "distilled"


def test_packed_bundle_distils_by_the_command_line(unpacked_toy: Path, packages: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (unpacked_toy / "models/teacher").mkdir()
    torch.save(toys.teacher().state_dict(), unpacked_toy / "models/teacher/model.pt")
    data = toy_bundle.write_toy_data(tmp_path / "data")
    student = standalone_run.steps(unpacked_toy, data, elsewhere)[1]
    run_without_medkd(packages, ["-m", "monai.bundle", *student.arguments], student.folder)
    assert json.loads(student.written.with_suffix(".json").read_text())["mode"] == "distilled"
    assert os.listdir(elsewhere) == []


def test_installed_medkd_wins_over_the_packed_one(unpacked_toy: Path, tmp_path: Path) -> None:
    lines = json.loads((unpacked_toy / "configs/train.json").read_text())["initialize"][:2]
    code = "import os, sys\n" + "\n".join(line[1:].replace("@bundle_root", "sys.argv[1]") for line in lines)
    code += "\nimport medkd; print(sys.path[0], sys.path[-1], medkd.__file__, sep='\\n')"
    command = [sys.executable, "-c", code, str(unpacked_toy)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:2] == [str(unpacked_toy), str(unpacked_toy / "scripts/_vendor")]
    assert not said[2].startswith(said[0])


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)
def test_metadata_gives_exact_requirements(bundle: Path) -> None:
    needed = standalone_run.requirements(bundle)
    assert {"torch", "monai", "numpy"} <= {requirement.partition("==")[0] for requirement in needed}
    assert all(requirement.count("==") == 1 and requirement.partition("==")[2] for requirement in needed)
