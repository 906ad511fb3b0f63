# SPDX-License-Identifier: Apache-2.0
"""Noise of lower dose has the deviation in HU that was asked for, is smooth, and the same where it has a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medkd.inference.scanner_noise import RandScannerNoised

SHAPE = (1, 32, 30, 28)


@pytest.mark.parametrize("width", [0.0, 1.0])
def test_the_deviation_is_that_in_hounsfield_units_and_neighbors_are_alike_where_it_is_smooth(width: float) -> None:
    transform = RandScannerNoised("image", 25.0, width)
    transform.set_random_state(0)
    noise = transform({"image": torch.full(SHAPE, 40.0)})["image"] - 40.0
    assert noise.dtype == torch.float32
    assert noise.std().item() == pytest.approx(25.0, rel=0.02)
    assert abs(noise.mean().item()) < 3.0
    alike = np.corrcoef(noise[0, 1:].flatten(), noise[0, :-1].flatten())[0, 1]
    assert alike == pytest.approx(np.exp(-1 / 4) if width else 0.0, abs=0.05)   # exp(-d^2 / 4 width^2)


def test_the_deviation_is_drawn_for_each_case_and_a_seed_repeats_the_noise() -> None:
    transform = RandScannerNoised("image", (5.0, 50.0))
    transform.set_random_state(0)
    drawn = [transform({"image": torch.zeros(SHAPE)})["image"].std().item() for _ in range(6)]
    assert 5.0 <= min(drawn) < 20.0 < max(drawn) <= 50.0
    fixed = RandScannerNoised("image", (5.0, 50.0), seed=3)
    first, second = (fixed({"image": torch.zeros(SHAPE)})["image"] for _ in range(2))
    assert torch.equal(first, second)


def test_the_grid_stays_and_the_input_too() -> None:
    image = MetaTensor(torch.zeros(1, 4, 4), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    noisy = RandScannerNoised("image", 10.0)({"image": image})["image"]
    assert torch.equal(noisy.affine, image.affine)
    assert not image.any()
    assert noisy.any()
    assert not RandScannerNoised("image", 0.0)({"image": image})["image"].any()


@pytest.mark.parametrize(
    ("std", "width", "message"),
    [(-1.0, 1.0, "`std` must be"), ((5.0, 2.0), 1.0, "`std` must be"), ("a", 1.0, "`std` must be"),
     (1.0, -0.5, "`width` must be 0 or more voxels, got -0.5")],
)
def test_numbers_that_are_none_are_refused(std: Any, width: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandScannerNoised("image", std, width)
