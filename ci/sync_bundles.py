#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pin the plumbing that all bundles share: what is not a bundle's own must equal ci/skeleton.

    python ci/sync_bundles.py --check    name every difference by its path
    python ci/sync_bundles.py --write    add what is missing and correct what differs; nothing is ever removed

Each file of ci/skeleton has its namesake in bundles/*/configs, and an override among them, such as evaluate.json, may
have forms of it for presets, evaluate_<preset>.json; other files of a bundle are its own. Files other than JSON are
equal byte for byte. In a JSON file of the skeleton
  * the value "<own>" marks a key that must be there, with a value of the bundle's own, of any depth;
  * {"<own>": value} does the same and gives the value that most bundles have; `--write` puts it in where it is missing;
  * the item "<more>" of a list is the place for items of the bundle's own, any number of them;
  * the key "<more>" of a dict says that further keys are the bundle's own.
All else is equal. A key that the skeleton does not have is the bundle's own if one of its configs refers to it (`@key`,
`%key`) or it is a list of expressions, which `monai.bundle run` starts by its name. In the skeleton of an override
(flat keys a#b#c) it is own if it lies within what train.json has of its own.

A file of bundles/*/scripts with a namesake in common/medkd/inference equals it byte for byte, and what that imports
relatively, or a config names as `scripts.X`, is there too, as bundles never import each other and inference needs
nothing but `scripts`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from command import command_line
from configs import ABSENT, parts, read_configs, read_json, texts
from format_json import dumps, in_order_of, inline
from vendor import PACKAGE, needed_files

OWN = "<own>"
MORE = "<more>"
REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*(?:(?:#|::)\w+)*)")
ALIKE = 0.8        # how much of two items of a list is the same where one is taken for the other, with a slip in it


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
        """Give what the bundle should have at this path a#b#c, as far as it is known; `bundle` may be ABSENT."""
        is_own, usual = _is_own(skeleton), _filled(skeleton)
        if is_own and bundle is not ABSENT:
            return bundle
        if isinstance(skeleton, dict) and isinstance(bundle, dict):
            return self._merge_dicts(skeleton, bundle, path)
        if isinstance(skeleton, list) and isinstance(bundle, list):
            return self._merge_lists(skeleton, bundle, path)
        if type(skeleton) is type(bundle) and skeleton == bundle:
            return bundle
        expected = "have a value of the bundle's own" if is_own else f"be {_short(skeleton)}"
        if is_own and usual is not ABSENT:
            expected += f", such as {_short(usual)}"
        self._note(path, f"must {expected}, got {_short(bundle)}", usual is not ABSENT)
        return bundle if usual is ABSENT else usual

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
        return self.train is not None and _lies_in_own(path.removeprefix("+"), self.train)

    def _no_place(self, key: str, skeleton: dict[str, Any]) -> str:
        near = get_close_matches(key, [known for known in skeleton if known != MORE], n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"{guess}the skeleton has no such key, and nothing refers to it; it stays: rename it or take it out"

    def _merge_lists(self, skeleton: list[Any], bundle: list[Any], path: str) -> list[Any]:
        merged: list[Any] = []
        behind = "first"
        for row in _aligned(skeleton, bundle):
            item, at = (ABSENT, path) if row.place is None else (bundle[row.place], f"{path}#{row.place}")
            if row.pinned is ABSENT:
                self._note(at, f"{_name(item)} has no place here and stays; {_way_out(skeleton)}", False)
            elif row.pinned != MORE:
                name = _name(row.pinned)
                if item is ABSENT:
                    item = _filled(row.pinned)
                    self._note(at, f"must have {name} {behind}, got none", item is not ABSENT)
                else:
                    if row.is_moved:
                        self._note(at, f"{_name(item)} must stand {behind}", True)
                    item = self.merge(row.pinned, item, at)
                behind = f"behind {name}"
            merged += [] if item is ABSENT else [item]
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
    pinned, found = [_name(item) for item in skeleton], _meant(skeleton, bundle)
    rows: list[Row] = []
    for kind, first, last, begin, end in SequenceMatcher(None, pinned, found, autojunk=False).get_opcodes():
        part, places = skeleton[first:last], range(begin, end)
        if kind == "equal" or (MORE not in part and len(part) == len(places)):
            rows += map(Row, part, places)
            continue
        for item in part if MORE in part else [*part, ABSENT]:
            rows += [Row(item, place) for place in (places if item in (MORE, ABSENT) else [None])]
    loose = [row for row in rows if row.pinned in (MORE, ABSENT)]
    for number, row in enumerate(rows):                            # what is missing here may stand elsewhere
        same = [one for one in loose if row.place is None and found[one.place] == _name(row.pinned)]
        if same:
            rows[number] = Row(row.pinned, same[0].place, is_moved=True)
            loose.remove(same[0])
    moved = {row.place for row in rows if row.is_moved}
    return [row for row in rows if row.is_moved or row.place not in moved]


def _meant(skeleton: list[Any], bundle: list[Any]) -> list[str]:
    """Names of a bundle's items; one that is nearly a pinned item, which is missing, has that one's name."""
    pinned, names = ([_name(item) for item in items] for items in (skeleton, bundle))
    for place, item in enumerate(bundle):
        if names[place] not in pinned:
            alike = (name for name, one in zip(pinned, skeleton, strict=True)
                     if pinned.count(name) > names.count(name) and _are_alike(one, item))
            names[place] = next(alike, names[place])
    return names


def _are_alike(first: Any, second: Any) -> bool:
    arguments = [{**parts(one), "_target_": None} for one in (first, second)]
    if arguments[0] == arguments[1] != {"_target_": None}:
        return True
    return SequenceMatcher(None, inline(first), inline(second), autojunk=False).ratio() >= ALIKE


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


def _lies_in_own(path: str, skeleton: Any) -> bool:
    """Whether a path leads into what a config has of its own: a marked value, or a key unknown to the skeleton."""
    for part in path.split("#"):
        if not isinstance(skeleton, dict) or _is_own(skeleton):
            break
        skeleton = skeleton.get(part, OWN)                         # lint_configs.py knows the keys of train.json
    return _is_own(skeleton)


def _way_out(skeleton: list[Any]) -> str:
    if MORE not in skeleton:
        return "all items are pinned: take it out"
    place = skeleton.index(MORE)
    return f"own ones go {f'behind {_name(skeleton[place - 1])}' if place else 'first'}: move it or take it out"


def _name(item: Any) -> str:
    """What an item of a list is called: its class, or the item itself."""
    return str(item["_target_"]) if isinstance(item, dict) and "_target_" in item else _short(item)


def _short(value: Any) -> str:
    text = "nothing" if value is ABSENT else inline(value)
    return text if len(text) <= 120 else text[:117] + "..."


def references(bundle: Path) -> frozenset[str]:
    """Paths a#b#c that the configs of a bundle refer to."""
    found = (name for text in texts([*read_configs(bundle).values()]) for name in REFERENCE.findall(text))
    return frozenset(name.replace("::", "#") for name in found)


def forms(skeleton: Path, folder: Path) -> list[tuple[Path, Path]]:
    """A skeleton with the places of a bundle that it pins: its namesake and, of an override, its forms for presets."""
    is_override = skeleton.suffix == ".json" and any("#" in key for key in read_json(skeleton))
    more = sorted(folder.glob(f"{skeleton.stem}_*.json")) if is_override else []
    return [(skeleton, copy) for copy in (folder / skeleton.name, *more)]


def sync_json(skeleton: Path, target: Path, write: bool) -> list[str]:
    """Compare a bundle's config with its skeleton, and repair it if asked; returns a line per difference left."""
    pinned, config = read_json(skeleton), read_json(target) if target.is_file() else {}
    is_override = any("#" in key for key in pinned)
    train = skeleton.with_name("train.json")
    own_of = read_json(train) if is_override and train.is_file() else None
    comparison = Comparison(references(target.parents[1]), own_of)
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
        What has a namesake in `folder` or is named by a config, and what that imports of `inference`, there or not.
    """
    source = package / "inference"
    configs = [file.read_text(encoding="utf-8") for file in folder.parent.glob("configs/*.json")]
    named = {folder / f"{name}.py" for text in configs for name in re.findall(r"\bscripts\.(\w+)", text)}
    names = [(file, f"{PACKAGE}.{source.name}.{file.stem}") for file in sorted({*folder.glob("[!_]*.py"), *named})]
    known = [(file, name) for file, name in names if (source / file.name).is_file()]
    return [(file, folder / file.name) for file in needed_files(known, package) if file.name != "__init__.py"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or repair; returns the exit status."""
    options = command_line(__doc__, repairs=True).parse_args(arguments)
    skeletons = sorted(path for path in options.root.glob("ci/skeleton/*") if path.is_file())
    folders = sorted(options.root.glob("bundles/*/configs"))
    lines: list[str] = []
    try:
        for folder in folders:
            copies = shared_scripts(folder.with_name("scripts"), options.root / "common" / PACKAGE)
            pinned = [pair for skeleton in skeletons for pair in forms(skeleton, folder)]
            for source, copy in [*pinned, *copies]:
                sync = sync_json if source.suffix == ".json" else sync_bytes
                lines += sync(source, copy, options.write)
    except ValueError as error:
        lines = [str(error)]
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{len(folders)} bundles, {len(skeletons)} skeletons, {len(lines)} differences", end="")
    print("; python ci/sync_bundles.py --write repairs plumbing" if lines and options.check else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
