# SPDX-License-Identifier: Apache-2.0
"""The bundle's own networks; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

from __future__ import annotations

import doctest
import os
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from medkd.ops.embedding import offset_affinity
from medkd.taps import FeatureTaps
from scripts import affinities, instances, networks, pictures, windows
from scripts.networks import MobileNetV2, ResidualUNet

TINY = (4, 8, 16, 32, 64)
STUDENTS = [(ResidualUNet, {"filters": TINY}), (ResidualUNet, {"filters": TINY, "stem": 2}), (MobileNetV2, {})]
OFFSETS = [[-1, 0], [0, -1], [-3, 0], [0, -3], [-5, 0], [0, -5], [-9, 0], [0, -9], [-27, 0], [0, -27]]

students = pytest.mark.parametrize(("network_class", "options"), STUDENTS, ids=["residual", "stem", "mobile"])


def built(network_class: type[torch.nn.Module], **options: Any) -> torch.nn.Module:
    """The same weights whatever the options."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network_class(**options)


def noise(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def giga_macs(network: torch.nn.Module, *size: int) -> float:
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *size, device="meta"))
    return counter.get_total_flops() / 2e9


def test_examples_of_the_docstrings_run() -> None:
    for module in (affinities, instances, networks, pictures, windows):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("network_class", "options", "unused", "published"),
    [
        (ResidualUNet, {"published_head": True}, 64 * 64 + 3 * 64 + 2 * 64 + 2, 33_613_510),
        (ResidualUNet, {"filters": TINY, "published_head": True}, 8 * 8 + 3 * 8 + 2 * 8 + 2, 295_990),
        (MobileNetV2, {"classifier": True}, 20_496, 2_264_864),
    ],
)
def test_network_has_the_published_number_of_parameters_with_its_unused_layer(
    network_class: type[torch.nn.Module], options: dict[str, Any], unused: int, published: int
) -> None:
    with torch.device("meta"):
        whole = network_class(**options)
        used = network_class(**{name: value for name, value in options.items() if name == "filters"})
    assert count(whole) == published
    assert count(used) == published - unused


def test_students_multiply_as_published_and_less_than_a_tenth() -> None:
    with torch.device("meta"):
        teacher, tiny, mobile = ResidualUNet(), ResidualUNet(TINY), MobileNetV2()
    for size, published in ((544, (581.79, 5.62, 19.29)), (512, (515.36, 4.98, 17.09))):
        counted = tuple(giga_macs(network, size, size) for network in (teacher, tiny, mobile))
        assert counted == pytest.approx(published, rel=0.01)
        assert max(counted[1:]) < 0.1 * counted[0]


@students
@pytest.mark.parametrize("size", [(1, 1), (16, 32), (17, 31), (100, 49)])
def test_result_has_the_size_of_the_image(
    network_class: type[torch.nn.Module], options: dict[str, Any], size: tuple[int, int]
) -> None:
    assert network_class(**options).eval()(noise(*size)).shape == (2, 16, *size)


@torch.no_grad()
def test_image_is_padded_with_its_last_row_and_column() -> None:
    network, image = built(ResidualUNet, filters=TINY).eval(), noise(30, 41)
    rows, columns = torch.arange(32).clamp(max=29), torch.arange(48).clamp(max=40)
    padded = network(image[:, :, rows][..., columns])
    torch.testing.assert_close(network(image), padded[..., :30, :41])


@students
def test_options_without_parameters_do_not_change_the_state(
    network_class: type[torch.nn.Module], options: dict[str, Any]
) -> None:
    first = built(network_class, **options).state_dict()
    for more in ({"output": "affinity", "offsets": OFFSETS}, {"offsets": OFFSETS}):
        second = built(network_class, **options, **more).state_dict()
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


@students
def test_gradient_reaches_every_parameter(network_class: type[torch.nn.Module], options: dict[str, Any]) -> None:
    network = network_class(**options)
    (network(noise(48, 48)) * torch.randn(2, 16, 48, 48)).sum().backward()
    weights = [(name, weight) for name, weight in network.named_parameters() if weight.dim() > 1]
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert [name for name, weight in weights if not weight.grad.any()] == []


@pytest.mark.parametrize(
    ("network_class", "options", "name"),
    [
        (ResidualUNet, {"filters": TINY, "published_head": True}, "foreground"),
        (MobileNetV2, {"classifier": True}, "classifier"),
    ],
)
def test_published_layer_without_use_gets_no_gradient(
    network_class: type[torch.nn.Module], options: dict[str, Any], name: str
) -> None:
    network = network_class(**options)
    network(noise(32, 32)).sum().backward()
    untouched = {path.split(".")[0] for path, parameter in network.named_parameters() if parameter.grad is None}
    assert untouched == {name}


def test_taps_are_the_levels_that_the_docstrings_name() -> None:
    residual = {f"encoder.{level}": (TINY[level], 32 >> level, 48 >> level) for level in range(5)}
    residual |= {f"decoder.{level}": (TINY[4 - level], 4 << level, 6 << level) for level in range(4)}
    residual["embedding"] = (16, 32, 48)
    stem = {"encoder.0": (4, 16, 32), "encoder.4": (64, 1, 2), "decoder.3": (8, 16, 32), "embedding": (16, 32, 64)}
    mobile = {
        "features.0": (32, 15, 21), "features.1": (16, 15, 21), "features.3": (24, 15, 21), "features.6": (32, 8, 11),
        "features.10": (64, 8, 11), "features.13": (96, 8, 11), "features.16": (160, 4, 6), "features.17": (320, 4, 6),
        "features.18": (1280, 4, 6), "embedding": (16, 4, 6),
    }
    with torch.device("meta"):
        networks = ((ResidualUNet(TINY), residual), (ResidualUNet(TINY, stem=2), stem), (MobileNetV2(), mobile))
        for network, expected in networks:
            taps = FeatureTaps(network, list(expected), "student")
            taps.open()
            network(torch.zeros(1, 3, 30, 41))
            outputs = taps.close()
            assert {path: tuple(outputs[path].shape[1:]) for path in expected} == expected


@students
@pytest.mark.parametrize("output", ["embedding", "affinity"])
@torch.no_grad()
def test_script_and_trace_equal_the_network_at_other_sizes(
    network_class: type[torch.nn.Module], options: dict[str, Any], output: str
) -> None:
    network = network_class(**options, output=output, offsets=OFFSETS).eval()
    script, trace = torch.jit.script(network), torch.jit.trace(network, noise(30, 41), check_trace=False)
    for size in ((30, 41), (54, 64)):
        expected = network(noise(*size))
        torch.testing.assert_close(script(noise(*size)), expected)
        torch.testing.assert_close(trace(noise(*size)), expected)


@students
@torch.no_grad()
def test_affinity_output_is_that_of_the_embedding_output(
    network_class: type[torch.nn.Module], options: dict[str, Any]
) -> None:
    embedding = built(network_class, **options).eval()(noise(40, 31))
    affinity = built(network_class, **options, output="affinity", offsets=OFFSETS).eval()(noise(40, 31))
    assert affinity.shape == (2, 10, 40, 31)
    torch.testing.assert_close(affinity, offset_affinity(embedding, OFFSETS).clamp(0, 1))


def test_stem_spares_three_quarters_of_the_multiplications() -> None:
    with torch.device("meta"):
        plain, small = ResidualUNet(TINY), ResidualUNet(TINY, stem=2)
    assert giga_macs(small, 512, 512) < 0.3 * giga_macs(plain, 512, 512)


@pytest.mark.parametrize("filters", [(1, 2, 3, 4), (1, 2, 3, 4, 0)])
def test_wrong_filters_are_refused(filters: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`filters` must be 5 numbers of at least 1, got \[1, 2, 3, 4"):
        ResidualUNet(filters)
    with pytest.raises(ValueError, match="`stem` must be at least 1, got 0"):
        ResidualUNet(TINY, stem=0)


@students
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": "mask"}, r"`output` must be one of \['embedding', 'affinity', 'direct_affinity'\], got 'mask'"),
        ({"output": "affinity"}, "`offsets` must be given for the output 'affinity', got None"),
        ({"offsets": [[0, -1, 0]]}, r"`offsets` must be vectors of 2 whole numbers, not all 0, got \[\[0, -1, 0\]\]"),
    ],
)
def test_outputs_that_do_not_exist_are_refused(
    network_class: type[torch.nn.Module], options: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        network_class(**options, **more)
