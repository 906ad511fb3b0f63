# SPDX-License-Identifier: Apache-2.0
"""The bar that shows how far a job is, by the files in which its commands say so."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from lab.bundle import show_words
from lab.execute import Executor, Job

SECONDS_BETWEEN_LINES = 20  # without a terminal, a line of progress now and then instead of a bar


def clock(seconds: float) -> str:
    """Give minutes and seconds, such as 2:11."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def share_of(progress: Mapping[str, Any]) -> tuple[float, str]:
    """Share that is done, 0 to 1, and a word about it, by a progress file; empty when it says nothing yet."""
    if not progress or not progress["steps"]:
        return 0.0, ""
    epoch, epochs, step, steps = (int(progress[name]) for name in ("epoch", "epochs", "step", "steps"))
    word = f"epoch {epoch}/{epochs}" if epochs > 1 else f"step {step}/{steps}"
    return min(max(epoch - 1 + step / steps, 0) / epochs, 1.0), word


def tell(text: str) -> None:
    """Print a line at once, above the bars."""
    tqdm.write(text)
    sys.stdout.flush()


def do_with_bar(executor: Executor, job: Job, title: str = "") -> bool:
    """Do a job, with its commands and a bar, or a line every 20 seconds; False when it was done before.

    Several threads may do so at once: `title` tells their lines apart.
    """
    start = spoken = time.monotonic()
    columns, rows = shutil.get_terminal_size()                # tqdm takes a terminal of unknown size for no room
    with tqdm(
        total=1.0, disable=not sys.stderr.isatty(), leave=False, ncols=min(columns - 1, 99), nrows=rows,
        desc=title and f"{title} ", bar_format="  {desc}{percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:
        def watch(number: int, progress: Mapping[str, Any]) -> None:
            nonlocal spoken
            part, word = share_of(progress)
            share, now = (number + part) / len(job.commands), time.monotonic()
            if not bar.disable:
                bar.n = max(share, bar.n)
                bar.set_postfix_str(word)
            elif now - spoken > SECONDS_BETWEEN_LINES:
                spoken = now
                done = f"{100 * share:3.0f} % {word}, {clock(now - start)}".replace(" ,", ",")
                tell(f"{title}: {done.lstrip()}" if title else f"  {done}")

        if not job.is_done:
            commands = [f"  {show_words(words, job.where)}" for words in job.commands]
            tell("\n".join([title, *commands] if title else commands))   # in one piece
        return executor.do(job, watch=watch)
