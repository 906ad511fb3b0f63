# SPDX-License-Identifier: Apache-2.0
"""The levels of a network: taps of its encoder and decoder, and which of two networks belong together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from monai.networks.layers.simplelayers import SkipConnection
from torch import Tensor, nn

from medkd.taps import FeatureTaps

__all__ = ["Level", "Row", "align_levels", "empty_image", "find_levels", "named_levels"]

Side = Literal["encoder", "decoder", "tap"]


@dataclass(frozen=True)
class Level:
    """A tapped layer."""

    path: str
    side: Side
    stride: tuple[int, ...]   # voxels of the image per voxel of the map, along each axis
    is_output: bool = False   # what it gives is the network's own output: the logits

    def title(self) -> str:
        """What it is.

        Example:
            >>> Level("model.0", "encoder", (2, 2)).title(), Level("up", "decoder", (1, 3)).title()
            ('encoder, 1/2 of the size', 'decoder, 1 x 1/3 of the size')
        """
        shares = ["1" if step == 1 else f"1/{step}" for step in self.stride]
        size = shares[0] if len(set(shares)) == 1 else " x ".join(shares)
        place = "full size" if set(shares) == {"1"} else f"{size} of the size"
        return f"{self.path if self.side == 'tap' else self.side}, {place}"


@dataclass(frozen=True)
class Row:
    """Levels of several networks that belong together: name of the network -> path; a network may have none."""

    title: str
    paths: Mapping[str, str]
    logits: Collection[str] = ()   # networks of which the level is the output


def find_levels(network: nn.Module, size: Sequence[int]) -> list[Level]:
    """The levels of a network, in the order of the forward pass.

    Those of MONAI's `UNet`, and the children of modules that are called `encoder` and `decoder`; of any other network
    the last layer before its maps change their size, of those that run once in a pass.

    Args:
        network: in eval mode; it is run on zeros, twice if its layers are not known by name.
        size: of the image, voxels per axis; a multiple of all strides, else strides are rounded.

    Raises:
        ValueError: no convolution tells how many channels the image has.
        RuntimeError: a level runs twice or never, or the network does not take such an image.
    """
    network.eval()
    paths = _unet(network) or _encoder_decoder(network) or _last_of_size(network, size)
    outputs, last = _run(network, FeatureTaps(network, [path for path, _ in paths], "network"), size)
    shapes = {path: tuple(output.shape[2:]) for path, output in outputs.items()}
    return [
        Level(path, side, _stride(size, shapes[path]), _is_same(outputs[path], last))
        for path, side in paths if len(shapes[path]) == len(size)
    ]


def named_levels(network: nn.Module, paths: Sequence[str], size: Sequence[int], name: str) -> list[Level]:
    """Levels that a user has named.

    Raises:
        ValueError: there is no such layer (the message has the nearest names), it does not run once in a pass, or what
            it gives is no map of the image.
    """
    network.eval()
    taps = FeatureTaps(network, paths, name)
    try:
        outputs, last = _run(network, taps, size)
    except RuntimeError as error:   # a layer that runs twice, never, or is changed in place
        raise ValueError(str(error)) from error
    for path, output in outputs.items():
        if output.dim() != len(size) + 2:
            raise ValueError(
                f"A tap of `{name}` must give maps (B, C, *S) of {len(size)} axes, got {tuple(output.shape)} of "
                f"{path!r}; name a convolution, or what follows it."
            )
    return [
        Level(path, "tap", _stride(size, output.shape[2:]), _is_same(output, last)) for path, output in outputs.items()
    ]


def align_levels(levels: Mapping[str, Sequence[Level]]) -> list[Row]:
    """Put the levels of networks into rows: those of one side and one stride, the first with the first.

    Taps that a user has named go together by their order.

    Example:
        >>> small, large = [Level("a", "encoder", (2,))], [Level("b", "encoder", (1,)), Level("c", "encoder", (2,))]
        >>> [dict(row.paths) for row in align_levels({"small": small, "large": large})]
        [{'large': 'b'}, {'small': 'a', 'large': 'c'}]
    """
    keyed = {name: dict(_keys(found)) for name, found in levels.items()}
    longest = max(keyed.values(), key=len, default={})
    order = list(dict.fromkeys([*longest, *(key for found in keyed.values() for key in found)]))
    rows = []
    for key in order:
        row = {name: found[key] for name, found in keyed.items() if key in found}
        titles = dict.fromkeys(level.title() for level in row.values())
        place = f", no. {key[-1]}" if key[0] != "tap" and key[-1] > 1 else ""
        logits = [name for name, level in row.items() if level.is_output]
        rows.append(Row("; ".join(titles) + place, {name: level.path for name, level in row.items()}, logits))
    return rows


def _keys(levels: Sequence[Level]) -> Iterator[tuple[Any, Level]]:
    seen: dict[Any, int] = {}
    for level in levels:
        key = (level.side,) if level.side == "tap" else (level.side, level.stride)
        seen[key] = seen.get(key, 0) + 1
        yield (*key, seen[key]), level


def _unet(network: nn.Module) -> list[tuple[str, Side]]:
    """Levels of MONAI's `UNet`: blocks (down, skip around the next block, up), nested."""
    block: Any = getattr(network, "model", None)
    prefix, encoder, decoder = "model", list[str](), list[str]()
    while isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection):
        encoder.append(f"{prefix}.0")
        decoder.append(f"{prefix}.2")
        block, prefix = block[1].submodule, f"{prefix}.1.submodule"
    bottom = [prefix] if encoder else []
    levels: list[tuple[str, Side]] = [(path, "encoder") for path in encoder + bottom]
    levels += [(path, "decoder") for path in reversed(decoder)]
    return levels


def _encoder_decoder(network: nn.Module) -> list[tuple[str, Side]]:
    sides: tuple[Side, Side] = ("encoder", "decoder")
    found: dict[Side, Any] = {side: getattr(network, side, None) for side in sides}
    if not all(isinstance(part, (nn.ModuleList, nn.Sequential)) for part in found.values()):
        return []
    return [(f"{side}.{child}", side) for side in sides for child, _ in found[side].named_children()]


def _last_of_size(network: nn.Module, size: Sequence[int]) -> list[tuple[str, Side]]:
    """Of each run of layers with maps of one size the one that ends last, which may hold others."""
    events: list[tuple[str, tuple[int, ...]]] = []

    def note(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == len(size) + 2:
                events.append((path, tuple(output.shape[2:])))
        return hook

    hooks = [module.register_forward_hook(note(path)) for path, module in network.named_modules() if path]
    try:
        _forward(network, size)
    finally:
        for hook in hooks:
            hook.remove()
    counts: dict[str, int] = {}
    for path, _ in events:
        counts[path] = counts.get(path, 0) + 1
    once = [event for event in events if counts[event[0]] == 1]
    ends = [event for event, after in zip(once, [*once[1:], ("", ())], strict=True) if event[1] != after[1]]
    smallest = min((number for number in range(len(ends))), key=lambda number: ends[number][1], default=0)
    return [(path, "encoder" if number <= smallest else "decoder") for number, (path, _) in enumerate(ends)]


def _run(network: nn.Module, taps: FeatureTaps, size: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
    """What the taps give, and the network."""
    try:
        taps.open()
        last = _forward(network, size)
        return taps.close(), last
    finally:
        taps.remove()


def _forward(network: nn.Module, size: Sequence[int]) -> Any:
    with torch.no_grad():
        return network(empty_image(network, size))


def empty_image(network: nn.Module, size: Sequence[int]) -> Tensor:
    """Zeros that a network takes, shape (1, C, *size).

    Raises:
        ValueError: no convolution tells how many channels the image has.
    """
    weight = next((one for one in network.parameters() if one.dim() == len(size) + 2), None)
    if weight is None:
        raise ValueError(f"{type(network).__name__} must have a convolution of {len(size)} axes, got none")
    return torch.zeros(1, weight.shape[1], *size, dtype=weight.dtype, device=weight.device)


def _is_same(output: Tensor, last: Any) -> bool:
    """Whether a layer's output is the network's; a container hands on the memory of its last layer."""
    return isinstance(last, Tensor) and output.data_ptr() == last.data_ptr() and output.shape == last.shape


def _stride(size: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(round(length / found), 1) for length, found in zip(size, shape, strict=True))
