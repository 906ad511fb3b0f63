# SPDX-License-Identifier: Apache-2.0
"""What every bundle promises, read from its files; nothing is trained here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from monai.bundle.config_parser import ConfigParser

import toys
from bundle_runs import run_tests, student_patch

TESTS = Path(__file__).parent
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


def merged(bundle: Path, *names: str) -> dict[str, Any]:
    """Configs as MONAI merges them at the start of a run."""
    return ConfigParser.load_config_files([str(bundle / "configs" / f"{name}.json") for name in names])


def presets(bundle: Path) -> list[str]:
    """Overrides that have an inference config and weights of their own, such as 2d."""
    return [name for name in with_inference(bundle) if "ckpt_path" in config(bundle, f"inference_{name}")]


def forms(bundle: Path) -> list[str]:
    """Overrides for files of another form that stand behind a preset, whose weights they take, such as slices."""
    return [name for name in with_inference(bundle) if "ckpt_path" not in config(bundle, f"inference_{name}")]


def with_inference(bundle: Path) -> list[str]:
    """Overrides of both; an `inference_slide` alone is another use of what one of them has trained."""
    names = [path.stem.removeprefix("inference_") for path in (bundle / "configs").glob("inference_*.json")]
    return sorted(name for name in names if (bundle / "configs" / f"{name}.json").is_file())


def pairs(bundle: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Merged configs of training and of inference, by default and of each preset."""
    yield merged(bundle, "train"), merged(bundle, "inference")
    for name in presets(bundle):
        for more in ([], *([form] for form in forms(bundle))):
            files = [name, *more]
            yield merged(bundle, "train", *files), merged(bundle, "inference", *(f"inference_{one}" for one in files))


def looked_up(config: dict[str, Any], key: str) -> Any:
    """A value, or the one that it refers to or makes of others."""
    value = config.get(key)
    is_made = isinstance(value, str) and value.startswith(("@", "$"))
    return ConfigParser(config).get_parsed_content(key) if is_made else value


def test_student_is_the_same_in_training_and_inference(bundle: Path) -> None:
    for train, inference in pairs(bundle):
        for definition in (train["network_def"], inference["network_def"]):
            for key in ("output", "offsets", "foreground"):         # what it gives of its embedding, without weights
                definition.pop(key, None)
        assert train["network_def"] == inference["network_def"]
        for key in ("spacing", "intensity_range", "patch_size", "out_channels", "decoded_offsets"):
            assert looked_up(train, key) == looked_up(inference, key), key


def test_steps_of_preprocessing_are_the_same_in_training_and_inference(bundle: Path) -> None:
    for train, inference in pairs(bundle):
        for step in ("orientation", "intensity", "crop"):
            both = [config.get(step) for config in (train, inference)]
            if both[1] is None or both[1]["_target_"] == "Compose":   # it has more to do to a file
                continue
            for one in both:
                one["keys"] = "image"
            assert both[0] == both[1], step


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
        assert channels["0"] == "background" or pred["type"] == "probabilities"   # of whole images
    assert data_format["inputs"]["image"]["spatial_shape"] == student_patch(train)


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
        if path.stem not in ("metadata", "multi_gpu_train", *forms(bundle))
        and not path.stem.startswith(("evaluate", "inference"))
    }
    assert not any({"ckpt_dir", "teacher_path"} & config(bundle, name).keys() for name in forms(bundle))
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


@pytest.mark.timeout(900)   # half a minute on an idle core
@pytest.mark.parametrize("bundle_path", BUNDLES, ids=lambda folder: folder.name)
def test_bundle_and_all_that_only_it_has_work_in_a_process_of_its_own(
    bundle_path: Path, tmp_path: Path, repository: Path
) -> None:
    """Two bundles in one process would share the name `scripts`."""
    checks = [TESTS / "one_bundle.py", *sorted((TESTS / bundle_path.name).glob("*.py"))]
    words = [
        "-q", "-p", "no:cacheprovider", "--rootdir", str(repository), "-c", str(repository / "pyproject.toml"),
        "-o", "python_files=one_bundle.py", "-o", "addopts=--import-mode=importlib",
        "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning",   # zarr, by MONAI
        "--basetemp", str(tmp_path / "work"), "--durations=5", *map(str, checks),
    ]
    process = toys.start(run_tests, bundle_path, words, tmp_path / "log.txt")
    try:
        process.join(timeout=880)
        said = (tmp_path / "log.txt").read_text()
        print(said[-3000:])
        assert process.exitcode == 0, said[-8000:]
    finally:
        process.kill()


def test_every_folder_of_tests_belongs_to_a_bundle() -> None:
    assert {file.parent.name for file in TESTS.glob("*/*.py")} <= {bundle.name for bundle in BUNDLES}
