# SPDX-License-Identifier: Apache-2.0
"""How far a command is, read from its log, and the bar that shows it."""

from __future__ import annotations

import re
import shutil
import sys
import time

from tqdm import tqdm

__all__ = ["Bar", "clock", "progress_of"]

SECONDS_BETWEEN_LINES = 20  # without a terminal, a line of progress now and then instead of a bar
_TRAINING = re.compile(r"training \[(\d+)/(\d+)\]: \[(\d+)/(\d+)\]")
_EPOCH = re.compile(r"Epoch\[(\d+)\] Complete|Epoch (\d+)/\d+: loss")
_CASES = re.compile(r"(?:CT phantoms|evaluating|predicting|timing)\b[^\r\n]*?\b(\d+)/(\d+)\b")


def clock(seconds: float) -> str:
    """Give minutes and seconds.

    Example:
        >>> clock(131.4)
        '2:11'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def progress_of(log: str, epochs: int = 0) -> tuple[float, str]:
    """Read from a log how far a command is.

    Args:
        log: all that the command has written so far.
        epochs: number of epochs of a training, 0 for another command.

    Returns:
        Share that is done, 0 to 1, and a word about it.

    Example:
        >>> progress_of("training [3/4]: [1/2]  50%|█████ [00:02<?]", 4)
        (0.625, 'epoch 3/4')
    """
    if epochs:
        bars = _TRAINING.findall(log)
        if not bars:
            done = max((int(a or b) for a, b in _EPOCH.findall(log)), default=0)
            return min(done / epochs, 1.0), f"epoch {done}/{epochs}"
        epoch, _, step, steps = map(int, bars[-1])
        return min((epoch - 1 + step / steps) / epochs, 1.0), f"epoch {epoch}/{epochs}"
    cases = _CASES.findall(log)
    if not cases:
        return 0.0, ""
    case, count = map(int, cases[-1])
    return min(case / max(count, 1), 1.0), f"case {case}/{count}"


class Bar:
    """A tqdm bar on a terminal; elsewhere a line every 20 seconds."""

    def __enter__(self) -> Bar:
        self.start = self.spoken = time.monotonic()
        columns, rows = shutil.get_terminal_size()                # tqdm takes a terminal of unknown size for no room
        self.bar = tqdm(
            total=1.0, disable=not sys.stderr.isatty(), leave=False, ncols=min(columns - 1, 99), nrows=rows,
            bar_format="  {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say(self, text: str) -> None:
        """Print above the bar."""
        tqdm.write(text)
        sys.stdout.flush()

    def move(self, share: float, word: str) -> None:
        """Show how far the step is."""
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.n = max(share, self.bar.n)
            self.bar.set_postfix_str(word)
        elif now - self.spoken > SECONDS_BETWEEN_LINES:
            self.spoken = now
            self.say(f"  {100 * share:3.0f} % {word}, {clock(now - self.start)}".replace(" ,", ","))
