#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pin the plumbing that all bundles share: what is not a bundle's own must equal ci/skeleton.

    python ci/sync_bundles.py --check    name every difference by its path, with both values
    python ci/sync_bundles.py --write    put the skeleton's values in, keep the bundle's own ones

Each file of ci/skeleton has its namesake in bundles/*/configs; other files of a bundle are its own. Files other than
JSON are equal byte for byte, and so is a file of bundles/*/scripts with a namesake in common/medkd/inference: it is a
copy, as bundles infer without medkd, and a bundle has copies of what it imports too. In a JSON file of the skeleton
  * the value "<own>" marks a key that must be there and whose value, of any depth, belongs to the bundle;
  * the item "<own>" of a list stands for any number of items, at most once per list;
  * the top-level key "<own keys>" lists paths a#b#c that a bundle may have or not; what the skeleton itself gives for
    such a path must be equal where it is there.
All else is equal, and a bundle has no other keys. Add a skeleton by copying a bundle's file and marking what is own;
without ci/skeleton there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from format_json import dumps, in_order_of, read_json
from vendor import PACKAGE, needed_files

OWN = "<own>"
OWN_KEYS = "<own keys>"
ABSENT = object()
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "bundles/*/scripts"


class Difference(NamedTuple):
    """One place where a bundle leaves the skeleton; not repairable where a value of the bundle's own is missing."""

    path: str
    message: str
    repairable: bool


def compare(
    skeleton: Any, bundle: Any, own_keys: Collection[str], path: str = ""
) -> tuple[Any, list[Difference]]:
    """Merge plumbing and own values.

    Args:
        skeleton: content of the skeleton at this path.
        bundle: content of the bundle at this path, or ABSENT.
        own_keys: paths that the bundle may have or not.
        path: where both stand, `a#b#c`.

    Returns:
        The content that the bundle should have, as far as that is known, and the differences from it.
    """
    if skeleton == OWN and bundle is not ABSENT:
        return bundle, []
    if isinstance(skeleton, dict) and isinstance(bundle, dict):
        return _compare_dicts(skeleton, bundle, own_keys, path)
    if isinstance(skeleton, list) and isinstance(bundle, list) and _lengths_fit(skeleton, bundle):
        return _compare_lists(skeleton, bundle, own_keys, path)
    if type(skeleton) is type(bundle) and skeleton == bundle:
        return bundle, []
    repairable = not _has_own(skeleton)
    difference = Difference(path, f"must be {_short(skeleton)}, got {_short(bundle)}", repairable)
    return (skeleton if repairable else bundle), [difference]


def _compare_dicts(
    skeleton: dict[str, Any], bundle: dict[str, Any], own_keys: Collection[str], path: str
) -> tuple[dict[str, Any], list[Difference]]:
    merged: dict[str, Any] = {}
    differences: list[Difference] = []
    for key in [*bundle, *(key for key in skeleton if key not in bundle)]:
        at = f"{path}#{key}" if path else key
        value = bundle.get(key, ABSENT)
        if key in skeleton and (value is not ABSENT or at not in own_keys):
            value, found = compare(skeleton[key], value, own_keys, at)
            differences += found
        elif value is not ABSENT and at not in own_keys:
            differences.append(Difference(at, f"must be absent, got {_short(value)}", True))
            continue
        if value is not ABSENT:
            merged[key] = value
    return in_order_of(merged, skeleton), differences


def _lengths_fit(skeleton: list[Any], bundle: list[Any]) -> bool:
    return len(bundle) >= len(skeleton) - 1 if OWN in skeleton else len(bundle) == len(skeleton)


def _compare_lists(
    skeleton: list[Any], bundle: list[Any], own_keys: Collection[str], path: str
) -> tuple[list[Any], list[Difference]]:
    own = skeleton.index(OWN) if OWN in skeleton else len(skeleton)
    shift = len(bundle) - len(skeleton)  # what comes after the own items lies this much further back
    merged, differences = list(bundle), []
    for index, plumbing in enumerate(skeleton):
        place = index if index < own else index + shift
        if index != own:
            merged[place], found = compare(plumbing, bundle[place], own_keys, f"{path}#{place}")
            differences += found
    return merged, differences


def _short(value: Any) -> str:
    text = "nothing" if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _has_own(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value == OWN or any(_has_own(item) for item in items)


def sync_file(skeleton: Path, target: Path, write: bool) -> list[str]:
    """Compare a bundle's file with its skeleton, and repair it if asked; returns a line per difference that is left."""
    if skeleton.suffix != ".json":
        if target.is_file() and target.read_bytes() == skeleton.read_bytes():
            return []
        if write:
            target.write_bytes(skeleton.read_bytes())
        return [] if write else [f"{target}: must equal {skeleton}"]
    plumbing = read_json(skeleton)
    own_keys = plumbing.pop(OWN_KEYS, [])
    content, differences = compare(plumbing, read_json(target) if target.is_file() else {}, own_keys)
    if write and differences and (target.is_file() or all(d.repairable for d in differences)):
        target.write_text(dumps(content), encoding="utf-8")
    return [f"{target}: {d.path}: {d.message}" for d in differences if not (write and d.repairable)]


def shared_scripts(folder: Path, package: Path) -> list[tuple[Path, Path]]:
    """Sources that a bundle's scripts must be copies of, each with the place of its copy.

    Args:
        folder: bundles/<name>/scripts.
        package: common/medkd; its `inference` holds the sources.

    Returns:
        What has a namesake in `folder`, and what that imports of `inference`, there or not.
    """
    source = package / "inference"
    names = [(file, f"{PACKAGE}.{source.name}.{file.stem}") for file in folder.glob("[!_]*.py")]
    known = [(file, name) for file, name in names if (source / file.name).is_file()]
    return [(file, folder / file.name) for file in needed_files(known, package) if file.name != "__init__.py"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or repair; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="name the differences; exit 1 if there is one")
    mode.add_argument("--write", action="store_true", help="repair them; exit 1 if an own value is missing")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: this one)")
    options = parser.parse_args(arguments)
    skeletons = sorted(path for path in options.root.glob("ci/skeleton/*") if path.is_file())
    folders = sorted(options.root.glob("bundles/*/configs"))
    try:
        lines = [line for d in folders for s in skeletons for line in sync_file(s, d / s.name, options.write)]
        package = options.root / "common" / PACKAGE
        copies = [pair for d in sorted(options.root.glob(SCRIPTS)) for pair in shared_scripts(d, package)]
        lines += [line for source, copy in copies for line in sync_file(source, copy, options.write)]
    except ValueError as error:
        lines = [str(error)]
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{len(folders)} bundles, {len(skeletons)} skeletons, {len(lines)} differences", end="")
    print("; python ci/sync_bundles.py --write repairs plumbing" if lines and options.check else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
