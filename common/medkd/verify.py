# SPDX-License-Identifier: Apache-2.0
"""Check a packed bundle, zip or folder, against the manifest that `make pack` put into it.

The standard library is enough. A manifest tells that a copy is whole and unchanged, not who made it: whoever can change
a file can change the manifest too. For that, compare the zip's own SHA-256 with the one that its author published.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path

__all__ = ["MANIFEST", "verify"]

MANIFEST = "MANIFEST.sha256"
_SHOWN = 10                                                        # differences in a message
_AGAIN = "take the zip from its source again."
_UNPACK = "unpack the zip again into an empty folder; runs add files, so a bundle in use differs."
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def verify(path: str | os.PathLike[str]) -> int:
    """Compare every file with the manifest.

    Args:
        path: zip that `make pack` wrote, or the folder that was unpacked from it.

    Returns:
        Number of files, without the manifest.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a file is changed, missing or not in the manifest; there is no manifest, or not a readable one; the
            zip is none, is cut off, or holds names that lead out of the folder it is unpacked to.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a packed bundle, zip or folder, got {path}, which does not exist.")
    content, hashes = _read_folder(path) if path.is_dir() else _read_zip(path)
    if content is None:
        raise ValueError(f"{path} must hold {MANIFEST}, which `make pack` writes, got none; verify the packed bundle.")
    expected = _parse(content, path)
    differences = list(_compare(expected, hashes))
    if differences:
        hidden = len(differences) - _SHOWN
        lines = differences[:_SHOWN] + ([f"... and {hidden} more"] if hidden > 0 else [])
        raise ValueError(
            f"{path} must be as it was packed, {len(expected)} files, got {len(differences)} otherwise; "
            + (_UNPACK if path.is_dir() else _AGAIN)
            + "".join(f"\n  {line}" for line in lines)
        )
    return len(expected)


def _compare(expected: Mapping[str, str], hashes: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(expected.keys() | hashes.keys()):
        if name not in hashes:
            yield f"{name}: missing"
        elif name not in expected:
            yield f"{name}: not in the manifest"
        elif hashes[name] != expected[name]:
            yield f"{name}: changed, SHA-256 {hashes[name][:12]}..., in the manifest {expected[name][:12]}..."


def _parse(content: bytes, path: Path) -> dict[str, str]:
    """Read lines `hash  path`, as `sha256sum` writes them."""
    expected: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").removesuffix("\n").split("\n"), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not match or match[2] in expected or not _is_inside(match[2]):
            raise ValueError(
                f"{MANIFEST} of {path} must have lines of a SHA-256, two blanks and a path inside the bundle, each "
                f"path once, got {line[:100]!r} in line {number}; {_AGAIN}"
            )
        expected[match[2]] = match[1]
    return expected


def _is_inside(name: str) -> bool:
    """Tell whether a path is relative and stays below its start, on any system."""
    return not re.search(r"[\\:\0]", name) and all(part not in ("", ".", "..") for part in name.split("/"))


def _read_folder(folder: Path) -> tuple[bytes | None, dict[str, str]]:
    """Manifest, if there is one, and the hash of every other file."""
    hashes: dict[str, str] = {}
    for where, folders, files in os.walk(folder):
        for file in (Path(where) / name for name in [*folders, *files]):
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise ValueError(f"{file} must be a plain file, got a link or a device; {_UNPACK}")
            if file.is_file():
                with file.open("rb") as opened:
                    hashes[file.relative_to(folder).as_posix()] = file_digest(opened, "sha256").hexdigest()
    content = (folder / MANIFEST).read_bytes() if hashes.pop(MANIFEST, None) else None
    return content, hashes


def _read_zip(path: Path) -> tuple[bytes | None, dict[str, str]]:
    """The same of a zip, with paths below its one folder."""
    with _open_zip(path) as archive:
        entries = archive.infolist()
        for problem in _misfits(entries):
            raise ValueError(f"{path} must hold {problem} {_AGAIN}")
        folder = entries[0].filename.partition("/")[0] + "/" if entries else ""
        hashes = {}
        for name in (entry.filename for entry in entries if not entry.is_dir()):
            try:
                with archive.open(name) as file:
                    digest = file_digest(file, "sha256")   # type: ignore[arg-type]  # it can be read into a buffer
                    hashes[name.removeprefix(folder)] = digest.hexdigest()
            except _DAMAGE as error:
                text = f"{path} must be readable, got {name!r} damaged ({error}); {_AGAIN}"
                raise ValueError(text) from error
        content = archive.read(folder + MANIFEST) if hashes.pop(MANIFEST, None) else None
        return content, hashes


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        with path.open("rb") as file:
            got = "one that is cut off or damaged" if file.read(4) == b"PK\3\4" else "a file of another kind"
        raise ValueError(f"`path` must be a packed bundle, zip or folder, got {got}, {path}; {_AGAIN}") from error


def _misfits(entries: Sequence[zipfile.ZipInfo]) -> Iterator[str]:
    """Say what would be written elsewhere than into one folder, or cannot be read."""
    for entry in entries:
        if entry.orig_filename != entry.filename or not _is_inside(entry.filename.removesuffix("/")):
            name = repr(entry.orig_filename)
            yield f"files inside one folder, got {name}, which leads elsewhere; do not unpack it, and"
        if stat.S_ISLNK(entry.external_attr >> 16):
            yield f"plain files, got a link, {entry.filename!r}; do not unpack it, and"
        if "/" not in entry.filename or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            yield f"files inside one folder, stored or deflated, got {entry.filename!r} otherwise;"
    for name, count in Counter(entry.filename for entry in entries).items():
        if count > 1:
            yield f"every file once, got {name!r} {count} times;"
    folders = sorted({entry.filename.partition("/")[0] for entry in entries})
    if len(folders) > 1:
        yield f"one folder, the bundle, got {', '.join(folders[:5])};"
