# SPDX-License-Identifier: Apache-2.0
"""Refuse a resampling that no image means: by a unit taken for another, or beyond memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from .machine import free_memory

__all__ = ["EnsureResamplabled", "resampling_problem"]

_MOST = 8.0      # from 1.2 nm to 10 nm, or from sections of 80 nm; a wrong unit makes 1,000 of it
_SHRINKING = 4.0   # by this much and to less than a patch: there is nothing left to see


def resampling_problem(
    shape: Sequence[int], spacing: Sequence[float], wanted: Sequence[float], patch_size: Sequence[int] | None = None
) -> str | None:
    """Tell why an image should not be resampled, or None.

    Args:
        shape: voxels along each spatial axis.
        spacing: of the image along each axis.
        wanted: spacing to resample to, in the same unit; 0 or less leaves an axis as it is.
        patch_size: voxels along each axis that the network takes; None does not look at it.

    Returns:
        A part of a sentence with the numbers: by more than 8 x along an axis, to less than a patch, or beyond the
        memory that is free.
    """
    pairs = list(zip(spacing, wanted, strict=False))
    target = [to if to > 0 else own for own, to in pairs]
    factors = [to / own if own > 0 else math.inf for (own, _), to in zip(pairs, target, strict=True)]
    size = [max(1, round(n / factor)) if factor else 0 for n, factor in zip(shape, factors, strict=False)]
    worst = max(factors, key=lambda factor: abs(math.log(factor)) if 0 < factor < math.inf else math.inf)
    if not 1 / _MOST <= worst <= _MOST * (1 + 1e-6) and not math.isclose(worst, 1 / _MOST):
        return f"by a factor of {max(worst, 1 / worst):.3g}, to {_numbers(size)} voxels"
    for n, after, factor, patch in zip(shape, size, factors, patch_size or (), strict=False):
        if factor > _SHRINKING and after < patch <= n:
            return f"by a factor of {factor:.3g} to {_numbers(size)} voxels, less than a patch, {patch} along an axis"
    free, needed = free_memory(), 4 * math.prod(size)
    if free is not None and needed > free and needed > 4 * math.prod(shape):
        return f"to {_numbers(size)} voxels, {needed / 2**30:,.1f} GiB of {free / 2**30:,.1f} GiB that are free"
    return None


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


class EnsureResamplabled(MapTransform):
    """Raise where `Spacingd` would resample out of all measure: a wrong unit in a header, or a file without spacing.

    Args:
        keys: images with an affine, shape (C, *S), turned as `Spacingd` gets them.
        pixdim: spacing along each axis that they will have, in `unit`; -1 keeps that of an axis.
        patch_size: input of the network; None does not look at it.
        unit: name of the unit of all lengths, for the message.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: `pixdim` has another number of axes; or by more than 8 x along an axis, by more than 4 x to less
            than a patch, or beyond free memory.
    """

    def __init__(
        self,
        keys: KeysCollection,
        pixdim: Sequence[float],
        patch_size: Sequence[int] | None = None,
        unit: str = "",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.pixdim = [float(length) for length in pixdim]
        self.patch_size = patch_size
        self.unit = unit

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give `data` as it is."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            if not hasattr(image, "affine"):
                continue
            spacing = [float(length) for length in np.asarray(image.pixdim)][: image.dim() - 1]
            if len(self.pixdim) != len(spacing):                   # Spacingd would take the last one for all others
                raise ValueError(
                    f"`spacing` must have a length for each of {len(spacing)} axes, got {self.pixdim}; -1 leaves an "
                    "axis as it is."
                )
            problem = resampling_problem(image.shape[1:], spacing, self.pixdim, self.patch_size)
            if problem:
                raise ValueError(self._message(key, image, spacing, problem))
        return result

    def _message(self, key: Hashable, image: Any, spacing: Sequence[float], problem: str) -> str:
        file = image.meta.get("filename_or_obj") or f"`{key}`"
        own, unit = _numbers(spacing), f" {self.unit}" if self.unit else ""
        return (
            f"{file} must have a spacing near {_numbers(self.pixdim)}{unit}, got {own}{unit}: it would be resampled "
            f"{problem}. If its header holds another unit or none, correct it or give the lengths of its voxels, "
            "--file_spacing \"[...]\"; if they are right, take a network for them: --spacing."
        )
