# SPDX-License-Identifier: Apache-2.0
"""A case from file to file with one thread, teacher and student in turns, in the bundles as they are committed.

The cases are phantoms of the size of real ones. The student has its committed weights. The teacher's are not in the
repository: it has random ones, and what both decode is the student's prediction, so that they find the same instances.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from lab.bundle import ROOT, BundleRun
from lab.execute import read_state
from lab.measure import Row, compare_values
from lab.networks import program_words
from medkd.phantoms.kinds import KINDS

CASES, STAGES = 3, ("load", "network", "decode", "write")
Seconds = Mapping[str, Mapping[str, float]]                        # stage -> network -> seconds


class Task(NamedTuple):
    """A bundle, its phantoms, and by how much its student shall be faster than its teacher."""

    bundle: str
    kind: str
    shape: Sequence[int]
    options: Mapping[str, Any]
    eager: float                           # student and teacher in PyTorch
    openvino: float | None = None          # the student in OpenVINO, the teacher in PyTorch
    earlier: Mapping[str, Any] | None = None    # options by which the student is the one that it took the place of
    sooner: float | None = None            # than that one


FIRST_MALA = {                             # one window at a time, of one size
    "network_def#channels": [4, 6, 8, 10], "network_def#decoder_channels": [8, 8, 8], "out_channels": 16,
    "window_size": [24, 162, 162], "validate#inferer#strides": None, "validate#inferer#sw_batch_size": 1,
}
TASKS = {
    "neurons": Task("graph_relation_em_neurons", "em", (200, 100, 50), {"spacing": (10.0, 10.0, 10.0)}, 5.0,
                    earlier=FIRST_MALA, sooner=8.0),
    "nuclei": Task("graph_relation_nuclei", "nuclei", (520, 696), {}, 3.0, 6.0),
    "organs": Task("boundary_relation_ct_organs", "ct", (128, 76, 128), {"spacing": (4.0, 4.0, 3.0)}, 3.0, 6.0),
}


def _time_cases(task: Task, shape: Sequence[int], count: int) -> list[Seconds]:
    """Seconds of each stage and network for each case."""
    bundle = ROOT / "bundles" / task.bundle
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redirect_stderr(StringIO()):                          # its bar
            datalist = KINDS[task.kind].write(
                folder / "data", training=1, validation=1, test=count, shape=shape, **task.options
            )
        paths = {"datalist": str(datalist), "output_dir": str(folder / "found")}
        earlier = {"configs": ["train"], "options": {**(task.earlier or {}), **paths}, "own_view": True}
        request = {
            "networks": {
                "teacher": {"configs": ["train", "teacher"], "options": paths},
                **({"earlier": earlier} if task.earlier else {}),
                "student": {"configs": ["train"], "options": paths, "weights": "models/model.pt"},
            },
            "inference": {"configs": ["inference"], "options": paths}, "shared": True,
        }
        words, answer = program_words("stages", folder, bundle, request, ["lab.stages"])
        environment = BundleRun(bundle, "training", ["train"]).environment
        variables = {**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"`{task.bundle}` could not be timed:\n{done.stderr}")
        cases: list[Seconds] = read_state(answer)["cases"]
    return cases


def _pairs(cases: Sequence[Seconds], mine: str, other: str, than: str = "teacher") -> list[tuple[float, float]]:
    """Sums over the stages for the student and another network, each with the network's stage by name."""
    def total(case: Seconds, network: str, stage: str) -> float:
        return sum(case[stage if one == "network" else one][network] for one in STAGES)

    return [(total(case, "student", mine), total(case, than, other)) for case in cases]


def _measure(name: str, task: Task, quick: bool) -> list[Row]:
    """Compare a case from file to file, and tell what each stage of the student takes."""
    cases = _time_cases(task, [64] * len(task.shape) if quick else task.shape, 1 if quick else CASES)
    row = partial(compare_values, better="higher", unit="s, wall")
    eager, compiled = "network", "network_openvino"
    rows = [row(f"{name}_eager", ("student, PyTorch", "teacher, PyTorch"), _pairs(cases, eager, eager),
                goal=task.eager)]
    if task.earlier:
        rows.append(row(f"{name}_earlier", ("student, PyTorch", "earlier student, PyTorch"),
                        _pairs(cases, eager, eager, than="earlier"), goal=task.sooner))
    if compiled in cases[0]:
        rows += [
            row(f"{name}_openvino", ("student, OpenVINO", "teacher, PyTorch"), _pairs(cases, compiled, eager),
                goal=task.openvino),
            row(f"{name}_both_openvino", ("student, OpenVINO", "teacher, OpenVINO"), _pairs(cases, compiled, compiled)),
        ]
    stages = [stage for stage in (*STAGES, compiled) if stage in cases[0]]
    return rows + [
        row(f"{name}_{stage}", (f"student, {stage}", f"teacher, {stage}"),
            [(case[stage]["student"], case[stage]["teacher"]) for case in cases])
        for stage in stages
    ]


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    name: partial(_measure, name, task) for name, task in TASKS.items()
}
