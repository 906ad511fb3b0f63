# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with a label: numbers that are lost, values that are no classes, a mask in place of instances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.data.naming import shorten
from medkd.data.volumes import Volume, raw_values

__all__ = ["label_problems", "masks_line", "stored_numbers"]

_EXACT = {np.dtype(np.float16): 2**11, np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}
_DENSE = 2**22            # values that are counted without sorting
_FEW = 3                  # numbers in a label that may be a mask
_MANY = 10                # pieces of one number that speak of a mask
IGNORED = -1


def stored_numbers(path: str, stored: np.dtype[Any] | None) -> tuple[np.dtype[Any] | None, str | None]:
    """Type that a label is stored in, and a problem: fractions or NaN, which a reader of whole numbers would cut off.

    Args:
        path: the label.
        stored: its type by the header; None reads it to find out. Whole numbers are not looked at.
    """
    if stored is not None and stored.kind != "f":
        return stored, None
    try:
        values = raw_values(path)
    except Exception:   # a kind that only the reader of the bundle knows
        return stored, None
    if values.dtype.kind != "f":
        return stored or values.dtype, None
    with np.errstate(invalid="ignore"):
        broken = np.unique(values[~(values == np.rint(values)) | np.isinf(values)])
    if not broken.size:
        return stored or values.dtype, None
    return stored, (
        f"{path} must have whole numbers, got {shorten([f'{value:g}' for value in broken])}; "
        "it may have been resampled: use nearest-neighbor interpolation for labels."
    )


def label_problems(
    data: NDArray[Any], volume: Volume, num_classes: int | None, allow_ignored: bool
) -> Iterator[str]:
    """Count the values of a label (C, *S), and tell what is wrong with them."""
    if volume.channels > 1:
        yield (
            f"{volume.path} must have one channel of class numbers, got {volume.channels}; "
            "save a label in color as gray, with the number of the class as value."
        )
        return
    volume.counts = _count(data)
    lost = _lost(data, volume)
    if lost and num_classes is None:
        yield lost
        return
    yield from _values_outside(volume, num_classes, allow_ignored)
    if num_classes is None and 0 < sum(value > 0 for value in volume.counts) <= _FEW:
        volume.pieces = _pieces(data[0], [value for value in volume.counts if value > 0])


def _count(data: NDArray[Any]) -> Counter[int]:
    low, high = int(data.min()), int(data.max())
    counts: Counter[int] = Counter()
    for slab in np.array_split(data, max(1, data.size // 2**24), axis=-1):   # a slab is copied
        if high - low < _DENSE:
            found = np.bincount((slab - low).astype(np.int64).ravel())
            counts.update({int(value) + low: int(found[value]) for value in np.flatnonzero(found)})
        else:
            values, times = np.unique(slab, return_counts=True)
            counts.update(dict(zip(map(int, values), map(int, times), strict=True)))
    return counts


def _lost(data: NDArray[Any], volume: Volume) -> str | None:
    """Numbers that the type of the file, or that of the reader, cannot tell apart."""
    stored, low, high = volume.header.stored, min(volume.counts), max(volume.counts)
    if stored == np.uint64 and low < 0:
        most = max(value for value in volume.counts if value < 0) + 2**64
        return (
            f"{volume.path} must have numbers below 2^63, got up to {most:,} in uint64, which become negative; "
            "number the instances anew from 1 on."
        )
    for kind, where in ((stored, "stores"), (data.dtype, "is read as")):
        limit = _EXACT.get(np.dtype(kind)) if kind is not None else None
        if limit and max(high, -low) >= limit:
            return (
                f"{volume.path} must have numbers below {limit:,}, as it {where} {kind}, got {high:,}, where neighbors "
                "are the same number; save whole numbers (uint32), or number the instances anew from 1 on."
            )
    return None


def _values_outside(volume: Volume, num_classes: int | None, allow_ignored: bool) -> Iterator[str]:
    top = np.inf if num_classes is None else num_classes - 1
    allowed = {IGNORED} if allow_ignored else set()
    outside = [value for value in sorted(volume.counts) if not 0 <= value <= top and value not in allowed]
    if not outside:
        return
    got = shorten(list(map(str, outside)))
    if num_classes is None:
        also = " or -1, to ignore voxels" if allow_ignored else ""
        way_out = "map what is to be ignored to -1" if allow_ignored else "no voxel can be ignored here: map it to 0"
        yield f"{volume.path} must have values of 0 or more{also}, got {got}; {way_out}."
        return
    way_out = "map these values, or set `num_classes` to the number of classes with the background"
    if any(value < 0 or value == 255 for value in outside):
        no_way = "; voxels cannot be ignored here, as the supervised loss has no notion of them"
        way_out = "map what is to be ignored to -1, and other values to classes" if allow_ignored else way_out + no_way
    yield f"{volume.path} must have values in 0..{num_classes - 1}, got {got}; {way_out}."


def _pieces(label: NDArray[Any], values: Sequence[int]) -> int:
    """Largest number of connected parts that one value has, by faces, edges and corners."""
    from scipy import ndimage

    touching = np.ones((3,) * label.ndim)
    return max(int(ndimage.label(label == value, touching)[1]) for value in values)


def masks_line(labels: Sequence[Volume]) -> str | None:
    """Say that labels of instances look like masks, in which one number stands for many objects."""
    single = [label for label in labels if sum(value > 0 for value in label.counts) == 1]
    together = sum(label.pieces for label in single)
    all_masks = len(single) == len([label for label in labels if label.marks]) and together > 2 * len(single)
    masks = [label for label in labels if label.pieces >= _MANY] or (single if all_masks and together >= _MANY else [])
    if not masks:
        return None
    most = max(masks, key=lambda label: label.pieces)
    return (
        f"{len(masks)} of {len(labels)} labels look like masks, not like instances: in {most.path} one number has "
        f"{most.pieces} separate parts, and would be one instance; give each part a number of its own: write the "
        "datalist anew with `medkd datalist ... --label_components`."
    )
