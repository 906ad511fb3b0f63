# SPDX-License-Identifier: Apache-2.0
"""Cases without a label: in no supervised loss, and in every distillation term, alone or next to others in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn

from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.affinity import AffinityLoss
from medkd.losses.base import DistillationLoss, pointwise_convolution
from medkd.losses.boundary_head import PairLabelLoss
from medkd.losses.boundary_relation import BoundaryRelationLoss
from medkd.losses.class_heads import FixedHeads
from medkd.losses.direct_affinity import DirectAffinityDistillation
from medkd.losses.features import HintLoss
from medkd.losses.graph_flow import GraphFlowLoss
from medkd.losses.graph_relation import GraphRelationLoss
from medkd.losses.ignoring import IgnoringLoss
from medkd.losses.layer_feedback import LayerFeedbackLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.relation_bank import RelationBank
from medkd.losses.soft_target import SoftTargetLoss
from medkd.ops.ignored import IGNORED, UNLABELED
from medkd.ops.prediction import hard_labels

SIZES = {2: (8, 12), 3: (4, 6, 8)}
OFFSETS = {2: [(-1, 0), (0, -3)], 3: [(-1, 0, 0), (0, -1, 0), (0, 2, -3)]}
CHANNELS = 4
Maps = dict[str, Tensor]
Make = Callable[[int], DistillationLoss]


def inputs(rank: int, batch: int = 3) -> tuple[Maps, Maps, Tensor]:
    """Taps `e` and `f` on the grid and `c` on half of it, predictions, and labels; the second sample has none."""
    full, half = SIZES[rank], [length // 2 for length in SIZES[rank]]
    student, teacher = (
        {"e": torch.randn(batch, 3, *full), "f": torch.randn(batch, 3, *full), "c": torch.randn(batch, 3, *half),
         "pred": 3.0 * torch.randn(batch, CHANNELS, *full)}
        for _ in range(2)
    )
    label = torch.randint(0, CHANNELS, (batch, 1, *full))
    label[1] = UNLABELED
    label[2, ..., :3] = IGNORED
    for value in student.values():
        value.requires_grad_()
    return student, teacher, label


def part(maps: Mapping[str, Tensor], sample: int) -> Maps:
    return {name: value[sample : sample + 1] for name, value in maps.items()}


def soft(rank: int) -> DistillationLoss:
    return SoftLabelLoss()


def soft_foreground(rank: int) -> DistillationLoss:
    return SoftLabelLoss(weighting="foreground")


def target(rank: int) -> DistillationLoss:
    return SoftTargetLoss()


def target_by_sample(rank: int) -> DistillationLoss:
    return SoftTargetLoss("probabilities", batch=False)


def hints(rank: int) -> DistillationLoss:
    return HintLoss(["e", "c"], [[3, 3], [3, 3]], spatial_dims=rank)


def relation(rank: int) -> DistillationLoss:
    return BoundaryRelationLoss(["e"], ["e", "c"], min_boundary_auc=0.0)


def feedback(rank: int) -> DistillationLoss:
    heads = FixedHeads([3, 3], CHANNELS, rank), FixedHeads([3], CHANNELS, rank, seed=1)
    return LayerFeedbackLoss(["e", "c", "c"], ["c", "e"], projection="fixed", heads=heads)


def flow(rank: int) -> DistillationLoss:
    return GraphFlowLoss([["e", "f"]], spatial_dims=rank)


def adversarial(rank: int) -> DistillationLoss:
    """With a discriminator that looks at single voxels."""
    return AdversarialLoss(pointwise_convolution(CHANNELS, 1, rank, torch.Generator().manual_seed(0)))


def direct(rank: int) -> DistillationLoss:
    offsets = [[-1] * rank, [*[0] * (rank - 1), -2], [2, *[0] * (rank - 1)], [0, 1, 1][:rank]]
    return DirectAffinityDistillation(offsets[: CHANNELS - 1], foreground=True)


def graph(rank: int, **options: Any) -> DistillationLoss:
    """With a past image in its memory, so that all terms are there."""
    bank = RelationBank(channels=CHANNELS, capacity=4, sample=2)
    bank.enqueue(torch.eye(CHANNELS)[None], torch.eye(CHANNELS)[None], torch.tensor([True]))
    return GraphRelationLoss(OFFSETS[rank], bank=bank, pooling=(2,) * rank, **options)


def graph_balanced(rank: int) -> DistillationLoss:
    return graph(rank, balance="sample" if rank == 2 else "channel", background_weight=2.0)


def stand_in(make: Make, teacher: Maps) -> Tensor:
    """What a loss is said to take for the labels of cases without one, written out."""
    return hard_labels(teacher["pred"]) if make is relation else torch.zeros_like(hard_labels(teacher["pred"]))


ALL = [soft, soft_foreground, target, target_by_sample, hints, relation, feedback, flow, adversarial, direct,
       graph, graph_balanced]
# Losses whose terms are means over samples as long as no voxel is ignored.
BY_SAMPLE = dict.fromkeys([soft, target_by_sample, hints, feedback, flow, adversarial, graph, graph_balanced])
BY_SAMPLE |= {relation: "relation"}


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Compare terms, and the gradients of each."""
    assert found.keys() == expected.keys()
    for term, value in found.items():
        torch.testing.assert_close(value, expected[term], msg=term)
        if value.requires_grad:
            slopes = [
                torch.autograd.grad(one, list(leaves.values()), retain_graph=True, materialize_grads=True)
                for one in (value, expected[term])
            ]
            torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("make", ALL)
def test_a_batch_without_labels_is_one_that_has_none(make: Make, rank: int) -> None:
    student, teacher, label = inputs(rank)
    expected = make(rank)(student, teacher, None)
    for dtype in (torch.int64, torch.float32, torch.int16):
        compare(make(rank)(student, teacher, torch.full_like(label, UNLABELED, dtype=dtype)), expected, student)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("make", ALL)
def test_a_mixed_batch_is_one_whose_unlabeled_cases_have_the_stand_in(make: Make, rank: int) -> None:
    student, teacher, label = inputs(rank)
    written = label.clone()
    written[1] = stand_in(make, teacher)[1]
    before = label.clone()
    compare(make(rank)(student, teacher, label), make(rank)(student, teacher, written), student)
    assert torch.equal(label, before)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("make", list(BY_SAMPLE))
def test_a_mixed_batch_is_the_mean_of_what_its_samples_give(make: Make, rank: int) -> None:
    student, teacher, label = inputs(rank)
    label = label.where(label != IGNORED, 0)
    found = make(rank)(student, teacher, label)
    labels = [label[0:1], None, label[2:3]]
    singles = [make(rank)(part(student, n), part(teacher, n), labels[n]) for n in range(3)]
    chosen = found.keys() if BY_SAMPLE[make] is None else {BY_SAMPLE[make]}
    compare(
        {term: found[term] for term in chosen},
        {term: torch.stack([one[term] for one in singles]).mean() for term in chosen}, student,
    )


@pytest.mark.parametrize("make", [soft, hints, target])
def test_every_voxel_of_an_unlabeled_case_counts_and_no_ignored_one_of_another(make: Make) -> None:
    student, teacher, label = inputs(2)
    for term in make(2)(student, teacher, label).values():
        term.backward(retain_graph=True)
    slope = {name: value.grad for name, value in student.items()}["e" if make is hints else "pred"]
    assert slope is not None
    assert slope[1].abs().amax(0).all()
    assert not slope[2, ..., :3].any()


def test_regions_of_the_teacher_stand_in_where_the_label_has_a_channel_for_each() -> None:
    student, teacher, _ = inputs(2)
    label = torch.randint(0, 2, (3, CHANNELS, *SIZES[2])).float()
    label[1] = UNLABELED
    written = label.clone()
    written[1] = (teacher["pred"][1] > 0).float()
    losses = [
        BoundaryRelationLoss(["e"], ["e", "c"], min_boundary_auc=0.0, activation="sigmoid") for _ in range(2)
    ]
    compare(losses[0](student, teacher, label), losses[1](student, teacher, written), student)


def test_the_stand_in_is_brought_to_the_grid_of_the_label() -> None:
    student, teacher, label = inputs(2)
    fine = label.repeat_interleave(2, 2).repeat_interleave(2, 3)
    written = fine.clone()
    written[1] = hard_labels(teacher["pred"])[1].repeat_interleave(2, 1).repeat_interleave(2, 2)
    compare(relation(2)(student, teacher, fine), relation(2)(student, teacher, written), student)


def test_a_padded_border_of_an_unlabeled_case_stays_ignored_and_its_other_voxels_count() -> None:
    student, teacher, label = inputs(2)
    label[1, ..., :2] = IGNORED
    written = label.where(label != UNLABELED, 0)
    compare(soft(2)(student, teacher, label), soft(2)(student, teacher, written), student)


def test_an_unlabeled_case_is_remembered_without_instances() -> None:
    student, teacher, label = inputs(2)
    loss = GraphRelationLoss(OFFSETS[2], bank=RelationBank(channels=CHANNELS, capacity=4, sample=2))
    loss(student, teacher, label)
    assert loss.bank.has_instances.tolist() == [True, False, True, False]
    assert loss.bank.voxel_moments[1].any()


# ---- supervised losses ---------------------------------------------------------------------------------------------


def monai(**options: Any) -> nn.Module:
    return IgnoringLoss(DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, **options))


SUPERVISED: list[Callable[[int], nn.Module]] = [
    lambda rank: monai(batch=True),
    lambda rank: monai(batch=False),
    lambda rank: AffinityLoss(OFFSETS[rank]),
    lambda rank: AffinityLoss(OFFSETS[rank], balance="none", widen=True, background_weight=3.0),
]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("make", SUPERVISED)
def test_a_supervised_loss_is_that_of_the_labeled_samples_bit_for_bit(
    make: Callable[[int], nn.Module], ignored: bool, rank: int
) -> None:
    student, _, label = inputs(rank)
    if not ignored:
        label = label.where(label != IGNORED, 0)
    pred, loss = student["pred"], make(rank)
    values = loss(pred, label), loss(pred[[0, 2]], label[[0, 2]])
    assert torch.equal(*values)
    slopes = [torch.autograd.grad(value, pred)[0] for value in values]
    assert torch.equal(*slopes)
    assert not slopes[0][1].any()
    padded = label.clone()
    padded[1, ..., :2] = 0                                         # by a transform
    for other in (padded, label.float(), label.to(torch.int16), MetaTensor(label)):
        assert torch.equal(torch.as_tensor(loss(pred, other)), values[0])
    torch.testing.assert_close(torch.as_tensor(loss(MetaTensor(pred), MetaTensor(label))), values[0])


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("make", SUPERVISED)
def test_without_any_label_a_supervised_loss_is_zero_with_a_gradient_of_zero(
    make: Callable[[int], nn.Module], rank: int
) -> None:
    student, _, label = inputs(rank)
    value = make(rank)(student["pred"], torch.full_like(label, UNLABELED))
    assert value.item() == 0
    assert value.shape == ()
    assert not torch.autograd.grad(value, student["pred"])[0].any()


def test_without_an_unlabeled_or_ignored_voxel_the_wrapped_loss_gets_the_labeled_samples_as_they_are() -> None:
    class Same(nn.Module):
        def forward(self, pred: Tensor, label: Tensor) -> Tensor:
            given.extend((pred, label))
            return pred.mean()

    given: list[Tensor] = []
    pred, label = torch.randn(3, 2, 4, 5), torch.zeros(3, 1, 4, 5)
    label[1] = UNLABELED
    IgnoringLoss(Same())(pred, label)
    assert torch.equal(given[0], pred[[0, 2]])
    assert given[1].shape == (2, 1, 4, 5)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_loss_of_a_boundary_head_is_that_of_the_labeled_samples(rank: int) -> None:
    _, _, label = inputs(rank)
    boundary = torch.rand(3, 1, *SIZES[rank], requires_grad=True)
    assert torch.equal(PairLabelLoss()(boundary, label), PairLabelLoss()(boundary[[0, 2]], label[[0, 2]]))
    value = PairLabelLoss()(boundary, torch.full_like(label, UNLABELED))
    assert value.item() == 0
    assert not torch.autograd.grad(value, boundary)[0].any()
