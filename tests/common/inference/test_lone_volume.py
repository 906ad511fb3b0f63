# SPDX-License-Identifier: Apache-2.0
"""Lone volumes: computed twice only where that is quicker, with MONAI's results."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from medkd.inference import lone_volume, sliding
from medkd.inference.lone_volume import is_slow_alone, run_lone_twice
from medkd.inference.sliding import QuickSlidingWindowInferer


class Counting(nn.Module):
    """Notes the number of windows of each call."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv3d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv3d(channels, 2, 1))
        self.calls: list[int] = []

    def forward(self, windows: Tensor) -> Tensor:
        self.calls.append(len(windows))
        result: Tensor = self.layers(windows)
        return result


def test_examples_of_the_docstrings_run() -> None:
    for module in (lone_volume, sliding):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


@pytest.mark.parametrize(
    ("channels", "size", "slow"),
    [
        (8, (1, 1, 40, 64, 9), True), (8, (1, 1, 40, 65, 9), False),       # 20,480 at 40 x 64
        (9, (1, 1, 40, 64, 9), False), (4, (2, 1, 8, 8, 8), False), (4, (1, 1, 4, 4), False),
    ],
)
def test_a_volume_is_slow_alone_by_its_channels_planes_and_rows(
    channels: int, size: Sequence[int], slow: bool
) -> None:
    assert is_slow_alone(nn.Conv3d(1, channels, 3), torch.zeros(size)) is slow


def test_networks_with_a_stem_or_of_other_precision_or_unknown_channels() -> None:
    image = torch.zeros(1, 1, 40, 96, 8)
    assert not is_slow_alone(nn.Conv3d(1, 8, 2), image)
    assert is_slow_alone(nn.Conv3d(1, 8, 2, stride=(1, 2, 2)), image)
    assert is_slow_alone(lambda windows: windows, image)           # as if of four channels
    assert not is_slow_alone(nn.Conv3d(1, 4, 3), image.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_slow_alone(nn.Conv3d(1, 4, 3), image)


@torch.no_grad()
def test_a_lone_volume_is_run_twice_with_the_same_result_and_arguments() -> None:
    network, image = Counting(), torch.randn(1, 1, 8, 9, 7, generator=torch.Generator().manual_seed(1))
    found = run_lone_twice(network, image)
    torch.testing.assert_close(found, network.layers(image), atol=1e-5, rtol=1e-4)
    assert found.shape == (1, 2, 8, 9, 7)
    assert network.calls == [2]
    run_lone_twice(network, image.expand(3, -1, -1, -1, -1))
    assert network.calls == [2, 3]
    assert torch.equal(run_lone_twice(lambda windows, a, b: windows * a + b, image, 2, b=3), image * 2 + 3)


@pytest.mark.parametrize(
    ("batch", "size", "calls"),
    [(4, (16, 16, 16), [2]), (4, (16, 16, 48), [4, 2]), (1, (16, 16, 16), [1]), (4, (16, 16, 40), [4])],
)
@torch.no_grad()
def test_windows_have_the_results_of_monai(batch: int, size: Sequence[int], calls: list[int]) -> None:
    options: dict[str, Any] = {"roi_size": (16, 16, 16), "sw_batch_size": batch, "overlap": 0.5, "mode": "gaussian"}
    network, image = Counting(), torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(2))
    found = QuickSlidingWindowInferer(**options)(image, network)
    assert network.calls == calls
    expected = SlidingWindowInferer(**options)(image, network)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_network_of_many_channels_is_run_once() -> None:
    network = Counting(channels=96)
    QuickSlidingWindowInferer((16, 16, 16), sw_batch_size=4)(torch.zeros(1, 1, 16, 16, 16), network)
    assert network.calls == [1]
