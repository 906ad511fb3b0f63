# SPDX-License-Identifier: Apache-2.0
"""The published 2-D networks: sizes, taps, and any size of image; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bundle_runs import parsed
from medkd.taps import FeatureTaps

UNET_TAPS = {                                                      # hlfd of the released code: channels, stride
    "x1_0": (128, 2), "x2_0": (256, 4), "x1_1": (128, 2), "x3_0": (512, 8), "x4_0": (1024, 16),
    "x0_1": (64, 1), "x0_2": (64, 1), "x0_3": (64, 1), "x1_3": (128, 2),
}
RESNET_TAPS = {"act": (64, 2), "layer1": (64, 4), "layer2": (128, 8), "layer3": (256, 16), "layer4": (512, 32)}


@pytest.fixture
def networks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "train", "kidney_2d", "paper")
    return {
        "student": parser.get_parsed_content("network_def"), "teacher": parser.get_parsed_content("teacher_def")(),
    }


def test_published_networks_have_the_published_sizes(networks: dict[str, nn.Module]) -> None:
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert sizes == {"student": 11_178_434, "teacher": 36_628_546}


@pytest.mark.parametrize(("role", "prefix", "taps"), [
    ("teacher", "nodes.", UNET_TAPS), ("student", "encoder.", RESNET_TAPS),
])
def test_taps_have_the_published_channels_and_strides(
    networks: dict[str, nn.Module], role: str, prefix: str, taps: dict[str, tuple[int, int]]
) -> None:
    network = networks[role].eval()
    recorder = FeatureTaps(network, [prefix + name for name in taps], role)
    recorder.open()
    with torch.no_grad():
        network(torch.zeros(1, 1, 64, 96))
    found = {name.removeprefix(prefix): tuple(value.shape[1:]) for name, value in recorder.close().items()}
    assert found == {name: (channels, 64 // stride, 96 // stride) for name, (channels, stride) in taps.items()}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("size", [(33, 50), (64, 64), (1, 20)])
def test_any_size_is_taken(networks: dict[str, nn.Module], role: str, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert networks[role].eval()(torch.zeros(1, 1, *size)).shape == (1, 2, *size)


def test_every_node_counts_for_the_prediction(networks: dict[str, nn.Module]) -> None:
    """A node that were computed and then left out would have no gradient."""
    for network in networks.values():
        network(torch.randn(2, 1, 64, 64)).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_wrong_number_of_levels_is_refused(networks: dict[str, nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"`filters` must be 5 numbers of at least 1, got \[4, 8\]"):
        type(networks["teacher"])(filters=[4, 8])
