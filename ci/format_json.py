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

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH = 110
ROOT = Path(__file__).resolve().parents[1]


def read_json(path: Path) -> Any:
    """Read a JSON file; a key that stands twice is an error, as the first one would be lost in silence."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON with unique keys: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one dict; keep one.")
        result[key] = value
    return result


def dumps(value: Any) -> str:
    """Text of a JSON file in the canonical layout, ending with a newline."""
    return _broken(value, 0) + "\n"


def _inline(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _broken(value: Any, indent: int) -> str:
    if not isinstance(value, dict | list) or not value:
        return _inline(value)
    pad = " " * (indent + 2)
    named = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    lines = [_line(key, item, indent + 2) for key, item in named]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return first + "\n" + ",\n".join(pad + line for line in lines) + "\n" + " " * indent + last


def _line(key: str | None, value: Any, indent: int) -> str:
    start = "" if key is None else _inline(key) + ": "
    flat = start + _inline(value)
    return flat if indent + len(flat) + 1 <= WIDTH else start + _broken(value, indent)  # 1 for the comma


def in_order_of(value: Any, skeleton: Any) -> Any:
    """Sort the keys of `value` like those of `skeleton`, at every depth; other keys follow their neighbor."""
    if isinstance(value, list) and isinstance(skeleton, list):     # an item is known by its class, wherever it stands
        known = {_target(item): item for item in skeleton}
        return [in_order_of(item, known.get(_target(item))) for item in value]
    if not (isinstance(value, dict) and isinstance(skeleton, dict)):
        return value
    groups: dict[str | None, list[str]] = {None: []}  # key of the skeleton -> it and the keys that follow it
    anchor = None
    for key in value:
        anchor = key if key in skeleton else anchor
        groups.setdefault(anchor, []).append(key)
    keys = [key for group in (None, *skeleton) for key in groups.get(group, [])]
    return {key: in_order_of(value[key], skeleton.get(key)) for key in keys}


def _target(item: Any) -> Any:
    return item.get("_target_") if isinstance(item, dict) else None


def canonical(path: Path, root: Path = ROOT) -> str:
    """Text that the file should have."""
    skeleton = root / "ci" / "skeleton" / path.name
    value = read_json(path)
    return dumps(in_order_of(value, read_json(skeleton)) if skeleton.is_file() else value)


def config_files(root: Path) -> list[Path]:
    """All JSON files of the bundles' configs and of the skeleton."""
    return sorted([*root.glob("bundles/*/configs/*.json"), *root.glob("ci/skeleton/*.json")])


def settle(path: Path, root: Path, write: bool) -> tuple[str, bool]:
    """Check a file, and lay it out if asked; returns a message, if any, and whether something is left to do."""
    try:
        text = canonical(path, root)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--check", action="store_true", help="name the files that differ; exit 1 if there is one"
    )
    mode.add_argument("--write", action="store_true", help="rewrite the files that differ")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: this one)")
    parser.add_argument(
        "files", nargs="*", type=Path, help="default: bundles/*/configs/*.json, ci/skeleton/*.json"
    )
    options = parser.parse_args(arguments)
    files = options.files or config_files(options.root)
    found = [settle(path, options.root, options.write) for path in files]
    print(*(message for message, _ in found if message), f"{len(files)} JSON files", sep="\n")
    return int(any(is_open for _, is_open in found))


if __name__ == "__main__":
    sys.exit(main())
