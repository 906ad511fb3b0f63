# SPDX-License-Identifier: Apache-2.0
"""The bundle's own network; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

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
from scripts import affinities, instances, networks, windows
from scripts.affinities import embedding_affinity
from scripts.networks import MalaUNet
from scripts.windows import AffinityInferer

TEACHER: dict[str, Any] = {"channels": (12, 60, 300, 1500)}
STUDENT: dict[str, Any] = {"channels": (8, 16, 32, 64), "decoder_channels": (32, 32, 8)}
TOY: dict[str, Any] = {"channels": (2, 3, 4, 5), "decoder_channels": (4, 3, 3), "embedding_channels": 6}
OFFSETS = [
    [-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -3, 0], [0, 0, -3],
    [-3, 0, 0], [0, -9, 0], [0, 0, -9], [-4, 0, 0], [0, -27, 0], [0, 0, -27],
]


def toy(**options: Any) -> MalaUNet:
    """The same weights whatever the options."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MalaUNet(**(TOY | options))


def noise(*size: int) -> torch.Tensor:
    return torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1))


def giga_macs(network: torch.nn.Module, *size: int) -> float:
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *size, device="meta"))
    return counter.get_total_flops() / 2e9


def test_examples_of_the_docstrings_run() -> None:
    for module in (affinities, instances, networks, windows):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(("options", "count"), [({}, 84_020_644), (TEACHER, 84_020_644), (STUDENT, 367_648)])
def test_network_has_the_published_number_of_parameters(options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        network = MalaUNet(**options)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("depth", "teacher", "student"), [(53, 206.65, 12.77), (84, 366.39, 21.76)])
def test_student_multiplies_as_published_and_less_than_a_tenth(depth: int, teacher: float, student: float) -> None:
    with torch.device("meta"):
        large, small = MalaUNet(**TEACHER), MalaUNet(**STUDENT)
    counted = giga_macs(large, depth, 268, 268), giga_macs(small, depth, 268, 268)
    assert counted == pytest.approx((teacher, student), rel=0.01)
    assert counted[1] < 0.1 * counted[0]


@pytest.mark.parametrize(
    ("size", "result"),
    [
        ((53, 268, 268), (25, 56, 56)), ((84, 268, 268), (56, 56, 56)), ((29, 214, 214), (1, 2, 2)),
        ((30, 295, 322), (2, 83, 110)),
    ],
)
def test_valid_result_lacks_the_margin_on_each_side(size: tuple[int, ...], result: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = MalaUNet(**STUDENT)
        assert network(torch.zeros(2, 1, *size)).shape == (2, 16, *result)
    assert tuple(length - 2 * lost for length, lost in zip(size, network.margin, strict=True)) == result


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 27, 54), (2, 28, 53), (25, 56, 57)])
def test_same_result_has_the_size_of_the_image(size: tuple[int, ...]) -> None:
    network = toy(padding="same")
    assert network(noise(*size)).shape == (1, 6, *size)
    assert network.margin == (0, 0, 0)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((28, 268, 268), r"got \[28, 268, 268\]; the nearest sizes are \[29, 268, 268\] and \[29, 268, 268\]"),
        ((53, 267, 269), r"got \[53, 267, 269\]; the nearest sizes are \[53, 241, 268\] and \[53, 268, 295\]"),
        ((53, 187, 214), r"got \[53, 187, 214\]; the nearest sizes are \[53, 214, 214\] and \[53, 214, 214\]"),
    ],
)
def test_size_that_does_not_fit_is_refused_with_those_that_do(size: tuple[int, ...], message: str) -> None:
    with torch.device("meta"):
        network = MalaUNet(**TOY)
        with pytest.raises(ValueError, match=r"`image` must have D of at least 29 and H, W of 214, .*" + message):
            network(torch.zeros(1, 1, *size))


def test_every_size_named_as_nearest_fits() -> None:
    with torch.device("meta"):
        network, named = MalaUNet(**TOY), set[str]()
        for length in range(200, 300):
            try:
                network(torch.zeros(1, 1, 29, length, 214))
            except ValueError as error:
                named |= {*str(error).split("nearest sizes are ")[1].rstrip(".").split(" and ")}
            else:
                assert (length - 214) % 27 == 0
        for nearest in named:
            network(torch.zeros(1, 1, *map(int, nearest.strip("[]").split(","))))


@torch.no_grad()
def test_valid_results_of_crops_at_the_alignment_agree() -> None:
    network, image = toy(), noise(31, 241, 214)
    assert network.alignment == (1, 27, 27)
    whole = network(image)                                         # (1, 6, 3, 29, 2)
    torch.testing.assert_close(network(image[:, :, 1:, 27:]), whole[:, :, 1:, 27:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[:, :, 0, :2], whole[:, :, 1, :2])


@torch.no_grad()
def test_valid_result_of_a_crop_is_the_inside_of_the_same_result() -> None:
    image = noise(31, 216, 243)
    whole = toy(padding="same")(image)
    part = toy()(image[:, :, 1:-1, 1 : 1 + 214, 28 : 28 + 214])
    torch.testing.assert_close(part, whole[:, :, 15:16, 107:109, 134:136], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_windows_with_the_margin_and_the_alignment_of_the_network_equal_the_whole_image_at_once() -> None:
    network, offsets = toy(), [[0, -1, 0], [0, 1, -2]]
    inferer = AffinityInferer(
        (29, 241, 241), offsets, from_embedding=True, overlap=0.0, margin=network.margin, alignment=network.alignment
    )
    image = noise(1, 50, 29)                                       # 2 windows, extended by repetition
    rows, columns = torch.arange(-106, 56 + 106).clamp(0, 49), torch.arange(-106, 29 + 106).clamp(0, 28)
    whole = network(image[:, :, [0] * 29][:, :, :, rows][..., columns])[:, :, :, :50]
    found = inferer(image, network)
    assert found.mean() > 0.1
    torch.testing.assert_close(found, embedding_affinity(whole, offsets), atol=1e-4, rtol=0)


def test_options_without_parameters_do_not_change_the_state() -> None:
    first = toy().state_dict()
    for options in ({"padding": "same"}, {"output": "affinity", "offsets": OFFSETS}, {"offsets": OFFSETS}):
        second = toy(**options).state_dict()
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_convolutions_start_as_in_the_paper() -> None:
    network = MalaUNet(**STUDENT)
    up = network.decoder[0]
    for weight in (network.encoder[3][2].weight, up.convolutions[0].weight, up.up.weight):
        spread = (2.0 / (1 + 0.005**2) / weight[0].numel()) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"padding": "valid"}, (29, 214, 214)), ({"padding": "same"}, (3, 54, 50)),
        ({"padding": "same", "stem": [1, 2, 2]}, (3, 54, 50)),
    ],
)
def test_gradient_reaches_every_parameter(options: dict[str, Any], size: tuple[int, ...]) -> None:
    network = toy(**options)
    network(noise(*size)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.any()] == []


def test_taps_are_the_levels_that_the_docstring_names() -> None:
    paths = [f"encoder.{level}" for level in range(4)] + [f"decoder.{level}" for level in range(3)] + ["embedding"]
    for size, padding, expected in (
        ((53, 268, 268), "valid", [
            (8, 49, 264, 264), (16, 45, 84, 84), (32, 41, 24, 24), (64, 37, 4, 4),
            (32, 33, 8, 8), (32, 29, 20, 20), (8, 25, 56, 56), (16, 25, 56, 56),
        ]),
        ((5, 54, 40), "same", [
            (8, 5, 54, 54), (16, 5, 18, 18), (32, 5, 6, 6), (64, 5, 2, 2),
            (32, 5, 6, 6), (32, 5, 18, 18), (8, 5, 54, 54), (16, 5, 54, 54),
        ]),
    ):
        with torch.device("meta"):
            network = MalaUNet(**STUDENT, padding=padding)
            taps = FeatureTaps(network, paths, "student")
            taps.open()
            network(torch.zeros(1, 1, *size))
            outputs = taps.close()
        assert [tuple(outputs[path].shape[1:]) for path in paths] == expected


@pytest.mark.parametrize("output", ["embedding", "affinity"])
@pytest.mark.parametrize(
    ("padding", "first", "second"),
    [("valid", (29, 214, 214), (30, 241, 214)), ("same", (3, 30, 41), (2, 54, 20))],
)
@torch.no_grad()
def test_script_and_trace_equal_the_network_at_other_sizes(
    output: str, padding: str, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    network = toy(padding=padding, output=output, offsets=OFFSETS).eval()
    script, trace = torch.jit.script(network), torch.jit.trace(network, noise(*first), check_trace=False)
    for size in (first, second):
        expected = network(noise(*size))
        torch.testing.assert_close(script(noise(*size)), expected)
        torch.testing.assert_close(trace(noise(*size)), expected)


@pytest.mark.parametrize(
    ("pooling", "stem", "size"),
    [
        ([[2, 2, 2]] * 3, [1, 1, 1], (8, 8, 8)),
        ([[1, 2, 2], [2, 2, 2], [1, 3, 3]], [1, 1, 1], (2, 12, 12)),
        ([[1, 2, 2], [1, 1, 2], [2, 2, 1]], [1, 2, 1], (2, 8, 4)),
    ],
)
@torch.no_grad()
def test_other_poolings_norms_and_stems_serve_any_size_and_windows_shifted_by_their_strides(
    pooling: list[list[int]], stem: list[int], size: tuple[int, ...]
) -> None:
    network = toy(padding="same", pooling=pooling, stem=stem, norm="batch")
    for _ in range(3):
        network(noise(9, 30, 41))                                  # statistics of the norms
    network.eval()
    assert network.alignment == size
    script = torch.jit.script(network)
    for shape in ((9, 30, 41), (2, 54, 20)):
        found = network(noise(*shape))
        assert found.shape == (1, 6, *shape)
        torch.testing.assert_close(script(noise(*shape)), found)
    assert sum(name.endswith("running_mean") for name in network.state_dict()) == 14

    for axis, stride in enumerate(size, start=2):
        before = 60 // stride + 1                                  # strides on each side, beyond the field of view
        image = noise(*(length * (2 * before + 1 if at == axis else 1) for at, length in enumerate(size, start=2)))
        whole = network(image).narrow(axis, before * stride, stride)
        shifted = network(image.narrow(axis, stride, 2 * before * stride))
        torch.testing.assert_close(shifted.narrow(axis, (before - 1) * stride, stride), whole, atol=1e-5, rtol=1e-4)


def test_stem_makes_levels_smaller_and_spares_three_quarters_of_the_multiplications() -> None:
    with torch.device("meta"):
        plain, small = MalaUNet(**STUDENT, padding="same"), MalaUNet(**STUDENT, padding="same", stem=[1, 2, 2])
        taps = FeatureTaps(small, ["encoder.0", "encoder.3", "decoder.2", "embedding"], "student")
        taps.open()
        small(torch.zeros(1, 1, 5, 108, 50))
        shapes = [tuple(output.shape[1:]) for output in taps.close().values()]
    assert shapes == [(8, 5, 54, 27), (64, 5, 2, 1), (8, 5, 54, 27), (16, 5, 108, 54)]
    assert giga_macs(small, 4, 108, 108) < 0.3 * giga_macs(plain, 4, 108, 108)


def test_scripted_network_refuses_a_size_that_does_not_fit() -> None:
    with pytest.raises(torch.jit.Error, match=r"the nearest sizes are \[29, 214, 214\] and \[29, 241, 214\]"):
        torch.jit.script(MalaUNet(**TOY))(torch.zeros(1, 1, 29, 215, 214))


def test_affinity_output_is_that_of_the_embedding_output() -> None:
    image = noise(5, 40, 30)
    embedding = toy(padding="same")(image)
    affinity = toy(padding="same", output="affinity", offsets=OFFSETS)(image)
    assert affinity.shape == (1, 12, 5, 40, 30)
    torch.testing.assert_close(affinity, offset_affinity(embedding, OFFSETS).clamp(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (1, 2, 3)}, r"`channels` must be 4 numbers of at least 1, got \[1, 2, 3\]"),
        ({"channels": (1, 2, 3, 0)}, r"`channels` must be 4 numbers of at least 1, got \[1, 2, 3, 0\]"),
        ({"decoder_channels": (1, 2)}, r"`decoder_channels` must be 3 numbers of at least 1, got \[1, 2\]"),
        ({"padding": "zeros"}, r"`padding` must be one of \('valid', 'same'\), got 'zeros'"),
        ({"norm": "instance"}, r"`norm` must be one of \('none', 'batch'\), got 'instance'"),
        ({"pooling": [[2, 2, 2]] * 2, "padding": "same"}, "`pooling` must be 3 triples of factors"),
        ({"pooling": [[2, 2]] * 3, "padding": "same"}, "`pooling` must be 3 triples of factors"),
        ({"pooling": [[2, 2, 2]] * 3}, r"`pooling` must be \[\[1, 3, 3\], .*\] for the padding 'valid'"),
        ({"stem": [2, 2], "padding": "same"}, r"`stem` must be 3 factors \(z, y, x\) of at least 1, got \[2, 2\]"),
        ({"stem": [1, 2, 0], "padding": "same"}, "`stem` must be 3 factors"),
        ({"stem": [1, 2, 2]}, r"`stem` must be \[1, 1, 1\] for the padding 'valid', got \[1, 2, 2\]; take 'same'"),
        ({"output": "mask"}, r"`output` must be one of \['embedding', 'affinity', 'direct_affinity'\], got 'mask'"),
        ({"output": "affinity"}, "`offsets` must be given for the output 'affinity', got None"),
        ({"offsets": [[0, -1]]}, r"`offsets` must be vectors of 3 whole numbers, not all 0, got \[\[0, -1\]\]"),
    ],
)
def test_arguments_that_make_no_network_are_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MalaUNet(**(TOY | options))
