# SPDX-License-Identifier: Apache-2.0
"""What making instances takes of memory, and whether there is as much, before the work is done."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from .machine import free_memory
from .partition import WHEELS, Partition

__all__ = ["EnsureDecodabled", "decoding_bytes"]

_GIB = 2**30


def decoding_bytes(
    shape: Sequence[int], offsets: Sequence[Sequence[int]], method: Partition = "mutex", stride: int = 4
) -> int:
    """Estimate the memory that `instances` takes at its peak, affinities included.

    Measured on volumes and pictures of 1.5 million voxels with smooth and with random affinities, of which these bounds
    are at most a third above the worst:

    | method | bytes per voxel | 3 offsets | 8 offsets | 11 offsets |
    |---|---|---|---|---|
    | `watershed`, `waterz` | 140 + 4 per offset | 152 | 172 | 184 |
    | `mutex`, stride 4 | 100 + 12 per offset + 70 per neighbor and stride^2 far ones | 346 | 428 | 477 |
    | `mutex`, stride 1 | the same | 346 | 756 | 1002 |

    Args:
        shape: sizes of the image S.
        offsets: of the affinities.
        method: see `instances`.
        stride: of `mutex`.

    Returns:
        Bytes.

    Example:
        >>> decoding_bytes((10, 10, 10), [[-1, 0, 0], [0, -1, 0], [0, 0, -1]], "waterz")
        152000
    """
    near = sum(sum(abs(step) for step in offset) == 1 for offset in offsets)
    if method == "mutex":
        pairs = near + (len(offsets) - near) / stride**2
        per_voxel = 100 + 12 * len(offsets) + 70 * pairs
    else:
        per_voxel = 140 + 4 * len(offsets)
    return math.ceil(math.prod(shape) * per_voxel)


class EnsureDecodabled(MapTransform):
    """Raise where there is not enough memory to make instances of an image, before a network has seen it.

    Nothing is checked where free memory is unknown (other systems than Linux), or where the package of the method is
    missing, so that affinities are saved.

    Args:
        keys: images of shape (C, *S) on the grid of the affinities.
        offsets: of the affinities.
        options: of `instances`.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        MemoryError: `decoding_bytes` are more than `free_memory`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        offsets: Sequence[Sequence[int]],
        options: Mapping[str, Any] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.offsets = [list(offset) for offset in offsets]
        options = options or {}
        self.method: Partition = options.get("method", "mutex")
        self.stride = int(options.get("stride", 4))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` as it is."""
        wheel = WHEELS.get(self.method)
        if wheel is None or find_spec(wheel) is not None:
            for key in self.key_iterator(dict(data)):
                self._check(key, tuple(data[key].shape[1:]))
        return dict(data)

    def _check(self, key: Hashable, size: tuple[int, ...]) -> None:
        needed, free = decoding_bytes(size, self.offsets, self.method, self.stride), free_memory()
        if free is None or needed <= free:
            return
        cheaper = decoding_bytes(size, self.offsets, "watershed")
        other = f", or the method 'watershed' ({cheaper / _GIB:.1f} GiB)" if cheaper < needed else ""
        raise MemoryError(
            f"`{key}` of {size} voxels must leave memory for its instances, about {needed / _GIB:.1f} GiB by "
            f"'{self.method}', got {free / _GIB:.1f} GiB free; cut the image into blocks{other}."
        )
