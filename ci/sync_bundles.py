#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pin the plumbing that all bundles share: what is not a bundle's own must equal ci/skeleton.

    python ci/sync_bundles.py --check    name every difference by its path
    python ci/sync_bundles.py --write    add what is missing and correct what differs; nothing is ever removed

Each file of ci/skeleton has its namesake in bundles/*/configs; other files of a bundle are its own. Files other than
JSON are equal byte for byte. In a JSON file of the skeleton
  * the value "<own>" marks a key that must be there, with a value of the bundle's own, of any depth;
  * {"<own>": value} does the same and gives the value that most bundles have; `--write` puts it in where it is missing;
  * the item "<more>" of a list is the place for items of the bundle's own, any number of them;
  * the key "<more>" of a dict says that further keys are the bundle's own.
All else is equal. A key that the skeleton does not have is the bundle's own if one of its configs refers to it (`@key`,
`%key`) or it is a list of expressions, which `monai.bundle run` starts by its name. In the skeleton of an override
(flat keys a#b#c) it is own if it lies within what train.json has of its own.

A file of bundles/*/scripts with a namesake in common/medkd/inference equals it byte for byte, and what that imports
relatively is there too, as bundles never import each other and inference needs nothing but `scripts`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from format_json import dumps, in_order_of, read_json
from vendor import PACKAGE, needed_files

OWN = "<own>"
MORE = "<more>"
ABSENT: Any = object()
REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*(?:(?:#|::)\w+)*)")
ALIKE = 0.8        # how much of two items of a list is the same where one is taken for the other, with a slip in it
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "bundles/*/scripts"


class Difference(NamedTuple):
    """One place where a bundle leaves the skeleton, and whether `--write` brings it back."""

    path: str
    message: str
    repairable: bool


@dataclass
class Comparison:
    """Brings the skeleton and a bundle's config together, and notes each difference.

    Attributes:
        references: paths a#b#c that the configs of the bundle refer to.
        train: skeleton of train.json where the config is an override of it, else None.
        found: the differences, in the order of the config.
    """

    references: frozenset[str]
    train: Any = None
    found: list[Difference] = field(default_factory=list)

    def merge(self, skeleton: Any, bundle: Any, path: str = "") -> Any:
        """Give what the bundle should have at this path, as far as it is known.

        Args:
            skeleton: content of the skeleton.
            bundle: content of the bundle, or ABSENT.
            path: where both stand, `a#b#c`.
        """
        if _is_own(skeleton):
            return self._own(skeleton, bundle, path)
        if isinstance(skeleton, dict) and isinstance(bundle, dict):
            return self._merge_dicts(skeleton, bundle, path)
        if isinstance(skeleton, list) and isinstance(bundle, list):
            return self._merge_lists(skeleton, bundle, path)
        if type(skeleton) is type(bundle) and skeleton == bundle:
            return bundle
        filled = _filled(skeleton)
        self._note(path, f"must be {_short(skeleton)}, got {_short(bundle)}", filled is not ABSENT)
        return bundle if filled is ABSENT else filled

    def _own(self, skeleton: Any, bundle: Any, path: str) -> Any:
        if bundle is not ABSENT:
            return bundle
        filled = _filled(skeleton)
        usual = "" if filled is ABSENT else f", such as {_short(filled)}"
        self._note(path, f"must have a value of the bundle's own{usual}, got nothing", filled is not ABSENT)
        return filled

    def _merge_dicts(self, skeleton: dict[str, Any], bundle: dict[str, Any], path: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key in [*bundle, *(key for key in skeleton if key not in bundle and key != MORE)]:
            at = f"{path}#{key}" if path else key
            value = bundle.get(key, ABSENT)
            if key in skeleton:
                value = self.merge(skeleton[key], value, at)
            elif MORE not in skeleton and not self._is_own_key(at, value):
                self._note(at, self._no_place(key, skeleton), False)
            if value is not ABSENT:
                merged[key] = value
        return in_order_of(merged, skeleton)

    def _is_own_key(self, path: str, value: Any) -> bool:
        if any(known == path or known.startswith(path + "#") for known in self.references):
            return True
        if isinstance(value, list) and value and all(isinstance(v, str) and v.startswith("$") for v in value):
            return "#" not in path
        return self.train is not None and _lies_in_own(path.removeprefix("+").split("#"), self.train)

    def _no_place(self, key: str, skeleton: dict[str, Any]) -> str:
        near = get_close_matches(key, [known for known in skeleton if known != MORE], n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"{guess}the skeleton has no such key, and nothing refers to it; it stays: rename it or take it out"

    def _merge_lists(self, skeleton: list[Any], bundle: list[Any], path: str) -> list[Any]:
        merged: list[Any] = []
        behind = "first"
        for row in _aligned(skeleton, bundle):
            item = ABSENT if row.place is None else bundle[row.place]
            if row.pinned is ABSENT:
                message = f"{_name(item)} has no place here and stays; {_way_out(skeleton)}"
                self._note(f"{path}#{row.place}", message, False)
            elif row.place is None:
                item = _filled(row.pinned)
                self._note(path, f"must have {_name(row.pinned)} {behind}, got none", item is not ABSENT)
            elif row.pinned != MORE:
                if row.is_moved:
                    self._note(f"{path}#{row.place}", f"{_name(item)} must stand {behind}", True)
                item = self.merge(row.pinned, item, f"{path}#{row.place}")
            if item is not ABSENT:
                merged.append(item)
            if row.pinned is not ABSENT and row.pinned != MORE:
                behind = f"behind {_name(row.pinned)}"
        return merged

    def _note(self, path: str, message: str, repairable: bool) -> None:
        self.found.append(Difference(path, message, repairable))


class Row(NamedTuple):
    """A pinned item with its place in the bundle's list; MORE for an own item, ABSENT for one without a place."""

    pinned: Any
    place: int | None
    is_moved: bool = False


def _aligned(skeleton: list[Any], bundle: list[Any]) -> list[Row]:
    """Pair pinned items with a bundle's, by what they are; the rows have the order that the list should have."""
    names = [[_name(item) for item in items] for items in (skeleton, bundle)]
    rows: list[Row] = []
    for kind, first, last, begin, end in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        places = list(range(begin, end))
        if kind == "equal":
            rows += map(Row, skeleton[first:last], places)
        else:
            rows += _aligned_part(skeleton[first:last], places, bundle)
    for number, row in enumerate(rows):                            # what is missing here may stand elsewhere
        stray = [one for one in rows if row.place is None and one.pinned in (ABSENT, MORE)
                 and _name(bundle[one.place or 0]) == _name(row.pinned)]
        if stray:
            rows[number] = Row(row.pinned, stray[0].place, is_moved=True)
            rows[rows.index(stray[0])] = Row(ABSENT, None)
    return [row for row in rows if row != Row(ABSENT, None)]


def _aligned_part(pinned: list[Any], places: list[int], bundle: list[Any]) -> list[Row]:
    """Rows of a part in which no name is the same: items with a slip in them, own ones, missing and needless ones."""
    if MORE not in pinned and len(pinned) == len(places):
        return list(map(Row, pinned, places))
    middle = pinned.index(MORE) if MORE in pinned else len(pinned)
    front, back = _fronts(pinned[:middle], places, bundle), []
    places = [place for place in places if place not in {row.place for row in front}]
    if MORE in pinned:
        back = _fronts(pinned[:middle:-1], places[::-1], bundle)[::-1]
    taken = {row.place for row in back}
    owner = MORE if MORE in pinned else ABSENT
    return [*front, *(Row(owner, place) for place in places if place not in taken), *back]


def _fronts(pinned: list[Any], places: list[int], bundle: list[Any]) -> list[Row]:
    """Each pinned item with the next place if that holds nearly the same, else with none."""
    rows, waiting = [], list(places)
    for item in pinned:
        rows.append(Row(item, waiting.pop(0) if waiting and _are_alike(item, bundle[waiting[0]]) else None))
    return rows


def _are_alike(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        arguments = [{key: value for key, value in one.items() if key != "_target_"} for one in (first, second)]
        if arguments[0] and arguments[0] == arguments[1]:
            return True
    return SequenceMatcher(None, _dumps(first), _dumps(second), autojunk=False).ratio() >= ALIKE


def _is_own(skeleton: Any) -> bool:
    return skeleton == OWN or (isinstance(skeleton, dict) and skeleton.keys() == {OWN})


def _filled(skeleton: Any) -> Any:
    """What `--write` puts where nothing is: the skeleton with its usual own values; ABSENT if it does not know them."""
    if _is_own(skeleton):
        return skeleton[OWN] if isinstance(skeleton, dict) else ABSENT
    if isinstance(skeleton, dict):
        parts = {key: _filled(value) for key, value in skeleton.items() if key != MORE}
        return ABSENT if ABSENT in parts.values() else parts
    if isinstance(skeleton, list):
        items = [_filled(item) for item in skeleton if item != MORE]
        return ABSENT if ABSENT in items else items
    return skeleton


def _lies_in_own(parts: Sequence[str], skeleton: Any) -> bool:
    """Whether a path leads into what a config has of its own: a marked value, or a key unknown to the skeleton."""
    for part in parts:
        if _is_own(skeleton):
            return True
        if isinstance(skeleton, dict) and part not in skeleton:
            return True                                            # lint_configs.py tells whether train.json has it
        if not isinstance(skeleton, dict):
            return False
        skeleton = skeleton[part]
    return _is_own(skeleton)


def _way_out(skeleton: list[Any]) -> str:
    if MORE not in skeleton:
        return "all items are pinned: take it out"
    place = skeleton.index(MORE)
    return f"own ones go {f'behind {_name(skeleton[place - 1])}' if place else 'first'}: move it or take it out"


def _name(item: Any) -> str:
    """What an item of a list is called: its class, or the item itself."""
    return str(item["_target_"]) if isinstance(item, dict) and "_target_" in item else _short(item)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = "nothing" if value is ABSENT else _dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def references(configs: Path) -> frozenset[str]:
    """Paths a#b#c that the configs of a bundle refer to, the metadata aside."""
    files = [file for file in configs.glob("*.json") if file.name != "metadata.json"]
    texts = [text for file in files for text in _strings(read_json(file))]
    return frozenset(name.replace("::", "#") for text in texts for name in REFERENCE.findall(text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def sync_json(skeleton: Path, target: Path, write: bool) -> list[str]:
    """Compare a bundle's config with its skeleton, and repair it if asked; returns a line per difference left."""
    pinned, config = read_json(skeleton), read_json(target) if target.is_file() else {}
    is_override = any("#" in key for key in pinned)
    train = skeleton.with_name("train.json")
    comparison = Comparison(references(target.parent), read_json(train) if is_override and train.is_file() else None)
    content = comparison.merge(pinned, config)
    is_new = dumps(content) != dumps(config)                       # to == false and 0 are the same
    if write and is_new and (target.is_file() or all(d.repairable for d in comparison.found)):
        target.write_text(dumps(content), encoding="utf-8")
    return [f"{target}: {d.path}: {d.message}" for d in comparison.found if not (write and d.repairable)]


def sync_bytes(source: Path, target: Path, write: bool) -> list[str]:
    """Compare a bundle's copy of a file with it, and copy it if asked."""
    if target.is_file() and target.read_bytes() == source.read_bytes():
        return []
    if write:
        target.write_bytes(source.read_bytes())
    return [] if write else [f"{target}: must equal {source}"]


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
    mode.add_argument("--write", action="store_true", help="repair what can be; exit 1 if a difference is left")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: this one)")
    options = parser.parse_args(arguments)
    skeletons = sorted(path for path in options.root.glob("ci/skeleton/*") if path.is_file())
    folders = sorted(options.root.glob("bundles/*/configs"))
    lines: list[str] = []
    try:
        for folder in folders:
            for source in skeletons:
                sync = sync_json if source.suffix == ".json" else sync_bytes
                lines += sync(source, folder / source.name, options.write)
        package = options.root / "common" / PACKAGE
        copies = [pair for d in sorted(options.root.glob(SCRIPTS)) for pair in shared_scripts(d, package)]
        lines += [line for source, copy in copies for line in sync_bytes(source, copy, options.write)]
    except ValueError as error:
        lines = [str(error)]
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{len(folders)} bundles, {len(skeletons)} skeletons, {len(lines)} differences", end="")
    print("; python ci/sync_bundles.py --write repairs plumbing" if lines and options.check else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
