# SPDX-License-Identifier: Apache-2.0
"""What electron microscopy shows of neuropil: membranes, and organelles inside that look like them.

Gray values are 0 to 255, dark where the stain is. Nothing here changes which voxel belongs to which neurite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from medkd.phantoms.canvas import Array, Points, crop, smooth_field, tube
from medkd.phantoms.neuropil import GLIA, MOST_BEND, Neurite, Tissue

__all__ = ["paint_tissue"]

_WIDTH = 4.5             # nm; deviation of a membrane's darkness across it, so that it is about 10 nm wide
_CLEAR = 22.0            # nm that organelles keep off the middle of the gap between two cells
_SYNAPSES = 6.0          # per cubic micrometer
_MANY = 4096             # spots that are stamped at once: 60 MB


class _Contact(NamedTuple):
    """A synapse: where, in nm, from and to which neurite, and its radius in nm."""

    place: Points
    before: int
    behind: int
    radius: float


def paint_tissue(
    rng: Generator, tissue: Tissue, neurites: Sequence[Neurite], spacing: Sequence[float]
) -> Array:
    """Paint the gray values of a block of neuropil, without noise.

    Args:
        rng: draws what is not given.
        tissue: the block divided among neurites. Shape (Z, Y, X).
        neurites: their skeletons.
        spacing: nm per voxel and axis. A surface is smeared over the voxel along its normal, so that a membrane in
            the plane of a thick section is wide and faint.

    Returns:
        Gray values, shape (Z, Y, X), float32, about 40 to 190.
    """
    scene = _Scene(rng, tissue, neurites, spacing)
    scene.paint_cytoplasm()
    scene.paint_reticulum()
    scene.paint_microtubules()
    scene.paint_mitochondria()
    contacts = scene.find_contacts()
    scene.paint_vesicles(contacts)
    scene.paint_membranes()
    scene.paint_densities(contacts)
    return scene.gray


class _Scene:
    """Gray values in the making; painted from the inside of the cells out."""

    def __init__(
        self, rng: Generator, tissue: Tissue, neurites: Sequence[Neurite], spacing: Sequence[float]
    ) -> None:
        self.rng, self.tissue, self.neurites = rng, tissue, neurites
        self.shape, self.spacing = tissue.owner.shape, np.array(spacing, np.float64)
        self.sizes = np.bincount(tissue.owner.ravel() - GLIA, minlength=len(neurites) + 1)[-GLIA:]   # voxels by neurite
        self.wobble = self.field(90.0)
        self.dark = float(rng.uniform(35, 62))                                   # of membranes
        self.shades = rng.normal(rng.uniform(150, 180), rng.uniform(5, 16), len(neurites) + 1)
        self.shades[rng.random(len(neurites) + 1) < 0.1] -= rng.uniform(25, 50)  # dark cells; the last is glia
        self.gray: Array = self.shades.astype(np.float32)[tissue.owner]

    def field(self, wavelength: float) -> Array:
        return smooth_field(self.rng, self.shape, self.spacing.tolist(), wavelength)

    def paint_cytoplasm(self) -> None:
        """Granules, and slow changes along a cell."""
        grain = ndimage.gaussian_filter(self.rng.standard_normal(self.shape, dtype=np.float32), 9.0 / self.spacing)
        self.gray += self.rng.uniform(7, 12) * grain / grain.std() + 4 * self.field(200.0)

    def paint_reticulum(self) -> None:
        """Bent sheets that end inside the cell: thinner and paler than a membrane between cells."""
        sheet, where = self.field(100.0), self.field(160.0)
        share = np.exp(-0.5 * (sheet / 0.13) ** 2) * np.clip(2 * where - 1.2, 0, 1)
        self.gray -= 48 * share * (self.tissue.depth > _CLEAR)

    def paint_microtubules(self) -> None:
        """Thin dark lines along the processes."""
        spots = [np.empty((0, 3))]
        for number, neurite in enumerate(self.neurites):
            line, radius = neurite.lines[0], float(np.median(neurite.radii[0]))
            if self.rng.random() < 0.4:
                continue
            share = np.arange(0, len(line) - 1, 0.12)                            # every 13 nm
            start = share.astype(int)
            path = line[start] + (share - start)[:, None] * (line[start + 1] - line[start])
            for _ in range(int(np.clip(radius / 12, 1, 14))):
                spots.append(self.inside(self.unbend(path + self.rng.normal(0, 0.45 * radius, 3)), number, 18.0))
        where, distance = self.stamp(np.vstack(spots), 24.0)
        self.gray[where] -= 42 * np.exp(-0.5 * (distance / 8) ** 2)

    def paint_mitochondria(self) -> None:
        """Bodies with two membranes along wide stretches of the processes."""
        for number, neurite in enumerate(self.neurites):
            for line, radii in zip(neurite.lines, neurite.radii, strict=True):
                start = 0
                while start + 2 < len(line):
                    part = slice(start, start + int(self.rng.integers(3, 7)))
                    wide = float(radii[part].min())
                    start = part.stop
                    if wide > 45 and self.rng.random() < 0.4:
                        self.paint_mitochondrion(number, line[part], min(wide * self.rng.uniform(0.5, 0.8), 140.0))

    def paint_mitochondrion(self, number: int, line: Points, radius: float) -> None:
        """One of them: outer membrane, and cristae as stripes, as far as sections let them be seen."""
        solid = tube(line, np.full(len(line), radius))
        where = self.crop(solid.low - MOST_BEND, solid.high + MOST_BEND)
        points = self.tissue.points[(slice(None), *where)]
        inside = self.tissue.owner[where] == number
        distance = np.maximum(solid.distance(points) + 7 * self.wobble[where], 26 - self.tissue.depth[where])
        distance[~inside] = 99.0
        across, pitch = self.rng.standard_normal(3), self.rng.uniform(34, 55)     # cristae: normal, distance in nm
        across /= np.linalg.norm(across)
        seen = np.exp(-((2 * np.pi * across * self.spacing / pitch) ** 2).sum() / 24)
        along = np.tensordot(across.astype(np.float32), points, axes=1) + 16 * self.wobble[where]
        stripes = 26 * seen * np.cos(along * np.float32(2 * np.pi / pitch)) * (distance < -16)
        shade = self.shades[number] - self.rng.uniform(35, 65) + stripes
        gray = self.gray[where]
        gray += np.clip(0.5 - distance / 8, 0, 1) * (shade - gray)
        skin = np.exp(-0.5 * ((distance + 2) / _WIDTH) ** 2) + 0.45 * np.exp(-0.5 * ((distance + 17) / _WIDTH) ** 2)
        gray += 0.85 * skin * (self.dark + 15 - gray)

    def find_contacts(self) -> list[_Contact]:
        """Choose places on membranes between two neurites; the larger one sends."""
        count = 1 + self.rng.poisson(_SYNAPSES * 1e-9 * float(np.prod(self.shape * self.spacing)))
        places = self.rng.integers(0, self.shape, (400 * count, 3))
        places = places[self.tissue.depth[tuple(places.T)] < 5]
        contacts: list[_Contact] = []
        for place in places:
            near = tuple(slice(max(0, at - r), at + r + 1) for at, r in zip(place, (1, 3, 3), strict=True))
            owners, voxels = np.unique(self.tissue.owner[near], return_counts=True)
            if len(owners) == 2 and owners[0] != GLIA and voxels.min() > 0.25 * voxels.sum():
                before, behind = owners[np.argsort(-self.sizes[owners])]
                radius = float(self.rng.uniform(60, 110))
                contacts.append(_Contact(place * self.spacing, int(before), int(behind), radius))
            if len(contacts) == count:
                break
        return contacts

    def paint_vesicles(self, contacts: Sequence[_Contact]) -> None:
        """Clear bubbles of 40 nm with a dark skin: crowds at synapses, a few in other places."""
        spots = [np.empty((0, 3))]
        for contact in contacts:
            cloud = contact.place + self.rng.normal(0, 1.1 * contact.radius, (int(self.rng.integers(60, 200)), 3))
            spots.append(self.inside(cloud, contact.before, _CLEAR + 4))
        for number, neurite in enumerate(self.neurites):
            if self.rng.random() < 0.25:
                line = neurite.lines[0]
                cloud = self.unbend(line[self.rng.integers(len(line), size=20)]) + self.rng.normal(0, 60, (20, 3))
                spots.append(self.inside(cloud, number, _CLEAR + 4))
        crowd = np.vstack(spots)
        _, first = np.unique(np.floor(crowd / 34), axis=0, return_index=True)     # they do not lie in each other
        where, distance = self.stamp(crowd[first], 30.0)
        light = 14 * np.clip(1.4 - distance / 12, 0, 1)
        self.gray[where] += light - 50 * np.exp(-0.5 * ((distance - 17) / _WIDTH) ** 2)

    def paint_membranes(self) -> None:
        """Membranes on both sides of a gap of varied width, weak in places."""
        gap = np.clip(2.5 + 3.5 * self.field(120.0), 0, 9)                        # nm from its middle to a membrane
        strength = 1 - 0.85 * np.clip(1.6 * (self.field(65.0) - 1.1), 0, 1)
        smear = np.tensordot((self.spacing**2 / 12).astype(np.float32), self.tissue.normal, axes=1)   # nm^2
        offset = self.tissue.depth - gap - 3.5
        spread = _WIDTH**2 + smear + 16 * (offset < 0)                            # the gap itself is gray
        line = np.exp(-0.5 * offset**2 / spread) * np.sqrt((_WIDTH**2 + 25) / (_WIDTH**2 + smear + 25))
        self.gray += strength * line * (self.dark - self.gray)

    def paint_densities(self, contacts: Sequence[_Contact]) -> None:
        """Dark patches at synapses, thick behind the membrane, thin before it."""
        for place, before, behind, radius in contacts:
            where = self.crop(place - radius, place + radius)
            grid = [np.arange(part.start, part.stop) * nm for part, nm in zip(where, self.spacing, strict=True)]
            away = sum(np.square(np.ix_(*[at - p for at, p in zip(grid, place, strict=True)])[k]) for k in range(3))
            owner = self.tissue.owner[where]
            thick = np.where(owner == behind, 15.0, 7.0)                          # nm
            share = np.exp(-0.5 * (np.maximum(self.tissue.depth[where] - 4, 0) / thick) ** 2)
            share *= 0.9 * np.clip((radius - np.sqrt(away)) / 15, 0, 1) * np.isin(owner, (before, behind))
            gray = self.gray[where]
            gray += share * (self.dark - 12 - gray)

    def crop(self, low: ArrayLike, high: ArrayLike) -> tuple[slice, ...]:
        """Voxels of a box in nm."""
        return crop(np.asarray(low) / self.spacing, np.ceil(np.asarray(high) / self.spacing) + 1, self.shape)

    def unbend(self, points: Points) -> Points:
        """Find where points of the bent space lie in the block, nearly. Shape (N, 3), in nm, as what it returns."""
        at = points
        for _ in range(2):
            index = np.clip(np.rint(at / self.spacing), 0, np.array(self.shape) - 1).astype(int)
            at = points - (self.tissue.points[(slice(None), *index.T)].T - index * self.spacing)
        return at

    def inside(self, points: Points, number: int, depth: float) -> Points:
        """Keep the points that lie in a neurite, at least `depth` nm deep. Shape (N, 3), in nm."""
        index = np.rint(points / self.spacing).astype(int)
        held = ((index >= 0) & (index < self.shape)).all(1)
        points, index = points[held], index[held]
        deep = (self.tissue.owner[tuple(index.T)] == number) & (self.tissue.depth[tuple(index.T)] > depth)
        return np.asarray(points[deep])

    def stamp(self, spots: Points, reach: float) -> tuple[tuple[NDArray[np.intp], ...], Array]:
        """Find all voxels within `reach` nm of a spot, each once, and their distance to the nearest one in nm."""
        nearest = np.full(self.shape, np.inf, np.float32)
        spans = [np.arange(-int(reach // nm) - 1, int(reach // nm) + 2) for nm in self.spacing]
        steps = np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 3)
        for start in range(0, len(spots), _MANY):
            some = spots[start : start + _MANY, None]
            index = np.rint(some / self.spacing).astype(int) + steps              # (N, voxels, 3)
            away = np.maximum(np.abs(index * self.spacing - some) - self.spacing / 4, 0)   # voxels are thick
            squared = np.einsum("nva,nva->nv", away, away)
            near = (squared < reach**2) & (index >= 0).all(-1) & (index < self.shape).all(-1)
            np.minimum.at(nearest, tuple(index[near].T), np.sqrt(squared[near]).astype(np.float32))
        where = np.nonzero(nearest < reach)
        return where, nearest[where]
