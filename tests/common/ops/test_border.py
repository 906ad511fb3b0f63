# SPDX-License-Identifier: Apache-2.0
"""Boundary maps against label maps: the pair loss, borders, and the area under the ROC curve."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from medkd.ops.affinity import half_directions
from medkd.ops.border import border_auc, label_border, pair_label_loss

ROW = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.0, 0.0]).double().view(1, 1, 1, 6)
ROW_LABEL = torch.tensor([0, 0, 1, 1, 1, 1]).view(1, 1, 1, 6)


def costs_by_loops(boundary: np.ndarray, label: np.ndarray, lengths: tuple[int, ...], ignore: int = 255) -> float:
    """The pair loss of maps (B, *S), one pair at a time."""
    costs: dict[str, list[float]] = {"foreground": [], "background": [], "crossing": []}
    for sample, direction, length in product(range(len(boundary)), half_directions(boundary.ndim - 1), lengths):
        for start in np.ndindex(boundary.shape[1:]):
            path = [tuple(c + k * v for c, v in zip(start, direction, strict=True)) for k in range(length + 1)]
            if not all(0 <= c < s for c, s in zip(path[-1], boundary.shape[1:], strict=True)):
                continue
            seen = {int(label[sample, *q]) for q in path}
            affinity = 1 - max(boundary[sample, *q] for q in path)
            if ignore in seen:
                continue
            if len(seen) > 1:
                costs["crossing"].append(-math.log(1 + 1e-5 - affinity))
            else:
                costs["foreground" if max(seen) > 0 else "background"].append(-math.log(affinity + 1e-5))
    mean = {kind: float(np.mean(values)) if values else 0.0 for kind, values in costs.items()}
    return 0.25 * (mean["foreground"] + mean["background"]) + 0.5 * mean["crossing"]


def test_the_pair_loss_of_a_row_matches_the_value_by_hand() -> None:
    """Pairs of lengths 1, 2, 4 along the row; the end points decide alike, as no structure is thin here."""
    value = pair_label_loss(ROW, ROW_LABEL, (1, 2, 4)).item()
    assert value == pytest.approx(0.5 * (0.5 * 0.346986 + 0.5 * 0.223131 + 0.916266), abs=2e-5)
    assert value == pytest.approx(0.600662, abs=1e-6)


def test_a_thin_structure_is_a_border_for_the_pair_that_spans_it() -> None:
    boundary, label = torch.full((1, 1, 1, 3), 0.25).double(), torch.tensor([[[[0, 1, 0]]]])
    assert pair_label_loss(boundary, label, (2,)).item() == pytest.approx(-0.5 * math.log(0.25 + 1e-5))


@pytest.mark.parametrize(("shape", "ignore"), [((4, 5), 255), ((3, 2, 4), 255), ((1, 4, 3), 7)])
def test_the_pair_loss_equals_the_loop_over_pairs(shape: tuple[int, ...], ignore: int) -> None:
    boundary = torch.rand(2, 1, *shape, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 1, *shape))
    label[0].flatten()[0] = ignore
    expected = costs_by_loops(boundary[:, 0].numpy(), label[:, 0].numpy(), (1, 2), ignore)
    assert pair_label_loss(boundary, label, (1, 2), ignore).item() == pytest.approx(expected)


def test_the_pair_loss_passes_gradcheck() -> None:
    boundary = (torch.rand(1, 1, 3, 4, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    label = torch.randint(0, 2, (1, 1, 3, 4))
    assert torch.autograd.gradcheck(lambda b: pair_label_loss(b, label), boundary)


@pytest.mark.parametrize("label", [torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), -1)])
def test_one_class_alone_and_nothing_but_ignored_voxels_stay_finite(label: Tensor) -> None:
    boundary = torch.rand(1, 1, 4, 4, requires_grad=True)
    value = pair_label_loss(boundary, label)
    value.backward()
    assert value.isfinite()
    assert boundary.grad is not None
    assert boundary.grad.isfinite().all()
    assert bool(value == 0) is bool((label == -1).all())


@pytest.mark.parametrize("ignore", [255, 7])
def test_borders_are_two_voxels_thick_and_ignored_voxels_make_none(ignore: int) -> None:
    label = torch.tensor([[0, 0, 1], [0, 1, 1], [0, ignore, 1]]).view(1, 1, 3, 3)
    border, valid = label_border(label, ignore)
    assert border[0, 0].int().tolist() == [[0, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert valid[0, 0].int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 1]]


@pytest.mark.parametrize("ignore", [255, 7])
def test_the_area_equals_the_share_of_ordered_pairs(ignore: int) -> None:
    boundary = torch.randint(0, 6, (2, 1, 5, 4)).float()          # many ties
    label = torch.randint(0, 2, (2, 1, 5, 4))
    label[0, 0, 0, 0] = ignore
    border, valid = label_border(label, ignore)
    on, off = boundary[border & valid], boundary[~border & valid]
    wins = (on[:, None] > off[None]).double() + 0.5 * (on[:, None] == off[None]).double()
    assert border_auc(boundary, label, ignore) == pytest.approx(wins.mean().item())


def test_a_constant_map_is_chance_and_an_inverted_one_below() -> None:
    label = torch.tensor([[[[0, 0, 0, 1, 1, 1]]]])
    border = label_border(label)[0].float()
    assert border_auc(torch.ones(1, 1, 1, 6), label) == 0.5
    assert (border_auc(border, label), border_auc(1 - border, label)) == (1.0, 0.0)


def test_the_area_of_a_large_map_is_exact() -> None:
    label = torch.zeros(1, 1, 400, 400)
    label[..., 200:] = 1
    assert border_auc(label_border(label)[0].float(), label) == 1.0   # a sum of ranks beyond 2^24


def test_without_a_border_or_with_nothing_else_there_is_no_area() -> None:
    assert math.isnan(border_auc(torch.rand(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)))
    assert math.isnan(border_auc(torch.rand(1, 1, 1, 2), torch.tensor([[[[0, 1]]]])))
