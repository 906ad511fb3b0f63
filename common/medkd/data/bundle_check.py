# SPDX-License-Identifier: Apache-2.0
"""The check of data as a bundle's training does it: built from the bundle's configs, for another list."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from medkd.data.check import check_data
from medkd.data.report import DataReport

__all__ = ["check_for_bundle", "is_bundle", "scripts_of"]

_CONFIG = "configs/train.json"


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is a bundle that trains."""
    return Path(folder, _CONFIG).is_file()


def check_for_bundle(
    bundle: str | os.PathLike[str], datalist: str | os.PathLike[str], lists: Mapping[str, Sequence[Any]],
    config_files: Sequence[str] = (), settings: Mapping[str, Any] | None = None, num_classes: int | None = None,
) -> DataReport:
    """Run the step `data_check` of a bundle's train.json on a datalist.

    Args:
        bundle: folder of the bundle.
        datalist: path of the list.
        lists: its cases by list; `test` and `unlabeled` are checked beside those that training reads.
        config_files: files that change train.json, as in a run; paths, or names in the bundle's configs.
        settings: key -> value, as options of a run.
        num_classes: number of label values with the background; None leaves it to the configs.

    Raises:
        DataError: see `check_data`.
        ValueError: no such bundle, config or key.
    """
    root = Path(bundle).absolute()
    if not is_bundle(root):
        raise ValueError(f"--bundle must be the folder of a bundle, got {os.fspath(bundle)!r}, which has no {_CONFIG}.")
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(root / _CONFIG), *(str(_config(root, name)) for name in config_files)])
    if "data_check" not in parser:
        raise ValueError(f"{root / _CONFIG} must have a step `data_check`, as ours do, got none; leave --bundle out.")
    path = Path(datalist).absolute()
    places = {"bundle_root": str(root), "dataset_dir": str(path.parent), "datalist": str(path)}
    more = {f"data_check#{name}": _listed(name) for name in ("test", "unlabeled") if lists.get(name)}
    for key, value in {**places, **_checked(parser, settings or {})}.items():
        parser[key] = value
    for key, value in more.items():
        parser[key] = value
    if num_classes is not None:
        linked = parser["data_check"].get("num_classes") == "@out_channels"
        parser["out_channels" if linked else "data_check#num_classes"] = num_classes
    with scripts_of(root):
        return _run(parser)


def _config(root: Path, name: str) -> Path:
    found = [path for path in (Path(name), root / "configs" / name, root / f"configs/{name}.json") if path.is_file()]
    if not found:
        raise ValueError(f"--config_file must name a file, or a config of {root}, got {name!r}.")
    return found[0]


def _listed(name: str) -> str:
    return f"$@load_datalist(@datalist, '{name}')"


def _checked(parser: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings that are known: of the configs, or of the check, which they may leave as it is."""
    options = {f"data_check#{name}" for name in signature(check_data).parameters}
    unknown = [key for key in settings if key not in parser and key not in options]
    if unknown:
        raise ValueError(f"--set must name a key of the configs, got {unknown[0]!r}, which they do not have.")
    return settings


def _run(parser: Any) -> DataReport:
    """Evaluate the step; MONAI wraps what it raises."""
    try:
        report: DataReport = parser.get_parsed_content("data_check")
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, (ValueError, OSError)):
            cause = cause.__cause__
        raise cause from None
    return report


@contextmanager
def scripts_of(root: Path) -> Iterator[None]:
    """Let `scripts` be those of the bundle; afterwards it is what it was."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "scripts"}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]
        sys.modules.update(before)
