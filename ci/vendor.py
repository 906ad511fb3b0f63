# SPDX-License-Identifier: Apache-2.0
"""Which files of the shared package a bundle needs: its configs and scripts name some, and their imports the rest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from config_code import IMPORT
from configs import read_configs, texts

PACKAGE = "medkd"


def needed_files(names: Iterable[tuple[Path, str]], package: Path) -> list[Path]:
    """Follow names and the imports behind them, through functions and `if TYPE_CHECKING` too.

    Args:
        names: dotted names below `medkd`, each with the file that holds it.
        package: folder of the shared package, common/medkd.

    Returns:
        The files of `package` that can be imported on the way, with the `__init__.py` of every folder, sorted.

    Raises:
        ValueError: something is named that the package has not.
    """
    found: set[Path] = set()
    waiting = list(names)
    while waiting:
        source, name = waiting.pop()
        for file in _files_of(name, package, source):
            if file not in found:
                found.add(file)
                waiting += [(file, imported) for imported in _imported_by(file, package)]
    return sorted(found)


def named_by(bundle: Path) -> Iterator[tuple[Path, str]]:
    """Dotted names below `medkd` in a bundle's configs and scripts, each with its file."""
    for file, config in read_configs(bundle).items():
        yield from ((file, name) for name in config_names(config, file))
    for file in sorted(bundle.glob("scripts/**/*.py")):
        if "_vendor" not in file.parts:
            yield from ((file, name) for name in _imported_by(file, bundle / "scripts"))


def _imported_by(file: Path, package: Path) -> Iterator[str]:
    folders = file.parent.relative_to(package.parent).parts
    return imports(file.read_text(encoding="utf-8"), file, ".".join(folders))


def config_names(config: Any, source: Path) -> Iterator[str]:
    """Dotted names below `medkd` in a config: targets, expressions, imports."""
    for text in texts(config):
        if IMPORT.match(text):
            yield from imports(text[1:].strip(), source)
        else:
            yield from re.findall(rf"(?<![\w./]){PACKAGE}(?:\.[A-Za-z_]\w*)+", text)


def imports(code: str, source: Path, package: str = "") -> Iterator[str]:
    """Dotted names below `medkd` that Python code imports, anywhere in it.

    `from a import b` is `a.b`; in the package `a`, so is `from . import b`.
    """
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                start = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError as error:
                raise ValueError(f"{source}: must import what is in its package, got {ast.unparse(node)!r}.") from error
            names = [f"{start}.{alias.name}" for alias in node.names]
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
