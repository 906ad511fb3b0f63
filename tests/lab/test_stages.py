# SPDX-License-Identifier: Apache-2.0
"""A case is timed stage by stage, as its bundle's inference does it, with the weights that were trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from lab.networks import build_networks
from lab.stages import measure_stages, openvino_network
from tests.lab.test_networks import bundle

__all__ = ["bundle"]                       # a fixture
ORDER: list[str] = []


class Step:
    """A transform that notes its turn and what it was given."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        ORDER.append(f"{self.name} {tuple(item['pred'].shape)} {float(item['pred'].mean()):.0f}")
        return item


class SaveStep(Step):
    """One that writes."""


@pytest.fixture
def request_of(bundle: Path) -> dict[str, Any]:
    """A request for a teacher and a student, whose trained weights are all 1 and 2."""
    file = bundle / "configs" / "inference.json"
    steps = [{"_target_": f"tests.lab.test_stages.{kind}", "name": name}
             for kind, name in (("Step", "decode"), ("SaveStep", "write"), ("Step", "after"))]
    told = json.loads(file.read_text()) | {"postprocessing": {"_target_": "Compose", "transforms": steps}}
    file.write_text(json.dumps(told))
    networks = {}
    trainings = ("teacher", ["train", "teacher"], 5), ("student", ["train"], 2)
    for value, (name, configs, width) in enumerate(trainings, 1):
        state = {"weight": torch.full((width, 1, 1, 1), float(value)), "bias": torch.zeros(width)}
        torch.save(state, bundle / f"{name}.pt")
        networks[name] = {"configs": configs, "options": {}, "weights": f"{name}.pt"}
    train = bundle / "configs" / "train.json"
    windows = {"_target_": "SlidingWindowInferer", "roi_size": [4, 4], "sw_batch_size": 1}
    content = json.loads(train.read_text())
    content["validate"]["inferer"] = windows
    train.write_text(json.dumps(content))
    return {"networks": networks, "inference": {"configs": ["inference"], "options": {}}}


def test_each_stage_has_a_time_for_each_network_and_runs_on_its_trained_prediction(request_of: dict[str, Any]) -> None:
    ORDER.clear()
    found = measure_stages(request_of)

    assert found["parameters"] == {"teacher": 10, "student": 4}
    assert {"load", "network", "decode", "write"} <= found["seconds_per_case"].keys()
    assert all(stage.keys() == {"teacher", "student"} for stage in found["seconds_per_case"].values())
    expected = [f"{name} ({width}, 4, 4) {value * image}" for image in (1, 1, 2) for width, value in ((5, 1), (2, 2))
                for name in ("decode", "write", "after")]
    assert expected == ORDER                                       # images are 1 and 2, weights too; one untimed


def test_on_demand_all_decode_the_prediction_of_the_last_network(request_of: dict[str, Any]) -> None:
    ORDER.clear()
    found = measure_stages(request_of | {"shared": True})
    assert {step.split("(")[1] for step in ORDER} == {"2, 4, 4) 2", "2, 4, 4) 4"}      # the student's
    assert [case.keys() for case in found["cases"]] == [found["seconds_per_case"].keys()] * 2
    assert found["cases"][0]["decode"].keys() == {"teacher", "student"}


def test_writing_begins_with_what_saves(request_of: dict[str, Any]) -> None:
    built = build_networks(request_of)
    view = built.views["student"]
    assert ([step.name for step in view.decoding], [step.name for step in view.writing]) == (
        ["decode"], ["write", "after"]
    )
    assert built.views["teacher"] is view
    assert built.last == "student"


def test_networks_of_unlike_resolution_see_a_case_each_in_its_own(request_of: dict[str, Any], bundle: Path) -> None:
    def change(name: str, **content: Any) -> None:
        file = bundle / "configs" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | content))

    grow = {"_target_": "tests.lab.test_stages.Repeated", "times": "@scale"}
    loaded = {"_target_": "tests.lab.test_networks.Loaded"}
    data = json.loads((bundle / "configs/inference.json").read_text())["dataset"]
    data["transform"] = {"_target_": "Compose", "transforms": [loaded, grow]}
    change("train", scale=[1])
    change("teacher", scale=[2])
    change("inference", scale=[1], dataset=data)
    ORDER.clear()
    built = build_networks(request_of)
    shapes = {name: tuple(view.dataset[0]["image"].shape) for name, view in built.views.items()}
    assert shapes == {"teacher": (1, 8, 8), "student": (1, 4, 4)}
    measure_stages(request_of)
    assert {step.split(")")[0] for step in ORDER} == {f"{name} ({size}" for name in ("decode", "write", "after")
                                                      for size in ("5, 8, 8", "2, 4, 4")}


class Repeated:
    """A transform that repeats voxels: a stand-in for a finer resolution."""

    def __init__(self, times: list[int]) -> None:
        self.times = times[0]

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        image = case["image"].as_tensor()
        for axis in (1, 2):
            image = image.repeat_interleave(self.times, dim=axis)
        return {"image": MetaTensor(image)}


def test_openvino_is_given_one_thread_and_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Conv2d(1, 2, 1)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert openvino_network(network, torch.zeros(1, 1, 3, 3)) is None
    given: list[Any] = []

    def compile_model(model: Any, device: str, options: dict[str, int]) -> Any:
        given.append((device, options))
        return lambda inputs: [np.asarray(model(torch.as_tensor(inputs[0])).detach())]

    fake = SimpleNamespace(convert_model=lambda network, example_input: network, compile_model=compile_model)
    monkeypatch.setitem(sys.modules, "openvino", fake)
    call = openvino_network(network, torch.zeros(1, 1, 3, 3))
    image = torch.rand(2, 1, 5, 4)

    assert call is not None
    result: Tensor = call(image)
    assert torch.equal(result, network(image).detach())
    assert given == [("CPU", {"INFERENCE_NUM_THREADS": 1})]
