# SPDX-License-Identifier: Apache-2.0
"""Shapes of neuropil: processes with branches and swellings that fill space, and how deep each voxel lies in its own.

Every process is a tree of tubes. A voxel belongs to the process whose surface is nearest, measured with a sign, so
that neighbors press each other flat and thin processes stay round; where no tube is near, glia fills the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from medkd.phantoms.canvas import Array, Points, smooth_field, tube

__all__ = ["GLIA", "MOST_BEND", "Neurite", "Tissue", "grow_neurites", "partition"]

GLIA = -1                # owner of the voxels that no neurite is near to
_PAD = 120.0             # nm around the block in which processes are grown too
_STEP = 110.0            # nm between two points of a skeleton
_LENGTH = 68e-6          # nm of skeleton per nm^3
_REACH = 75.0            # nm beyond the surface of a tube up to which its distance is computed
_FAR = -130.0            # nm; the depth where nothing was computed
MOST_BEND = 48.0         # nm that space is bent by at most
_STRETCH = 4             # steps of a skeleton whose distances are computed at once
_COARSE = 15.0           # nm between the points where distances are computed

Box = tuple[Points, Points]   # its lowest and its highest corner


class Neurite(NamedTuple):
    """A process: polylines in the bent space of `Tissue.points`, in nm, (n, 3) each, and a radius per point, in nm."""

    lines: tuple[Points, ...]
    radii: tuple[Points, ...]


class Tissue(NamedTuple):
    """Space divided among processes. Shape (Z, Y, X) each, or (3, Z, Y, X).

    Attributes:
        owner: number of the neurite that a voxel belongs to, `GLIA` for none, int32.
        depth: distance to the membrane that divides it from its nearest neighbor, in nm, float32.
        normal: square of the direction cosines of that membrane's normal, float32.
        points: where each voxel lies in the bent space that the skeletons are drawn in, in nm.
    """

    owner: NDArray[np.int32]
    depth: Array
    normal: Array
    points: Array


def grow_neurites(rng: Generator, extent: Sequence[float]) -> list[Neurite]:
    """Draw processes through a block and its surroundings, as many as it takes to fill it; `extent` in nm."""
    low, high = np.full(3, -_PAD), np.asarray(extent, np.float64) + _PAD
    wanted = _LENGTH * float(np.prod(high - low))
    bundle = rng.standard_normal(3)
    neurites: list[Neurite] = []
    nodes, grown = np.empty((0, 3)), 0.0
    while grown < wanted:
        places = rng.uniform(low, high, (8, 3))
        gaps = np.linalg.norm(places[:, None] - nodes, axis=2).min(1, initial=np.inf)   # (8,)
        start = places[gaps.argmax()]
        heading = rng.standard_normal(3) + (bundle if rng.random() < 0.4 else 0.0)
        neurite = _grow_tree(rng, start, heading, (low, high))
        neurites.append(neurite)
        nodes = np.vstack([nodes, *neurite.lines])
        grown += sum(float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum()) for line in neurite.lines)
    return neurites


def _grow_tree(rng: Generator, start: Points, heading: Points, box: Box) -> Neurite:
    """Grow one process from `start` both ways until it leaves the box or, seldom, ends; then its branches."""
    radius = float(np.clip(rng.lognormal(np.log(50.0), 0.65), 20.0, 260.0))
    ways = [_grow_line(rng, start, sign * heading, box, 1000 if rng.random() < 0.85 else 4) for sign in (1.0, -1.0)]
    trunk = np.vstack([ways[1][::-1], ways[0][1:]])
    lines, radii = [trunk], [_caliber(rng, radius, len(trunk))]
    for _ in range(rng.integers(0, 3 if radius > 40 else 2)):
        place = int(rng.integers(len(trunk)))
        twig = _grow_line(rng, trunk[place], rng.standard_normal(3), box, int(rng.integers(2, 9)))
        lines.append(twig)
        radii.append(_caliber(rng, max(20.0, radius * rng.uniform(0.4, 0.8)), len(twig)))
    return Neurite(tuple(lines), tuple(radii))


def _grow_line(rng: Generator, start: Points, heading: Points, box: Box, most: int) -> Points:
    """Walk from `start` with slow turns; at most `most` steps, at least one."""
    line, ahead = [start], heading / np.linalg.norm(heading)
    for _ in range(most):
        line.append(line[-1] + _STEP * ahead)
        if (line[-1] < box[0]).any() or (line[-1] > box[1]).any():
            break
        ahead = ahead + rng.normal(0.0, 0.25, 3)
        ahead = ahead / np.linalg.norm(ahead)
    return np.array(line)


def _caliber(rng: Generator, radius: float, count: int) -> Points:
    """Vary a radius along a line: slow changes, and a swelling here and there."""
    size = radius * np.exp(0.22 * rng.standard_normal(count))
    swollen = rng.random(count) < 0.1
    size[swollen] *= rng.uniform(1.4, 2.2, int(swollen.sum()))
    return np.clip(size, 18.0, 300.0)


class _Axis(NamedTuple):
    """Coarse places along one axis, in nm, and the weights that carry values there to all voxels, (n, coarse)."""

    places: Points
    weights: Array


def _coarse_axis(count: int, step: float) -> _Axis:
    fine = np.arange(count, dtype=np.float64) * step
    if step >= _COARSE or count < 3:
        return _Axis(fine, np.eye(count, dtype=np.float32))
    places = np.linspace(0.0, fine[-1], math.ceil(fine[-1] / _COARSE) + 1, dtype=np.float64)
    weights = np.maximum(1 - np.abs(fine[:, None] - places) / places[1], 0)   # the first place is 0
    return _Axis(places, weights.astype(np.float32))


def partition(
    rng: Generator, neurites: Sequence[Neurite], shape: Sequence[int], spacing: Sequence[float]
) -> Tissue:
    """Divide a block of `shape` voxels of `spacing` nm among neurites and glia.

    Distances are computed every 15 nm and interpolated: quick, and a membrane is placed to a fraction of a voxel.
    """
    axes = [_coarse_axis(n, step) for n, step in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*[axis.places for axis in axes], indexing="ij")).astype(np.float32)
    coarse_steps = [float(axis.places[1] - axis.places[0]) for axis in axes]
    coarse = grid.shape[1:]
    warp = np.stack([smooth_field(rng, coarse, coarse_steps, 230.0) for _ in range(3)])
    points = grid + np.clip(24.0 * warp, -MOST_BEND, MOST_BEND)
    rough = [9.0 * smooth_field(rng, coarse, coarse_steps, 60.0) for _ in range(2)]
    best = _upsample(-38.0 + 14.0 * smooth_field(rng, coarse, coarse_steps, 120.0), axes)
    second = np.full(shape, _FAR, np.float32)
    owner = np.full(shape, GLIA, np.int32)
    for number, neurite in enumerate(neurites):
        turn = rng.uniform(0, 2 * np.pi)
        for crop, score in _scores(neurite, points, [axis.places for axis in axes]):
            score += np.cos(turn) * rough[0][crop] + np.sin(turn) * rough[1][crop]
            where, fine = _spread(score, crop, axes)
            _contest((best[where], second[where], owner[where]), fine, number)
    depth, normal = _depth(best - second, spacing)
    return Tissue(owner, depth, normal, np.stack([_upsample(part, axes) for part in points]))


def _scores(
    neurite: Neurite, points: Array, places: Sequence[Points]
) -> Iterator[tuple[tuple[slice, ...], Array]]:
    """Depth in nm under the surface of a neurite, in a crop of the coarse places around each stretch of it."""
    for line, radii in zip(neurite.lines, neurite.radii, strict=True):
        for start in range(0, len(line) - 1, _STRETCH):
            stretch = slice(start, start + _STRETCH + 1)
            reach = radii[stretch].max() + _REACH + MOST_BEND
            low, high = line[stretch].min(0) - reach, line[stretch].max(0) + reach
            spans = [np.searchsorted(at, (a, b)) for at, a, b in zip(places, low, high, strict=True)]
            if all(a < b for a, b in spans):
                crop = tuple(slice(int(a), int(b)) for a, b in spans)
                yield crop, -tube(line[stretch], radii[stretch]).distance(points[(slice(None), *crop)])


def _spread(score: Array, crop: Sequence[slice], axes: Sequence[_Axis]) -> tuple[tuple[slice, ...], Array]:
    """Interpolate a crop of coarse places to the voxels that lie between them."""
    where = []
    for number, (part, axis) in enumerate(zip(crop, axes, strict=True)):
        held = axis.weights[:, part].sum(1) > 1 - 1e-4          # all of a voxel's neighbors are in the crop
        rows = np.flatnonzero(held)
        if not len(rows):
            return (slice(0, 0),) * 3, np.empty((0, 0, 0), np.float32)
        where.append(slice(int(rows[0]), int(rows[-1]) + 1))
        score = np.moveaxis(np.tensordot(axis.weights[where[-1], part], score, axes=(1, number)), 0, number)
    return tuple(where), np.ascontiguousarray(score)


def _upsample(field: Array, axes: Sequence[_Axis]) -> Array:
    return _spread(field, [slice(None)] * 3, axes)[1]


def _contest(held: tuple[Array, Array, NDArray[np.int32]], score: Array, number: int) -> None:
    """Let neurite `number` take the voxels where its score beats the best so far."""
    best, second, owner = held
    np.maximum(second, np.minimum(best, score), out=second, where=owner != number)   # no neighbor of itself
    np.copyto(owner, number, where=score > best)
    np.maximum(best, score, out=best)


def _depth(lead: Array, spacing: Sequence[float]) -> tuple[Array, Array]:
    """Turn the lead of the best score over the second into nm to the membrane, and the normal's squared cosines.

    The lead is folded at the membrane, so the steeper of both sides is its slope.
    """
    slopes = np.empty((3, *lead.shape), np.float32)
    for axis, step in enumerate(spacing):
        ahead = np.abs(np.diff(lead, axis=axis, append=lead.take([-1], axis))) / np.float32(step)
        slopes[axis] = np.maximum(ahead, np.roll(ahead, 1, axis))   # the last is 0, as there is no neighbor
    slopes **= 2
    total = slopes.sum(0)
    normal = slopes / np.maximum(total, 1e-6)
    return lead / np.sqrt(np.maximum(total, 0.3)), normal
