#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lay out the JSON of the bundles in one way, so that a diff of two configs shows only what differs.

Two spaces; a list or dict that fits on a line of 110 characters stays on one line, else it has an item per line; keys
in the order of ci/skeleton/<same name>, a key that the skeleton does not have behind the one it followed.

    python ci/format_json.py --check     name every file of bundles/*/configs and ci/skeleton that differs
    python ci/format_json.py --write     lay them out
    python ci/format_json.py --check FILE ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command import command_line
from configs import parts, read_json

WIDTH = 110


def dumps(value: Any) -> str:
    """Text of a JSON file in the canonical layout, ending with a newline."""
    return _broken(value, 0) + "\n"


def inline(value: Any) -> str:
    """Text of a value on one line."""
    return json.dumps(value, ensure_ascii=False)


def _broken(value: Any, indent: int) -> str:
    if not isinstance(value, dict | list) or not value:
        return inline(value)
    is_dict, end, lines = isinstance(value, dict), "\n" + " " * indent, []
    for key, item in parts(value).items():
        start = f"{inline(key)}: " if is_dict else ""
        fits = indent + 2 + len(start + inline(item)) + 1 <= WIDTH  # 1 for the comma
        lines.append(f"{end}  {start}{inline(item) if fits else _broken(item, indent + 2)}")
    first, last = "{}" if is_dict else "[]"
    return first + ",".join(lines) + end + last


def in_order_of(value: Any, skeleton: Any) -> Any:
    """Sort the keys of `value` like those of `skeleton`, at every depth; other keys follow their neighbor."""
    if isinstance(value, list) and isinstance(skeleton, list):     # an item is known by its class, wherever it stands
        known = {_target(item): item for item in skeleton}
        return [in_order_of(item, known.get(_target(item))) for item in value]
    if not (isinstance(value, dict) and isinstance(skeleton, dict)):
        return value
    ranks = {key: rank for rank, key in enumerate(skeleton)}
    order, rank = {}, -1
    for key in value:
        rank = order[key] = ranks.get(key, rank)
    return {key: in_order_of(value[key], skeleton.get(key)) for key in sorted(value, key=order.__getitem__)}


def _target(item: Any) -> Any:
    return item.get("_target_") if isinstance(item, dict) else None


def settle(path: Path, root: Path, write: bool) -> tuple[str, bool]:
    """Check a file, and lay it out if asked; returns a message, if any, and whether something is left to do."""
    skeleton = root / "ci" / "skeleton" / path.name
    try:
        value = read_json(path)
        text = dumps(in_order_of(value, read_json(skeleton)) if skeleton.is_file() else value)
    except (ValueError, OSError) as error:
        return str(error), True
    if text == path.read_text(encoding="utf-8"):
        return "", False
    if not write:
        return f"{path}: layout differs; run python ci/format_json.py --write", True
    path.write_text(text, encoding="utf-8")
    return f"{path}: laid out", False


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or repair; returns the exit status."""
    parser = command_line(__doc__, repairs=True)
    places = ("bundles/*/configs/*.json", "ci/skeleton/*.json")
    parser.add_argument("files", nargs="*", type=Path, help=f"default: {', '.join(places)}")
    options = parser.parse_args(arguments)
    files = options.files or sorted(file for place in places for file in options.root.glob(place))
    found = [settle(path, options.root, options.write) for path in files]
    print(*(message for message, _ in found if message), f"{len(files)} JSON files", sep="\n")
    return int(any(is_open for _, is_open in found))


if __name__ == "__main__":
    sys.exit(main())
