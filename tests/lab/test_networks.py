# SPDX-License-Identifier: Apache-2.0
"""Networks are timed alternately, and scored with each value of an option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab import networks
from lab.bundle import ROOT
from lab.networks import measure_networks, program_words, score_values, time_networks


def test_each_network_gets_a_time_per_image_and_they_take_turns() -> None:
    order: list[str] = []

    class Noting(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, image: Tensor) -> Tensor:
            order.append(self.name)
            return image

    seconds = time_networks(
        {"a": Noting("a"), "b": Noting("b")}, lambda image, network: network(image), [torch.zeros(1, 1, 8, 40)] * 3
    )

    assert "".join(order) == "ab" + 3 * "abab"                     # a warm-up, then two rounds per image
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs whose parts are as small as can be."""
    network = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": "@width", "kernel_size": 1}
    evaluator = {"_target_": "tests.lab.test_networks.Evaluator", "network": "@network", "threshold": "@threshold"}
    train = {
        "width": 2, "threshold": 0.5, "device": "cuda", "bundle_root": "?", "network": network,
        "validate": {"inferer": {"_target_": "SimpleInferer"}, "evaluator": evaluator, "handlers": ["never"]},
    }
    data = {"_target_": "Dataset", "data": [{"image": 1.0}, {"image": 2.0}],
            "transform": {"_target_": "tests.lab.test_networks.Loaded"}}
    (tmp_path / "configs").mkdir()
    inference = {"dataset": data, "device": "cuda", "bundle_root": "?"}
    for name, content in {"train": train, "teacher": {"width": 5}, "inference": inference}.items():
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Loaded:
    """A transform that makes an image of a number."""

    def __call__(self, case: dict[str, float]) -> dict[str, Any]:
        from monai.data import MetaTensor

        return {"image": MetaTensor(torch.full((1, 4, 4), case["image"]))}


class Evaluator:
    """Its metric is the weights' sum less the threshold."""

    def __init__(self, network: nn.Conv2d, threshold: float) -> None:
        self.value = float(network.weight.detach().sum()) - threshold

    def run(self) -> None:
        self.state = type("State", (), {"metrics": {"dice": self.value}})


def test_networks_are_measured_as_their_trainings_make_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}

    def measure(*given: Any) -> dict[str, list[float]]:
        counts.update({name: len(values) for name, values in time_networks(*given).items()})
        return {"teacher": [1.0, 9.0, 2.0004], "student": [0.5, 0.1, 0.2]}

    monkeypatch.setattr(networks, "time_networks", measure)
    found = measure_networks({
        "networks": {
            "teacher": {"configs": ["train", "teacher"], "options": {}},
            "student": {"configs": ["train"], "options": {}},
        },
        "inference": {"configs": ["inference"], "options": {"width": 3, "datalist": "unknown here"}},
    })

    assert found["parameters"] == {"teacher": 10, "student": 4}
    assert counts == {"teacher": 2, "student": 2}
    assert found["seconds_per_case"] == {"teacher": 2.0, "student": 0.2}


def test_each_value_of_an_option_is_scored_with_the_weights(bundle: Path) -> None:
    torch.save({"weight": torch.ones(2, 1, 1, 1), "bias": torch.zeros(2)}, bundle / "model.pt")
    request = {"configs": ["train"], "options": {}, "weights": "model.pt", "metric": "dice"}
    assert score_values({**request, "values": {"threshold": [0.5, 1.5]}}) == {"threshold": [1.5, 0.5]}


def test_a_request_lies_beside_its_answer_and_names_the_bundle(tmp_path: Path) -> None:
    words, answer = program_words("time", tmp_path / "new", tmp_path, {"networks": {}})

    request = (ROOT / words[-2]).resolve()
    assert words[1:4] == ["-m", "lab.networks", "time"]
    assert (ROOT / words[-1]).resolve() == answer == tmp_path / "new" / "time_answer.json"
    assert json.loads(request.read_text()) == {"bundle": str(tmp_path), "networks": {}}
