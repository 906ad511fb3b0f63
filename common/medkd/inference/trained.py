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

__all__ = ["LOW_ALREADY", "class_names", "is_plain", "tell_other_input"]

LOW_ALREADY = ("scale", 1)                 # images that were taken at a student's low resolution, without a rim to cut
_INPUT = ("unit", "spacing", "intensity_range", "scale", "student_input", "rim")   # options that make the input
logger = logging.getLogger(__name__)


def tell_other_input(parser: ConfigParser) -> None:
    """Warn of options that make another input than the weights of this run were trained with; refuse other classes.

    A network takes images of any spacing, window and scale without complaint, and is wrong on them. What it was trained
    with stands in the `model.json` that a training writes beside `model.pt`; weights that came with a bundle, which
    have none, fit its inference.json and metadata.json. Of others nothing is said.

    Args:
        parser: of the run, whose `CheckpointLoader` tells the file of the weights.

    Raises:
        ValueError: the datalist of an evaluation, or of classes that are written by name, has a class of the training
            under another number.
    """
    name, value = LOW_ALREADY
    is_low = parser.get(name) == value and parser.get("student_input") != "upsampled"      # these need their grid, too
    told = [one for one in _INPUT if one not in (name, "rim")] if is_low else list(_INPUT)
    names_classes = parser.get("saving#class_names") is not None
    told += ["patch_size"] if names_classes else []                # what a classifier sees, and no mere window
    for weights in _weights(parser):
        if "validate" in parser or names_classes:                       # scored, or written, under these names
            _refuse_other_order(parser, weights)
        trained = _told_of(weights, "options")
        for name in told:
            now = parser.get(name, trained.get(name))
            if name in trained and trained[name] != now and is_plain(now):
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


def _told_of(weights: Path, part: str) -> dict[str, Any]:
    """`options` or `labels` of the training that wrote some weights; empty where nothing tells them."""
    if weights.name != "model.pt":
        return {}
    try:
        file, configs = weights.with_name("model.json"), weights.parents[1] / "configs"
        if weights.parent.name != "models" or file.exists():
            found = _read(file)[part]
        elif part == "options":
            found = {key: value for key, value in _read(configs / "inference.json").items() if is_plain(value)}
        else:
            found = _read(configs / "metadata.json")["network_data_format"]["outputs"]["pred"]["channel_def"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def is_plain(value: Any) -> bool:
    """Tell whether a value of a config is what it says, and no expression or reference, which may be the same."""
    return not str(value).startswith(("$", "@", "%"))


def class_names(parser: ConfigParser) -> dict[str, str]:
    """Names of the classes by number, as the datalist of a run has them; empty where it has none."""
    try:
        names = _read(Path(str(parser.get_parsed_content("datalist"))))["labels"]
        return {str(number): str(name) for number, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}                          # `load_datalist` tells what is wrong with the file, if it is needed


def _refuse_other_order(parser: ConfigParser, weights: Path) -> None:
    """A class of the same name under another number would be taken for another one."""
    trained, now = _told_of(weights, "labels"), class_names(parser)
    if any(name in trained.values() and trained.get(number) != name for number, name in now.items()):
        before, found = (", ".join(f"{number} {name}" for number, name in one.items()) for one in (trained, now))
        names = ",".join(trained.values())
        raise ValueError(
            f"`labels` of the datalist must number classes as the training of {weights} did, {before}, got {found}; "
            f"write the list so, from folders of classes by `medkd datalist --label_names {names}`."
        )
