# SPDX-License-Identifier: Apache-2.0
"""What the machine has left for a process."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_memory"]

_SYSTEM = Path("/")                                                # tests have another one


def free_memory() -> int | None:
    """Bytes that this process may still take: what the machine has left, and its control group; None if unknown."""
    rooms = [_available(), *_rooms_of_groups()]
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def _available() -> int | None:
    for line in _read(_SYSTEM / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _rooms_of_groups() -> list[int | None]:
    """What each control group around this process has left; files that it has read can be dropped."""
    names = [line.split(":", 2)[1:] for line in _read(_SYSTEM / "proc/self/cgroup").splitlines() if line.count(":") > 1]
    rooms = []
    for kinds, name in names:
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _SYSTEM / "sys/fs/cgroup" / kinds
        limit, used = ("memory.max", "memory.current") if not kinds else (
            "memory.limit_in_bytes", "memory.usage_in_bytes"
        )
        folder = root / name.lstrip("/")
        for place in (folder, *folder.parents):                    # a limit of any of them holds
            if place != root and root not in place.parents:
                break
            rooms.append(_room(place, limit, used))
    return rooms


def _room(folder: Path, limit: str, used: str) -> int | None:
    most, taken = _read(folder / limit).strip(), _read(folder / used).strip()
    if not most.isdigit() or not taken.isdigit():
        return None                                                # "max", or no such file
    statistics = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
    cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return max(0, int(most) - int(taken) + cached)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
