# SPDX-License-Identifier: Apache-2.0
"""Abdominal CT phantom: six organs with realistic HU, look-alikes without a label, noise, oblique affine.

What makes it hard on purpose: the right kidney and right adrenal look like the left ones, the vena cava and
the iliac arteries like the aorta, the stomach and a bowel loop like the spleen, the duodenum like the
pancreas. Only position tells them apart. The pancreas has low contrast, the adrenal is a few voxels thin.

Patients differ as real ones do, so that a few of them do not show what the next one looks like: habitus and place
in the scanner, size and place of each organ, noise of the scanner, and the time after the contrast agent: a native
kidney is as bright as muscle, an arterial one as bone marrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from medkd.phantoms.canvas import Array, Canvas, Distance, Solid, carve, ellipsoid, join, tube
from medkd.phantoms.sets import are_counts, are_lengths, check_seed, write_set

__all__ = [
    "CT_LABELS", "Abdomen", "CTPhantom", "check_grid", "ct_phantom", "draw_abdomen", "scan", "write_ct_phantoms",
]

CT_LABELS = {
    "0": "background", "1": "liver", "2": "spleen", "3": "left_kidney",
    "4": "aorta", "5": "pancreas", "6": "left_adrenal",
}
_EXTENT = (288.0, 240.0, 256.0)   # mm; the field of view that the anatomy below is drawn for
_HABITUS = ((0.94, 0.94, 0.9), (1.15, 1.15, 1.1))   # mm of the patient drawn below per mm of this one, per axis
_SHIFT = (8.0, 8.0, 14.0)                 # mm that its middle may lie off that of the field of view
_TIMES = (0.0, 35.0, 70.0, 180.0)         # s after the contrast agent: native, arterial, portal venous, late
_ENHANCED = {                             # HU at these times
    "liver": (56, 68, 108, 92), "spleen": (48, 122, 120, 96), "kidney": (33, 150, 190, 175),
    "vessel": (42, 270, 155, 118), "adrenal": (22, 72, 64, 46), "pancreas": (42, 96, 90, 72),
}
_FLIPS = ((1, 1, 1), (-1, -1, 1), (-1, 1, 1), (-1, -1, -1))   # RAS, LPS, LAS, LPI


class CTPhantom(NamedTuple):
    """One procedural CT case.

    Attributes:
        image: HU, int16, -1024 to 3071. Shape (X, Y, Z), the same for `label`.
        label: 0 background, others by the phantom, such as 1 to 6 as in `CT_LABELS`, uint8.
        affine: voxel index to world mm, (4, 4), RAS+: x grows to the patient's right, where the liver is.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


class Abdomen(NamedTuple):
    """A patient before the scan, for phantoms that draw more into it.

    Attributes:
        canvas: HU without blur and noise, and the labels of `CT_LABELS`.
        hu: HU of the case's tissues: fat, muscle, mesentery, liver, spleen, kidney, vessel, adrenal, pancreas.
        affine: voxel index to world mm, (4, 4).
    """

    canvas: Canvas
    hu: dict[str, float]
    affine: NDArray[np.float64]


def ct_phantom(
    seed: int | Sequence[int], shape: Sequence[int] = (96, 80, 64), spacing: Sequence[float] = (3.0, 3.0, 4.0)
) -> CTPhantom:
    """Draw one abdominal CT case; the same arguments always give the same case.

    The patient is scaled to the field of view, `shape` times `spacing`, so that all organs are always in it.

    Args:
        seed: non-negative integer, or several, such as (seed of the set, number of the case).
        shape: voxels per axis, at least 16 each.
        spacing: mm per voxel and axis. A case differs from it by up to 8 %.

    Returns:
        Image, label and affine. The affine is rotated by up to 6 degrees per axis and flipped in three cases
        of four.

    Raises:
        ValueError: `shape`, `spacing` or `seed` cannot be drawn.

    Example:
        >>> case = ct_phantom(0, shape=(48, 40, 32), spacing=(6.0, 6.0, 8.0))
        >>> case.image.shape, case.label.max()
        ((48, 40, 32), np.uint8(6))
    """
    check_grid(seed, shape, spacing)
    rng = np.random.default_rng(seed)
    canvas, _, affine = draw_abdomen(rng, shape, spacing)
    return CTPhantom(scan(canvas.hu, rng), canvas.label, affine)


def draw_abdomen(
    rng: Generator, shape: Sequence[int], spacing: Sequence[float], spots: bool = True, right_kidney: int = 0
) -> Abdomen:
    """Draw a patient; `shape` and `spacing` are those of `ct_phantom`.

    Args:
        spots: draw lesions into the liver, which are labeled as liver.
        right_kidney: label of the right kidney, for those who need to find it; a look-alike of the left one if 0.
    """
    affine, to_patient = _random_grid(rng, shape, spacing)
    canvas = Canvas(rng, shape, to_patient)
    hu = _tissue_hu(rng)
    _draw_body(canvas, rng, hu)
    _draw_spine(canvas, rng)
    _draw_bowel(canvas, rng, hu)
    _draw_liver(canvas, rng, hu, spots)
    _draw_spleen(canvas, rng, hu)
    _draw_pancreas(canvas, rng, hu)
    _draw_vessels(canvas, rng, hu)
    _draw_kidneys(canvas, rng, hu, right_kidney)
    _remove_liver_islands(canvas, hu)
    return Abdomen(canvas, hu, affine)


def check_grid(seed: int | Sequence[int], shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Raise `ValueError` unless a case of this seed, shape and spacing can be drawn."""
    if not are_counts(shape, 3, 16):
        raise ValueError(f"`shape` must be three voxel counts of 16 or more, such as 96,80,64, got {shape!r}.")
    if not are_lengths(spacing, 3):
        raise ValueError(f"`spacing` must be three positive lengths in mm, such as 3,3,4, got {spacing!r}.")
    check_seed(seed)


def _rotation(rng: Generator, degrees: float) -> NDArray[np.float64]:
    """Draw a rotation of up to `degrees` about each axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-degrees, degrees, 3))):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _random_grid(
    rng: Generator, shape: Sequence[int], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw the affine to world mm, and the one to the patient's own mm, with the middle of the body at 0."""
    in_plane, along = rng.uniform(0.92, 1.08, 2)
    steps = np.array(spacing) * (in_plane, in_plane, along) * _FLIPS[rng.integers(len(_FLIPS))]
    middle = (np.array(shape) - 1) / 2
    affine, to_patient = np.eye(4), np.eye(4)
    affine[:3, :3] = _rotation(rng, 6.0) * steps
    affine[:3, 3] = rng.uniform(-80.0, 80.0, 3) - affine[:3, :3] @ middle
    size = np.array(_EXTENT) / (np.array(shape) * np.array(spacing)) * rng.uniform(_HABITUS[0], _HABITUS[1])
    to_patient[:3, :3] = size[:, None] * affine[:3, :3]
    to_patient[:3, 3] = rng.uniform(-1.0, 1.0, 3) * _SHIFT - to_patient[:3, :3] @ middle
    return affine, to_patient


def _tissue_hu(rng: Generator) -> dict[str, float]:
    """Draw the case's HU; look-alikes share theirs, and the pancreas stands 14 to 18 above the mesentery."""
    time = np.interp(rng.uniform(0, len(_TIMES) - 1), np.arange(len(_TIMES)), _TIMES)   # each phase alike
    hu = {name: float(np.interp(time, _TIMES, values)) for name, values in _ENHANCED.items()}
    hu |= {"fat": -98.0, "muscle": 55.0}
    hu = {name: value + float(rng.normal(0, 3 + 0.05 * abs(value))) for name, value in hu.items()}
    hu["mesentery"] = hu["pancreas"] - float(rng.uniform(14, 18))
    return hu


def _draw_body(canvas: Canvas, rng: Generator, hu: dict[str, float]) -> None:
    """Skin to cavity: couch, fat rim, muscle wall with ribs, a cavity of fat and bowel, lung bases."""
    x, y, z = canvas.points
    half_width, half_depth = rng.uniform(116, 128), rng.uniform(82, 94)
    ratio = (np.abs(x / half_width) ** 2.4 + np.abs(y / half_depth) ** 2.4) ** (1 / 2.4) + 1e-6
    skin = np.hypot(x, y) * (1 - 1 / ratio)                       # mm along the ray from the middle
    rim = rng.uniform(6, 22) * (1 + 0.25 * np.sin(np.arctan2(y, x) * 2 + rng.uniform(0, 6))) + canvas.wobble
    muscle, canvas.wall = skin + rim, skin + rim + rng.uniform(9, 12)
    canvas.blend(np.abs(y + half_depth + 13) - 3, -150.0)         # the couch
    canvas.blend(skin, hu["fat"])
    canvas.blend(muscle, hu["muscle"])
    tissue = np.clip(0.45 + 0.45 * canvas.field(rng, 18.0), 0, 1)
    canvas.blend(canvas.wall, hu["fat"] + tissue * (hu["mesentery"] - hu["fat"]))
    phase = np.cos((z - 0.6 * y + rng.uniform(0, 26)) * (2 * np.pi / 26))
    rib = np.maximum(np.hypot((muscle + 6) / 4, np.arccos(phase)) * 4 - 4, -15 - z)
    canvas.blend(rib, 260.0)
    dome = rng.uniform(84, 92) - ((np.abs(x) - 52) / 9) ** 2 - (np.maximum(np.abs(y) - 10, 0) / 9) ** 2
    mediastinum = (np.hypot(x / 30, (y + 18) / 50) - 1) * 30
    lungs = np.maximum(np.maximum((dome - z) * 0.6, canvas.wall), -mediastinum)
    canvas.blend(lungs, float(rng.uniform(-860, -780)))
    heart = ellipsoid((-18, 22, 128) + rng.normal(0, 6, 3), (48, 38, 36))
    canvas.paint(heart, hu["vessel"] - 15)


def _draw_spine(canvas: Canvas, rng: Generator) -> None:
    """Vertebrae with disks, canal and spinous processes, muscles beside them."""
    bend, tilt, period = rng.uniform(0, 6), rng.normal(0, 4), rng.uniform(31, 36)

    def straight(points: Array) -> Array:
        x, y, z = points
        return np.stack([x - tilt * np.sin(z / 70 + bend), y + 50 - 4 * np.cos(z / 60), z])

    def column(points: Array) -> Array:
        x, y, _ = straight(points)
        return np.asarray(np.hypot(x / 1.2, y) - 15 + 1.5 * np.cos(2 * np.pi * points[2] / period))

    def disks(points: Array) -> Array:
        return np.asarray(np.maximum(column(points), np.abs((points[2] + bend) % period - 3) - 3))

    def part(x0: float, y0: float, width: float, depth: float, gap: float = -99.0) -> Distance:
        def distance(points: Array) -> Array:
            x, y, z = straight(points)
            ring = (np.hypot((np.abs(x) - x0) / width, (y - y0) / depth) - 1) * min(width, depth)
            return np.asarray(np.maximum(ring, gap - np.abs((z + bend) % period - period / 2)))
        return distance

    low, high = np.array([-70.0, -100.0, -160.0]), np.array([70.0, -20.0, 160.0])
    canvas.paint(Solid(low, high, part(36, -14, 21, 15)), 54.0)                    # paraspinal muscles
    canvas.paint(Solid(low, high, part(33, 2, 12, 14)), 57.0)                      # psoas
    canvas.paint(Solid(low, high, column), 330.0)                                  # cortex
    canvas.paint(Solid(low, high, lambda points: column(points) + 3), float(rng.uniform(130, 200)))
    canvas.paint(Solid(low, high, disks), 85.0)
    canvas.paint(Solid(low, high, part(0, -33, 4, 13, gap=4.0)), 300.0)            # spinous processes
    canvas.paint(Solid(low, high, part(22, -20, 16, 4, gap=9.0)), 260.0)           # transverse processes
    canvas.paint(Solid(low, high, part(0, -20, 12, 9)), 320.0)                     # arch
    canvas.paint(Solid(low, high, part(0, -20, 8, 6.5)), 28.0)                     # canal


def _draw_bowel(canvas: Canvas, rng: Generator, hu: dict[str, float]) -> None:
    """Stomach, colon and loops of bowel: one with the spleen's HU, one with the pancreas's, some with gas."""
    for number in range(7):
        start = rng.uniform((-70, -5, -115), (70, 50, -35))
        turns = start + np.cumsum(rng.normal(0, 22, (4, 3)) * (1, 0.7, 0.6), axis=0)
        line = np.vstack([start, turns])
        value = hu["spleen"] if number == 0 else hu["pancreas"] if number == 1 else rng.uniform(20, 75)
        radius = rng.uniform(8, 13)
        canvas.paint(tube(line, [radius] * 5), value, wobble=1.5, inside=canvas.wall)
        if number > 3:
            canvas.paint(tube(line[:2] + (0, 4, 0), [radius - 5] * 2), -700.0, inside=canvas.wall)
    colon = [(-84, -22, -115), (-88, -18, -60), (-86, 2, -12)] + rng.normal(0, 4, (3, 3))
    canvas.paint(tube(colon, [13, 13, 12]), float(rng.uniform(25, 70)), wobble=2, inside=canvas.wall)
    canvas.paint(tube(colon + (0, 3, 0), [6, 7, 5]), -650.0, wobble=2, inside=canvas.wall)
    center = (-50, 30, 38) + rng.normal(0, 7, 3)
    antrum = ellipsoid(center + (30, 10, -28), (34, 16, 15))
    stomach = join(ellipsoid(center, (34, 26, 40) * rng.uniform(0.75, 1.2, 3)), antrum)
    canvas.paint(stomach, hu["spleen"], wobble=2.5, inside=canvas.wall)
    canvas.paint(ellipsoid(center + (2, 17, 8), (16, 7, 20)), -800.0, wobble=2, inside=canvas.wall)


def _draw_liver(canvas: Canvas, rng: Generator, hu: dict[str, float], spots: bool) -> None:
    """Liver of two lobes with veins and, if told so, hidden lesions (still liver), and the gall bladder (not)."""
    center = (54, 4, 34) + rng.normal(0, 6, 3)
    size = rng.uniform(0.82, 1.18, 3)
    left = ellipsoid(center + (-46, 30, 18) + rng.normal(0, 4, 3), (50, 26, 26) * rng.uniform(0.7, 1.2, 3))
    liver = join(ellipsoid(center, (50, 58, 56) * size), left, 20.0)
    liver = carve(liver, ellipsoid(center + (-30, -12, -48), (34, 40, 34)))       # under side
    canvas.paint(liver, hu["liver"], 1, wobble=4, inside=canvas.wall + 2)
    own = np.where(canvas.label == 1, np.float32(-9), np.float32(9))   # keeps what follows inside
    for _ in range(5):
        hilum = center + (-24, -4, -8)
        line = np.vstack([hilum, hilum + np.cumsum(rng.normal((14, 2, 8), 14, (3, 3)), axis=0)])
        canvas.paint(tube(line, [4, 3.5, 3, 2]), hu["liver"] + 28, None, wobble=1, inside=own)
    for _ in range(rng.integers(1, 5) if spots else 0):
        spot = center + rng.uniform(-1, 1, 3) * (32, 36, 34)
        value = hu["liver"] - float(rng.uniform(25, 60))
        canvas.paint(ellipsoid(spot, rng.uniform(5, 15, 3)), value, None, wobble=2, inside=own)
    at = center + (-14, 30, -42) + rng.normal(0, 3, 3)
    bladder = ellipsoid(at, (12, 13, 20) * rng.uniform(0.8, 1.2, 3))
    canvas.paint(bladder, float(rng.uniform(5, 20)), inside=canvas.wall)


def _remove_liver_islands(canvas: Canvas, hu: dict[str, float]) -> None:
    """Turn bits that vessels and kidneys cut off the liver into fat: a liver is one piece."""
    parts, count = ndimage.label(canvas.label == 1)
    if count > 1:
        island = (parts > 0) & (parts != np.bincount(parts[parts > 0]).argmax())
        canvas.label[island] = 0
        canvas.hu[island] = hu["fat"]


def _draw_spleen(canvas: Canvas, rng: Generator, hu: dict[str, float]) -> None:
    """Spleen: a crescent that lies against the wall, hollow towards the stomach."""
    center = (-78, -26, 46) + rng.normal(0, 5, 3)
    spleen = ellipsoid(center, (27, 38, 40) * rng.uniform(0.8, 1.3, 3))
    spleen = carve(spleen, ellipsoid(center + (38, 14, 0), (26, 30, 44)))
    canvas.paint(spleen, hu["spleen"], 2, wobble=2.5, inside=canvas.wall + 1)


def _draw_pancreas(canvas: Canvas, rng: Generator, hu: dict[str, float]) -> None:
    """Pancreas: a lobed bow from the duodenum (of the same HU, not labeled) to the spleen, in mesentery."""
    line = np.array([(36, 2, -30), (22, 12, -16), (2, 22, -2), (-24, 16, 10), (-46, 0, 20), (-62, -10, 26)])
    line = line + rng.normal(0, 6, (1, 3)) + rng.normal(0, 4, line.shape)
    radii = np.array([13, 12, 9, 9.5, 9, 6.5]) * rng.uniform(0.8, 1.2)
    canvas.paint(tube(line, radii + 11), hu["mesentery"], wobble=4, inside=canvas.wall + 4)
    loop = line[0] + [(4, 14, 24), (20, 2, 12), (24, -4, -10), (6, -8, -26), (-30, -8, -28)]
    canvas.paint(tube(loop, [9, 10, 10, 10, 8]), hu["pancreas"], wobble=2, inside=canvas.wall)
    canvas.paint(tube(line, radii), hu["pancreas"], 5, wobble=2.5, inside=canvas.wall + 4)
    vein = line[2:] + (0, -9, 1)                                  # the splenic vein, behind it
    canvas.paint(tube(vein, [4.5, 4, 3.5, 3]), hu["vessel"] - 5)


def _draw_vessels(canvas: Canvas, rng: Generator, hu: dict[str, float]) -> None:
    """Aorta, labeled down to where it divides; vena cava and iliac arteries of the same HU, not labeled."""
    height = np.linspace(150, -90 + rng.normal(0, 10), 12)
    sway = np.cumsum(rng.normal(0, 2.0, (12, 2)), axis=0)
    x, y = (sway - sway.mean(0)).T + np.array([[-9], [-22]])
    aorta = np.column_stack([x, y, height])
    wide = rng.uniform(7.5, 11.0)
    for side in (-1, 1):
        iliac = aorta[-1] + np.array([(0, 0, 0), (side * 14, 2, -22), (side * 30, 4, -60)])
        canvas.paint(tube(iliac, [wide * 0.75, wide * 0.6, wide * 0.55]), hu["vessel"])
    cava = np.column_stack([20 - sway[:, 1], -20 + 10 * np.clip(height / 100, 0, 1) + sway[:, 0] / 2, height])
    cava = np.vstack([cava, cava[-1] + (-2, 2, -50)])
    canvas.paint(tube(cava, [wide * 1.05] * 13), hu["vessel"], wobble=1)
    artery = aorta[6] + np.array([(0, 6, 0), (2, 22, -16), (6, 26, -70)])
    canvas.paint(tube(artery, [4, 4, 3]), hu["vessel"])          # superior mesenteric artery
    canvas.paint(tube(aorta, np.linspace(wide, wide * 0.72, 12).tolist()), hu["vessel"], 4, wobble=0.6)


def _draw_kidneys(canvas: Canvas, rng: Generator, hu: dict[str, float], right: int) -> None:
    """Both kidneys in their fat, with sinus, and both adrenals; of these only the left one is labeled."""
    for side, drop, value in ((-1, 0, 3), (1, 12, right)):
        mirror = np.array([side, 1.0, 1.0])
        center = mirror * (57, -36, -10 - drop) + rng.normal(0, 6, 3)
        size = np.array([22, 21, 45]) * rng.uniform(0.82, 1.18, 3)
        canvas.paint(ellipsoid(center, size + (5, 5, 7)), hu["fat"], wobble=3, inside=canvas.wall + 1)
        sinus = ellipsoid(center - mirror * (14, -5, 0), size * (0.6, 0.42, 0.45))
        kidney = carve(ellipsoid(center, size), sinus)
        canvas.paint(kidney, hu["kidney"], value, wobble=1.8, inside=canvas.wall + 2)
        apex = center + (0, 0, size[2] + 2) + mirror * (-24, 14, 0) + rng.normal(0, 1.5, 3)
        apex[2] = min(apex[2], 58.0)
        bed = ellipsoid(apex + mirror * (5, -8, 0), (17, 17, 21))
        canvas.paint(bed, 0.6 * hu["fat"] + 0.4 * hu["mesentery"], wobble=3)
        limbs = join(
            tube([apex, apex + mirror * (14, -15, -4)], [3.3, 2.8], height=11.0),
            tube([apex, apex + mirror * (-1, -17, 0)], [3.3, 2.8], height=10.0), 2.0,
        )
        canvas.paint(limbs, hu["adrenal"], 6 if side < 0 else 0, wobble=0.4)


def scan(hu: Array, rng: Generator, noise_range: tuple[float, float] = (18.0, 36.0)) -> NDArray[np.int16]:
    """Blur by the scanner and add correlated noise.

    Args:
        hu: shape (*S).
        rng: draws the noise.
        noise_range: least and largest deviation of the noise, in HU.

    Returns:
        HU from -1024 to 3071. Shape (*S).
    """
    sharp = ndimage.gaussian_filter(hu, 0.45)
    noise = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), 0.55)
    noise *= rng.uniform(*noise_range) / noise.std()
    return np.asarray(np.clip(np.rint(sharp + noise), -1024, 3071), np.int16)


def write_ct_phantoms(
    output_dir: str | Path,
    training: int = 12, validation: int = 3, test: int = 4, unlabeled: int = 0, seed: int = 0,
    shape: Sequence[int] = (96, 80, 64), spacing: Sequence[float] = (3.0, 3.0, 4.0),
) -> Path:
    """Write procedural CT cases as NIfTI with a `datalist.json`, and return its path.

    See `ct_phantom` for shape and spacing, and `medkd.phantoms.sets.write_set` for all else and for what is raised.
    """
    check_grid(seed, shape, spacing)
    draw = partial(ct_phantom, shape=shape, spacing=spacing)
    return write_set(output_dir, (training, validation, test, unlabeled), seed, draw, "CT", CT_LABELS, "mm")
