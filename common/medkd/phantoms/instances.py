# SPDX-License-Identifier: Apache-2.0
"""Instance numbers of phantoms: every number one connected piece, none too small."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label as connected
from skimage.segmentation import relabel_sequential

__all__ = ["number_instances"]

Ids = NDArray[np.uint16] | NDArray[np.uint32]


def number_instances(label: NDArray[Any], least: int) -> tuple[Ids, NDArray[np.bool_]]:
    """Number the pieces of a label map that are connected through faces.

    A piece of fewer than `least` voxels goes, voxel by voxel, to the instances that it touches; where it touches none
    it becomes background.

    Args:
        label: integers, 0 is background. Any shape.
        least: voxels of the smallest instance.

    Returns:
        Ids from 1 on without a gap, uint16, or uint32 where there are more than 65,535; and which voxels
        changed hands. Both of the shape of `label`.

    Example:
        >>> number_instances(np.array([[7, 7, 0, 7, 7, 5]]), 2)[0].tolist()
        [[1, 1, 0, 2, 2, 2]]
    """
    pieces = connected(label, background=0, connectivity=1)   # type: ignore[no-untyped-call]
    small = np.bincount(pieces.ravel()) < least
    small[0] = False
    moved = small[pieces]
    pieces[moved] = 0
    _hand_over(pieces, np.argwhere(moved))
    numbers = relabel_sequential(pieces)[0]   # type: ignore[no-untyped-call]
    return numbers.astype(np.uint16 if numbers.max() < 2**16 else np.uint32), moved


def _hand_over(pieces: NDArray[Any], places: NDArray[np.intp]) -> None:
    """Give each of `places`, (N, axes), a neighbor's number, from the rim inwards, as long as there is one."""
    steps = np.vstack([np.eye(pieces.ndim, dtype=int), -np.eye(pieces.ndim, dtype=int)])
    while len(places):
        around = np.clip(places[:, None] + steps, 0, np.array(pieces.shape) - 1)   # (N, 2 * axes, axes)
        found = pieces[tuple(np.moveaxis(around, 2, 0))].max(1)
        if not found.any():
            return
        pieces[tuple(places[found > 0].T)] = found[found > 0]
        places = places[found == 0]
