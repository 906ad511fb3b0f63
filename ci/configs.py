# SPDX-License-Identifier: Apache-2.0
"""Read the JSON configs of bundles, and walk through them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ABSENT: Any = object()                                             # no value; null is one


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


def read_configs(bundle: Path) -> dict[Path, Any]:
    """File -> content of all configs of a bundle but its metadata, sorted by name."""
    files = sorted(bundle.glob("configs/*.json"))
    return {file: read_json(file) for file in files if not file.name.startswith("metadata")}


def parts(node: Any) -> dict[str, Any]:
    """Items of a dict, or those of a list by their place; a single value has none."""
    if isinstance(node, list):
        return {str(place): item for place, item in enumerate(node)}
    return node if isinstance(node, dict) else {}


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither list nor dict, with its path a#b#c."""
    if not isinstance(node, dict | list):
        yield path, node
    for key, value in parts(node).items():
        yield from walk(value, f"{path}#{key}" if path else key)


def texts(node: Any) -> Iterator[str]:
    """Every string that is a value."""
    return (value for _, value in walk(node) if isinstance(value, str))
