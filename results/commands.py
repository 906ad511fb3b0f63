# SPDX-License-Identifier: Apache-2.0
"""Commands that run beside each other and end together, and a lock per folder that outlives a killed parent."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from steps import last_lines

__all__ = ["CommandError", "Commands", "StoppedError"]


class CommandError(RuntimeError):
    """A command failed; the message holds the end of its log."""


class StoppedError(RuntimeError):
    """The user interrupted."""


class Commands:
    """Runs commands from several threads; `stop` ends all of them, with what they started."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(
        self, words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str],
        tick: Callable[[], None] = lambda: None, lock: int | None = None,
    ) -> None:
        """Run a command to its end.

        Args:
            words: the command.
            folder: where it runs.
            log: file that its output is added to.
            environment: variables besides those of this process.
            tick: called every ten seconds.
            lock: descriptor that the command inherits, so that a lock lasts as long as it runs.

        Raises:
            CommandError: it failed.
            StoppedError: `stop` was called.
        """
        with log.open("ab") as file:
            process = self._start(words, folder, file.fileno(), environment, lock)
        try:
            while True:
                try:
                    process.wait(10)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:      # an interruption in the main thread, or `tick` failed
            _end(process)
            process.wait()
            raise
        finally:
            with self._guard:
                self._running.discard(process)
        if self._stopped:
            raise StoppedError
        if process.returncode:
            raise CommandError(
                f"exit code {process.returncode}; the end of {log}:\n\n{last_lines(log.read_text(errors='replace'))}\n"
            )

    def _start(
        self, words: Sequence[str], folder: Path, output: int, environment: Mapping[str, str], lock: int | None
    ) -> subprocess.Popen[bytes]:
        with self._guard:
            if self._stopped:
                raise StoppedError
            process = subprocess.Popen(
                words, cwd=folder, env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment), stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=[] if lock is None else [lock],
            )
            self._running.add(process)
            return process

    def stop(self) -> None:
        """End all commands; later ones are refused."""
        with self._guard:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _end(process)

    @contextmanager
    def locked(self, folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold a folder alone, waiting for another `make results` (or a run that it left) to be done with it.

        Args:
            folder: is made if it does not exist.
            waiting: called once when there is something to wait for.

        Returns:
            Descriptor for `run`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            while not _try_lock(descriptor):
                if self._stopped:
                    raise StoppedError
                waiting()
                waiting = _nothing
                time.sleep(1)
            yield descriptor
        finally:
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell a command, and what it started, to end."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _nothing() -> None:
    pass


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
