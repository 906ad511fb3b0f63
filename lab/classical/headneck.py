# SPDX-License-Identifier: Apache-2.0
"""Seven organs of head and neck by Hounsfield units, components and geometry, from the chin on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lab.classical.case import Case, Rule, Segment

__all__ = ["RULE", "by_thresholds", "canal", "chin", "gullet", "head_middle", "mandible", "millimeters"]

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


def millimeters(shape: Sequence[int], origin: Sequence[float], spacing: Sequence[float]) -> list[NDArray[Any]]:
    """Distance of each voxel from a point along each axis, as arrays that broadcast to the shape."""
    places = np.ogrid[tuple(map(slice, shape))]
    return [(place - start) * step for place, start, step in zip(places, origin, spacing, strict=True)]


def chin(bone: Mask, body: Mask, spacing: Sequence[float]) -> tuple[float, float, int]:
    """Middle of the head (x), front of the mandible (y) and the slice (z) of the chin's lower edge, in voxels."""
    top = int(np.flatnonzero(body.sum((0, 1)) * spacing[0] * spacing[1] > 1500).max())
    middle = float(np.flatnonzero(body[:, :, max(0, top - int(100 / spacing[2])): top].any((1, 2))).mean())
    x = np.abs(np.arange(body.shape[0]) - middle) * spacing[0]
    front = body.shape[1] - 1 - body[x < 20].any(0)[::-1].argmax(0)            # (z,) the foremost of the body
    face = bone[x < 35] & (np.arange(body.shape[1])[:, None] > front - 50 / spacing[1])
    amount = np.minimum(face.sum((0, 1)) * spacing[0] * spacing[1], 800)       # (z,) mm^2: a step from neck to chin
    above, below = (max(1, round(length / spacing[2])) for length in (18, 60))
    heights = range(1, max(2, top - round(80 / spacing[2])))
    z = max(heights, key=lambda z: amount[z: z + above].mean() - amount[max(0, z - below): z].mean())
    return middle, float(np.flatnonzero(face[:, :, z: z + above].any((0, 2))).max(initial=0)), z


def head_middle(body: Mask, spacing: Sequence[float]) -> float:
    """Middle of the head along y, in voxels; it goes back when the chin rises."""
    top = int(np.flatnonzero(body.sum((0, 1)) * spacing[0] * spacing[1] > 1500).max())
    return float(np.flatnonzero(body[:, :, max(0, top - round(90 / spacing[2])): top].any((0, 2))).mean())


def mandible(image: NDArray[Any], spacing: Sequence[float], least: float) -> Mask:
    """The bone behind and above the chin: above it only the two rami, behind no spine; its largest piece."""
    x, y, z = millimeters(image.shape, chin(image > 300, image > -500, spacing), spacing)
    room = (np.abs(x) < 64) & (y > -92) & (z > -8) & (z < 78)
    room &= ((z < 32) | (np.abs(x) > 26)) & ((y > -55) | (np.abs(x) > 30))
    pieces, _ = ndimage.label(ndimage.binary_closing(image > least) & room)
    found: Mask = (pieces > 0) & (pieces == np.bincount(pieces.ravel(), minlength=2)[1:].argmax() + 1)
    return found


def canal(bone: Mask, spacing: Sequence[float], start: Sequence[float], length: float) -> list[tuple[int, int, int]]:
    """The spinal canal from `start` down, a voxel (x, y, z) per slice: a place without bone that has bone around it."""
    wide, narrow = (
        ndimage.gaussian_filter(bone.astype(np.float32), [size / spacing[0], size / spacing[1], 6 / spacing[2]])
        for size in (9.0, 3.5)
    )
    path = [(round(start[0]), round(start[1]), round(start[2]) + 1)]
    for z in range(round(start[2]), max(-1, round(start[2] - length / spacing[2])), -1):
        x, y, _ = millimeters((*bone.shape[:2], 1), path[-1], spacing)
        reach = (9, 25) if len(path) == 1 else (6, 6)              # mm from the slice above
        near = ((np.abs(x) <= reach[0]) & (np.abs(y) <= reach[1]))[..., 0]
        best = np.where(near, wide[:, :, z] - 3 * narrow[:, :, z], -np.inf).argmax()
        path.append((int(best) // bone.shape[1], int(best) % bone.shape[1], z))
    return path[1:]


def gullet(image: NDArray[Any], spacing: Sequence[float], place: tuple[int, int, int]) -> Mask:
    """In a slice a disc behind the windpipe, which is air in front of the canal; shape (x, y)."""
    x, y = millimeters(image.shape[:2], place[:2], spacing[:2])
    air = np.argwhere((np.abs(x) < 20) & (y > 18) & (y < 75) & (image[:, :, place[2]] < -300))
    if not len(air):
        return np.zeros(image.shape[:2], bool)
    x, y = millimeters(image.shape[:2], air.mean(0), spacing[:2])
    found: Mask = ((x + 4) / 9) ** 2 + ((y + 14) / 8) ** 2 <= 1
    return found


def by_thresholds(_training: Sequence[Case], _classes: int) -> Segment:
    """Give the rule; `least`: HU of bone, `scale` of the ellipsoids, `radius` and `length` of the cord in mm."""

    def segment(case: Case, least: float, scale: float, radius: float, length: float) -> NDArray[np.uint8]:
        image, spacing = case.image, np.array(case.spacing)
        found = np.where(mandible(image, case.spacing, least), np.uint8(7), np.uint8(0))
        corners = np.argwhere(found) if found.any() else np.argwhere(image > -500)
        middle = (corners.min(0) + corners.max(0)) / 2
        tilt = (head_middle(image > -500, case.spacing) - middle[1]) * spacing[1] - HEAD
        smooth = ndimage.gaussian_filter(image, 3.0 / spacing)
        for value, (center, axes, share, (low, high)) in ORGANS.items():
            origin = middle + (np.array(center) + (0, share * tilt, 0)) / spacing
            mm = millimeters(image.shape, origin, case.spacing)
            inside = sum((one / (axis * scale)) ** 2 for one, axis in zip(mm, axes, strict=True)) <= 1
            found[inside & (smooth > low) & (smooth < high) & (found == 0)] = value
        for place in canal(image > 200, case.spacing, middle + (0, -82 + 0.6 * tilt, 12) / spacing, length):
            layer, height = found[:, :, place[2]], (place[2] - middle[2]) * spacing[2]
            x, y = millimeters(layer.shape, place[:2], case.spacing[:2])
            layer[(x**2 + y**2 <= radius**2) & (layer == 0)] = 2
            if -170 < height < -100:
                layer[gullet(image, case.spacing, place) & (layer == 0)] = 5
        return found

    return segment


RULE = Rule(
    by_thresholds,
    {"least": (180.0, 220.0), "scale": (0.9, 1.0, 1.1), "radius": (5.5, 6.5), "length": (165.0, 185.0)},
)
