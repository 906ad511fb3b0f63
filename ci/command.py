# SPDX-License-Identifier: Apache-2.0
"""The command line that the programs of this folder share."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command_line(description: str | None, repairs: bool = False) -> ArgumentParser:
    """Parser that shows a program's docstring and knows --root; with `repairs`, one of --check and --write too."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: this one)")
    if repairs:
        mode = parser.add_mutually_exclusive_group(required=True)
        mode.add_argument("--check", action="store_true", help="name what differs; exit 1 if anything does")
        mode.add_argument("--write", action="store_true", help="repair it; exit 1 if something is left")
    return parser
