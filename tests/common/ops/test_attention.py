# SPDX-License-Identifier: Apache-2.0
"""Attention maps and their distance, against loops and against the released formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.ops import attention
from medkd.ops.attention import (
    attention_distance,
    attention_map,
    effective_voxels,
    largest_magnitude,
    resized_attention_map,
    shared_grid,
    unified_attention_map,
)
from oracles import layer_feedback as oracle

SIZES = [(5, 7), (3, 5, 4)]


def a_map(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def distance(student: Tensor, teacher: Tensor, exponent: float = 4.0) -> Tensor:
    return attention_distance(
        *(attention_map(maps, exponent, largest_magnitude(maps)) for maps in (student, teacher))
    )


@pytest.fixture(params=[1, 40, 2**20])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one channel, of some, of all."""
    monkeypatch.setattr(attention, "_AT_ONCE", request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exponent", [1, 2, 2.5, 3, 4])
@pytest.mark.usefixtures("at_once")
def test_a_map_is_the_mean_power_of_its_channels(size: tuple[int, ...], exponent: float) -> None:
    maps = a_map(2, 3, *size)
    found = attention_map(maps, exponent)
    assert found.shape == (2, 1, *size)
    torch.testing.assert_close(found[:, 0], torch.from_numpy(oracle.attention_by_loops(maps.numpy(), exponent)))
    scale = torch.tensor([2.0, 0.5], dtype=torch.float64).view(2, 1, *[1] * len(size))
    torch.testing.assert_close(attention_map(maps, exponent, scale), found / scale**exponent)


@pytest.mark.parametrize("size", [(2, 3), (2, 1, 3)])
@pytest.mark.parametrize("exponent", [1, 2, 2.5, 3, 4])
@pytest.mark.usefixtures("at_once")
def test_a_map_and_the_distance_pass_gradcheck(size: tuple[int, ...], exponent: float) -> None:
    student, teacher = a_map(2, 3, *size).requires_grad_(), a_map(2, 5, *size)
    scale = largest_magnitude(student)
    weight = torch.rand(2, 1, *size, dtype=torch.float64)
    weight[0, ..., 0] = 0
    target = attention_map(teacher, exponent)
    assert torch.autograd.gradcheck(lambda x: attention_map(x, exponent, scale), student)
    assert torch.autograd.gradcheck(lambda x: distance(x, teacher, exponent), student)   # although the scale is cut off
    assert torch.autograd.gradcheck(lambda x: attention_distance(attention_map(x, exponent), target, weight), student)


@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient_of_a_distance_are_those_of_the_released_formula(size: tuple[int, ...]) -> None:
    student, teacher = a_map(3, 4, *size).requires_grad_(), a_map(3, 6, *size)
    ours, plain = distance(student, teacher).mean(), oracle.feature_distance(student, teacher)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (ours, plain)))
    maps = [attention_map(one.detach()) for one in (student, teacher)]
    cosine = F.cosine_similarity(*(one.flatten(1) for one in maps))
    torch.testing.assert_close(distance(student, teacher), 2 - 2 * cosine)


def test_a_distance_with_weights_is_that_of_loops_and_zero_weights_cut_voxels_out() -> None:
    student, teacher = a_map(2, 1, 4, 5).abs().requires_grad_(), a_map(2, 1, 4, 5).abs()
    weight = torch.rand(2, 1, 4, 5, dtype=torch.float64)
    flat = [one.detach().flatten(1).numpy() for one in (student, teacher, weight)]
    found = attention_distance(student, teacher, weight)
    torch.testing.assert_close(found, torch.from_numpy(oracle.distance_by_loops(*flat)))
    weight = torch.ones_like(weight)
    weight[..., 3:] = 0
    cut = attention_distance(student[..., :3], teacher[..., :3])
    torch.testing.assert_close(attention_distance(student, teacher, weight), cut)
    (slope,) = torch.autograd.grad(attention_distance(student, teacher, weight).sum(), student)
    assert not slope[..., 3:].any()
    assert attention_distance(student, teacher, 0 * weight).tolist() == [0, 0]


@pytest.mark.parametrize("size", SIZES)
def test_known_answers_of_the_distance(size: tuple[int, ...]) -> None:
    maps = a_map(4, 3, *size)
    assert distance(maps, maps).abs().max() < 1e-12
    factor = torch.tensor([1e-3, 0.5, 7.0, 1e3], dtype=torch.float64).view(4, 1, *[1] * len(size))
    torch.testing.assert_close(distance(factor * maps, maps), torch.zeros(4, dtype=torch.float64))
    other = a_map(4, 5, *size)
    torch.testing.assert_close(distance(-factor * maps, other), distance(maps, other))
    assert ((distance(maps, other) > 0) & (distance(maps, other) < 2)).all()
    apart = torch.zeros(1, 1, *size), torch.zeros(1, 1, *size)
    apart[0].flatten()[0], apart[1].flatten()[1] = 3.0, 0.1
    assert attention_distance(*apart).item() == pytest.approx(2.0)


@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_a_dead_map_is_at_distance_one_and_gives_no_gradient(dead: str) -> None:
    student, teacher = (torch.randn(2, 3, 4, 5) * (dead not in (role, "both")) for role in ("student", "teacher"))
    student.requires_grad_()
    found = distance(student, teacher)
    assert found.tolist() == pytest.approx([0, 0] if dead == "both" else [1, 1], abs=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), student)
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e-4, 100.0, 1e4, 1e30])
def test_features_of_any_size_give_the_same_distance_and_a_gradient_that_scales(factor: float) -> None:
    student, teacher = torch.randn(2, 3, 4, 5).requires_grad_(), torch.randn(2, 4, 4, 5)
    scaled = (student.detach() * factor).requires_grad_()
    values = distance(student, teacher), distance(scaled, teacher * factor)
    torch.testing.assert_close(*values)
    slopes = [torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, (student, scaled), strict=True)]
    torch.testing.assert_close(slopes[1] * factor, slopes[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [100.0, 1e-4])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, factor: float) -> None:
    student, teacher = ((torch.randn(2, 3, 4, 5) * factor).to(dtype) for _ in range(2))
    student.requires_grad_()
    wide = student.detach().float().requires_grad_()
    values = distance(student, teacher), distance(wide, teacher.float())
    assert values[0].dtype == torch.float32
    torch.testing.assert_close(*values)
    slopes = [torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, (student, wide), strict=True)]
    assert slopes[0].dtype == dtype
    torch.testing.assert_close(slopes[0], slopes[1].to(dtype))


@pytest.mark.parametrize("rank", [2, 3])
def test_the_unified_map_is_that_of_all_channels_together(rank: int) -> None:
    grids = [(8, 12), (4, 6), (2, 3)] if rank == 2 else [(8, 4, 12), (4, 2, 6), (2, 1, 3)]
    levels = [a_map(2, c, *grid) * c for c, grid in zip((2, 4, 3), grids, strict=True)]
    pool = F.adaptive_avg_pool2d if rank == 2 else F.adaptive_avg_pool3d
    expected = sum(pool(level.pow(4).sum(1, keepdim=True), grids[-1]) for level in levels)
    found = unified_attention_map(levels)
    torch.testing.assert_close(*(F.normalize(one.flatten(1)) for one in (found, expected)))
    same = [a_map(2, c, *grids[1]) for c in (2, 4, 3)]
    whole = attention_map(torch.cat(same, 1), scale=largest_magnitude(torch.cat(same, 1)))
    torch.testing.assert_close(unified_attention_map(same), whole)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.usefixtures("at_once")
def test_the_resized_map_is_that_of_the_features_on_a_fine_grid(rank: int) -> None:
    grids = [(7, 9), (4, 5), (4, 5)] if rank == 2 else [(7, 3, 9), (4, 2, 5), (4, 2, 5)]
    levels = [a_map(2, c, *grid) * c for c, grid in zip((2, 4, 3), grids, strict=True)]
    fine = tuple(2 * length + 1 for length in grids[0])
    found = resized_attention_map(levels, fine)
    expected = oracle.attention(oracle.resized(oracle.together(levels), fine))
    torch.testing.assert_close(F.normalize(found.flatten(1)), expected)
    assert not resized_attention_map([level.requires_grad_() for level in levels], fine).requires_grad


def test_two_dimensions_equal_a_depth_of_one() -> None:
    levels, student = [a_map(2, 3, 8, 6), a_map(2, 2, 5, 3)], a_map(2, 4, 5, 3)
    deep = [level.unsqueeze(2) for level in levels]
    for flat, solid in (
        (unified_attention_map(levels), unified_attention_map(deep)),
        (resized_attention_map(levels, (9, 7)), resized_attention_map(deep, (1, 9, 7))),
        (attention_map(student), attention_map(student.unsqueeze(2))),
    ):
        torch.testing.assert_close(flat, solid.squeeze(2))


def test_effective_voxels_count_a_constant_map_wholly_a_peak_once_and_a_dead_map_not() -> None:
    maps = torch.ones(3, 1, 4, 5)
    maps[1] = 0
    maps[1, 0, 2, 2] = 1e-20
    maps[2] = 0
    assert effective_voxels(maps).tolist() == pytest.approx([20, 1, 0])
    unit = F.normalize(torch.rand(1, 1, 4, 5).flatten(1))
    assert effective_voxels(unit.view(1, 1, 4, 5)).item() == pytest.approx(1 / unit.pow(4).sum().item(), rel=1e-5)


def test_only_features_and_their_sizes_are_kept_for_backward() -> None:
    student, teacher = torch.randn(1, 8, 6, 6, 6, requires_grad=True), torch.rand(1, 1, 6, 6, 6)
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        attention_distance(attention_map(student, 4.0, largest_magnitude(student)), teacher)
    assert kept.pop(student.untyped_storage().data_ptr()) == student.numel()
    assert sum(kept.values()) <= 6**3 + 1


def test_inputs_stay_as_they_are() -> None:
    student, teacher = a_map(2, 3, 4, 5).requires_grad_(), a_map(2, 3, 4, 5)
    before = student.detach().clone(), teacher.clone()
    distance(student, teacher).sum().backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_channels_last_gives_the_same() -> None:
    maps = a_map(2, 3, 4, 5, 6).requires_grad_()
    moved = maps.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    weight = a_map(2, 1, 4, 5, 6)
    values = [(attention_map(one) * weight).sum() for one in (maps, moved)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v, x in zip(values, (maps, moved), strict=True)))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`exponent` must be a number of at least 1, got 0\.5; 4 is the published"):
        attention_map(torch.zeros(1, 2, 3, 3), 0.5)
    with pytest.raises(ValueError, match=r"`maps` must be a floating map of shape \(B, C, \*S\)"):
        attention_map(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="`student` and `teacher` must share batch and spatial shape"):
        attention_distance(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="`levels` must hold at least one map of shape"):
        shared_grid([])
