# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of our operations against peers: `make bench`, or `python -m lab.bench`."""

from __future__ import annotations

import os

# Before torch is imported: CPU time must not count threads that wait in a loop, and the profiler's notes would tear the
# printed table.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
