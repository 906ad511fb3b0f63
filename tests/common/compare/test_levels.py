# SPDX-License-Identifier: Apache-2.0
"""Levels of networks: MONAI's U-Net by its blocks, others by their names or by the size of their maps."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from medkd.compare.levels import Level, align_levels, find_levels, named_levels


def unet(axes: int, channels: tuple[int, ...], strides: tuple[int, ...]) -> nn.Module:
    return UNet(spatial_dims=axes, in_channels=1, out_channels=2, channels=channels, strides=strides)


class Plain(nn.Module):
    """No names to go by: down, down, up."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU())
        self.b = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.c = nn.Conv2d(3, 3, 3, padding=1)
        self.d = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.d(self.c(self.b(self.a(image))))
        return result


@pytest.mark.parametrize("axes", [2, 3])
def test_levels_of_a_unet_are_its_blocks_in_the_order_of_the_pass(axes: int) -> None:
    levels = find_levels(unet(axes, (2, 3, 4), (2, 2)), (8,) * axes)
    assert [(level.path, level.side, level.stride[0]) for level in levels] == [
        ("model.0", "encoder", 2), ("model.1.submodule.0", "encoder", 4),
        ("model.1.submodule.1.submodule", "encoder", 4),
        ("model.1.submodule.2", "decoder", 2), ("model.2", "decoder", 1),
    ]
    assert [level.path for level in levels if level.is_output] == ["model.2"]   # its last block gives the logits


def test_levels_of_an_unknown_network_are_the_last_layers_of_a_size() -> None:
    levels = find_levels(Plain(), (16, 16))
    assert [(level.path, level.side, level.stride) for level in levels] == [
        ("a", "encoder", (2, 2)), ("c", "encoder", (4, 4)), ("d", "decoder", (2, 2)),
    ]


def test_hooks_are_taken_off() -> None:
    network = Plain()
    find_levels(network, (16, 16))
    assert not any(module._forward_hooks for module in network.modules())


def test_levels_of_one_stride_stand_in_a_row_and_others_alone() -> None:
    small, large = unet(2, (2, 3), (2,)), unet(2, (2, 3, 4), (2, 2))
    rows = align_levels({"small": find_levels(small, (16, 16)), "large": find_levels(large, (16, 16))})
    assert [(row.title, dict(row.paths)) for row in rows] == [
        ("encoder, 1/2 of the size", {"small": "model.0", "large": "model.0"}),
        ("encoder, 1/4 of the size", {"large": "model.1.submodule.0"}),
        ("encoder, 1/4 of the size, no. 2", {"large": "model.1.submodule.1.submodule"}),
        ("decoder, 1/2 of the size", {"large": "model.1.submodule.2"}),
        ("decoder, full size", {"small": "model.2", "large": "model.2"}),
        ("encoder, 1/2 of the size, no. 2", {"small": "model.1.submodule"}),
    ]


def test_named_taps_go_together_by_their_order() -> None:
    levels = {name: [Level(path, "tap", (step,))] for name, path, step in (("one", "a", 2), ("two", "b", 4))}
    rows = align_levels(levels)
    assert [dict(row.paths) for row in rows] == [{"one": "a", "two": "b"}]
    assert rows[0].title == "a, 1/2 of the size; b, 1/4 of the size"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("modle.0", "A tap of the teacher must be a module or parameter path of UNet, got 'modle.0'; did you mean"),
        ("model.0.conv.bias", "A tap of `teacher` must give maps .* of 2 axes, got \\(2,\\)"),
    ],
)
def test_tap_that_gives_no_map_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_levels(unet(2, (2, 3), (2,)), [path], (8, 8), "teacher")


def test_a_row_knows_of_which_networks_it_shows_the_logits() -> None:
    taps = {"one": ["a", "d"], "two": ["d", "c"]}
    levels = {name: named_levels(Plain(), paths, (8, 8), name) for name, paths in taps.items()}
    assert [list(row.logits) for row in align_levels(levels)] == [["two"], ["one"]]


def test_a_network_without_a_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential must have a convolution of 2 axes, got none"):
        find_levels(nn.Sequential(nn.Linear(2, 2)), (8, 8))


def test_tap_that_never_runs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Taps \['unused'\] of the student never fired"):
        named_levels(Plain(), ["unused"], (8, 8), "student")


def test_the_state_of_a_network_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    find_levels(network, (8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
