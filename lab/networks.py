# SPDX-License-Identifier: Apache-2.0
"""What is done with networks in a copy of their bundle, by a program of its own.

    python -m lab.networks time|calibrate REQUEST.json ANSWER.json

`time` counts the parameters of networks and times them alternately on test cases, on the CPU; on demand it writes label
maps with inference.json before. `calibrate` scores one training on the validation cases with each value of an option
of its evaluation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from monai.bundle.config_parser import ConfigParser
from monai.bundle.workflows import ConfigWorkflow
from torch import Tensor, nn

from lab.bundle import ROOT, BundleRun
from lab.execute import write_json
from lab.measure import threads

__all__ = [
    "Built", "View", "build_networks", "enter_bundle", "measure_networks", "program_words", "score_values",
    "time_networks",
]

MOST_CASES = 8
OWN_VIEW = "scale"     # key of the configs of networks that see one case in unlike resolutions, each by its training
THREADS = 2        # as on a ward's workstation
REPEATS = 2


def program_words(
    action: str, folder: Path, bundle: Path, request: Mapping[str, Any], program: Sequence[str] = ()
) -> tuple[list[str], Path]:
    """Write a request of a bundle into a folder; the command that runs in `ROOT`, and the file of its answer.

    `program` is the module, with what comes before the files; this one with its action if there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{action}_{name}.json" for name in ("request", "answer")]
    write_json(files[0], {"bundle": str(bundle.resolve()), **request})
    words = [sys.executable, "-m", *(program or ("lab.networks", action))]
    return [*words, *(os.path.relpath(file, ROOT) for file in files)], files[1]


def enter_bundle(folder: str) -> None:
    """Go into a bundle, so that its paths and `scripts` are found."""
    os.chdir(folder)
    sys.path.insert(0, folder)


def _parser(configs: Sequence[str], options: Mapping[str, Any], **more: Any) -> ConfigParser:
    return ConfigParser(BundleRun(Path(), "", configs, {**options, **more, "bundle_root": "."}).config)


def time_networks(networks: Mapping[str, nn.Module], inferer: Any, images: Sequence[Tensor]) -> dict[str, list[float]]:
    """Seconds of each network for each image, shape (1, C, *S): alternately, the faster of two runs."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad(), threads(THREADS):
        for network in networks.values():
            inferer(images[0][..., :32], network)                  # warm up
        for image in images:
            for again in range(REPEATS):
                for name, network in networks.items():
                    start = time.perf_counter()
                    inferer(image, network)
                    taken = time.perf_counter() - start
                    seconds[name].append(min(taken, seconds[name].pop()) if again else taken)
    return seconds


@dataclass(frozen=True)
class View:
    """What a network sees of the test cases, and what is made of its predictions."""

    inferer: Any                           # the student's in training, as it is for what a network there gives
    dataset: Any                           # test cases with the preprocessing of inference.json
    decoding: list[Any]                    # transforms of its postprocessing before the file is written
    writing: list[Any]                     # that, and what comes after


@dataclass(frozen=True)
class Built:
    """Networks and what runs them on the test cases, built for the CPU."""

    networks: Mapping[str, nn.Module]      # as their trainings have them, the student last
    views: Mapping[str, View]              # one for all, but where they see unlike resolutions

    @property
    def last(self) -> str:
        """Name of the last network."""
        return list(self.networks)[-1]

    def parameters(self) -> dict[str, int]:
        """Number of parameters by network."""
        return {name: sum(p.numel() for p in one.parameters()) for name, one in self.networks.items()}


def build_networks(request: Mapping[str, Any]) -> Built:
    """Build what a request names, see `measure_networks`."""
    configs, options = request["inference"]["configs"], request["inference"]["options"]
    told = request["networks"]
    trainings = {name: _parser(one["configs"], one["options"], device="cpu") for name, one in told.items()}
    networks = {name: one.get_parsed_content("network").eval() for name, one in trainings.items()}
    for name in (name for name in networks if "weights" in told[name]):
        weights = torch.load(told[name]["weights"], map_location="cpu", weights_only=True)
        networks[name].load_state_dict(weights)
    own = [name for name, one in trainings.items() if OWN_VIEW in one or told[name].get("own_view")]
    views = {name: _view(trainings[name], configs, options) for name in own}
    last = list(trainings)[-1]
    shared = views.get(last) or _view(trainings[last], configs, options)
    return Built(networks, {name: views.get(name, shared) for name in networks})


def _view(training: ConfigParser, configs: Sequence[str], options: Mapping[str, Any]) -> View:
    """What a training's network sees in inference."""
    known = _parser(configs, {}).get()
    chosen = {key: options[key] for key in options if key.split("#")[0] in known}
    own = {OWN_VIEW: training[OWN_VIEW]} if OWN_VIEW in training else {}
    parser = _parser(configs, {**chosen, **own}, device="cpu")
    steps = list(parser.get_parsed_content("postprocessing").transforms) if "postprocessing" in known else []
    saves = [number for number, step in enumerate(steps) if type(step).__name__.startswith("Save")]
    end = saves[0] if saves else len(steps)
    inferer = training.get_parsed_content("validate#inferer")
    return View(inferer, parser.get_parsed_content("dataset"), steps[:end], steps[end:])


def measure_networks(request: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and seconds per case of networks as in training, with the preprocessing of inference.json.

    Args:
        request: `networks`, name -> configs and options of a training, and its `weights` if it has them, the student
            last, whose inferer and images all take but those with `own_view`, as they are for what a network in
            training gives; `inference`, configs and options; `predictions`, a list of options of inference runs that
            write label maps, if any.
    """
    configs = request["inference"]["configs"]
    files = BundleRun(Path(), "evaluating", configs).files
    for told in request.get("predictions", ()):
        workflow = ConfigWorkflow(files, run_id="evaluating", workflow_type="infer", bundle_root=".", **told)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    built = build_networks(request)
    view = built.views[built.last]
    images = [view.dataset[n]["image"].as_tensor()[None] for n in range(min(len(view.dataset), MOST_CASES))]
    seconds = time_networks(built.networks, view.inferer, images)
    return {
        "parameters": built.parameters(),
        "seconds_per_case": {name: round(median(values), 3) for name, values in seconds.items()},
    }


def score_values(request: Mapping[str, Any]) -> dict[str, list[float]]:
    """The main metric on the validation cases for each value of an option: option -> scores.

    Args:
        request: `configs`, `options`, `weights` and `metric` of a training; `values`, option -> values.
    """
    ((key, values),) = request["values"].items()
    scores = []
    for value in values:
        parser = _parser(request["configs"], {**request["options"], key: value, "validate#handlers": []})
        network = parser.get_parsed_content("network")
        network.load_state_dict(torch.load(request["weights"], map_location="cpu", weights_only=True))
        evaluator = parser.get_parsed_content("validate#evaluator")
        evaluator.run()
        scores.append(float(evaluator.state.metrics[request["metric"]]))
    return {key: scores}


def main(action: str, request: str, answer: str) -> None:
    """Answer a request."""
    target, content = Path(answer).resolve(), json.loads(Path(request).read_text())
    enter_bundle(content["bundle"])
    torch.manual_seed(0)
    actions = {"time": measure_networks, "calibrate": score_values}
    write_json(target, actions[action](content))


if __name__ == "__main__":
    main(*sys.argv[1:])
