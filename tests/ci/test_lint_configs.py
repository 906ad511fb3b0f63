# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

import format_json
import lint_configs

TRAIN: dict[str, Any] = {
    "imports": [
        "$import os",
        "$import sys",
        "$import torch.distributed as dist",
    ],
    "x": {"_target_": "medkd.data.x", "_mode_": "callable"},
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/data'",
    "datalist": "$os.path.join(@dataset_dir, 'datalist.json')",
    "rank": "$int(os.environ.get('RANK', 0))",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "files": "$[{'image': @x(item)} for item in @datalist]",
    "network_def": {"_target_": "UNet", "channels": [4, 8]},
    "network": "$@network_def.to(@device)",
    "loss": {"_target_": "medkd.losses.graph_relation.GraphRelationLoss"},
    "distill_weights": None,
    "train": {
        "handlers": [{"_target_": "StatsHandler", "_disabled_": "$dist.get_rank() > 0"}],
        "trainer": {"_target_": "SupervisedTrainer", "max_epochs": 1, "network": "@network"},
    },
    "initialize": ["$sys.path.insert(0, @bundle_root)", "$monai.utils.set_determinism(0)"],
    "run": ["$@train#trainer.run()"],
}
INFERENCE: dict[str, Any] = {
    "imports": ["$import torch"],
    "network_def": {"_target_": "scripts.networks.Student"},
    "amp": "$torch.cuda.is_available()",
    "inferer": {"_target_": "monai.inferers.SlidingWindowInferer", "overlap": 0.25},
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundles" / "toy"
    (folder / "configs").mkdir(parents=True)
    write(folder, "train", TRAIN)
    write(folder, "inference", INFERENCE)
    return folder


def write(bundle: Path, name: str, content: Any) -> None:
    (bundle / "configs" / f"{name}.json").write_text(format_json.dumps(content))


def refuses(bundle: Path, name: str, content: Any, path: str, message: str) -> None:
    """The one problem of the bundle is this one."""
    write(bundle, name, content)
    lines = lint_configs.lint_bundle(bundle)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{bundle / 'configs' / name}.json: {path}: ")
    assert message in lines[0]


def test_a_usual_bundle_passes(bundle: Path) -> None:
    override = {"network_def": {"_target_": "DynUNet"}, "distill_weights": {"node": 0.0}, "device": "cpu"}
    write(
        bundle,
        "teacher",
        override | {"train#handlers#0#_disabled_": True, "+initialize": ["$dist.is_initialized()"]},
    )
    write(bundle, "evaluate", {"evaluating": ["$@train#trainer.run()"], "train#trainer": {"_target_": "X"}})
    write(bundle, "metadata", {"schema": "/not/looked/at", "@_meta_": "$eval('1')"})
    assert lint_configs.lint_bundle(bundle) == []


FOREIGN = """
    torch.hub.load torch.load torch.save torch.ops.load_library torch.utils.cpp_extension.load monai.apps.download_url
    torch.os.fork torch.sys.exit monai.subprocess.run monai.shutil.rmtree monai.importlib.import_module torch.builtins.x
    scripts.x.system scripts.x.popen scripts.x.eval scripts.x.exec torch.pickle.loads
"""


@pytest.mark.parametrize("target", FOREIGN.split())
def test_a_target_that_runs_or_fetches_what_is_not_in_the_bundle_is_refused(
    bundle: Path, target: str
) -> None:
    refuses(
        bundle, "train", TRAIN | {"loss": {"_target_": target}}, "loss#_target_", "what is not in the bundle"
    )


@pytest.mark.parametrize(
    "expression",
    [
        "eval('1')", "exec('1')", "open('x')", "__import__('x')", "getattr(@network, 'x')", "setattr(@network, 'x', 1)",
        "print(1)", "os.system('ls')", "os.environ['HOME']", "os.remove('x')", "os.execv('x', [])", "len(os)",
        "sys.modules", "subprocess.run('ls')", "glob.glob('*')", "[eval for eval in [1]]",
    ],
)  # fmt: skip
def test_a_name_outside_the_allow_list_is_refused_in_an_expression(bundle: Path, expression: str) -> None:
    refuses(bundle, "train", TRAIN | {"rank": "$" + expression}, "rank", "must name one of")


@pytest.mark.parametrize(
    "expression", ["torch.load('x')", "torch.hub.load('a', 'b')", "monai.os.system('ls')"]
)
def test_a_call_that_runs_or_fetches_what_is_not_in_the_bundle_is_refused(
    bundle: Path, expression: str
) -> None:
    refuses(bundle, "train", TRAIN | {"rank": "$" + expression}, "rank", "what is not in the bundle")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lambda: 1", "a lambda"),
        ("(y := 1)", "a walrus"),
        ("@network.__class__", "private attribute '__class__'"),
        ("''.__class__", "private attribute '__class__'"),
        ("@network._modules", "private attribute '_modules'"),
        ("1 +", "Python expression"),
        ("@device.type", "may be a string"),
        ("1" * 100, "at most 100 characters, got 101"),
    ],
)
def test_an_expression_that_is_more_than_a_call_is_refused(
    bundle: Path, expression: str, message: str
) -> None:
    refuses(bundle, "train", TRAIN | {"rank": "$" + expression}, "rank", message)


def test_a_name_that_is_not_used_may_be_an_underscore(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "_", 3, raising=False)           # as a prompt, or a doctest in the same process, does
    write(bundle, "train", TRAIN | {"rank": "$[1 for _ in range(2)][0]"})
    assert lint_configs.lint_bundle(bundle) == []


def test_an_expression_of_100_characters_passes(bundle: Path) -> None:
    write(bundle, "train", TRAIN | {"rank": "$" + "1" * 99})
    assert lint_configs.lint_bundle(bundle) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("$import subprocess", "must name one of"),
        ("$from os import system", "must name one of"),
        ("$import torch.hub", "what is not in the bundle"),
        ("$from torch import load", "what is not in the bundle"),
        ("$import math, itertools", "one name per line"),
        ("$import math; import os", "one name per line"),
        ("$import", "must be `$import x`"),
        ("$from os import", "must be an import"),
        ("$sys.path.insert(0, @bundle_root)", "must be `$import x`"),
    ],
)
def test_an_import_outside_the_allow_list_is_refused(bundle: Path, line: str, message: str) -> None:
    lines = [*TRAIN["imports"], line]
    write(bundle, "train", TRAIN | {"imports": lines})
    problems = lint_configs.lint_bundle(bundle)
    assert problems
    assert all(f"train.json: imports#{len(lines) - 1}: " in problem for problem in problems)
    assert any(message in problem for problem in problems)


@pytest.mark.parametrize(
    ("line", "way_out"),
    [
        ("$from medkd.data import x", '"x": {"_target_": "medkd.data.x", "_mode_": "callable"} and write @x.'),
        ("$from scripts.nets import Net as S", '"S": {"_target_": "scripts.nets.Net", "_mode_": "callable"} and'),
    ],
)
def test_an_import_that_would_run_before_the_bundle_is_on_the_path_is_refused(
    bundle: Path, line: str, way_out: str
) -> None:
    refuses(bundle, "train", TRAIN | {"imports": [*TRAIN["imports"], line]}, "imports#3", way_out)


def test_an_alias_does_not_hide_a_module(bundle: Path) -> None:
    changed = TRAIN | {"imports": [*TRAIN["imports"], "$import os as o"], "rank": "$o.system('ls')"}
    refuses(bundle, "train", changed, "rank", "got 'os.system'")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("%configs/other.json::network_def", "from a file"),
        ("%train.json#network_def", "from a file"),
        ("%network", "must not copy the network"),
        ("@_meta_#version", "metadata"),
        ("/data/ct", "absolute path"),
        ("~/data", "absolute path"),
        ("C:\\data", "absolute path"),
        ("$os.path.join('/data', 'ct')", "absolute path"),
        ("$'--root=' + '/home/jane/data'", "absolute path"),
    ],
)
def test_text_that_ties_a_config_to_a_place_is_refused(bundle: Path, value: str, message: str) -> None:
    refuses(bundle, "train", TRAIN | {"rank": value}, "rank", message)


def test_a_copy_of_the_network_definition_passes(bundle: Path) -> None:
    write(bundle, "train", TRAIN | {"rank": "%network_def"})
    assert lint_configs.lint_bundle(bundle) == []


@pytest.mark.parametrize(("name", "base"), [("inference", INFERENCE), ("inference_em", {})])
def test_inference_names_neither_medkd_nor_ignite(bundle: Path, name: str, base: dict[str, Any]) -> None:
    inferer, amp = {"_target_": "medkd.inference.Inferer"}, "$ignite.utils.x()"
    refuses(bundle, name, base | {"inferer": inferer}, "inferer#_target_", "medkd")
    refuses(bundle, name, base | {"amp": amp}, "amp", "must name one of monai, scripts, torch")
    refuses(bundle, name, base | {"imports": ["$from medkd.data import x"]}, "imports#0", "medkd")


def test_a_preset_of_inference_is_an_override_of_inference_json(bundle: Path) -> None:
    write(bundle, "inference_em", {"inferer#overlap": 0.5, "amp": "$torch.cuda.is_available()"})
    assert lint_configs.lint_bundle(bundle) == []
    refuses(bundle, "inference_em", {"distill_weights": {}}, "distill_weights", "must be a key of inference.json")


@pytest.mark.parametrize(
    "key",
    ["epocs", "train#trainer#max_epoch", "train#handlers#1", "distill_weights#node", "~epochs", "evaluatin"],
)
def test_a_key_that_train_json_does_not_have_is_refused_in_an_override(bundle: Path, key: str) -> None:
    refuses(bundle, "smoke", {key: 1}, key, "must be a key of train.json")


@pytest.mark.parametrize("value", [{"trainer": {"max_epochs": 2}}, "@other", None])
def test_an_override_does_not_replace_a_whole_section(bundle: Path, value: Any) -> None:
    refuses(bundle, "smoke", {"train": value}, "train", "write its keys flat, as train#handlers")


@pytest.mark.parametrize("value", [[None], [1, [None]], {"a": [{"b": [None, 2]}]}])
def test_null_in_a_list_is_refused_in_an_override(bundle: Path, value: Any) -> None:
    refuses(bundle, "smoke", {"train#handlers": value}, "train#handlers", "null into a list")


def test_only_a_list_is_appended_to(bundle: Path) -> None:
    refuses(bundle, "smoke", {"+train#trainer": {"max_epochs": 1}}, "+train#trainer", "must name a list")
    refuses(bundle, "smoke", {"+evaluating": []}, "+evaluating", "must name a list")


def test_the_message_names_what_is_allowed_of_a_module(bundle: Path) -> None:
    changed = TRAIN | {"rank": "$os.environ['RANK']"}
    refuses(bundle, "train", changed, "rank", "must name one of os.path, os.environ.get, got 'os.environ'")


def test_an_override_knows_the_imports_of_train_json(bundle: Path) -> None:
    write(bundle, "multi_gpu_train", {"rank": "$dist.get_rank()"})
    assert lint_configs.lint_bundle(bundle) == []


def test_the_command_names_the_problems_and_fails(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(bundle.parents[1])]
    assert lint_configs.main(root) == 0
    write(bundle, "smoke", {"epocs": 1})
    assert lint_configs.main(root) == 1
    assert "1 bundles, 1 problems" in capsys.readouterr().out
    (bundle / "configs" / "smoke.json").write_text("{")
    assert lint_configs.main(root) == 1
    assert "smoke.json: must be JSON" in capsys.readouterr().out
