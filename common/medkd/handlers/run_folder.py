# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: one living owner, and what an earlier run left is set aside, never overwritten."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:                                                # not on Windows
    fcntl = None   # type: ignore[assignment]

__all__ = ["FolderInUseError", "RunFolder", "check_writable", "newest_first"]

_PROBE = bytes(1 << 16)    # more than what a file system keeps beside a file's name
logger = logging.getLogger(__name__)


class FolderInUseError(RuntimeError):
    """Another run, which is alive, writes to the folder."""


def check_writable(folder: Path, what: str) -> None:
    """Make a folder, write a file of 64 KiB in it and remove it.

    Args:
        folder: where a run is going to write.
        what: name of the option that gives it, in backticks.

    Raises:
        OSError: that failed; the message names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe_") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"{what} must be a folder that can be written to, got {folder}: {error.strerror or error}; "
            "free some space, correct the permissions, or give another folder."
        ) from error


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, that of the last epoch first."""
    return sorted(folder.glob("epoch_*.pt"), reverse=True)


class RunFolder:
    """Where a run writes its student and its checkpoints.

    It has one living owner at a time, known by a lock on the file `.owner` that ends with the process. What an earlier
    run left goes to `before_1`, `before_2`, ... in it and is never deleted: its checkpoints when a new run starts
    anew, its student when the new run has one of its own to put there.

    Args:
        directory: the folder.

    Attributes:
        student_is_own: the student in its place is of this run, or that of an earlier one is kept, too.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.checkpoints = self.directory / "checkpoints"
        self.student = self.directory / "model.pt"
        self._aside: Path | None = None
        self.student_is_own = False
        self._release: Callable[[], None] | None = None

    @property
    def description(self) -> Path:
        """File that tells how the student was trained."""
        return self.student.with_suffix(".json")

    def open(self) -> None:
        """Make sure that the folder can be written to, and own it.

        Raises:
            OSError: it cannot be written to.
            FolderInUseError: another run owns it.
        """
        check_writable(self.directory, "`ckpt_dir`")
        for file in (self.student, self.description):
            if file.is_dir():
                raise IsADirectoryError(f"`ckpt_dir` must have room for the file {file}, got a folder of that name.")
        self._release = _own(self.directory / ".owner")
        self._aside, self.student_is_own = None, False
        if self.checkpoints.exists():
            check_writable(self.checkpoints, "`ckpt_dir`")

    def close(self) -> None:
        """Let others have the folder."""
        if self._release is not None:
            self._release()
            self._release = None

    def set_checkpoints_aside(self) -> None:
        """Keep the checkpoints of an earlier run out of this one's way: a later `resume` must not mix two runs."""
        if not newest_first(self.checkpoints):
            return
        aside = self._folder_aside()
        os.replace(self.checkpoints, aside / self.checkpoints.name)
        logger.info(
            "Starting anew; the checkpoints of an earlier run are now in %s. To go on with them instead, move the "
            "folder back to %s and give `--resume true`.", aside / self.checkpoints.name, self.directory,
        )

    def go_on(self) -> None:
        """Take the student that lies here for one of this run, which is resumed: it may be replaced."""
        self.student_is_own = True

    def set_student_aside(self) -> None:
        """Keep the student of an earlier run, and its description, which this run is about to replace.

        It stays in its place, too, until then: at every moment there is one.
        """
        if self.student_is_own:
            return
        if not self.student.exists():
            self.student_is_own = True
            return
        aside = self._folder_aside()
        for file in (self.student, self.description):
            if file.exists():
                _copy(file, aside / file.name)
        self.student_is_own = True
        logger.info("The student of an earlier run is kept as %s.", aside / self.student.name)

    def earlier_students(self, metric: str) -> Iterator[tuple[float, Path]]:
        """Validation metrics of the students that were set aside, as far as they tell this one, with their files."""
        for path in self.directory.glob("before_*/model.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                yield float(json.loads(path.read_text())["validation"][metric]), path.with_suffix(".pt")

    def _folder_aside(self) -> Path:
        """One new folder for all that this run sets aside."""
        if self._aside is None:
            numbers = [path.name.rpartition("_")[2] for path in self.directory.glob("before_*")]
            last = max((int(number) for number in numbers if number.isdigit()), default=0)
            self._aside = self.directory / f"before_{last + 1}"
        self._aside.mkdir(exist_ok=True)
        return self._aside


def _copy(file: Path, target: Path) -> None:
    """A second name of a file, which outlives that the first one is given to a new file; else a copy."""
    target.unlink(missing_ok=True)
    with suppress(OSError):
        if not file.is_symlink():
            os.link(file, target)
            return
    draft = target.with_name(f".{target.name}.tmp")
    try:
        shutil.copy2(file, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


# ---- who owns it ---------------------------------------------------------------------------------------------------

_locks: dict[Path, tuple[int, int]] = {}       # of this process: file -> its descriptor, the thread of its run


def _forget_locks() -> None:
    """A loader's worker is a fork of its run and may outlive it for seconds: it must not hold the lock."""
    for descriptor, _ in _locks.values():
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _own(path: Path) -> Callable[[], None]:
    """Take the lock of a folder, and give what releases it."""
    path = path.absolute()
    held = _locks.get(path)
    if held is not None and held[1] == threading.get_ident():      # an earlier run of this thread, which broke off
        _unlock(path)
    if fcntl is not None:
        with suppress(_NoLocksError):
            descriptor = _lock(path)
            _locks[path] = descriptor, threading.get_ident()
            return lambda: _unlock(path) if _locks.get(path, (None,))[0] == descriptor else None
    _write_owner(path)
    return lambda: path.unlink(missing_ok=True)


class _NoLocksError(Exception):
    """The file system has no locks."""


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(path) from None
        except OSError as error:                                   # some network file systems
            os.close(descriptor)
            raise _NoLocksError from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _owner().encode())
            return descriptor
        os.close(descriptor)                                       # its last owner has just removed it


def _unlock(path: Path) -> None:
    descriptor, _ = _locks.pop(path)
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)


def _write_owner(path: Path) -> None:
    """Without locks, the file itself is one, as long as the process that it names lives."""
    if path.exists() and not _is_alive(_read_owner(path)):
        path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:
            file.write(_owner())
    except FileExistsError:
        raise _in_use(path) from None


def _owner() -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})


def _read_owner(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether an owner may live; of one on another machine, or on Windows, nothing can be known."""
    if os.name != "posix" or owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return bool(owner)
    if owner["pid"] == os.getpid():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:                                        # it lives, and is of another user
        pass
    return True


def _in_use(path: Path) -> FolderInUseError:
    owner = _read_owner(path)
    who = "process {pid} on {host}, since {since}".format(**{"pid": "?", "host": "?", "since": "?", **owner})
    return FolderInUseError(
        f"`ckpt_dir` must be a folder that no other run writes to, got {path.parent}, which belongs to a run that is "
        f"alive ({who}); wait for its end, or give another `--ckpt_dir`. If there is no such run, delete {path}."
    )
