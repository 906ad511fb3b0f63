# SPDX-License-Identifier: Apache-2.0
"""Keys of runs: hashes of what decides on a result and of nothing else, so that finished runs stay valid.

A key holds the part of the merged config that the run id reaches through references, the modules of `medkd` and
`scripts` that this part names, with those they import (without comments, docstrings, and layers that do not train), the
cases with the sizes of their files, and the weights that it starts from. Versions of packages and the device are not
in it: remove runs/ when one of them changes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle.config_parser import ConfigParser
from monai.bundle.utils import merge_kv

__all__ = [
    "code_hash", "content_hash", "data_hash", "distils", "effective_config", "file_hash", "needed_part", "run_key",
]

# places differ between machines, and say nothing about the result; weights come in by their hash
PLACES = frozenset({
    "bundle_root", "dataset_dir", "datalist", "ckpt_dir", "output_dir", "teacher_path", "teacher_head_path",
    "teacher_sha256", "resume",
})
ONLY_DISTILLATION = ("distill_loss", "distill_weights", "distill_ramp", "teacher_check", "teacher_input")
LAYERS = frozenset({"ops", "losses", "handlers", "metrics", "taps", "weights"})
REFERENCE = re.compile(r"[@%](\w+)")
MODULE = re.compile(r"\b(?:medkd|scripts)(?:\.\w+)+")


def effective_config(files: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Merge config files and options, later ones win, as MONAI does at the start of a run."""
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    for key, value in options.items():
        merge_kv(parser, key, value)
    return dict(parser.get())


def distils(config: Mapping[str, Any]) -> bool:
    """Tell whether any distillation weight is above 0; null takes the loss's own."""
    weights = config.get("distill_weights")
    return "distill_loss" in config and (not isinstance(weights, Mapping) or any(weights.values()))


def needed_part(config: Mapping[str, Any], starts: Iterable[str]) -> dict[str, Any]:
    """Top-level keys that `starts` refer to, directly or through others, without places.

    Example:
        >>> needed_part({"run": ["$@a.go()"], "a": {"x": "%b#0"}, "b": [1], "c": 2, "bundle_root": "."}, ["run"])
        {'run': ['$@a.go()'], 'a': {'x': '%b#0'}, 'b': [1]}
    """
    left_out = PLACES if distils(config) else PLACES | set(ONLY_DISTILLATION)
    found: dict[str, Any] = {}
    waiting = list(starts)
    while waiting:
        key = waiting.pop()
        if key in config and key not in found and key not in left_out:
            found[key] = config[key]
            waiting += REFERENCE.findall(json.dumps(config[key]))
    return found


def code_hash(part: Mapping[str, Any], source: Path) -> str:
    """Hash of the code that a part of a config names: modules of `medkd` and `scripts`, with what they import.

    Args:
        part: of a config.
        source: folder with `package/medkd` and `scripts`.
    """
    digest = hashlib.sha256()
    for file in sorted(_closure(source, MODULE.findall(json.dumps(part)))):
        digest.update(f"{file.relative_to(source)} {_meaning(file)}".encode())
    return digest.hexdigest()


def _closure(source: Path, names: Iterable[str]) -> set[Path]:
    found: set[Path] = set()
    waiting = list(names)
    while waiting:
        parts = waiting.pop().split(".")
        if parts[0] == "medkd" and parts[1:2] and parts[1] in LAYERS:
            root = source / "package"
        elif parts[0] == "scripts":
            root = source
        else:
            continue
        paths = [root.joinpath(*parts[:depth]) for depth in range(2, len(parts) + 1)]
        for file in [f for path in paths for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]:
            if file not in found:
                found.add(file)
                waiting += _imports(file)
    return found


def _imports(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _meaning(file: Path) -> str:
    """The syntax tree without docstrings; comments are not in it anyway."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.dump(tree)


def data_hash(datalist: Path, lists: Sequence[str]) -> str:
    """Hash of the cases of some lists: what stands in the file, and sizes of the files."""
    content = json.loads(datalist.read_text())
    root = datalist.parent / content.get("data_root", "")
    cases = [
        [name, sorted((key, value, *_size(root, value)) for key, value in case.items())]
        for name in lists for case in content.get(name, [])
    ]
    return content_hash(cases)


def _size(root: Path, value: Any) -> list[int]:
    """Size of the file that a value names, if it names one."""
    file = root / value if isinstance(value, str) else root
    return [file.stat().st_size] if file.is_file() else []


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run_key(part: Mapping[str, Any], source: Path, *more: Any) -> str:
    """Key of a run.

    Args:
        part: what `needed_part` gave.
        source: folder with `package/medkd` and `scripts`.
        more: what else decides: hash of the data, hashes of weights.
    """
    return content_hash([part, code_hash(part, source), more])[:12]


def content_hash(content: Any) -> str:
    """Hash of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
