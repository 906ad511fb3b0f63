# SPDX-License-Identifier: Apache-2.0
"""Seven organs of head and neck by Hounsfield units, components and geometry, from the chin on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Case, Rule, Segment

__all__ = ["RULE", "by_thresholds", "canal", "chin", "gullet", "head_middle", "mandible"]

Mask = NDArray[np.bool_]
# center and half axes in mm from the middle of the mandible's box on; how far the center goes back with the head
# (mm per mm); range of HU. The axes are RAS, the patient's right is the smaller x.
ORGANS = {
    1: ((-1, -62, 45), (17, 16, 33), 1.0, (-50, 100)),             # brainstem
    3: ((58, -41, 1), (16, 18, 27), 0.5, (-120, 120)),             # right parotid
    4: ((-58, -41, -1), (16, 18, 27), 0.5, (-120, 120)),           # left parotid
    6: ((-1, -31, -75), (17, 18, 21), 0.2, (-1100, 400)),          # larynx, with its air
}
HEAD = -47.0                               # mm from the mandible's middle to the head's, along y, of a usual pose


def chin(bone: Mask, body: Mask, spacing: Sequence[float]) -> tuple[float, float, int]:
    """Middle of the head (x), front of the mandible (y) and the slice (z) of the chin's lower edge, in voxels."""
    top = int(np.flatnonzero(body.sum((0, 1)) * spacing[0] * spacing[1] > 1500).max())
    middle = float(np.flatnonzero(body[:, :, max(0, top - int(100 / spacing[2])): top].any((1, 2))).mean())
    x = np.abs(np.arange(body.shape[0]) - middle) * spacing[0] < 35
    front = body.shape[1] - 1 - body[np.abs(np.arange(len(x)) - middle) * spacing[0] < 20].any(0)[::-1].argmax(0)
    face = bone[x] & (np.arange(body.shape[1])[:, None] > front - 50 / spacing[1])
    amount = np.minimum(face.sum((0, 1)) * spacing[0] * spacing[1], 800)   # (z,) mm^2: a step up from neck to chin
    above, below = (max(1, round(length / spacing[2])) for length in (18, 60))
    heights = range(1, max(2, top - round(80 / spacing[2])))
    steps = [amount[z: z + above].mean() - amount[max(0, z - below): z].mean() for z in heights]
    z = heights[int(np.argmax(steps))]
    return middle, float(np.flatnonzero(face[:, :, z: z + above].any((0, 2))).max()), z


def head_middle(body: Mask, spacing: Sequence[float], middle: Sequence[float]) -> float:
    """How far the head's middle lies from the mandible's along y, in mm; it goes back when the chin rises."""
    top = int(np.flatnonzero(body.sum((0, 1)) * spacing[0] * spacing[1] > 1500).max())
    head = np.flatnonzero(body[:, :, max(0, top - round(90 / spacing[2])): top].any((0, 2)))
    return float(head.mean() - middle[1]) * spacing[1] if head.size else HEAD


def mandible(image: NDArray[Any], spacing: Sequence[float], least: float) -> Mask:
    """The bone behind and above the chin, without the teeth's slices in front, the skull and the spine."""
    middle, front, z = chin(image > 300, image > -500, spacing)
    x, y, height = (
        (np.arange(size) - start) * step
        for size, start, step in zip(image.shape, (middle, front, z), spacing, strict=True)
    )
    side = np.abs(x)[:, None, None]
    room = (side < 64) & (y > -92)[None, :, None] & (height > -8)[None, None] & (height < 78)[None, None]
    room &= (height[None, None] < 32) | (side > 26)                # above: only the two rami
    room &= (y[None, :, None] > -55) | (side > 30)                 # behind: no spine
    pieces, count = ndimage.label(ndimage.binary_closing(image > least) & room)
    found: Mask = pieces == (np.bincount(pieces.ravel())[1:].argmax() + 1 if count else -1)
    return found


def canal(bone: Mask, spacing: Sequence[float], start: Sequence[float], length: float) -> NDArray[np.int64]:
    """The spinal canal from `start` down, a voxel (x, y, z) per slice: a place without bone that has bone around it."""
    wide, narrow = (
        ndimage.gaussian_filter(bone.astype(np.float32), [size / step for step in spacing[:2]] + [6 / spacing[2]])
        for size in (9.0, 3.5)
    )
    score, place = wide - 3 * narrow, (start[0], start[1])
    path: list[tuple[int, int, int]] = []
    for z in range(round(start[2]), max(-1, round(start[2] - length / spacing[2])), -1):
        reach = (8.0, 25.0) if not path else (5.0, 5.0)            # mm from the slice above, along x and y
        near = zip(place, reach, spacing[:2], strict=True)
        spots = [slice(max(0, round(at - far / step)), round(at + far / step) + 1) for at, far, step in near]
        part = score[spots[0], spots[1], z]
        found = np.unravel_index(part.argmax(), part.shape)
        path.append((spots[0].start + int(found[0]), spots[1].start + int(found[1]), z))
        place = path[-1][:2]
    return np.array(path)


def gullet(image: NDArray[Any], spacing: Sequence[float], spine: NDArray[np.int64], heights: Mask) -> Mask:
    """Discs behind the windpipe, which is air in front of the canal, in some slices."""
    found = np.zeros(image.shape, bool)
    x, y = (np.arange(size) * step for size, step in zip(image.shape[:2], spacing[:2], strict=True))
    for at, back, z in spine[heights[spine[:, 2]]]:
        ahead = (np.abs(x - x[at]) < 20)[:, None] & ((y > y[back] + 18) & (y < y[back] + 75))[None]
        air = np.argwhere(ahead & (image[:, :, z] < -300))
        if len(air):
            center = x[air[:, 0]].mean() - 4, y[air[:, 1]].mean() - 14
            found[:, :, z] = ((x - center[0]) / 9)[:, None] ** 2 + ((y - center[1]) / 8)[None] ** 2 <= 1
    return found


def by_thresholds(_training: Sequence[Case], _classes: int) -> Segment:
    """Give the rule; `least`: HU of bone, `scale` of the ellipsoids, `radius` and `length` of the cord in mm."""

    def segment(case: Case, least: float, scale: float, radius: float, length: float) -> NDArray[np.uint8]:
        image, spacing = case.image, case.spacing
        found = mandible(image, spacing, least).astype(np.uint8) * np.uint8(7)
        corners = np.argwhere(found)
        if not len(corners):
            return found
        middle = (corners.min(0) + corners.max(0)) / 2
        grid = [(np.arange(size) - start) * step
                for size, start, step in zip(image.shape, middle, spacing, strict=True)]
        tilt = head_middle(image > -500, spacing, middle) - HEAD
        smooth = ndimage.gaussian_filter(image, [3.0 / step for step in spacing])
        for value, ((x, y, z), axes, share, (low, high)) in ORGANS.items():
            center = x, y + share * tilt, z
            parts = [((one - c) / (a * scale)) ** 2 for one, c, a in zip(grid, center, axes, strict=True)]
            inside = parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None] <= 1
            found[inside & (smooth > low) & (smooth < high) & (found == 0)] = value
        spine = canal(image > 200, spacing, middle + np.array([0, -82 + 0.6 * tilt, 12]) / spacing, length)
        for at, back, z in spine:
            near = ((grid[0] - grid[0][at]) ** 2)[:, None] + ((grid[1] - grid[1][back]) ** 2)[None] <= radius**2
            found[:, :, z][near & (found[:, :, z] == 0)] = 2
        found[gullet(image, spacing, spine, (grid[2] > -170) & (grid[2] < -100)) & (found == 0)] = 5
        return found

    return segment


RULE = Rule(
    by_thresholds,
    {"least": (180.0, 220.0), "scale": (0.9, 1.0, 1.1), "radius": (5.5, 6.5), "length": (165.0, 185.0)},
)
