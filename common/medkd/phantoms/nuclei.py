# SPDX-License-Identifier: Apache-2.0
"""Pictures of nuclei: dark fluorescence or stained tissue, nuclei in clusters that touch without a gap.

What makes it hard on purpose: nuclei press against each other and shine through each other, some are dim or out of
focus; specks, haze and red cells are no nuclei; light falls off to a side; pictures differ in brightness by a factor
of five, and in the size of nuclei by three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from medkd.phantoms.canvas import Array, Points, crop, smooth_field
from medkd.phantoms.instances import number_instances
from medkd.phantoms.sets import are_counts, check_seed, write_set

__all__ = ["NucleiPhantom", "nuclei_phantom", "write_nuclei_phantoms"]

_LEAST = 30                      # pixels of the smallest nucleus
_AREA = 256.0 * 256.0            # pixels that all numbers of things refer to
_TRIES = 60                      # places that are tried per nucleus wanted
_APART = 3.0                     # pixels between a nucleus that is placed alone and the others
_BLUE = ((0.45, 0.82, 0.36), (0.58, 0.78, 0.18))   # optical density of a stain in red, green and blue: purple, violet
_PINK = (0.10, 0.95, 0.28)

# specks, debris and haze of cells far out of focus: ranges of width in pixels and of strength, number in a picture
_LITTER = (((0.5, 1.1), (0.3, 1.8), 9), ((1.2, 2.0), (0.1, 0.5), 3), ((14.0, 28.0), (0.05, 0.2), 2))


class NucleiPhantom(NamedTuple):
    """One procedural picture of nuclei.

    Attributes:
        image: uint8; gray of shape (Y, X), or RGB of shape (Y, X, 3) where it is stained.
        label: instance numbers from 1 on without a gap, 0 is background, uint16. Shape (Y, X). Each nucleus is one
            piece connected through edges, of 30 pixels or more.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint16]


class _Kind(NamedTuple):
    """Ranges of a picture: radius in pixels, number in 256 x 256 pixels, length over width."""

    radius: tuple[float, float]
    number: tuple[int, int]
    length: tuple[float, float]


_FLUORESCENT = (
    _Kind((5.0, 8.0), (18, 60), (1.0, 1.5)),
    _Kind((7.0, 11.0), (35, 90), (1.0, 1.7)),
    _Kind((13.0, 20.0), (16, 28), (1.1, 1.7)),
)
_STAINED = (
    _Kind((6.0, 10.0), (25, 80), (1.0, 1.5)),
    _Kind((6.0, 9.0), (18, 45), (1.8, 3.4)),
    _Kind((10.0, 17.0), (16, 32), (1.1, 1.9)),
)


class _Nucleus(NamedTuple):
    """A nucleus on the pixels: the crop around it, how deep each pixel lies in it, in pixels, and its mean radius."""

    crop: tuple[slice, ...]
    depth: Array
    radius: float


class _Outline(NamedTuple):
    """An ellipse with waves: half axes in pixels, angle of the first, height and phase of 2, 3 and 4 waves."""

    center: Points
    axes: Points
    angle: float
    waves: Points

    def reach(self, angle: Points) -> Points:
        """Distance from the center to the outline in directions of the picture, in pixels."""
        turned = angle - self.angle
        waves = [height * np.cos(k * turned + phase) for k, (height, phase) in enumerate(self.waves, 2)]
        ellipse = 1 / np.hypot(np.cos(turned) / self.axes[0], np.sin(turned) / self.axes[1])
        return np.asarray(ellipse * (1 + np.sum(waves, axis=0)))

    def on(self, shape: Sequence[int]) -> _Nucleus | None:
        """Put the outline on the pixels; None where it lies outside of the picture."""
        reach = self.axes.max() * 1.2 + 8
        where = crop(self.center - reach, self.center + reach, shape)
        if any(part.start >= part.stop for part in where):
            return None
        y, x = np.mgrid[where] - self.center[:, None, None]
        depth = (1 - np.hypot(y, x) / self.reach(np.arctan2(y, x))) * self.axes.min()
        return _Nucleus(where, depth.astype(np.float32), float(np.sqrt(self.axes.prod())))


def nuclei_phantom(
    seed: int | Sequence[int], shape: Sequence[int] = (256, 256), stained: bool = False
) -> NucleiPhantom:
    """Draw one picture of nuclei; the same arguments always give the same picture.

    Args:
        seed: non-negative integer, or several, such as (seed of the set, number of the case).
        shape: pixels per axis, 64 to 4096 each. 256 x 256 hold 15 to 90 nuclei of 5 to 20 pixels in radius.
        stained: nuclei in purple on white or pink tissue, in RGB; else bright on black, in gray, the brightest pixel
            anywhere from 45 to 255.

    Raises:
        ValueError: `shape` or `seed` cannot be drawn.

    Example:
        >>> case = nuclei_phantom(0, shape=(96, 64))
        >>> case.image.shape, case.label.dtype
        ((96, 64), dtype('uint16'))
    """
    _check_picture(seed, shape)
    rng = np.random.default_rng(seed)
    kinds = _STAINED if stained else _FLUORESCENT
    nuclei, owner = _place(rng, kinds[rng.integers(len(kinds))], shape)
    label, _ = number_instances(owner, _LEAST)
    image = _stain(rng, nuclei, shape) if stained else _expose(rng, _shine(rng, nuclei, shape))
    return NucleiPhantom(image, label.astype(np.uint16))


def _check_picture(seed: int | Sequence[int], shape: Sequence[int]) -> None:
    if not are_counts(shape, 2, 64, 4096):
        raise ValueError(f"`shape` must be two pixel counts of 64 to 4096, such as 256,256, got {shape!r}.")
    check_seed(seed)


class _Field:
    """Where nuclei lie so far.

    Attributes:
        owner: number of the nucleus that a pixel belongs to, from 1 on, 0 for none. Shape (Y, X).
        depth: how deep the pixel lies in it, in pixels.
        areas: pixels of each, the background's first.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.owner = np.zeros(shape, np.int32)
        self.depth: Array = np.zeros(shape, np.float32)
        self.areas = [0]

    def add(self, nucleus: _Nucleus, alone: bool) -> bool:
        """Add a nucleus unless it hides too much, or is hidden; one that is `alone` keeps off all others."""
        owner, depth = self.owner[nucleus.crop], self.depth[nucleus.crop]
        won = nucleus.depth > depth
        lost = np.bincount(owner[won], minlength=len(self.areas))
        left = np.array(self.areas[1:]) - lost[1:]
        if alone and (owner[nucleus.depth > -_APART] > 0).any():
            return False
        if won.sum() < max(_LEAST, 0.75 * (nucleus.depth > 0).sum()):
            return False
        if (left[lost[1:] > 0] < _LEAST).any() or (lost[1:] > 0.2 * np.array(self.areas[1:])).any():
            return False
        owner[won], depth[won] = len(self.areas), nucleus.depth[won]
        self.areas[1:] = [*left.tolist(), int(won.sum())]
        return True


def _place(rng: Generator, kind: _Kind, shape: Sequence[int]) -> tuple[list[_Nucleus], NDArray[np.int32]]:
    """Place nuclei, alone or pressed against one that is there; each pixel belongs to the one it is deepest in."""
    wanted = max(3, round(int(rng.integers(kind.number[0], kind.number[1] + 1)) * shape[0] * shape[1] / _AREA))
    crowd, typical = rng.uniform(0.25, 0.75), rng.uniform(*kind.radius)
    axis, turn = rng.uniform(0, np.pi), rng.choice([0.25, 1.2])     # tissue may be drawn out one way
    field, nuclei, outlines = _Field(shape), list[_Nucleus](), list[_Outline]()
    for _ in range(_TRIES * wanted):
        outline = _draw_outline(rng, kind, typical, axis + rng.normal(0, turn))
        alone = not nuclei or rng.random() > crowd
        if alone:
            outline = outline._replace(center=rng.uniform((-2, -2), np.array(shape) + 2))
        else:
            outline = _press(rng, outline, outlines[rng.integers(len(outlines))])
        nucleus = outline.on(shape)
        if nucleus is not None and field.add(nucleus, alone):
            nuclei.append(nucleus)
            outlines.append(outline)
        if len(nuclei) == wanted:
            break
    return nuclei, field.owner


def _draw_outline(rng: Generator, kind: _Kind, typical: float, angle: float) -> _Outline:
    size = float(np.clip(typical * np.exp(rng.normal(0, 0.16)), 4.5, 26))
    stretch = np.sqrt(rng.uniform(*kind.length))
    waves = np.column_stack([rng.normal(0, (0.05, 0.04, 0.025)), rng.uniform(0, 2 * np.pi, 3)])
    return _Outline(np.zeros(2), np.array([size * stretch, size / stretch]), angle, waves)


def _press(rng: Generator, outline: _Outline, other: _Outline) -> _Outline:
    """Move an outline so that it overlaps another one a little."""
    angle = np.array(rng.uniform(-np.pi, np.pi))
    gap = (other.reach(angle) + outline.reach(angle + np.pi)) * rng.uniform(0.86, 0.97)
    return outline._replace(center=other.center + gap * np.array([np.sin(angle), np.cos(angle)]))


def _spots(rng: Generator, nucleus: _Nucleus, most: int, width: float) -> Array:
    """Up to `most` soft spots in a nucleus, of value 1 and about `width` pixels."""
    field = np.zeros(nucleus.depth.shape, np.float32)
    inside = np.argwhere(nucleus.depth > 0.3 * nucleus.depth.max())
    y, x = np.indices(field.shape, dtype=np.float32)
    for row, column in inside[rng.integers(len(inside), size=rng.integers(most + 1))]:
        field += np.exp(-((y - row) ** 2 + (x - column) ** 2) / np.float32(2 * (width * rng.uniform(0.7, 1.3)) ** 2))
    return np.minimum(field, 1)


def _shine(rng: Generator, nuclei: Sequence[_Nucleus], shape: Sequence[int]) -> Array:
    """Light of the nuclei, about 1 where one is bright; where two overlap, the other shines through."""
    light: Array = np.zeros(shape, np.float32)
    texture, grain = smooth_field(rng, shape, (1.0, 1.0), 4.0), rng.uniform(0.05, 0.2)
    spotted = rng.choice([-0.45, 0.6])                  # dark nucleoli, or bright centers
    vary, blurred = rng.uniform(0.15, 0.45), rng.uniform(0, 0.25)
    for nucleus in nuclei:
        level = np.exp(vary * rng.standard_normal()) * (0.35 if rng.random() < 0.12 else 1.0)
        level *= rng.uniform(1.8, 2.6) if rng.random() < 0.03 else 1.0              # a dividing cell
        edge = nucleus.radius * rng.uniform(0.3, 0.6) if rng.random() < blurred else 1.3
        dome = 0.72 + 0.28 * np.sqrt(np.clip(nucleus.depth / nucleus.radius, 0, 1))
        spots = spotted * _spots(rng, nucleus, 4, 0.14 * nucleus.radius + 0.4)
        layer = level * np.clip(0.5 + nucleus.depth / edge, 0, 1) * dome
        layer *= 1 + spots + grain * texture[nucleus.crop]
        under = light[nucleus.crop]
        through = rng.uniform(0.1, 0.3) * np.minimum(under, layer)
        under[:] = np.maximum(under, layer) + through
    return light


def _expose(rng: Generator, light: Array) -> NDArray[np.uint8]:
    """Add what is no nucleus, glow, uneven light and noise, in gray values up to a peak of the picture's own."""
    for width, strength, number in _LITTER:
        for _ in range(rng.poisson(number * light.size / _AREA * rng.uniform(0, 1.5))):
            _add_spot(light, rng.uniform(0, light.shape), rng.uniform(*width), rng.uniform(*strength))
    light = light + rng.uniform(0.05, 0.2) * ndimage.gaussian_filter(light, rng.uniform(5, 12))
    light = ndimage.gaussian_filter(light, rng.uniform(0.5, 1.2))
    y, x = (np.linspace(-1, 1, count, dtype=np.float32) for count in light.shape)
    turn = rng.uniform(0, 2 * np.pi)
    slope = np.float32(np.cos(turn)) * y[:, None] + np.float32(np.sin(turn)) * x
    light *= 1 + rng.uniform(0, 0.3) * slope
    light += rng.uniform(0, 0.1) * (1.5 + slope)
    peak, floor = np.exp(rng.uniform(np.log(45), np.log(255))), rng.uniform(0.5, 10)
    light *= (peak - floor) / light.max()
    noise = np.sqrt(rng.uniform(0.001, 0.007) * peak * np.maximum(light, 0) + rng.uniform(0.2, 0.8) ** 2)
    light += floor + noise * rng.standard_normal(light.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(light), 0, 255), np.uint8)


def _add_spot(light: Array, center: Points, width: float, strength: float) -> None:
    where = crop(center - 3.5 * width, center + 3.5 * width, light.shape)
    y, x = np.mgrid[where] - center[:, None, None]
    light[where] += strength * np.exp(-(y**2 + x**2) / (2 * width**2))


def _stain(rng: Generator, nuclei: Sequence[_Nucleus], shape: Sequence[int]) -> NDArray[np.uint8]:
    """Light through two stains: pink tissue with red cells, and nuclei of a darker rim in blue."""
    pink, blue = _draw_tissue(rng, shape)
    for _ in range(rng.poisson(5 * pink.size / _AREA)):
        cell = _draw_outline(rng, _STAINED[0], 8.0, 0.0)._replace(center=rng.uniform(0, shape)).on(shape)
        if cell is not None:
            pink[cell.crop] += 0.2 * np.clip(0.5 + cell.depth / 1.5, 0, 1)
    texture = smooth_field(rng, shape, (1.0, 1.0), 4.0)
    typical, vary = rng.uniform(0.55, 1.0), rng.uniform(0.1, 0.35)
    for nucleus in nuclei:
        level = typical * np.exp(vary * rng.standard_normal()) * (0.5 if rng.random() < 0.12 else 1.0)
        edge = rng.uniform(3, 6) if rng.random() < 0.15 else 1.5
        rim = 0.35 * np.exp(-0.5 * ((nucleus.depth - 1) / 1.2) ** 2)
        spots = 0.4 * _spots(rng, nucleus, 3, 0.12 * nucleus.radius + 0.4)
        layer = level * np.clip(0.5 + nucleus.depth / edge, 0, 1)
        layer *= 0.75 + rim + spots + 0.16 * texture[nucleus.crop]
        under = blue[nucleus.crop]
        np.maximum(under, layer + 0.15 * under, out=under)
    stain = np.array(_BLUE[rng.integers(len(_BLUE))], np.float32)
    density = np.maximum(blue, 0)[..., None] * stain + np.maximum(pink, 0)[..., None] * np.array(_PINK, np.float32)
    density = ndimage.gaussian_filter(density, (*[rng.uniform(0.4, 0.8)] * 2, 0))
    lamp = rng.uniform((215, 215, 220), (250, 248, 250)).astype(np.float32)
    noise = rng.uniform(1.5, 4) * rng.standard_normal(density.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(lamp * np.exp(-1.35 * density) + noise), 0, 255), np.uint8)


def _draw_tissue(rng: Generator, shape: Sequence[int]) -> tuple[Array, Array]:
    """Density of pink and blue without nuclei: fibers one way, or a nearly empty slide."""
    fine, coarse = (smooth_field(rng, shape, (1.0, 1.0), wavelength) for wavelength in (14.0, 60.0))
    y, x = np.indices(shape, dtype=np.float32)
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(3, 6)
    fibers = np.sin((np.cos(turn) * y + np.sin(turn) * x) / pitch + 2.2 * coarse + 0.6 * fine).astype(np.float32)
    if rng.random() < 0.5:
        pink, blue = 0.05 + 0.03 * np.maximum(coarse, -1), 0.02 + 0.02 * fine
    else:
        pink = rng.uniform(0.1, 0.24) + 0.05 * fine + 0.06 * coarse + 0.035 * fibers
        blue = rng.uniform(0.1, 0.25) + 0.02 * fine
    return pink.astype(np.float32), blue.astype(np.float32)


def write_nuclei_phantoms(
    output_dir: str | Path,
    training: int = 24, validation: int = 6, test: int = 8, unlabeled: int = 0, seed: int = 0,
    shape: Sequence[int] = (256, 256), stained: float = 0.25,
) -> Path:
    """Write procedural pictures of nuclei as PNG with a `datalist.json`, and return its path.

    See `nuclei_phantom` for the shape, and `medkd.phantoms.sets.write_set` for all else and for what is raised.

    Args:
        stained: share of each list that is stained, in RGB, 0 to 1, evenly over it: 0.25 takes every fourth case.
    """
    _check_picture(seed, shape)
    if isinstance(stained, bool) or not isinstance(stained, (int, float)) or not 0 <= stained <= 1:
        raise ValueError(f"`stained` must be the share of stained pictures, 0 to 1, got {stained!r}.")

    def draw(seeds: tuple[int, int, int]) -> NucleiPhantom:
        return nuclei_phantom(seeds, shape, int((seeds[2] + 1) * stained) > int(seeds[2] * stained))

    return write_set(output_dir, (training, validation, test, unlabeled), seed, draw, "nuclei")
