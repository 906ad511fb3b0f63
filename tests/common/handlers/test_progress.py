# SPDX-License-Identifier: Apache-2.0
"""A file says how far a run is, seldom enough to cost nothing, and stops no run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events

import toys
from medkd.handlers.progress import ProgressFile


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_training_tells_epoch_and_step_and_at_last_that_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new" / "progress.json"
    told: list[dict[str, Any]] = []
    note = toys.on(Events.STARTED | Events.ITERATION_COMPLETED, lambda _: told.append(read(path)))

    toys.make_trainer(toys.student(), [ProgressFile(path, 0.0), note], epochs=2).run()

    assert [(one["epoch"], one["step"]) for one in told] == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert all((one["epochs"], one["steps"], one["done"]) == (2, 2, False) for one in told)
    assert read(path) == {"epoch": 2, "epochs": 2, "step": 2, "steps": 2, "done": True}
    assert [file.name for file in path.parent.iterdir()] == ["progress.json"]


def test_an_evaluation_tells_its_cases(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    told: list[dict[str, Any]] = []
    note = toys.on(Events.ITERATION_COMPLETED, lambda _: told.append(read(path)))

    evaluator = toys.make_evaluator(toys.student(), count=3, val_handlers=[ProgressFile(path, 0.0), note])
    evaluator.run()

    assert [(one["step"], one["steps"]) for one in told] == [(1, 3), (2, 3), (3, 3)]
    assert read(path) == {"epoch": 1, "epochs": 1, "step": 3, "steps": 3, "done": True}


def test_between_start_and_end_a_quick_run_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    told: list[dict[str, Any]] = []
    note = toys.on(Events.ITERATION_COMPLETED, lambda _: told.append(read(path)))

    toys.make_trainer(toys.student(), [ProgressFile(path, 3600.0), note], epochs=3).run()

    assert {one["step"] for one in told} == {0}
    assert read(path)["done"]


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    toys.make_trainer(toys.student(), [ProgressFile(tmp_path / "progress.json")], epochs=1).run()
    assert not (tmp_path / "progress.json").exists()


def test_a_file_that_cannot_be_written_any_more_stops_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def take_away(_: Any) -> None:
        shutil.rmtree(folder)
        folder.touch()

    handlers = [ProgressFile(folder / "progress.json", 0.0), toys.on(Events.EPOCH_STARTED(once=2), take_away)]
    trainer = toys.make_trainer(toys.student(), handlers, epochs=2)
    trainer.run()
    assert trainer.state.epoch == 2


def test_results_that_could_not_be_written_are_not_worked_out(tmp_path: Path) -> None:
    (tmp_path / "eval").touch()
    seen: list[int] = []
    count = toys.on(Events.ITERATION_STARTED, lambda _: seen.append(1))
    progress = ProgressFile(tmp_path / "eval/progress.json")
    message = rf"The folder of the results must be a folder that can be written to, got {tmp_path}/eval: File exists"
    with pytest.raises(OSError, match=message):
        toys.make_evaluator(toys.student(), val_handlers=[count, progress]).run()
    assert seen == []
