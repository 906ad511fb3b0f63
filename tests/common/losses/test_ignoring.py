# SPDX-License-Identifier: Apache-2.0
"""MONAI's losses over the voxels that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.losses.dice import DiceCELoss, DiceLoss
from torch import Tensor, nn

from medkd.losses.ignoring import IgnoringLoss

CLASSES: dict[str, Any] = {"to_onehot_y": True, "softmax": True}


def a_batch(*size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, *size, requires_grad=True), torch.randint(0, 3, (2, 1, *size))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("size", [(5, 6), (4, 3, 6)])
@pytest.mark.parametrize("background", [False, True])
def test_the_value_and_its_gradient_are_those_of_the_labeled_part(
    batch: bool, size: tuple[int, ...], background: bool
) -> None:
    loss = DiceCELoss(batch=batch, include_background=background, **CLASSES)
    pred, label = a_batch(*size)
    part = pred.detach()[..., :4].clone().requires_grad_()
    expected = loss(part, label[..., :4].clone())
    label[..., 4:] = -1
    value = IgnoringLoss(loss)(pred, label)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad[..., :4], part.grad)
    assert not pred.grad[..., 4:].any()


def test_samples_that_differ_are_taken_one_by_one() -> None:
    loss, (pred, label) = DiceCELoss(**CLASSES), a_batch(5, 6)
    expected = (loss(pred[:1], label[:1]) + loss(pred[1:, ..., :4], label[1:, ..., :4])) / 2
    label[1, ..., 4:] = -1
    torch.testing.assert_close(IgnoringLoss(loss)(pred, label), expected)
    label[1] = -7
    torch.testing.assert_close(IgnoringLoss(loss)(pred, label), loss(pred[:1], label[:1]))


def test_samples_that_differ_make_one_batch_for_a_loss_of_batches() -> None:
    loss, (pred, label) = DiceLoss(batch=True, **CLASSES), a_batch(4, 6)
    rows = [torch.cat([maps[0].flatten(1), maps[1, ..., :4].flatten(1)], dim=1)[None] for maps in (pred, label)]
    expected = loss(*rows)
    label[1, ..., 4:] = -1
    torch.testing.assert_close(IgnoringLoss(loss)(pred, label), expected)


def test_where_everything_is_ignored_the_loss_is_zero_with_a_gradient_of_zero() -> None:
    pred, label = a_batch(5, 6)
    value = IgnoringLoss(DiceCELoss(**CLASSES))(pred, label * 0 - 1)
    value.backward()
    assert value.item() == 0
    assert pred.grad is not None
    assert not pred.grad.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_without_ignored_voxels_the_loss_gets_the_batch_itself(dtype: torch.dtype) -> None:
    class Same(nn.Module):
        def forward(self, pred: Tensor, label: Tensor) -> Tensor:
            given.extend((pred, label))
            return pred.mean()

    given: list[Tensor] = []
    pred, label = a_batch(5, 6)
    label = label.to(dtype)
    IgnoringLoss(Same())(pred, label)
    assert given[0] is pred
    assert given[1] is label


def test_metadata_do_not_matter() -> None:
    pred, label = a_batch(5, 6)
    label[..., 4:] = -1
    loss = IgnoringLoss(DiceCELoss(**CLASSES))
    torch.testing.assert_close(torch.as_tensor(loss(MetaTensor(pred), MetaTensor(label))), loss(pred, label))


def test_regions_are_ignored_by_voxel() -> None:
    loss, (pred, _) = DiceLoss(sigmoid=True), a_batch(5, 6)
    label = torch.randint(0, 2, (2, 3, 5, 6)).float()
    expected = loss(pred[..., :4], label[..., :4])
    label[:, 1, :, 4:] = -1
    torch.testing.assert_close(IgnoringLoss(loss)(pred, label), expected)


def test_labels_of_another_size_are_refused() -> None:
    pred, label = a_batch(5, 6)
    with pytest.raises(ValueError, match=r"`label` must have the prediction's size \(5, 6\) where voxels are ignored"):
        IgnoringLoss(DiceCELoss(**CLASSES))(pred, label[..., :4] * 0 - 1)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_of_whole_images_those_with_a_negative_class_are_left_out(shape: tuple[int, ...]) -> None:
    class Entropy(nn.Module):
        def forward(self, pred: Tensor, label: Tensor) -> Tensor:
            return nn.functional.cross_entropy(pred, label.flatten())

    pred = torch.randn(5, 3, requires_grad=True)
    label = torch.tensor([0, -1, 2, -2, 1]).view(shape)
    expected = Entropy()(pred[::2], label[::2])
    torch.testing.assert_close(IgnoringLoss(Entropy())(pred, label), expected)
    for nothing in (-1, -2):
        value = IgnoringLoss(Entropy())(pred, torch.full_like(label, nothing))
        value.backward()
        assert value.item() == 0.0
    assert pred.grad is not None
    assert not pred.grad.any()
