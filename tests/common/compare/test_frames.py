# SPDX-License-Identifier: Apache-2.0
"""Slices: the patient as radiologists see him whatever the file's axes, and what lies there on other grids."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from medkd.compare.frames import frame_of, on_other_grid

WAYS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]


@pytest.mark.parametrize(("order", "signs"), WAYS[::5])
def test_patients_are_seen_from_the_feet_whatever_the_axes_of_the_file(
    order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)                   # axes right, anterior, superior
    ornt = np.array([[axis, sign] for axis, sign in zip(order, signs, strict=True)])
    turned = nib.orientations.apply_orientation(volume, ornt)
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) @ nib.orientations.inv_ornt_aff(ornt, volume.shape)
    frame = frame_of(turned.shape, affine, "mm")
    assert frame.depth == 6
    assert frame.pixel == (3.0, 2.0)
    flip = signs[2] < 0
    for position in range(6):
        seen = frame.cut(turned, 5 - position if flip else position)
        assert np.array_equal(seen, volume[::-1, ::-1, position].T)


def test_slices_of_em_go_across_the_largest_spacing_and_of_equal_ones_the_first_axis() -> None:
    assert frame_of((4, 5, 6), np.diag([6.0, 6.0, 30.0, 1.0]), "nm").across == 2
    assert frame_of((4, 5, 6), np.diag([10.0, 10.0, 10.0, 1.0]), "nm").across == 0


def test_pictures_are_shown_as_they_are() -> None:
    pixels = np.arange(12).reshape(3, 4)                             # rows, columns, as a viewer shows it
    frame = frame_of((4, 3), np.eye(4), "mm", is_picture=True)
    assert frame.letters == ()
    assert frame.depth == 1
    assert np.array_equal(frame.cut(pixels.T, 0), pixels)


def test_voxels_are_counted_by_slice() -> None:
    mask = np.zeros((3, 4, 5), bool)
    mask[1, 1:3, 2] = True
    assert frame_of((3, 4, 5), np.diag([9.0, 1.0, 1.0, 1.0]), None).per_slice(mask).tolist() == [0, 2, 0]
    assert frame_of((4, 5), np.eye(3), None).per_slice(mask[1]).tolist() == [2]


@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_linear_field_is_the_same_on_the_slice_of_another_grid(across: int) -> None:
    lengths = np.ones(3)
    lengths[across] = 2.0
    frame = frame_of((8, 9, 7), np.diag([*lengths, 1.0]), "nm")
    other = np.array([[0.0, 0.5, 0.0, 1.0], [0.5, 0.0, 0.0, -1.0], [0.0, 0.0, 0.25, 0.0], [0, 0, 0, 1.0]])
    fine = np.stack(np.meshgrid(*(np.arange(n) for n in (44, 44, 80)), indexing="ij"), -1)
    field = (fine @ other[:3, :3].T + other[:3, 3]) @ np.array([1.0, 10.0, 100.0])
    position = 2
    own = np.stack(np.meshgrid(*(np.arange(n) for n in frame.shape), indexing="ij"), -1) * lengths
    expected = frame.cut(own @ np.array([1.0, 10.0, 100.0]), position)
    found = frame.cut_other(field, other, position)
    inside = frame.cut((own[..., 0] > 1) & (own[..., 2] <= 19), position)
    assert found.shape == expected.shape
    assert np.allclose(found[inside], expected[inside], rtol=1e-3, atol=0.1)


def test_labels_keep_their_numbers_on_another_grid() -> None:
    label = np.zeros((6, 6), int)
    label[2:4, 2:4] = 7
    fine = on_other_grid(label, np.eye(3), np.diag([0.5, 0.5, 1.0]), (12, 12))
    assert set(np.unique(fine)) == {0, 7}
    assert np.array_equal(fine[::2, ::2], label)


def test_cells_of_a_network_lie_where_it_sees_them_and_nowhere_else() -> None:
    """Of 10 x 8 pixels a network sees all but a rim of one, in blocks of 4, the last of them half outside."""
    frame = frame_of((10, 8), np.eye(3), None, is_picture=True)
    image = np.array([[4.0, 0, 2.5], [0, 4.0, 2.5], [0, 0, 1]])
    plane = frame.cut_cells(np.array([[0.0, 0], [8, 8]]), image, image, (2, 2), 0)   # columns, rows
    assert plane.shape == (8, 10)
    assert np.isnan(plane[0]).all()
    assert np.isnan(plane[:, [0, 9]]).all()
    assert plane[3, 1:9].tolist() == [0.0, 0.0, 1.0, 3.0, 5.0, 7.0, 8.0, 8.0]        # centers at 2.5 and 6.5
