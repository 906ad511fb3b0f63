# SPDX-License-Identifier: Apache-2.0
"""A new method's residents: every real bundle with all that a method may add still has the plumbing of the skeleton."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import format_json
import lint_configs
import sync_bundles

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(folder.name for folder in (ROOT / "bundles").glob("*/"))
ADVERSARY = {
    "_target_": "scripts.adversary.Adversary", "network": "@critic", "optimizer": "@critic_optimizer",
}


def extend(train: dict[str, Any]) -> None:
    """Another input of the teacher, a handler with a network and an optimizer, more training cases, own keys."""
    train["teacher_input"] = "teacher_image"
    train["more_cases"] = "$@load_datalist(@datalist, 'more', missing_ok=True)"
    train["critic"] = {"_target_": "scripts.adversary.Critic", "channels": "@out_channels"}
    train["critic_optimizer"] = {
        "_target_": "torch.optim.Adam", "params": "$@trainable_parameters(@critic)",
    }
    train["train"]["dataset"]["data"] = "$@load_datalist(@datalist, 'training') + @more_cases"
    train["data_check"]["training"] = "$@load_datalist(@datalist, 'training')"
    train["adversary"] = ADVERSARY
    train["distill_handlers"].append("@adversary")
    train["distill_state"] |= {"critic": "@critic", "critic_optimizer": "@critic_optimizer"}
    train["train"]["teacher_transforms"] = [{"_target_": "LoadImaged", "keys": "teacher_image"}]
    train["validate"]["teacher_dataset"] = {"_target_": "Dataset", "transform": "@train#teacher_transforms"}
    train["validate"]["teacher_evaluator"] |= {
        "val_data_loader": {"_target_": "DataLoader", "dataset": "@validate#teacher_dataset"},
        "inferer": {"_target_": "SimpleInferer"},
    }


class House:
    """A copy of the skeleton and of one bundle, with a method's residents in it."""

    def __init__(self, root: Path, bundle: str) -> None:
        self.root = root
        shutil.copytree(ROOT / "ci/skeleton", root / "ci/skeleton")
        shutil.copytree(ROOT / "bundles" / bundle / "configs", root / "bundles/trial/configs")
        self.file = root / "bundles/trial/configs/train.json"
        train = self.read()
        extend(train)
        self.write(train)
        assert format_json.main(["--write", "--root", str(root)]) == 0

    def read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    def write(self, train: dict[str, Any]) -> None:
        self.file.write_text(format_json.dumps(train))

    def sync(self, mode: str) -> int:
        return sync_bundles.main([mode, "--root", str(self.root)])


@pytest.fixture
def house(tmp_path: Path, request: pytest.FixtureRequest) -> House:
    return House(tmp_path, request.param)


def pinned_leaves(skeleton: Any, train: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Places of single values that are the same in every bundle."""
    if isinstance(skeleton, dict) and "<own>" not in skeleton:
        for key in skeleton.keys() - {"<more>"}:
            yield from pinned_leaves(skeleton[key], train[key], (*path, key))
    elif isinstance(skeleton, list):
        targets = [item.get("_target_", item) if isinstance(item, dict) else item for item in train]
        for item in skeleton:
            name = item.get("_target_", item) if isinstance(item, dict) else item
            if name != "<more>":
                place = targets.index(name)
                yield from pinned_leaves(item, train[place], (*path, place))
    elif skeleton != "<own>" and not isinstance(skeleton, dict):
        yield path


def change(train: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    changed: Any = copy.deepcopy(train)
    node = changed
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = f"{node[path[-1]]}_" if isinstance(node[path[-1]], str) else "changed"
    return changed


@pytest.mark.parametrize("house", BUNDLES, indirect=True)
def test_what_a_method_adds_passes_the_check_and_is_left_alone(house: House, capsys: Any) -> None:
    before = house.file.read_bytes()
    assert house.sync("--check") == 0, capsys.readouterr().out
    assert house.sync("--write") == 0
    assert house.file.read_bytes() == before
    assert lint_configs.main(["--root", str(house.root)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("house", BUNDLES[:1], indirect=True)
def test_a_pinned_value_anywhere_is_named_and_repaired_alone(house: House) -> None:
    source = house.root / "ci/skeleton/train.json"
    train, before = house.read(), house.file.read_bytes()
    leaves = sorted(pinned_leaves(json.loads(source.read_text()), train), key=str)
    assert len(leaves) > 100
    for path in leaves:
        house.write(change(train, path))
        lines = sync_bundles.sync_json(source, house.file, write=False)
        assert len(lines) == 1
        assert lines[0].startswith(f"{house.file}: {'#'.join(map(str, path))}: "), path
        assert sync_bundles.sync_json(source, house.file, write=True) == []
        assert house.file.read_bytes() == before, path
