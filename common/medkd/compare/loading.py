# SPDX-License-Identifier: Apache-2.0
"""Weights of a network, loaded only if they are its own and it is run as it was trained; else the way out is found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of
from medkd.inference.trained import LOW_ALREADY, is_plain
from medkd.settings import flatten
from medkd.weights import load_tensors

__all__ = ["check_settings", "load_weights"]

# settings that change what a network is shown, or what it is; another value than in training is a slip
_DECIDING = {
    "network_def", "out_channels", "spacing", "intensity_range", "intensity", "orientation", "filling", "offsets",
    "decoded_offsets", "image_dataset", "file_spacing", "unit", "scale", "student_input", "rim",
}
_NO_NETWORKS = ("train", "metadata", "evaluate", "smoke", "multi_gpu_train")
_SHOWN = 3


def load_weights(network: Network, module: nn.Module) -> None:
    """Load the weights of a network into the module that its config builds, strictly.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of another network; the message names the config or the number of classes that fits.
    """
    content = _state_dict(load_tensors(network.weights), network.weights)
    problems = _misfits(module.state_dict(), content)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"`{network.name}` must have weights of {type(module).__name__} as its configs "
            f"{', '.join(('train', *network.configs))} define it, but {network.weights} "
            f"{'; '.join(problems[:_SHOWN])}{more}. {_way_out(network, content)}"
        )
    module.load_state_dict(dict(content), strict=True)


def _state_dict(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The network in a file: alone, in a checkpoint of ours, or under a usual key."""
    inner = content.get("objects", content)
    for key in ("network", "state_dict", "model"):
        if isinstance(inner, Mapping) and isinstance(inner.get(key), Mapping):
            return dict(inner[key])
    if not isinstance(inner, Mapping) or not any(isinstance(value, Tensor) for value in inner.values()):
        raise ValueError(f"{path} must hold a state dict, got {', '.join(map(str, list(content)[:5])) or 'nothing'}.")
    return inner


def _misfits(own: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    problems = [f"misses {key!r}" for key in own if key not in content]
    problems += [f"has {key!r} too much" for key in content if key not in own]
    return problems + [
        f"has {key!r} of {tuple(content[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in content and isinstance(content[key], Tensor) and content[key].shape != value.shape
    ]


def _way_out(network: Network, content: Mapping[str, Any]) -> str:
    """Which config of the bundle, and which number of classes, has a network that the weights fit."""
    names = [file.stem for file in sorted((network.root / "configs").glob("*.json"))]
    named = [name for name in names if name not in _NO_NETWORKS and not name.startswith("inference")]
    candidates: list[tuple[str, ...]] = [(), *((name,) for name in named)]
    for added in [one for one in candidates if not set(one) & set(network.configs)]:
        if added and not _defines_network(network.root / f"configs/{added[0]}.json"):
            continue
        for classes in dict.fromkeys((network.classes, *_numbers_of_classes(content))):
            own = _shapes(network, (*network.configs, *added), classes)
            if own is not None and not _misfits(own, content):
                parts = [*added, *([f"out_channels={classes}"] if classes != network.classes else [])]
                return f"They fit {network.name}=...{''.join(f'+{part}' for part in parts)}."
    return "Name the configs and settings that it was trained with: NAME=PATH+CONFIG+KEY=VALUE."


def _defines_network(file: Path) -> bool:
    keys = json.loads(file.read_text(encoding="utf-8"))
    return any(str(key).split("#")[0] in ("network_def", "network", "teacher_def", "out_channels") for key in keys)


def _numbers_of_classes(content: Mapping[str, Any]) -> Sequence[int]:
    """What the last layer may give: the length of the last bias or weight."""
    tensors = [value for value in content.values() if isinstance(value, Tensor) and value.dim() > 0]
    return [len(value) for value in tensors[:-3:-1]]


def _shapes(network: Network, configs: Sequence[str], classes: int) -> dict[str, Any] | None:
    """The state dict that other configs would have, without memory for it; None where they build nothing."""
    try:
        parser = network.parse({"out_channels": classes}, configs)
        with scripts_of(network.root), torch.device("meta"):
            return dict(parser.get_parsed_content("network_def").state_dict())
    except Exception:   # whatever a config of the bundle raises that is not meant for this
        return None


def check_settings(network: Network) -> None:
    """Raise where a network is run otherwise than its training ran, by the checkpoints that lie beside its weights.

    Raises:
        ValueError: a setting that decides on what the network is, or is shown, has another value.
    """
    told, now = _recorded(network.weights), flatten(network.config)
    wrong = [
        key for key in told
        if key.split("#")[0] in _DECIDING and key in now and told[key] != now[key] and (key, now[key]) != LOW_ALREADY
        and is_plain(told[key]) and is_plain(now[key])
    ]
    if wrong:
        key = wrong[0]
        value = json.dumps(told[key], separators=(",", ":"))
        raise ValueError(
            f"`{network.name}` must be run as it was trained, with {key} {told[key]}, as its checkpoint says, got "
            f"{now[key]}; write {network.name}=...+{key}={value}, or --set {key}={value} for all."
        )


def _recorded(weights: Path) -> dict[str, Any]:
    """The settings of a training, as its newest checkpoint holds them; empty where there is none."""
    folder = weights.parent if weights.parent.name == "checkpoints" else weights.parent / "checkpoints"
    for file in sorted(folder.glob("epoch_*.pt"), reverse=True):
        try:
            return dict(load_tensors(file)["record"]["settings"])
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return {}
