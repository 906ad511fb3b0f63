# SPDX-License-Identifier: Apache-2.0
"""The console command as a whole: commands, help, messages and exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medkd import __version__
from medkd.cli import COMMANDS, main

Capture = pytest.CaptureFixture[str]
Refused = Callable[[list[str], str], None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["phantm"], "`phantm` is no command of `medkd`, which has phantom, datalist, check-data"),
        (["phantom", "mri", "x"], "`mri` is no command of `medkd phantom`, which has ct, ct_tumor, em, nuclei, hist"),
        (["phantom", "ct"], "`medkd phantom ct` needs OUTPUT, got none; see `medkd phantom ct --help`."),
        (["check-data", "none.json"], "`path` must name a datalist, got 'none.json', which is no file"),
        (["check-data", "none.json", "--num_classes", "x"], "`path` must name a datalist"),
    ],
)
def test_wrong_commands_are_refused(refused: Refused, words: list[str], message: str) -> None:
    refused(words, message)


@pytest.mark.parametrize(
    ("words", "command"), [([], "check-data"), (["--help"], "datalist"), (["phantom"], "ct")]
)
def test_help_lists_the_commands(capsys: Capture, words: list[str], command: str) -> None:
    assert main(words) == 0
    assert f"\n  {command} " in capsys.readouterr().out


def test_version_is_shown(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"medkd {__version__}\n"


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["verify"], "run", interrupt)
    assert main(["verify", "x.zip"]) == 130
    assert capsys.readouterr().err == "medkd: interrupted\n"


@pytest.mark.parametrize("option", ["--num_classes", "--num-classes", "--num-classes=7"])
def test_options_may_be_written_with_dashes(phantoms: Path, option: str) -> None:
    assert main(["check-data", str(phantoms), option, *(["7"] if "=" not in option else [])]) == 0


@pytest.mark.parametrize("words", [[], ["phantom", "em"], *([name] for name in COMMANDS)])
def test_help_loads_no_heavy_library(words: list[str]) -> None:
    heavy = "{'torch', 'monai', 'numpy'} & set(sys.modules)"
    code = f"import sys, medkd.cli; medkd.cli.main({[*words, '--help']}); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(" ".join(["usage: medkd", *words]))
    assert done.stdout.endswith("set()\n")


def test_module_runs_as_a_program() -> None:
    words = [sys.executable, "-m", "medkd", "bogus"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("medkd: error: `bogus` is no command")
