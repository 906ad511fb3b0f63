# SPDX-License-Identifier: Apache-2.0
"""Where predictions are wrong, whatever numbers instances have, and how much two agree."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from medkd.compare.errors import agreement, class_dice, differ, wrong

LABEL = np.array([[1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 3, 0]])


def slow_wrong(pred: NDArray[np.int64], label: NDArray[np.int64]) -> NDArray[np.bool_]:
    """By all pairs; no two partners may overlap equally."""
    right = (pred == 0) & (label == 0)
    for one in set(pred[pred > 0]):
        for other in set(label[label > 0]):
            shared = ((pred == one) & (label == other)).sum()
            rivals = [((pred == each) & (label == other)).sum() for each in set(pred[pred > 0])]
            rivals += [((pred == one) & (label == each)).sum() for each in set(label[label > 0])]
            if shared and shared == max(rivals):
                right |= (pred == one) & (label == other)
    return ~right & (label >= 0)


def test_numbers_of_instances_do_not_matter() -> None:
    other = np.select([LABEL == 1, LABEL == 2, LABEL == 3], [900, 5, 70_000])
    assert not wrong(other, LABEL, "instances").any()


def test_smaller_part_of_a_merger_and_of_a_split_is_wrong() -> None:
    label = np.array([1, 1, 1, 2, 2, 3, 3, 3])
    pred = np.array([4, 4, 4, 4, 4, 6, 6, 7])
    assert wrong(pred, label, "instances").tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True]


def test_errors_of_instances_equal_a_slow_search() -> None:
    generator, compared = np.random.default_rng(0), 0
    for _ in range(200):
        label = np.kron(generator.integers(0, 4, (3, 4)), np.ones((3, 5), int))
        pred = np.where(generator.random(label.shape) < 0.3, generator.integers(0, 4, label.shape), label)
        sizes = [int(((pred == a) & (label == b)).sum()) for a in range(1, 4) for b in range(1, 4)]
        shared = [size for size in sizes if size]
        if len(set(shared)) == len(shared):                          # no two partners are equally good
            compared += 1
            assert np.array_equal(wrong(pred, label, "instances"), slow_wrong(pred, label))
    assert compared > 10


def test_ignored_and_unlabeled_voxels_are_never_wrong() -> None:
    label = np.array([-1, 0, 1, 1])
    pred = np.array([1, 1, 1, 0])
    assert wrong(pred, label, "classes").tolist() == [False, True, False, True]
    assert wrong(np.array([4, 5, 6, 6]), label, "instances").tolist() == [False, True, False, False]
    assert wrong(np.array([4, 5, 6, 6]), label, "instances", background_counts=False).tolist() == [False] * 4


def test_networks_differ_where_one_of_them_does() -> None:
    maps = [np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]), np.array([1, 1, 2, 2])]
    assert differ(maps, "classes").tolist() == [True, False, False, True]


def test_dice_of_a_class_that_neither_has_is_no_value() -> None:
    assert class_dice(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]), 3)[0] == pytest.approx(2 / 3)
    assert np.isnan(class_dice(np.array([1]), np.array([1]), 3)[1])


@pytest.mark.parametrize("kind", ["classes", "instances"])
def test_agreement_with_itself_and_about_nothing_is_1(kind: str) -> None:
    assert agreement(LABEL, LABEL, kind, 4) == 1   # type: ignore[arg-type]
    assert agreement(0 * LABEL, 0 * LABEL, kind, 4) == 1   # type: ignore[arg-type]
    assert agreement(LABEL, np.roll(LABEL, 3, 1), kind, 4) < 0.5   # type: ignore[arg-type]
