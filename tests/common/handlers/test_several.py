# SPDX-License-Identifier: Apache-2.0
"""Several handlers in one place."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events

from medkd.handlers.several import SeveralHandlers


class Note:
    """A handler that notes its name at the start."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self.notes.append(self.name))


def test_handlers_are_attached_in_their_order() -> None:
    notes: list[str] = []
    engine = Engine(lambda engine, batch: None)
    SeveralHandlers([Note("first", notes), Note("second", notes)]).attach(engine)
    SeveralHandlers([]).attach(engine)
    engine.run([0])
    assert notes == ["first", "second"]
