#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hold the configs of the bundles to the rules that MONAI does not check, and that a reader relies on.

    python ci/lint_configs.py            every bundles/*/configs/*.json but metadata

Each message names the file, the key, what is wrong and the way out. The rules:
  * a config is code, so `_target_`, `$` expressions and `$import` lines name only what ci/config_code.py lists;
  * an import names no medkd and no `scripts`: it runs before `initialize` puts them on the path;
  * an expression has at most 100 characters and no lambda, walrus, or private attribute;
  * inference*.json name MONAI, torch and `scripts` only;
  * no %file.json::key, %network, @_meta_ or absolute path;
  * an override (every file but train, inference and metadata; inference_* of inference.json, all others of train.json)
    has flat keys a#b#c that exist in its base, replaces no section as a whole, and puts no null into a list.
This finds slips in our own files; it is no sandbox for those of others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from command import command_line
from config_code import ABSOLUTE, IMPORT, PACKAGES, STUDENT_PACKAGES, Expression, check_import, check_target
from configs import ABSENT, parts, read_configs, texts, walk

LONGEST = 100
RUN_IDS = {"run", "training", "evaluating"}  # an override may bring its own
TEXT_RULES = {  # pattern of any string -> what is wrong with it
    r"%\S*\.(json|ya?ml)\b":
        "must not take text from a file, found from the working directory; copy the text here.",
    r"%network(?!\w)": "must not copy the network, a second one with other weights; write @network.",
    r"[@%]_meta_": "must not refer to the metadata, which MONAI Label does not load; write the value here.",
    r"@device\s*\.": "must not use an attribute of @device, which may be a string; pass it as an argument.",
    r"(^|['\"\s=])(/(home|Users|root|mnt|tmp|media|scratch)/|~\w*/|[A-Za-z]:[\\/])|^/": ABSOLUTE,
}


def check_value(
    path: str, value: Any, aliases: dict[str, str], packages: frozenset[str]
) -> Iterator[str | None]:
    """Problems of one value: target, expression, import line or text; None is none."""
    if path.split("#")[-1] == "_target_":
        yield check_target(value, packages)
    if not isinstance(value, str):
        return
    yield from (message for pattern, message in TEXT_RULES.items() if re.search(pattern, value))
    if IMPORT.match(value):
        yield check_import(value[1:], packages)[1]
    elif re.match(r"imports#\d+$", path):
        yield "must be `$import x` or `$from x import y`; MONAI does not run anything else here."
    elif value.startswith("$"):
        if len(value) > LONGEST:
            yield f"must have at most {LONGEST} characters, got {len(value)}; write a function in scripts."
        yield from Expression(aliases, packages).check(value[1:])


def check_override(config: dict[str, Any], base: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """Problems of an override of the config `name`: (key, message)."""
    for key, value in config.items():
        path, old = re.split("#|::", key.removeprefix("+")), base
        for part in path:
            old = parts(old).get(part, ABSENT)
        if old is ABSENT and key.removeprefix("+") not in RUN_IDS:
            yield key, f"must be a key of {name}, as MONAI takes a slip in silence; add it there first."
        elif key.startswith("+") and not isinstance(old, list):
            yield key, "must name a list to append to; write the key without +."
        elif len(path) == 1 and _is_section(old):
            yield key, f"must not replace the whole section; write its keys flat, as {key}#{next(iter(old))}."
        if _null_in_list(value):
            yield key, "must not put null into a list, where it stays as an item; write the list without it."


def _is_section(value: Any) -> bool:
    holds_component = any("_target_" in path.split("#") for path, _ in walk(value))
    return isinstance(value, dict) and "_target_" not in value and holds_component


def _null_in_list(value: Any) -> bool:
    return (isinstance(value, list) and None in value) or any(map(_null_in_list, parts(value).values()))


def lint_bundle(folder: Path) -> list[str]:
    """Check the configs of one bundle; returns a line per problem."""
    lines: list[str] = []
    configs = read_configs(folder)
    for file, config in configs.items():
        is_inference = file.name.startswith("inference")
        base_file = file.with_name("inference.json" if is_inference else "train.json")
        base = configs.get(base_file, {})
        packages = STUDENT_PACKAGES if is_inference else PACKAGES
        aliases: dict[str, str] = {}
        for text in filter(IMPORT.match, texts([base, config])):
            aliases |= check_import(text[1:], packages)[0]
        found = [(path, problem) for path, value in walk(config)
                 for problem in check_value(path, value, aliases, packages) if problem]
        found += [] if file == base_file else check_override(config, base, base_file.name)
        lines += [f"{file}: {path}: {problem}" for path, problem in found]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all bundles; returns the exit status."""
    options = command_line(__doc__).parse_args(arguments)
    bundles = sorted(path.parent for path in options.root.glob("bundles/*/configs"))
    try:
        lines = [line for bundle in bundles for line in lint_bundle(bundle)]
    except ValueError as error:
        lines = [str(error)]
    print(*lines, f"{len(bundles)} bundles, {len(lines)} problems", sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
