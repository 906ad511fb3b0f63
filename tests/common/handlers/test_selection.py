# SPDX-License-Identifier: Apache-2.0
"""A validation metric that says nothing chooses no student."""

from __future__ import annotations

import json
import logging
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events
from ignite.metrics import Metric

import toys
from medkd.weights import load_tensors

NAN = math.nan


class Told(Metric):
    """A metric that gives what it is told, a value for each validation."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        super().__init__()

    def reset(self) -> None:
        pass

    def update(self, output: Any) -> None:
        pass

    def compute(self) -> float:
        return self.values.pop(0)


class Run(toys.Run):
    """A run whose validations give these values."""

    def __init__(self, folder: Path, values: Sequence[float], is_better: Callable[..., bool] = operator.gt,
                 epochs: int | None = None, **options: Any) -> None:
        self.students: dict[int, dict[str, Any]] = {}
        note = toys.on(Events.EPOCH_COMPLETED, self._note)
        super().__init__(folder, epochs=epochs or len(values), extra=[note], metric=Told(values), **options)
        self.evaluator.metric_cmp_fn = is_better

    def _note(self, engine: Any) -> None:
        self.students[engine.state.epoch] = toys.state_of(engine.network)

    def chosen(self, folder: Path) -> list[int]:
        """Epochs whose student is the saved one."""
        saved = load_tensors(folder / "model.pt")
        return [epoch for epoch, state in self.students.items() if toys.same(dict(saved), dict(state))]


@pytest.mark.parametrize("is_better", [operator.gt, operator.lt, lambda value, best: not value <= best])
@pytest.mark.parametrize(("values", "best"), [
    ([NAN, 0.5, NAN], 2),                                          # the first one would block all others
    ([0.5, NAN, 0.5, NAN], 4),                                     # says nothing: the last one
    ([NAN, math.inf, 0.5, -math.inf], 3),
    ([NAN, NAN, NAN], 3),
])
def test_a_value_that_is_no_number_neither_chooses_nor_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: list[float], best: int, is_better: Callable[..., bool]
) -> None:
    run = Run(tmp_path, values, is_better)
    run.trainer.run()
    assert run.chosen(tmp_path) == [best]
    told = json.loads((tmp_path / "model.json").read_text())
    assert told["epoch"] == best
    assert told.get("validation") in (None, {"val_mean_dice": 0.5})
    first = next(epoch for epoch, value in enumerate(values, start=1) if not math.isfinite(value))
    assert f"val_mean_dice of epoch {first} is" in caplog.text


def test_a_run_without_any_number_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path, [NAN, NAN]).trainer.run()
    assert "val_mean_dice was no number in any validation: the last student is saved." in caplog.text


@pytest.mark.parametrize("is_better", [operator.gt, operator.lt])
@pytest.mark.parametrize(("values", "best"), [
    ([0.0, 0.0, 0.0], 3), ([2.5, 2.5], 2), ([0.0], 1), ([0.0, 0.0, 0.5], None), ([0.5, 0.0, 0.0], None),
])
def test_a_metric_of_one_value_leaves_the_last_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: list[float], best: int | None,
    is_better: Callable[..., bool],
) -> None:
    run = Run(tmp_path, values, is_better)
    run.trainer.run()
    choose = max if is_better is operator.gt else min
    assert run.chosen(tmp_path) == [best or 1 + values.index(choose(values))]
    says = f"val_mean_dice was {values[0]:g} in all {len(values)} validations and says nothing: the last student is"
    assert (says in caplog.text) == (len(values) > 1 and best is not None)


@pytest.mark.parametrize(("before", "after", "best"), [
    ([0.0], [0.0, 0.0], 3), ([NAN], [0.5, 0.4], 2), ([0.5], [NAN, 0.4], None), ([0.0, 0.5], [0.5, 0.5], None),
])
def test_a_resumed_run_knows_what_the_metric_has_said_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: list[float], after: list[float], best: int | None
) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    epochs = len(before) + len(after)
    first = Run(tmp_path, before, epochs=epochs)
    first.trainer.add_event_handler(Events.EPOCH_STARTED(once=len(before) + 1), stop)
    with pytest.raises(KeyboardInterrupt):
        first.trainer.run()
    second = Run(tmp_path, after, epochs=epochs, resume=True)
    second.trainer.run()
    chosen = second.chosen(tmp_path)
    assert chosen == ([best] if best else [])                      # none of the second run: that of the first stays
    if best is None:
        assert first.chosen(tmp_path) == [1 + before.index(max(before))]


def test_without_validation_the_last_student_is_no_surprise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = toys.Run(tmp_path, epochs=2)
    run.evaluator.state.epoch_length = 0
    with caplog.at_level(logging.INFO, "medkd"), pytest.warns(UserWarning, match="dataloader"):
        run.trainer.run()
    assert "No validation took place: the last student is saved." in caplog.text
