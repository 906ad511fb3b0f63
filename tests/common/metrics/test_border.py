# SPDX-License-Identifier: Apache-2.0
"""The metric that a boundary head is selected by."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data.meta_tensor import MetaTensor

from medkd.metrics.border import BorderAUC
from medkd.ops.border import border_auc


def test_the_metric_is_the_mean_over_the_cases_with_a_border() -> None:
    maps, labels = torch.rand(3, 1, 4, 5, 6), torch.randint(0, 2, (3, 1, 4, 5, 6))
    labels[1] = 0
    metric = BorderAUC()
    metric.update((list(maps[:2]), [MetaTensor(label) for label in labels[:2]]))
    metric.update((list(maps[2:]), list(labels[2:])))
    expected = (border_auc(maps[:1], labels[:1]) + border_auc(maps[2:], labels[2:])) / 2
    assert metric.compute() == pytest.approx(expected)
    metric.reset()
    assert math.isnan(metric.compute())


def test_labels_are_reduced_to_the_grid_of_the_map() -> None:
    label = torch.zeros(1, 4, 4)
    label[:, :, 2:] = 1
    metric = BorderAUC()
    metric.update(([torch.tensor([[[0.9, 0.9], [0.9, 0.9]]])], [label]))
    assert math.isnan(metric.compute())                            # on 2 x 2 cells every cell is a border
    metric.update(([torch.rand(1, 4, 4)], [label]))
    assert 0 <= metric.compute() <= 1
