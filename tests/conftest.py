# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the repository's root, few threads, and a watch over torch's global switches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# name -> how to read it, how to set it back
SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
}


def pytest_configure() -> None:
    """Use one thread per process of `make test`, two at most otherwise, whatever the machine's size."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_switch_left_changed() -> Iterator[None]:
    """Fail a test that leaves a global switch of torch changed, and set it back for the next one."""
    before = {name: read() for name, (read, _) in SWITCHES.items()}
    yield
    changed = [name for name, (read, _) in SWITCHES.items() if read() != before[name]]
    for name in changed:
        SWITCHES[name][1](before[name])
    if changed:
        pytest.fail(f"the test left {', '.join(changed)} changed; use a context manager.", pytrace=False)
