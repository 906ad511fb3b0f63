# SPDX-License-Identifier: Apache-2.0
"""Salience nodes and variation graphs, against loops and known answers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.ops.salience import salience_nodes, variation_graph

SIZES = [(7, 5), (4, 3, 5)]
WINDOWS = {2: [(1, 1), (3, 3), (1, 5), (9, 9)], 3: [(1, 1, 1), (3, 3, 3), (1, 3, 5), (9, 9, 9)]}
CASES = [(size, window) for size in SIZES for window in WINDOWS[len(size)]]
VARIATIONS = ["difference", "distance", "cosine"]


def a_map(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_loops(maps: Tensor, window: tuple[int, ...], absolute: bool = False, counted: Tensor | None = None) -> Tensor:
    """One channel at a time, one voxel at a time."""
    values = maps.detach().numpy()
    nodes = np.zeros((*values.shape[:2], int(np.prod(window))))
    for b, c in np.ndindex(values.shape[:2]):
        known = np.ones(values.shape[2:], bool) if counted is None else counted[b, 0].numpy()
        best, place = -np.inf, None
        for at in np.ndindex(values.shape[2:]):
            value = abs(values[b, c][at]) if absolute else values[b, c][at]
            if known[at] and value > best:
                best, place = value, at
        if place is None:
            continue
        for n, step in enumerate(product(*(range(-(w // 2), w // 2 + 1) for w in window))):
            at = tuple(p + s for p, s in zip(place, step, strict=True))
            inside = all(0 <= a < length for a, length in zip(at, values.shape[2:], strict=True))
            if inside and known[at]:
                nodes[b, c, n] = values[b, c][at]
    return torch.from_numpy(nodes)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("size", "window"), CASES)
def test_nodes_are_those_of_loops(size: tuple[int, ...], window: tuple[int, ...], absolute: bool) -> None:
    maps = a_map(3, 4, *size)
    maps[0, 0] = 0.0                                               # all equal: the first voxel
    found = salience_nodes(maps, window, "absolute" if absolute else "signed")
    assert torch.equal(found, by_loops(maps, window, absolute))


@pytest.mark.parametrize(("size", "window"), CASES)
def test_voxels_that_do_not_count_are_no_maximum_and_zero_in_a_window(
    size: tuple[int, ...], window: tuple[int, ...]
) -> None:
    maps = a_map(3, 4, *size)
    counted = torch.rand(3, 1, *size) < 0.6
    counted[1] = False
    found = salience_nodes(maps, window, counted=counted)
    assert torch.equal(found, by_loops(maps, window, counted=counted))
    assert not found[1].any()


def test_what_counts_is_a_corner_so_nodes_are_those_of_the_corner() -> None:
    maps = a_map(2, 3, 6, 7, 5)
    counted = torch.zeros(2, 1, 6, 7, 5, dtype=torch.bool)
    counted[..., :4, :5, :2] = True
    corner = maps[..., :4, :5, :2]
    assert torch.equal(salience_nodes(maps, (3, 3, 3), counted=counted), salience_nodes(corner, (3, 3, 3)))


@pytest.mark.parametrize("place", [(0, 0), (0, 4), (6, 0), (6, 4), (3, 0), (0, 2)])
def test_a_maximum_at_the_border_has_zeros_outside(place: tuple[int, int]) -> None:
    maps = torch.ones(1, 1, 7, 5)
    maps[(0, 0, *place)] = 2.0
    node = salience_nodes(maps, (3, 3)).view(3, 3)
    rows, columns = (
        [int(0 <= p + step < length) for step in (-1, 0, 1)] for p, length in zip(place, (7, 5), strict=True)
    )
    expected = torch.tensor(rows).view(3, 1) * torch.tensor(columns).float()
    expected[1, 1] = 2.0
    assert torch.equal(node, expected)


@pytest.mark.parametrize("size", SIZES)
def test_nodes_pass_gradcheck(size: tuple[int, ...]) -> None:
    maps, window = a_map(2, 2, *size).requires_grad_(), WINDOWS[len(size)][2]
    counted = torch.rand(2, 1, *size) < 0.7
    assert torch.autograd.gradcheck(lambda x: salience_nodes(x, window), maps)
    assert torch.autograd.gradcheck(lambda x: salience_nodes(x, window, "absolute", counted), maps)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_variation_graph_passes_gradcheck(variation: str) -> None:
    first, second = a_map(2, 3, 5).requires_grad_(), a_map(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: variation_graph(x, y, variation), (first, second))   # type: ignore[arg-type]


def test_a_gradient_is_in_the_windows_alone() -> None:
    maps = torch.randn(2, 4, 9, 9, 9, requires_grad=True)
    salience_nodes(maps, (3, 3, 3)).sum().backward()
    assert maps.grad is not None
    assert 0 < maps.grad.count_nonzero() <= 2 * 4 * 27
    assert maps.grad.max() == 1.0


def test_two_dimensions_equal_a_depth_of_one() -> None:
    maps = a_map(2, 3, 7, 5).requires_grad_()
    deep = maps.detach().unsqueeze(2).requires_grad_()
    flat, solid = salience_nodes(maps, (3, 5)), salience_nodes(deep, (1, 3, 5))
    assert torch.equal(flat, solid)
    slope = torch.randn_like(flat)
    grads = torch.autograd.grad(flat, maps, slope)[0], torch.autograd.grad(solid, deep, slope)[0]
    assert torch.equal(grads[0], grads[1].squeeze(2))


def test_moving_a_map_away_from_the_border_changes_nothing() -> None:
    maps = torch.zeros(1, 3, 12, 12)
    maps[..., 3:8, 3:8] = torch.rand(1, 3, 5, 5) + 0.1
    moved = maps.roll((2, -1), (2, 3))
    assert torch.equal(salience_nodes(maps, (5, 5)), salience_nodes(moved, (5, 5)))


def test_channels_last_gives_the_same_and_its_gradient_keeps_the_format() -> None:
    maps = a_map(2, 3, 4, 5, 6).requires_grad_()
    moved = maps.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    nodes = [salience_nodes(one, (3, 3, 3)) for one in (maps, moved)]
    assert torch.equal(*nodes)
    slope = torch.randn_like(nodes[0])
    grads = [torch.autograd.grad(n, m, slope)[0] for n, m in zip(nodes, (maps, moved), strict=True)]
    assert torch.equal(*grads)
    assert grads[0].is_contiguous()
    assert grads[1].is_contiguous(memory_format=torch.channels_last_3d)


def test_a_map_of_another_format_gives_the_same() -> None:
    maps = a_map(2, 3, 6, 5).requires_grad_()
    turned = maps.detach().mT.contiguous().mT.requires_grad_()
    grads = [torch.autograd.grad(salience_nodes(one, (3, 3)).square().sum(), one)[0] for one in (maps, turned)]
    assert torch.equal(*grads)
    assert grads[0].any()


def test_only_indices_are_kept_for_backward() -> None:
    maps = torch.randn(1, 8, 12, 12, 12, requires_grad=True)
    kept: list[tuple[torch.dtype, int]] = []

    def note(value: Tensor) -> Tensor:
        kept.append((value.dtype, value.numel()))
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        salience_nodes(maps, (3, 3, 3))
    assert kept == [(torch.int64, 8 * 27)]


# ---- variation graphs ----------------------------------------------------------------------------------------------


def test_known_answers_of_a_pair_of_nodes() -> None:
    """Two channels of two numbers, worked out by hand."""
    first, second = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[4.0, 3.0], [0.0, 2.0]]])
    nodes, edges = variation_graph(first, second, "difference")
    assert nodes.tolist() == [[[1.0, -1.0], [-1.0, 2.0]]]
    assert edges.tolist() == [[[0.0, 3.0], [3.0, 3.0]]]            # 25 6 4 less 25 3 1
    nodes, same = variation_graph(first, second, "distance")
    assert nodes.tolist() == [[2.0, 5.0]]
    assert torch.equal(same, edges)
    nodes, edges = variation_graph(first, second, "cosine")
    torch.testing.assert_close(nodes, torch.tensor([[0.96, 0.0]]))
    torch.testing.assert_close(edges, torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]), atol=1e-6, rtol=0)


def test_cosines_are_those_of_torch() -> None:
    first, second = a_map(2, 4, 6), a_map(2, 4, 6)
    nodes, edges = variation_graph(first, second)
    torch.testing.assert_close(nodes, F.cosine_similarity(first, second, dim=2))
    among = [F.cosine_similarity(one.unsqueeze(1), one.unsqueeze(2), dim=3) for one in (first, second)]
    torch.testing.assert_close(edges, among[1] - among[0])


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_cosines_do_not_depend_on_the_scale_of_a_layer(factor: float) -> None:
    first, second = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    scaled = (first * factor).requires_grad_()
    for found, expected in zip(variation_graph(scaled, second), variation_graph(first, second), strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found.sum(), scaled, retain_graph=True)[0].isfinite().all()


def test_a_dead_node_has_cosine_zero_and_no_gradient() -> None:
    first, second = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    first[0, 1] = 0.0
    first.requires_grad_()
    nodes, edges = variation_graph(first, second)
    assert nodes[0, 1] == 0
    assert edges[0, 1, 1].item() == pytest.approx(1)               # 1 of the second layer less 0 of the first
    (slope,) = torch.autograd.grad(nodes.sum() + edges.square().sum(), first)
    assert not slope[0, 1].any()
    assert slope[0, 0].any()
    assert all(not part.any() for part in variation_graph(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    first, second = ((300 * torch.randn(1, 3, 81)).to(dtype) for _ in range(2))
    for variation in VARIATIONS:
        found = variation_graph(first, second, variation)   # type: ignore[arg-type]
        assert all(part.dtype == torch.float32 and part.isfinite().all() for part in found)
        for part, wide in zip(found, variation_graph(first.float(), second.float(), variation), strict=True):   # type: ignore[arg-type]
            assert torch.equal(part, wide)


def test_wrong_input_is_refused() -> None:
    maps = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"`maps` must be a floating map of shape \(B, C, \*S\)"):
        salience_nodes(torch.zeros(1, 2, 3), (3,))
    for window in ((3,), (3, 3, 3), (2, 3), (0, 3), (-1, 3)):
        with pytest.raises(ValueError, match=r"`window` must be 2 odd numbers of voxels, .* got \["):
            salience_nodes(maps, window)
    with pytest.raises(ValueError, match="`maximum` must be one of .* got 'largest'"):
        salience_nodes(maps, (3, 3), "largest")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`first` and `second` must be nodes of one shape \(B, C, N\), got"):
        variation_graph(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="`variation` must be one of .* got 'ratio'"):
        variation_graph(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), "ratio")   # type: ignore[arg-type]
