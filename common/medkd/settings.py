# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: the plain values of its merged config that decide on what it ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medkd.inference.options import current_parser
from medkd.inference.trained import class_names

__all__ = ["flatten", "plain_options", "run_class_names", "run_settings"]

# keys that may differ between two runs of one result, each with the reason
_WITHOUT_EFFECT = {
    "_meta_": "describes the bundle",
    "imports": "modules that expressions may name",
    "initialize": "a command; the seed that it sets is a setting of its own",
    "finalize": "a command",
    "run": "a command", "training": "a command", "evaluating": "a command",
    "bundle_root": "a place", "dataset_dir": "a place; the data are compared by themselves",
    "datalist": "a place; the data are compared by themselves",
    "train#dataset#data": "the data are compared by themselves",
    "validate#dataset#data": "the data are compared by themselves",
    "ckpt_dir": "a place", "output_dir": "a place",
    "teacher_path": "a place; the teacher is compared by the hash of its file",
    "teacher_sha256": "a check; the teacher is compared by the hash of its file",
    "teacher_check": "raises, or lets pass",
    "data_check": "raises, or lets pass",
    "score_columns": "read by programs that show scores",
    "resume": "says how to go on",
    "run_settings": "this list itself",
    "prepare_run": "raises, or lets pass", "check_sizes": "raises, or lets pass",
    "is_main": "which rank writes",
    "tracking_uri": "of MLflow", "experiment_name": "of MLflow", "run_name": "of MLflow",
    "save_execute_config": "of MLflow", "is_not_rank0": "of MLflow",
}
# names at any depth that say how a machine works, not what it works out
_OF_THE_MACHINE = {
    "device", "num_workers", "cache_rate", "cache_num", "pin_memory", "prefetch_factor", "progress", "log_dir",
    "non_blocking",
}
# handlers that watch, raise, or write what is no part of the result; all others are settings
_WATCHERS = {
    "CaseGuard", "CheckpointHandler", "CheckpointLoader", "CheckpointSaver", "ConfusionMatrixSaver", "CurvesHandler",
    "MLFlowHandler", "MetricLogger", "MetricsSaver", "NanGuard", "PairingCheck", "ProgressBar", "ProgressFile",
    "StatsHandler",
    "TensorBoardImageHandler", "TensorBoardStatsHandler",
}


def run_settings() -> dict[str, Any]:
    """What the merged config of the present run sets: key `a#b#0` -> plain value; references as they are written.

    What may differ without another result is left out: places, commands, the machine, and handlers that only watch.
    Named as `"run_settings": {"_target_": "medkd.settings.run_settings"}` in a config.

    Returns:
        An empty dict when no parser is at work.
    """
    parser = current_parser()
    return {} if parser is None else flatten(parser.get())


def run_class_names() -> dict[str, str]:
    """Names of the classes by number in the datalist of the present run; empty where there are none, or no run."""
    parser = current_parser()
    return {} if parser is None else class_names(parser)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a merged config.

    Example:
        >>> flatten({"epochs": 2, "ckpt_dir": "here", "loss": {"_target_": "Dice", "weights": (1, 2.5)}})
        {'epochs': 2, 'loss#_target_': 'Dice', 'loss#weights': [1, 2.5]}
    """
    return dict(_leaves(config, ""))


def plain_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a command line gives by one word and a plain value.

    Example:
        >>> plain_options({"epochs": 2, "spacing": [3.0, 3.0], "amp": "$True", "loss#_target_": "Dice"})
        {'epochs': 2, 'spacing': [3.0, 3.0]}
    """
    return {
        name: value for name, value in settings.items()
        if "#" not in name and not re.search(r'"(?:[$@%]|an object of )', json.dumps(value))
    }


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if path in _WITHOUT_EFFECT or path.rpartition("#")[2] in _OF_THE_MACHINE:
        return
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}#{key}" if path else str(key))
    elif _holds_mappings(node):
        for number, value in enumerate(item for item in node if not _watches(item)):
            yield from _leaves(value, f"{path}#{number}")
    else:
        yield path, _plain(node)


def _is_list(node: Any) -> bool:
    return isinstance(node, Sequence) and not isinstance(node, (str, bytes))


def _holds_mappings(node: Any) -> bool:
    return _is_list(node) and any(isinstance(item, Mapping) or _holds_mappings(item) for item in node)


def _watches(item: Any) -> bool:
    return isinstance(item, Mapping) and str(item.get("_target_", "")).rpartition(".")[2] in _WATCHERS


def _plain(value: Any) -> Any:
    """A value that a checkpoint may hold; of other objects, which a program put into the config, their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if _is_list(value):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {}
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"
