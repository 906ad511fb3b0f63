# SPDX-License-Identifier: Apache-2.0
"""Units of length that files declare."""

from __future__ import annotations

import doctest

import pytest

from medkd.inference import units
from medkd.inference.units import Unit, unit_factor, unit_power


def test_examples_of_the_docstrings_run() -> None:
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(
    ("lengths", "declared", "unit", "expected"),
    [
        ([3e-05, 6e-06, 6e-06], "mm", "nm", 1e6),
        ([0.01, 0.01, 0.01], "um", "nm", 1e3),
        ([0.01, 0.01, 0.01], "\u00b5m", "nm", 1e3),
        ([1e-8, 1e-8, 1e-8], "meter", "nm", 1e9),
        ([40.0, 40.0, 40.0], "angstrom", "nm", 0.1),
        ([10.0, 10.0, 10.0], "mm", "nm", 1.0),                       # of nearly all EM volumes as NIfTI
        ([10.0, 10.0, 10.0], "micron", "nm", 1.0),
        ([3e-05, 3e-05, 3e-05], None, "nm", 1.0),
        ([10.0, 10.0, 10.0], "pixel", "nm", 1.0),
        ([3000.0, 3000.0, 5000.0], "micrometers", "mm", 1e-3),
        ([0.003, 0.003, 0.005], "m", "mm", 1e3),
        ([3.0, 3.0, 5.0], "m", "mm", 1.0),
        ([3.0, 3.0, 5.0], "micron", "mm", 1.0),
        ([3.0, 3.0, 5.0], None, "mm", 1.0),
    ],
)
def test_a_declared_unit_is_believed_where_it_gives_a_voxel_that_there_is(
    lengths: list[float], declared: str | None, unit: Unit, expected: float
) -> None:
    assert unit_factor(lengths, declared, unit) == pytest.approx(expected)


def test_unknown_names_have_no_power_and_unknown_units_of_a_bundle_are_refused() -> None:
    assert unit_power("furlong") is None
    with pytest.raises(ValueError, match=r"`unit` must be one of \('mm', 'nm'\), got 'um'"):
        unit_factor([1.0], "mm", "um")   # type: ignore[arg-type]
