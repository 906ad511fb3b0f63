# SPDX-License-Identifier: Apache-2.0
"""Score one training on the validation cases with each value of an option of its evaluation.

    python calibrate.py REQUEST.json OUTPUT.json

Runs in a copy of the bundle. The request names configs and options of the training, its weights, and values by option.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from keys import effective_config
from monai.bundle.config_parser import ConfigParser

__all__ = ["score"]


def score(request: Mapping[str, Any], changed: Mapping[str, Any]) -> float:
    """The main metric on the validation cases, with changed options."""
    options = {**request["options"], **changed, "bundle_root": ".", "validate#handlers": []}
    parser = ConfigParser(effective_config([Path(name) for name in request["configs"]], options))
    network = parser.get_parsed_content("network")
    network.load_state_dict(torch.load(request["weights"], map_location="cpu", weights_only=True))
    evaluator = parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    return float(evaluator.state.metrics[request["metric"]])


def main() -> None:
    """Try all values, write their scores in the same order."""
    sys.path.insert(0, str(Path.cwd()))                            # for the bundle's scripts
    request = json.loads(Path(sys.argv[1]).read_text())
    found = {key: [score(request, {key: value}) for value in values] for key, values in request["values"].items()}
    Path(sys.argv[2]).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
