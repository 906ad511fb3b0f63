# SPDX-License-Identifier: Apache-2.0
"""Handlers are tested on one thread: the networks are so small that a second one only waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import toys
from medkd.handlers.teacher import Teacher


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, and set the number back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    """A frozen teacher with a file, of two layers."""
    torch.manual_seed(0)
    torch.save(toys.TwoLayers().state_dict(), tmp_path / "teacher.pt")
    return Teacher(toys.TwoLayers, tmp_path / "teacher.pt")
