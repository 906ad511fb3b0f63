# SPDX-License-Identifier: Apache-2.0
"""A voxel with a negative label counts in no loss: each gives what it gives for the part that is labeled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medkd.losses.affinity import AffinityLoss
from medkd.losses.base import DistillationLoss
from medkd.losses.boundary_head import PairLabelLoss
from medkd.losses.boundary_relation import BoundaryRelationLoss
from medkd.losses.class_heads import FixedHeads
from medkd.losses.direct_affinity import DirectAffinityDistillation
from medkd.losses.features import HintLoss
from medkd.losses.graph_flow import GraphFlowLoss
from medkd.losses.graph_relation import GraphRelationLoss
from medkd.losses.layer_feedback import LayerFeedbackLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.relation_bank import RelationBank

SIZES = {2: (8, 12), 3: (4, 6, 8)}
KEPT = {2: (4, 8), 3: (2, 4, 6)}     # the labeled corner
OFFSETS = {2: [(-1, 0), (0, -3)], 3: [(-1, 0, 0), (0, -1, 0), (0, 2, -3)]}
CHANNELS = 4


def corner(maps: Tensor, stride: int = 1) -> Tensor:
    """The labeled corner of a map whose cells are `stride` voxels wide."""
    for axis, length in enumerate(KEPT[maps.dim() - 2], start=2):
        maps = maps.narrow(axis, 0, length // stride)
    return maps


def inputs(rank: int, classes: int = CHANNELS) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Taps `e` and `f` on the grid and `c` on half of it, predictions, and labels that are known in a corner alone."""
    full, half = SIZES[rank], [length // 2 for length in SIZES[rank]]
    student, teacher = (
        {"e": torch.randn(2, 3, *full), "f": torch.randn(2, 3, *full), "c": torch.randn(2, 3, *half),
         "pred": torch.randn(2, CHANNELS, *full)}
        for _ in range(2)
    )
    label = torch.full((2, 1, *SIZES[rank]), -1)
    known = corner(label)
    known.copy_(torch.randint(0, classes, known.shape).float())
    for value in student.values():
        value.requires_grad_()
    return student, teacher, label


def cropped(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: corner(value.detach(), 2 if name == "c" else 1) for name, value in maps.items()}
    return {name: part.clone().requires_grad_() for name, part in parts.items()}


def soft(rank: int) -> DistillationLoss:
    return SoftLabelLoss()


def soft_foreground(rank: int) -> DistillationLoss:
    return SoftLabelLoss(weighting="foreground")


def soft_regions(rank: int) -> DistillationLoss:
    return SoftLabelLoss(weighting="foreground", activation="sigmoid")


def hints(rank: int) -> DistillationLoss:
    return HintLoss(["e", "c"], [[3, 3], [3, 3]], spatial_dims=rank, weighting="foreground")


def relation(rank: int) -> DistillationLoss:
    loss = BoundaryRelationLoss(["e"], ["e", "c"], min_boundary_auc=0.0)
    loss.activate(["relation"])
    return loss


def feedback(rank: int) -> DistillationLoss:
    heads = FixedHeads([3, 3], CHANNELS, rank), FixedHeads([3], CHANNELS, rank, seed=1)
    return LayerFeedbackLoss(["e", "c", "c"], ["c", "e"], projection="fixed", heads=heads)


def flow(rank: int) -> DistillationLoss:
    return GraphFlowLoss([["e", "f"]], spatial_dims=rank)


def direct(rank: int) -> DistillationLoss:
    offsets = [[-1] * rank, [*[0] * (rank - 1), -2], [2, *[0] * (rank - 1)], [0, 1, 1][:rank]]
    return DirectAffinityDistillation(offsets[: CHANNELS - 1], foreground=True)


def graph(rank: int, **options: Any) -> DistillationLoss:
    bank = RelationBank(channels=CHANNELS, capacity=4, sample=2)
    return GraphRelationLoss(OFFSETS[rank], bank=bank, pooling=(2,) * rank, **options)


def graph_balanced(rank: int) -> DistillationLoss:
    return graph(rank, balance="sample" if rank == 2 else "channel", background_weight=2.0)


ALL = [soft, soft_foreground, soft_regions, hints, relation, feedback, flow, direct, graph, graph_balanced]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("make", ALL)
def test_a_loss_equals_that_of_the_labeled_part(make: Callable[[int], DistillationLoss], rank: int) -> None:
    student, teacher, label = inputs(rank)
    part = cropped(student)
    whole_loss, part_loss = make(rank), make(rank)
    for _ in range(2):                                             # the second time there is something in the memory
        terms = whole_loss(student, teacher, label)
        expected = part_loss(part, {k: v.detach() for k, v in cropped(teacher).items()}, corner(label))
    assert terms.keys() == expected.keys()
    for term, value in terms.items():
        assert value.item() == pytest.approx(expected[term].item(), rel=1e-5), term
        assert value.item() != 0.0 or term == "node"
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    for name, value in student.items():
        if value.grad is None:
            continue
        outside = value.grad.clone()
        corner(outside, 2 if name == "c" else 1).zero_()
        assert not outside.any()
        torch.testing.assert_close(corner(value.grad, 2 if name == "c" else 1), part[name].grad)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"balance": "none"}, {"balance": "channel"}, {"balance": "sample", "background_weight": 3.0},
                {"background": "different"}],
)
def test_the_supervised_affinity_loss_equals_that_of_the_labeled_part(options: dict[str, Any], rank: int) -> None:
    student, _, label = inputs(rank)
    loss = AffinityLoss(OFFSETS[rank], **options)
    torch.testing.assert_close(loss(student["pred"], label), loss(corner(student["pred"]), corner(label)))


@pytest.mark.parametrize("rank", [2, 3])
def test_widening_borders_leaves_ignored_voxels_ignored(rank: int) -> None:
    student, _, label = inputs(rank, classes=2)
    loss = AffinityLoss(OFFSETS[rank], widen=True)
    torch.testing.assert_close(loss(student["pred"], label), loss(corner(student["pred"]), corner(label)))


@pytest.mark.parametrize("rank", [2, 3])
def test_the_loss_of_a_boundary_head_equals_that_of_the_labeled_part(rank: int) -> None:
    _, _, label = inputs(rank)
    boundary = torch.rand(2, 1, *SIZES[rank])
    torch.testing.assert_close(PairLabelLoss()(boundary, label), PairLabelLoss()(corner(boundary), corner(label)))


@pytest.mark.parametrize("make", [soft, hints, relation, feedback, flow, graph, graph_balanced])
def test_changes_of_images_at_ignored_voxels_do_not_count(make: Callable[[int], DistillationLoss]) -> None:
    student, teacher, label = inputs(2)
    expected = make(2)(student, teacher, label)
    changed = {name: torch.randn_like(value) for name, value in student.items()}
    for name, value in changed.items():
        corner(value, 2 if name == "c" else 1).copy_(corner(student[name].detach(), 2 if name == "c" else 1))
    for term, value in make(2)(changed, teacher, label).items():
        torch.testing.assert_close(value, expected[term])


@pytest.mark.parametrize("make", [soft, soft_foreground, hints, relation, feedback, flow, graph, graph_balanced])
def test_where_everything_is_ignored_the_terms_are_zero_and_finite(make: Callable[[int], DistillationLoss]) -> None:
    student, teacher, label = inputs(3)
    loss = make(3)
    loss(student, teacher, label)
    for term, value in loss(student, teacher, torch.full_like(label, -1)).items():
        assert value.item() == pytest.approx(0.0, abs=1e-9), term
        if value.requires_grad:
            value.backward(retain_graph=True)
    assert all(value.grad is None or value.grad.isfinite().all() for value in student.values())


def test_an_image_of_ignored_voxels_alone_is_not_remembered() -> None:
    student, teacher, label = inputs(2)
    label[1] = -1
    loss = graph(2)
    loss(student, teacher, label)
    assert len(loss.bank) == 1   # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.5, 2])
def test_soft_labels_take_the_label_of_another_grid_by_the_nearest_voxel(factor: float) -> None:
    student, teacher, label = inputs(2)
    resized = torch.nn.functional.interpolate(label.float(), scale_factor=factor, mode="nearest-exact")
    expected = SoftLabelLoss()(student, teacher, label)["logits"]
    torch.testing.assert_close(SoftLabelLoss()(student, teacher, resized)["logits"], expected)


@pytest.mark.parametrize("make", [soft, relation, feedback])
@pytest.mark.parametrize("value", [CHANNELS, 255])
def test_a_label_that_is_no_class_is_refused(make: Callable[[int], DistillationLoss], value: int) -> None:
    student, teacher, label = inputs(2)
    label[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"`label` must be class indices below 4, .* got {value}; .* map it to -1"):
        make(2)(student, teacher, label.clamp(min=0).to(torch.uint8))


def test_another_ignored_label_is_ignored_where_the_loss_is_told_so() -> None:
    student, teacher, label = inputs(2)
    options: dict[str, Any] = {"boundary_taps": ["e"], "relation_taps": ["c"], "min_boundary_auc": 0.0}
    expected = BoundaryRelationLoss(**options)(student, teacher, label)
    unsigned = label.where(label >= 0, 255).to(torch.uint8)
    terms = BoundaryRelationLoss(ignore_label=255, **options)(student, teacher, unsigned)
    for term, value in terms.items():
        torch.testing.assert_close(value, expected[term])


def test_pairs_over_an_ignored_voxel_are_no_border() -> None:
    """A line of unknown voxels between two halves: the pair loss must see neither a crossing nor one object there."""
    label = torch.tensor([1, 1, 1, -1, 2, 2, 2]).view(1, 1, 1, 7).expand(1, 1, 2, 7)
    boundary = torch.zeros(1, 1, 2, 7)
    assert PairLabelLoss((1,))(boundary, label).item() == pytest.approx(0.0, abs=1e-4)
