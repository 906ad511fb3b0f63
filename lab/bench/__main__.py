# SPDX-License-Identifier: Apache-2.0
"""Measure speed and memory against peers, print a table, and write bench/<method>.json.

Every module of this package with `MEASUREMENTS` is a method: name -> function(quick) that gives rows. It runs with one
thread of torch, unless it sets another number itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lab import bench
from lab.bundle import ROOT
from lab.measure import Row, machine, threads, versions

Measurements = Mapping[str, Callable[[bool], list[Row]]]
PACKAGES = ("medkd", "torch", "monai", "numpy")


def main() -> None:
    """Run what the command line asks for."""
    methods = _methods()
    options = _parse(methods)
    folder = Path(options.output or (tempfile.mkdtemp() if options.quick else ROOT / "bench"))
    folder.mkdir(parents=True, exist_ok=True)
    asked, _, part = options.only.partition(".")
    for method in [asked] if asked else methods:
        chosen = {part: methods[method][part]} if part else methods[method]
        rows = [dataclasses.asdict(row) for row in _measure(method, chosen, options.quick)]
        if not part:                                               # which would overwrite the whole
            told = {"rows": rows, "machine": machine(), "versions": versions(*PACKAGES)}
            path = folder / f"{method}.json"
            path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
            print(f"written: {path}")


def _methods() -> dict[str, Measurements]:
    names = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name != "__main__")
    modules = {name: vars(importlib.import_module(f"{bench.__name__}.{name}")) for name in names}
    return {name: module["MEASUREMENTS"] for name, module in modules.items() if "MEASUREMENTS" in module}


def _parse(methods: Mapping[str, Measurements]) -> argparse.Namespace:
    known = [f"{method}.{name}" for method, measurements in methods.items() for name in measurements]
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", default="", metavar="METHOD[.MEASUREMENT]", help="one method, or one measurement of it, which is "
        f"printed and not written; there are {', '.join(known)}")
    add("--quick", action="store_true", help="tiny sizes, seconds, to see that all runs; written to a temporary folder")
    add("--output", metavar="FOLDER", help="where the JSON files go; default: the folder bench")
    options = parser.parse_args()
    if options.only not in ("", *methods, *known):
        parser.error(f"`--only` must be a method or a measurement, got {options.only!r}; there are {', '.join(known)}.")
    return options


def _measure(method: str, measurements: Measurements, quick: bool) -> list[Row]:
    rows: list[Row] = []
    print(f"{method}\n{'':31}{'ours':>10}{'reference':>11}  {'unit':13}{'ratio':>8}  {'quartiles':18}goal")
    for name, function in measurements.items():
        command = f"python -m lab.bench --only {method}.{name}" + (" --quick" if quick else "")
        with threads(1):
            found = [dataclasses.replace(row, command=command) for row in function(quick)]
        print("\n".join(map(_line, found)), flush=True)
        rows += found
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
