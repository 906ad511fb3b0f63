# SPDX-License-Identifier: Apache-2.0
"""Membranes: as thick as they are said to be, the same for any numbering, and by the definition voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medkd.inference.membranes import MembraneFromInstancesd, membranes


def drawn(text: str) -> torch.Tensor:
    """Digits to a label of shape (1, rows, columns)."""
    return torch.tensor([[[int(digit) for digit in row] for row in text.split()]])


def slow_membranes(ids: np.ndarray, axes: list[int]) -> np.ndarray:
    """The definition, voxel by voxel."""
    result = np.zeros(ids.shape, np.uint8)
    for place in np.ndindex(ids.shape):
        for axis in axes:
            for step in (-1, 1):
                other = list(place)
                other[axis] += step
                if 0 <= other[axis] < ids.shape[axis]:
                    neighbor = ids[tuple(other)]
                    result[place] |= np.uint8(neighbor != 0 and neighbor != ids[place])
    return result


def test_touching_instances_get_a_membrane_of_two_voxels() -> None:
    label = drawn("1112  1112  1133  1133")
    assert membranes(label).tolist() == drawn("0011  0011  0111  0110").tolist()


def test_a_line_of_zeros_is_the_membrane_as_wide_as_it_is_drawn() -> None:
    assert membranes(drawn("11022  11022")).tolist() == drawn("00100  00100").tolist()
    assert membranes(drawn("110022  110022")).tolist() == drawn("001100  001100").tolist()


def test_of_a_region_of_zeros_only_the_rim_is_membrane() -> None:
    assert membranes(drawn("1100000")).tolist() == drawn("0010000").tolist()
    assert membranes(drawn("0000000")).tolist() == drawn("0000000").tolist()
    assert membranes(drawn("5555555")).tolist() == drawn("0000000").tolist()


def test_corners_are_no_neighbors() -> None:
    assert membranes(drawn("10  02")).tolist() == drawn("01  10").tolist()
    assert membranes(drawn("100  000  002")).tolist() == drawn("010  101  010").tolist()


def test_volume_has_membranes_along_all_axes() -> None:
    label = torch.ones(1, 3, 3, 3, dtype=torch.int64)
    label[0, 1, 1, 1] = 2
    expected = torch.zeros(3, 3, 3, dtype=torch.uint8)
    for place in [(1, 1, 1), (0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)]:
        expected[place] = 1
    assert torch.equal(membranes(label)[0], expected)


def test_sections_whose_ids_do_not_link_are_compared_within_themselves() -> None:
    label = torch.stack([drawn("112  112")[0], drawn("777  777")[0]], dim=-1)[None]   # (1, 2, 3, 2 sections)
    mask = membranes(label, axes=[0, 1])
    assert mask[0, ..., 0].tolist() == drawn("011  011")[0].tolist()
    assert not mask[0, ..., 1].any()
    assert membranes(label).all()


@pytest.mark.parametrize("axes", [None, [0, 1], [2]])
def test_membranes_agree_with_the_definition_voxel_by_voxel(axes: list[int] | None) -> None:
    ids = np.random.default_rng(0).integers(0, 4, (7, 5, 6))
    expected = slow_membranes(ids, axes or [0, 1, 2])
    assert np.array_equal(membranes(torch.as_tensor(ids)[None], axes)[0].numpy(), expected)


def test_renumbering_the_instances_changes_nothing() -> None:
    ids = torch.randint(0, 6, (1, 9, 8, 7), generator=torch.Generator().manual_seed(0))
    other = torch.tensor([0, 40, 3, 70_000, 1, 9])[ids]
    assert torch.equal(membranes(ids), membranes(other))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_ids_above_sixteen_bits_stay_apart(dtype: torch.dtype) -> None:
    label = torch.tensor([[70_000, 70_000, 70_001, 70_001 + 65_536]], dtype=dtype)
    assert membranes(label).tolist() == [[0, 1, 1, 1]]


def test_ids_that_floats_cannot_tell_apart_are_refused() -> None:
    label = torch.tensor([[2**24, 2**24 + 1]])
    assert membranes(label).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"`instances` must have ids below 16,777,216 as torch.float32, got 16777216"):
        membranes(label.float())


def test_grown_membranes_are_thicker_by_a_voxel_on_each_side_and_step() -> None:
    label = drawn("11112222")
    assert membranes(label, grow=1).tolist() == drawn("00111100").tolist()
    assert membranes(label, grow=2).tolist() == drawn("01111110").tolist()
    assert membranes(drawn("111  121  111"), axes=[1], grow=1).tolist() == drawn("000  111  000").tolist()


def test_where_nothing_is_known_there_is_no_membrane_and_the_label_stays_ignored() -> None:
    label = torch.tensor([[[1, 1, 1, -1, -1, 2, 2, 3, 3, 3, 3]]])
    assert membranes(label).tolist() == [[[0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]]]
    assert membranes(label, grow=1).tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]]]
    for dtype in (torch.int64, torch.float32):
        result = MembraneFromInstancesd("label")({"label": label.to(dtype)})["label"]
        assert result.tolist() == [[[0, 0, 0, -1, -1, 0, 1, 1, 0, 0, 0]]]
        assert result.dtype == dtype


@pytest.mark.parametrize("axes", [[], [2], [-1]])
def test_axes_that_do_not_exist_are_refused(axes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`axes` must be spatial axes out of \[0, 1\], got \["):
        membranes(drawn("12  12"), axes)


def test_negative_growth_is_refused() -> None:
    with pytest.raises(ValueError, match="`grow` must be a number of voxels of at least 0, got -1"):
        membranes(drawn("12"), grow=-1)


def test_transform_keeps_type_and_metadata_and_leaves_its_input() -> None:
    label = MetaTensor(drawn("1122  1122").float(), affine=torch.diag(torch.tensor([10.0, 9.0, 8.0, 1.0])))
    data = {"image": torch.zeros(1), "label": label}
    result = MembraneFromInstancesd("label")(data)["label"]
    assert result.tolist() == drawn("0110  0110").tolist()
    assert result.dtype == torch.float32
    assert torch.equal(result.affine, label.affine)
    assert data["label"].max() == 2


def test_transform_may_miss_its_key_only_if_told() -> None:
    assert MembraneFromInstancesd("label", allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match="label"):
        MembraneFromInstancesd("label")({"image": 1})
