# SPDX-License-Identifier: Apache-2.0
"""The same random numbers for a test, whichever tests ran before it."""

from __future__ import annotations

import os
import stat
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What was synced or renamed, in order: which, the inode, and the bytes that a file has at that moment."""
    steps: list[tuple[str, int, int]] = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(found.st_mode)
        steps.append(("folder synced" if is_folder else "synced", found.st_ino, 0 if is_folder else found.st_size))
        sync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        steps.append(("renamed", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    return steps
