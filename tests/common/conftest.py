# SPDX-License-Identifier: Apache-2.0
"""The same random numbers for a test, whichever tests ran before it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch's global generator."""
    torch.manual_seed(0)
