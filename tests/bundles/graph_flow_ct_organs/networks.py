# SPDX-License-Identifier: Apache-2.0
"""The bundle's own networks; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

from __future__ import annotations

import doctest
import os
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from medkd.taps import FeatureTaps
from scripts import enet, fanet, networks, padding
from scripts.enet import ENet
from scripts.fanet import FANet
from scripts.networks import ERFNet, MobileUNet

SMALL = {"filters": (8, 16, 24, 32)}                               # of FANet
TINY = {"spatial_dims": 3, "filters": (8, 24, 48), "dilations": (1, 2, 3, 4)}
FANET_TAPS = {                                                     # channels, stride
    "encoder.0": (64, 1), "encoder.1": (128, 2), "encoder.2": (256, 4), "encoder.3": (512, 8),
    "decoder.0.up": (256, 4), "decoder.1.up": (128, 2), "decoder.2.up": (64, 1),
    "decoder.0": (256, 4), "decoder.1": (128, 2), "decoder.2": (64, 1),
}
MOBILE_TAPS = {
    "encoder.0": (16, 2), "encoder.1": (24, 4), "encoder.2": (32, 8), "encoder.3": (96, 16), "encoder.4": (1280, 32),
    "decoder.0": (96, 16), "decoder.1": (32, 8), "decoder.2": (24, 4), "decoder.3": (16, 2), "head": (2, 2),
}
ENET_TAPS = {
    "initial": (16, 2), "stage1": (64, 4), "stage2": (128, 8), "stage3": (128, 8), "stage4": (64, 4), "stage5": (16, 2),
}
ENET_TINY_TAPS = {
    "initial": (8, 2), "stage1": (24, 4), "stage2": (48, 8), "stage3": (48, 8), "stage4": (24, 4), "stage5": (8, 2),
}
ERFNET_TAPS = {
    "initial": (16, 2), "down1": (64, 4), "stage1": (64, 4), "down2": (128, 8), "stage2": (128, 8), "stage3": (64, 4),
    "stage4": (16, 2),
}
PAPER_TAPS = {FANet: ("encoder.2", "decoder.0.up"), MobileUNet: ("encoder.1", "decoder.2"),
              ENet: ("stage1", "stage4"), ERFNet: ("down1", "stage3")}

all_networks = pytest.mark.parametrize(
    ("network_class", "options"), [(FANet, SMALL), (MobileUNet, {}), (ENet, {}), (ENet, TINY), (ERFNet, {})],
    ids=["fanet", "mobile", "enet", "enet3d", "erfnet"],
)
Network = type[nn.Module]


def built(network_class: Network, **options: Any) -> nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network_class(**options)


def noise(batch: int, options: dict[str, Any], *size: int) -> Tensor:
    """Image of the first sides of a size, as many as the network has dimensions."""
    sides = size[: options.get("spatial_dims", 2)]
    return torch.randn(batch, 1, *sides, generator=torch.Generator().manual_seed(1))


def trained(network_class: Network, options: dict[str, Any]) -> nn.Module:
    """A network in evaluation whose normalizations have seen an image, as those of a new one hide mistakes."""
    network = built(network_class, **options)
    with torch.random.fork_rng(), torch.no_grad():
        network(noise(2, options, 32, 40, 16))
    return network.eval()


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_examples_of_the_docstrings_run() -> None:
    for module in (enet, fanet, networks, padding):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


@pytest.mark.parametrize(("network_class", "parameters", "millions", "giga_macs"), [
    (FANet, 38_292_162, "38.292", "166.6"), (MobileUNet, 4_682_323, "4.682", "0.963"),
    (ENet, 348_974, "0.349", "0.461"), (ERFNet, 2_062_872, "2.063", "3.304"),
])
def test_published_networks_have_the_published_sizes(
    network_class: Network, parameters: int, millions: str, giga_macs: str
) -> None:
    with torch.device("meta"):
        network = network_class().eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 1, 256, 256))
    flops = sum(value for name, value in counter.get_flop_counts()["Global"].items() if "convolution" in str(name))
    assert count(network) == parameters
    assert f"{parameters / 1e6:.3f}" == millions
    assert f"{flops / 2e9:.{len(giga_macs.split('.')[1])}f}" == giga_macs


def test_what_is_left_out_is_the_difference_to_the_published_code() -> None:
    with torch.device("meta"):
        assert f"{(count(MobileUNet()) + 1280 * 1000 + 1000) / 1e6:.3f}" == "5.963"
        assert f"{(count(ERFNet()) + 2 * 128 + 2) / 1e6:.3f}" == "2.063"
        assert count(FANet()) + 2 * 64 + 2 + 3 < 38_292_500


@pytest.mark.parametrize("classes", [2, 8])
def test_tiny_volume_student_has_one_to_six_percent_of_its_teacher(classes: int) -> None:
    with torch.device("meta"):
        teacher = UNet(3, 1, classes, channels=(24, 48, 96, 192), strides=(2, 2, 2), num_res_units=2)
        student = ENet(classes, **TINY)
    assert f"{count(teacher) / 1e6:.1f}" == "2.7"
    assert 0.01 < count(student) / count(teacher) < 0.06


@pytest.mark.parametrize(("network_class", "options", "taps"), [
    (FANet, {}, FANET_TAPS), (MobileUNet, {}, MOBILE_TAPS), (ENet, {}, ENET_TAPS), (ENet, TINY, ENET_TINY_TAPS),
    (ERFNet, {}, ERFNET_TAPS),
], ids=["fanet", "mobile", "enet", "enet3d", "erfnet"])
def test_taps_are_those_that_the_docstrings_name(
    network_class: Network, options: dict[str, Any], taps: dict[str, tuple[int, int]]
) -> None:
    size = (64, 96, 32)[: options.get("spatial_dims", 2)]
    with torch.device("meta"):
        network = network_class(**options)
        recorder = FeatureTaps(network, list(taps), "student")
        recorder.open()
        network(torch.zeros(1, 1, *size))
    found = {name: tuple(value.shape[1:]) for name, value in recorder.close().items()}
    assert found == {name: (channels, *(side // stride for side in size)) for name, (channels, stride) in taps.items()}


@all_networks
def test_papers_taps_are_read_and_take_a_gradient_in_training(network_class: Network, options: dict[str, Any]) -> None:
    """An in-place layer behind a tap would make `close` fail."""
    network = built(network_class, **options)
    recorder = FeatureTaps(network, PAPER_TAPS[network_class], "student")
    recorder.open()
    loss = network(noise(2, options, 32, 40, 16)).square().mean()
    first, second = recorder.close().values()
    assert first.shape[2:] == second.shape[2:]
    gradients = torch.autograd.grad(loss, [first, second])
    assert all(gradient.any() for gradient in gradients)


@all_networks
@pytest.mark.parametrize("size", [(1, 1, 1), (33, 50, 9), (64, 32, 8)])
@torch.no_grad()
def test_result_has_the_size_of_the_image(
    network_class: Network, options: dict[str, Any], size: tuple[int, ...]
) -> None:
    image = noise(1, options, *size)
    assert built(network_class, **options).eval()(image).shape == (1, 2, *image.shape[2:])


@all_networks
@torch.no_grad()
def test_image_is_padded_with_its_last_row_column_and_plane(network_class: Network, options: dict[str, Any]) -> None:
    network, image = trained(network_class, options), noise(1, options, 30, 41, 15)
    padded = image
    for axis, side in enumerate(image.shape[2:], start=2):
        padded = padded.index_select(axis, torch.arange(-(-side // 32) * 32).clamp(max=side - 1))
    if network_class is not MobileUNet:                            # pads to multiples of 8 only
        for axis, side in enumerate(image.shape[2:], start=2):
            padded = padded.narrow(axis, 0, -(-side // 8) * 8)
    expected = network(padded)
    for axis, side in enumerate(image.shape[2:], start=2):
        expected = expected.narrow(axis, 0, side)
    torch.testing.assert_close(network(image), expected)


@all_networks
def test_gradient_reaches_every_parameter(network_class: Network, options: dict[str, Any]) -> None:
    network = built(network_class, **options)
    image = noise(2, options, 64, 32, 16)
    (network(image) * torch.randn(2, 2, *image.shape[2:])).sum().backward()
    weights = [(name, weight) for name, weight in network.named_parameters() if weight.dim() > 1]
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert [name for name, weight in weights if not weight.grad.any()] == []


@all_networks
def test_a_few_steps_learn_to_find_a_bright_box(network_class: Network, options: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network_class(**options)
        image = noise(2, options, 32, 32, 16)
        label = torch.zeros(2, *image.shape[2:], dtype=torch.long)
        label[0, 4:20, 8:24] = label[1, 12:28, 4:20] = 1
        image += 3 * label.unsqueeze(1)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = F.cross_entropy(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.85 * losses[0]


@all_networks
@torch.no_grad()
def test_script_and_trace_equal_the_network_at_other_sizes(network_class: Network, options: dict[str, Any]) -> None:
    network = trained(network_class, options)
    images = [noise(1, options, *size) for size in ((30, 41, 9), (40, 64, 24))]
    script, trace = torch.jit.script(network), torch.jit.trace(network, images[0], check_trace=False)
    for image in images:
        expected = network(image)
        torch.testing.assert_close(script(image), expected)
        torch.testing.assert_close(trace(image), expected)


@pytest.mark.parametrize(("network_class", "options", "digest"), [
    (FANet, {}, 1_869_375_381), (MobileUNet, {}, 2_750_995_817), (ENet, {}, 2_488_825_737),
    (ENet, TINY, 906_110_987), (ERFNet, {}, 2_001_662_143),
], ids=["fanet", "mobile", "enet", "enet3d", "erfnet"])
def test_names_and_shapes_of_the_weights_stay_as_files_have_them(
    network_class: Network, options: dict[str, Any], digest: int
) -> None:
    with torch.device("meta"):
        state = network_class(**options).state_dict()
    assert zlib.crc32(repr([(name, tuple(value.shape)) for name, value in state.items()]).encode()) == digest


@pytest.mark.parametrize("size", [(8, 12), (6, 4, 10)])
def test_pooling_by_places_equals_that_by_indices_with_its_gradient(size: Sequence[int]) -> None:
    """Of equal values, of which whole numbers have many, both take the first."""
    pool = F.max_pool2d if len(size) == 2 else F.max_pool3d
    unpool = F.max_unpool2d if len(size) == 2 else F.max_unpool3d
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 3, (2, 3, *size), generator=generator).double().requires_grad_()
    factor = torch.randn(2, 3, *(side // 2 for side in size), generator=generator, dtype=torch.float64)
    pattern = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    results = []
    for largest, back in (
        (enet._pool, enet._unpool),
        (lambda x: pool(x, 2, return_indices=True), lambda x, place: unpool(x, place, 2)),
    ):
        values, place = largest(image)
        wide = back(values * factor, place)
        results.append((values, wide, torch.autograd.grad((wide * pattern).sum(), image)[0]))
    assert results[0][2].any()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(64, 64), (32, 17), (2, 5), (1, 1)])
@pytest.mark.parametrize("cells", [3, 6, 12, 18])
def test_means_of_cells_are_those_of_adaptive_pooling(size: tuple[int, int], cells: int) -> None:
    features = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(fanet._cell_means(features, cells), F.adaptive_avg_pool2d(features, cells))


@torch.no_grad()
def test_selective_kernels_are_weighed_by_a_softmax_over_the_branches() -> None:
    layer = fanet._SelectiveKernels(4).eval()
    features = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    wide, narrow = layer.wide(features), layer.narrow(features)
    seen = layer.squeeze(F.adaptive_avg_pool2d(wide + narrow, 1))
    weights = torch.stack([layer.choose_wide(seen), layer.choose_narrow(seen)]).softmax(dim=0)
    torch.testing.assert_close(layer(features), weights[0] * wide + weights[1] * narrow)


def test_normalization_of_several_values_is_torchs() -> None:
    ours, theirs = fanet._BatchNorm(3), nn.BatchNorm2d(3)
    for shape in ((2, 3, 1, 1), (1, 3, 4, 5)):
        features = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(features), theirs(features))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))


def test_one_sample_is_trained_on_with_running_statistics_of_the_channel_weights() -> None:
    network = built(FANet, **SMALL)
    before = {name: value.clone() for name, value in network.named_buffers()}
    network(noise(1, {}, 32, 32)).square().sum().backward()
    same = {name for name, value in network.named_buffers() if torch.equal(value, before[name])}
    assert same == {name for name in before if ".squeeze." in name}
    assert all(parameter.grad is not None for parameter in network.parameters())
    network(noise(2, {}, 32, 32))
    assert not any(torch.equal(value, before[name]) for name, value in network.named_buffers() if "mean" in name)


@torch.no_grad()
def test_lines_of_a_volume_lie_along_each_of_its_axes() -> None:
    with torch.device("meta"):
        volumes, images = ENet(**TINY), ENet()
    kernels = [
        [tuple(w.shape[2:]) for w in net.stage2.parameters() if 5 in w.shape[2:]] for net in (volumes, images)
    ]
    assert kernels[0] == [(5, 1, 1), (1, 5, 1), (1, 1, 5)] * 2
    assert kernels[1] == [(5, 1), (1, 5)] * 2


@pytest.mark.parametrize(("network_class", "options", "message"), [
    (FANet, {"filters": (4, 8)}, r"`filters` must be 4 multiples of 2, got \[4, 8\]"),
    (FANet, {"filters": (4, 8, 9, 16)}, r"`filters` must be 4 multiples of 2, got \[4, 8, 9, 16\]"),
    (ERFNet, {"in_channels": 16}, "`in_channels` must be from 1 to 15, got 16"),
    (ENet, {"spatial_dims": 1}, "`spatial_dims` must be 2 or 3, got 1"),
    (ENet, {"filters": (8, 24)}, r"`filters` must be 3 growing multiples of 4 above `in_channels`, 1, got \[8, 24\]"),
    (ENet, {"filters": (8, 24, 30)}, r"got \[8, 24, 30\]"),
    (ENet, {"filters": (8, 8, 16)}, r"got \[8, 8, 16\]"),
    (ENet, {"in_channels": 16}, r"above `in_channels`, 16, got \[16, 64, 128\]"),
    (ENet, {"dilations": (1, 2)}, r"`dilations` must be 4 numbers of at least 1, got \[1, 2\]"),
    (ENet, {"dilations": (0, 1, 2, 4)}, r"got \[0, 1, 2, 4\]"),
])
def test_options_that_fit_no_network_are_refused(network_class: Network, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        network_class(**options)
