# SPDX-License-Identifier: Apache-2.0
"""How a command line names a network: [NAME=]PATH[+CONFIG][+KEY=VALUE]..."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medkd.cli.parser import literal
from medkd.compare.networks import Network, find_bundle

__all__ = ["read_network", "read_settings"]

_WEIGHTS = (".pt", ".pth", ".safetensors")
_OF_STUDENTS = {"scale"}       # how much less a student sees than its teacher, whose config says that it sees all


def read_network(
    word: str, folder: Path, bundle: str | None = None, common: Mapping[str, Any] | None = None
) -> Network:
    """Read `[NAME=]PATH[+CONFIG][+KEY=VALUE]...`.

    Args:
        word: PATH is the folder of a bundle, a zip of `make pack`, or a file of weights; CONFIG a file in configs/ of
            the bundle that it was trained with, without ending, or weights in the bundle; KEY=VALUE an option.
        folder: where zips are unpacked to.
        bundle: folder of the bundle for weights that lie in none.
        common: settings of all networks; those of the word win. `scale` is that of students: a config of the word
            that sets it, as a teacher's, wins too.

    Raises:
        ValueError: nothing at the path, no bundle around the weights, two files of weights, a zip that is not as it
            was packed.
    """
    parts = word.split("+")
    named = re.match(r"([^=/\\]+)=(.+)", parts[0]) if not Path(parts[0]).exists() else None
    path, rest = _longest_path([named[2] if named else parts[0], *parts[1:]], word)
    own = read_settings([part for part in rest if "=" in part], f"{word!r}")
    inner = [part for part in rest if "=" not in part and part.endswith(_WEIGHTS)]
    given = [*([path.name] if not path.is_dir() and path.suffix != ".zip" else []), *inner]
    if len(given) > 1:
        raise ValueError(f"A network must have one file of weights, got {' and '.join(given)} in {word!r}; leave one.")
    configs = [part.removesuffix(".json") for part in rest if "=" not in part and part not in inner]
    root, weights = _places(path, folder, bundle)
    weights = root / inner[0] if inner else weights
    kept = _OF_STUDENTS & _keys(root, configs)
    settings = {key: value for key, value in (common or {}).items() if key not in kept} | own
    return Network(named[1] if named else _name(path, root, configs), root, tuple(configs), settings, weights)


def _keys(root: Path, configs: Sequence[str]) -> set[str]:
    """What some configs of a bundle set; whether they are there is checked with the network."""
    files = [root / f"configs/{name}.json" for name in configs]
    return {key for file in files if file.is_file() for key in json.loads(file.read_text(encoding="utf-8"))}


def read_settings(pairs: Sequence[str], where: str) -> dict[str, Any]:
    """Read KEY=VALUE; a value is a literal of Python or JSON, else text.

    Example:
        >>> read_settings(["spacing=[4,4,3]", "resume=true"], "--set")
        {'spacing': [4, 4, 3], 'resume': True}
    """
    words = {"true": True, "false": False, "null": None}
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{where} must have settings KEY=VALUE, got {pair!r}; such as spacing=[2,2,2].")
        settings[key] = words[text] if text in words else literal(text)
    return settings


def _longest_path(parts: Sequence[str], word: str) -> tuple[Path, list[str]]:
    """A path may have a plus sign in it."""
    for count in range(len(parts), 0, -1):
        path = Path("+".join(parts[:count]))
        if path.exists():
            return path, list(parts[count:])
    raise ValueError(
        "A network must be [NAME=]PATH[+CONFIG][+KEY=VALUE], PATH a bundle, its zip or a file of weights, got "
        f"{word!r}, and there is no {parts[0]}."
    )


def _places(path: Path, folder: Path, bundle: str | None) -> tuple[Path, Path | None]:
    """Folder of the bundle, and the weights if they were named."""
    if path.is_dir():
        return path.absolute(), None
    if path.suffix == ".zip":
        from medkd.verify import verify

        verify(path)
        target = folder / path.stem
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
        return next(one for one in target.iterdir() if one.is_dir()).absolute(), None
    root = find_bundle(path) or (Path(bundle).absolute() if bundle else None)
    if root is None:
        raise ValueError(
            f"Weights must lie in the folder of their bundle, or come with --bundle FOLDER, got {path} without."
        )
    return root, path.absolute()


def _name(path: Path, root: Path, configs: Sequence[str]) -> str:
    if path.is_dir() or path.suffix == ".zip":
        return "+".join((path.absolute().name if path.is_dir() else path.stem, *configs))
    folder = path.absolute().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder.name if folder.name != "models" else root.name
