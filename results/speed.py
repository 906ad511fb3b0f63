# SPDX-License-Identifier: Apache-2.0
"""Count the parameters of teacher and student, and time them alternately on test cases, on the CPU.

    python speed.py REQUEST.json OUTPUT.json

Runs in a copy of the bundle. The request names the configs and options of both trainings and of inference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

import torch  # noqa: E402
from keys import effective_config  # noqa: E402
from measure import time_networks  # noqa: E402
from monai.bundle.config_parser import ConfigParser  # noqa: E402
from torch import nn  # noqa: E402

MOST_CASES = 8


def read_training(configs: Sequence[str], options: Mapping[str, Any]) -> ConfigParser:
    """Config of a training, on the CPU."""
    return ConfigParser(
        effective_config([Path(name) for name in configs], {**options, "device": "cpu", "bundle_root": "."})
    )


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and seconds per case of both networks, as in training, with the preprocessing of inference.json."""
    trainings = {name: read_training(**request[name]) for name in ("teacher", "student")}
    networks: dict[str, nn.Module] = {
        name: training.get_parsed_content("network").eval() for name, training in trainings.items()
    }
    file = Path("configs", request["inference"])
    known = effective_config([file], {})
    options = {key: value for key, value in request["options"].items() if key.split("#")[0] in known}
    options |= {"device": "cpu", "bundle_root": ".", "datalist": request["datalist"]}
    parser = ConfigParser(effective_config([file], options))
    dataset = parser.get_parsed_content("dataset")
    images = [dataset[number]["image"].as_tensor()[None] for number in range(min(len(dataset), MOST_CASES))]
    inferer = trainings["student"].get_parsed_content("validate#inferer")       # for what a network in training gives
    seconds = time_networks(networks, inferer, images)
    return {
        "parameters": {name: sum(p.numel() for p in one.parameters()) for name, one in networks.items()},
        "seconds": seconds,
    }


def main() -> None:
    """Measure, write."""
    sys.path.insert(0, str(Path.cwd()))                            # for the bundle's scripts
    torch.manual_seed(0)
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(measure(request), indent=2) + "\n")


if __name__ == "__main__":
    main()
