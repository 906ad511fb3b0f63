#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pack bundles, each into one zip that needs the packages of its metadata.json and nothing else.

    python ci/pack_bundle.py                          every bundle -> dist/<name>_v<version>.zip
    python ci/pack_bundle.py --bundle NAME --teacher  this one, with the weights in models/teacher

The zip holds one folder <name>/: configs, docs, scripts, LICENSE, models/model.pt; in scripts/_vendor what the bundle
needs of medkd (ci/vendor.py); and MANIFEST.sha256 with the hash of every other file, for `medkd verify` or, in the
unpacked folder, `sha256sum -c MANIFEST.sha256`. What runs have written is left out. The same files give the same bytes
on every machine: fixed times, sorted, not compressed (most of it is weights, which do not get smaller).
"""

from __future__ import annotations

import hashlib
import re
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from command import command_line
from configs import read_json
from vendor import PACKAGE, named_by, needed_files

MANIFEST = "MANIFEST.sha256"
FOLDERS = ("configs", "docs", "scripts")
STUDENT, TEACHER = "models/model.pt", "models/teacher/model.pt"
WAYS_OUT = {
    "LICENSE": "copy the repository's",
    "configs/metadata.json": "name a folder of bundles/",
    STUDENT: "train the student, or bring it back with git checkout",
    TEACHER: "train it with configs/teacher.json, as the bundle's README says, or pack without TEACHER=1",
}
SCRIPTS_INIT = b'# SPDX-License-Identifier: Apache-2.0\n"""Code of this bundle."""\n'


def contents(bundle: Path, package: Path, teacher: bool) -> dict[str, bytes]:
    """Read what is packed.

    Args:
        bundle: folder of the bundle.
        package: folder of the shared package, common/medkd.
        teacher: whether the weights in models/teacher are packed too.

    Returns:
        Path in the bundle, with forward slashes -> content; the manifest is among them.

    Raises:
        ValueError: a file that belongs into the zip is missing.
    """
    paths = [*WAYS_OUT] if teacher else [path for path in WAYS_OUT if path != TEACHER]
    for path in paths:
        if not (bundle / path).is_file():
            raise ValueError(f"{bundle}: must have {path} to be packed, got none; {WAYS_OUT[path]}.")
    paths += [path for folder in FOLDERS for path in _files_below(bundle, folder)]
    paths += [path.name for path in bundle.glob("large_files.*")]
    if teacher:                                                    # teachers of presets, heads fitted to a teacher
        paths += sorted(path.relative_to(bundle).as_posix() for path in bundle.glob("models/teacher/*/**/model.pt"))
    files = {path: (bundle / path).read_bytes() for path in paths}
    files.setdefault("scripts/__init__.py", SCRIPTS_INIT)
    for source in needed_files(named_by(bundle), package):
        files[f"scripts/_vendor/{PACKAGE}/{source.relative_to(package).as_posix()}"] = source.read_bytes()
    return files | {MANIFEST: manifest(files)}


def _files_below(bundle: Path, folder: str) -> Iterator[str]:
    for file in (bundle / folder).rglob("*"):
        parts = file.relative_to(bundle).parts
        is_left_out = any(part.startswith(".") or part in ("__pycache__", "_vendor") for part in parts)
        if file.is_file() and not is_left_out and file.suffix != ".pyc":
            yield "/".join(parts)


def manifest(files: Mapping[str, bytes]) -> bytes:
    """Lines `hash  path`, sorted by path, as `sha256sum -c` reads them."""
    for path in files:
        if re.search(r"[\\:\x00-\x1f]", path):
            raise ValueError(f"{path!r}: must have no backslash, colon or control character in its name; rename it.")
    lines = [f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in sorted(files.items())]
    return "".join(lines).encode()


def write_zip(target: Path, folder: str, files: Mapping[str, bytes]) -> None:
    """Write `files` below one folder; the zip appears when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(f"{folder}/{path}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3                                # Unix, wherever it is packed
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[path])
    part.replace(target)


def pack(bundle: Path, root: Path, output: Path, teacher: bool = False) -> Path:
    """Pack one bundle; returns the zip."""
    files = contents(bundle, root / "common" / PACKAGE, teacher)
    version = read_json(bundle / "configs" / "metadata.json")["version"]
    target = output / f"{bundle.name}_v{version}.zip"
    write_zip(target, bundle.name, files)
    size, digest = target.stat().st_size / 1e6, hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"{target}: {len(files) - 1} files, {size:.1f} MB, SHA-256 {digest}")
    return target


def bundles(root: Path, name: str | None = None) -> list[Path]:
    """Folders of all bundles, or of the one named.

    Raises:
        ValueError: there is no bundle of that name.
    """
    known = sorted(path.parents[1] for path in root.glob("bundles/*/configs/metadata.json"))
    chosen = [folder for folder in known if name in (None, folder.name)]
    if not chosen:
        names = ", ".join(folder.name for folder in known)
        raise ValueError(f"BUNDLE must name a folder of {root / 'bundles'}, got {name!r}; there are: {names}.")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack; returns the exit status."""
    parser = command_line(__doc__)
    parser.add_argument("--bundle", help="name of a folder of bundles/ (default: all)")
    parser.add_argument("--teacher", action="store_true", help="pack the weights in models/teacher too")
    parser.add_argument("--output", type=Path, help="folder for the zips (default: dist of the repository)")
    options = parser.parse_args(arguments)
    output = options.output or options.root / "dist"
    try:
        zips = [pack(b, options.root, output, options.teacher) for b in bundles(options.root, options.bundle)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Check a copy with: medkd verify {zips[0].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
