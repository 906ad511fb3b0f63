# SPDX-License-Identifier: Apache-2.0
"""Heads on a frozen teacher: when they are fitted, to what, and what is left behind."""

from __future__ import annotations

import copy
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn

import toys
from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_fitting import TeacherLayers
from medkd.handlers.teacher_heads import HeadFitting
from medkd.losses.class_heads import TeacherHeads
from medkd.losses.ignoring import IgnoringLoss


def fitting(teacher: Teacher, folder: Path, **options: Any) -> HeadFitting:
    heads = TeacherHeads([6, 4], 2, folder / "heads.pt", 2, teacher.path)
    loss = IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    return HeadFitting(heads, teacher, ["deep", "fine"], loss, **{"steps": 40, "learning_rate": 0.05, **options})


def attached(one: HeadFitting, data: list[dict[str, Tensor]]) -> TeacherHeads:
    toys.attach_fitting(one, data)
    return one.heads


def own_loss(one: HeadFitting, heads: nn.Module, batch: dict[str, Tensor], label: Tensor | None = None) -> float:
    levels = TeacherLayers(one.teacher, one.taps)(batch["image"].as_subclass(Tensor))
    resized = [F.interpolate(logits, size=(16, 16), mode="bilinear") for logits in heads(levels)]
    return float(torch.stack([one.loss(each, batch["label"] if label is None else label) for each in resized]).mean())


def test_missing_heads_are_fitted_when_the_loss_asks_for_them(teacher: Teacher, tmp_path: Path) -> None:
    first, longer = (fitting(teacher, tmp_path / name, steps=n) for name, n in (("a", 1), ("b", 40)))
    heads = attached(longer, toys.blob_batches())
    assert not heads.path.exists()
    data = toys.blob_batches()
    values = [own_loss(one, attached(one, data).load(), data[0]) for one in (first, longer)]
    assert values[1] < 0.85 * values[0]
    content = torch.load(heads.path, weights_only=True)
    names = ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight", "teacher_sha256"]
    assert sorted(content) == names
    assert bytes(content["teacher_sha256"].tolist()) == sha256(teacher.path.read_bytes()).digest()
    assert not any(parameter.requires_grad for parameter in heads.load().parameters())


def test_without_labels_they_learn_the_classes_of_the_teacher(teacher: Teacher, tmp_path: Path) -> None:
    one = fitting(teacher, tmp_path)
    heads, (batch, *_) = attached(one, toys.blob_batches(labeled=False)).load(), toys.blob_batches()
    classes = teacher.load()(batch["image"].as_subclass(Tensor)).argmax(1, keepdim=True)
    assert own_loss(one, heads, batch, classes) < 0.8 * own_loss(one, heads, batch, 1 - classes)


def test_neither_the_teacher_nor_the_random_state_changes(teacher: Teacher, tmp_path: Path) -> None:
    before = copy.deepcopy(torch.load(teacher.path, weights_only=True))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one = fitting(teacher, tmp_path)
    attached(one, toys.blob_batches()).load()
    torch.testing.assert_close(torch.load(teacher.path, weights_only=True), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_heads_that_are_there_are_kept_and_those_of_another_teacher_replaced(teacher: Teacher, tmp_path: Path) -> None:
    path = attached(fitting(teacher, tmp_path), toys.blob_batches()).path
    attached(fitting(teacher, tmp_path), toys.blob_batches()).load()
    before = path.read_bytes()
    attached(fitting(teacher, tmp_path, learning_rate=1.0), toys.blob_batches()).load()
    assert path.read_bytes() == before
    torch.save(toys.TwoLayers().state_dict(), teacher.path)
    other = fitting(Teacher(toys.TwoLayers, teacher.path), tmp_path)
    with pytest.raises(ValueError, match="`teacher_head` must be fitted to the teacher"):
        other.heads.load()                                         # of no trainer
    attached(other, toys.blob_batches()).load()
    assert path.read_bytes() != before


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ({"taps": ["deep"]}, r"`taps` must be 2 layers, one for each of `heads`, got \['deep'\]"),
])
def test_wrong_options_are_refused(teacher: Teacher, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    heads = TeacherHeads([6, 4], 2, tmp_path / "heads.pt", 2)
    with pytest.raises(ValueError, match=message):
        HeadFitting(**{"heads": heads, "teacher": teacher, "taps": ["deep", "fine"], "loss": DiceCELoss(), **options})
