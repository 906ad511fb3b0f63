# SPDX-License-Identifier: Apache-2.0
"""Messages of the shape checks."""

from __future__ import annotations

import pytest
import torch

from medkd.checks import check_label, check_maps, check_same_grid, suggest


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 2, 3, 4, 5)])
def test_maps_of_two_and_three_dimensions_pass(shape: tuple[int, ...]) -> None:
    check_maps("maps", torch.zeros(shape))
    check_label("label", torch.zeros(1, 1, *shape[2:]), torch.zeros(shape))
    check_same_grid("a", torch.zeros(shape), "b", torch.zeros(1, 7, *shape[2:]))


@pytest.mark.parametrize("value", [torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4, 5, 6), torch.zeros(1, 1, 2, 2).int()])
def test_a_value_that_is_no_floating_map_is_named_with_shape_and_dtype(value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`maps` must be a floating map of shape \(B, C, \*S\).*got \(.*\) of torch"):
        check_maps("maps", value)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 4, 4), (1, 1, 4, 4), (2, 1, 4, 4, 4)])
def test_a_label_of_another_layout_is_refused_with_the_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`label` must have shape \(B, 1, \*S\) with B = 2 and 2.*add a channel axis"):
        check_label("label", torch.zeros(shape), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 1, 4, 5)])
def test_maps_of_another_grid_are_named_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`a` and `b` must share batch and spatial shape, got \(1, 2, 4, 4\) and"):
        check_same_grid("a", torch.zeros(1, 2, 4, 4), "b", torch.zeros(shape))


def test_a_near_name_is_suggested_and_else_the_first_names_are_listed() -> None:
    assert suggest("bonudary", ["boundary", "relation"]) == "did you mean 'boundary'?"
    assert suggest("xyz", ["boundary", "relation"]) == "there are 'boundary', 'relation'."
    assert suggest("xyz", ["aa", "bb", "cc"], most=2) == "there are 'aa', 'bb' and 1 more."
    assert suggest("xyz", ["aa", "bb"], most=2) == "there are 'aa', 'bb'."
    assert suggest("edge", ["node", "edges", "ledge", "hedge", "wedge"]).count(" or ") == 2   # three at most
    assert suggest("xyz", []) == "there are none."
