# SPDX-License-Identifier: Apache-2.0
"""Graph relation distillation, as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.losses.graph_relation import GraphRelationLoss
from medkd.losses.relation_bank import RelationBank
from oracles import graph_relation as oracle

FLAT = [(-1, 0), (0, -1), (-3, 0), (0, -3)]
DEEP = [(-1, 0, 0), (0, -1, 0), (0, 0, -1)]
CASES = [((15, 11), FLAT), ((5, 9, 8), DEEP)]
TERMS = ["node", "edge", "affinity", "inter_edge", "inter_affinity"]
Offsets = list[tuple[int, ...]]


def maps(size: tuple[int, ...], batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64)


def labels(size: tuple[int, ...], batch: int = 2, most: int = 5) -> Tensor:
    return torch.randint(0, most, (batch, 1, *size))


def a_loss(offsets: Offsets, channels: int = 4, **options: Any) -> GraphRelationLoss:
    bank = RelationBank(channels=channels, capacity=6, sample=3)
    return GraphRelationLoss(offsets, **{"bank": bank, **options}).double()   # type: ignore[arg-type]


def run(loss: GraphRelationLoss, student: Tensor, teacher: Tensor, label: Tensor | None) -> dict[str, Tensor]:
    return loss({"pred": student}, {"pred": teacher}, label)


def nodes_of(maps: Tensor, label: Tensor, sample: int) -> Tensor:
    found = oracle.instance_means(maps, label)
    return torch.stack([node for (b, number), node in found.items() if b == sample and number > 0])


def cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first[:, None], second[None], dim=2)


def directions(maps: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Unit embeddings, pooled, (B, N, C)."""
    pool = F.avg_pool2d if len(cells) == 2 else F.avg_pool3d
    return pool(F.normalize(maps, dim=1), cells, cells, ceil_mode=True).flatten(2).transpose(1, 2)


def test_known_answers_of_the_specification() -> None:
    student = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    teacher = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
    label = torch.tensor([[[[1, 1, 2, 2]]]])
    for node_loss, expected in (("l2", 0.353553), ("mse", 0.25)):
        loss = GraphRelationLoss(
            [(0, -1)], node_loss=node_loss, pooling=(1, 1), bank=RelationBank(2, capacity=1, sample=1)   # type: ignore[arg-type]
        )
        first = run(loss, student, teacher, label)
        assert first["inter_edge"] == first["inter_affinity"] == 0        # nothing is remembered yet
        second = {term: value.item() for term, value in run(loss, student, teacher, label).items()}
        assert second == pytest.approx(
            {"node": expected, "edge": 0.25, "affinity": 0.5, "inter_edge": 0.146447, "inter_affinity": 0.25}, abs=1e-6
        )


@pytest.mark.parametrize(("size", "offsets"), CASES)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_every_term_and_gradient_equal_the_formulas(size: tuple[int, ...], offsets: Offsets, preset: str) -> None:
    past = [(maps(size), labels(size)) for _ in range(2)]
    student, teacher, label = maps(size).requires_grad_(), maps(size), labels(size)
    loss = a_loss(offsets, preset=preset, bank=RelationBank(4, capacity=4, sample=4))
    for images, numbers in past:
        run(loss, images, images, numbers)
    terms = run(loss, student, teacher, label)
    cells = {"default": (7, 7) if len(size) == 2 else (3, 7, 7), "paper": (1,) * len(size)}[preset]

    expected = {term: torch.zeros((), dtype=torch.float64) for term in TERMS}
    for sample in range(2):
        mine, other = nodes_of(student, label, sample), nodes_of(teacher, label, sample)
        length = (mine - other).norm(dim=1)
        expected["node"] = expected["node"] + (length if preset == "default" else length**2).mean() / 2
        edges = cosines(mine, mine) - cosines(other, other)
        expected["edge"] = expected["edge"] + edges.square().mean() / 2
        for images, numbers in past:
            for item in range(2):
                others = nodes_of(images, numbers, item)
                difference = cosines(mine, others) - cosines(other, others)
                expected["inter_edge"] = expected["inter_edge"] + difference.square().mean() / 8
        for images, _ in past:
            for item in range(2):
                far = directions(images, cells)[item]
                own = [directions(one, cells)[sample : sample + 1] for one in (student, teacher)]
                distance = oracle.relation_distance(*own, far)
                expected["inter_affinity"] = expected["inter_affinity"] + distance.sum() / 8
    difference = oracle.offset_affinity(student, offsets) - oracle.offset_affinity(teacher, offsets)
    expected["affinity"] = difference.square().sum() / (2 * student[0, 0].numel())

    for term in TERMS:
        assert terms[term].item() == pytest.approx(expected[term].item(), rel=1e-6), term
        grad = torch.autograd.grad(terms[term], student, retain_graph=True)[0]
        right = torch.autograd.grad(expected[term], student, retain_graph=True)[0]
        assert (grad - right).norm() <= 1e-5 * right.norm(), term


@pytest.mark.parametrize(("size", "offsets"), CASES)
def test_a_student_that_equals_its_teacher_has_neither_loss_nor_gradient(
    size: tuple[int, ...], offsets: Offsets
) -> None:
    teacher = maps(size)
    loss = a_loss(offsets)
    run(loss, maps(size), maps(size), labels(size))
    student = teacher.clone().requires_grad_()
    terms = run(loss, student, teacher, labels(size))
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.item() == pytest.approx(0, abs=1e-12) for value in terms.values())
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-9


@pytest.mark.parametrize("first", [2**40, 513])
def test_numbers_of_instances_do_not_matter_and_may_be_large(first: int) -> None:
    student, teacher, label = maps((9, 9)), maps((9, 9)), labels((9, 9))
    others = torch.where(label > 0, first - label, 0)
    results = []
    for numbers in (label, others):
        loss = a_loss(FLAT)
        run(loss, student, teacher, numbers)
        results.append(run(loss, student, teacher, numbers))
    for term in TERMS:
        assert results[0][term].item() == pytest.approx(results[1][term].item(), rel=1e-9)


def test_gradient_reaches_the_student_and_never_the_teacher() -> None:
    loss = a_loss(FLAT)
    student, teacher = maps((9, 9)).requires_grad_(), maps((9, 9)).requires_grad_()
    run(loss, student, teacher, labels((9, 9)))
    for term, value in run(loss, student, teacher, labels((9, 9))).items():
        grad = torch.autograd.grad(value, student, retain_graph=True)[0]
        assert grad.abs().max() > 0, term
        with pytest.raises(RuntimeError, match="not have been used|not require grad"):
            torch.autograd.grad(value, teacher, retain_graph=True)
    assert not any(buffer.requires_grad for buffer in loss.bank.buffers())


@pytest.mark.parametrize("content", [0, 3])
def test_background_only_or_one_instance_is_defined(content: int) -> None:
    loss = a_loss(FLAT)
    for _ in range(2):
        student = maps((9, 9)).requires_grad_()
        terms = run(loss, student, maps((9, 9)), torch.full((2, 1, 9, 9), content))
        torch.stack(list(terms.values())).sum().backward()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
        if content == 0:
            assert terms["node"] == terms["edge"] == terms["inter_edge"] == 0
    assert bool(loss.bank.has_instances.any()) == (content > 0)


def test_a_sample_without_instances_counts_as_zero_and_is_not_remembered() -> None:
    label = labels((9, 9))
    label[1] = 0
    student, teacher = maps((9, 9)), maps((9, 9))
    both = run(a_loss(FLAT), student, teacher, label)
    alone = run(a_loss(FLAT), student[:1], teacher[:1], label[:1])
    assert both["node"].item() == pytest.approx(alone["node"].item() / 2)
    assert both["edge"].item() == pytest.approx(alone["edge"].item() / 2)


def test_without_labels_the_terms_of_voxels_are_left() -> None:
    loss = a_loss(FLAT)
    run(loss, maps((9, 9)), maps((9, 9)), labels((9, 9)))
    terms = run(loss, maps((9, 9)), maps((9, 9)), None)
    assert terms["node"] == terms["edge"] == terms["inter_edge"] == 0
    assert min(terms["affinity"], terms["inter_affinity"]) > 0


def test_an_image_is_compared_with_older_ones_only() -> None:
    loss = a_loss(FLAT, bank=RelationBank(4, capacity=8, sample=8))
    student, teacher, label = maps((9, 9)), maps((9, 9)), labels((9, 9))
    assert run(loss, student, teacher, label)["inter_affinity"] == 0
    before = loss.bank.voxel_moments[:2].clone()
    assert run(loss, student, teacher, label)["inter_affinity"] > 0
    assert len(loss.bank) == 4
    assert torch.equal(before, loss.bank.voxel_moments[:2])


def test_evaluation_remembers_nothing() -> None:
    loss = a_loss(FLAT).eval()
    run(loss, maps((9, 9)), maps((9, 9)), labels((9, 9)))
    assert len(loss.bank) == 0


def test_the_memory_is_in_the_state_dict_and_goes_on_exactly() -> None:
    first = a_loss(FLAT)
    steps = [(maps((9, 9)), maps((9, 9)), labels((9, 9))) for _ in range(6)]
    for step in steps[:3]:
        run(first, *step)
    second = a_loss(FLAT)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in steps[3:]:
        results = [run(loss, *step) for loss in (first, second)]
        assert all(torch.equal(results[0][term], results[1][term]) for term in TERMS)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_alone_has_the_value_that_it_has_among_all(term: str) -> None:
    among, alone = a_loss(FLAT), a_loss(FLAT)
    alone.activate([term])
    for _ in range(2):
        step = maps((9, 9)), maps((9, 9)), labels((9, 9))
        expected, found = run(among, *step), run(alone, *step)
    assert found == {term: expected[term]}
    assert expected[term] > 0


def test_widened_borders_are_background() -> None:
    label, widened = (torch.tensor([[[row] * 2]]) for row in ([1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 2, 2]))
    images = maps((2, 6), batch=1), maps((2, 6), batch=1)
    losses = a_loss(FLAT, widen=True), a_loss(FLAT)
    for _ in range(2):
        found, expected = (run(loss, *images, one) for loss, one in zip(losses, (label, widened), strict=True))
    assert found == expected
    assert found != run(a_loss(FLAT), *images, label)


def test_terms_that_are_off_are_not_computed() -> None:
    loss = a_loss(FLAT)
    loss.activate(["affinity"])
    for _ in range(2):
        assert list(run(loss, maps((9, 9)), maps((9, 9)), labels((9, 9)))) == ["affinity"]
    assert len(loss.bank) == 0


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    loss = a_loss(FLAT, levels=[{"tap": "e", "channels": [2, 3], "stride": [1, 1]}])
    state = {"pred": maps((9, 9)), "e": maps((9, 9), channels=2)}, {"pred": maps((9, 9)), "e": maps((9, 9), channels=3)}
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    state = {"pred": maps((9, 9)), "e": maps((9, 9), channels=2)}, {"pred": maps((9, 9)), "e": maps((9, 9), channels=3)}
    drawn = torch.get_rng_state()
    loss(*state, labels((9, 9)))
    assert torch.equal(after, drawn)


def test_cosines_with_the_axis_of_the_background_are_compared_if_asked_for() -> None:
    student, teacher, label = maps((9, 9)).requires_grad_(), maps((9, 9)), labels((9, 9))
    plain = run(a_loss(FLAT), student, teacher, label)["affinity"]
    both = run(a_loss(FLAT, background_weight=3.0), student, teacher, label)["affinity"]
    axis = (F.normalize(student, dim=1)[:, 0] - F.normalize(teacher, dim=1)[:, 0]).square().mean()
    assert both.item() == pytest.approx((plain + 3 * axis).item())


@pytest.mark.parametrize(
    ("balance", "axes", "row", "weights"),
    [
        ("none", 2, [1, 1, 1, 2], [1 / 4, 1 / 4, 1 / 4]),
        ("sample", 2, [1, 1, 1, 2], [1 / 4, 1 / 4, 3 / 4]),          # of four pairs one is 0: that outside counts as 1
        ("sample", 2, [0, 0, 0, 1], [1 / 4, 1 / 4, 3 / 4]),          # background is one object
        ("none", 3, [1, 1, 1, 2], [1 / 4, 1 / 4, 1 / 4]),
        ("channel", 3, [1, 1, 1, 2], [1 / 3, 1 / 3, 2 / 3]),         # of three pairs inside one is 0
        ("channel", 3, [0, 0, 0, 1], [1 / 3, 1 / 3, 1 / 3]),         # all are 0: background is none
    ],
)
def test_the_rarer_target_counts_as_much_as_the_other_one_if_asked_for(
    balance: str, axes: int, row: list[int], weights: list[float]
) -> None:
    size = (1,) * (axes - 1) + (4,)
    offsets = [(0,) * (axes - 1) + (-1,)]
    student, teacher = maps(size, batch=1), maps(size, batch=1)
    loss = a_loss(offsets, balance=balance)
    found = run(loss, student, teacher, torch.tensor(row).reshape(1, 1, *size))["affinity"]
    squares = (oracle.offset_affinity(student, offsets) - oracle.offset_affinity(teacher, offsets)).square().flatten()
    assert found.item() == pytest.approx((squares[1:] * torch.tensor(weights)).sum().item(), rel=1e-6)


def level(stride: list[int], channels: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    return {"tap": ["s", "t"], "channels": list(channels), "stride": stride}


def test_a_level_adds_the_same_terms_with_a_learned_projection_for_the_nodes() -> None:
    student, teacher, label = maps((12, 9)), maps((12, 9)), labels((12, 9))
    features = maps((4, 9), channels=2).requires_grad_(), maps((4, 9), channels=3)
    loss = a_loss(FLAT, levels=[level([3, 1])])
    terms = loss({"pred": student, "s": features[0]}, {"pred": teacher, "t": features[1]}, label)
    base = run(a_loss(FLAT), student, teacher, label)
    centers = label[:, :, 1::3]                                      # the middle one of three rows
    plain = a_loss(FLAT, channels=2)
    plain.activate(["edge", "affinity"])
    with pytest.raises(ValueError, match="must be embeddings of one shape"):
        run(plain, *features, centers)                               # the channels differ, so by hand:
    difference = oracle.offset_affinity(features[0], FLAT) - oracle.offset_affinity(features[1], FLAT)
    expected = base["affinity"] + difference.square().sum() / (2 * 4 * 9)
    assert terms["affinity"].item() == pytest.approx(expected.item())
    edge, node = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    projected = loss.projections[0](features[0])
    for sample in range(2):
        mine, other = (nodes_of(one, centers, sample) for one in features)
        edge = edge + (cosines(mine, mine) - cosines(other, other)).square().mean() / 2
        node = node + (nodes_of(projected, centers, sample) - other).norm(dim=1).mean() / 2
    assert terms["edge"].item() == pytest.approx((base["edge"] + edge).item())
    assert terms["node"].item() == pytest.approx((base["node"] + node).item())
    terms["node"].backward()
    assert loss.projections[0].weight.grad.abs().max() > 0   # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("stride", "cells", "voxels"),
    [
        (3, slice(1, 3), [1, 4]),                                    # 12 x 12 voxels around 6 x 6
        (2, slice(0, 3), [0, 2, 4]),                                 # 8 x 8: from the center of the first cell on
    ],
)
def test_a_level_that_reaches_beyond_the_label_is_cropped_to_it(
    stride: int, cells: slice, voxels: list[int]
) -> None:
    size, label = (6, 6), labels((6, 6))
    wide = maps((4, 4), channels=2), maps((4, 4), channels=3)
    loss = a_loss(FLAT, levels=[level([stride, stride])])
    loss.activate(["affinity", "edge"])
    embedding = maps(size)
    terms = loss({"pred": embedding, "s": wide[0]}, {"pred": embedding, "t": wide[1]}, label)
    inner = [one[:, :, cells, cells] for one in wide]
    difference = oracle.offset_affinity(inner[0], FLAT[:2]) - oracle.offset_affinity(inner[1], FLAT[:2])
    assert terms["affinity"].item() == pytest.approx(difference.square().sum().item() / (2 * len(voxels) ** 2))
    expected = 0.0
    for sample in range(2):
        mine, other = (nodes_of(one, label[:, :, voxels][..., voxels], sample) for one in inner)
        expected += (cosines(mine, mine) - cosines(other, other)).square().mean().item() / 2
    assert terms["edge"].item() == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"background_weight": 3.0}, {"balance": "sample"}])
def test_background_and_balance_count_at_the_embedding_and_at_no_level(options: dict[str, Any]) -> None:
    student, teacher = {"pred": maps((9, 9)), "s": maps((9, 9), channels=2)}, {"pred": maps((9, 9))}
    teacher["t"], label = maps((9, 9), channels=3), labels((9, 9))

    def affinity(**chosen: Any) -> float:
        loss = a_loss(FLAT, **chosen)
        loss.activate(["affinity"])
        return loss(student, teacher, label)["affinity"].item()

    levels = {"levels": [level([1, 1])]}
    assert affinity(**options) != affinity()
    assert affinity(**levels, **options) - affinity(**options) == pytest.approx(affinity(**levels) - affinity())


def test_the_seed_decides_the_first_values_of_the_projections() -> None:
    first, same, other = (a_loss(FLAT, levels=[level([1, 1])], seed=seed).projections[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, same)   # type: ignore[arg-type]
    assert not torch.equal(first, other)   # type: ignore[arg-type]


def test_the_memory_is_of_16_channels_unless_told_otherwise() -> None:
    assert GraphRelationLoss(FLAT).bank.voxel_moments.shape[1:] == (16, 16)


def test_weights_of_the_presets() -> None:
    assert a_loss(FLAT).preset_weights == dict(zip(TERMS, (0.1, 0.1, 10, 1, 4), strict=True))
    assert a_loss(DEEP).preset_weights == dict(zip(TERMS, (0.1, 0.1, 10, 1, 24), strict=True))
    assert a_loss(DEEP, preset="paper").preset_weights == dict(zip(TERMS, (0.1, 0.1, 10, 1, 1), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "code"}, "`preset` must be one of"),
        ({"node_loss": "l1"}, "`node_loss` must be one of"),
        ({"balance": "class"}, "`balance` must be one of"),
        ({"offsets": []}, "`offsets` must be vectors of 2 or 3"),
        ({"levels": [{"tap": "e"}]}, "`levels` must have the keys 'tap', 'channels' and 'stride'"),
        ({"levels": [{"tap": "e", "channels": [2], "stride": [1, 1]}]}, "`levels` must give two `channels`"),
        ({"levels": [{"tap": "e", "channels": [2, 2], "stride": [1]}]}, "a `stride` of 2 numbers"),
        ({"levels": [{"tap": "e", "channels": [2, 2], "stride": [0, 1]}]}, "a `stride` of 2 numbers"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraphRelationLoss(**{"offsets": FLAT, **options})   # type: ignore[arg-type]


def test_embeddings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4, 9, 9\) and \(2, 5, 9, 9\)"):
        run(a_loss(FLAT), maps((9, 9)), maps((9, 9), channels=5), labels((9, 9)))
    loss = a_loss(FLAT, levels=[level([1, 1])])
    for wrong in (maps((9, 9)), maps((9, 8), channels=2)):
        features = {"pred": maps((9, 9)), "s": wrong}, {"pred": maps((9, 9)), "t": maps((9, 9), channels=3)}
        with pytest.raises(ValueError, match=r"layers of one size with \[2, 3\] channels"):
            loss(*features, labels((9, 9)))
