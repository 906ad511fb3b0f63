# SPDX-License-Identifier: Apache-2.0
"""Predict the test cases with the bundle's inference.json, and time teacher and student alternately.

    python measure.py OUTPUT --teacher WEIGHTS --students NAME=WEIGHTS ...

In the bundle's folder; writes OUTPUT/NAME/*_seg.nii.gz, OUTPUT/teacher/*_seg.nii.gz and OUTPUT/measured.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle.config_parser import ConfigParser
from monai.bundle.workflows import ConfigWorkflow
from plan import PHANTOMS
from torch import Tensor, nn

DATA = "../data"
THREADS = 2
REPEATS = 2
TEACHER = "teacher"


def teacher_overrides() -> dict[str, Any]:
    """What inference.json needs to run the teacher instead of the student."""
    teacher: dict[str, Any] = ConfigParser.load_config_file("configs/train.json")["teacher_def"]
    return {f"network_def#{name}": value for name, value in teacher.items() if name != "_mode_"}


def make_workflow(name: str, weights: str, output: Path, **more: Any) -> ConfigWorkflow:
    """The bundle's own inference, of the teacher or of a student."""
    options = {"bundle_root": ".", "dataset_dir": DATA, "ckpt_path": weights, "output_dir": str(output / name)}
    options |= PHANTOMS | more | (teacher_overrides() if name == TEACHER else {})
    workflow = ConfigWorkflow(
        "configs/inference.json", run_id="evaluating", workflow_type="infer", **options
    )
    workflow.initialize()
    return workflow


def load_network(workflow: ConfigWorkflow, weights: str) -> nn.Module:
    """The network of a workflow with its weights, on the CPU, ready to predict."""
    network: nn.Module = workflow.parser.get_parsed_content("network")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


@contextmanager
def few_threads(count: int) -> Iterator[None]:
    """Use `count` threads, as on a ward's workstation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_networks(
    networks: dict[str, nn.Module], inferer: Any, images: Sequence[Tensor]
) -> dict[str, list[float]]:
    """Seconds of each network for each image, shape (1, 1, *S): alternately, the faster of two runs."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad(), few_threads(THREADS):
        for network in networks.values():
            inferer(images[0][..., :32], network)                  # warm up
        for number, image in enumerate(images, start=1):
            taken: dict[str, list[float]] = {name: [] for name in networks}
            for _ in range(REPEATS):
                for name, network in networks.items():
                    start = time.perf_counter()
                    inferer(image, network)
                    taken[name].append(time.perf_counter() - start)
            for name, values in taken.items():
                seconds[name].append(min(values))
            sys.stderr.write(f"timing {number}/{len(images)}\n")
    return seconds


def measure(weights: dict[str, str], output: Path) -> dict[str, dict[str, Any]]:
    """Parameters and seconds per case; students of one architecture are timed once."""
    workflows = {name: make_workflow(name, path, output, device="cpu") for name, path in weights.items()}
    networks = {name: load_network(workflow, weights[name]) for name, workflow in workflows.items()}
    one = workflows[TEACHER].parser
    images = [item["image"].as_tensor()[None] for item in one.get_parsed_content("dataset")]
    student = next(name for name in networks if name != TEACHER)
    timed = {name: networks[name] for name in (TEACHER, student)}
    seconds = time_networks(timed, one.get_parsed_content("inferer"), images)
    return {
        name: {
            "parameters": sum(p.numel() for p in network.parameters()),
            "seconds": seconds[TEACHER if name == TEACHER else student],
        }
        for name, network in networks.items()
    }


def main() -> None:
    """Predict, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", required=True, metavar="WEIGHTS")
    parser.add_argument("--students", required=True, nargs="+", metavar="NAME=WEIGHTS")
    options = parser.parse_args()
    weights = {TEACHER: options.teacher, **dict(word.split("=", 1) for word in options.students)}
    for number, (name, path) in enumerate(weights.items(), start=1):
        workflow = make_workflow(name, path, options.output)
        workflow.run()
        workflow.finalize()
        sys.stderr.write(f"predicting {number}/{len(weights)}\n")
    measured = measure(weights, options.output)
    (options.output / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
