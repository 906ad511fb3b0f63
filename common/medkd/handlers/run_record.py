# SPDX-License-Identifier: Apache-2.0
"""What a run was made with, kept in each checkpoint: settings, built objects and data; and how two runs differ."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from medkd.settings import flatten

__all__ = ["built_settings", "describe_data", "differences"]

Record = Mapping[str, Any]

_PART = 1 << 16         # bytes at the beginning and the end of a file that tell it from another of its size
_SHOWN = 12                # differences of one kind in a message
_LONGEST = 80              # characters of a value in a message
# what a schedule counts, or what follows from its counting, beside what it was built with
_COUNTED = ("last_epoch", "_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial", "params")


def built_settings(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Kind and hyper-parameters of optimizers and schedules, as plain values, before the first step.

    A config tells the same and more; this is what a program without a config has.

    Args:
        objects: name -> module, optimizer or schedule; modules have none.
    """
    found: dict[str, Any] = {}
    for name, value in objects.items():
        if isinstance(value, Optimizer):
            found |= {f"{name}#kind": type(value).__name__, f"{name}#groups": value.state_dict()["param_groups"]}
        elif hasattr(value, "step") and hasattr(value, "state_dict"):
            found |= {f"{name}#kind": type(value).__name__, name: value.state_dict()}
    leaves = flatten(found)
    return {key: value for key, value in leaves.items()
            if not set(key.split("#")) & set(_COUNTED) and not str(value).startswith("an object of ")}


def describe_data(**loaders: Any) -> dict[str, Any]:
    """The cases of data loaders, each with the names and prints of its files; other plain values as they are.

    A print is the size in bytes and a checksum of the beginning and the end, where compressed files have one of all.

    Args:
        loaders: name -> loader whose data set holds a list of dicts, as MONAI's do; others have no cases to compare.

    Returns:
        `root`, the folder in which all files lie, and `lists`: name -> case -> (key, file or value, print or None).
    """
    lists = {name: [list(_entries(case)) for case in _cases(loader)] for name, loader in loaders.items()}
    files = [text for cases in lists.values() for case in cases for _, text, mark in case if mark is not None]
    root = _common_folder(files)

    def shorten(key: str, text: str, mark: list[int] | None) -> list[Any]:
        return [key, text if mark is None else os.path.relpath(text, root), mark]

    return {
        "root": root,
        "lists": {name: [[shorten(*entry) for entry in case] for case in cases] for name, cases in lists.items()},
    }


def _cases(loader: Any) -> Sequence[Any]:
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not isinstance(getattr(dataset, "data", None), Sequence):
        dataset = getattr(dataset, "dataset", None)                # a subset, or a wrapper
    return dataset.data if dataset is not None else ()


def _entries(case: Any) -> Iterator[tuple[str, str, list[int] | None]]:
    for key, value in sorted(case.items(), key=lambda item: str(item[0])) if isinstance(case, Mapping) else ():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, (str, os.PathLike)):
                mark = _print(Path(one))
                yield str(key), os.fspath(one) if mark is None else os.path.abspath(one), mark
            elif isinstance(one, (bool, int, float)):
                yield str(key), str(one), None


def _print(path: Path) -> list[int] | None:
    """Bytes and checksum of a file; of a folder, such as a zarr or a DICOM series, the number of its entries."""
    if not path.suffix and not path.is_absolute():                 # a word, even if something here has that name
        return None
    try:
        if path.is_dir():
            return [len(os.listdir(path)), 0]
        size = path.stat().st_size
        with path.open("rb") as file:
            checksum = zlib.crc32(file.read(_PART))
            file.seek(max(0, size - _PART))
            return [size, zlib.crc32(file.read(), checksum)]
    except (OSError, ValueError):                                  # no file: some other text
        return None


def _common_folder(files: Sequence[str]) -> str:
    try:
        return os.path.commonpath([os.path.dirname(file) for file in files]) if files else os.curdir
    except ValueError:                                             # on several drives of Windows
        return os.path.abspath(os.curdir)


def differences(old: Record, new: Record) -> list[str]:
    """Say what two runs were made with otherwise, a line each; nothing where they are alike.

    Args:
        old: `settings`, `built` and `data` of the run that a checkpoint is of.
        new: the same of this run. Settings that one of them does not know are not compared.
    """
    known = old["settings"] and new["settings"]
    lines = _changed(old["settings"], new["settings"]) if known else []
    if not lines:                                                  # follow from settings; another torch may have more
        common = old["built"].keys() & new["built"].keys()
        lines = _changed(*({key: one["built"][key] for key in old["built"] if key in common} for one in (old, new)))
    return lines + _changed_data(old["data"], new["data"])


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if key not in old or key not in new or old[key] != new[key]]
    return _some([f"{key}: {_show(old, key)}, now {_show(new, key)}" for key in keys], "settings")


def _show(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not set"
    text = repr(values[key])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."


def _some(lines: list[str], what: str) -> list[str]:
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"... and {more} more {what}"] if more > 0 else [])


def _changed_data(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    roots = _roots(old, new)
    for name in {**old["lists"], **new["lists"]}:
        before, after = (_placed(one["lists"].get(name, []), root) for one, root in zip((old, new), roots, strict=True))
        if before == after:
            continue
        found = _some(list(_changed_files(_prints(before), _prints(after))), "files")
        if len(before) != len(after) and not found:
            found = [f"{len(before)} cases, now {len(after)}"]
        lines += [f"{name} data: {line}" for line in found or ["cases in another order, or with other values"]]
    return lines


def _roots(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
    """What to put before names: nothing, if all data have moved; both folders, if they are where some data were."""
    roots = old["root"], new["root"]
    if roots[0] == roots[1]:
        return "", ""
    files = [
        {text for cases in one["lists"].values() for text in _prints(_placed(cases, one["root"]))} for one in (old, new)
    ]
    return roots if files[0] & files[1] else ("", "")


def _placed(cases: Sequence[Any], root: str) -> list[list[tuple[str, str, list[int] | None]]]:
    return [[(key, text if mark is None else os.path.join(root, text), mark) for key, text, mark in case]
            for case in cases]


def _prints(cases: Sequence[Any]) -> dict[str, list[int]]:
    return {text: mark for case in cases for _, text, mark in case if mark is not None}


def _changed_files(old: Mapping[str, list[int]], new: Mapping[str, list[int]]) -> Iterator[str]:
    for file in {**old, **new}:
        if file not in new:
            yield f"{file} is missing"
        elif file not in old:
            yield f"{file} is new"
        elif old[file][0] != new[file][0]:
            yield f"{file} has {new[file][0]:,} bytes, had {old[file][0]:,}"
        elif old[file] != new[file]:
            yield f"{file} has other content"
