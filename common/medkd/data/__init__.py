# SPDX-License-Identifier: Apache-2.0
"""Lists of cases, and the check of what they name before any training."""

from __future__ import annotations

from medkd.data.check import DataError, DataReport, check_data
from medkd.data.datalist import load_datalist, make_datalist, write_datalist

__all__ = ["DataError", "DataReport", "check_data", "load_datalist", "make_datalist", "write_datalist"]
