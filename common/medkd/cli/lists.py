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


def load_lists(path: str | os.PathLike[str]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Read all lists of a datalist, empty where absent, and the names of its label values.

    The file has to be there, and `training` in it, unless it has `unlabeled`.
    """
    from medkd.data.datalist import LISTS, load_datalist

    full = os.fspath(path)
    unlabeled = load_datalist(full, "unlabeled", missing_ok=True)
    lists = {name: load_datalist(full, name, missing_ok=bool(unlabeled) or name != "training") for name in LISTS}
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    return {**lists, "unlabeled": unlabeled}, raw.get("labels") or {}


def count_classes(labels: Mapping[str, Any]) -> int | None:
    """Number of classes that named label values stand for, the background among them; None where none has a name."""
    return max(int(value) for value in labels) + 1 if labels else None


def tell_written(path: Path) -> None:
    """Print the numbers of cases of a new datalist and the command that checks it, if it is one to learn from."""
    lists, labels = load_lists(path)
    print(f"Wrote {path}: {', '.join(f'{len(cases)} {name}' for name, cases in lists.items())}.")
    if not lists["training"] and not lists["unlabeled"]:
        return
    classes = f" --num_classes {count_classes(labels)}" if labels else ""
    free = "" if any("label" in case for case in lists["training"]) else " --label_free"
    print(f"Next: medkd check-data {shlex.quote(str(path))}{classes}{free}")
