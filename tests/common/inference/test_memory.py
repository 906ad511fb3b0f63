# SPDX-License-Identifier: Apache-2.0
"""Memory of decoding: its estimate, what is free, and the check before the work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medkd.inference import machine, memory
from medkd.inference.machine import free_memory
from medkd.inference.memory import EnsureDecodabled, decoding_bytes

NEAR = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
FAR = [[-3, 0, 0], [0, -3, 0], [0, 0, -3], [-9, 0, 0], [0, -9, 0]]
MEASURE = """
import numpy as np, resource, sys
from scipy import ndimage
from medkd.inference.partition import instances
offsets, method, stride = eval(sys.argv[1])
maps = np.random.default_rng(0).random((len(offsets), 24, 160, 160), dtype=np.float32)
for part in maps:
    part[:] = ndimage.gaussian_filter(part, 2)
    part[:] = np.clip((part - part.mean()) / part.std() * 0.4 + 0.75, 0, 1)
instances(np.ones((len(offsets), 4, 4, 4), np.float32), offsets, method)                # loads the package
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
instances(maps, offsets, method, stride=stride)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]       # of this process alone
print(int(peak.split()[1]) * 1024 - before + maps.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
@pytest.mark.parametrize(
    ("offsets", "method", "stride"),
    [
        (NEAR, "watershed", 4), (NEAR, "waterz", 4), (NEAR, "mutex", 4), (NEAR + FAR, "mutex", 4),
        (NEAR + FAR, "mutex", 1),
    ],
)
def test_estimate_is_above_what_is_taken_and_not_by_much(offsets: Any, method: Any, stride: int) -> None:
    words = [sys.executable, "-c", MEASURE, repr((offsets, method, stride))]
    taken = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert taken <= decoding_bytes((24, 160, 160), offsets, method, stride) <= 2 * taken


def system(folder: Path, available: str | None, groups: dict[str, str], own: str = "0::/job/step") -> Path:
    """A machine's folders of Linux, with control groups."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(own + "\n")
    if available:
        (folder / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available} kB\n")
    for name, text in groups.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("available", "groups", "own", "free"),
    [
        ("1000", {}, "0::/", 1000 * 1024),
        (None, {}, "0::/", None),
        ("1000", {"job/memory.max": "5000", "job/memory.current": "2000"}, "0::/job/step", 3000),
        ("1000", {"job/step/memory.max": "max", "job/step/memory.current": "2000"}, "0::/job/step", 1000 * 1024),
        (
            "1000", {"memory.max": "5000", "memory.current": "4500", "memory.stat": "anon 1\ninactive_file 300\n"},
            "0::/job/step", 800,
        ),
        ("1", {"memory.max": "5000", "memory.current": "2000"}, "0::/", 1024),
        (
            "1000", {"memory/job/memory.limit_in_bytes": "7000", "memory/job/memory.usage_in_bytes": "2000"},
            "9:pids:/\n4:memory:/job\n0::/", 5000,
        ),
        ("1000", {"memory.max": "5000", "memory.current": "6000"}, "0::/", 0),
    ],
)
def test_free_memory_is_the_least_that_machine_and_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: str | None, groups: dict[str, str], own: str,
    free: int | None,
) -> None:
    monkeypatch.setattr(machine, "_SYSTEM", system(tmp_path, available, groups, own))
    assert free_memory() == free


def test_image_whose_instances_do_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SYSTEM", system(tmp_path, str(2 * 2**20), {}))   # 2 GiB
    image = torch.zeros(1, 1).expand(1, 10**7).reshape(1, 100, 1000, 100)
    message = (
        "`image` of (100, 1000, 100) voxels must leave memory for its instances, about 4.0 GiB by 'mutex', got 2.0 GiB "
        "free; cut the image into blocks, or the method 'watershed' (1.6 GiB)."
    )
    with pytest.raises(MemoryError, match=re.escape(message)):
        EnsureDecodabled("image", NEAR + FAR)({"image": image})
    data = EnsureDecodabled("image", NEAR + FAR, {"method": "watershed"})({"image": image})
    assert data["image"] is image
    assert EnsureDecodabled("image", NEAR, allow_missing_keys=True)({"other": 1}) == {"other": 1}


def test_nothing_is_refused_where_free_memory_is_unknown_or_affinities_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(1, 1, 1, 1).expand(1, 10_000, 10_000, 10_000)
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path)
    assert EnsureDecodabled("image", NEAR)({"image": image})["image"] is image
    monkeypatch.setattr(machine, "_SYSTEM", system(tmp_path / "small", "1", {}))
    with pytest.raises(MemoryError, match="cut the image into blocks"):
        EnsureDecodabled("image", NEAR)({"image": image})
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    assert EnsureDecodabled("image", NEAR)({"image": image})["image"] is image
