# SPDX-License-Identifier: Apache-2.0
"""The command line `python -m monai.bundle run`: misspelled options are refused, errors end with their cause."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from medkd.checks import suggest

__all__ = ["prepare_command_line", "refuse_unknown_overrides"]

_RUN_IDS = {"run", "training", "evaluating"}                     # a later file may bring its own
_FLAG = re.compile(r"--|-[a-zA-Z]")   # what fire takes for an option; -1 is a value
_RUN_OPTIONS = {
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file",
}


def prepare_command_line(argv: Sequence[str]) -> None:
    """Refuse unknown options, and let an uncaught error end with its first cause.

    A line of `initialize` in every bundle. MONAI wraps errors of a config several times, so that the last line names
    an expression, not the reason. Does nothing when the process is not `python -m monai.bundle run` (MONAI Label, a
    notebook).

    Args:
        argv: `sys.argv`.

    Raises:
        ValueError: see `refuse_unknown_overrides`.
    """
    if _is_bundle_run(argv):
        sys.excepthook = _end_with_cause
        refuse_unknown_overrides(argv)


def _is_bundle_run(argv: Sequence[str]) -> bool:
    return bool(argv) and Path(argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py") and "run" in argv[1:2]


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is not error:
        sys.stderr.write(f"\nError: {cause}\n")


def refuse_unknown_overrides(argv: Sequence[str]) -> None:
    """Check every option and every key of a later config file against the first config file.

    A leading `+` marks a key that is meant to be new; `argv` is `sys.argv`.

    Raises:
        ValueError: a key that the first config file does not have; the message names the nearest one.
    """
    if not _is_bundle_run(argv):
        return
    options = dict(_options(argv[2:]))
    files = _config_files(options.get("config_file", ""))
    if not files or any(path.suffix != ".json" for path in files):
        return
    base, *later = [json.loads(path.read_text()) for path in files]
    for path, content in zip(files[1:], later, strict=True):
        for key in content.keys() - _RUN_IDS:
            _refuse_unknown(key, base, f"Key of {path}")
    for name in options:
        if name not in _RUN_OPTIONS:
            _refuse_unknown(name, base, "Option --" + name)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for position, word in enumerate(words):
        if word == "--":                                           # what follows is for fire itself
            return
        if _FLAG.match(word):
            name, equals, value = word.lstrip("-").partition("=")
            following = words[position + 1] if position + 1 < len(words) else ""
            yield name.replace("-", "_"), value if equals else following


def _config_files(text: str) -> list[Path]:
    if not text.startswith("["):
        return [Path(text)] if text else []
    try:
        return [Path(name) for name in ast.literal_eval(text)]
    except (SyntaxError, ValueError):                              # [a.json,b.json] without quotes, as fire allows
        return [Path(name.strip()) for name in text.strip("[]").split(",")]


def _refuse_unknown(key: str, base: Mapping[str, Any], what: str) -> None:
    if key.startswith(("+", "~", "_meta_")):
        return
    node: Any = base
    parts = key.replace("::", "#").split("#")
    for depth, part in enumerate(parts):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            known = ["#".join([*parts[:depth], name]) for name in node] if isinstance(node, Mapping) else []
            way_out = suggest("#".join(parts[: depth + 1]), known)
            raise ValueError(f"{what} must exist in the first config file, got {key!r}; {way_out}")
