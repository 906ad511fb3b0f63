# SPDX-License-Identifier: Apache-2.0
"""Misspelled options and keys of `python -m monai.bundle run` are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medkd.overrides import prepare_command_line, refuse_unknown_overrides

MAIN = "/anywhere/monai/bundle/__main__.py"
BASE: dict[str, Any] = {
    "epochs": 3,
    "resume": False,
    "train": {"trainer": {"max_epochs": "@epochs"}, "handlers": [{"_target_": "A"}, {"_target_": "B", "weight": 1}]},
    "initialize": ["$import sys"],
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return written(tmp_path / "train.json", BASE)


def written(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def check(config: str, *words: str, command: Sequence[str] = (MAIN, "run", "training")) -> None:
    refuse_unknown_overrides([*command, "--config_file", config, *words])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--epochs", "4"],
        ["--epochs=4"],
        ["-epochs", "4"],
        ["--resume"],
        ["--train#trainer#max_epochs", "5"],
        ["--train::trainer::max_epochs", "5"],
        ["--train#handlers#1#weight", "-1"],
        ["--epochs", "-1.5", "--resume", "true"],
        ["--bundle-root", ".", "--_meta_#version", "2"],
        ["--+new", "1"],
        ["--run_id", "run", "--init_id=initialize", "--logging_file", "a.conf", "--tracking", "b", "--final_id", "c"],
        ["--epochs", "4", "--", "--trace"],
    ],
    ids=" ".join,
)
def test_options_that_exist_pass(tmp_path: Path, words: list[str]) -> None:
    check(written(tmp_path / "train.json", BASE | {"bundle_root": "."}), *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epohcs", "4"], "Option --epohcs must exist in the first config file, got 'epohcs'; did you mean 'epochs'"),
        (["--epohcs=4"], "Option --epohcs must exist .* did you mean 'epochs'"),
        (["-epohcs", "4"], "Option --epohcs must exist"),
        (["--resume", "--epohcs"], "Option --epohcs must exist"),
        (["--train#trainer#epochs", "4"], "got 'train#trainer#epochs'; did you mean 'train#trainer#max_epochs'"),
        (["--train#trainr#max_epochs", "4"], "got 'train#trainr#max_epochs'; did you mean 'train#trainer'"),
        (["--train::trainer::epochs", "4"], "got 'train::trainer::epochs'; did you mean 'train#trainer#max_epochs'"),
        (["--train#handlers#2#weight", "4"], "got 'train#handlers#2#weight'; there are none"),
        (["--train#handlers#1#wieght", "4"], "did you mean 'train#handlers#1#weight'"),
        (["--epochs#first", "4"], "got 'epochs#first'; there are none"),
        (["--zzz", "4"], "got 'zzz'; there are 'epochs', 'resume', 'train', 'initialize'"),
    ],
)
def test_an_option_that_does_not_exist_is_refused_with_the_nearest(base: str, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(base, *words)


@pytest.mark.parametrize("form", ["['{}','{}']", "[{},{}]", "[{}, {}]"])
def test_keys_of_a_later_file_must_exist_in_the_first(tmp_path: Path, base: str, form: str) -> None:
    own = {"evaluating": [], "training": [], "run": []}             # what a file runs is its own affair
    good = written(tmp_path / "good.json", own | {"train#trainer#max_epochs": 1, "+extra": {}, "_meta_#version": 1})
    bad = written(tmp_path / "bad.json", {"train#trainer#max_epoch": 1})
    check(form.format(base, good))
    with pytest.raises(ValueError, match=r"Key of .*bad.json must exist .* did you mean 'train#trainer#max_epochs'"):
        check(form.format(base, bad))


def test_a_key_that_only_a_later_file_has_is_no_option(tmp_path: Path, base: str) -> None:
    later = written(tmp_path / "later.json", {"+extra": {"a": 1}})
    with pytest.raises(ValueError, match="Option --extra#a must exist in the first config file"):
        check(f"['{base}','{later}']", "--extra#a", "2")


def test_the_config_file_may_be_given_with_an_equals_sign_or_a_hyphen(base: str) -> None:
    for option in ([f"--config_file={base}"], ["--config-file", base], [f"-config-file={base}"]):
        with pytest.raises(ValueError, match="Option --epohcs must exist"):
            refuse_unknown_overrides([MAIN, "run", *option, "--epohcs", "4"])


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["/anywhere/monailabel/main.py", "start_server"],
        [MAIN, "verify_metadata"],
        [MAIN, "verify_metadata", "run"],
        ["/anywhere/ipykernel_launcher.py", "run"],
    ],
)
def test_other_processes_are_left_alone(base: str, command: list[str]) -> None:
    hook = sys.excepthook
    prepare_command_line([*command, "--config_file", base, "--epohcs", "4"])
    assert sys.excepthook is hook


def test_runs_without_a_json_file_are_left_alone(base: str) -> None:
    check(str(Path(base).with_suffix(".yaml")), "--epohcs", "4")
    check(f"['{base}','later.yaml']", "--epohcs", "4")
    refuse_unknown_overrides([MAIN, "run", "training", "--epohcs", "4"])


def test_an_error_ends_with_its_first_cause_if_it_has_one(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)         # set back after the test
    prepare_command_line([MAIN, "run", "--config_file", base])
    alone, first, second = ValueError("alone"), RuntimeError("first"), RuntimeError("second")
    second.__cause__, last = first, RuntimeError("last")
    last.__cause__ = second
    sys.excepthook(RuntimeError, last, None)
    assert capsys.readouterr().err.endswith("\nError: first\n")
    sys.excepthook(ValueError, alone, None)
    assert "Error: alone" in (said := capsys.readouterr().err)
    assert "\nError:" not in said


def test_a_misspelled_option_ends_a_real_run_with_one_clear_line(tmp_path: Path) -> None:
    path = written(tmp_path / "train.json", {
        "imports": ["$import sys", "$from medkd.overrides import prepare_command_line"],
        "epochs": 1,
        "initialize": ["$prepare_command_line(sys.argv)"],
        "training": ["$print('trained')"],
    })
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", path, "--epohcs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "trained" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "Error: Option --epohcs must exist in the first config file, got 'epohcs'; did you mean 'epochs'?"
    )
