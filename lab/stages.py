# SPDX-License-Identifier: Apache-2.0
"""What a case costs from file to file, stage by stage, with one thread: teacher and student in turns.

    python -m lab.stages REQUEST.json ANSWER.json          in a program of its own, as `lab.networks`

`load` reads and prepares the image, `network` runs the windows in PyTorch, `network_openvino` with OpenVINO where that
is installed, `decode` makes a label map in the file's geometry of it (arg max and resampling back, or instances),
`write` writes the file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from monai.data.meta_tensor import MetaTensor
from torch import Tensor, nn

from lab.execute import write_json
from lab.measure import threads
from lab.networks import MOST_CASES, Built, build_networks, enter_bundle

__all__ = ["measure_stages", "openvino_network", "time_case"]

REPEATS = 2                                # of a network; the faster one counts
Call = Callable[[Tensor], Any]


def openvino_network(network: nn.Module, image: Tensor, count: int = 1) -> Call | None:
    """A network with `count` threads of OpenVINO, None where that is not installed.

    Args:
        network: on the CPU.
        image: an input as the windows have it, shape (1, C, *S).
        count: number of threads.
    """
    try:
        openvino: Any = import_module("openvino")
    except ImportError:
        return None
    model = openvino.convert_model(network, example_input=image)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": count})

    def call(windows: Tensor) -> Tensor:
        found = compiled([torch.as_tensor(windows).contiguous().numpy()])
        return torch.from_numpy(found[0])

    return call


def _seconds(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work(*given)
    return time.perf_counter() - start, result


def time_case(
    number: int, built: Built, networks: Mapping[str, nn.Module], compiled: Mapping[str, Call], shared: bool = False
) -> dict[str, dict[str, float]]:
    """Seconds of each stage for each network: stage -> network -> seconds; `shared`: all decode the last one's."""
    found: dict[str, dict[str, float]] = {}
    items: dict[str, dict[str, Any]] = {}
    predictions: dict[str, Tensor] = {}
    for name, network in networks.items():
        view = built.views[name]
        taken, item = _seconds(view.dataset.__getitem__, number)
        found.setdefault("load", {})[name] = taken
        image = item["image"].as_tensor()[None]
        runs = [_seconds(view.inferer, image, network) for _ in range(REPEATS)]
        found.setdefault("network", {})[name] = min(taken for taken, _ in runs)
        if name in compiled:
            again = [_seconds(view.inferer, image, compiled[name]) for _ in range(REPEATS)]
            found.setdefault("network_openvino", {})[name] = min(taken for taken, _ in again)
        items[name], predictions[name] = item, runs[0][1][0]
    for name, item in items.items():
        view, prediction = built.views[name], predictions[built.last if shared else name]
        decoded = {**item, "pred": MetaTensor(prediction, meta=item["image"].meta)}
        for stage, steps in (("decode", view.decoding), ("write", view.writing)):
            taken, decoded = _seconds(_apply, steps, decoded)
            found.setdefault(stage, {})[name] = taken
    return found


def _first_window(built: Built, name: str) -> Tensor:
    """What a network is given, shape (1, C, *S)."""
    view = built.views[name]
    seen: list[Tensor] = []

    def look(windows: Tensor) -> Any:
        seen.append(windows[:1].contiguous())
        return built.networks[name](windows)

    view.inferer(view.dataset[0]["image"].as_tensor()[None], look)
    return seen[0]


def _apply(steps: list[Any], item: Any) -> Any:
    for step in steps:
        item = step(item)
    return item


def measure_stages(request: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of networks, and the median over test cases of the seconds that each stage takes.

    Args:
        request: see `lab.networks.measure_networks`; `inference` has an `output_dir` in its options. `shared`: the
            prediction of the last network is what all decode, as that of one without weights would take another time.

    Returns:
        `parameters`, network -> number; `seconds_per_case`, stage -> network -> seconds; `cases`, these of each case.
    """
    built, shared = build_networks(request), bool(request.get("shared"))
    with torch.no_grad(), threads(1):
        openvino = {name: openvino_network(one, _first_window(built, name)) for name, one in built.networks.items()}
        compiled = {name: call for name, call in openvino.items() if call is not None}
        time_case(0, built, built.networks, compiled, shared)      # warm up: what is imported and allocated only once
        cases = [
            time_case(number, built, built.networks, compiled, shared)
            for number in range(min(len(built.views[built.last].dataset), MOST_CASES))
        ]
    seconds = {
        stage: {name: round(median(case[stage][name] for case in cases), 4) for name in built.networks}
        for stage in cases[0]
    }
    return {"parameters": built.parameters(), "seconds_per_case": seconds, "cases": cases}


def main(request: str, answer: str) -> None:
    """Answer a request."""
    target, content = Path(answer).resolve(), json.loads(Path(request).read_text())
    enter_bundle(content["bundle"])
    torch.manual_seed(0)
    write_json(target, measure_stages(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
