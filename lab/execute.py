# SPDX-License-Identifier: Apache-2.0
"""Jobs: commands with a folder of their own, done once, that go on where they were and end together."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from lab.bundle import BundleRun, show_words

__all__ = [
    "ExecutionError", "Executor", "Job", "StoppedError", "bundle_job", "last_lines", "read_state", "write_json",
]

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_NOTES = 10.0             # what is lost of a job's time when the machine stops
Watch = Callable[[int, dict[str, Any]], None]


class ExecutionError(RuntimeError):
    """A job failed; the message holds the end of its log."""


class StoppedError(RuntimeError):
    """The user interrupted."""


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other and leave files."""

    name: str                            # what the user reads
    folder: Path                         # for `log.txt`, the lock, and `run.json`: command, seconds, whether it is done
    key: str                             # hash of what decides on the result; another one than before starts afresh
    commands: Sequence[Sequence[str]]
    where: Path                          # they run there
    writes: Sequence[Path] = ()          # what is there at the end, removed before the job starts afresh
    environment: Mapping[str, str] = field(default_factory=dict)
    checkpoints: Path | None = None      # folder from which an interrupted training goes on; removed at the end
    progress: Sequence[Path] = ()        # file in which each command says how far it is, see `medkd.handlers.progress`
    check: Callable[[], str] = lambda: ""   # says what is wrong at the end, if anything

    @property
    def log(self) -> Path:
        """File that the output of the commands is added to."""
        return self.folder / "log.txt"

    @property
    def state(self) -> dict[str, Any]:
        """What `run.json` says; before the first attempt with this key that it took no time."""
        state = read_state(self.folder / "run.json")
        return state if state.get("key") == self.key else {"seconds": 0.0}

    @property
    def seconds(self) -> float:
        """How long it took, all attempts together."""
        return float(self.state["seconds"])

    @property
    def is_done(self) -> bool:
        """Whether it was finished and what it wrote is there."""
        return "done" in self.state and all(path.exists() for path in self.writes)


def bundle_job(name: str, folder: Path, key: str, runs: Sequence[BundleRun], **more: Any) -> Job:
    """A job that runs bundles, all in one folder; a training goes on from its checkpoints."""
    first = runs[0]
    return Job(name, folder, key, [run.words() for run in runs], first.folder, environment=first.environment, **more)


class Executor:
    """Does jobs, from several threads if need be; `stop` ends all of them, with what they started."""

    def __init__(self, threads: int = 0, trains: bool = True) -> None:   # of each command, 0 leaves it to torch
        self.trains = trains                                       # or trainings that are not finished are refused
        limits = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"} if threads else {}
        self._variables = {"PYTHONUNBUFFERED": "1", **limits}      # or an error would stand above what led to it
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def do(self, job: Job, say: Callable[[str], None] = lambda _: None, watch: Watch = lambda *_: None) -> bool:
        """Do a job, or go on with it; False when it was done before.

        Args:
            job: what to do.
            say: told that it starts, goes on, or waits for another process that does the same.
            watch: called twice a second with the number of the command and the content of its progress file.

        Raises:
            ExecutionError: a command failed, or the job is a training to be refused.
            StoppedError: `stop` was called.
        """
        if not self.trains and job.checkpoints is not None and not job.is_done:
            raise ExecutionError("it is not finished")
        with self.locked(job.folder, lambda: say("waits for another process that works on it")) as lock:
            if job.is_done:
                return False
            self._attempt(job, lock, say, watch)
            return True

    def _attempt(self, job: Job, lock: int, say: Callable[[str], None], watch: Watch) -> None:
        go_on = "key" in job.state and "done" not in job.state
        for path in () if go_on else [*job.writes, *job.progress, *filter(None, [job.checkpoints])]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        resumed = job.checkpoints is not None and any(job.checkpoints.glob("epoch_*.pt"))
        commands = [[*words, *(("--resume", "True") if resumed else ())] for words in job.commands]
        told = {"key": job.key, "command": " && ".join(map(show_words, commands))}
        start = time.monotonic() - (job.seconds if go_on else 0.0)
        noted = 0.0

        def note(**more: Any) -> None:
            nonlocal noted
            noted = time.monotonic()
            write_json(job.folder / "run.json", {**told, "seconds": round(time.monotonic() - start, 1), **more})

        def look(number: int) -> None:
            if time.monotonic() - noted >= SECONDS_BETWEEN_NOTES:
                note()
            watch(number, read_state(job.progress[number]) if number < len(job.progress) else {})

        note()
        say("goes on" if resumed else "starts")
        try:
            for number, words in enumerate(commands):
                self._run(job, words, partial(look, number), lock)
        finally:
            note()
        if problem := job.check():
            raise ExecutionError(f"'{job.name}' failed: {problem} See {job.log}.")
        if job.checkpoints is not None:
            shutil.rmtree(job.checkpoints, ignore_errors=True)     # nothing goes on from a finished run
        note(done=True)

    def _run(self, job: Job, words: Sequence[str], look: Callable[[], None], lock: int) -> None:
        with self._guard, job.log.open("ab") as log:
            if self._stopped:
                raise StoppedError
            begin = log.tell()
            process = subprocess.Popen(
                words, cwd=job.where, env={**self._variables, **os.environ, **job.environment}, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock],
            )
            self._running.add(process)
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS_BETWEEN_LOOKS)
                look()
        except BaseException:          # an interruption in the main thread, or the disk is full
            _end(process)
            process.wait()
            raise
        finally:
            with self._guard:
                self._running.discard(process)
        if self._stopped:
            raise StoppedError
        if process.returncode:
            end = last_lines(job.log.read_bytes()[begin:].decode(errors="replace"))
            code = process.returncode
            raise ExecutionError(f"'{job.name}' failed with exit code {code}. The last lines of {job.log}:\n\n{end}\n")

    def stop(self) -> None:
        """End all commands; later ones are refused."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                _end(process)

    @contextmanager
    def locked(self, folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold a folder alone, waiting for another process (or a run that it left) to be done with it.

        Gives a descriptor that a command inherits, so that the lock lasts as long as it runs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            for attempt in count():
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self._stopped:
                    raise StoppedError
                if attempt == 0:
                    waiting()
                time.sleep(1)
            yield descriptor
        finally:
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell a command, and what it started, to end."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def last_lines(log: str, count: int = 15) -> str:
    """Give the last lines of a log; of a progress bar that wrote over itself only what stood there last."""
    lines = [line.rstrip().split("\r")[-1] for line in log.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-count:])


def read_state(path: Path) -> dict[str, Any]:
    """Read what an earlier run left in a JSON file; empty when there is nothing, or half a file."""
    with suppress(OSError, ValueError):
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    return {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)
