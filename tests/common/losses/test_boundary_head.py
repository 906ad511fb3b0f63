# SPDX-License-Identifier: Apache-2.0
"""Learned boundary maps: their shape, their first values, and that they can be fitted to labels."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.data.meta_tensor import MetaTensor
from torch import Tensor

from medkd.losses.boundary_head import BoundaryHead, PairLabelLoss, TeacherHead
from medkd.ops.border import border_auc, pair_label_loss
from medkd.ops.resample import majority_label


@pytest.mark.parametrize(
    ("channels", "count"),
    [((32, 64, 128, 256, 320), 26_081), ((16, 32, 64, 128, 160), 13_281), ((64, 64, 128, 256, 512), 33_249)],
)
def test_the_number_of_parameters_is_the_published_one(channels: tuple[int, ...], count: int) -> None:
    assert sum(p.numel() for p in BoundaryHead(channels).parameters()) == count


@pytest.mark.parametrize("grid", [(5, 7), (10, 14), (3, 4)])
def test_levels_of_any_size_meet_on_the_grid(grid: tuple[int, int]) -> None:
    levels = [torch.randn(2, 3, 10, 14), torch.randn(2, 6, 5, 7)]
    boundary = BoundaryHead((3, 6), spatial_dims=2)(levels, grid)
    assert boundary.shape == (2, 1, *grid)
    assert 0 < boundary.min() < boundary.max() < 1


def test_building_a_head_leaves_the_global_generators_untouched() -> None:
    before = torch.random.get_rng_state()
    first, second, other = BoundaryHead((3, 4)), BoundaryHead((3, 4)), BoundaryHead((3, 4), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.reduce[0].weight, second.reduce[0].weight)
    assert not torch.equal(first.reduce[0].weight, other.reduce[0].weight)


def test_a_head_learns_to_show_borders_from_labels_alone() -> None:
    torch.manual_seed(0)
    label = torch.zeros(1, 1, 16, 16, dtype=torch.long)
    label[..., 4:11, 5:12] = 1
    levels = [torch.randn(1, 4, 16, 16) * 0.3 + label, torch.randn(1, 4, 8, 8)]
    head, loss = BoundaryHead((4, 4), spatial_dims=2), PairLabelLoss()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02)
    start = border_auc(head(levels, (16, 16)), label)
    for _ in range(60):
        optimizer.zero_grad()
        loss(head(levels, (16, 16)), label).backward()
        optimizer.step()
    assert border_auc(head(levels, (16, 16)), label) > max(0.75, start)


def test_the_boundary_map_is_that_of_the_formula() -> None:
    levels = [torch.randn(2, 3, 10, 14), torch.randn(2, 6, 5, 7)]
    head = BoundaryHead((3, 6), spatial_dims=2, width=8, groups=4)
    reduced = []
    for convolution, level in zip(head.reduce, levels, strict=True):
        normal = F.group_norm(F.conv2d(level, convolution.weight), 4)
        reduced.append(F.adaptive_avg_pool2d(normal, (5, 7)).clamp(min=0))
    logits = F.conv2d(torch.cat(reduced, 1), head.combine.weight, head.combine.bias)
    torch.testing.assert_close(head(levels, (5, 7)), logits.sigmoid())
    assert torch.equal(head.combine.bias, torch.zeros(1))
    assert BoundaryHead((3,), 2).norm[0].num_groups == 4


def test_labels_are_reduced_to_the_grid_by_majority() -> None:
    boundary, label = torch.rand(2, 1, 4, 6), torch.randint(0, 3, (2, 1, 8, 12)).float()
    expected = pair_label_loss(boundary, majority_label(label, (4, 6))[0])
    torch.testing.assert_close(PairLabelLoss()(boundary, label), expected)


def test_lengths_and_the_ignored_label_are_those_that_were_asked_for() -> None:
    boundary, label = torch.rand(2, 1, 4, 6), torch.randint(0, 3, (2, 1, 8, 12))
    label[torch.rand(label.shape) < 0.5] = 7
    reduced, _ = majority_label(label, (4, 6), ignore=7)
    expected = pair_label_loss(boundary, reduced, (1, 3), ignore=7)
    torch.testing.assert_close(PairLabelLoss((1, 3), ignore_label=7)(boundary, label), expected)


def test_half_precision_with_metadata_gives_a_plain_scalar_in_float32() -> None:
    boundary, label = torch.rand(2, 1, 4, 6).bfloat16(), torch.randint(0, 3, (2, 1, 4, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = PairLabelLoss()(MetaTensor(boundary), MetaTensor(label))
    assert type(value) is Tensor
    torch.testing.assert_close(value, pair_label_loss(boundary.float(), label))


def test_a_head_of_other_levels_is_named() -> None:
    with pytest.raises(ValueError, match=r"`channels` of the boundary head must be \[3\], got \[4\]"):
        BoundaryHead((4,), 2)([torch.rand(1, 3, 4, 4)], (4, 4))


def test_the_teachers_head_is_loaded_strictly_and_frozen(tmp_path: Path) -> None:
    head = BoundaryHead((3, 4), spatial_dims=2, seed=5)
    torch.save(head.state_dict(), tmp_path / "model.pt")
    loaded = TeacherHead((3, 4), tmp_path / "model.pt", spatial_dims=2).load()
    torch.testing.assert_close(dict(loaded.state_dict()), dict(head.state_dict()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    moved = TeacherHead((3, 4), tmp_path / "model.pt", spatial_dims=2).load(torch.device("meta"))
    assert {p.device.type for p in moved.parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"`teacher_head` must hold a head for levels of \[3\] channels"):
        TeacherHead((3,), tmp_path / "model.pt", spatial_dims=2).load()
    with pytest.raises(FileNotFoundError, match="`teacher_head` must be the weights of the teacher's boundary head"):
        TeacherHead((3,), tmp_path / "no.pt").load()


@pytest.mark.parametrize("marked", [True, False])
def test_a_head_is_taken_when_it_or_the_run_does_not_know_its_teacher(tmp_path: Path, marked: bool) -> None:
    (tmp_path / "teacher.pt").write_bytes(b"first")
    mark = {"teacher_sha256": torch.zeros(32, dtype=torch.uint8)} if marked else {}
    torch.save(BoundaryHead((3,), 2).state_dict() | mark, tmp_path / "head.pt")
    TeacherHead((3,), tmp_path / "head.pt", 2, None if marked else tmp_path / "teacher.pt").load()


def test_a_head_of_another_teacher_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.pt").write_bytes(b"first")
    mark = torch.tensor(list(sha256(b"first").digest()), dtype=torch.uint8)
    torch.save({**BoundaryHead((3,), 2).state_dict(), "teacher_sha256": mark}, tmp_path / "head.pt")
    head = TeacherHead((3,), tmp_path / "head.pt", 2, tmp_path / "teacher.pt")
    head.load()
    (tmp_path / "teacher.pt").write_bytes(b"second")
    with pytest.raises(ValueError, match=r"must be fitted to the teacher .*teacher\.pt .* fit it with the config file"):
        head.load()
