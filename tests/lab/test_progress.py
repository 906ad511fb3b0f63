# SPDX-License-Identifier: Apache-2.0
"""What a progress file means, and the lines that stand in for a bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab import progress
from lab.execute import Executor, Job
from lab.progress import clock, do_with_bar, share_of


@pytest.mark.parametrize(
    ("epoch", "epochs", "step", "steps", "expected"),
    [
        (0, 4, 0, 2, (0.0, "epoch 0/4")),
        (3, 4, 1, 2, (0.625, "epoch 3/4")),
        (4, 4, 2, 2, (1.0, "epoch 4/4")),
        (1, 1, 1, 4, (0.25, "step 1/4")),
        (1, 1, 0, 0, (0.0, "")),
    ],
)
def test_a_progress_file_gives_a_share_and_a_word(
    epoch: int, epochs: int, step: int, steps: int, expected: tuple[float, str]
) -> None:
    assert share_of({"epoch": epoch, "epochs": epochs, "step": step, "steps": steps, "done": False}) == expected


def test_no_file_gives_nothing() -> None:
    assert share_of({}) == (0.0, "")
    assert clock(131.4) == "2:11"


def test_without_a_terminal_lines_tell_how_far_a_job_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    told: dict[str, Any] = {"epoch": 2, "epochs": 4, "step": 2, "steps": 2, "done": False}
    monkeypatch.setattr("lab.execute.read_state", lambda path: told if path.name == "p" else {})
    job = Job("one", tmp_path, "0", [["sleep", "0.7"], ["true"]], tmp_path, progress=[tmp_path / "p"])

    assert do_with_bar(Executor(), job)

    said = capsys.readouterr().out
    assert f"  cd {tmp_path} && sleep 0.7\n" in said
    assert "   25 % epoch 2/4, 0:0" in said                        # half of the first of two commands


def test_a_title_tells_the_lines_of_jobs_at_once_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    job = Job("one", tmp_path, "0", [["sleep", "0.7"]], tmp_path)

    assert do_with_bar(Executor(), job, "[1/2] one")

    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert (first, second) == ("[1/2] one", f"  cd {tmp_path} && sleep 0.7")
    assert third == "[1/2] one: 0 %, 0:00"
