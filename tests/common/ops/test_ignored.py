# SPDX-License-Identifier: Apache-2.0
"""Ignored voxels in the ops: one notion, any grid."""

from __future__ import annotations

import pytest
import torch

from medkd.ops.affinity import affinity_distance
from medkd.ops.border import border_auc, label_border
from medkd.ops.embedding import label_affinity, pair_mask, widen_borders
from medkd.ops.ignored import ignored_voxels, is_ignored, on_grid
from medkd.ops.instances import segment_mean
from medkd.ops.resample import majority_label


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bool])
def test_a_type_without_a_sign_has_no_ignored_voxel_but_the_one_that_is_named(dtype: torch.dtype) -> None:
    label = torch.tensor([0, 1]).to(dtype)
    assert ignored_voxels(label) is None
    assert not is_ignored(label).any()
    if dtype == torch.uint8:
        assert is_ignored(torch.tensor([255, 1], dtype=dtype), 255).tolist() == [True, False]


@pytest.mark.parametrize("value", [255, 100])
def test_a_large_number_is_not_ignored_by_itself(value: int) -> None:
    label = torch.tensor([[[[0, 0, value, value]]]])
    assert ignored_voxels(label) is None
    assert label_border(label)[1].all()
    assert majority_label(label, (1, 2))[0].flatten().tolist() == [0, value]


def test_a_mask_goes_to_another_grid_by_the_nearest_voxel() -> None:
    mask = torch.tensor([[[[True, False]], [[False, False]]]])
    assert on_grid(mask, (1, 4)).flatten().tolist() == [True, True, False, False]
    assert on_grid(mask, (1, 2)).flatten().tolist() == [True, False]


@pytest.mark.parametrize("background", ["same", "different"])
def test_a_pair_that_touches_an_ignored_voxel_is_neither_one_instance_nor_valid(background: str) -> None:
    label = torch.tensor([[[[3, 3, -1, -1, -2, 3]]]])
    target = label_affinity(label, [(0, -1), (0, 2)], background)   # type: ignore[arg-type]
    assert target.tolist() == [[[[0, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 0]]]]
    valid = pair_mask(label < 0, [(0, -1), (0, 2)])
    assert valid.tolist() == [[[[False, True, False, False, False, False]], [[False] * 6]]]


def test_an_offset_longer_than_the_volume_has_no_valid_pair() -> None:
    assert not pair_mask(torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool), [(0, 0, -2), (3, 0, 0)]).any()


@pytest.mark.parametrize("background", [False, True])
def test_nodes_leave_ignored_voxels_out(background: bool) -> None:
    maps = torch.tensor([[[[1.0, 3.0, 50.0, float("nan"), 7.0]]]])
    nodes, present = segment_mean(maps, torch.tensor([[[[1, 1, -1, -5, 0]]]]), background)
    assert nodes.flatten().tolist() == [7.0 if background else 0.0, 2.0]
    assert present.tolist() == [[background, True]]
    nodes, present = segment_mean(maps, torch.full((1, 1, 1, 5), -1), background)
    assert nodes.flatten().tolist() == [0.0]
    assert not present.any()


def test_widening_makes_no_background_of_what_is_ignored_nor_next_to_it() -> None:
    assert widen_borders(torch.tensor([[4, 4, -1, -1, 5, 5, 5, 6, 6, 6]])).tolist() == [
        [4, 4, -1, -1, 5, 5, 0, 0, 6, 6]
    ]


def test_borders_and_affinities_with_ignored_voxels_are_those_of_the_rest() -> None:
    label = torch.tensor([[[[0, 0, 1, 1, -1, -1]]]])
    border, valid = label_border(label)
    assert border.flatten().tolist() == [False, True, True, False, False, False]
    assert valid.flatten().tolist() == [True] * 4 + [False] * 2
    boundary, other = torch.rand(2, 1, 1, 1, 6)
    assert border_auc(boundary, label) == border_auc(boundary[..., :4], label[..., :4])
    expected = affinity_distance(boundary[..., :4], other[..., :4], label[..., :4])
    torch.testing.assert_close(affinity_distance(boundary, other, label), expected)
    boundary[..., 4:] = 0.0
    torch.testing.assert_close(affinity_distance(boundary, other, label), expected)
