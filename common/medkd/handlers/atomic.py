# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced as a whole, or stay as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["mark_unsaved", "save_atomically", "write_json"]


def save_atomically(content: Any, path: Path) -> None:
    """Write with `torch.save` to a temporary file beside `path`, sync it to the disk, and rename it.

    At every moment `path` is either the old file or the new one, whole.

    Raises:
        OSError: the disk is full or read-only; the old file stays.
    """
    _write_atomically(path, lambda file: torch.save(content, file))


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON in the same way."""
    text = json.dumps(content, indent=2) + "\n"
    _write_atomically(path, lambda file: file.write(text.encode()))


def mark_unsaved(path: Path, reason: str) -> None:
    """Say in the description of older weights that better ones are lost; a disk too full for that loses it."""
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
        write_json({**before, "saved": False, "reason": reason}, path)
    except (OSError, ValueError):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")   # two runs may write the same file at once
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":                                     # the name is in the folder: sync that, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except RuntimeError as error:                                  # how torch reports a failed write
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__                            # it closes its archive, which fails, too
        raise OSError(str(reason or error)) from error
    finally:
        with suppress(OSError):                                    # a folder that cannot be written has none
            temporary.unlink(missing_ok=True)
