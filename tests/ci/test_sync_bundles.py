# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import format_json
import sync_bundles

SKELETON: dict[str, Any] = {
    "<own keys>": ["distill_heads", "train#sampler"],
    "device": "cpu",
    "network_def": "<own>",
    "train": {
        "handlers": [
            {"_target_": "ValidationHandler", "interval": "@val_interval"},
            "<own>",
            {"_target_": "StatsHandler"},
        ],
        "trainer": {"_target_": "SupervisedTrainer", "amp": False},
    },
    "run": ["$@train#trainer.run()"],
}
BUNDLE: dict[str, Any] = {
    "device": "cpu",
    "network_def": {"_target_": "UNet"},
    "train": {
        "handlers": [
            {"_target_": "ValidationHandler", "interval": "@val_interval"},
            {"_target_": "StatsHandler"},
        ],
        "trainer": {"_target_": "SupervisedTrainer", "amp": False},
    },
    "run": ["$@train#trainer.run()"],
}


class House:
    """A repository with one skeleton and one bundle."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.skeleton = root / "ci" / "skeleton" / "train.json"
        self.config = root / "bundles" / "toy" / "configs" / "train.json"
        for file, content in ((self.skeleton, SKELETON), (self.config, BUNDLE)):
            file.parent.mkdir(parents=True)
            file.write_text(format_json.dumps(content))

    def change(self, path: str, value: Any = None, remove: bool = False) -> None:
        content = node = json.loads(self.config.read_text())
        *parents, last = path.split("#")
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        if remove:
            del node[last]
        else:
            node[last] = value
        self.config.write_text(format_json.dumps(content))

    def run(self, mode: str) -> tuple[int, str]:
        self.capsys.readouterr()
        status = sync_bundles.main([mode, "--root", str(self.root)])
        return status, self.capsys.readouterr().out


@pytest.fixture
def house(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> House:
    return House(tmp_path, capsys)


def test_a_bundle_that_differs_in_own_values_only_passes(house: House) -> None:
    house.change("network_def", {"_target_": "DynUNet", "filters": [4, 8]})
    assert house.run("--check")[0] == 0


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("device", "cuda", 'device: must be "cpu", got "cuda"'),
        ("train#trainer#amp", True, "train#trainer#amp: must be false, got true"),
        ("train#trainer#amp", 0, "train#trainer#amp: must be false, got 0"),
        (
            "train#trainer",
            "@x",
            'train#trainer: must be {"_target_": "SupervisedTrainer", "amp": false}, got "@x"',
        ),
        ("train#trainer#extra", 1, "train#trainer#extra: must be absent, got 1"),
        ("run", [], 'run: must be ["$@train#trainer.run()"], got []'),
        ("train#handlers#0#interval", 1, 'train#handlers#0#interval: must be "@val_interval", got 1'),
        ("train#handlers#1#_target_", "X", 'train#handlers#1#_target_: must be "StatsHandler", got "X"'),
    ],
)
def test_check_names_a_difference_by_its_path_and_write_repairs_it(
    house: House, path: str, value: Any, line: str
) -> None:
    house.change(path, value)
    status, out = house.run("--check")
    assert status == 1
    assert f"{house.config}: {line}\n" in out
    assert house.run("--write")[0] == 0
    assert json.loads(house.config.read_text()) == BUNDLE
    assert house.run("--check")[0] == 0


def test_a_missing_plumbing_key_is_put_in_at_its_place(house: House) -> None:
    house.change("device", remove=True)
    assert 'device: must be "cpu", got nothing' in house.run("--check")[1]
    assert house.run("--write")[0] == 0
    assert next(iter(json.loads(house.config.read_text()))) == "device"


def test_a_missing_own_key_is_an_error_that_write_cannot_repair(house: House) -> None:
    house.change("network_def", remove=True)
    status, out = house.run("--write")
    assert status == 1
    assert 'network_def: must be "<own>", got nothing' in out
    assert "network_def" not in json.loads(house.config.read_text())


def test_own_keys_may_be_there_or_not_at_any_depth(house: House) -> None:
    house.change("distill_heads", {"any": 1})
    house.change("train#sampler", None)
    assert house.run("--check")[0] == 0
    house.change("train#samples", None)
    assert "train#samples: must be absent, got null" in house.run("--check")[1]


def test_plumbing_that_is_an_own_key_too_may_be_absent_but_not_differ(house: House) -> None:
    house.skeleton.write_text(format_json.dumps(SKELETON | {"<own keys>": ["device"]}))
    house.change("device", remove=True)
    assert house.run("--check")[0] == 0
    house.change("device", "cuda")
    assert 'device: must be "cpu", got "cuda"' in house.run("--check")[1]


def test_an_own_item_of_a_list_stands_for_any_number_of_items(house: House) -> None:
    first, last = BUNDLE["train"]["handlers"]
    house.change("train#handlers", [first, {"_target_": "A"}, {"_target_": "B"}, last])
    assert house.run("--check")[0] == 0
    house.change("train#handlers", [first])
    status, out = house.run("--write")
    assert status == 1
    assert "train#handlers: must be [" in out
    assert json.loads(house.config.read_text())["train"]["handlers"] == [first]


def test_an_own_value_survives_the_repair_of_its_neighbors(house: House) -> None:
    house.change("network_def", {"_target_": "DynUNet"})
    house.change("device", "cuda")
    house.run("--write")
    assert json.loads(house.config.read_text()) == BUNDLE | {"network_def": {"_target_": "DynUNet"}}


def test_a_file_of_the_skeleton_that_the_bundle_lacks_is_an_error(house: House) -> None:
    house.config.unlink()
    assert house.run("--check")[0] == 1
    assert house.run("--write")[0] == 1  # its own values are not known
    assert not house.config.exists()


def test_other_files_of_a_bundle_are_its_own(house: House) -> None:
    house.config.with_name("em.json").write_text('{"epochs": 1}\n')
    assert house.run("--check")[0] == 0


def test_files_that_are_not_json_are_equal_byte_for_byte(house: House) -> None:
    house.skeleton.with_name("logging.conf").write_text("[loggers]\n")
    assert "logging.conf: must equal" in house.run("--check")[1]
    copy = house.config.with_name("logging.conf")
    copy.write_text("[loggers]")
    assert house.run("--check")[0] == 1
    assert house.run("--write")[0] == 0
    assert copy.read_text() == "[loggers]\n"


def test_scripts_that_bundles_share_are_equal_and_all_others_their_own(house: House) -> None:
    shared, copy, own, needed, package = (
        house.root / place for place in (
            "common/medkd/inference/windows.py", "bundles/toy/scripts/windows.py", "bundles/toy/scripts/networks.py",
            "common/medkd/inference/affinities.py", "common/medkd/__init__.py",
        )
    )
    for file in (shared, copy, own, needed, package, shared.with_name("__init__.py"), own.with_name("__init__.py")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {file.parts[-3]}\n")
    status, text = house.run("--check")
    assert (status, text.count("must equal"), f"{copy}: must equal" in text) == (1, 1, True)
    assert house.run("--write")[0] == 0
    assert copy.read_bytes() == shared.read_bytes()
    assert {file.name for file in copy.parent.iterdir()} == {"__init__.py", "networks.py", "windows.py"}
    assert own.read_text() == own.with_name("__init__.py").read_text() == "# toy\n"
    shared.unlink()
    assert house.run("--check")[0] == 0


def test_what_a_shared_script_imports_must_be_in_the_bundle_too(house: House) -> None:
    sources = {
        "__init__": "", "inference/__init__": "", "inference/other": "",
        "inference/windows": "def run():\n    from .affinities import affinity\n",
        "inference/affinities": "from . import offsets\n\naffinity = 1\n", "inference/offsets": "",
    }
    for name, text in sources.items():
        file = house.root / f"common/medkd/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    scripts = house.root / "bundles/toy/scripts"
    scripts.mkdir()
    (scripts / "windows.py").write_text(sources["inference/windows"])
    status, text = house.run("--check")
    assert status == 1
    assert [name for name in ("affinities", "offsets", "other", "windows") if f"{scripts / name}.py: must" in text] == [
        "affinities", "offsets"
    ]
    assert house.run("--write")[0] == 0
    assert (scripts / "affinities.py").read_text() == sources["inference/affinities"]
    assert sorted(file.stem for file in scripts.iterdir()) == ["affinities", "offsets", "windows"]
    assert house.run("--check")[0] == 0


def test_shared_scripts_of_this_repository_are_equal(repository: Path) -> None:
    folders = sorted(repository.glob("bundles/*/scripts"))
    copies = [pair for one in folders for pair in sync_bundles.shared_scripts(one, repository / "common/medkd")]
    assert copies
    assert [copy for source, copy in copies if copy.read_bytes() != source.read_bytes()] == []


def test_what_write_leaves_has_the_canonical_layout(house: House) -> None:
    house.change("device", "cuda")
    house.run("--write")
    assert format_json.main(["--check", "--root", str(house.root)]) == 0


def test_broken_json_is_named(house: House) -> None:
    house.config.write_text("{")
    status, out = house.run("--check")
    assert status == 1
    assert f"{house.config}: must be JSON" in out


def test_without_a_skeleton_there_is_nothing_to_compare(house: House) -> None:
    house.skeleton.unlink()
    assert house.run("--check")[0] == 0
