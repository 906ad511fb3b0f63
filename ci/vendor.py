# SPDX-License-Identifier: Apache-2.0
"""Which files of the shared package a bundle needs: its configs and scripts name some, and their imports the rest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from format_json import read_json
from lint_configs import walk

PACKAGE = "medkd"


def needed_files(bundle: Path, package: Path) -> list[Path]:
    """Follow what a bundle names, through functions and `if TYPE_CHECKING` too.

    Args:
        bundle: folder of the bundle.
        package: folder of the shared package, common/medkd.

    Returns:
        The files of `package` that can be imported on the way, with the `__init__.py` of every folder, sorted.

    Raises:
        ValueError: something is named that the package has not.
    """
    found: set[Path] = set()
    waiting = list(_named_by(bundle))
    while waiting:
        source, name = waiting.pop()
        for file in _files_of(name, package, source):
            if file not in found:
                found.add(file)
                waiting += [(file, imported) for imported in imports(file.read_text(encoding="utf-8"), file)]
    return sorted(found)


def _named_by(bundle: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(bundle.glob("configs/*.json")):
        if not file.name.startswith("metadata"):
            yield from ((file, name) for name in config_names(read_json(file), file))
    for file in sorted(bundle.glob("scripts/**/*.py")):
        if "_vendor" not in file.parts:
            yield from ((file, name) for name in imports(file.read_text(encoding="utf-8"), file))


def config_names(config: Any, source: Path) -> Iterator[str]:
    """Dotted names below `medkd` in a config: targets, expressions, imports."""
    for _, value in walk(config):
        if isinstance(value, str) and re.match(r"\$\s*(import|from)\s", value):
            yield from imports(value[1:].strip(), source)
        elif isinstance(value, str):
            yield from re.findall(rf"(?<![\w./]){PACKAGE}(?:\.[A-Za-z_]\w*)+", value)


def imports(code: str, source: Path) -> Iterator[str]:
    """Dotted names below `medkd` that Python code imports, anywhere in it; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{source}: must import by full names, got a relative import; write the whole name.")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == PACKAGE)


def _files_of(name: str, package: Path, source: Path) -> Iterator[Path]:
    """Files that Python runs to import the module in which `a.b.c` is found."""
    folder, file = package, package / "__init__.py"
    yield file
    for part in name.split(".")[1:]:
        if (folder / part / "__init__.py").is_file():
            folder = folder / part
            file = folder / "__init__.py"
        elif file.name == "__init__.py" and (folder / f"{part}.py").is_file():
            file = folder / f"{part}.py"
        elif part == "*" or re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")):
            return                                                 # a name in that module
        else:
            raise ValueError(f"{source}: names {name}, but {file} holds no {part!r}; correct the name.")
        yield file
