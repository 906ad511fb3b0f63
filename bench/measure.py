# SPDX-License-Identifier: Apache-2.0
"""How `make bench` measures: pairs timed alternately, peak memory counted by torch's allocator, one row per figure."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Row", "compare_memory", "compare_times", "machine", "peak_memory", "plain_row", "threads", "versions"]

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        name: what was measured, the same in every run.
        subject: ours, in words.
        reference: what it is compared with, in words; None for a plain value.
        subject_value: median, in `unit`.
        reference_value: median, in `unit`.
        ratio: median of the ratios of the pairs; a speed-up (reference / subject) where higher is better, an overhead
            (subject / reference) where lower is better; None for a plain value.
        better: which way is better.
        goal: for the ratio, or for the value where there is no ratio; None if there is none.
        reached: whether the goal was reached; None without a goal.
        unit: of the values, with the clock.
        spread: first and third quartile of the ratios of the pairs; None where nothing varies.
        command: repeats this row.
    """

    name: str
    subject: str
    reference: str | None
    subject_value: float
    reference_value: float | None
    ratio: float | None
    better: Literal["lower", "higher"]
    goal: float | None
    reached: bool | None
    unit: str
    spread: tuple[float, float] | None
    command: str = ""


def compare_times(
    name: str,
    subject: tuple[str, Work],
    reference: tuple[str, Work],
    pairs: int,
    better: Literal["lower", "higher"] = "higher",
    goal: float | None = None,
) -> list[Row]:
    """Time A B A B ... after one untimed pair, and give a row for CPU time and one for wall time.

    Args:
        name: of the rows, without the clock.
        subject: in words, and the work.
        reference: likewise.
        pairs: number of timed pairs.
        better: `higher` gives a speed-up, `lower` an overhead.
        goal: for both rows.

    Returns:
        Two rows, from the same runs. CPU time is the sum over all threads.
    """
    samples = [(_clocks(subject[1]), _clocks(reference[1])) for _ in range(pairs + 1)][1:]
    rows = []
    for clock, words in enumerate(("CPU", "wall")):
        mine, other = ([pair[side][clock] for pair in samples] for side in (0, 1))
        ratios = [o / m if better == "higher" else m / o for m, o in zip(mine, other, strict=True)]
        rows.append(
            _row(
                f"{name}_{words.lower()}", (subject[0], statistics.median(mine)),
                (reference[0], statistics.median(other)), ratios, better, goal, f"s, {words}",
            )
        )
    return rows


def compare_memory(
    name: str,
    subject: tuple[str, float],
    reference: tuple[str, float],
    better: Literal["lower", "higher"] = "higher",
    goal: float | None = None,
    unit: str = "MiB",
) -> Row:
    """Give a row for two numbers that do not vary between runs, such as `peak_memory`."""
    ratio = reference[1] / subject[1] if better == "higher" else subject[1] / reference[1]
    return _row(name, subject, reference, [ratio], better, goal, unit)


def plain_row(name: str, subject: str, value: float, goal: float, unit: str) -> Row:
    """Give a row for a value that is compared with its goal alone; lower is better."""
    return Row(name, subject, None, value, None, None, "lower", goal, value <= goal, unit, None)


def _row(
    name: str,
    subject: tuple[str, float],
    reference: tuple[str, float],
    ratios: Sequence[float],
    better: Literal["lower", "higher"],
    goal: float | None,
    unit: str,
) -> Row:
    ratio = statistics.median(ratios)
    reached = None if goal is None else (ratio >= goal if better == "higher" else ratio <= goal)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else None
    spread = (quartiles[0], quartiles[2]) if quartiles else None
    return Row(name, subject[0], reference[0], subject[1], reference[1], ratio, better, goal, reached, unit, spread)


def _clocks(work: Work) -> tuple[float, float]:
    """Seconds of one run: CPU time of all threads, and wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_memory(work: Work) -> float:
    """Largest sum, in MiB, of what torch's CPU allocator has handed out since the start of `work`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()   # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, at most as many as there are cores, and set the number back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, str | int | float]:
    """Describe the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages, `source` for what is not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found
