# SPDX-License-Identifier: Apache-2.0
"""Small phantoms that several commands read, and how every command refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medkd.cli import main


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options of few, small CT phantoms."""
    return ["--shape", "32,32,32", "--spacing", "9,7.5,8", "--training", "2", "--validation", "1", "--test", "1"]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    assert main(["phantom", "ct", str(folder), *small]) == 0
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], str], None]:
    """Run words that are refused with a message, without a traceback, and print nothing else."""

    def run(words: list[str], message: str) -> None:
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.err.startswith("medkd: error: ")
        assert message in said.err
        assert "Traceback" not in said.err
        assert said.out == ""

    return run
