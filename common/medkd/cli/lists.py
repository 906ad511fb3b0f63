# SPDX-License-Identifier: Apache-2.0
"""What commands read of a datalist, and say of one that they wrote."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["count_classes", "load_lists", "tell_written"]


def load_lists(path: str | os.PathLike[str]) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Read all lists of a datalist, empty where absent, and the names of its label values."""
    from medkd.data.datalist import load_datalist

    lists = {"training": load_datalist(os.fspath(path), "training")}
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in ("validation", "test", "unlabeled"):
        lists[name] = load_datalist(os.fspath(path), name) if name in raw else []
    return lists, raw.get("labels") or {}


def count_classes(labels: Mapping[str, Any]) -> int | None:
    """Number of classes that named label values stand for, the background among them; None where none has a name."""
    return max(int(value) for value in labels) + 1 if labels else None


def tell_written(path: Path) -> None:
    """Print the numbers of cases of a new datalist and the command that checks it."""
    lists, labels = load_lists(path)
    print(f"Wrote {path}: {', '.join(f'{len(cases)} {name}' for name, cases in lists.items())}.")
    classes = f" --num_classes {count_classes(labels)}" if labels else ""
    print(f"Next: medkd check-data {shlex.quote(str(path))}{classes}")
