# SPDX-License-Identifier: Apache-2.0
"""What every bundle promises, read from its files; nothing is trained here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BUNDLES = sorted((Path(__file__).parents[2] / "bundles").glob("*/"), key=lambda folder: folder.name)
FILES = [
    "LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt",
    *(f"configs/{name}.json" for name in (
        "metadata", "train", "inference", "teacher", "baseline", "logits", "features", "evaluate",
        "multi_gpu_train", "smoke",
    )),
    "configs/logging.conf",
]
README_HEADINGS = [
    "Authors", "Tags", "Model Description", "Data", "Performance", "Commands", "System Configuration",
    "Limitations", "Citation", "References",
]


@pytest.fixture(params=BUNDLES, ids=lambda folder: folder.name)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.param


def config(bundle: Path, name: str) -> dict[str, Any]:
    return json.loads((bundle / "configs" / f"{name}.json").read_text())


def test_every_required_file_is_there(bundle: Path) -> None:
    assert [name for name in FILES if not (bundle / name).is_file()] == []


def test_only_the_student_lies_where_a_server_offers_weights(bundle: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "models"], cwd=bundle, capture_output=True, text=True, check=True
    ).stdout.split()
    assert tracked == ["models/model.pt"]


def test_the_committed_student_fits_its_definition_and_holds_tensors_only(bundle: Path) -> None:
    code = (
        "import sys, torch\n"
        "from monai.bundle import ConfigParser\n"
        "sys.path.insert(0, '.')\n"
        "parser = ConfigParser(); parser.read_config('configs/inference.json')\n"
        "weights = torch.load('models/model.pt', map_location='cpu', weights_only=True)\n"
        "parser.get_parsed_content('network_def').load_state_dict(weights, strict=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (bundle / "models/model.pt").stat().st_size < 5e6


def overridden(bundle: Path, *names: str) -> dict[str, Any]:
    """train.json with the flat keys of overrides set."""
    merged = config(bundle, "train")
    for name in names:
        for key, value in config(bundle, name).items():
            *parents, last = key.split("#")
            node: Any = merged
            for part in parents:
                node = node[int(part) if isinstance(node, list) else part]
            node[int(last) if isinstance(node, list) else last] = value
    return merged


def presets(bundle: Path) -> list[str]:
    """Overrides that have an inference config of their own, such as 2d."""
    return sorted(path.stem.removeprefix("inference_") for path in (bundle / "configs").glob("inference_*.json"))


def test_student_is_the_same_in_training_and_inference(bundle: Path) -> None:
    pairs = [(overridden(bundle), "inference")]
    pairs += [(overridden(bundle, name), f"inference_{name}") for name in presets(bundle)]
    shared = ("spacing", "intensity_range", "patch_size", "out_channels", "decoded_offsets")
    for train, name in pairs:
        inference = config(bundle, name)
        for definition in (train["network_def"], inference["network_def"]):
            for key in ("output", "offsets", "foreground"):         # what it gives of its embedding, without weights
                definition.pop(key, None)
        assert train["network_def"] == inference["network_def"], name
        assert {key: train.get(key) for key in shared} == {key: inference.get(key) for key in shared}, name


def test_inference_of_a_preset_takes_the_weights_that_its_training_writes(bundle: Path) -> None:
    for name in presets(bundle):
        written = config(bundle, name)["ckpt_dir"].rstrip("'") + "/model.pt'"
        assert config(bundle, f"inference_{name}")["ckpt_path"] == written


def test_metadata_agrees_with_the_network(bundle: Path) -> None:
    data_format = config(bundle, "metadata")["network_data_format"]
    pred, train, inference = data_format["outputs"]["pred"], config(bundle, "train"), config(bundle, "inference")
    channels = pred["channel_def"]
    assert list(channels) == [str(number) for number in range(pred["num_channels"])]
    if "output" in inference["network_def"]:                        # affinities of an embedding
        offsets = inference[inference["network_def"]["offsets"].removeprefix("@")]
        assert pred["num_channels"] == len(offsets) + inference["network_def"].get("foreground", False)
    else:
        assert pred["num_channels"] == train["out_channels"]
        assert channels["0"] == "background"
    assert data_format["inputs"]["image"]["spatial_shape"] == config(bundle, "train")["patch_size"]


def test_metadata_names_installed_versions(bundle: Path) -> None:
    metadata = config(bundle, "metadata")
    pins = dict(
        line.strip().split("==") for line in
        (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"
    )
    stated = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    stated |= metadata["required_packages_version"]
    assert {name: pins.get(name) for name in stated} == stated
    assert metadata["version"] in metadata["changelog"]


def test_saved_metric_is_the_one_that_the_teacher_is_checked_with(bundle: Path) -> None:
    train = config(bundle, "train")
    assert train["teacher_check"]["metric"] == next(iter(train["validate"]["key_metric"]))


def test_every_override_writes_to_a_place_of_its_own(bundle: Path) -> None:
    places = {
        path.stem: config(bundle, path.stem).get("ckpt_dir")
        for path in (bundle / "configs").glob("*.json")
        if path.stem not in ("metadata", "evaluate", "multi_gpu_train") and not path.stem.startswith("inference")
    }
    assert None not in places.values(), places
    assert len(set(places.values())) == len(places)


def test_readme_has_the_headings_that_the_model_zoo_asks_for(bundle: Path) -> None:
    text = (bundle / "docs/README.md").read_text()
    assert [heading for heading in README_HEADINGS if f"# {heading}" not in text] == []


def test_every_command_of_the_readme_names_files_that_exist(bundle: Path) -> None:
    text = (bundle / "docs/README.md").read_text()
    named = {word.strip("'\"[],") for word in text.replace("','", "' '").split() if "configs/" in word}
    configs = {name for name in named if name.startswith("configs/") and name.endswith((".json", ".conf"))}
    assert configs
    assert [name for name in sorted(configs) if not (bundle / name).is_file()] == []


def test_bundle_has_no_file_above_five_megabytes(bundle: Path) -> None:
    large = [path for path in bundle.rglob("*") if path.is_file() and path.stat().st_size > 5e6]
    assert [path for path in large if not _is_ignored(path)] == []


def _is_ignored(path: Path) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=path.parent, check=False).returncode == 0


@pytest.mark.timeout(900)   # two minutes on two idle cores
@pytest.mark.parametrize("bundle_path", BUNDLES, ids=lambda folder: folder.name)
def test_bundle_trains_evaluates_and_infers_in_a_process_of_its_own(
    bundle_path: Path, tmp_path: Path, repository: Path
) -> None:
    run_in_a_process_of_its_own(repository / "tests/bundles/one_bundle.py", bundle_path, tmp_path, repository)


@pytest.mark.parametrize(
    "checks", sorted(Path(__file__).parent.glob("*/*.py")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_what_only_this_bundle_has_works_in_a_process_of_its_own(
    checks: Path, tmp_path: Path, repository: Path
) -> None:
    run_in_a_process_of_its_own(checks, repository / "bundles" / checks.parent.name, tmp_path, repository)


def run_in_a_process_of_its_own(checks: Path, bundle: Path, folder: Path, repository: Path) -> None:
    """Run a test file about one bundle: two bundles in one process would share the name `scripts`."""
    environment = os.environ | {"MEDKD_BUNDLE": str(bundle), "PYTHONPATH": str(repository / "common")}
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(repository),
        "-c", str(repository / "pyproject.toml"), "-o", "python_files=one_bundle.py",
        "-o", "addopts=--import-mode=importlib",
        "--basetemp", str(folder / "work"), "--durations=5", str(checks),
    ]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=880
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
