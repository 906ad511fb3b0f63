# SPDX-License-Identifier: Apache-2.0
"""Options that mean nothing are refused, wherever they come from; errors end with their cause."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from medkd.inference.options import check_options, check_sizes, current_parser, prepare_run

MAIN = "/anywhere/monai/bundle/__main__.py"
MEAN = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": "@width"}
BASE: dict[str, Any] = {
    "imports": ["$import sys"],
    "bundle_root": ".",
    "prepare_run": {"_target_": "medkd.inference.options.prepare_run", "_mode_": "callable"},
    "epochs": 3,
    "rate": 0.5,
    "width": 4,
    "resume": False,
    "sha": None,
    "device": "$'cpu'",
    "patch_size": [8, 8],
    "intensity_range": [-200, 300],
    "weights": {"edge": 1.0},
    "network_def": MEAN,
    "train": {"network": "@network_def", "sampler": None, "handlers": [MEAN], "key_metric": {"dice": MEAN}},
    "initialize": ["$@prepare_run(sys.argv)"],
    "training": ["$print('trained', @epochs, @resume, @sha)"],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    written(tmp_path / "configs/train.json", BASE)
    return tmp_path


def written(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def check(**changes: Any) -> None:
    """Check what comes of some options, set as MONAI sets them."""
    parser = ConfigParser(json.loads(json.dumps(BASE)))
    parser.update({name.replace("__", "#"): value for name, value in changes.items()})
    check_options(parser.get(), BASE, "train.json")


@pytest.mark.parametrize("changes", [
    {}, {"epochs": 4}, {"rate": 1}, {"epochs": 4.0}, {"sha": "abc"}, {"device": "cuda"}, {"patch_size": [4, 4, 4]},
    {"epochs": "@width"}, {"patch_size": "$[4] * 2"}, {"resume": "changed"}, {"weights__node": 2.0}, {"+new": 1},
    {"_meta_": {"version": 1}}, {"network_def__bias": False}, {"network_def": {"_target_": "torch.nn.Conv2d", "x": 1}},
    {"train__key_metric__voi": MEAN}, {"train__handlers": [MEAN, MEAN]}, {"more": 3, "epochs": "$@more + 1"},
    {"experiment_name": "mine"}, {"evaluating": []}, {"weights": {}}, {"train__sampler": MEAN},
], ids=str)
def test_what_has_a_meaning_passes(changes: dict[str, Any]) -> None:
    check(**changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"epohcs": 4}, "Option `epohcs` must exist in train.json, or be referred to there; did you mean 'epochs'?"),
    ({"zzz": 4}, "Option `zzz` must exist .* there are 'imports', .* and 4 more"),
    ({"train__netwrok": 4}, "Option `train#netwrok` must exist .* did you mean 'train#network'"),
    ({"network_def__baes": False}, "Option `network_def#baes` must exist .* there are 'in_features', 'out_features'"),
    ({"train__handlers__0__in_featurs": 3}, "`train#handlers#0#in_featurs` must .* 'train#handlers#0#in_features'"),
    ({"train": {"sampler": 3}}, "`train` must keep what train.json has, got it without 'network'.* as train#sampler"),
    ({"epochs": "four"}, 'Option `epochs` must be a whole number, as 3 in train.json, got "four"'),
    ({"epochs": 4.5}, "Option `epochs` must be a whole number, as 3 in train.json, got 4.5"),
    ({"epochs": True}, "Option `epochs` must be a whole number"),
    ({"rate": [0.1]}, "Option `rate` must be a number, as 0.5"),
    ({"resume": "no"}, "Option `resume` must be one of False, True, 'changed', got 'no'"),
    ({"patch_size": 64}, r"Option `patch_size` must be a list of numbers, as \[8, 8\] in train.json, got 64"),
    ({"patch_size": "64,64"}, r"Option `patch_size` must be a list of numbers, .* got \"64,64\""),
    ({"intensity_range": [300, -200]}, r"Option `intensity_range` must ascend, as \[-200, 300\] .* got \[300, -200\]"),
    ({"patch_size": [0, 8]}, r"Option `patch_size` must be numbers above 0, .* got \[0, 8\]"),
    ({"epochs": -3}, "Option `epochs` must be in 1..inf, as 3 in train.json, got -3"),
    ({"weights": 3}, "Option `weights` must be a section"),
])
def test_what_has_none_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**changes)


def run(bundle: Path, *words: str) -> tuple[int, str, str]:
    config = str(bundle / "configs/train.json")
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--bundle_root", str(bundle), *words]
    command += [] if "--args_file" in words or "--config_file" in words else ["--config_file", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, (done.stderr.strip().splitlines() or [""])[-1]


def test_a_slip_is_refused_from_a_command_line_and_a_file_of_arguments(bundle: Path) -> None:
    arguments = written(bundle / "arguments.json", {"config_file": str(bundle / "configs/train.json"), "epohcs": 4})
    for words in (["--epohcs=4"], ["--args_file", arguments]):
        code, out, last = run(bundle, *words)
        assert code == 1
        assert "trained" not in out
        assert last == (
            "Error: Option `epohcs` must exist in train.json, or be referred to there; did you mean 'epochs'?"
        )


def test_a_slip_is_refused_in_a_later_file_and_in_python(bundle: Path) -> None:
    later = [str(bundle / "configs/train.json"), written(bundle / "later.json", {"epohcs": 4})]
    for files, options in ((later, {}), (later[:1], {"epohcs": 4})):
        workflow = ConfigWorkflow(files, logging_file=False, meta_file=[], bundle_root=str(bundle), **options)
        with pytest.raises(RuntimeError) as error:
            workflow.initialize()
        assert re.search("did you mean 'epochs'", str(error.value.__cause__))


def test_words_for_switches_are_values(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(bundle, "--resume", "false", "--sha", "null", "--epochs", "5")
    assert code == 0
    assert "trained 5 False None" in out
    start(bundle / "configs/train.json", bundle, resume="TRUE", sha="abc")
    assert "trained 3 True abc" in capsys.readouterr().out


def start(file: Path, bundle: Path, **options: Any) -> None:
    """Initialize and run a config in this process."""
    workflow = ConfigWorkflow(
        str(file), run_id="training", logging_file=False, meta_file=[], bundle_root=str(bundle), **options
    )
    workflow.initialize()
    workflow.run()


def test_configs_of_no_bundle_are_left_alone(bundle: Path) -> None:
    start((bundle / "configs/train.json").rename(bundle / "other.json"), bundle, epohcs=4)


def test_nothing_happens_outside_of_a_config() -> None:
    hook = sys.excepthook
    prepare_run(["/anywhere/monailabel/main.py", "start_server"])
    assert sys.excepthook is hook
    assert current_parser() is None


def test_an_error_ends_with_what_monai_has_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)         # set back after the test
    prepare_run([MAIN, "run"])
    alone, deep, told = ValueError("alone"), OSError("deep"), OSError("`ckpt_dir` must be a folder")
    wrapper, last = RuntimeError("Failed to instantiate component"), RuntimeError("Failed to evaluate expression")
    told.__cause__, wrapper.__cause__, last.__cause__ = deep, told, wrapper
    sys.excepthook(RuntimeError, last, None)
    assert capsys.readouterr().err.endswith("\nError: `ckpt_dir` must be a folder\n")
    sys.excepthook(ValueError, alone, None)
    assert "Error: alone" in (said := capsys.readouterr().err)
    assert "\nError:" not in said


class Halving(nn.Module):
    """Takes even sizes, as a network with one level down does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.drop(image[:, :2, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3) + self.first(image))


def sized(bundle: Path, size: Any) -> None:
    network = Halving()
    parser = ConfigParser(BASE | {
        "bundle_root": str(bundle), "patch_size": size, "network": network,
        "check_sizes": {"_target_": "medkd.inference.options.check_sizes", "_mode_": "callable"},
        "initialize": "$@check_sizes(@network)",
    })
    state = torch.get_rng_state()
    parser.get_parsed_content("initialize")
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_size_that_the_network_cannot_take_is_refused_with_one_that_it_can(bundle: Path) -> None:
    sized(bundle, [8, 8])
    sized(bundle, [10, 12])
    with pytest.raises(RuntimeError) as error:
        sized(bundle, [11, 12])
    assert re.search(r"`patch_size` must be a size that the network takes, got \[11, 12\] \(.*\); take \[10, 12\]",
                     str(error.value.__cause__))
    with pytest.raises(RuntimeError) as error:
        sized(bundle, [8, 8, 8])
    assert re.search("it has 3 axes instead of 2", str(error.value.__cause__))


def test_sizes_are_not_looked_at_outside_of_a_config() -> None:
    check_sizes(Halving())
