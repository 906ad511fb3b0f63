# SPDX-License-Identifier: Apache-2.0
"""Attention maps: over windows as over the whole, and normalized on any grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medkd.compare import attention
from medkd.compare.attention import attention_maps, normalized


class Pointwise(nn.Module):
    """Half the size, each voxel on its own, so that windows see what the whole image shows."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        kind, pool = (nn.Conv2d, nn.AvgPool2d) if axes == 2 else (nn.Conv3d, nn.AvgPool3d)
        self.full = kind(1, 3, 1)
        self.small = nn.Sequential(pool(2), kind(3, 5, 1))

    def forward(self, image: Tensor) -> Tensor:
        full: Tensor = self.full(image)
        self.small(full)
        return full


def test_normalized_map_has_the_quadratic_mean_1_on_any_grid() -> None:
    fine = torch.rand(8, 6).repeat_interleave(2, 0).repeat_interleave(2, 1)
    coarse = fine[::2, ::2]
    assert torch.allclose(normalized(7 * fine)[::2, ::2], normalized(coarse))
    assert float(normalized(fine).square().mean()) == pytest.approx(1, rel=1e-5)


def test_map_of_zeros_stays_as_it_is() -> None:
    assert normalized(torch.zeros(3, 3)).abs().max() == 0


@pytest.mark.parametrize(("size", "window"), [((14, 10), (8, 4)), ((10, 6, 8), (4, 6, 4)), ((6, 4), (8, 8))])
def test_windows_give_what_the_whole_image_gives(size: tuple[int, ...], window: tuple[int, ...]) -> None:
    network, image = Pointwise(len(size)).eval(), torch.rand(1, 1, *size)
    whole = dict(attention_maps(network, image, ["full"], size))
    parts = dict(attention_maps(network, image, ["full"], window))
    assert parts["full"].shape == size
    assert torch.allclose(whole["full"], parts["full"], atol=1e-5)


def test_a_network_of_slices_sees_those_of_a_volume() -> None:
    network, volume = Pointwise(2).eval(), torch.rand(1, 1, 10, 6, 3)
    ((_, found),) = attention_maps(network, volume, ["full"], (8, 4))
    with torch.no_grad():
        powers = torch.stack([network.full(volume[..., z]).pow(4).mean(1)[0] for z in range(3)], dim=-1)
    assert torch.allclose(found, normalized(powers), atol=1e-5)


def test_layers_come_in_their_order_whatever_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = Pointwise(2).eval(), torch.rand(1, 1, 8, 8)
    at_once = list(attention_maps(network, image, ["small", "full"], (8, 8)))
    monkeypatch.setattr(attention, "free_memory", lambda: 0.0)
    one_by_one = list(attention_maps(network, image, ["small", "full"], (8, 8)))
    assert [path for path, _ in at_once] == [path for path, _ in one_by_one] == ["small", "full"]
    assert all(torch.equal(mine, other) for (_, mine), (_, other) in zip(at_once, one_by_one, strict=True))
    assert not network.full._forward_hooks
