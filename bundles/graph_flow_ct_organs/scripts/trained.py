# SPDX-License-Identifier: Apache-2.0
"""What weights were trained to see, against what this run shows them."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle.config_parser import ConfigParser

__all__ = ["LOW_ALREADY", "tell_other_input"]

LOW_ALREADY = ("scale", 1)                 # images that were taken at a student's low resolution, without a rim to cut
_INPUT = ("unit", "spacing", "intensity_range", "scale", "student_input", "rim")   # options that make the input
logger = logging.getLogger(__name__)


def tell_other_input(parser: ConfigParser) -> None:
    """Warn of options that make another input than the weights of this run were trained with.

    A network takes images of any spacing, window and scale without complaint, and is wrong on them. What it was trained
    with stands in the `model.json` that a training writes beside `model.pt`; without that file nothing is said.

    Args:
        parser: of the run, whose `CheckpointLoader` tells the file of the weights.
    """
    name, value = LOW_ALREADY
    told = [one for one in _INPUT if one not in (name, "rim")] if parser.get(name) == value else _INPUT
    for weights in _weights(parser):
        trained = _options_of(weights)
        for name in told:
            now = parser.get(name, trained.get(name))
            if name in trained and trained[name] != now and not str(now).startswith(("$", "@", "%")):
                before = trained[name] if isinstance(trained[name], str) else json.dumps(trained[name])
                logger.warning(
                    "%s was trained with %s %s, and this run has %s: its predictions are worth less here, or nothing. "
                    "Give %s.", weights, name, before, now, shlex.join([f"--{name}", before]),
                )


def _weights(parser: ConfigParser) -> Iterator[Path]:
    """Files that the handlers of an evaluation load."""
    for place in ("handlers", "validate#handlers"):
        handlers = parser.get(place)
        for number, handler in enumerate(handlers if isinstance(handlers, list) else ()):
            if isinstance(handler, dict) and str(handler.get("_target_")).endswith("CheckpointLoader"):
                yield Path(str(parser.get_parsed_content(f"{place}#{number}#load_path")))


def _options_of(weights: Path) -> dict[str, Any]:
    """Options of the training that wrote some weights; empty where none are told."""
    if weights.name != "model.pt":
        return {}
    try:
        options = json.loads(weights.with_name("model.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return options if isinstance(options, dict) else {}
