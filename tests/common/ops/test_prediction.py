# SPDX-License-Identifier: Apache-2.0
"""What a network's output stands for."""

from __future__ import annotations

import pytest
import torch

from medkd.ops.prediction import largest_channel


@pytest.mark.parametrize("channels", [1, 2, 5, 300])
@pytest.mark.parametrize("size", [(5, 7), (3, 4, 5)])
def test_the_largest_channel_is_that_of_torch_and_of_equal_ones_the_first(channels: int, size: tuple[int, ...]) -> None:
    maps = torch.randn(2, channels, *size)
    assert torch.equal(largest_channel(maps), maps.argmax(1, keepdim=True))
    coarse = maps.round()
    assert torch.equal(largest_channel(coarse), coarse.argmax(1, keepdim=True))
