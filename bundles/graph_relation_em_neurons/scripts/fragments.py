# SPDX-License-Identifier: Apache-2.0
"""Fragments: pieces of an image that surely belong to one instance each, from the affinities of neighbors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.segmentation import watershed

__all__ = ["fill_membranes", "flood", "fragments", "joined_by_contact"]

Array = NDArray[Any]
Slices = tuple[slice, ...]
_ATTRACTS = 0.5                                                    # affinity from which two neighbors attract
_LEAST = 20                                                        # voxels of a fragment among weak affinities
_LEAST_CLEAR, _CLEAR = 4, 0.05                                     # voxels of one whose affinity to all others is lower
_MEMBRANE = 6                                                      # half the width of the widest membrane, voxels


def fragments(
    neighbors: Array, seed_distance: int, axes: Sequence[int], joined: Sequence[int], mask: Array | None = None
) -> Array:
    """Find pieces of an image in which all voxels are connected by neighbors that attract.

    A watershed from where it is farthest from a border is cut wherever no path of attracting neighbors is left: two
    instances that touch have no voxel of border between them, only pairs. Small pieces go to the one that attracts them
    most. What is left of them is border, which is part of no fragment.

    Args:
        neighbors: affinities to the previous neighbor along each axis, shape (rank, *S), float32. Pairs that leave the
            image do not count, whatever is stored for them.
        seed_distance: voxels along each axis within which there is one seed.
        axes: along which regions are grown, the last ones: all of them, or those in the plane of a section.
        joined: axes along which small pieces may go to another.
        mask: where there is an image, shape (*S); pairs that leave it do not count. None for everywhere.

    Returns:
        Numbers of fragments, 0 for border and outside the mask; shape (*S), int32.
    """
    pieces = np.zeros(neighbors.shape[1:], np.int32)
    count = 0
    for plane in _planes(neighbors.shape[1:], axes):
        near = neighbors[(list(axes), *plane)]
        data = None if mask is None else mask[plane]
        regions = _regions(_mean_affinity(near, range(near.ndim - 1), data), seed_distance, data)
        found = _cut(regions, near)
        pieces[plane] = np.where(found > 0, found + count, 0)
        count += int(found.max(initial=0))
    pieces[_is_alone(neighbors, joined)] = 0                       # at once, as they may be most of the voxels
    return _without_small(pieces, neighbors, joined)


def _planes(size: Sequence[int], axes: Sequence[int]) -> Iterator[Slices | tuple[int, ...]]:
    """Index of each part that only the last `axes` span."""
    return iter(np.ndindex(*size[: len(size) - len(axes)]))


def _pair(rank: int, axis: int) -> tuple[Slices, Slices]:
    """Where the voxels of all pairs along an axis lie: those that the affinities are stored at, and their partners."""
    here = tuple(slice(1, None) if axis == other else slice(None) for other in range(rank))
    before = tuple(slice(None, -1) if axis == other else slice(None) for other in range(rank))
    return here, before


def _mean_affinity(neighbors: Array, axes: Iterable[int], mask: Array | None) -> Array:
    """Mean over the pairs that each voxel is in, on both sides; 0 where there is none. Shape (*S), float32."""
    total = np.zeros(neighbors.shape[1:], np.float32)
    count = np.zeros(neighbors.shape[1:], np.uint8)
    for axis, affinity in zip(axes, neighbors, strict=True):
        here, before = _pair(total.ndim, axis)
        there = affinity[here]
        is_pair = np.ones((), bool) if mask is None else mask[here] & mask[before]
        for side in (here, before):
            total[side] += np.where(is_pair, there, 0.0)
            count[side] += is_pair.astype(np.uint8)
    mean: Array = total / np.maximum(count, 1)
    return mean


def _regions(affinity: Array, seed_distance: int, mask: Array | None) -> Array:
    """Watershed over the mean affinities, from where it is farthest from a border; 0 outside the mask only."""
    core = affinity > _ATTRACTS
    if mask is not None:
        core &= mask
    inside: Array = np.ones(core.shape, np.int32) if mask is None else mask.astype(np.int32)
    if core.all() or not core.any():                               # no border, or nothing else
        return inside
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(core).astype(np.float32), 1.0)   # fewer seeds
    highest = ndimage.maximum_filter(distance, 2 * seed_distance + 1)
    seeds = ndimage.label((highest == distance) & core, np.ones([3] * core.ndim))[0]
    if not seeds.any():
        return inside
    del core, distance, highest
    found: Array = watershed(1.0 - affinity, seeds, mask=mask)   # type: ignore[no-untyped-call]
    found = found.astype(np.int32, copy=False)
    found[(found == 0) & (inside > 0)] = found.max() + 1           # parts of the mask without a seed
    return found


def _cut(regions: Array, neighbors: Array) -> Array:
    """Number the components of each region along pairs that attract; 0 stays.

    Runs of voxels along the last axis are found first: far fewer than voxels, they are the nodes of the graph.
    """
    rank = regions.ndim

    def attracts(axis: int) -> Array:
        here, before = _pair(rank, axis)
        linked: Array = (neighbors[axis][here] >= _ATTRACTS) & (regions[here] == regions[before]) & (regions[here] > 0)
        return linked

    starts = np.ones(regions.shape, bool)
    starts[_pair(rank, rank - 1)[0]] = ~attracts(rank - 1)
    runs = np.cumsum(starts.ravel(), dtype=np.int32).reshape(regions.shape) - 1
    ends: list[Array] = []
    for axis in range(rank - 1):
        here, before = _pair(rank, axis)
        linked = attracts(axis)
        pairs = np.stack([runs[here][linked], runs[before][linked]])
        changes = (pairs[:, 1:] != pairs[:, :-1]).any(0)           # a run meets another one at many voxels
        ends.append(pairs[:, np.append(True, changes)] if pairs.size else pairs)
    first, second = np.concatenate(ends, 1) if ends else np.zeros((2, 0), np.int32)
    found: Array = np.where(regions > 0, _components(first, second, int(starts.sum()))[runs] + 1, 0)
    return found


def _is_alone(neighbors: Array, axes: Sequence[int]) -> Array:
    """Where no neighbor attracts."""
    alone = np.ones(neighbors.shape[1:], bool)
    for axis in axes:
        here, before = _pair(alone.ndim, axis)
        attracts = neighbors[axis][here] >= _ATTRACTS
        for side in (here, before):
            alone[side] &= ~attracts
    return alone


def _components(first: Array, second: Array, count: int) -> Array:
    """Number of the component of each of `count` nodes, joined by pairs of `first` and `second`, from 0 on."""
    graph = coo_matrix((np.ones(len(first), bool), (first, second)), shape=(count, count))
    numbers: Array = connected_components(graph, directed=False)[1]
    return numbers


def _without_small(pieces: Array, neighbors: Array, axes: Sequence[int]) -> Array:
    """Give small pieces to the one that attracts them most; those that nothing attracts become border, unless clear."""
    while (taken := _taken(pieces, neighbors, axes)) is not None:  # two small ones may have become a small one
        pieces = taken[pieces]
    return _kept(pieces, neighbors, axes)


def _taken(pieces: Array, neighbors: Array, axes: Sequence[int]) -> Array | None:
    """New number of each piece, where a small one has that of what attracts it most; None where nothing does."""
    count = int(pieces.max(initial=0)) + 1
    sizes = np.bincount(pieces.ravel(), minlength=count)
    first, second, mean = _contacts(pieces, neighbors, axes)
    small, other = np.concatenate([first, second]), np.concatenate([second, first])
    mean = np.concatenate([mean, mean])
    chosen = (sizes[small] < _LEAST) & (mean >= _ATTRACTS)
    if not chosen.any():
        return None
    small, other, mean = small[chosen], other[chosen], mean[chosen]
    order = np.lexsort((sizes[other], mean, small))                # the strongest, and largest, of each last
    last = order[np.append(np.diff(small[order]) != 0, True)]
    numbers = _components(small[last], other[last], count)
    return np.where(numbers == numbers[0], 0, numbers + 1)         # 0 has no contacts, so it is alone


def _kept(pieces: Array, neighbors: Array, axes: Sequence[int]) -> Array:
    """Number the pieces that are large enough, or clearly apart from all around them, from 1 on."""
    count = int(pieces.max(initial=0)) + 1
    sizes = np.bincount(pieces.ravel(), minlength=count)
    total, pairs = np.zeros(count), np.zeros(count, np.int64)
    for axis in axes:
        here, before = _pair(pieces.ndim, axis)
        touching = pieces[here] != pieces[before]
        for side in (here, before):
            ends = pieces[side][touching]
            total += np.bincount(ends, neighbors[axis][here][touching], count)
            pairs += np.bincount(ends, minlength=count)
    kept = (sizes >= _LEAST) | ((sizes >= _LEAST_CLEAR) & (total < _CLEAR * np.maximum(pairs, 1)))
    kept[0] = False
    numbers: Array = (np.cumsum(kept) * kept).astype(np.int32)[pieces]
    return numbers


def _contacts(pieces: Array, neighbors: Array, axes: Sequence[int]) -> tuple[Array, Array, Array]:
    """Which pieces touch: both numbers, the lower one first, and the mean affinity of the pairs between them."""
    count = int(pieces.max(initial=0)) + 1
    keys, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for axis in axes:
        here, before = _pair(pieces.ndim, axis)
        touching = (pieces[here] != pieces[before]) & (pieces[here] > 0) & (pieces[before] > 0)
        one, other = pieces[here][touching].astype(np.int64), pieces[before][touching].astype(np.int64)
        keys.append(np.minimum(one, other) * count + np.maximum(one, other))
        values.append(neighbors[axis][here][touching])
    found, index, pairs = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
    mean = np.bincount(index, np.concatenate(values), len(found)) / pairs
    return found // count, found % count, mean


def joined_by_contact(regions: Array, neighbors: Array, axes: Sequence[int], least: float) -> Array:
    """Make one of regions whose pairs have a mean affinity of at least `least`; 0 stays.

    Args:
        regions: numbers, shape (*S), int32.
        neighbors: as in `fragments`.
        axes: along which regions touch.
        least: range [0, 1].

    Returns:
        Numbers of shape (*S), int32.
    """
    count = int(regions.max(initial=0)) + 1
    first, second, mean = _contacts(regions, neighbors, axes)
    chosen = mean >= least
    numbers = _components(first[chosen], second[chosen], count).astype(np.int32) + 1
    return np.where(regions > 0, numbers[regions], 0)


def fill_membranes(numbers: Array, neighbors: Array, axes: Sequence[int], mask: Array | None = None) -> Array:
    """Share out what lies in no fragment: to the one beside, but for what is wider than a membrane, which stays 0.

    A membrane is what no ball with a radius of 6 voxels fits into.

    Args:
        numbers: fragments, 0 for none, shape (*S).
        neighbors: as in `fragments`.
        axes: within which membranes are seen and filled, the last ones: all of them, or those of a section.
        mask: as in `fragments`.

    Returns:
        Numbers of shape (*S), int32.
    """
    result = np.zeros_like(numbers, dtype=np.int32)
    for plane in _planes(numbers.shape, axes):
        data = None if mask is None else mask[plane]
        empty = numbers[plane] == 0
        if data is not None:
            empty &= data
        reached = ~empty | ~_wide(empty)
        if data is not None:
            reached &= data
        near = neighbors[(list(axes), *plane)]
        result[plane] = flood(numbers[plane], near, range(len(axes)), reached, data)
    return result


def _wide(empty: Array) -> Array:
    """Where balls fit into what is empty."""
    if not empty.any() or empty.all():
        return empty
    centers: Array = ndimage.distance_transform_edt(empty) > _MEMBRANE
    if not centers.any():
        return centers
    wide: Array = empty & (ndimage.distance_transform_edt(~centers) <= _MEMBRANE)
    return wide


def flood(
    numbers: Array, affinities: Array, axes: Sequence[int], mask: Array | None = None, data: Array | None = None
) -> Array:
    """Grow numbers into what is 0, first where the mean affinity of neighbors is high.

    Args:
        numbers: shape (*S).
        affinities: to the previous neighbor along each of the axes, shape (A, *S).
        axes: the only ones along which numbers grow.
        mask: where to grow, shape (*S); None for everywhere.
        data: where there is an image, shape (*S); pairs that leave it do not count. None for everywhere.

    Returns:
        Numbers of shape (*S), int32.
    """
    reach = np.zeros([3] * numbers.ndim, bool)
    for axis in axes:
        reach[tuple(slice(None) if axis == other else 1 for other in range(numbers.ndim))] = True
    border = 1.0 - _mean_affinity(affinities, axes, data)
    grown: Array = watershed(border, numbers, connectivity=reach, mask=mask)   # type: ignore[no-untyped-call]
    return grown.astype(np.int32, copy=False)
