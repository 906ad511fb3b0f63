# SPDX-License-Identifier: Apache-2.0
"""EM phantom: dense neurites with dark membranes, organelles that look like them, thick sections or cubic voxels.

What makes it hard on purpose: membranes fade in places and blur where a section cuts them flat, while reticulum,
mitochondria and vesicles have membranes of their own that divide nothing. A threshold merges neighbors through every
weak spot; only the course of a membrane and the texture on its sides tell which one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import find_boundaries

from medkd.phantoms.canvas import Array, smooth_field
from medkd.phantoms.instances import Ids, number_instances
from medkd.phantoms.neuropil import GLIA, Neurite, Tissue, grow_neurites, partition
from medkd.phantoms.organelles import paint_tissue
from medkd.phantoms.sets import are_counts, are_lengths, check_seed, is_whole, write_set

__all__ = ["EMPhantom", "em_phantom", "write_em_phantoms"]

_LEAST = 200             # voxels of the smallest instance
_EXTENT = 180.0          # nm of the smallest block: a few processes


class EMPhantom(NamedTuple):
    """One procedural block of neuropil.

    Attributes:
        image: gray values, uint8, membranes dark. Shape (Z, Y, X), the same for `label`; sections along Z.
        label: instance numbers from 1 on without a gap, each one piece connected through faces of 200 voxels or
            more, uint16, or uint32 where there are more than 65,535. They touch without a gap unless `gap` is 1.
        affine: voxel index to nanometers, (4, 4), without rotation.
    """

    image: NDArray[np.uint8]
    label: Ids
    affine: NDArray[np.float64]


def em_phantom(
    seed: int | Sequence[int],
    shape: Sequence[int] = (48, 128, 128),
    spacing: Sequence[float] = (30.0, 6.0, 6.0),
    missing: float = 0.0,
    gap: int = 0,
) -> EMPhantom:
    """Draw one block of neuropil; the same arguments always give the same block.

    A block of the default size holds about 80 processes of 40 to 600 nm with branches and swellings, and glia between
    them; its faces cut them into 60 to 140 instances. Where voxels are at least twice as thick as wide they are
    sections: each with its own brightness and contrast, some shifted by a voxel, image and label alike.

    Args:
        seed: non-negative integer, or several, such as (seed of the set, number of the case).
        shape: voxels per axis, sections first; at least 16 each.
        spacing: nm per voxel and axis, 2 to 60, that of the sections first and not smaller than the others. (10, 10,
            10) is the cubic kind. `shape` times `spacing` must be 180 nm or more.
        missing: chance of a section to be lost, 0 to 0.5: black in the image, its label kept. It changes nothing else.
        gap: 0, or 1 for a line of label 0 between neighbors, one voxel wide, within sections and, where voxels are
            cubic, along all axes. It changes the label only; what it cuts off gets a number of its own, or 0 if small.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> case = em_phantom(0, shape=(16, 48, 48))
        >>> case.image.shape, case.label.dtype, case.affine.diagonal().tolist()
        ((16, 48, 48), dtype('uint16'), [30.0, 6.0, 6.0, 1.0])
    """
    _check_block(seed, shape, spacing, missing, gap)
    rng = np.random.default_rng(seed)
    sections = spacing[0] >= 2 * max(spacing[1:])
    neurites = grow_neurites(rng, [n * nm for n, nm in zip(shape, spacing, strict=True)])
    tissue = _cut_sections(rng, neurites, shape, spacing) if sections else partition(rng, neurites, shape, spacing)
    label, moved = number_instances(tissue.owner + 1 - GLIA, _LEAST)
    _close_membranes(tissue, label, moved)
    image = _record(rng, paint_tissue(rng, tissue, neurites, spacing), spacing, sections)
    chances = rng.random(shape[0])
    image[(chances < missing) & (chances < chances.max())] = 0   # one section always stays
    if gap:
        label, moved = number_instances(np.where(_gaps(label, spacing), 0, label), _LEAST)
        label[moved] = 0                             # the other sections' neighbors do not get what the line cut off
    return EMPhantom(image, label, np.diag([*(float(nm) for nm in spacing), 1.0]))


def _check_block(
    seed: int | Sequence[int], shape: Sequence[int], spacing: Sequence[float], missing: float, gap: int
) -> None:
    if not are_counts(shape, 3, 16):
        raise ValueError(
            f"`shape` must be three voxel counts of 16 or more, sections first, such as 48,128,128, got {shape!r}."
        )
    if not are_lengths(spacing, 3, 2, 60) or spacing[0] < max(spacing):
        raise ValueError(
            "`spacing` must be three lengths of 2 to 60 nm, that of the sections, the largest, first, such as 30,6,6, "
            f"got {spacing!r}."
        )
    extent = [n * nm for n, nm in zip(shape, spacing, strict=True)]
    if min(extent) < _EXTENT:
        raise ValueError(
            f"`shape` times `spacing` must be {_EXTENT:g} nm or more along each axis, got {extent}; take more voxels."
        )
    if isinstance(missing, bool) or not isinstance(missing, (int, float)) or not 0 <= missing <= 0.5:
        raise ValueError(f"`missing` must be the share of lost sections, 0 to 0.5, got {missing!r}.")
    if not is_whole(gap, 0, 1):
        raise ValueError(f"`gap` must be 0 or 1, got {gap!r}.")
    check_seed(seed)


def _cut_sections(
    rng: Generator, neurites: Sequence[Neurite], shape: Sequence[int], spacing: Sequence[float]
) -> Tissue:
    """Divide a block of sections that are shifted against each other by up to a voxel."""
    offsets = rng.choice([0, 1, 2], (shape[0], 2), p=[0.15, 0.7, 0.15]).tolist()
    wide = partition(rng, neurites, (shape[0], shape[1] + 2, shape[2] + 2), spacing)

    def shifted(field: NDArray[Any]) -> NDArray[Any]:
        rows = [field[..., z, y : y + shape[1], x : x + shape[2]] for z, (y, x) in enumerate(offsets)]
        return np.stack(rows, axis=-3)

    return Tissue(*(shifted(field) for field in wide))


def _close_membranes(tissue: Tissue, label: Ids, moved: NDArray[np.bool_]) -> None:
    """Take away the membranes of fragments that were given to a neighbor: the image shows what the label says."""
    border = find_boundaries(label, connectivity=1)   # type: ignore[no-untyped-call]
    inside = ndimage.binary_dilation(moved, iterations=2) & ~border
    tissue.depth[inside] = np.maximum(tissue.depth[inside], 30.0)


def _gaps(label: Ids, spacing: Sequence[float]) -> NDArray[np.bool_]:
    """Mark the voxel before each border, along the axes of fine steps."""
    gaps = np.zeros(label.shape, bool)
    for axis, nm in enumerate(spacing):
        if nm < 2 * min(spacing):
            gaps |= np.diff(label, axis=axis, append=label.take([-1], axis)) != 0
    return gaps


def _record(rng: Generator, gray: Array, spacing: Sequence[float], sections: bool) -> NDArray[np.uint8]:
    """Blur, add shading, contrast of the block and of its sections, and noise. 0 is left to lost sections."""
    blur = rng.uniform(0.45, 0.75)
    gray = ndimage.gaussian_filter(gray, (0 if sections else blur, blur, blur))
    gray += rng.uniform(2, 7) * smooth_field(rng, gray.shape, spacing, 700.0)
    contrast = np.full((len(gray), 1, 1), rng.uniform(0.75, 1.25), np.float32)
    level = np.full((len(gray), 1, 1), rng.uniform(115, 150), np.float32)
    noise = rng.uniform(8, 14)
    if sections:
        contrast[:, 0, 0] *= rng.normal(1, 0.06, len(gray))
        level[:, 0, 0] += rng.normal(0, 6, len(gray))
    grain = ndimage.gaussian_filter(rng.standard_normal(gray.shape, dtype=np.float32), (0, 0.4, 0.4))
    gray = (gray - 135) * contrast + level + noise / grain.std() * grain
    return np.asarray(np.clip(np.rint(gray), 1, 255), np.uint8)


def write_em_phantoms(   # noqa: PLR0913 - options of a set of data, each with a default
    output_dir: str | Path,
    training: int = 4, validation: int = 1, test: int = 2, unlabeled: int = 0, seed: int = 0,
    shape: Sequence[int] = (48, 128, 128), spacing: Sequence[float] = (30.0, 6.0, 6.0),
    missing: float = 0.0, gap: int = 0,
) -> Path:
    """Write procedural blocks of neuropil as NIfTI with a `datalist.json`, and return its path.

    NIfTI knows no nanometers: headers hold the plain numbers without a unit, as real sets do.

    See `em_phantom` for what is drawn, and `medkd.phantoms.sets.write_set` for all else and for what is raised.
    """
    _check_block(seed, shape, spacing, missing, gap)
    draw = partial(em_phantom, shape=shape, spacing=spacing, missing=missing, gap=gap)
    return write_set(output_dir, (training, validation, test, unlabeled), seed, draw, "EM")
