# SPDX-License-Identifier: Apache-2.0
"""How a case is looked at: slices of its file's grid, and what lies there on another grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Frame", "frame_of", "on_other_grid"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Frame:
    """Slices of volumes of one grid.

    Args:
        shape: of the grid, 2 or 3 axes.
        affine: from voxels to places, shape (axes + 1, axes + 1).
        across: the axis that is sliced; None for a picture.
        rows: axis that runs down, and whether it is turned round.
        columns: axis that runs to the right, likewise.
        letters: of the left, right, top and bottom side; none where nobody knows.
    """

    shape: tuple[int, ...]
    affine: Array
    across: int | None
    rows: tuple[int, bool]
    columns: tuple[int, bool]
    letters: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Number of slices."""
        return 1 if self.across is None else self.shape[self.across]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Length of a voxel along each axis."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:-1, :-1], axis=0))

    @property
    def pixel(self) -> tuple[float, float]:
        """Height and width of a pixel."""
        return self.spacing[self.rows[0]], self.spacing[self.columns[0]]

    def cut(self, volume: Array, position: int) -> Array:
        """A slice (H, W) of a volume (*S)."""
        plane = volume if self.across is None else volume.take(position, self.across)
        if self.rows[0] > self.columns[0]:
            plane = plane.T
        return plane[:: -1 if self.rows[1] else 1, :: -1 if self.columns[1] else 1]

    def per_slice(self, mask: Array) -> Array:
        """Number of voxels of a mask (*S) in each slice, shape (depth,)."""
        if self.across is None:
            return np.array([mask.sum()])
        counts: Array = mask.sum(axis=tuple(axis for axis in range(mask.ndim) if axis != self.across))
        return counts

    def cut_other(self, volume: Array, affine: Array, position: int) -> Array:
        """What a volume on another grid has at the places of a slice, linearly interpolated; 0 outside of it."""
        places = self._places(affine, position)
        values = ndimage.map_coordinates(volume.astype(np.float32), places, order=1, mode="grid-constant")
        return self._turned(values)

    def cut_cells(
        self, cells: Array, affine: Array, image_affine: Array, shape: Sequence[int], position: int
    ) -> Array:
        """What the cells of a network tell of the places of a slice, linearly interpolated; NaN where it sees nothing.

        Args:
            cells: shape (*s). Up to the border of the image its outermost cells count.
            affine: of the centers of the cells.
            image_affine: of the image that the network sees, which may be coarser than the file, and a part of it.
            shape: of that image.
            position: of the slice.
        """
        values = ndimage.map_coordinates(cells.astype(np.float32), self._places(affine, position), order=1,
                                         mode="nearest")
        seen = self._places(image_affine, position)                 # (axes, .., ..), voxels of the network's image
        ends = np.asarray(shape).reshape(-1, *[1] * (seen.ndim - 1)) - 0.5
        return self._turned(np.where(((seen >= -0.5) & (seen <= ends)).all(0), values, np.nan))

    def _places(self, affine: Array, position: int) -> Array:
        """Where the voxels of a slice lie on another grid: (axes, .., ..), in its voxels."""
        lengths = [np.array([position]) if axis == self.across else np.arange(length)
                   for axis, length in enumerate(self.shape)]
        own = np.stack(np.meshgrid(*lengths, indexing="ij"), -1)    # (*S, axes), 1 for the axis that is sliced
        if self.across is not None:
            own = own.squeeze(self.across)
        to_other = np.linalg.inv(affine) @ self.affine
        return np.moveaxis(own @ to_other[:-1, :-1].T + to_other[:-1, -1], -1, 0)

    def _turned(self, values: Array) -> Array:
        """A slice as it is looked at, with rows and columns as they are when the sliced axis is gone."""
        return Frame(values.shape, np.eye(3), None, *self._in_plane()).cut(values, 0)

    def _in_plane(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """Rows and columns when the sliced axis is gone."""
        order = sorted((self.rows[0], self.columns[0]))
        return (order.index(self.rows[0]), self.rows[1]), (order.index(self.columns[0]), self.columns[1])


def on_other_grid(label: Array, affine: Array, other: Array, shape: Sequence[int]) -> Array:
    """Whole numbers on another grid, by the nearest voxel; 0 outside.

    Args:
        label: shape (*S).
        affine: of it.
        other: affine of the other grid.
        shape: of the other grid.
    """
    to_own = np.linalg.inv(affine) @ other
    result: Array = ndimage.affine_transform(
        label, to_own[:-1, :-1], to_own[:-1, -1], output_shape=tuple(shape), order=0, cval=0
    )
    return result


def frame_of(shape: Sequence[int], affine: Array, unit: str | None, is_picture: bool = False) -> Frame:
    """The usual view of a case.

    Patients are seen in axial slices from their feet, the right on the left; other volumes in slices across the axis
    of the largest spacing, of equal ones the first; pictures as they are.

    Args:
        shape: of the file's grid.
        affine: of the file, axes towards right, anterior and superior if `unit` is mm.
        unit: mm for patients.
        is_picture: a file of pixels such as PNG, which knows nothing of patients; MONAI reads it as columns, rows.
    """
    axes = len(shape)
    square = np.eye(axes + 1)
    square[:axes, :axes], square[:axes, -1] = affine[:axes, :axes], affine[:axes, -1]
    if unit == "mm" and not is_picture:
        full = np.eye(4)
        full[: affine.shape[0] - 1, : affine.shape[1] - 1] = affine[:-1, :-1]
        turned = nib.orientations.io_orientation(full)[:axes]   # type: ignore[no-untyped-call]
        found = {int(world): (axis, sign > 0) for axis, (world, sign) in enumerate(turned)}
        if 0 in found and 1 in found:
            across = found[2][0] if axes == 3 else None
            return Frame(tuple(shape), square, across, found[1], found[0], ("R", "L", "A", "P"))
    if axes == 2:
        return Frame(tuple(shape), square, None, (1, False), (0, False))
    lengths = np.linalg.norm(square[:-1, :-1], axis=0)
    across = int(np.argmax(lengths > 0.999 * lengths.max()))
    rows, columns = (axis for axis in range(3) if axis != across)
    return Frame(tuple(shape), square, across, (rows, False), (columns, False))
