# SPDX-License-Identifier: Apache-2.0
"""Affinities of embeddings at offsets, their targets and weights, and widened borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.ops.embedding import (
    BackgroundPairs,
    background_cosine,
    label_affinity,
    offset_affinity,
    offset_mask,
    pairs_of_background,
    pooled_directions,
    target_balance_weight,
    weighted_targets,
    widen_borders,
)
from oracles import graph_relation as oracle

OFFSETS_2D = [(-1, 0), (0, -1), (-3, 0), (0, -3), (2, -1)]
OFFSETS_3D = [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, -3, 0), (1, -1, 2)]
CASES = [((5, 7), OFFSETS_2D), ((4, 5, 6), OFFSETS_3D)]


def known(vectors: list[tuple[float, float]]) -> Tensor:
    """Embeddings of one row of pixels, (1, 2, 1, W)."""
    return torch.tensor(vectors, dtype=torch.float32).T.reshape(1, 2, 1, -1)


# ---- affinities ----------------------------------------------------------------------------------------------------


def test_known_affinities_of_student_and_teacher() -> None:
    teacher, student = known([(1, 0), (1, 0), (0, 1), (0, 1)]), known([(1, 0), (1, 0), (1, 0), (0, 1)])
    mine, other = (offset_affinity(one, [(0, -1)]) for one in (student, teacher))
    assert mine.flatten().tolist() == [0, 1, 1, 0]
    assert other.flatten().tolist() == [0, 1, 0, 1]
    assert (mine - other).square().sum() / 4 == 0.5                # L_AGD,intra of the specification
    target = label_affinity(torch.tensor([[[[1, 1, 2, 2]]]]), [(0, -1)])
    assert (mine - target).square().sum() / 4 == 0.5               # L_aff with weights of 1


@pytest.mark.parametrize(("size", "offsets"), CASES, ids=["2d", "3d"])
def test_values_and_gradients_are_those_of_rolled_maps(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    embeddings = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    force = torch.randn(2, len(offsets), *size, dtype=torch.float64)
    expected = oracle.offset_affinity(embeddings, offsets)
    (expected_gradient,) = torch.autograd.grad((expected * force).sum(), embeddings)
    found = offset_affinity(embeddings, offsets)
    (gradient,) = torch.autograd.grad((found * force).sum(), embeddings)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    embeddings = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda maps: offset_affinity(maps, OFFSETS_2D), embeddings)


def test_an_embedding_without_length_has_no_affinity_and_no_gradient() -> None:
    embeddings = torch.tensor([[[[0.0, 2.0, 2.0]], [[0.0, 0.0, 1.0]]]], requires_grad=True)
    affinity = offset_affinity(embeddings, [(0, -1)])
    affinity.sum().backward()
    assert affinity.flatten()[:2].tolist() == [0, 0]
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad[..., 0].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_length_does_not_matter(scale: float) -> None:
    embeddings = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    longer = embeddings * (torch.rand(1, 1, 4, 5, dtype=torch.float64) + 0.1) * scale
    torch.testing.assert_close(offset_affinity(longer, OFFSETS_2D), offset_affinity(embeddings, OFFSETS_2D))
    torch.testing.assert_close(pooled_directions(longer, (2, 2)), pooled_directions(embeddings, (2, 2)))


def test_the_cosine_of_the_background_is_that_with_the_first_axis_in_single_precision() -> None:
    embeddings = known([(3, 4), (0, 2), (-1, 0), (0, 0)]).half()
    cosine = background_cosine(embeddings)
    assert (cosine.dtype, cosine.shape) == (torch.float32, (1, 1, 1, 4))
    assert cosine.flatten().tolist() == pytest.approx([0.6, 0, -1, 0])


def test_half_precision_is_computed_in_single() -> None:
    assert offset_affinity(torch.randn(1, 3, 4, 5).half(), OFFSETS_2D).dtype == torch.float32
    assert pooled_directions(torch.randn(1, 3, 4, 5).half(), (2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("size", "offsets"), CASES, ids=["2d", "3d"])
def test_the_mask_tells_which_pairs_lie_inside(size: tuple[int, ...], offsets: list[tuple[int, ...]]) -> None:
    mask = offset_mask(size, offsets)
    same = label_affinity(torch.zeros(1, 1, *size, dtype=torch.int64), offsets)
    assert torch.equal(mask, same[0] > 0)
    assert torch.equal(offset_affinity(torch.ones(1, 1, *size), offsets)[0] > 0, mask)


def test_an_offset_longer_than_its_axis_has_no_pair() -> None:
    assert not offset_mask((3, 4), [(-3, 0), (0, 9)]).any()
    assert not offset_affinity(torch.ones(1, 1, 3, 4), [(-3, 0), (0, 9)]).any()


@pytest.mark.parametrize("offsets", [[], [(0, 0)], [(1,)], [(1, 0, 0)], [(0.5, 1)]])
def test_a_vector_that_is_no_offset_is_refused(offsets: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="`offsets` must be vectors of 2 whole numbers, not all 0, got"):
        offset_affinity(torch.rand(1, 2, 3, 4), offsets)


# ---- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["same", "different"])
@pytest.mark.parametrize(("size", "offsets"), CASES, ids=["2d", "3d"])
def test_targets_are_those_of_loops(
    size: tuple[int, ...], offsets: list[tuple[int, ...]], background: BackgroundPairs
) -> None:
    label = torch.randint(0, 3, (2, 1, *size)) * 70_001
    found = label_affinity(label, offsets, background)
    for sample in range(2):
        expected = oracle.label_affinity_by_loops(label[sample, 0].numpy(), offsets, background)
        assert np.array_equal(found[sample].numpy(), expected)


def test_offsets_of_several_sections_are_followed_to_their_end() -> None:
    label = torch.tensor([1, 1, 2, 2]).reshape(1, 1, 4, 1, 1)
    near, far = label_affinity(label, [(-1, 0, 0), (-3, 0, 0)])[0].flatten(1).tolist()
    assert (near, far) == ([0, 1, 0, 1], [0, 0, 0, 0])


def test_permuting_the_numbers_of_instances_changes_no_target() -> None:
    label = torch.randint(0, 4, (1, 1, 6, 6))
    permuted = torch.tensor([0, 3, 1, 2])[label]
    found = [label_affinity(one, OFFSETS_2D, "different") for one in (label, permuted)]
    assert torch.equal(*found)


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of shape \(B, 1, \*S\), integer, got \(1, 2, 3, 4\)"):
        label_affinity(torch.zeros(1, 2, 3, 4, dtype=torch.int64), OFFSETS_2D)
    with pytest.raises(ValueError, match="integer, got .* of torch.float32"):
        label_affinity(torch.rand(1, 1, 3, 4), OFFSETS_2D)
    with pytest.raises(ValueError, match="`background` must be one of .* got 'none'"):
        label_affinity(torch.zeros(1, 1, 3, 4, dtype=torch.int64), OFFSETS_2D, "none")   # type: ignore[arg-type]


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ones", "weights"), [(3, (1.0, 3.0)), (1, (3.0, 1.0)), (4, (1.0, 1.0)), (0, (1.0, 1.0)), (2, (1.0, 1.0))]
)
def test_the_rarer_target_weighs_as_much_as_the_other(ones: int, weights: tuple[float, float]) -> None:
    target = torch.tensor([1.0] * ones + [0.0] * (4 - ones)).reshape(1, 1, 2, 2)
    found = target_balance_weight(target)
    assert found[target == 1].unique().tolist() == ([weights[0]] if ones else [])
    assert found[target == 0].unique().tolist() == ([weights[1]] if ones < 4 else [])


def test_weights_stay_between_their_bounds() -> None:
    target = torch.zeros(1, 1, 100, 100)
    target[..., 0, 0] = 1
    assert target_balance_weight(target).max() == pytest.approx(19)
    assert target_balance_weight(1 - target).max() == pytest.approx(99, rel=1e-4)


def test_shares_are_of_a_channel_or_of_a_sample_and_of_what_the_mask_counts() -> None:
    target = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]).reshape(1, 2, 2, 2)
    assert target_balance_weight(target).unique().tolist() == [1.0]
    assert target_balance_weight(target, per_channel=True)[target == 1].tolist() == [3.0, 1.0, 1.0, 1.0]
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).reshape(2, 2)
    assert target_balance_weight(target, mask)[target == 0].unique().tolist() == [3.0]


def test_an_offset_without_a_pair_weighs_nothing() -> None:
    for balance in ("none", "channel"):
        weight, target = weighted_targets(
            torch.ones(2, 1, 2, 3, 3, dtype=torch.int64), [(-2, 0, 0), (0, -1, 0)], "different", balance
        )
        assert weight[:, 0].unique().tolist() == target[:, 0].unique().tolist() == [0.0]
        assert weight[:, 1].unique().tolist() == pytest.approx([0.0, 1 / (2 * 12)])   # 12 of 18 pairs in each of two


@pytest.mark.parametrize(("axes", "expected"), [(2, "same"), (3, "different")])
def test_background_is_one_object_in_the_plane_and_none_in_space(axes: int, expected: str) -> None:
    assert pairs_of_background(axes) == expected


# ---- borders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2**40])
def test_borders_are_widened_as_loops_do(scale: int) -> None:
    label = torch.randint(0, 3, (2, 1, 3, 6, 7)).repeat_interleave(2, 3).repeat_interleave(2, 4) + 0
    label = torch.where(label > 0, label + scale, 0)
    found = widen_borders(label)
    for sample in range(2):
        for section in range(3):
            expected = oracle.widen_borders_by_loops(label[sample, 0, section].numpy())
            assert np.array_equal(found[sample, 0, section].numpy(), expected)


def test_labels_stay_as_they_are_when_their_borders_are_widened() -> None:
    label = torch.tensor([[7, 7, 9, 9]])
    assert widen_borders(label).tolist() == [[7, 0, 0, 9]]
    assert label.tolist() == [[7, 7, 9, 9]]


def test_background_alone_stays() -> None:
    assert not widen_borders(torch.zeros(1, 1, 4, 4, dtype=torch.int32)).any()


@pytest.mark.parametrize(
    ("size", "cells"), [((11, 9), (7, 4)), ((5, 8, 9), (3, 7, 7)), ((4, 6), (1, 1)), ((4, 5), (9, 2))]
)
def test_pooled_directions_equal_average_pooling_of_unit_embeddings(
    size: tuple[int, ...], cells: tuple[int, ...]
) -> None:
    embeddings = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    pool = F.avg_pool2d if len(size) == 2 else F.avg_pool3d
    expected = pool(F.normalize(embeddings, dim=1), cells, cells, ceil_mode=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled_directions(embeddings, cells), expected)
    assert torch.autograd.gradcheck(lambda maps: pooled_directions(maps, cells), embeddings)


def test_blocks_larger_than_a_thin_volume_are_as_large_as_it() -> None:
    embeddings = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64)
    assert torch.equal(pooled_directions(embeddings, (3, 7, 2)), pooled_directions(embeddings, (2, 5, 2)))


def test_pooled_directions_leave_out_embeddings_without_length() -> None:
    embeddings = torch.zeros(1, 2, 2, 2, requires_grad=True)
    pooled_directions(embeddings, (2, 2)).sum().backward()
    assert embeddings.grad is not None
    assert not embeddings.grad.any()


@pytest.mark.parametrize("cells", [(2,), (0, 1)])
def test_blocks_that_do_not_fit_are_refused(cells: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`cells` must be 2 numbers of voxels of at least 1"):
        pooled_directions(torch.zeros(1, 2, 4, 4), cells)
