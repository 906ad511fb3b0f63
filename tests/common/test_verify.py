# SPDX-License-Identifier: Apache-2.0
"""A packed bundle, damaged in every way that we could think of, is refused with what is wrong with it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import pack_bundle
from medkd.cli import main
from medkd.verify import MANIFEST, verify

FILES = {"LICENSE": b"Apache-2.0\n", "configs/train.json": b"{}\n" * 400, "models/model.pt": bytes(range(256)) * 9}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "toy_v1.zip"
    pack_bundle.write_zip(path, "toy", FILES | {MANIFEST: pack_bundle.manifest(FILES)})
    return path


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "toy"


def repacked(packed: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the zip again with other contents; None leaves a file out."""
    files = {f"toy/{name}": content for name, content in FILES.items()}
    files |= {f"toy/{MANIFEST}": pack_bundle.manifest(FILES)} | changes
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)
    return packed


def test_a_whole_zip_and_its_folder_pass(packed: Path, unpacked: Path) -> None:
    assert verify(packed) == verify(str(unpacked)) == len(FILES)
    assert verify(repacked(packed, {"toy/models/": b""}, zipfile.ZIP_DEFLATED)) == len(FILES)


CHANGES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "changed": ({"toy/LICENSE": b"Apache-2.1\n"}, r"got 1 otherwise; .*\n  LICENSE: changed, SHA-256 \w{12}\.\.\., in"),
    "missing": ({"toy/models/model.pt": None}, r"got 1 otherwise; .*\n  models/model.pt: missing$"),
    "extra": ({"toy/scripts/evil.py": b""}, r"got 1 otherwise; .*\n  scripts/evil.py: not in the manifest$"),
    "no manifest": ({f"toy/{MANIFEST}": None}, f"must hold {MANIFEST}, which `make pack` writes, got none; verify"),
    "manifest of nothing": ({f"toy/{MANIFEST}": b"hello\n"}, "must have lines of a SHA-256, .* got 'hello' in line 1"),
    "path twice in manifest": ({f"toy/{MANIFEST}": (b"0" * 64 + b"  x\n") * 2}, "each path once, .* in line 2"),
    "path with a dot in manifest": ({f"toy/{MANIFEST}": b"0" * 64 + b"  ./x\n"}, "a path inside the bundle, .* line 1"),
    "path without a name": ({f"toy/{MANIFEST}": b"0" * 64 + b"  a//x\n"}, "a path inside the bundle, .* line 1"),
    "no folder": ({"x": b""}, "inside one folder, stored or deflated, got 'x' otherwise"),
    "outside path in manifest": ({f"toy/{MANIFEST}": b"0" * 64 + b"  ../x\n"}, "a path inside the bundle, .* line 1"),
    "parent folder": ({"toy/../../x": b""}, r"got 'toy/\.\./\.\./x', which leads elsewhere; do not unpack it"),
    "absolute": ({"/etc/x": b""}, "got '/etc/x', which leads elsewhere"),
    "drive": ({"C:/x": b""}, "got 'C:/x', which leads elsewhere"),
    "backslash": ({"toy\\..\\x": b""}, r"got 'toy\\\\\.\.\\\\x', which leads elsewhere"),
    "second folder": ({"other/x": b""}, "must hold one folder, the bundle, got other, toy"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_a_zip_that_was_tampered_with_is_refused(
    packed: Path, changes: dict[str, bytes | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verify(repacked(packed, changes))


def test_a_name_that_a_zero_cuts_short_is_refused(packed: Path) -> None:
    content = repacked(packed, {"toy/LICENSE#.py": b""}).read_bytes()
    packed.write_bytes(content.replace(b"LICENSE#", b"LICENSE\0"))  # zipfile alone does not write such a name
    with pytest.raises(ValueError, match=r"got 'toy/LICENSE\\x00\.py', which leads elsewhere"):
        verify(packed)


def test_every_changed_byte_of_the_files_is_found(packed: Path) -> None:
    whole = packed.read_bytes()
    for position in (whole.index(FILES["LICENSE"]), whole.index(FILES["models/model.pt"]) + 700):
        packed.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"must be readable, got 'toy/.*' damaged \(Bad CRC-32.*take the zip"):
            verify(packed)


def test_a_deflated_file_that_is_damaged_is_named(packed: Path) -> None:
    with zipfile.ZipFile(repacked(packed, {}, zipfile.ZIP_DEFLATED)) as archive:
        entry = archive.getinfo("toy/configs/train.json")
    content = bytearray(packed.read_bytes())
    content[entry.header_offset + 30 + len(entry.filename)] = 0xFF  # no kind of block
    packed.write_bytes(content)
    with pytest.raises(ValueError, match=r"got 'toy/configs/train.json' damaged \(.*invalid block type\); take"):
        verify(packed)


def test_a_cut_zip_and_a_file_of_another_kind_are_refused(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match="packed bundle, zip or folder, got one that is cut off or damaged, .*toy_v1"):
        verify(packed)
    packed.write_text("hello")
    with pytest.raises(ValueError, match="got a file of another kind, .*toy_v1.zip; take the zip from its source"):
        verify(packed)
    with pytest.raises(FileNotFoundError, match="got nowhere.zip, which does not exist"):
        verify("nowhere.zip")


def test_a_link_and_a_repeated_name_in_a_zip_are_refused(packed: Path) -> None:
    with zipfile.ZipFile(packed, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")                            # zipfile tells of the repeated name
        archive.writestr("toy/LICENSE", b"other")
    with pytest.raises(ValueError, match="must hold every file once, got 'toy/LICENSE' 2 times"):
        verify(packed)
    with zipfile.ZipFile(packed, "w") as archive:
        entry = zipfile.ZipInfo("toy/configs")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc")
    with pytest.raises(ValueError, match="must hold plain files, got a link, 'toy/configs'; do not unpack it"):
        verify(packed)


def test_a_name_with_a_separator_of_lines_of_unicode_passes(packed: Path) -> None:
    name = "docs/a\u2028b\x85.md"
    manifest = pack_bundle.manifest(FILES | {name: b"x"})
    assert verify(repacked(packed, {f"toy/{name}": b"x", f"toy/{MANIFEST}": manifest})) == len(FILES) + 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_than_that_of_zips_everywhere_is_refused(packed: Path, compression: int) -> None:
    with pytest.raises(ValueError, match="stored or deflated, got 'toy/.*' otherwise"):
        verify(repacked(packed, {}, compression))


def test_an_empty_zip_has_no_manifest(packed: Path) -> None:
    zipfile.ZipFile(packed, "w").close()
    with pytest.raises(ValueError, match=f"must hold {MANIFEST}"):
        verify(packed)


def test_a_changed_folder_is_refused_with_all_that_is_wrong(unpacked: Path) -> None:
    (unpacked / "LICENSE").unlink()
    (unpacked / "models/model.pt").write_bytes(b"other")
    for number in range(12):
        (unpacked / f"x{number:02}").touch()
    with pytest.raises(ValueError, match="unpack the zip again into an empty folder") as error:
        verify(unpacked)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{unpacked} must be as it was packed, 3 files, got 14 otherwise; ")
    assert lines[1] == "  LICENSE: missing"
    assert lines[2].startswith("  models/model.pt: changed, SHA-256 d9298a10d1b0...")
    assert lines[3] == "  x00: not in the manifest"
    assert lines[-1] == "  ... and 4 more"


def test_ten_differences_are_all_shown(unpacked: Path) -> None:
    for number in range(10):
        (unpacked / f"x{number}").touch()
    with pytest.raises(ValueError, match="got 10 otherwise") as error:
        verify(unpacked)
    assert str(error.value).splitlines()[-1] == "  x9: not in the manifest"


def test_every_byte_of_a_large_file_counts(unpacked: Path) -> None:
    content = bytes(2**21)
    (unpacked / "models/model.pt").write_bytes(content)
    (unpacked / MANIFEST).write_bytes(pack_bundle.manifest(FILES | {"models/model.pt": content}))
    assert verify(unpacked) == len(FILES)
    (unpacked / "models/model.pt").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="models/model.pt: changed"):
        verify(unpacked)


def test_a_device_in_a_folder_is_refused(unpacked: Path) -> None:
    os.mkfifo(unpacked / "pipe")
    with pytest.raises(ValueError, match="pipe must be a plain file, got a link or a device"):
        verify(unpacked)


@pytest.mark.parametrize("name", ["LICENSE", "models"])
def test_a_link_in_a_folder_is_refused(unpacked: Path, tmp_path: Path, name: str) -> None:
    shutil.move(unpacked / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", unpacked / name)
    with pytest.raises(ValueError, match=f"{name} must be a plain file, got a link or a device"):
        verify(unpacked)


def test_the_command_says_ok_or_fails(
    packed: Path, unpacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(packed)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"OK: 3 files of {packed} are as they were packed.\nSHA-256 of the zip, to compare")
    assert main(["verify", str(unpacked)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    (unpacked / "LICENSE").unlink()
    assert main(["verify", str(unpacked)]) == 2
    assert "LICENSE: missing" in capsys.readouterr().err


def test_the_module_needs_the_standard_library_only() -> None:
    code = "import sys, medkd.verify; print({'torch', 'numpy', 'monai', 'fire'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
