# SPDX-License-Identifier: Apache-2.0
"""Measuring: pairs timed alternately, peak memory counted by torch's allocator, one row per figure; the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch

Work = Callable[[], object]
Better = Literal["lower", "higher"]     # of a ratio: an overhead, or a speed-up


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    name: str                              # what was measured, the same in every run
    subject: str                           # ours, in words
    reference: str | None                  # what it is compared with, in words; None for a plain value
    subject_value: float                   # median, in `unit`
    reference_value: float | None
    ratio: float | None                    # median of the pairs' ratios: reference / subject where higher is better
    better: Better
    goal: float | None                     # for the ratio, or for the value where there is no ratio
    reached: bool | None                   # None without a goal
    unit: str                              # of the values, with the clock
    spread: tuple[float, float] | None     # first and third quartile of the pairs' ratios; None where nothing varies
    command: str = ""                      # repeats this row


def compare(
    name: str, words: tuple[str, str], works: tuple[Work, Work], pairs: int, better: Better = "higher",
    goal: float | None = None, memory: bool = True,
) -> list[Row]:
    """Time A B A B ... after one untimed pair: a row for CPU time of all threads, one for wall time, one for memory."""
    samples = [(_clocks(works[0]), _clocks(works[1])) for _ in range(pairs + 1)][1:]
    rows = []
    for n, clock in enumerate(("CPU", "wall")):
        times = [(mine[n], other[n]) for mine, other in samples]
        rows.append(compare_values(f"{name}_{clock.lower()}", words, times, better, goal, f"s, {clock}"))
    if memory:
        rows.append(compare_values(f"{name}_memory", words, [(peak_memory(works[0]), peak_memory(works[1]))], better))
    return rows


def compare_values(
    name: str, words: tuple[str, str], pairs: Sequence[tuple[float, float]], better: Better = "higher",
    goal: float | None = None, unit: str = "MiB",
) -> Row:
    """Give a row for pairs of values, subject first; one pair is enough for what does not vary, as `peak_memory`."""
    ratios = [other / mine if better == "higher" else mine / other for mine, other in pairs]
    mine, other, ratio = map(statistics.median, (*zip(*pairs, strict=True), ratios))
    reached = None if goal is None else (ratio >= goal if better == "higher" else ratio <= goal)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(pairs) > 1 else None
    spread = (quartiles[0], quartiles[2]) if quartiles else None
    return Row(name, *words, mine, other, ratio, better, goal, reached, unit, spread)


def _clocks(work: Work) -> tuple[float, float]:
    """Seconds of one run: CPU time of all threads, and wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_memory(work: Work) -> float:
    """Largest sum, in MiB, of what torch's CPU allocator has handed out since the start of `work`."""
    return max(accumulate(_allocations(work), initial=0)) / 2**20


def kept_memory(work: Work) -> float:
    """What the result of `work` holds at its end, in MiB: itself, and what its graph keeps beyond the inputs."""
    return sum(_allocations(work)) / 2**20


def _allocations(work: Work) -> list[int]:
    """Bytes that torch's CPU allocator hands out or takes back, in order, as long as the result is there."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = work()
    del result
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return [change for _, change in changes]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, at most as many as there are cores, and set the number back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_dtype(file: Path = Path("/proc/cpuinfo")) -> str:
    """Number type in which this CPU trains fastest, by the file that lists its flags, where there is one."""
    flags = file.read_text(encoding="utf-8").split() if file.exists() else []
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"   # emulated, it is slower


def machine() -> dict[str, str | int | float]:
    """Describe the machine, the name of its CPU as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_dtype": cpu_dtype(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages, `source` for what is not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found
