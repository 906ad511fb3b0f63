# SPDX-License-Identifier: Apache-2.0
"""Pictures of stained tissue whose class is how orderly the nuclei of one small gland lie: grades for classification.

What makes it hard on purpose: the grades have the same nuclei, as many of them and of the same sizes and stain, in
glands of the same sizes and shades; only how they lie to each other and to the gland differs, over 1 to 3 pixels, and
averages of 4 x 4 pixels keep a part of it. Other parts of every picture have such nuclei in any order, whatever the
grade: fibers with nuclei in rows, clumps of inflammation, other glands. Stain, light and focus vary by case, and each
case has pictures of all grades, so that color tells the case and not the grade.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from medkd.data.datalist import LISTS, write_datalist
from medkd.phantoms.canvas import Array, Points, crop, smooth_field
from medkd.phantoms.sets import are_counts, check_counts, check_seed, is_whole

__all__ = ["GRADES", "HistologyPhantom", "histology_phantom", "write_histology_phantoms"]

GRADES = ("regular", "mild", "moderate", "severe")
_AREA = 192.0 * 192.0            # pixels that all numbers of things refer to
_HEMATOXYLIN = ((0.65, 0.70, 0.29), (0.55, 0.78, 0.22))   # optical density in red, green and blue
_EOSIN = ((0.07, 0.99, 0.11), (0.18, 0.92, 0.20))
_NUCLEUS = (1.25, 2.3)           # half axes in pixels
_APART = 4.6                     # pixels between nuclei that lie in order
_CLOSE = 3.2                     # pixels that no two nuclei of a gland come closer
_TRIES = 12
_JITTER = (0.3, 2.0)             # deviation of places in pixels, at the least and at the most disorder
_TURN = (0.12, 1.5)              # deviation of directions in radians


class HistologyPhantom(NamedTuple):
    """One procedural picture of tissue.

    Attributes:
        image: RGB, uint8. Shape (Y, X, 3).
        grade: class of the picture, 0 the most orderly.
        lesion: 255 on the gland that decides, else 0, uint8. Shape (Y, X).
    """

    image: NDArray[np.uint8]
    grade: int
    lesion: NDArray[np.uint8]


class _Nuclei(NamedTuple):
    """Nuclei in pixels: their centers (N, 2), the directions of their long axes (N,)."""

    centers: Points
    angles: Points


class _Gland(NamedTuple):
    """A ring of cells around a lumen, with waves: its outline is at 1, the lumen's at `lumen`, the center at 0."""

    center: Points
    radius: float
    lumen: float
    waves: Points

    def on(self, y: Array, x: Array) -> Array:
        """How far pixels lie from the center; 1 on the outline."""
        y, x = y - np.float32(self.center[0]), x - np.float32(self.center[1])
        return np.asarray(np.hypot(y, x) / self._reach(np.arctan2(y, x)))

    def _reach(self, angle: NDArray[np.floating]) -> NDArray[np.floating]:
        waves = [height * np.cos(k * angle + phase) for k, (height, phase) in enumerate(self.waves, 2)]
        return np.asarray(self.radius * (1 + np.sum(waves, axis=0)))

    def place(self, angle: Points, share: Points) -> Points:
        """Points of the wall: direction from the center, and 0 at the lumen to 1 at the outline. Shape (N, 2)."""
        distance = self._reach(angle) * (self.lumen + (1 - self.lumen) * share)
        return np.asarray(self.center + distance[:, None] * np.column_stack([np.sin(angle), np.cos(angle)]))


def histology_phantom(
    seed: int | Sequence[int], grade: int, shape: Sequence[int] = (128, 128), grades: int = 3,
    case_seed: int | Sequence[int] | None = None,
) -> HistologyPhantom:
    """Draw one picture of tissue; the same arguments always give the same picture.

    Args:
        seed: non-negative integer, or several, of what lies where.
        grade: class, 0 to `grades` - 1; the disorder of the gland that decides grows evenly with it.
        shape: pixels per axis, 64 to 4096 each; the gland that decides is 40 to 60 pixels wide.
        grades: number of classes, 2 to 4.
        case_seed: of stain, light and focus, which the pictures of a case share; None takes `seed`.

    Raises:
        ValueError: `shape`, `seed`, `grade` or `grades` cannot be drawn.

    Example:
        >>> picture = histology_phantom(0, grade=1, shape=(96, 128))
        >>> picture.image.shape, picture.image.dtype, picture.grade
        ((96, 128, 3), dtype('uint8'), 1)
    """
    _check_picture(seed, shape, grades)
    if not is_whole(grade, 0, grades - 1):
        raise ValueError(f"`grade` must be 0 to {grades - 1}, got {grade!r}.")
    rng = np.random.default_rng(seed)
    tissue = _Tissue(rng, shape)
    lesion = tissue.add_lesion(rng, grade / (grades - 1))
    image = _expose(rng, np.random.default_rng(seed if case_seed is None else case_seed), tissue)
    return HistologyPhantom(image, int(grade), np.where(lesion <= 1, 255, 0).astype(np.uint8))


def _check_picture(seed: int | Sequence[int], shape: Sequence[int], grades: int) -> None:
    if not are_counts(shape, 2, 64, 4096):
        raise ValueError(f"`shape` must be two pixel counts of 64 to 4096, such as 128,128, got {shape!r}.")
    if not is_whole(grades, 2, len(GRADES)):
        raise ValueError(f"`grades` must be 2 to {len(GRADES)} classes, got {grades!r}.")
    check_seed(seed)


class _Tissue:
    """Density of both stains, painted from the ground up: fibers, cells, other glands, clumps.

    Attributes:
        pink: density of eosin. Shape (Y, X).
        blue: density of hematoxylin.
    """

    def __init__(self, rng: Generator, shape: Sequence[int]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.y, self.x = np.indices(self.shape, dtype=np.float32)
        self.texture = smooth_field(rng, self.shape, (1.0, 1.0), 8.0)
        fine, coarse = (smooth_field(rng, self.shape, (1.0, 1.0), wavelength) for wavelength in (12.0, 60.0))
        turn = rng.uniform(0, np.pi) + 0.5 * coarse
        fibers = np.sin((np.cos(turn) * self.y + np.sin(turn) * self.x) / rng.uniform(2.5, 4.5) + 1.5 * fine)
        self.pink: Array = (0.36 + 0.05 * fine + 0.07 * coarse + 0.04 * fibers).astype(np.float32)
        self.blue: Array = (0.07 + 0.015 * fine).astype(np.float32)
        self.scale = self.shape[0] * self.shape[1] / _AREA
        self._add_stroma(rng)

    def _number(self, rng: Generator, mean: float) -> int:
        return int(rng.poisson(mean * self.scale))

    def _add_stroma(self, rng: Generator) -> None:
        """Scattered nuclei, rows along fibers, clumps of inflammation and other glands, in any number."""
        lone = rng.uniform(0, self.shape, (self._number(rng, 70), 2))
        self.stain(rng, _Nuclei(lone, rng.uniform(0, np.pi, len(lone))))
        for _ in range(self._number(rng, 5)):
            self.stain(rng, self._row(rng))
        for _ in range(self._number(rng, rng.uniform(1, 12))):
            center, count = rng.uniform(0, self.shape), rng.integers(6, 40)
            clump = center + rng.normal(0, rng.uniform(2, 8), (count, 2))
            self.stain(rng, _Nuclei(clump, rng.uniform(0, np.pi, count)))
        for _ in range(self._number(rng, 2.0)):
            gland = _draw_gland(rng, rng.uniform(0, self.shape), rng.uniform(12, 24))
            self._paint(rng, gland, rng.uniform(0, 0.1), rng.uniform())

    def _row(self, rng: Generator) -> _Nuclei:
        """Nuclei one behind the other, as in muscle: as orderly as a gland of the lowest grade."""
        count, lines, angle = rng.integers(4, 9), rng.integers(1, 4), rng.uniform(0, np.pi)
        along, across = np.meshgrid(np.arange(count) * _APART * 1.2, np.arange(lines) * _APART)
        jitter = rng.normal(0, 0.5, (2, along.size))
        along, across = along.ravel() + jitter[0], across.ravel() + jitter[1]
        line = np.column_stack([along * np.sin(angle) + across * np.cos(angle),
                                along * np.cos(angle) - across * np.sin(angle)])
        return _Nuclei(rng.uniform(0, self.shape) + line, angle + rng.normal(0, 0.15, len(line)))

    def add_lesion(self, rng: Generator, disorder: float) -> Array:
        """Add the gland that decides, of darker cytoplasm; gives how far pixels lie from its center, 1 on its outline.

        Args:
            disorder: of its nuclei, 0 to 1.
        """
        radius = rng.uniform(20, 30)
        margin = min(1.15 * radius, min(self.shape) / 2 - 1)
        gland = _draw_gland(rng, rng.uniform(margin, np.array(self.shape) - margin), radius)
        return self._paint(rng, gland, rng.uniform(0.2, 0.3), disorder)

    def _paint(self, rng: Generator, gland: _Gland, darker: float, disorder: float) -> Array:
        """Paint a gland over what is there: cytoplasm, `darker` than around, an empty lumen, nuclei."""
        depth = gland.on(self.y, self.x)
        inside = np.clip((1 - depth) * gland.radius + 0.5, 0, 1)
        lumen = np.clip((gland.lumen - depth) * gland.radius + 0.5, 0, 1)
        self.pink += inside * (0.3 + 0.03 * self.texture + 0.5 * darker - self.pink)
        self.blue += inside * (0.14 + darker + 0.02 * self.texture - self.blue)
        self.stain(rng, _cells(rng, gland, disorder))
        self.pink *= 1 - lumen * 0.93
        self.blue *= 1 - lumen * 0.93
        return depth

    def stain(self, rng: Generator, nuclei: _Nuclei) -> None:
        """Add nuclei; where two overlap, their densities add."""
        for center, angle in zip(nuclei.centers, nuclei.angles, strict=True):
            axes = np.array(_NUCLEUS) * rng.uniform(0.85, 1.15)
            where = crop(center - 6, center + 6, self.shape)
            if any(part.start >= part.stop for part in where):
                continue
            y, x = self.y[where] - np.float32(center[0]), self.x[where] - np.float32(center[1])
            long, short = np.sin(angle) * y + np.cos(angle) * x, np.cos(angle) * y - np.sin(angle) * x
            depth = (1 - np.hypot(short / axes[0], long / axes[1])) * axes[0]
            self.blue[where] += (rng.uniform(0.55, 0.8) * np.clip(0.5 + depth, 0, 1)).astype(np.float32)


def _draw_gland(rng: Generator, center: Points, radius: float) -> _Gland:
    waves = np.column_stack([rng.normal(0, (0.07, 0.04, 0.03)), rng.uniform(0, 2 * np.pi, 3)])
    return _Gland(np.asarray(center), float(radius), float(rng.uniform(0.3, 0.45)), waves)


def _cells(rng: Generator, gland: _Gland, disorder: float) -> _Nuclei:
    """Nuclei of a wall, as many whatever the disorder.

    Args:
        disorder: 0 for rings of even steps whose nuclei all point to the lumen, 1 for any place and direction.
    """
    width = gland.radius * (1 - gland.lumen)
    rings = max(1, int(width / _APART))
    share = (np.arange(rings) + 0.5) / rings
    distance = gland.radius * (gland.lumen + (1 - gland.lumen) * share)
    counts = np.maximum(3, 2 * np.pi * 0.9 * distance / _APART).astype(int)
    angle = np.concatenate([np.arange(n) * 2 * np.pi / n + rng.uniform(0, 2 * np.pi) for n in counts])
    share, distance = np.repeat(share, counts), np.repeat(distance, counts)
    spread = _JITTER[0] + (_JITTER[1] - _JITTER[0]) * disorder
    centers = np.full((len(angle), 2), np.inf)
    wrong = np.ones(len(angle), bool)
    for _ in range(_TRIES):                                          # overlaps would darken what is disorderly
        shift = spread * rng.standard_normal((2, len(angle)))
        moved = np.abs(share + shift[0] / width)                     # turned back at the lumen and at the outline,
        moved = np.clip(1 - np.abs(1 - moved), 0.06, 0.94)           # so that a wall is as full in any order
        centers[wrong] = gland.place(angle + shift[1] / distance, moved)[wrong]
        apart = np.linalg.norm(centers[:, None] - centers, axis=-1)  # (N, N)
        wrong = (np.tril(apart < _CLOSE, -1)).any(1)
        if not wrong.any():
            break
    turned = angle + (_TURN[0] + (_TURN[1] - _TURN[0]) * disorder) * rng.standard_normal(len(angle))
    return _Nuclei(centers, turned)


def _expose(rng: Generator, of_case: Generator, tissue: _Tissue) -> NDArray[np.uint8]:
    """Light through both stains of a case, its lamp, focus and noise."""
    hematoxylin, eosin = (_mix(of_case, pair) for pair in (_HEMATOXYLIN, _EOSIN))
    strength = of_case.uniform(0.75, 1.3, 2).astype(np.float32)
    lamp = of_case.uniform((212, 212, 218), (250, 246, 250)).astype(np.float32)
    focus, grain = of_case.uniform(0.35, 0.6), of_case.uniform(1.5, 3.5)
    density = np.maximum(tissue.blue, 0)[..., None] * hematoxylin * strength[0]
    density = density + np.maximum(tissue.pink, 0)[..., None] * eosin * strength[1]
    density = ndimage.gaussian_filter(density, (focus, focus, 0))
    density *= np.float32(rng.uniform(0.93, 1.07))                   # thickness of the section
    noise = grain * rng.standard_normal(density.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(lamp * np.exp(-1.3 * density) + noise), 0, 255), np.uint8)


def _mix(rng: Generator, pair: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    share = rng.uniform()
    return (share * np.array(pair[0]) + (1 - share) * np.array(pair[1])).astype(np.float32)


def write_histology_phantoms(   # noqa: PLR0913 - options of a command, each with a default
    output_dir: str | Path,
    training: int = 120, validation: int = 20, test: int = 40, unlabeled: int = 0, seed: int = 0,
    shape: Sequence[int] = (128, 128), pictures: int = 3, grades: int = 3,
) -> Path:
    """Write procedural pictures of tissue as PNG with a `datalist.json`, and return its path.

    A case has several pictures, `images/case_000_0.png` and on, of grades that follow each other, so that each grade
    has as many pictures. `label` of the list is the name of the grade, `lesion_label` a picture of the gland that
    decides, for a look at what a network attends to. See `histology_phantom` for the shape, and
    `medkd.phantoms.sets.write_set` for the seeds of a case.

    Args:
        output_dir: folder to fill.
        training: number of training cases; so are `validation`, `test` and `unlabeled`, whose pictures have no label.
        seed: non-negative integer.
        shape: pixels per axis.
        pictures: of each case, 1 to 20.
        grades: number of classes, 2 to 4.

    Raises:
        ValueError: a number is out of range.
    """
    _check_picture(seed, shape, grades)
    counts = (training, validation, test, unlabeled)
    check_counts(counts)
    if not is_whole(pictures, 1, 20):
        raise ValueError(f"`pictures` must be 1 to 20 of each case, got {pictures!r}.")
    lists: dict[str, list[dict[str, str]]] = {name: [] for name in (*LISTS, "unlabeled")}
    for name in ("images", "lesions"):
        Path(output_dir, name).mkdir(parents=True, exist_ok=True)
    plan = [(number, place) for number, count in enumerate(counts) for place in range(count)]
    for index, (number, place) in enumerate(tqdm(plan, desc="histology phantoms", unit="case", delay=2)):
        for picture in range(pictures):
            grade = (place * pictures + picture) % grades
            of_case = (seed, number, place)
            drawn = histology_phantom((*of_case, picture), grade, shape, grades, case_seed=of_case)
            item = {"image": f"images/case_{index:03d}_{picture}.png"}
            Image.fromarray(drawn.image).save(Path(output_dir, item["image"]))
            if number < len(LISTS):
                item |= {"label": _names(grades)[grade], "lesion_label": f"lesions/case_{index:03d}_{picture}.png"}
                Image.fromarray(drawn.lesion).save(Path(output_dir, item["lesion_label"]))
            lists[[*lists][number]].append(item)
    labels = {str(grade): name for grade, name in enumerate(_names(grades))}
    return write_datalist(Path(output_dir, "datalist.json"), {**lists, "labels": labels})


def _names(grades: int) -> tuple[str, ...]:
    """Names of the classes, from the most orderly to the least."""
    return {2: (GRADES[0], GRADES[3]), 3: (GRADES[0], *GRADES[2:]), 4: GRADES}[grades]
