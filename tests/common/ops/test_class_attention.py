# SPDX-License-Identifier: Apache-2.0
"""Class attention in closed form: against autograd through the whole network, and against every channel's own map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medkd.ops.class_attention import class_attention, gradient_weights, head_matrix, head_mismatch
from oracles import inter_resolution_attention as oracle

WITH_CLASS = ["at_plus", "positive_weight", "gradcam", "signed"]
TEACHER = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, -1.0]]]], dtype=torch.float64)
TEACHER_HEAD = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)


class Net(nn.Module):
    """Two convolutions without a last activation, so that features are signed, and a head of either kind."""

    def __init__(self, rank: int, pooled: bool, relu: bool = False) -> None:
        super().__init__()
        convolution = nn.Conv2d if rank == 2 else nn.Conv3d
        self.body = nn.Sequential(convolution(1, 5, 3, padding=1), nn.Tanh(), convolution(5, 6, 3, stride=2))
        self.body.append(nn.ReLU() if relu else nn.Identity())
        self.head = nn.Linear(6, 3) if pooled else convolution(6, 3, 1)
        self.pooled = pooled
        self.double()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.body(image)
        return self.head(maps.flatten(2).mean(2) if self.pooled else maps), maps


def an_image(rank: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 1, *(9, 8, 7)[:rank], dtype=torch.float64)


# ---- autograd ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("variant", WITH_CLASS)
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_value_and_all_gradients_are_those_of_autograd(rank: int, pooled: bool, variant: Any, through: bool) -> None:
    torch.manual_seed(rank)
    net = Net(rank, pooled)
    pred, maps = net(an_image(rank))
    weight = head_matrix("head", net.head.weight)
    mine = class_attention(maps, weight if through else weight.detach(), variant, pooled)
    right = oracle.attention(pred, maps, variant, create_graph=through)
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(mine)
    found, expected = (
        torch.autograd.grad(one, list(net.parameters()), pull, retain_graph=True, allow_unused=True)
        for one in (mine, right)
    )
    names = [name for name, _ in net.named_parameters()]
    for name, slope, other in zip(names, found, expected, strict=True):
        if name == "head.weight" and not through:
            assert slope is None
        elif slope is not None or name == "head.weight":
            torch.testing.assert_close(slope, other, rtol=1e-10, atol=1e-12, msg=name)
        assert other is None or slope is not None or not other.any(), name


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_weights_by_gradient_are_the_heads(rank: int, pooled: bool) -> None:
    net = Net(rank, pooled)
    pred, maps = net(an_image(rank))
    weights = gradient_weights(pred, maps)
    expected = head_matrix("head", net.head.weight) / (maps[0, 0].numel() if pooled else 1)
    torch.testing.assert_close(weights, expected.expand(3, -1, -1))
    assert not weights.requires_grad


def test_maps_of_an_earlier_layer_are_those_of_autograd_with_their_second_derivative() -> None:
    """Behind the layer stands a nonlinear one, so that weights differ from sample to sample."""
    torch.manual_seed(0)
    net = Net(2, pooled=True)
    earlier = net.body[1](net.body[0](an_image(2)))
    pred = net.head(net.body[2](earlier).tanh().flatten(2).mean(2))
    weights = gradient_weights(pred, earlier, create_graph=True)
    mine, right = class_attention(earlier, weights, pooled=False), oracle.attention(pred, earlier)
    assert weights.std(0).max() > 1e-4
    torch.testing.assert_close(mine, right)
    pull = torch.randn_like(mine)
    slopes = [torch.autograd.grad(one, list(net.parameters())[:5], pull, retain_graph=True) for one in (mine, right)]
    torch.testing.assert_close(*slopes)
    cheap = class_attention(earlier, gradient_weights(pred, earlier), pooled=False)
    torch.testing.assert_close(cheap, right)
    assert torch.autograd.grad(cheap, net.head.weight, pull, allow_unused=True) == (None,)


def test_a_region_is_explained_by_a_masked_prediction() -> None:
    """Of a head that reads each voxel the weights are its own times the region's share, as the specification says."""
    net = Net(2, pooled=False)
    pred, maps = net(an_image(2, batch=1))
    region = torch.rand_like(pred[:, :1]) > 0.4
    weights = gradient_weights(pred * region, maps)
    torch.testing.assert_close(weights[0], head_matrix("head", net.head.weight) * region.double().mean())


# ---- the explicit products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [(3, 5), (3, 1, 4), (1, 1)])
@pytest.mark.parametrize("variant", WITH_CLASS)
def test_maps_are_sums_of_each_channels_map(variant: Any, size: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    maps, weight = torch.randn(2, 7, *size, dtype=dtype), torch.randn(4, 7, dtype=dtype)
    expected = oracle.class_maps(weight.expand(2, -1, -1), maps, variant)
    torch.testing.assert_close(class_attention(maps, weight, variant, pooled=False), expected)
    count = maps[0, 0].numel()
    torch.testing.assert_close(class_attention(maps, weight, variant), expected / count)
    if variant == "at_plus":                                       # the same number in another grouping
        halves = oracle.class_maps(weight.expand(2, -1, -1), maps, "signed")
        halves = halves + oracle.class_maps(weight.abs().expand(2, -1, -1), maps.abs(), "signed")
        torch.testing.assert_close(expected, halves / 2)


def test_it_passes_gradcheck_also_when_channels_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medkd.ops.class_attention._AT_ONCE", 20)
    maps, weight = torch.randn(2, 7, 2, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    each = torch.randn(2, 3, 7, dtype=torch.float64)
    for factors in (weight, each):
        leaves = maps.clone().requires_grad_(), factors.clone().requires_grad_()
        assert torch.autograd.gradcheck(class_attention, leaves)
        expected = oracle.class_maps(factors.expand(2, -1, -1), maps, "at_plus") / 6
        torch.testing.assert_close(class_attention(maps, factors), expected)


@pytest.mark.parametrize("needed", ["maps", "weight"])
def test_a_gradient_that_nobody_needs_is_left_out(needed: str) -> None:
    maps, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 4)
    leaf = {"maps": maps, "weight": weight}[needed].requires_grad_()
    class_attention(maps, weight).sum().backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.any())


def test_channels_last_and_a_part_of_a_tensor_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    maps, weight = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(3, 6)
    expected = class_attention(maps, weight)
    (slope,) = torch.autograd.grad(expected.square().sum(), maps)
    for layout in (lambda one: one.to(memory_format=torch.channels_last), lambda one: one.mT.contiguous().mT):
        leaf = layout(maps.detach()).requires_grad_()
        value = class_attention(leaf, weight)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value.square().sum(), leaf)[0], slope)


# ---- known answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "expected"), [
    ("at_plus", [[[0.25, 0], [0, 0.75]], [[0.125, 0.5], [0.5, 0.25]]]),
    ("positive_weight", [[[0.25, 0], [0, 0.5]], [[0.125, 0.5], [0.5, -0.25]]]),
    ("gradcam", [[[0.25, 0], [0, 0.75]], [[0.125, 0.5], [0.5, 0]]]),
])
def test_known_maps(variant: Any, expected: list[Any]) -> None:
    assert class_attention(TEACHER, TEACHER_HEAD, variant)[0].tolist() == expected


def test_signed_maps_sum_to_the_scores_without_their_bias() -> None:
    scores = class_attention(TEACHER, TEACHER_HEAD, "signed").sum((2, 3))[0] + torch.tensor([0.1, -0.2])
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.675], dtype=torch.float64))


def test_activation_has_one_map_and_no_head() -> None:
    assert class_attention(TEACHER, variant="activation").tolist() == [[[[0.5, 0.5], [0.5, 2.5]]]]


# ---- properties ----------------------------------------------------------------------------------------------------


def test_variants_coincide_where_nothing_is_negative() -> None:
    torch.manual_seed(0)
    maps, weight = torch.rand(2, 5, 3, 3), torch.randn(3, 5)
    torch.testing.assert_close(class_attention(maps, weight), class_attention(maps, weight, "positive_weight"))
    first = class_attention(maps, weight.abs())
    for variant in ("gradcam", "signed"):
        torch.testing.assert_close(first, class_attention(maps, weight.abs(), variant))   # type: ignore[arg-type]


def test_maps_do_not_depend_on_the_order_of_channels() -> None:
    torch.manual_seed(0)
    maps, weight, order = torch.randn(2, 5, 3, 3), torch.randn(3, 5), torch.randperm(5)
    torch.testing.assert_close(class_attention(maps, weight), class_attention(maps[:, order], weight[:, order]))


@pytest.mark.parametrize("variant", [*WITH_CLASS, "activation"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_also_under_autocast(dtype: torch.dtype, variant: Any) -> None:
    torch.manual_seed(0)
    maps = (1e3 * torch.randn(2, 64, 4, 4)).to(dtype).requires_grad_()
    weight = torch.randn(3, 64).to(dtype).requires_grad_()
    expected = class_attention(maps.detach().float(), weight.detach().float(), variant)
    with torch.autocast("cpu", dtype=dtype):
        value = class_attention(maps, weight, variant)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert bool(value.isfinite().all())
        (value / value.detach().amax()).sum().backward()
    assert maps.grad is not None
    assert maps.grad.dtype == dtype
    assert bool(maps.grad.isfinite().all())


@pytest.mark.parametrize("variant", WITH_CLASS)
def test_no_array_of_classes_times_channels_is_kept(variant: Any) -> None:
    maps, weight = torch.randn(1, 32, 16, 16, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        result = class_attention(maps, weight, variant)
    extra = sum(numbers for place, numbers in kept.items() if place != maps.data_ptr())
    assert extra <= 2 * weight.numel() + result.numel()


# ---- whether the head reads the layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_head_that_reads_the_layer_is_told_from_one_that_does_not(rank: int, pooled: bool) -> None:
    torch.manual_seed(0)
    net = Net(rank, pooled, relu=True)
    image = an_image(rank, batch=8)
    pred, maps = net(image)
    weight = head_matrix("head", net.head.weight)
    assert head_mismatch(pred, maps, weight, pooled) < 1e-10
    assert head_mismatch(pred.half(), maps.half(), weight.half(), pooled) < 0.01
    assert head_mismatch(pred, net.body[2](net.body[:2](image)), weight, pooled) > 0.1       # before the ReLU
    assert head_mismatch(pred, maps.flip(1), weight, pooled) > 0.1


def test_what_cannot_be_told_is_no_mismatch() -> None:
    pred, weight = torch.randn(1, 3), torch.randn(3, 4)
    assert head_mismatch(pred, torch.randn(1, 4, 2, 2), weight) == 0.0
    assert head_mismatch(torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4), weight, pooled=False) == 0.0


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong() -> None:
    maps, weight = torch.zeros(1, 4, 2, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="`variant` must be one of .*at_plus.*, got 'cam'"):
        class_attention(maps, weight, "cam")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`weight` must be the head's, shape .* got None"):
        class_attention(maps)
    with pytest.raises(ValueError, match=r"`weight` must have shape \(C, 4\).*, got \(3, 5\)"):
        class_attention(maps, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"`maps` must be a floating map"):
        class_attention(torch.zeros(1, 4), weight)
    with pytest.raises(ValueError, match=r"`head` must be the weight of a linear layer .* got \(3, 4, 3, 3\)"):
        head_matrix("head", torch.zeros(3, 4, 3, 3))
    with pytest.raises(ValueError, match=r"`head` must be .* got \(3,\)"):
        head_matrix("head", torch.zeros(3))
    leaf = maps.clone().requires_grad_()
    with pytest.raises(ValueError, match="`pred` must depend on `maps` by a graph"):
        gradient_weights(torch.zeros(1, 3), leaf)
    with pytest.raises(ValueError, match="`maps` must be a layer on the way to `pred`"):
        gradient_weights(torch.ones(1, 3, requires_grad=True) * 2, leaf)
