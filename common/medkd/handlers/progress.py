# SPDX-License-Identifier: Apache-2.0
"""How far a run is, in a file that another program may read at any moment."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from medkd.handlers.run_folder import check_writable

__all__ = ["ProgressFile"]


class ProgressFile:
    """Write `{"epoch", "epochs", "step", "steps", "done"}` as JSON, for a trainer or an evaluator.

    `epoch` and `step` are those that are done or under way, from 1 on, 0 before the first; `steps` is that of one
    epoch; `done` says that the run came to its end. The file is replaced as a whole, by the first rank alone. A disk
    that gets full stops no run: the file is old then.

    Args:
        path: of the file.
        minimum_seconds: least time between two writes; start and end are always written.

    Raises:
        OSError: at start: the folder of `path` cannot be written to, so that the run would not keep its results.
    """

    def __init__(self, path: str | os.PathLike[str], minimum_seconds: float = 1.0) -> None:
        self.path = Path(path)
        self.minimum_seconds = minimum_seconds
        self._written = 0.0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer or an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._write, done=True)

    def _start(self, engine: Any) -> None:
        if idist.get_rank() == 0:
            check_writable(self.path.parent, "The folder of the results")
        self._write(engine)

    def _step(self, engine: Any) -> None:
        if time.monotonic() - self._written >= self.minimum_seconds:
            self._write(engine)

    def _write(self, engine: Any, done: bool = False) -> None:
        if idist.get_rank() != 0:
            return
        state = engine.state
        steps = state.epoch_length or 0
        step = (state.iteration - 1) % steps + 1 if steps and state.iteration else 0
        content = {"epoch": state.epoch, "epochs": state.max_epochs, "step": step, "steps": steps, "done": done}
        draft = self.path.with_name(f".{self.path.name}.tmp")
        with suppress(OSError):
            draft.write_text(json.dumps(content) + "\n")
            os.replace(draft, self.path)
        self._written = time.monotonic()
