# SPDX-License-Identifier: Apache-2.0
"""Solids with signed distances in mm, and the voxel canvas they are painted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "Canvas", "Points", "Solid", "carve", "crop", "ellipsoid", "join", "smooth_field", "tube"]

Array = NDArray[np.float32]
Points = NDArray[np.float64]           # (N, axes), or one of them
Distance = Callable[[Array], Array]   # points (3, *S) in mm -> signed distance (*S) in mm, negative inside

_REACH = 22.0                         # mm that warp, wobble and soft edges may move a surface


class Solid(NamedTuple):
    """A shape: the box that holds it, in mm, and its signed distance."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    distance: Distance


def ellipsoid(center: ArrayLike, radii: ArrayLike) -> Solid:
    """Ellipsoid along the axes; its distance is exact on the surface and near it."""
    middle, size = np.asarray(center, np.float64), np.asarray(radii, np.float64)
    c, r = (v.astype(np.float32)[:, None, None, None] for v in (middle, size))
    tiny = np.float32((1e-6 / size.min()) ** 2)   # the middle gets -(smallest radius), not 0 / 0

    def distance(points: Array) -> Array:
        scaled = (points - c) / r
        near = np.sqrt((scaled**2).sum(0)) + 1e-6
        return np.asarray(near * (near - 1) / np.sqrt(((scaled / r) ** 2).sum(0) + tiny))

    return Solid(middle - size, middle + size, distance)


def tube(line: ArrayLike, radii: ArrayLike, height: float = 0.0) -> Solid:
    """Capsules along a polyline with a radius per point; `height`, in mm, makes each a sheet along z."""
    nodes, size = np.asarray(line, np.float32), np.asarray(radii, np.float32)

    def distance(points: Array) -> Array:
        nearest = np.full(points.shape[1:], np.inf, np.float32)
        for a, b, at_a, at_b in zip(nodes[:-1], nodes[1:], size[:-1], size[1:], strict=True):
            offset = points - a[:, None, None, None]
            share = np.clip(np.tensordot((b - a) / ((b - a) @ (b - a)), offset, axes=1), 0, 1)
            offset -= share * (b - a)[:, None, None, None]
            if height:
                offset[2] = np.maximum(np.abs(offset[2]) - height, 0)
            nearest = np.minimum(nearest, np.sqrt((offset**2).sum(0)) - at_a - (at_b - at_a) * share)
        return nearest

    margin = float(size.max()) + np.array([0.0, 0.0, height])
    return Solid(nodes.min(0) - margin, nodes.max(0) + margin, distance)


def join(a: Solid, b: Solid, blend: float = 12.0) -> Solid:
    """Union with a fillet of `blend` mm."""

    def distance(points: Array) -> Array:
        one, two = a.distance(points), b.distance(points)
        return np.asarray(np.minimum(one, two) - np.maximum(blend - np.abs(one - two), 0) ** 2 / (4 * blend))

    return Solid(np.minimum(a.low, b.low), np.maximum(a.high, b.high), distance)


def carve(a: Solid, b: Solid) -> Solid:
    """Take `b` out of `a`."""
    return Solid(a.low, a.high, lambda points: np.maximum(a.distance(points), -b.distance(points)))


def crop(low: ArrayLike, high: ArrayLike, shape: Sequence[int]) -> tuple[slice, ...]:
    """Voxels of a grid of `shape` from `low` to `high`, in voxels, both rounded outwards."""
    first = np.clip(np.floor(low), 0, shape).astype(int)
    last = np.clip(np.ceil(high) + 1, 0, shape).astype(int)
    return tuple(map(slice, first.tolist(), last.tolist()))


def smooth_field(rng: Generator, shape: Sequence[int], steps: Sequence[float], wavelength: float) -> Array:
    """Draw a smooth random field of zero mean and unit deviation; `steps` and `wavelength` in mm."""
    knots = [math.ceil(n * step / wavelength) + 4 for n, step in zip(shape, steps, strict=True)]
    field = rng.standard_normal(knots).astype(np.float32)
    for axis, (n, step) in enumerate(zip(shape, steps, strict=True)):
        at = np.arange(n)[:, None] * step / wavelength + 1.5
        weight = np.exp(-0.5 * ((at - np.arange(knots[axis])) / 0.6) ** 2).astype(np.float32)
        field = np.moveaxis(np.tensordot(weight, field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray((field - field.mean()) / field.std())


class Canvas:
    """Image and label on one voxel grid, painted solid by solid in the patient's coordinates.

    Args:
        rng: draws the fields that bend all solids.
        shape: voxels per axis.
        to_patient: affine from voxel index to the patient's mm, (4, 4).

    Attributes:
        hu: the image, float32; starts as air.
        label: uint8, starts as 0.
        points: where each voxel lies in the patient, in mm, slightly warped. Shape (3, *shape).
        wall: signed distance to the inside of the body wall, in mm; whoever draws the body sets it.
        wobble: smooth field of unit deviation that `paint` bends surfaces by.
    """

    def __init__(self, rng: Generator, shape: Sequence[int], to_patient: NDArray[np.float64]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.to_patient = to_patient
        self.steps = np.linalg.norm(to_patient[:3, :3], axis=0)   # mm per voxel
        self.edge = float(self.steps.mean())   # mm over which a surface fades: partial volume
        self.wobble = self.field(rng, 24.0)
        index = np.indices(self.shape, dtype=np.float32).reshape(3, -1)
        points = to_patient[:3, :3].astype(np.float32) @ index + to_patient[:3, 3:].astype(np.float32)
        warp = np.stack([self.field(rng, 60.0) for _ in range(3)])
        self.points: Array = points.reshape(3, *self.shape) + 3.0 * warp
        self.hu: Array = np.full(self.shape, -1000.0, np.float32)
        self.label = np.zeros(self.shape, np.uint8)
        self.wall: Array = self.hu

    def field(self, rng: Generator, wavelength: float) -> Array:
        """Draw a smooth random field over the whole grid; `wavelength` in mm."""
        return smooth_field(rng, self.shape, self.steps.tolist(), wavelength)

    def blend(self, distance: Array, hu: float | Array, where: Any = ..., soft: float = 0.0) -> None:
        """Mix `hu` in where `distance`, in mm, is negative; the edge is `soft` mm softer than partial volume."""
        share = np.clip(0.5 - distance / (self.edge + soft), 0.0, 1.0)
        self.hu[where] += share * (hu - self.hu[where])

    def paint(
        self, solid: Solid, hu: float | Array, label: int | None = 0, wobble: float = 0.0,
        inside: Array | None = None, soft: float = 0.0,
    ) -> None:
        """Paint a solid over what is there.

        Args:
            solid: the shape.
            hu: one value, or one per voxel of the canvas.
            label: of the voxels inside; None keeps what they have.
            wobble: mm by which `self.wobble` bends the surface.
            inside: signed distance, in mm, that holds the solid inside another; None for none.
            soft: mm by which the edge is softer than partial volume.
        """
        where = self._crop(solid)
        distance = solid.distance(self.points[(slice(None), *where)]) + wobble * self.wobble[where]
        if inside is not None:
            distance = np.maximum(distance, inside[where])
        self.blend(distance, hu[where] if isinstance(hu, np.ndarray) else hu, where, soft)
        if label is not None:
            self.label[where][distance < 0] = label

    def _crop(self, solid: Solid) -> tuple[slice, ...]:
        from_patient = np.linalg.inv(self.to_patient[:3, :3])
        middle = from_patient @ ((solid.low + solid.high) / 2 - self.to_patient[:3, 3])
        reach = np.abs(from_patient) @ ((solid.high - solid.low) / 2 + _REACH)
        return crop(middle - reach, middle + reach, self.shape)
