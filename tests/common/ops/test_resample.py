# SPDX-License-Identifier: Apache-2.0
"""Maps and labels on other grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medkd.ops.resample import majority_label, pool_average, pool_or_interpolate
from oracles import boundary_relation as oracle


def test_pooling_is_by_average_on_request_and_finer_axes_are_interpolated_all_the_same() -> None:
    maps = torch.rand(1, 2, 8, 3)
    coarse = F.adaptive_avg_pool2d(maps, (4, 3))
    expected = F.interpolate(coarse, size=(4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pool_or_interpolate(maps, (4, 6), pool="average"), expected)
    with pytest.raises(ValueError, match="`pool` must be 'maximum' or 'average', got 'median'"):
        pool_or_interpolate(maps, (4, 6), pool="median")   # type: ignore[arg-type]


def test_a_single_peak_survives_a_coarser_grid() -> None:
    maps = torch.zeros(1, 1, 4, 6, 8)
    maps[0, 0, 1, 5, 2] = 1.0
    coarse = pool_or_interpolate(maps, (2, 3, 4))
    assert coarse.shape == (1, 1, 2, 3, 4)
    assert coarse[0, 0, 0, 2, 1] == 1
    assert coarse.sum() == 1


@pytest.mark.parametrize(("size", "grid"), [((5, 7), (3, 2)), ((4, 7), (2, 3)), ((5, 6, 7), (2, 4, 3))])
def test_grids_that_do_not_divide_keep_the_peak_too(size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    maps = torch.rand(2, 1, *size)
    coarse = pool_or_interpolate(maps, grid)
    assert tuple(coarse.shape[2:]) == grid
    torch.testing.assert_close(coarse.flatten(1).amax(1), maps.flatten(1).amax(1))
    pool = F.adaptive_max_pool2d if len(grid) == 2 else F.adaptive_max_pool3d
    torch.testing.assert_close(coarse, pool(maps, grid), rtol=0, atol=0)


def test_a_finer_grid_is_interpolated_linearly() -> None:
    maps = torch.tensor([[[[0.0, 1.0]]]])
    torch.testing.assert_close(pool_or_interpolate(maps, (1, 4)), torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))


def test_axes_may_become_finer_and_coarser_at_once() -> None:
    fine = pool_or_interpolate(torch.rand(1, 1, 8, 3, 5), (4, 6, 5))
    assert fine.shape == (1, 1, 4, 6, 5)


def test_maps_on_the_grid_stay_as_they_are() -> None:
    maps = torch.rand(1, 2, 3, 4)
    assert pool_or_interpolate(maps, (3, 4)) is maps
    assert pool_average(maps, (3, 4)) is maps


@pytest.mark.parametrize(("size", "grid"), [((5, 7), (3, 2)), ((4, 6, 8), (2, 2, 4))])
def test_average_pooling_keeps_a_constant(size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    torch.testing.assert_close(pool_average(torch.ones(1, 2, *size), grid), torch.ones(1, 2, *grid))


def test_average_pooling_gives_the_mean_of_each_block() -> None:
    maps = torch.tensor([[[[0.0, 2.0, 4.0, 6.0]]]])
    torch.testing.assert_close(pool_average(maps, (1, 2)), torch.tensor([[[[1.0, 5.0]]]]))


def test_resizing_refuses_what_is_not_a_map() -> None:
    with pytest.raises(ValueError, match="`maps` must be a floating map"):
        pool_or_interpolate(torch.zeros(1, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="`maps` must be a floating map"):
        pool_average(torch.zeros(1, 1, 4, 4, dtype=torch.long), (2, 2))


# ---- labels --------------------------------------------------------------------------------------------------------


def test_the_majority_wins_and_a_tie_goes_to_the_higher_label() -> None:
    label = torch.tensor([[[[0, 0, 1, 1, 2, 2], [0, 1, 0, 0, 7, 7]]]])
    majority, share = majority_label(label, (1, 3))
    assert majority.flatten().tolist() == [0, 1, 7]
    assert share.flatten().tolist() == [1, 1, 1]


def test_ignored_voxels_do_not_vote_and_a_block_without_votes_is_ignored() -> None:
    label = torch.tensor([[[[-1, -1, -1, -1], [-1, 3, -1, -1]]]])
    majority, share = majority_label(label, (1, 2))
    assert majority.flatten().tolist() == [3, -1]
    assert share.flatten().tolist() == [0.25, 0]


@pytest.mark.parametrize(
    ("size", "grid"), [((6, 9), (3, 3)), ((5, 7), (2, 3)), ((4, 6, 2), (2, 2, 1)), ((3, 5, 4), (2, 3, 4))]
)
@pytest.mark.parametrize("ignore", [255, -1])
def test_majority_and_share_equal_the_loop_over_cells(
    size: tuple[int, ...], grid: tuple[int, ...], ignore: int
) -> None:
    label = torch.randint(0, 4, (2, 1, *size))
    label[torch.rand(label.shape) < 0.3] = ignore
    majority, share = majority_label(label, grid, ignore)
    for sample in range(2):
        winner, votes = oracle.majority_label_by_loops(label[sample, 0].numpy(), grid, ignore)
        np.testing.assert_array_equal(majority[sample, 0].numpy(), winner)
        np.testing.assert_allclose(share[sample, 0].numpy(), votes, rtol=1e-6)


def test_unequal_blocks_without_ignored_voxels_are_wholly_valid() -> None:
    _, share = majority_label(torch.zeros(1, 1, 3, 3, 3, dtype=torch.long), (2, 2, 2))
    assert (share == 1).all()


@pytest.mark.parametrize(("size", "grid"), [((12, 8), (3, 4)), ((8, 8, 12), (4, 2, 3))])
def test_majority_equals_one_hot_average_pooling(size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    label = torch.randint(0, 14, (2, 1, *size))
    torch.testing.assert_close(majority_label(label, grid)[0], oracle.majority_label(label, grid, 14))


def test_labels_are_repeated_along_an_axis_on_which_the_grid_is_finer() -> None:
    majority, share = majority_label(torch.tensor([[[[1, 1, 2, -1]]]]), (2, 2))
    assert majority.flatten().tolist() == [1, 2, 1, 2]
    assert share.flatten().tolist() == [1, 0.5, 1, 0.5]


def test_a_finer_cell_takes_the_label_at_its_center() -> None:
    majority, _ = majority_label(torch.tensor([[[[1, 2, 3]]]]), (1, 4))   # centers at 0.375, 1.125, 1.875 and 2.625
    assert majority.flatten().tolist() == [1, 2, 2, 3]


def test_large_numbers_survive_a_finer_grid() -> None:
    majority, _ = majority_label(torch.tensor([[[[2**24 + 1, 2**40 + 1]]]]), (1, 4))
    assert majority.flatten().tolist() == [2**24 + 1] * 2 + [2**40 + 1] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32])
def test_labels_may_be_of_any_dtype_that_holds_whole_numbers(dtype: torch.dtype) -> None:
    label = torch.randint(0, 5, (1, 1, 4, 4))
    for mine, other in zip(majority_label(label.to(dtype), (2, 2)), majority_label(label, (2, 2)), strict=True):
        torch.testing.assert_close(mine, other)


def test_more_than_a_byte_of_classes_are_counted() -> None:
    label = torch.tensor([[[[300, 300, 511, 511]]]])
    assert majority_label(label, (1, 2))[0].flatten().tolist() == [300, 511]


@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_a_map_of_ignored_voxels_stays_ignored(size: tuple[int, int]) -> None:
    majority, share = majority_label(torch.full((1, 1, *size), -1), (2, 2))
    assert (majority == -1).all()
    assert not share.any()


def test_labels_on_the_grid_stay_as_they_are() -> None:
    label = torch.tensor([[[[0, -1], [3, 1]]]])
    majority, share = majority_label(label, (2, 2))
    assert majority.tolist() == label.tolist()
    assert share.flatten().tolist() == [1, 0, 1, 1]
