# SPDX-License-Identifier: Apache-2.0
"""Bring what is made of results up to date: the file itself, figures, and the pages' tables. Trains nothing.

    python -m lab.publish [BUNDLE ...]                     after a merge, or when a page or the recipe's rows change
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import record
from lab.bundle import ROOT
from lab.figure import draw, draw_curve
from lab.pages import fill
from lab.recipe import Recipe, read_recipe

__all__ = ["publish", "publish_all"]


def publish(root: Path, content: Mapping[str, Any], recipe: Recipe) -> list[Path]:
    """Write results/<bundle>.json and its figures, and fill the pages; gives the pages that have no markers.

    Args:
        root: of the repository.
        content: of the file, all rows.
        recipe: of the bundle; rows that it has replaced go, those of an earlier protocol say so.
    """
    bundle, content = content["bundle"], record.complete(content, recipe)
    path = root / "results" / f"{bundle}.json"
    path.parent.mkdir(exist_ok=True)
    record.write_results(path, content)
    draw(content, path.with_suffix(".png"))
    draw_curve(content, path.with_name(f"{bundle}_labels.png"))
    return fill(content, root / "README.md", root / "bundles" / bundle / "docs" / "README.md")


def publish_all(root: Path, bundles: Sequence[str] = (), recipes: Path = ROOT / "results" / "recipes") -> list[str]:
    """Publish what the results files of some bundles hold, of all if none are named; gives the bundles' names."""
    files = sorted((root / "results").glob("*.json"))
    unknown = sorted({*bundles} - {file.stem for file in files})
    if unknown:
        raise ValueError(f"BUNDLE must be one of {[file.stem for file in files]}, which have results, got {unknown}.")
    named = [file for file in files if not bundles or file.stem in bundles]
    for file in named:
        publish(root, record.read_results(file), read_recipe(root / "bundles" / file.stem, recipes))
    return [file.stem for file in named]


def main(words: Sequence[str]) -> int:
    """Publish what the command line names."""
    parser = argparse.ArgumentParser(
        "python -m lab.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help="with results (default: all that have some)")
    try:
        print(f"Up to date: {', '.join(publish_all(ROOT, parser.parse_args(words).bundles))}.")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
