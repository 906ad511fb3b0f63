# SPDX-License-Identifier: Apache-2.0
"""Heads on a frozen teacher: what they give, what is trained and saved, and that a loss reads what was saved."""

from __future__ import annotations

import copy
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn

from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_heads import EachHeadLoss, TeacherWithHeads
from medkd.losses.class_heads import TeacherHeads
from medkd.losses.ignoring import IgnoringLoss


class Net(nn.Module):
    """Two layers of unlike grids."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.fine = nn.Conv2d(1, 6, 4, 2, 1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.fine(self.deep(image).relu())))


@pytest.fixture
def network(tmp_path: Path) -> TeacherWithHeads:
    torch.save(Net().state_dict(), tmp_path / "teacher.pt")
    return TeacherWithHeads(Teacher(Net, tmp_path / "teacher.pt"), [6, 4], ["deep", "fine"], 2, spatial_dims=2)


def test_heads_side_by_side_in_training_and_their_mean_otherwise(network: TeacherWithHeads) -> None:
    image = torch.randn(2, 1, 8, 12)
    teacher = network.frozen.network
    deep = F.interpolate(network.layers[0](teacher.deep(image)), size=(8, 12), mode="bilinear")
    fine = network.layers[1](teacher.fine(teacher.deep(image).relu()))
    torch.testing.assert_close(network.train()(image), torch.cat([deep, fine], 1))
    torch.testing.assert_close(network.eval()(image), (deep + fine) / 2)


def test_only_the_heads_are_trained_and_the_loss_reads_them(network: TeacherWithHeads, tmp_path: Path) -> None:
    image = torch.randn(4, 1, 16, 16)
    label = (F.avg_pool2d(image, 3, 1, 1) > 0).long()
    loss = EachHeadLoss(IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True)), classes=2)
    before = copy.deepcopy(network.frozen.network.state_dict())
    optimizer, values = torch.optim.Adam(network.parameters(), lr=0.05), []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(network.train()(image), label)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]
    torch.testing.assert_close(network.frozen.network.state_dict(), before, rtol=0, atol=0)   # running means too
    names = ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight", "teacher_sha256"]
    assert sorted(network.state_dict()) == names
    assert bytes(network.teacher_sha256.tolist()) == sha256((tmp_path / "teacher.pt").read_bytes()).digest()
    torch.save(network.state_dict(), tmp_path / "heads.pt")
    fitted = TeacherHeads([6, 4], 2, tmp_path / "heads.pt", 2, tmp_path / "teacher.pt").load()
    levels = [torch.randn(1, 6, 4, 4), torch.randn(1, 4, 8, 8)]
    for n, logits in enumerate(fitted(levels)):
        torch.testing.assert_close(logits, network.layers[n](levels[n]))


def test_the_loss_is_the_mean_over_heads() -> None:
    pred, label = torch.randn(2, 6, 4, 4), torch.randint(0, 2, (2, 1, 4, 4))
    single = DiceCELoss(to_onehot_y=True, softmax=True)
    expected = torch.stack([single(pred[:, k : k + 2], label) for k in (0, 2, 4)]).mean()
    torch.testing.assert_close(EachHeadLoss(single, 2)(pred, label), expected)
    with pytest.raises(ValueError, match="`pred` must have a multiple of 4 channels, .* got 6"):
        EachHeadLoss(single, 4)(pred, label)


def test_as_many_channels_as_taps_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`channels` must give one number for each of 1 taps, got \[6, 4\]"):
        TeacherWithHeads(Teacher(Net), [6, 4], ["deep"], 2, spatial_dims=2)
