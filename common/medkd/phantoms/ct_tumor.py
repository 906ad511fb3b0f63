# SPDX-License-Identifier: Apache-2.0
"""CT phantom of tumors in liver and kidneys: small, several, of low contrast, with look-alikes without a label.

What makes it hard on purpose: a tumor is darker than its organ by one to three deviations of the noise, and its rim
is soft. Cysts are darker still, round and sharp. Veins without contrast agent and loops of bowel at the organ have the
tumors' HU, and look like them in a single slice: only their length tells. The organ's own HU changes with the time
after the contrast agent, so no range of HU is that of tumors, and any place of the organs may have one.

The abdomen is that of `medkd.phantoms.ct`, whose habitus, contrast phases and oblique grids it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from medkd.phantoms.canvas import Array, Canvas, Points, Solid, ellipsoid, join, tube
from medkd.phantoms.ct import CTPhantom, check_grid, draw_abdomen, scan
from medkd.phantoms.sets import write_set

__all__ = ["TUMOR_LABELS", "ct_tumor_phantom", "write_ct_tumor_phantoms"]

TUMOR_LABELS = {"0": "background", "1": "tumor"}
_LIVER, _LEFT, _RIGHT = 1, 3, 7         # labels of the abdomen
_DIAMETER = (6.0, 30.0)                 # mm of a tumor, small ones more often
_CONTRAST = (10.0, 35.0)                # HU that it is darker than its organ
_SEEN = ((6.0, 16.0), (24.0, 10.0))     # least HU by diameter in mm: a small one is labeled only if it stands out
_CYST = (0.0, 10.0)                     # HU
_DARKEST = 20.0                         # HU; else as dark as cysts, so a native kidney shows no tumor
_NOISE = (7.0, 13.0)                    # HU; of a scan that is made to find tumors
_FAT = (-200.0, -40.0)                  # HU of what a kidney's tumor may bulge into, and bowel lie in
_DEPTH = 0.8                            # least depth of a tumor's middle in the liver, in radii: most of it is left
_TRIES = 40                             # places that are looked at for a spot

Mask = NDArray[np.bool_]


class _Spot(NamedTuple):
    """A ball, in the patient's mm, that others keep off."""

    center: Points
    radius: float


class _Organ(NamedTuple):
    """Liver or kidney: where it is, and its HU."""

    mask: Mask
    depth: Array        # mm to what is no organ
    hu: float
    may_bulge: bool


def ct_tumor_phantom(
    seed: int | Sequence[int], shape: Sequence[int] = (128, 108, 88), spacing: Sequence[float] = (2.25, 2.25, 3.0),
    healthy: bool = False,
) -> CTPhantom:
    """Draw one abdominal CT case with 1 to 5 tumors; the same arguments always give the same case.

    A tumor has a diameter of 6 to 30 mm in a patient as large as `ct_phantom` draws them in the default field of view,
    lobes, and is 10 to 35 HU darker than its organ. Those of the liver lie in it, a third of them at a vessel; those
    of the kidneys may bulge into the fat.

    Args:
        seed: non-negative integer, or several, such as (seed of the set, number of the case).
        shape: voxels per axis, at least 16 each.
        spacing: mm per voxel and axis. A case differs from it by up to 8 %.
        healthy: leave the tumors out; all else stays as it is, noise and look-alikes too.

    Returns:
        Image, label (0 background, 1 tumor) and affine; see `ct_phantom`.

    Raises:
        ValueError: `shape`, `spacing` or `seed` cannot be drawn.

    Example:
        >>> small = {"shape": (48, 40, 32), "spacing": (6.0, 6.0, 8.0)}
        >>> [int(ct_tumor_phantom(0, **small, healthy=healthy).label.max()) for healthy in (False, True)]
        [1, 0]
    """
    check_grid(seed, shape, spacing)
    rng = np.random.default_rng(seed)
    (own,) = rng.spawn(1)               # else the noise of a healthy patient would be another
    canvas, hu, affine = draw_abdomen(rng, shape, spacing, spots=False, right_kidney=_RIGHT)
    organs = _find_organs(canvas, hu)
    canvas.label[:] = 0
    vessels = organs[0].mask & (canvas.hu > hu["liver"] + 15)
    for organ in organs:
        canvas.hu[organ.mask] += 3.0 * canvas.field(rng, 30.0)[organ.mask]
        _draw_bowel_at(canvas, rng, organ, np.any([other.mask for other in organs], axis=0))
    vessels |= _draw_dark_veins(canvas, rng, organs[0])
    spots = [spot for organ in organs for spot in _draw_cysts(canvas, rng, organ)]
    if not healthy:
        _draw_tumors(canvas, own, organs, vessels, spots)
    return CTPhantom(scan(canvas.hu, rng, _NOISE), canvas.label, affine)


def _find_organs(canvas: Canvas, hu: dict[str, float]) -> list[_Organ]:
    """The liver, and the kidneys that the grid has a voxel of."""
    organs = []
    boxes = ndimage.find_objects(canvas.label, _RIGHT)             # a part of the grid, and of the time
    for label, name in ((_LIVER, "liver"), (_LEFT, "kidney"), (_RIGHT, "kidney")):
        box = boxes[label - 1]
        if box is not None:
            depth = np.zeros(canvas.shape, np.float32)
            inner = np.pad(canvas.label[box] == label, 1)
            depth[box] = ndimage.distance_transform_edt(inner, canvas.steps)[1:-1, 1:-1, 1:-1]
            organs.append(_Organ(depth > 0, depth, hu[name], label != _LIVER))
    return organs


def _held(mask: Mask) -> Array:
    """Signed distance that holds a solid inside a mask, as sharp as its voxels."""
    return np.where(mask, np.float32(-99), np.float32(99))


def _fat(canvas: Canvas) -> Mask:
    return np.asarray((canvas.hu > _FAT[0]) & (canvas.hu < _FAT[1]) & (canvas.wall < 0))


def _place(canvas: Canvas, rng: Generator, where: Mask, radius: float, spots: Sequence[_Spot]) -> Points | None:
    """Draw a voxel whose ball keeps off the spots, and give its place in mm; None if none was found."""
    voxels = np.flatnonzero(where)
    for _ in range(_TRIES if voxels.size else 0):
        center = canvas.points.reshape(3, -1)[:, voxels[rng.integers(voxels.size)]].astype(np.float64)
        if all(np.linalg.norm(center - spot.center) > 1.2 * (radius + spot.radius) for spot in spots):
            return np.asarray(center)
    return None


def _walk(rng: Generator, start: Points, steps: int, length: float) -> Points:
    """Points of a line that keeps its way, more or less."""
    way = rng.normal(size=3)
    way /= np.linalg.norm(way)
    return np.vstack([start, start + np.cumsum(length * (way + rng.normal(0, 0.35, (steps, 3))), axis=0)])


def _darker(rng: Generator, organ: _Organ, least: float = _CONTRAST[0]) -> float:
    """HU of a tumor in an organ, or of what looks like one; `least` is the least contrast."""
    most = max(min(_CONTRAST[1], organ.hu - _DARKEST), _CONTRAST[0] + 2)
    return organ.hu - float(rng.uniform(min(least, most - 2), most))


def _draw_bowel_at(canvas: Canvas, rng: Generator, organ: _Organ, kept: Mask) -> None:
    """A loop of bowel that lies in the fat at an organ and has the HU of its tumors."""
    beside = ndimage.binary_dilation(organ.mask, iterations=2) & _fat(canvas)
    start = _place(canvas, rng, beside, 0.0, ())
    if start is None:
        return
    loop = tube(_walk(rng, start, 4, 16.0), rng.uniform(6, 11, 5))
    canvas.paint(loop, _darker(rng, organ), None, wobble=1.5, inside=_held(_fat(canvas) & ~kept))


def _draw_dark_veins(canvas: Canvas, rng: Generator, liver: _Organ) -> Mask:
    """Veins that the contrast agent has not reached: as dark as tumors, but long. Gives where they are."""
    before = canvas.hu.copy()
    for _ in range(rng.integers(2, 5)):
        start = _place(canvas, rng, liver.mask, 0.0, ())
        if start is not None:
            vein = tube(_walk(rng, start, 4, 20.0), np.linspace(rng.uniform(3.5, 5.5), 2.0, 5))
            canvas.paint(vein, _darker(rng, liver), None, wobble=0.8, inside=_held(liver.mask))
    return np.asarray(canvas.hu < before - 5)


def _draw_cysts(canvas: Canvas, rng: Generator, organ: _Organ) -> list[_Spot]:
    """Up to two cysts: water, round, sharp."""
    spots: list[_Spot] = []
    for _ in range(rng.integers(0, 3)):
        radius = float(rng.uniform(4, 12))
        center = _place(canvas, rng, organ.mask, radius, spots)
        if center is not None:
            cyst = ellipsoid(center, radius * rng.uniform(0.9, 1.1, 3))
            inside = organ.mask | _fat(canvas) if organ.may_bulge else organ.mask
            canvas.paint(cyst, float(rng.uniform(*_CYST)), None, inside=_held(inside))
            spots.append(_Spot(center, radius))
    return spots


def _draw_tumors(
    canvas: Canvas, rng: Generator, organs: Sequence[_Organ], vessels: Mask, spots: Sequence[_Spot]
) -> None:
    """One to five tumors with their label, most of them in the liver, which is the first of the organs."""
    taken = list(spots)
    organs = [organ for organ in organs if organ is organs[0] or organ.hu > _DARKEST + _CONTRAST[1]]
    to_vessel = ndimage.distance_transform_edt(~vessels, canvas.steps) if vessels.any() else np.zeros(canvas.shape)
    wanted, drawn = int(rng.integers(1, 6)), 0
    for number in range(wanted):
        organ = organs[0] if rng.random() < 0.6 else organs[rng.integers(len(organs))]
        radius = float(np.exp(rng.uniform(*np.log(_DIAMETER)))) / 2
        where = organ.mask if organ.may_bulge else organ.depth >= min(_DEPTH * radius, 0.9 * float(organ.depth.max()))
        near = where & (np.abs(to_vessel - radius) < 3)
        if not organ.may_bulge and rng.random() < 0.33 and near.any():
            where = near
        center = _place(canvas, rng, where, radius, taken)
        if center is None and number == wanted - 1 and not drawn:
            organ = organs[0]
            center = _place(canvas, rng, organ.mask, 0.0, ())         # at least one, and be it at a cyst
        if center is not None:
            _draw_tumor(canvas, rng, organ, center, radius)
            taken.append(_Spot(center, radius))
            drawn += 1


def _draw_tumor(canvas: Canvas, rng: Generator, organ: _Organ, center: Points, radius: float) -> None:
    """A tumor with its texture and its rim, held in the organ or, of a kidney, in it and its fat."""
    texture = canvas.field(rng, 8.0) * np.float32(rng.uniform(1, 3))
    inside = organ.mask | _fat(canvas) if organ.may_bulge else organ.mask
    hu = _darker(rng, organ, float(np.interp(2 * radius, *_SEEN))) + texture
    soft = float(rng.uniform(0.1, 0.4)) * radius
    canvas.paint(_lobed(rng, center, radius), hu, 1, wobble=0.1 * radius, inside=_held(inside), soft=soft)


def _lobed(rng: Generator, center: Points, radius: float) -> Solid:
    """An ellipsoid with up to three lobes, about as large as a ball of the radius."""
    solid = ellipsoid(center, radius * rng.uniform(0.8, 1.05, 3))
    for _ in range(rng.integers(0, 4)):
        way = rng.normal(size=3)
        lobe = center + way / np.linalg.norm(way) * radius * rng.uniform(0.3, 0.6)
        solid = join(solid, ellipsoid(lobe, radius * rng.uniform(0.35, 0.6, 3)), 0.4 * radius)
    return solid


def write_ct_tumor_phantoms(   # noqa: PLR0913 - options of a set of data, each with a default
    output_dir: str | Path,
    training: int = 16, validation: int = 4, test: int = 4, unlabeled: int = 0, seed: int = 0,
    shape: Sequence[int] = (128, 108, 88), spacing: Sequence[float] = (2.25, 2.25, 3.0), healthy: float = 0.25,
) -> Path:
    """Write procedural CT cases with tumors as NIfTI with a `datalist.json`, and return its path.

    See `ct_tumor_phantom` for shape and spacing, and `medkd.phantoms.sets.write_set` for all else and for what is
    raised.

    Args:
        healthy: share of each list without a tumor, 0 to 1, evenly over it: 0.25 takes every fourth case.
    """
    check_grid(seed, shape, spacing)
    if isinstance(healthy, bool) or not isinstance(healthy, (int, float)) or not 0 <= healthy <= 1:
        raise ValueError(f"`healthy` must be the share of cases without a tumor, 0 to 1, got {healthy!r}.")

    def draw(seeds: tuple[int, int, int]) -> CTPhantom:
        return ct_tumor_phantom(seeds, shape, spacing, int((seeds[2] + 1) * healthy) > int(seeds[2] * healthy))

    counts = (training, validation, test, unlabeled)
    return write_set(output_dir, counts, seed, draw, "CT tumor", TUMOR_LABELS, "mm")
