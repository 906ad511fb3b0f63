# SPDX-License-Identifier: Apache-2.0
"""Read a case as training does, and keep the facts of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medkd.data.headers import Header
from medkd.inference.reading import FILE_SHAPE

__all__ = ["Case", "Loading", "Volume", "default_loading", "largest_shift", "raw_values", "volume_of"]

Loading = Callable[[dict[str, Any]], Mapping[Any, Any]]


@dataclass
class Volume:
    """Facts of one file, kept when its voxels are gone."""

    path: str
    shape: tuple[int, ...]                    # spatial
    affine: NDArray[np.float64]               # (4, 4), in the units of the reader
    channels: int = 1
    header: Header = field(default_factory=Header)
    file_shape: tuple[int, ...] = ()          # where the reader has added or dropped axes of one voxel
    low: float = 0.0
    high: float = 0.0
    counts: Counter[int] = field(default_factory=Counter)   # voxels by value, of a label
    pieces: int = 0                           # connected components, where a label has few values; else 0

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel along each axis."""
        return tuple(float(mm) for mm in np.linalg.norm(self.affine[:3, :3], axis=0)[: len(self.shape)])

    @property
    def orientation(self) -> str:
        """Axis codes of a volume, such as RAS; none of a picture."""
        codes = nib.aff2axcodes(self.affine) if len(self.shape) > 2 else ()   # type: ignore[no-untyped-call]
        return "".join(code or "?" for code in codes)

    @property
    def marks(self) -> bool:
        """A label marks something."""
        return any(value > 0 for value in self.counts)


@dataclass
class Case:
    """One case: its problems, and its files as far as they could be read."""

    problems: list[str] = field(default_factory=list)
    image: Volume | None = None
    label: Volume | None = None
    category: int | None = None               # class of the whole image, in place of a label of its voxels

    @property
    def is_labeled(self) -> bool:
        """It has a label of its voxels, or of the whole image."""
        return self.label is not None or self.category is not None


@cache
def default_loading() -> Loading:
    """What reads where no bundle says how: MONAI's reader, labels as whole numbers."""
    # imported here: it takes seconds
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    steps = [
        LoadImaged(keys="image"),
        LoadImaged(keys="label", dtype=np.int64, allow_missing_keys=True),
        EnsureChannelFirstd(keys=["image", "label"], allow_missing_keys=True),
    ]
    read: Loading = Compose(steps)
    return read


def raw_values(path: str) -> NDArray[Any]:
    """Values of a file in the type that it stores them in."""
    from monai.transforms import LoadImage

    values: NDArray[Any] = LoadImage(image_only=True, dtype=None)(path).numpy()
    return values


def volume_of(path: str, tensor: Any, header: Header) -> tuple[NDArray[Any], Volume]:
    """Voxels (C, *S) of a loaded tensor, and the facts that need no look at them."""
    from monai.data.utils import to_affine_nd

    affine = np.asarray(getattr(tensor, "affine", np.eye(4)), np.float64)
    values: NDArray[Any] = np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    shape = tuple(values.shape[1:])
    file_shape = tuple(map(int, getattr(tensor, "meta", {}).get(FILE_SHAPE, shape)))
    volume = Volume(path, shape, np.asarray(to_affine_nd(3, affine), np.float64), len(values), header, file_shape)
    return values, volume


def largest_shift(affine: NDArray[np.float64], other: NDArray[np.float64], shape: Sequence[int]) -> float:
    """How far apart two grids of one shape put the same voxel, at most; it is at a corner.

    Args:
        affine: from voxels to places, shape (N + 1, N + 1), N at least the axes of the grid.
        other: that of the other grid, of the same shape.
        shape: spatial shape of both.

    Returns:
        Distance in the unit of the affines.

    Example:
        >>> largest_shift(np.eye(3), np.diag([1.5, 1.0, 1.0]), (5, 3))
        2.0
    """
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in shape])).reshape(len(shape), -1)   # (axes, 2^axes)
    voxels = np.zeros((len(affine), corners.shape[1]))
    voxels[: len(shape)], voxels[-1] = corners, 1.0
    return float(np.linalg.norm(((affine - other) @ voxels)[:-1], axis=0).max())
