# SPDX-License-Identifier: Apache-2.0
"""Partition an image into instances by its affinities."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label as connected_components

from .fragments import fill_membranes, flood, fragments, joined_by_contact

__all__ = ["WHEELS", "Partition", "instances"]

Partition = Literal["mutex", "waterz", "watershed"]
Array = NDArray[Any]
WHEELS = {"mutex": "mwatershed", "waterz": "waterz"}               # packages that methods need


def instances(   # noqa: PLR0913 - options of a config, each with a default
    affinities: Array,
    offsets: Sequence[Sequence[int]],
    method: Partition = "mutex",
    stride: int = 4,
    bias: float = 0.5,
    threshold: float = 0.5,
    seed_distance: int = 4,
    per_section: bool = False,
    absorb: int = 0,
    min_size: int = 0,
    foreground: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Partition an image by its affinities.

    Pairs that leave the image, or the mask, do not count: they neither attract nor are they a border. So offsets that
    are longer than their axis are as if they were not there.

    Args:
        affinities: shape (O, *S), range [0, 1], stored at the voxel p of each pair (p, p + offset).
        offsets: (O) vectors of steps in voxels.
        method: `mutex`: mutex watershed over all offsets; neighbors attract, the others repel, the strongest first.
            `watershed`: fragments of a seeded watershed over the mean affinity of neighbors, those joined whose contact
            attracts on average. `waterz`: the same fragments, merged one by one by their mean affinity; 3-D.
        stride: of `mutex`: only every so many voxels along each in-plane axis a repelling pair counts.
        bias: of `mutex`: affinity above which a pair attracts, else it repels; larger splits more.
        threshold: of `waterz` and `watershed`: fragments whose mean affinity is above 1 - threshold are merged; larger
            merges more.
        seed_distance: of `watershed` and `waterz`: voxels along each axis within which there is one seed.
        per_section: of `watershed` and `waterz`: fragments are grown section by section, for anisotropic volumes;
            `watershed` then never joins sections.
        absorb: connected instances of fewer voxels, and what is in none, go to their neighbors along the axes of which
            there are affinities; where there is no larger one, they become background. 0 for not at all.
        min_size: connected instances of fewer voxels become background.
        foreground: probability of foreground, shape (*S); 0 below 0.5. None for none.
        mask: where there is data, shape (*S), bool; 0 elsewhere, and nothing is linked across. None for everywhere.

    Returns:
        Numbers from 1 on of connected instances, 0 for background, shape (*S), int32. `mutex` takes a voxel that no
        neighbor attracts for background. The others take it for border: fragments have none, and when they are merged
        it goes to the nearest one, unless it is wider than 12 voxels, which is background.

    Raises:
        ValueError: another method, shapes that do not agree, or no affinities of the nearest neighbors along all axes,
            which all but `mutex` need; `watershed` section by section does without those between sections.
        ImportError: the package that the method needs is not installed.
        RuntimeError: the package that the method needs cannot go on.

    Reference:
        Wolf et al., The Mutex Watershed, arXiv 1904.12654; Funke et al., arXiv 1709.02974 (waterz).
    """
    _check(affinities, offsets, method, foreground, mask)
    allowed = _both(None if foreground is None else foreground >= 0.5, mask)
    nearest = _nearest(offsets)
    if method == "mutex":
        found = _mutex(affinities, offsets, stride, bias, allowed)
    else:
        apart = method == "watershed" and per_section              # sections need not link
        neighbors = _neighbors(affinities, nearest, offsets, range(affinities.ndim - 1)[-2 if apart else 0 :])
        found = _merged(neighbors, method, threshold, seed_distance, per_section, mask)
    if allowed is not None:
        found = np.where(allowed, found, 0)
    found = connected_components(found, connectivity=1, background=0)   # type: ignore[no-untyped-call]
    if absorb > 0:
        found = _absorbed(affinities, nearest, found, absorb, allowed, mask)
    if min_size > 1:
        found = _drop_small(found, min_size)
    return found.astype(np.int32)


def _check(
    affinities: Array, offsets: Sequence[Sequence[int]], method: str, foreground: Array | None, mask: Array | None
) -> None:
    if method not in get_args(Partition):
        raise ValueError(f"`method` must be one of {get_args(Partition)}, got {method!r}.")
    rank = affinities.ndim - 1
    if len(offsets) != len(affinities) or any(len(offset) != rank for offset in offsets):
        raise ValueError(
            f"`affinities` must have a channel per offset and an axis per step of it, got shape {affinities.shape} for "
            f"the offsets {[list(offset) for offset in offsets]}."
        )
    if method == "waterz" and rank != 3:
        raise ValueError(f"`method` 'waterz' must have volumes, got {rank} axes; take 'mutex'.")
    for name, value in (("foreground", foreground), ("mask", mask)):
        if value is not None and value.shape != affinities.shape[1:]:
            raise ValueError(f"`{name}` must have the shape {affinities.shape[1:]} of an affinity, got {value.shape}.")


def _both(first: Array | None, second: Array | None) -> Array | None:
    if first is None or second is None:
        return second if first is None else first
    both: Array = first & second
    return both


def _mutex(
    affinities: Array, offsets: Sequence[Sequence[int]], stride: int, bias: float, mask: Array | None
) -> Array:
    size = affinities.shape[1:]
    inside = [
        channel for channel, offset in enumerate(offsets)
        if all(abs(step) < length for step, length in zip(offset, size, strict=True))
    ]
    if not inside:
        return np.zeros(size, np.int64)
    steps = [list(offsets[channel]) for channel in inside]
    weights = np.empty((len(inside), *size))                       # float64, the only type that the package takes
    for weight, channel in zip(weights, inside, strict=True):
        np.subtract(affinities[channel], bias, out=weight, dtype=np.float64)
    near = [sum(abs(step) for step in offset) == 1 for offset in steps]
    rank = len(size)
    if mask is not None:                                           # background joins nothing
        for weight, offset in zip(weights, steps, strict=True):
            both = mask & _moved(mask, offset)
            weight[~both] = 0.0
    for weight, is_near in zip(weights, near, strict=True):
        if not is_near:
            np.minimum(weight, 0.0, out=weight)                    # far pairs only repel
    in_plane = [1] * (rank - 2) + [stride] * 2
    strides = [[1] * rank if is_near else in_plane for is_near in near]
    mutex = import_module("mwatershed")
    with _ordinary_errors("mwatershed", affinities.shape):
        found: Array = mutex.agglom(weights, steps, strides=strides)
    return found


def _moved(mask: Array, offset: Sequence[int]) -> Array:
    """The mask at p + offset, False outside."""
    result = np.zeros_like(mask)
    here = tuple(slice(max(0, -step), mask.shape[axis] - max(0, step)) for axis, step in enumerate(offset))
    there = tuple(slice(max(0, step), mask.shape[axis] - max(0, -step)) for axis, step in enumerate(offset))
    result[here] = mask[there]
    return result


def _merged(
    neighbors: Array, method: str, threshold: float, seed_distance: int, per_section: bool, mask: Array | None
) -> Array:
    """Fragments with the membranes between them, merged by the affinities at their contact.

    Membranes are no part of a fragment, but the pairs in them are the evidence against a merge: without them one hole
    in a membrane would be the whole contact of two fragments.
    """
    every = list(range(neighbors.ndim - 1))
    grown = every[-2:] if per_section else every
    joined = every if method == "waterz" else grown
    found = fragments(neighbors, seed_distance, grown, joined, mask)
    found = fill_membranes(found, neighbors, grown, mask)
    if method == "watershed":
        return joined_by_contact(found, neighbors, joined, 1.0 - threshold)
    if not found.any():
        return found
    waterz = import_module("waterz")
    with _silent_output(), _ordinary_errors("waterz", neighbors.shape):
        whole = np.ascontiguousarray(neighbors)
        merged = waterz.agglomerate(whole, [threshold], fragments=found.astype(np.uint64), discretize_queue=256)
        return np.array(next(iter(merged)))


def _absorbed(
    affinities: Array, nearest: Mapping[int, int], found: Array, absorb: int, allowed: Array | None, mask: Array | None
) -> Array:
    """Grow instances of enough voxels into the rest; never from section to section without affinities of these."""
    neighbors = affinities[list(nearest.values())].astype(np.float32, copy=False)
    return flood(_drop_small(found, absorb), neighbors, list(nearest), allowed, mask)


def _nearest(offsets: Sequence[Sequence[int]]) -> dict[int, int]:
    """Axis -> channel of the affinities to the previous neighbor along it, of the axes that have them."""
    steps = [list(offset) for offset in offsets]
    rank = len(steps[0])
    units = {axis: [-int(axis == other) for other in range(rank)] for axis in range(rank)}
    return {axis: steps.index(unit) for axis, unit in units.items() if unit in steps}


def _neighbors(
    affinities: Array, nearest: Mapping[int, int], offsets: Sequence[Sequence[int]], needed: Sequence[int]
) -> Array:
    """Affinities of `nearest`, shape (rank, *S), 0 along an axis that has none; raise where it is needed."""
    rank = affinities.ndim - 1
    for axis in needed:
        if axis not in nearest:
            wanted = [-int(axis == other) for other in range(rank)]
            raise ValueError(
                f"`offsets` must hold {wanted}, the previous neighbor along axis {axis}, got {list(offsets)}; take "
                "'mutex', or for sections that do not link 'watershed' with `per_section`."
            )
    if len(nearest) == rank:
        return affinities[list(nearest.values())].astype(np.float32, copy=False)
    neighbors = np.zeros((rank, *affinities.shape[1:]), np.float32)
    for axis, channel in nearest.items():
        neighbors[axis] = affinities[channel]
    return neighbors


def _drop_small(found: Array, min_size: int) -> Array:
    sizes = np.bincount(found.ravel())
    kept = sizes >= min_size
    kept[0] = False
    numbers = np.cumsum(kept) * kept
    small: Array = numbers[found]
    return small


@contextmanager
def _ordinary_errors(package: str, shape: Sequence[int]) -> Iterator[None]:
    """Turn a panic of compiled code, which no `except Exception` sees, into an error that ends one case only."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(
            f"{package} must be able to partition affinities of shape {tuple(shape)}, got its panic {str(error)!r}; "
            "take another `method`."
        ) from error


@contextmanager
def _silent_output() -> Iterator[None]:
    """Keep what compiled code prints, to the file as well as to Python's buffer of it, away from the user."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            os.dup2(nothing.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
