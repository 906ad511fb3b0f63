# SPDX-License-Identifier: Apache-2.0
"""Weights of voxels by the teacher's prediction."""

from __future__ import annotations

import pytest
import torch

from medkd.ops.prediction import two_class_logits
from medkd.ops.voxel_weight import voxel_weight


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 3, 5, 4)])
def test_uniform_weights_are_one(shape: tuple[int, ...]) -> None:
    weight = voxel_weight(torch.randn(shape), "uniform")
    assert weight.shape == (shape[0], 1, *shape[2:])
    assert (weight == 1).all()


def test_foreground_weights_follow_the_probability_and_have_mean_one() -> None:
    probability = torch.tensor([0.0, 0.25, 0.75, 1.0]).clamp(1e-9, 1 - 1e-7)
    logits = torch.stack([(1 - probability).log(), probability.log()]).view(1, 2, 2, 2)
    expected = torch.tensor([0.1, 0.35, 0.85, 1.1]) / 0.6
    torch.testing.assert_close(voxel_weight(logits, "foreground", floor=0.1).flatten(), expected)
    expected = torch.tensor([0.02, 0.27, 0.77, 1.02]) / 0.52       # the floor unless told otherwise
    torch.testing.assert_close(voxel_weight(logits, "foreground").flatten(), expected)


def test_a_sigmoid_output_weighs_like_its_two_class_softmax() -> None:
    logits = torch.randn(2, 1, 4, 5)
    torch.testing.assert_close(two_class_logits(logits).softmax(1)[:, 1:], logits.sigmoid())
    torch.testing.assert_close(
        voxel_weight(logits, "foreground"), voxel_weight(torch.cat([0 * logits, logits], 1), "foreground")
    )


def test_outputs_of_several_classes_are_left_as_they_are() -> None:
    logits = torch.randn(1, 3, 4, 4)
    assert two_class_logits(logits) is logits


@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_a_teacher_certain_of_background_gives_finite_weights(floor: float) -> None:
    logits = torch.zeros(1, 2, 3, 3)
    logits[:, 0] = 1e4
    assert voxel_weight(logits, "foreground", floor).isfinite().all()


def test_weights_are_float32_for_half_precision_logits() -> None:
    logits = torch.randn(1, 3, 4, 4).bfloat16()
    assert voxel_weight(logits, "foreground").dtype == torch.float32
    assert voxel_weight(logits, "uniform").dtype == torch.float32
