# SPDX-License-Identifier: Apache-2.0
"""Keys change with what decides on a result, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.bundle import ROOT, BundleRun
from lab.keys import code_hash, data_hash, needed_part, run_distils, run_key
from tests.lab.conftest import TRAIN, write_bundle


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "source")


def key(source: Path, *more: Any, **changed: Any) -> str:
    return run_key(BundleRun(source, "training", ["train"], changed), *more)


def change(source: Path, name: str, text: str) -> None:
    file = source / "package" / "medkd" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_key_changes_with_the_config_that_is_reached(source: Path) -> None:
    first = key(source)
    assert first == key(source, unused=2, ckpt_dir="elsewhere", teacher_path="elsewhere", output_dir="x", datalist="y")
    typed = [key(source, network_def={"type": "@cpu_dtype"}, cpu_dtype=one) for one in ("bfloat16", "float32")]
    assert typed[0] == typed[1] != first                    # as the device, which is not in it
    changed: list[dict[str, Any]] = [
        {"seed": 1}, {"epochs": 10}, {"distill_weights": {"x": 1}}, {"teacher_def#width": 5}, {"value": 0.6}
    ]
    assert len({first, *(key(source, **one) for one in changed)}) == 6
    assert key(source, "other data") != first
    own = [key(source, network_def={"weights": "@own_path"}, own_path=path) for path in ("a", "b")]
    assert own[0] != own[1]                                 # no place of which the lab knows what lies there


def test_without_distillation_teacher_loss_and_weights_do_not_matter(source: Path) -> None:
    alone = key(source, distill_weights={})
    change(source, "losses/some.py", "class Loss:\n    x = 5\n")
    assert alone == key(
        source, distill_weights={"x": 0.0}, **{"teacher_def#width": 9, "distill_loss#margin": 3, "weighting": "u"}
    )
    assert alone != key(source, distill_weights={}, **{"network_def#width": 9})


def test_a_key_follows_code_through_imports_but_not_comments(source: Path) -> None:
    first = key(source)
    change(source, "losses/some.py", '"""Text."""\nfrom medkd.ops import other\nclass Loss:  # a comment\n    x = 1\n')
    assert key(source) == first
    change(source, "ops/other.py", "y = 2\n")
    second = key(source)
    assert second != first
    change(source, "losses/some.py", "from ..ops.other import y\n\n\nclass Loss:\n    x = 1\n")
    third = key(source)
    assert third != second
    change(source, "ops/other.py", "y = 3\n")
    assert key(source) != third


def test_a_run_id_that_the_config_does_not_have_is_an_error(source: Path) -> None:
    with pytest.raises(ValueError, match=r"`run_id` must be a key of configs/train.json, got 'evaluating'"):
        run_key(BundleRun(source, "evaluating", ["train"]))


@pytest.mark.parametrize("layer", ["data", "inference", "a_new_layer"])
def test_a_module_of_any_layer_counts(source: Path, layer: str) -> None:
    change(source, "losses/some.py", f"from medkd.{layer} import thing\n\n\nclass Loss:\n    pass\n")
    change(source, f"{layer}/thing.py", "x = 1\n")
    first = key(source)
    change(source, f"{layer}/thing.py", "x = 2\n")
    assert key(source) != first


@pytest.mark.parametrize("name", ["checks", "settings", "handlers/progress", "data/check"])
def test_a_module_that_only_raises_or_tells_does_not_count(source: Path, name: str) -> None:
    change(source, "losses/some.py", f"import medkd.{name.replace('/', '.')}\n\n\nclass Loss:\n    pass\n")
    change(source, f"{name}.py", "x = 1\n")
    first = key(source)
    change(source, f"{name}.py", "x = 2\n")
    assert key(source) == first


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from medkd.ops import absent", "medkd.ops.absent"),
        ("import medkd.nowhere.x", "medkd.nowhere.x"),
        ("from medkd.ops.other import z", "medkd.ops.other.z"),
        ("from .absent import x", "medkd.losses.absent.x"),
    ],
)
def test_a_module_that_does_not_exist_is_an_error(source: Path, text: str, name: str) -> None:
    change(source, "losses/some.py", f"{text}\n\n\nclass Loss:\n    pass\n")
    with pytest.raises(ValueError, match=f"names '{name}', got no module"):
        key(source)


def test_a_key_follows_the_scripts_that_the_config_names_and_no_others(source: Path) -> None:
    scripts = source / "scripts"
    scripts.mkdir()
    for name, text in {"used": "from .windows import x\n\n\nclass Transformd:\n    pass", "windows": "x = 1",
                       "other": "x = 1"}.items():
        (scripts / f"{name}.py").write_text(text)
    run, part = BundleRun(source, "training", ["train"]), {"transform": {"_target_": "scripts.used.Transformd"}}
    first = code_hash(part, run)
    (scripts / "other.py").write_text("x = 2")
    assert code_hash(part, run) == first
    (scripts / "windows.py").write_text("x = 2")
    assert code_hash(part, run) != first


def test_references_are_followed_by_their_ids(source: Path) -> None:
    config = {"run": ["$@a::x.go() + @d#1"], "a": {"x": "%b#0", "y": "@never"}, "b": [1], "never": 2, "d": [0, "@e"],
              "e": 3, "ckpt_dir": 4}
    assert needed_part(config, ["run"], ["e"]) == {"run": config["run"], "a#x": "%b#0", "b#0": 1, "d#1": "@e"}


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, True), ({"x": 0.5}, True), ({"x": 0.0}, False), ({}, False), ("absent", False)]
)
def test_a_run_distils_by_its_weights(tmp_path: Path, weights: Any, expected: bool) -> None:
    train = {**TRAIN, "distill_weights": weights}
    if weights == "absent":
        del train["distill_weights"]
    assert run_distils(BundleRun(write_bundle(tmp_path, train), "training", ["train"])) is expected


def test_the_hash_of_data_knows_names_and_sizes_but_no_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.nii").write_text("123")
        (tmp_path / name / "datalist.json").write_text(json.dumps({"training": [{"image": "image.nii"}]}))
    one, two = ((tmp_path / name / "datalist.json") for name in ("a", "b"))

    assert data_hash(one, ["training"]) == data_hash(two, ["training"])
    (tmp_path / "b" / "image.nii").write_text("1234")
    assert data_hash(one, ["training"]) != data_hash(two, ["training"])


def test_every_bundle_has_keys_that_hold_its_own_code(repository: Path) -> None:
    for folder in sorted((repository / "bundles").glob("*/")):
        runs = [BundleRun(folder, "training", configs) for configs in (["train"], ["train", "teacher"])]
        assert len({run_key(run) for run in runs}) == 2
    assert repository == ROOT


@pytest.mark.parametrize("config", ["teacher", "baseline", "logits", "features"])
def test_arms_without_a_method_are_one_training_in_both_bundles_of_organs(config: str) -> None:
    bundles = [ROOT / "bundles" / name for name in ("boundary_relation_ct_organs", "graph_flow_ct_organs")]
    assert len({run_key(BundleRun(bundle, "training", ["train", config])) for bundle in bundles}) == 1
