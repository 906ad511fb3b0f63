# SPDX-License-Identifier: Apache-2.0
"""The demo is a folder of programs, not a package: its modules are found as when demo.py runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "demo"))
