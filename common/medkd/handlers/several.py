# SPDX-License-Identifier: Apache-2.0
"""Several handlers in one place of the list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ignite.engine import Engine

__all__ = ["SeveralHandlers"]


class Attachable(Protocol):
    """A handler."""

    def attach(self, engine: Any) -> None:
        """Register on an engine."""


class SeveralHandlers:
    """Handlers that stand elsewhere in the config, in their place in `train#handlers`, whose items are dicts.

    What only distillation needs is listed under one key so, and an override that needs none of it empties that key.

    Args:
        handlers: they are attached in this order.
    """

    def __init__(self, handlers: Sequence[Attachable]) -> None:
        self.handlers = tuple(handlers)

    def attach(self, engine: Engine) -> None:
        """Register all of them on an engine."""
        for handler in self.handlers:
            handler.attach(engine)
