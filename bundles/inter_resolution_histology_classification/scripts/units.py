# SPDX-License-Identifier: Apache-2.0
"""Units of length that files declare, brought to the one that a bundle works in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["NIFTI_UNITS", "Unit", "unit_factor", "unit_power"]

Array = NDArray[Any]
Unit = Literal["mm", "nm"]

NIFTI_UNITS = {1: "m", 2: "mm", 3: "um"}   # the three lower bits of `xyzt_units`; 0 is unknown
_EXPONENTS = {   # name -> power of ten, in meters
    "m": 0, "meter": 0, "metre": 0, "cm": -2, "centimeter": -2, "mm": -3, "millimeter": -3, "um": -6, "micron": -6,
    "micrometer": -6, "nm": -9, "nanometer": -9, "angstrom": -10, "\u00e5": -10, "pm": -12, "picometer": -12,
}
_VOXELS: dict[str, tuple[float, float]] = {"mm": (0.01, 100.0), "nm": (0.01, 1000.0)}   # what a voxel may measure


def unit_power(name: str) -> int | None:
    """Power of ten, in meters, of a unit by its name in any of its spellings; None for another name."""
    plain = name.strip().lower().replace("\u00b5", "u").replace("\u03bc", "u").replace("\\u00b5", "u")
    plain = plain.replace("metre", "meter")
    return _EXPONENTS.get(plain, _EXPONENTS.get(plain.rstrip("s")))


def unit_factor(lengths: Sequence[float], declared: str | None, unit: Unit) -> float:
    """Tell by what to multiply the lengths of a file to have them in a bundle's unit.

    Many writers declare millimeters, or microns, whatever the numbers are: nearly all EM volumes as NIfTI hold
    nanometers and say mm or nothing. So a declaration is believed where it gives a voxel that there is: of 0.01 to
    1,000 nm in EM, of 0.01 to 100 mm in CT. Else, and where none is known, the numbers are in the bundle's unit: in EM
    3e-05 mm is 30 nm and 0.01 um is 10 nm, but 10.0 with mm, um or nothing is 10 nm, as no EM has a voxel of 10 mm.

    Args:
        lengths: of a voxel along its axes, as the file has them.
        declared: name of their unit, such as mm, micron or nanometer; None or another name is unknown.
        unit: of the bundle.

    Returns:
        The factor; 1.0 where nothing is to be changed.

    Raises:
        ValueError: `unit` is not one of these.

    Example:
        >>> unit_factor([3e-05, 6e-06, 6e-06], "mm", "nm"), unit_factor([10.0, 10.0, 10.0], "mm", "nm")
        (1000000.0, 1.0)
    """
    if unit not in _VOXELS:
        raise ValueError(f"`unit` must be one of {tuple(_VOXELS)}, got {unit!r}.")
    known, own = unit_power(declared or ""), unit_power(unit)
    if known is None or own is None or known == own:
        return 1.0
    factor = 10.0 ** (known - own)
    least, most = _VOXELS[unit]
    voxel = np.abs(np.asarray(lengths, np.float64)) * factor
    return factor if bool((voxel >= least).all() and (voxel <= most).all()) else 1.0
