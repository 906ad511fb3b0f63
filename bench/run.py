# SPDX-License-Identifier: Apache-2.0
"""Measure speed and memory against peers, print a table, and write one JSON file per method next to this script.

Every other script of this folder with `MEASUREMENTS` is a method: name -> function(quick) that gives rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")               # CPU time must not count threads that wait in a loop
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}   # the profiler's notes would tear the table
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]             # the peers are the oracles of the tests

from measure import Row, machine, versions  # noqa: E402

PACKAGES = ("medkd", "torch", "monai", "numpy")


def main() -> None:
    """Run what the command line asks for."""
    options = _parse()
    folder = Path(options.output) if options.output else Path(tempfile.mkdtemp()) if options.quick else HERE
    folder.mkdir(parents=True, exist_ok=True)
    method_asked, _, measurement_asked = options.only.partition(".")
    for method in _methods():
        if method_asked in ("", method):
            rows = _measure(method, measurement_asked, options.quick)
            if measurement_asked:
                continue                                           # a part would overwrite the whole
            content = {
                "rows": [dataclasses.asdict(row) for row in rows], "machine": machine(), "versions": versions(*PACKAGES)
            }
            path = folder / f"{method}.json"
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            print(f"written: {path}")


def _parse() -> argparse.Namespace:
    known = ", ".join(f"{method}.{name}" for method in _methods() for name in _measurements(method))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])   # type: ignore[union-attr]
    parser.add_argument(
        "--only", default="", metavar="METHOD[.MEASUREMENT]",
        help=f"one method, or one measurement of it, which is printed and not written; there are {known}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, seconds, to see that all runs; written to a temporary folder"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where the JSON files go; default: the folder bench")
    options = parser.parse_args()
    method, _, measurement = options.only.partition(".")
    if options.only and (method not in _methods() or (measurement and measurement not in _measurements(method))):
        parser.error(f"`--only` must be a method or a measurement, got {options.only!r}; there are {known}.")
    return options


def _methods() -> list[str]:
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run")
    return [name for name in names if hasattr(importlib.import_module(name), "MEASUREMENTS")]


def _measurements(method: str) -> list[str]:
    return list(importlib.import_module(method).MEASUREMENTS)


def _measure(method: str, asked: str, quick: bool) -> list[Row]:
    rows: list[Row] = []
    print(f"{method}\n{'':31}{'ours':>10}{'reference':>11}  {'unit':13}{'ratio':>8}  {'quartiles':18}goal")
    for name, function in importlib.import_module(method).MEASUREMENTS.items():
        if asked in ("", name):
            command = f"python bench/run.py --only {method}.{name}" + (" --quick" if quick else "")
            for row in function(quick):
                rows.append(dataclasses.replace(row, command=command))
                print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    reference = "" if row.reference_value is None else f"{row.reference_value:.4g}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    spread = "" if row.spread is None else "{:.3g} .. {:.3g}".format(*row.spread)
    sign = "<=" if row.better == "lower" else ">="
    goal = "" if row.goal is None else f"{sign} {row.goal:g} {'reached' if row.reached else 'MISSED'}"
    return f"{row.name:31}{row.subject_value:>10.4g}{reference:>11}  {row.unit:13}{ratio:>8}  {spread:18}{goal}"


if __name__ == "__main__":
    main()
