# SPDX-License-Identifier: Apache-2.0
"""What becomes of an image on the grid of the network: wrong units, too few voxels, more than fit into memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from medkd.data.report import numbers
from medkd.data.volumes import Volume
from medkd.inference import machine

__all__ = ["grid_problems", "odd_spacing", "spacing_hint", "turned"]

MOST_FACTOR = 8.0         # of a resampling along an axis
_FACTOR_TO_LITTLE = 4.0   # of one that leaves less than a patch; a thin stack of fine slices is no mistake
_VOXEL_BYTES = 4          # float32
_NEAR = 30.0              # how far a factor may be off a power of 1000
_SWAPPED = {
    -9: "m where nm are expected", -6: "mm where nm are expected", -3: "µm where nm, or m where mm are expected",
    3: "µm where mm are expected", 6: "nm where mm are expected",
}
_SMALL, _LARGE = 1e-3, 1e3   # spacing that is hardly any, in mm and in nm
Turning = Callable[[Mapping[str, Any]], Mapping[Any, Any]]


def grid_problems(
    volume: Volume, spacing: Sequence[float], patch_size: Sequence[int] | None, order: Sequence[int]
) -> Iterator[str]:
    """Say what a resampling to the target would make of an image.

    Args:
        volume: the image.
        spacing: of the target, along the axes after turning; values up to 0 leave an axis as it is.
        patch_size: voxels that the network sees at once, in the same order; None is not looked at.
        order: axes of the image in the order that they have after turning.
    """
    if len(spacing) != len(volume.shape) or len(order) != len(volume.shape):
        return
    has = [volume.spacing[axis] for axis in order]
    wanted = [target if target > 0 else own for target, own in zip(spacing, has, strict=True)]
    shape = [volume.shape[axis] for axis in order]
    size = [max(1, round(n * own / target)) for n, own, target in zip(shape, has, wanted, strict=True)]
    factors = [own / target for own, target in zip(has, wanted, strict=True)]
    text = f"{volume.path} must be near the spacing of the network, {numbers(wanted)}, got {numbers(has)}, "
    largest = max(factors, key=lambda factor: abs(math.log(max(factor, 1e-30))))
    need, free = math.prod(size) * volume.channels * _VOXEL_BYTES, free_memory()
    thin = patch_size is not None and any(
        n >= patch > after and factor < 1 / _FACTOR_TO_LITTLE
        for n, patch, after, factor in zip(shape, patch_size, size, factors, strict=True)
    )
    way_out = "correct the header, or set `spacing` to fit."
    if not 1 / MOST_FACTOR <= largest <= MOST_FACTOR:
        yield f"{text}{_times(largest)}{spacing_hint(has, factors)}; {way_out}"
    elif thin:
        yield f"{text}which leaves {_shape(size)} of {_shape(shape)} voxels, less than a patch, {patch_size}; {way_out}"
    elif need > free:
        yield f"{text}which makes {_shape(size)} voxels, {_bytes(need)}, more than the {_bytes(free)} free; {way_out}"


def _times(factor: float) -> str:
    return f"{factor:.3g} times as much" if factor > 1 else f"{1 / max(factor, 1e-30):.3g} times less"


def spacing_hint(spacing: Sequence[float], factors: Iterable[float]) -> str:
    """Say what a factor looks like: units taken for others, or no spacing in the header at all."""
    mean = math.exp(sum(math.log(max(factor, 1e-30)) for factor in factors) / len(spacing))
    for power, text in _SWAPPED.items():
        if 1 / _NEAR < mean / 10.0**power < _NEAR:
            return f" (it looks like {text})"
    return " (1 on each axis is what a file without a spacing says)" if set(spacing) == {1.0} else ""


def odd_spacing(volume: Volume) -> str | None:
    """Say that a spacing is hardly one, in mm for CT or nm for EM, where there is no target to compare it with."""
    if len(volume.shape) < 3 or all(_SMALL <= size <= _LARGE for size in volume.spacing):
        return None
    return f"{volume.path} has the spacing {numbers(volume.spacing)}"


def turned(volume: Volume, loaded: Mapping[Any, Any], orientation: Turning | None) -> list[int]:
    """Order of the axes after the step that turns volumes; it is asked with a few voxels in place of the volume."""
    import torch
    from monai.data.meta_tensor import MetaTensor

    rank = len(volume.shape)
    if orientation is None:
        return list(range(rank))
    few = torch.zeros(1, *range(2, rank + 2))     # another size along each axis
    case = {key: MetaTensor(few, affine=torch.as_tensor(volume.affine)) for key in ("image", "label", *loaded)}
    try:
        return [size - 2 for size in orientation(case)["image"].shape[1:]]
    except Exception:   # a step of somebody's own that needs more than a few voxels
        return list(range(rank))


def free_memory() -> float:
    """Bytes that a process may still take; infinity where the system does not tell."""
    known = machine.free_memory()
    if known is not None:
        return float(known)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _shape(size: Sequence[int]) -> str:
    return " x ".join(f"{n:,}" for n in size)


def _bytes(count: float) -> str:
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:,.3g} TB"
