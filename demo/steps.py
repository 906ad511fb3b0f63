# SPDX-License-Identifier: Apache-2.0
"""Steps of the demo: subprocesses with a log and one progress bar, skipped when they were finished before."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progress import Bar, progress_of

__all__ = [
    "Step", "StepError", "content_of", "last_lines", "read_state", "run_step", "seconds_of", "show_command",
    "show_words",
]

LINES_OF_FAILURE = 15


class StepError(RuntimeError):
    """A step failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Step:
    """One line of work of the demo.

    Attributes:
        name: what the user reads; spaces become underscores in the log's name.
        commands: commands run one after the other, as lists of words.
        folder: where they run.
        output: the demo's folder, for logs and stamps.
        needs: everything that decides on the result; a change repeats the step.
        writes: files and folders that are there at the end, removed before a step is repeated.
        epochs: number of epochs for a training step, else 0.
        resume: words added to the command that go on with an interrupted run, and the file pattern (below the first
            of `writes`) that shows there is something to go on from.
    """

    name: str
    commands: Sequence[Sequence[str]]
    folder: Path
    output: Path
    needs: Any
    writes: Sequence[Path] = ()
    epochs: int = 0
    resume: tuple[Sequence[str], str] | None = None

    @property
    def log(self) -> Path:
        """File that the output of the commands goes to."""
        return self.output / f"{self.name.replace(' ', '_')}.log"

    @property
    def key(self) -> str:
        """Hash of all that decides on the result."""
        text = json.dumps([self.needs, self.epochs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def stamp(self) -> Path:
        """File that says how far the step came, and with which options."""
        return self.output / "stamps" / f"{self.name.replace(' ', '_')}.json"


def content_of(files: Sequence[Path]) -> str:
    """Hash of the content of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def show_command(words: Sequence[str], folder: Path, root: Path) -> str:
    """A command as a user in `root` types it.

    Example:
        >>> show_command([sys.executable, "-m", "a", "--b", "['c','d']"], Path("/r/e"), Path("/r"))
        'cd e && python -m a --b "[\'c\',\'d\']"'
    """
    place = folder.relative_to(root) if folder.is_relative_to(root) else folder
    return f"cd {_quoted(str(place))} && {show_words(words)}"


def show_words(words: Sequence[str]) -> str:
    """A command as a user types it in its folder."""
    return " ".join("python" if word == sys.executable else _quoted(word) for word in words)


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word else shlex.quote(word)


def last_lines(log: str, count: int = LINES_OF_FAILURE) -> str:
    """Give the last lines of a log; of a progress bar that wrote over itself only what stood there last."""
    lines = [line.rstrip().split("\r")[-1] for line in log.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-count:])


def seconds_of(step: Step) -> float:
    """Tell how long a finished step took, all its attempts together."""
    return float(read_state(step.stamp).get("seconds", 0.0))


def run_step(step: Step, show: Callable[[Sequence[str], Path], str]) -> bool:
    """Run a step, or skip it when it was finished with the same options.

    Args:
        step: what to do.
        show: words of a command and its folder -> the line that the user reads.

    Returns:
        False when it was skipped.

    Raises:
        StepError: a command failed.
    """
    stamp = read_state(step.stamp)
    same = stamp.get("key") == step.key
    if same and stamp.get("done") and all(path.exists() for path in step.writes):
        return False
    same = same and not stamp.get("done")
    if not same:
        for path in step.writes:
            _remove(path)
    spent = float(stamp.get("seconds", 0.0)) if same else 0.0
    _write(step, {"seconds": spent, "done": False})
    step.log.write_text("")
    start = time.monotonic()
    try:
        with Bar() as bar:
            for number, command in enumerate(step.commands):
                words = [*command, *_resume_words(step)]
                bar.say(f"  {show(words, step.folder)}")
                _run(step, words, lambda share, word, n=number: bar.move((n + share) / len(step.commands), word))
            bar.move(1.0, "")
    finally:
        _write(step, {"seconds": spent + time.monotonic() - start, "done": False})
    _write(step, {"seconds": spent + time.monotonic() - start, "done": True})
    return True


def _resume_words(step: Step) -> Sequence[str]:
    if step.resume is None or not any(step.writes[0].glob(step.resume[1])):
        return ()
    return step.resume[0]


def _run(step: Step, words: Sequence[str], report: Callable[[float, str], None]) -> None:
    """Run one command into the step's log, and report on its progress twice a second."""
    begin = step.log.stat().st_size
    with step.log.open("ab") as log:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}      # or the error would stand above what led to it
        process = subprocess.Popen(words, cwd=step.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                report(*progress_of(_text(step.log, begin), step.epochs))
                _wait(process, 0.5)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise StepError(
            f"Step '{step.name}' failed with exit code {process.returncode}. The last lines of {step.log}:\n\n"
            f"{last_lines(_text(step.log, begin))}\n\nThe whole log: {step.log}"
        )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _text(path: Path, begin: int = 0) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def read_state(path: Path) -> dict[str, Any]:
    """Read what an earlier run left in a JSON file; empty when there is nothing, or half a file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(step: Step, content: dict[str, Any]) -> None:
    step.stamp.parent.mkdir(parents=True, exist_ok=True)
    step.stamp.write_text(json.dumps({"key": step.key, **content}) + "\n")
