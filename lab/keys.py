# SPDX-License-Identifier: Apache-2.0
"""Keys of runs: hashes of what decides on a result and of nothing else, so that equal runs are one.

A key holds the part of the merged config that the run id reaches through references, all modules of `medkd` and
`scripts` that this part names, with those they import (without comments and docstrings), the cases with the sizes of
their files, and the weights that the run starts from. Names and places of bundles, versions of packages, the device and
the number type that its processor multiplies are not in it: remove runs/ when one of the latter changes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from lab.bundle import BundleRun
from medkd.losses.base import distils

__all__ = [
    "code_hash", "content_hash", "data_hash", "file_hash", "lookup", "needed_part", "run_distils", "run_key",
]

# places differ between machines, and say nothing about the result; weights come in by their hash
_PLACES = (
    "bundle_root", "dataset_dir", "datalist", "ckpt_dir", "ckpt_path", "output_dir", "teacher_path", "teacher_sha256",
    "resume", "soft_label_dir",
)
_DEVICE = ("cpu_dtype",)                 # bfloat16 is taken where the processor has it, see `lab.measure.cpu_dtype`
# what acts only when there is a teacher to learn from
_ONLY_DISTILLATION = (
    "distill_loss", "distill_weights", "distill_ramp", "teacher", "teacher_check", "teacher_input",
    "validate#teacher_evaluator", "unlabeled_ratio", "cache_teacher", "train#unlabeled", "distill_handlers",
    "distill_state",
)
# modules that raise or log, and change no result, each with the reason
_WITHOUT_EFFECT = {
    "medkd": "the version",
    "medkd.checks": "raises, or lets pass",
    "medkd.data.check": "raises, or lets pass and logs",
    "medkd.handlers.curves": "tells how the losses went",
    "medkd.handlers.progress": "tells how far a run is",
    "scripts.options": "refuses wrong options, and changes none",
    "medkd.settings": "tells what the config says",
}
_REFERENCE = re.compile(r"[@%](\w+(?:(?:#|::)\w+)*)")
_MODULE = re.compile(r"(?<![\w.#/])(?:medkd|scripts)(?:\.\w+)+")


def run_distils(run: BundleRun) -> bool:
    """Tell whether a run learns from a teacher."""
    return "distill_weights" in run.config and distils(run.config["distill_weights"])


def run_key(run: BundleRun, *more: Any) -> str:
    """Key of a run and of what else decides, as JSON can hold it: hash of the data, hashes of weights."""
    if run.run_id not in run.config:
        raise ValueError(f"`run_id` must be a key of {', '.join(run.files)}, got {run.run_id!r}.")
    part = needed_part(run.config, ("initialize", run.run_id), () if run_distils(run) else _ONLY_DISTILLATION)
    return content_hash([part, code_hash(part, run), more])[:12]


def needed_part(config: Mapping[str, Any], starts: Iterable[str], without: Sequence[str] = ()) -> dict[str, Any]:
    """What `starts` refer to, directly or through others, by its id; without places, device, and some ids.

    Example:
        >>> needed_part({"run": ["$@a#x.go()"], "a": {"x": "%b#0", "y": 3}, "b": [1], "c": 2}, ["run"])
        {'run': ['$@a#x.go()'], 'a#x': '%b#0', 'b#0': 1}
    """
    found: dict[str, Any] = {}
    waiting = list(starts)
    while waiting:
        name = waiting.pop().replace("::", "#")
        left_out = any(f"{name}#".startswith(f"{one}#") for one in (*_PLACES, *_DEVICE, *without))
        if name not in found and not left_out and (nodes := lookup(config, name)):
            (found[name],) = nodes
            waiting += _REFERENCE.findall(json.dumps(found[name]))
    return found


def lookup(config: Any, name: str) -> list[Any]:
    """The node of an id `a#b#0` alone, or nothing where there is none."""
    for part in name.split("#"):
        if isinstance(config, Mapping) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        else:
            return []
    return [config]


def code_hash(part: Mapping[str, Any], run: BundleRun) -> str:
    """Hash of the modules of `medkd` and `scripts` that a part of a run's config names, with what they import."""
    roots = {"medkd": run.package.parent, "scripts": run.folder}
    found: dict[str, str] = {}
    waiting = _MODULE.findall(json.dumps(part))
    while waiting:
        for module, file in _modules(waiting.pop(), roots):
            if module not in found and module not in _WITHOUT_EFFECT:
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                found[module], imports = _read(file.read_text(), package)
                waiting += [name for name in imports if name.split(".")[0] in roots]
    return content_hash(found)


def _modules(name: str, roots: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """The modules that run when `a.b.name` is imported, with their files."""
    parts = name.split(".")
    place, last = roots[parts[0]], None
    for depth, part in enumerate(parts, start=1):
        place = place / part
        files = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
        if files:
            last = files[0]
            yield ".".join(parts[:depth]), last
        elif not place.is_dir():
            if last is None or not re.search(rf"\b{part}\b", last.read_text()):
                raise ValueError(f"a config or module names {name!r}, got no module {'.'.join(parts[:depth])!r}.")
            return


@cache
def _read(text: str, package: str) -> tuple[str, tuple[str, ...]]:
    """Hash of a module's syntax tree without docstrings, and the dotted names that it imports into `package`."""
    tree = ast.parse(text)
    names: list[str] = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        match body:
            case [ast.Expr(value=ast.Constant(value=str())), *_]:
                del body[0]
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{start}.{alias.name}" for alias in node.names]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(names)


def data_hash(datalist: Path, lists: Sequence[str]) -> str:
    """Hash of the cases of some lists: what stands in the file, and sizes of the files."""
    content = json.loads(datalist.read_text())
    root = datalist.parent / content.get("data_root", "")

    def sizes(value: Any) -> list[int]:
        file = root / value if isinstance(value, str) else root
        return [file.stat().st_size] if file.is_file() else []

    return content_hash([
        [name, sorted((key, value, *sizes(value)) for key, value in case.items())]
        for name in lists for case in content.get(name, [])
    ])


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_hash(content: Any) -> str:
    """Hash of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
