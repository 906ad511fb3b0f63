# SPDX-License-Identifier: Apache-2.0
"""One run of a bundle: folder, configs and options, the config that MONAI makes of them, and the command."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle.config_parser import ConfigParser
from monai.bundle.utils import merge_kv

import medkd

__all__ = ["ROOT", "BundleRun", "copy_bundle", "freeze_bundle", "show_words"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(medkd.__file__).resolve().parent


@dataclass(frozen=True)
class BundleRun:
    """A run of a bundle."""

    folder: Path             # of the bundle, or of a copy; the command runs there. `package` in it may hold its medkd
    run_id: str              # `training` or `evaluating`
    configs: Sequence[str]   # names in configs/, without `.json`, in their order
    options: Mapping[str, Any] = field(default_factory=dict)   # come last; paths are relative to `folder`

    @property
    def files(self) -> list[str]:
        """Config files in their order."""
        return [f"configs/{name}.json" for name in self.configs]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The merged config: later files and options win, as at the start of the run."""
        parser = ConfigParser(ConfigParser.load_config_files([str(self.folder / file) for file in self.files]))
        for key, value in self.options.items():
            merge_kv(parser, key, value)
        return dict(parser.get())

    @property
    def package(self) -> Path:
        """Folder of the `medkd` that runs."""
        own = self.folder / "package" / "medkd"
        return own if own.is_dir() else PACKAGE

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which the command finds the run's own medkd, and `lab`."""
        places = [str(self.package.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, places))}

    def words(self) -> list[str]:
        """The command, as a user types it in `folder`."""
        listed = self.files[0] if len(self.files) == 1 else "[" + ",".join(f"'{file}'" for file in self.files) + "]"
        options = {"config_file": listed, "bundle_root": "."} | {key: _option(one) for key, one in self.options.items()}
        start = [sys.executable, "-m", "monai.bundle", "run", self.run_id]
        return start + [word for key, value in options.items() for word in (f"--{key}", value)]


def _option(value: Any) -> str:
    """A value as MONAI's command line reads it back; it drops a bare None, an expression it keeps."""
    if value is None:
        return "$None"
    if isinstance(value, str):
        return value if DefaultParseValue(value) == value else repr(value)
    text = repr(value)
    return text if "'" in text else text.replace(" ", "")


def show_words(words: Sequence[str], folder: Path | None = None, root: Path = ROOT) -> str:
    """A command as a user types it in its folder, or, with `folder`, in `root`.

    Example:
        >>> show_words([sys.executable, "-m", "a", "--b", "['c','d']"], Path("/r/e"), Path("/r"))
        'cd e && python -m a --b "[\'c\',\'d\']"'
    """
    shown = " ".join("python" if word == sys.executable else _quoted(word) for word in words)
    if folder is None or folder == root:
        return shown
    return f"cd {_quoted(str(folder.relative_to(root) if folder.is_relative_to(root) else folder))} && {shown}"


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\') else shlex.quote(word)


def copy_bundle(bundle: Path, target: Path) -> None:
    """Bring configs and scripts up to date in a copy of a bundle; what runs wrote there stays."""
    for name in ("configs", "scripts"):
        shutil.rmtree(target / name, ignore_errors=True)
        if (bundle / name).is_dir():
            shutil.copytree(bundle / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def freeze_bundle(bundle: Path, folder: Path, package: Path = PACKAGE) -> Path:
    """Copy configs and scripts of a bundle, and medkd, to a folder in `folder` that is named by their content."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder, prefix="."))
    copy_bundle(bundle, draft)
    shutil.copytree(package, draft / "package" / "medkd", ignore=shutil.ignore_patterns("__pycache__"))
    digest = hashlib.sha256()
    for file in sorted(path for path in draft.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(draft)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    target = folder / digest.hexdigest()[:12]
    try:
        draft.rename(target)
    except OSError:                    # it is there already
        shutil.rmtree(draft)
        if not target.is_dir():
            raise
    return target.resolve()
