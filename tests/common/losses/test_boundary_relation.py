# SPDX-License-Identifier: Apache-2.0
"""Boundary and relation distillation, as a whole."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.boundary_head import BoundaryHead, TeacherHead
from medkd.losses.boundary_relation import BoundaryRelationLoss, boundary_grid
from medkd.taps import FeatureTaps
from oracles import boundary_relation as oracle

Maps = dict[str, Tensor]
SIZES = [(10, 12), (6, 8, 10)]
ODD_SIZES = [(11, 13), (7, 9, 10)]


def features(size: tuple[int, ...], channels: tuple[int, int], batch: int = 2, classes: int = 3) -> Maps:
    """Two levels of strides 1 and 2 on grids of half and a quarter of the image, in float64, and a prediction."""
    grids = [tuple(-(-s // stride) for s in size) for stride in (2, 4)]
    maps = {
        name: torch.randn(batch, c, *grid, dtype=torch.float64)
        for name, c, grid in zip(("e1", "e2"), channels, grids, strict=True)
    }
    return maps | {"pred": torch.randn(batch, classes, *size, dtype=torch.float64)}


def with_gradient(maps: Maps) -> Maps:
    return {name: value.clone().requires_grad_() for name, value in maps.items()}


def blocks(size: tuple[int, ...], classes: int = 3, batch: int = 2, side: int = 4) -> Tensor:
    """Labels that are constant on blocks, (B, 1, *S)."""
    coarse = torch.randint(0, classes, (batch, 1, *(-(-s // side) for s in size)))
    for axis, s in enumerate(size, start=2):
        coarse = coarse.repeat_interleave(side, axis).narrow(axis, 0, s)
    return coarse


def a_loss(**options: object) -> BoundaryRelationLoss:
    return BoundaryRelationLoss(["e1", "e2"], ["e2"], **options)   # type: ignore[arg-type]


def values(terms: Maps) -> list[float]:
    return [terms["boundary"].item(), terms["relation"].item()]


def fused(maps: Maps, grid: tuple[int, ...]) -> Tensor:
    """The boundary map of both levels by the plain formulas."""
    mode = "bilinear" if len(grid) == 2 else "trilinear"
    low = F.interpolate(oracle.contrast(maps["e2"]), size=grid, mode=mode, align_corners=False)
    return (oracle.contrast(maps["e1"]) + low) / 2


def dense_relation(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """Class-balanced N x N relation of one level by the plain formulas; the label is on the level's grid."""
    node = [(m / m.norm(dim=1, keepdim=True)).flatten(2).transpose(1, 2) for m in (student, teacher)]
    flat = label.flatten(1)
    weight = torch.stack([1.0 / (row == row.view(-1, 1)).sum(0) for row in flat]).double()
    return oracle.relation_distance(*node, weight).mean()


@pytest.mark.parametrize("size", [(8, 12), (8, 4, 12)])
def test_both_terms_equal_the_plain_formulas(size: tuple[int, ...]) -> None:
    student, teacher, label = with_gradient(features(size, (3, 4))), features(size, (5, 2)), blocks(size)
    terms = a_loss()(student, teacher, label)
    grids = [tuple(s // stride for s in size) for stride in (2, 4)]
    fine, coarse = (oracle.majority_label(label, grid, 3) for grid in grids)
    expected = {
        "boundary": oracle.affinity_distance(fused(student, grids[0]), fused(teacher, grids[0]), fine),
        "relation": dense_relation(student["e2"], teacher["e2"], coarse),
    }
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value)
        for tap in ("e1", "e2") if term == "boundary" else ("e2",):
            ours, plain = (torch.autograd.grad(v, student[tap], retain_graph=True)[0] for v in (terms[term], value))
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("size", [(8, 8), (4, 8, 4)])
def test_the_loss_passes_gradcheck(size: tuple[int, ...]) -> None:
    student, teacher, label = features(size, (2, 2), batch=1), features(size, (3, 2), batch=1), blocks(size, 2, 1)

    def total(e1: Tensor, e2: Tensor) -> Tensor:
        return sum(a_loss()(student | {"e1": e1, "e2": e2}, teacher, label).values())

    assert torch.autograd.gradcheck(total, (student["e1"].requires_grad_(), student["e2"].requires_grad_()))


@pytest.mark.parametrize("size", SIZES + ODD_SIZES)
def test_equal_networks_have_no_loss_and_no_gradient(size: tuple[int, ...]) -> None:
    student = with_gradient(features(size, (3, 4)))
    terms = a_loss()(student, student, blocks(size))
    sum(terms.values()).backward()
    assert values(terms) == pytest.approx([0, 0], abs=1e-6)
    for tap in ("e1", "e2"):
        assert student[tap].grad is not None
        assert student[tap].grad.abs().max() < 1e-6


def test_scaling_features_changes_nothing() -> None:
    size, teacher = (8, 12), features((8, 12), (5, 6))
    student, label = features(size, (3, 4)), blocks(size)
    scaled = {name: value * (torch.rand_like(value[:, :1]) + 0.1) for name, value in student.items()}
    torch.testing.assert_close(a_loss()(scaled, teacher, label), a_loss()(student, teacher, label))


def test_a_pooled_relation_ignores_a_global_factor_only() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    loss = BoundaryRelationLoss(["e1"], ["e1"], relation_cells=6)  # 4 x 6 cells are pooled to 2 x 3
    expected = loss(student, teacher, label)["relation"]
    torch.testing.assert_close(loss(student | {"e1": 7 * student["e1"]}, teacher, label)["relation"], expected)
    uneven = student["e1"] * torch.rand_like(student["e1"][:, :1])
    assert abs(loss(student | {"e1": uneven}, teacher, label)["relation"] - expected) > 1e-4


def test_the_relation_of_several_levels_is_their_mean() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    first, second, both = (
        BoundaryRelationLoss(["e1"], taps)(student, teacher, label)["relation"]
        for taps in (["e1"], ["e2"], ["e1", "e2"])
    )
    torch.testing.assert_close(both, (first + second) / 2)


def test_a_cell_counts_when_at_least_half_of_its_voxels_do() -> None:
    """Three cells of 2 x 2 voxels; of the last one 0, 2 and 3 voxels are ignored."""
    pred, label = torch.zeros(1, 2, 2, 6), torch.tensor([[0, 0, 1, 1, 1, 1]] * 2).view(1, 1, 2, 6)
    student, teacher = ({"e": torch.randn(1, c, 1, 3, dtype=torch.float64), "pred": pred} for c in (3, 5))
    found = []
    for column in (6, 5, 4):
        label[..., 0, 4:] = 1 if column == 6 else -1
        label[..., 1, 4:] = torch.tensor([1, 1]) if column > 4 else torch.tensor([-1, 1])
        found.append(BoundaryRelationLoss(["e"], ["e"])(student, teacher, label)["relation"].item())
    classes = torch.tensor([0, 1, 1]).view(1, 1, 1, 3)
    whole = dense_relation(student["e"], teacher["e"], classes).item()
    without = dense_relation(student["e"][..., :2], teacher["e"][..., :2], classes[..., :2]).item()
    assert found == pytest.approx([whole, whole, without])


def test_pooling_of_a_relation_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    loss = BoundaryRelationLoss(["e1"], ["e1", "e2"], relation_cells=6)
    for _ in range(2):
        loss(student, teacher, label)
    told = [record.message for record in caplog.records if "pooled" in record.message]
    assert told == ["Relation taps of 4x6 cells are average-pooled to 2x3: `relation_cells` is 6."]


def test_rotating_permuting_and_padding_the_channels_changes_nothing() -> None:
    student, teacher, label = features((6, 8, 10), (3, 4)), features((6, 8, 10), (5, 6)), blocks((6, 8, 10))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    rotated = torch.einsum("ij,bj...->bi...", rotation, student["e2"])
    changed = {"e1": student["e1"][:, [2, 0, 1]], "e2": torch.cat([rotated, torch.zeros_like(rotated)], 1)}
    torch.testing.assert_close(a_loss()(student | changed, teacher, label), a_loss()(student, teacher, label))


def test_moving_voxels_around_leaves_the_relation_and_changes_the_boundary() -> None:
    size = (6, 8)
    order = torch.randperm(48)
    maps = [torch.randn(1, c, *size, dtype=torch.float64) for c in (3, 5)]
    label, pred = blocks(size, batch=1), torch.zeros(1, 3, *size)
    moved = [m.flatten(2)[..., order].view_as(m) for m in (*maps, label)]
    loss = BoundaryRelationLoss(["e"], ["e"])
    before, after = (
        loss({"e": s, "pred": pred}, {"e": t, "pred": pred}, y) for s, t, y in ((*maps, label), moved)
    )
    torch.testing.assert_close(after["relation"], before["relation"])
    assert abs(after["boundary"] - before["boundary"]) > 1e-5


@pytest.mark.parametrize("axes", [(2,), (3, 4), (2, 3, 4)])
def test_flips_change_nothing(axes: tuple[int, ...]) -> None:
    student, teacher, label = features((8, 4, 12), (3, 4)), features((8, 4, 12), (5, 6)), blocks((8, 4, 12))
    flipped = [{name: value.flip(axes) for name, value in maps.items()} for maps in (student, teacher)]
    torch.testing.assert_close(a_loss()(*flipped, label.flip(axes)), a_loss()(student, teacher, label))


def test_axis_swaps_and_quarter_turns_change_nothing() -> None:
    student, teacher, label = features((8, 4, 12), (3, 4)), features((8, 4, 12), (5, 6)), blocks((8, 4, 12))
    expected = a_loss()(student, teacher, label)
    for change in (lambda x: x.transpose(2, 4), lambda x: x.rot90(1, (3, 4))):
        turned = [{name: change(value) for name, value in maps.items()} for maps in (student, teacher)]
        torch.testing.assert_close(a_loss()(*turned, change(label)), expected)


def test_a_volume_of_depth_one_equals_two_dimensions() -> None:
    student, teacher, label = features((11, 13), (3, 4)), features((11, 13), (5, 6)), blocks((11, 13))
    deep = [{name: value.unsqueeze(2) for name, value in maps.items()} for maps in (student, teacher)]
    torch.testing.assert_close(a_loss()(*deep, label.unsqueeze(2)), a_loss()(student, teacher, label))


def test_another_label_may_be_the_ignored_one() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    label[:, :, :5] = -1                                          # the third row of cells is ignored by half
    expected = a_loss()(student, teacher, label)
    torch.testing.assert_close(a_loss(ignore_label=7)(student, teacher, label.where(label != -1, 7)), expected)


def test_changes_at_ignored_voxels_do_not_count() -> None:
    size = (12, 12)
    maps, pred = torch.randn(2, 1, 3, *size, dtype=torch.float64), torch.zeros(1, 2, *size)
    label = torch.randint(0, 2, (1, 1, *size))
    label[..., 6:, :] = -1
    loss = BoundaryRelationLoss(["e"], ["e"])
    near, far = maps[0].clone(), maps[0].clone()
    near[..., 6:, :] = torch.randn(1, 3, 6, 12)                    # the first of these rows touches a valid one
    far[..., 7:, :] = torch.randn(1, 3, 5, 12)
    before, at_near, at_far = (
        loss({"e": s, "pred": pred}, {"e": maps[1], "pred": pred}, label) for s in (maps[0], near, far)
    )
    torch.testing.assert_close(at_far, before)
    torch.testing.assert_close(at_near["relation"], before["relation"])
    assert abs(at_near["boundary"] - before["boundary"]) > 1e-6


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("case", ["no foreground", "everything ignored", "constant", "zero", "large", "teacher zero"])
def test_degenerate_input_gives_finite_values_and_gradients(size: tuple[int, ...], case: str) -> None:
    student, teacher, label = features(size, (3, 4), batch=1), features(size, (5, 6), batch=1), blocks(size, 3, 1)
    if case == "no foreground":
        label = torch.zeros_like(label)
    elif case == "everything ignored":
        label = torch.full_like(label, -1)
    elif case == "teacher zero":
        teacher = {name: torch.zeros_like(value) for name, value in teacher.items()}
    else:
        factor = {"constant": 0, "zero": 0, "large": 1e4}[case]
        student = {name: value * factor + (case == "constant") for name, value in student.items()}
    student = with_gradient({name: value.float() for name, value in student.items()})
    terms = a_loss()(student, teacher, label)
    sum(terms.values()).backward()
    for value in (*terms.values(), student["e1"].grad, student["e2"].grad):
        assert value is not None
        assert value.isfinite().all()
        if case == "everything ignored":
            assert not value.any()
    if case == "no foreground":
        assert min(values(terms)) > 0


def test_relation_of_a_batch_is_the_mean_of_its_samples_and_boundary_pools_the_pairs() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    label[1] = 0                                                   # the other classes are absent in one sample
    whole = a_loss()(student, teacher, label)
    parts = [
        a_loss()(*({name: v[i : i + 1] for name, v in maps.items()} for maps in (student, teacher)), label[i : i + 1])
        for i in (0, 1)
    ]
    torch.testing.assert_close(whole["relation"], (parts[0]["relation"] + parts[1]["relation"]) / 2)
    pooled = oracle.affinity_distance(
        fused(student, (4, 6)), fused(teacher, (4, 6)), oracle.majority_label(label, (4, 6), 3)
    )
    torch.testing.assert_close(whole["boundary"], pooled)


def test_numbering_the_classes_otherwise_changes_nothing() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    renamed = torch.tensor([2, 0, 1])[label]
    torch.testing.assert_close(a_loss()(student, teacher, renamed), a_loss()(student, teacher, label))


def test_unlabeled_data_take_the_teachers_prediction_as_weights() -> None:
    student, teacher = features((8, 12), (3, 4)), features((8, 12), (5, 6))
    label = teacher["pred"].argmax(1, keepdim=True)
    torch.testing.assert_close(a_loss()(student, teacher), a_loss()(student, teacher, label))


def test_unlabeled_data_under_a_sigmoid_output_take_the_teachers_mask() -> None:
    student, teacher = features((8, 12), (3, 4), classes=1), features((8, 12), (5, 6), classes=1)
    label = (teacher["pred"] > 0).long()
    torch.testing.assert_close(a_loss()(student, teacher), a_loss()(student, teacher, label))


def test_labels_may_be_floating() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    torch.testing.assert_close(a_loss()(student, teacher, label.float()), a_loss()(student, teacher, label))


@pytest.mark.parametrize(("mine", "other"), [((8, 12), (4, 5)), ((4, 5), (8, 12)), ((4, 6, 5), (7, 3, 5))])
def test_other_strides_and_channels_work_in_both_directions(mine: tuple[int, ...], other: tuple[int, ...]) -> None:
    pred = torch.zeros(1, 3, *(2 * max(pair) for pair in zip(mine, other, strict=True)))
    student = {"a": torch.randn(1, 3, *mine, requires_grad=True), "pred": pred}
    teacher = {"b": torch.randn(1, 7, *other), "pred": pred}
    loss = BoundaryRelationLoss([["a", "b"]], [["a", "b"]])
    assert loss.tap_pairs == (("a", "b"),)
    terms = loss(student, teacher, blocks(tuple(pred.shape[2:]), batch=1))
    sum(terms.values()).backward()
    assert all(value.isfinite() and value > 0 for value in terms.values())
    assert student["a"].grad is not None
    assert student["a"].grad.isfinite().all()


def test_the_boundary_grid_is_that_of_the_student() -> None:
    student = {"a": torch.randn(1, 3, 4, 6, dtype=torch.float64), "pred": torch.zeros(1, 3, 8, 12)}
    teacher = {"b": torch.randn(1, 7, 8, 12, dtype=torch.float64), "pred": torch.zeros(1, 3, 8, 12)}
    label = blocks((8, 12), batch=1)
    value = BoundaryRelationLoss([["a", "b"]], [["a", "b"]], pair_lengths=(1, 3))(student, teacher, label)["boundary"]
    target = F.max_pool2d(oracle.contrast(teacher["b"]), 2)
    coarse = oracle.majority_label(label, (4, 6), 3)
    torch.testing.assert_close(value, oracle.affinity_distance(oracle.contrast(student["a"]), target, coarse, (1, 3)))


@pytest.mark.parametrize(
    ("grids", "cells", "expected"),
    [
        ([(4, 6), (2, 3)], 24, (4, 6)), ([(4, 6), (2, 3)], 23, (2, 3)),   # the finest that fits
        ([(4, 6), (2, 3)], 5, (1, 1)), ([(4, 6), (2, 3)], 1, (1, 1)),     # none fits: the coarsest, divided
        ([(1, 8, 8)], 4, (1, 2, 2)),                                      # an axis never vanishes
    ],
)
def test_the_boundary_grid_has_at_most_so_many_cells(
    grids: list[tuple[int, ...]], cells: int, expected: tuple[int, ...]
) -> None:
    assert boundary_grid([torch.zeros(1, 1, *grid) for grid in grids], cells) == expected


@pytest.mark.parametrize("boundary_cells", [24, 12, 5])
def test_the_boundary_grid_keeps_to_its_number_of_cells(boundary_cells: int) -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    loss = a_loss(boundary_cells=boundary_cells)
    value = loss(student, teacher, label)["boundary"]
    full = a_loss()(student, teacher, label)["boundary"]
    assert value.isfinite()
    assert bool(value == full) is (boundary_cells == 24)


def test_unbalanced_relation_equals_the_mean_over_all_pairs() -> None:
    student, teacher = features((8, 12), (3, 4)), features((8, 12), (5, 6))
    value = a_loss(relation_balance="none")(student, teacher, blocks((8, 12)))["relation"]
    torch.testing.assert_close(
        value, dense_relation(student["e2"], teacher["e2"], torch.zeros(2, 1, 2, 3, dtype=torch.long))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_equals_float32_of_the_rounded_values(dtype: torch.dtype) -> None:
    student, teacher = ({n: v.to(dtype) for n, v in features((6, 8, 10), c).items()} for c in ((3, 4), (5, 6)))
    label = blocks((6, 8, 10))
    wide = [{name: value.float() for name, value in maps.items()} for maps in (student, teacher)]
    expected = a_loss()(*wide, label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = a_loss()(student, teacher, label)
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in terms.values())
    torch.testing.assert_close(terms, expected)


def test_float32_keeps_five_digits_of_float64() -> None:
    student, teacher, label = features((6, 8, 10), (3, 4)), features((6, 8, 10), (5, 6)), blocks((6, 8, 10))
    single = [{name: value.float() for name, value in maps.items()} for maps in (student, teacher)]
    found, expected = a_loss()(*single, label), a_loss()(student, teacher, label)
    assert values(found) == pytest.approx(values(expected), rel=1e-5)


def test_a_teacher_of_other_precision_works() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    single = with_gradient({name: value.float() for name, value in student.items()})
    terms = a_loss()(single, teacher, label)
    sum(terms.values()).backward()
    assert values(terms) == pytest.approx(values(a_loss()(student, teacher, label)), rel=1e-5)


def test_gradient_reaches_every_tapped_module_and_neither_teacher_nor_logits() -> None:
    networks = [nn.Sequential(nn.Conv2d(1, c, 3, 2, 1), nn.Conv2d(c, 2 * c, 3, 2, 1)) for c in (2, 4)]
    heads = [nn.ConvTranspose2d(2 * c, 3, 4, 4) for c in (2, 4)]
    image, outputs = torch.randn(2, 1, 16, 16), []
    for network, head in zip(networks, heads, strict=True):
        taps = FeatureTaps(network, ["0", "1"])
        taps.open()
        pred = head(network(image))
        outputs.append(taps.close() | {"pred": pred})
    loss = BoundaryRelationLoss(["0", "1"], ["1"])
    sum(loss(*outputs, blocks((16, 16))).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in networks[0].parameters())
    for module in (networks[1], *heads):
        assert all(p.grad is None for p in module.parameters())


def test_a_term_of_weight_zero_is_not_computed() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    loss = a_loss()
    expected = loss(student, teacher, label)
    for count in range(3):
        for active in itertools.combinations(loss.terms, count):
            loss.activate(active)
            assert loss(student, teacher, label) == {term: expected[term] for term in active}


def test_the_loss_has_nothing_to_train_or_to_save() -> None:
    loss = a_loss()
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert loss.preset_weights == {"boundary": 5.0, "relation": 0.5}
    assert copy.deepcopy(loss).tap_pairs == (("e1", "e1"), ("e2", "e2"))
    assert (loss.relation_cells, a_kind("paper").relation_cells) == (13_824, 4_096)


def test_inputs_stay_as_they_are() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    before = copy.deepcopy((student, teacher, label))
    a_loss()(with_gradient(student), teacher, label)
    torch.testing.assert_close((student, teacher, label), before, rtol=0, atol=0)


def test_a_missing_prediction_and_a_missing_tap_are_named() -> None:
    student, teacher = features((8, 12), (3, 4)), features((8, 12), (5, 6))
    without = {name: value for name, value in student.items() if name != "pred"}
    with pytest.raises(ValueError, match=r"`student` must hold \['pred', 'e1', 'e2'\], got \['e1', 'e2'\]"):
        a_loss()(without, teacher)
    without = {name: value for name, value in teacher.items() if name != "e1"}
    with pytest.raises(ValueError, match=r"`teacher` must hold \['pred', 'e1', 'e2'\], got \['e2', 'pred'\]"):
        a_loss()(student, without)


@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 3, 8, 12), (1, 1, 8, 12)])
def test_a_label_of_another_layout_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`label` must have shape \(B, 1, \*S\) with B = 2 and 2 spatial axes, got"):
        a_loss()(features((8, 12), (3, 4)), features((8, 12), (5, 6)), torch.zeros(shape))


def test_a_tap_that_is_no_map_is_refused() -> None:
    student, teacher = features((8, 12), (3, 4)), features((8, 12), (5, 6))
    with pytest.raises(ValueError, match=r"`.*` must be a floating map of shape \(B, C, \*S\)"):
        a_loss()(student | {"e2": torch.zeros(2, 4)}, teacher)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`preset` must be one of \['default', 'paper'\], got 'free'"):
        a_loss(preset="free")
    with pytest.raises(ValueError, match=r"`boundary_map` must be one of \('contrast', 'head', 'prob'\), got 'edge'"):
        a_loss(boundary_map="edge")
    with pytest.raises(ValueError, match=r"`heads` must be \[student's, teacher's\] for .*'head'.*None for"):
        a_loss(preset="paper")
    with pytest.raises(ValueError, match=r"`heads` must be .* got heads for 'contrast'"):
        a_loss(heads=heads((3, 4), (5, 6)))
    with pytest.raises(ValueError, match=r"`relation_balance` must be one of \('class', 'none'\), got 'organ'"):
        a_loss(relation_balance="organ")
    with pytest.raises(ValueError, match="`boundary_cells` and `relation_cells` must be positive, got 0"):
        a_loss(boundary_cells=0)
    with pytest.raises(ValueError, match="`boundary_taps` must list at least one layer path"):
        BoundaryRelationLoss([], ["e2"])
    with pytest.raises(ValueError, match="`relation_taps` must list at least one layer path"):
        BoundaryRelationLoss(["e1"], [])


# ---- preset `paper` and the boundary of the prediction -------------------------------------------------------------

KINDS = ["default", "prob", "paper"]


class _Loaded(TeacherHead):
    """A teacher's head without a file."""

    def __init__(self, head: BoundaryHead) -> None:
        super().__init__(head.channels, "none", 2)
        self.head = head

    def load(self, device: torch.device | str = "cpu") -> BoundaryHead:
        return copy.deepcopy(self.head).to(device).requires_grad_(False)


def heads(mine: tuple[int, ...], other: tuple[int, ...], rank: int = 2) -> tuple[BoundaryHead, TeacherHead]:
    return BoundaryHead(mine, rank).double(), _Loaded(BoundaryHead(other, rank, seed=1).double())


def a_kind(kind: str, channels: tuple[tuple[int, int], tuple[int, int]] = ((3, 4), (5, 6)), rank: int = 2,
           **options: object) -> BoundaryRelationLoss:
    if kind == "paper":
        return a_loss(preset="paper", heads=heads(*channels, rank), **options)
    return a_loss(boundary_map="prob" if kind == "prob" else "contrast", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 12), (6, 8, 10)])
def test_every_kind_gives_finite_terms_and_a_gradient_wherever_it_reads(kind: str, size: tuple[int, ...]) -> None:
    student, teacher = with_gradient(features(size, (3, 4))), features(size, (5, 6))
    terms = a_kind(kind, rank=len(size))(student, teacher, blocks(size))
    assert min(values(terms)) > 0
    for term, taps in (("boundary", ["pred"] if kind == "prob" else ["e1", "e2"]), ("relation", ["e2"])):
        for tap in student:
            (gradient,) = torch.autograd.grad(terms[term], student[tap], retain_graph=True, allow_unused=True)
            assert (gradient is not None) is (tap in taps)
            assert gradient is None or (gradient.isfinite().all() and gradient.any())


def test_the_paper_preset_equals_the_plain_formulas() -> None:
    size = (8, 12)
    student, teacher, label = with_gradient(features(size, (3, 4))), features(size, (5, 6)), blocks(size)
    loss = a_kind("paper")
    terms = loss(student, teacher, label)
    fine, coarse = (oracle.majority_label(label, tuple(s // stride for s in size), 3) for stride in (2, 4))
    maps = [
        head([m["e1"], m["e2"]], (4, 6)) for head, m in ((loss.head, student), (loss.teacher_head.load(), teacher))
    ]
    nodes = [(m["e2"] / m["e2"].norm(dim=1, keepdim=True)).flatten(2).transpose(1, 2) for m in (student, teacher)]
    assert coarse.shape[2:] == (2, 3)
    torch.testing.assert_close(
        terms, {
            "boundary": oracle.affinity_distance(*maps, fine, divergence="binary_kl"),
            "relation": oracle.softmax_relation_rows(*nodes, 0.1).mean(),
        },
    )


def test_the_map_of_the_prediction_is_hellinger_contrast() -> None:
    size = (4, 6)
    student, teacher, label = features(size, (3, 4)), features(size, (5, 6)), blocks(size)
    maps = [oracle.contrast(m["pred"].softmax(1).sqrt()) for m in (student, teacher)]
    value = a_kind("prob")(student, teacher, label)["boundary"]
    torch.testing.assert_close(value, oracle.affinity_distance(*maps, label))
    assert a_kind("prob").tap_pairs == (("e2", "e2"),)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_networks_and_heads_have_no_loss(kind: str) -> None:
    maps = with_gradient(features((8, 12), (3, 4)))
    loss = a_kind(kind, ((3, 4), (3, 4)))
    if kind == "paper":
        loss.head.load_state_dict(loss.teacher_head.load().state_dict())
    terms = loss(maps, maps, blocks((8, 12)))
    assert values(terms) == pytest.approx([0, 0], abs=1e-6)
    for gradient in torch.autograd.grad(sum(terms.values()), list(maps.values()), allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["no foreground", "everything ignored", "constant", "zero", "large", "teacher zero"])
def test_every_kind_stays_finite_on_degenerate_input(kind: str, case: str) -> None:
    size = (11, 13)
    student, teacher, label = features(size, (3, 4), batch=1), features(size, (5, 6), batch=1), blocks(size, 3, 1)
    if case == "teacher zero":
        teacher = {name: torch.zeros_like(value) for name, value in teacher.items()}
    elif case in ("constant", "zero", "large"):
        factor = {"constant": 0, "zero": 0, "large": 1e4}[case]
        student = {name: value * factor + (case == "constant") for name, value in student.items()}
    else:
        label = torch.full_like(label, 0 if case == "no foreground" else -1)
    student = with_gradient(student)
    terms = a_kind(kind)(student, teacher, label)
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(value.grad is None or value.grad.isfinite().all() for value in student.values())
    if case == "everything ignored":
        assert values(terms) == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_of_depth_one_equals_two_dimensions_in_every_kind(kind: str) -> None:
    student, teacher, label = features((11, 13), (3, 4)), features((11, 13), (5, 6)), blocks((11, 13))
    deep = [{name: value.unsqueeze(2) for name, value in maps.items()} for maps in (student, teacher)]
    flat, solid = a_kind(kind), a_kind(kind, rank=3)
    torch.testing.assert_close(solid(*deep, label.unsqueeze(2)), flat(student, teacher, label))


def test_only_the_students_head_learns_and_is_saved() -> None:
    loss = a_kind("paper")
    loss.activate(loss.terms)
    size = (8, 12)
    sum(loss(features(size, (3, 4)), features(size, (5, 6)), blocks(size)).values()).backward()
    assert all(name.startswith("head.") for name in loss.state_dict())
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert sum(p.numel() for p in loss.parameters()) == 32 * 7 + 64 * 2 + 32 * 2 + 1
    assert loss.preset_weights == {"boundary": 1.0, "relation": 1.0}


def test_the_teachers_head_is_read_once_and_anew_for_the_next_run() -> None:
    student, teacher, label = features((8, 12), (3, 4)), features((8, 12), (5, 6)), blocks((8, 12))
    loss = a_kind("paper")
    loss.activate(loss.terms)
    before = values(loss(student, teacher, label))
    loss.teacher_head.head = BoundaryHead((5, 6), 2, seed=2).double()
    assert values(loss(student, teacher, label)) == before
    loss.activate(loss.terms)
    assert values(loss(student, teacher, label))[0] != before[0]


def test_a_missing_head_file_is_an_error_only_when_the_boundary_has_a_weight(tmp_path: Path) -> None:
    pair = (BoundaryHead((3, 4), 2), TeacherHead((5, 6), tmp_path / "no.pt", 2))
    loss = a_loss(preset="paper", heads=pair)
    loss.activate(["relation"])
    with pytest.raises(FileNotFoundError, match="`teacher_head` must be the weights .*no.pt.* teacher_head.json"):
        loss.activate(["boundary"])


def test_a_teachers_map_is_judged_once_by_the_first_batches_that_have_a_border(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    label = torch.zeros(1, 1, 16, 16, dtype=torch.long)
    label[..., 8:] = 1
    logits = torch.where(label == 1, 9.0, -9.0).double()
    maps = {"e2": torch.rand(1, 4, 16, 16).double(), "pred": torch.cat([-logits, logits], 1)}
    partly = label.clone()
    partly[:, :, :4] = 7                                           # its border is none of the map's
    loss = BoundaryRelationLoss([], ["e2"], boundary_map="prob", ignore_label=7)
    loss.activate(["boundary"])
    for batch in [torch.zeros_like(label)] * 9 + [partly] * 7:
        loss(maps, maps, batch)
    assert not caplog.records
    for _ in range(3):
        loss(maps, maps, partly)
    assert [(record.levelname, record.message[-6:]) for record in caplog.records] == [("INFO", "1.000.")]

    constant = maps | {"pred": torch.zeros(1, 2, 16, 16).double()}   # an area of 0.5, which is not below 0.5
    loss = BoundaryRelationLoss([], ["e2"], boundary_map="prob", min_boundary_auc=0.5)
    loss.activate(["boundary"])
    for _ in range(8):
        loss(maps, constant, label)
    assert [(record.levelname, record.message[-6:]) for record in caplog.records[1:]] == [("WARNING", "0.500.")]


def test_a_teacher_whose_boundaries_are_inverted_is_refused_once_it_is_certain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = (16, 16)
    label = torch.zeros(1, 1, *size, dtype=torch.long)
    label[..., 8:] = 1
    pred = torch.where(label == 1, 9.0, -9.0).double()
    flat = torch.randn(1, 2, *size).double() * 30                  # noise in the flat parts, silence at the border
    flat[..., 6:10] = 0.0
    student = {"e2": torch.rand(1, 4, *size).double()} | {"pred": torch.rand(1, 2, *size).double()}
    good = {"e2": student["e2"], "pred": torch.cat([-pred, pred], 1)}
    bad = good | {"pred": flat}
    loss = BoundaryRelationLoss([], ["e2"], boundary_map="prob")
    with caplog.at_level("INFO"):
        for _ in range(8):
            loss(student, good, label)
    assert "AUC of 1.000" in caplog.text
    loss = BoundaryRelationLoss([], ["e2"], boundary_map="prob")
    for _ in range(7):
        loss(student, bad, label)
    with pytest.raises(ValueError, match="AUC of at least 0.6, got 0.* over 8 batches"):
        loss(student, bad, label)
    loss = BoundaryRelationLoss([], ["e2"], boundary_map="prob", min_boundary_auc=0.0)
    for _ in range(8):
        loss(student, bad, label)
