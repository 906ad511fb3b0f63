# SPDX-License-Identifier: Apache-2.0
"""The volume of a prediction beside that of its label."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data.meta_tensor import MetaTensor
from torch import Tensor

from medkd.metrics.volume import VolumeRatio, volumes


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Class indices (*S) -> (K, *S); ignored voxels are negative in all channels."""
    maps = torch.stack([(label == index).float() for index in range(classes)])
    return torch.where(label < 0, label.float(), maps)


def ratio(*cases: tuple[Tensor, Tensor], classes: int = 3) -> VolumeRatio:
    metric = VolumeRatio()
    metric.attach(Engine(lambda _engine, _batch: None), "ratio")
    metric.update(tuple([one_hot(side, classes) for side in sides] for sides in zip(*cases, strict=True)))
    return metric


@pytest.mark.parametrize("size", [(7, 9), (5, 4, 6)])
def test_the_ratio_is_that_of_counted_voxels_in_two_and_three_dimensions(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, 3, size, generator=generator) for _ in range(2))

    expected = np.mean([(pred == value).sum().item() / (label == value).sum().item() for value in (1, 2)])

    assert ratio((pred, label)).compute() == pytest.approx(expected, rel=1e-6)


def test_a_missed_class_is_nothing_and_one_that_the_label_lacks_has_no_value() -> None:
    label = torch.tensor([[1, 1, 0, 0]])
    pred = torch.tensor([[0, 0, 2, 0]])

    metric = ratio((pred, label))

    assert metric.compute() == 0.0                                 # of class 1; class 2 is not in the label
    assert math.isnan(ratio((pred, torch.zeros_like(label))).compute())


def test_the_mean_is_over_classes_and_cases_and_equal_maps_have_one() -> None:
    label = torch.tensor([[1, 1, 2, 2]])
    double = torch.tensor([[1, 2, 2, 2]])                          # 0.5 and 1.5

    assert ratio((label, label)).compute() == 1.0
    assert ratio((double, label), (label, label)).compute() == 1.0
    assert ratio((torch.tensor([[1, 1, 1, 1]]), label)).compute() == 1.0     # 2 and 0


def test_ignored_voxels_count_in_neither_volume() -> None:
    label = torch.tensor([[1, 1, -1, -1, 0]])
    pred = torch.tensor([[1, 0, 1, 1, 0]])

    assert ratio((pred, label), classes=2).compute() == 0.5


def test_spacing_changes_nothing_and_a_sum_of_counts_is_returned() -> None:
    label = MetaTensor(one_hot(torch.tensor([[[1, 0]]]), 2), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    metric = VolumeRatio(save_details=False)
    metric.update(([label], [label]))
    assert metric.compute() == 1.0
    assert volumes(np.ones((2, 3), bool), np.eye(3, dtype=bool)[:2]) == (6, 2)
