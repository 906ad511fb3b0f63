# SPDX-License-Identifier: Apache-2.0
"""Supervised loss of embeddings by their affinities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medkd.losses.affinity import AffinityLoss
from medkd.ops.instances import instance_numbers
from oracles import graph_relation as oracle

FLAT = [(-1, 0), (0, -1), (-3, 0), (0, -5)]
DEEP = [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, -3, 0)]


def maps(size: tuple[int, ...], batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64)


def numbers(size: tuple[int, ...], batch: int = 2, most: int = 4) -> Tensor:
    """Instances of 2 voxels and more along each axis."""
    coarse = torch.randint(0, most, (batch, 1, *(-(-s // 2) for s in size)))
    for axis, s in enumerate(size, start=2):
        coarse = coarse.repeat_interleave(2, axis).narrow(axis, 0, s)
    return coarse


def weight_of(share: float) -> tuple[float, float]:
    """Weights of zeros and ones by the share of ones, as section 2.4 of the specification has them."""
    if share in (0.0, 1.0):
        return 1.0, 1.0
    share = min(max(share, 0.05), 0.99)
    return (share / (1 - share), 1.0) if share > 0.5 else (1.0, (1 - share) / share)


def test_known_answer_of_the_specification() -> None:
    student = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    label = torch.tensor([[[[1, 1, 2, 2]]]])
    assert AffinityLoss([(0, -1)], balance="none")(student, label).item() == pytest.approx(0.5)


def test_two_dimensions_equal_the_formula_with_one_balance_per_sample() -> None:
    embeddings, label = maps((9, 7)), numbers((9, 7))
    affinity = oracle.offset_affinity(embeddings, FLAT)
    expected = 0.0
    for sample in range(2):
        target = torch.as_tensor(oracle.label_affinity_by_loops(label[sample, 0].numpy(), FLAT, "same"))
        inside = torch.as_tensor(oracle.label_affinity_by_loops(torch.ones(9, 7).numpy(), FLAT, "same")) > 0
        zero, one = weight_of(float(torch.where(inside, target, 1.0).mean()))   # pairs outside count as ones
        weight = torch.where(target > 0.5, one, zero) * inside
        expected += float((weight * (affinity[sample] - target).square()).sum()) / (2 * 9 * 7)
    assert AffinityLoss(FLAT)(embeddings, label).item() == pytest.approx(expected, rel=1e-6)


def test_three_dimensions_equal_the_formula_with_one_balance_per_channel() -> None:
    size = (4, 7, 6)
    embeddings, label = maps(size), numbers(size)
    affinity = oracle.offset_affinity(embeddings, DEEP)
    expected = 0.0
    for sample in range(2):
        target = torch.as_tensor(oracle.label_affinity_by_loops(label[sample, 0].numpy(), DEEP, "different"))
        inside = torch.as_tensor(oracle.label_affinity_by_loops(torch.ones(size).numpy(), DEEP, "same")) > 0
        for channel in range(len(DEEP)):
            chosen = inside[channel]
            zero, one = weight_of(float(target[channel][chosen].mean()))
            weight = torch.where(target[channel] > 0.5, one, zero) * chosen
            squares = (weight * (affinity[sample, channel] - target[channel]).square()).sum()
            expected += float(squares) / (2 * int(chosen.sum()))
    assert AffinityLoss(DEEP)(embeddings, label).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("size", "offsets"), [((7, 6), FLAT), ((4, 5, 6), DEEP)])
def test_gradient_equals_finite_differences(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    loss, label = AffinityLoss(offsets, background_weight=1.0), numbers(size, batch=1)
    embeddings = maps(size, batch=1, channels=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: loss(e, label).double(), embeddings, atol=1e-4, eps=1e-5)


def test_perfect_embeddings_have_no_loss() -> None:
    label = torch.tensor([[[[0, 0, 1, 1, 2]] * 3]])
    embeddings = torch.eye(3)[label[0, 0]].permute(2, 0, 1)[None] * 7
    loss = AffinityLoss([(0, -1), (-1, 0)], background_weight=1.0)
    assert loss(embeddings, label).item() == pytest.approx(0, abs=1e-9)
    assert AffinityLoss([(0, -1)], background="different", balance="none")(embeddings, label).item() > 0.1


def test_background_is_drawn_to_the_first_axis() -> None:
    label = torch.tensor([[[[0, 0, 0, 1]]]])
    along = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4)
    for weight in (1.0, 3.0):
        loss = AffinityLoss([(-1, 0)], background_weight=weight)      # no pair lies inside: only the axis counts
        assert loss(along, label).item() == pytest.approx(0.25 * weight)
        assert loss(along.flip(1), label).item() == pytest.approx(0.75 * weight)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_widened_borders_are_background(weight: float) -> None:
    label = torch.tensor([[[[1, 1, 1, 2, 2, 2]] * 2]])
    embeddings = maps((2, 6), batch=1)
    widened = torch.tensor([[[[1, 1, 0, 0, 2, 2]] * 2]])
    losses = [AffinityLoss(FLAT, widen=widen, background_weight=weight) for widen in (True, False)]
    assert losses[0](embeddings, label) == losses[1](embeddings, widened)


@pytest.mark.parametrize("content", [0, 5])
def test_one_instance_or_none_is_defined(content: int) -> None:
    for size, offsets in (((7, 6), FLAT), ((4, 5, 6), DEEP)):
        embeddings = maps(size).requires_grad_()
        value = AffinityLoss(offsets, background_weight=1.0)(embeddings, torch.full((2, 1, *size), content))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(embeddings.grad).all()


def test_numbers_do_not_matter_and_may_be_large() -> None:
    embeddings, label = maps((8, 9)), numbers((8, 9))
    other = torch.where(label > 0, 2**40 - label, 0)
    assert AffinityLoss(FLAT)(embeddings, label) == AffinityLoss(FLAT)(embeddings, other)


def test_half_precision_is_computed_in_float32() -> None:
    embeddings, label = maps((8, 9)).float(), numbers((8, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = AffinityLoss(FLAT)(embeddings.bfloat16(), label)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(AffinityLoss(FLAT)(embeddings.bfloat16().float(), label).item())


def test_labels_that_are_no_instance_numbers_are_refused() -> None:
    embeddings = maps((8, 9))
    with pytest.raises(ValueError, match="whole numbers of instances, got fractions; resample labels with mode"):
        instance_numbers(torch.full((2, 1, 8, 9), 0.5), embeddings)
    with pytest.raises(ValueError, match="crop it to the field of view"):
        instance_numbers(torch.ones(2, 1, 10, 11), embeddings)
    with pytest.raises(ValueError, match=r"`label` must have shape \(B, 1, \*S\)"):
        instance_numbers(torch.ones(2, 2, 8, 9), embeddings)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="`background` must be one of"):
        AffinityLoss(FLAT, background="ignored")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`balance` must be one of"):
        AffinityLoss(FLAT, balance="class")   # type: ignore[arg-type]
