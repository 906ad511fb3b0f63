# SPDX-License-Identifier: Apache-2.0
"""Layer feedback distillation, as a whole: against the released formulas, and what must not change it."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.class_heads import ClassHeads, FixedHeads, TeacherHeads, drawn_projection
from medkd.losses.layer_feedback import LayerFeedbackLoss
from medkd.ops.ignored import IGNORED
from medkd.taps import FeatureTaps
from oracles import layer_feedback as oracle

Maps = dict[str, Tensor]
HLFD = ("ufd", "ifd", "upd", "ipd")
TERMS = (*HLFD, "final_feature", "final_pixel")
ENCODER, DECODER = ["e1", "e2", "e3", "e4", "e5"], ["d5", "d4", "d3", "d2"]
STUDENT, TEACHER = (2, 3, 4, 5, 6), (3, 4, 6, 8, 10)
SIZES = [(16, 32), (16, 16, 32)]
ODD_SIZES = [(17, 19), (9, 17, 11)]
PLAIN = {"ufd": ["e1"], "ifd": ["e2", "e3", "e4"], "upd": ["d5"], "ipd": ["d4", "d3", "d2"], "final_feature": ["e5"],
         "final_pixel": ["pred"]}     # what each term reads of the student


def features(size: tuple[int, ...], channels: tuple[int, ...], batch: int = 2, classes: int = 2) -> Maps:
    """The layers of a U-Net of five levels, in float64, and a prediction."""
    grids = [tuple(-(-length // 2**level) for length in size) for level in range(5)]
    shapes = {f"e{n}": (channels[n - 1], grids[n - 1]) for n in (1, 2, 3, 4, 5)}
    shapes |= {f"d{n}": (channels[n - 2], grids[n - 2]) for n in (5, 4, 3, 2)} | {"pred": (classes, size)}
    return {name: torch.randn(batch, c, *grid, dtype=torch.float64) for name, (c, grid) in shapes.items()}


def with_gradient(maps: Maps) -> Maps:
    return {name: value.detach().clone().requires_grad_() for name, value in maps.items()}


class _Loaded(TeacherHeads):
    """The teacher's heads without a file."""

    def __init__(self, heads: ClassHeads) -> None:
        super().__init__(heads.channels, heads.classes, "none", heads.spatial_dims)
        self.heads = heads

    def load(self, device: torch.device | str = "cpu") -> ClassHeads:
        return copy.deepcopy(self.heads).to(device).requires_grad_(False)


def layers(channels: tuple[int, ...]) -> list[int]:
    """Channels of d5 ... d2."""
    return list(channels[3::-1])


def heads(kind: str, rank: int, classes: int = 2) -> Any:
    options = {"classes": classes, "spatial_dims": rank}
    if kind == "fixed":
        return FixedHeads(layers(STUDENT), **options), FixedHeads(layers(TEACHER)[:3], seed=1, **options)
    fitted = ClassHeads(layers(TEACHER)[:3], size=1.0, seed=1, **options)
    return ClassHeads(layers(STUDENT), size=1.0, **options).double(), _Loaded(fitted.double())


def a_loss(kind: str = "learned", rank: int = 2, classes: int = 2, **options: Any) -> LayerFeedbackLoss:
    if kind == "reference":
        return LayerFeedbackLoss(ENCODER, DECODER, preset="paper", **options)
    return LayerFeedbackLoss(ENCODER, DECODER, projection=kind, heads=heads(kind, rank, classes), **options)


def draws(loss: LayerFeedbackLoss, step: int, shapes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """The projections (K, C) and biases that a step draws, read off with unit vectors."""
    generator, found = torch.Generator().manual_seed(loss.seed + step), []
    for inputs, outputs in shapes:
        basis = torch.cat([torch.eye(inputs), torch.zeros(1, inputs)]).double().view(inputs + 1, inputs, 1, 1)
        columns = drawn_projection(basis, outputs, generator)[..., 0, 0]                      # (C + 1, K)
        found.append(((columns[:-1] - columns[-1]).T, columns[-1]))
    return found


# ---- the released formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES + ODD_SIZES)
def test_the_paper_preset_equals_a_literal_port_in_value_and_gradient(size: tuple[int, ...]) -> None:
    student, teacher = with_gradient(features(size, STUDENT)), features(size, TEACHER)
    loss = a_loss("reference")
    for step in range(2):
        terms = loss(student, teacher)
        unified, *individual = draws(loss, step, [(18, 5), (4, 2), (3, 2), (2, 2)])
        expected = {
            "ufd": oracle.unified_features(student["e1"], [teacher[n] for n in ("e2", "e3", "e4")]),
            "ifd": oracle.individual_features([student[n] for n in ("e2", "e3", "e4")], teacher["e5"]),
            "ipd": oracle.individual_pixels([student[n] for n in ("d4", "d3", "d2")], teacher["pred"], individual),
            "final_feature": oracle.feature_distance(student["e5"], teacher["e5"]),
            "final_pixel": oracle.two_column_divergence(student["pred"], teacher["pred"]),
        }
        if student["d5"].numel() % 2 == 0:                         # rows of two numbers
            expected["upd"] = oracle.unified_pixels(student["d5"], [teacher[n] for n in ("d5", "d4", "d3")], *unified)
        for term, value in expected.items():
            torch.testing.assert_close(terms[term], value)
            leaves = [student[name] for name in PLAIN[term]]
            slopes = [torch.autograd.grad(one, leaves, retain_graph=True) for one in (terms[term], value)]
            torch.testing.assert_close(*slopes)


def test_the_divisors_of_the_released_code() -> None:
    """Of two classes the mean over voxels; `upd` that over channels / 2, so 256 channels make it 128 times weaker."""
    logits, other = torch.randn(2, 2, 6, 8).double(), torch.randn(2, 2, 6, 8).double()
    divergence = F.kl_div((other / 4).log_softmax(1), (logits / 4).softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(oracle.two_column_divergence(other, logits), 16 * divergence.mean())
    size, channels = (16, 32), (2, 3, 4, 256, 6)
    student, teacher = features(size, channels), features(size, TEACHER)
    loss = a_loss("reference")
    loss.activate(["upd"])
    found = loss(student, teacher)["upd"]
    (projection,) = draws(loss, 0, [(18, 256)])
    coarse = torch.cat([oracle.resized(teacher[name], (2, 4)) for name in ("d5", "d4", "d3")], 1)
    target = (oracle.projected(coarse, *projection) / 4).softmax(1)
    per_voxel = 16 * F.kl_div((student["d5"] / 4).log_softmax(1), target, reduction="none").sum(1).mean()
    torch.testing.assert_close(found, per_voxel / 128)


def small(classes: int = 2) -> Maps:
    """Three levels of the same size, one sample."""
    maps = {name: torch.randn(1, 4, 4, 4).double() for name in ("e1", "e2", "e3", "d3", "d2")}
    return maps | {"pred": 4 * torch.randn(1, classes, 4, 4).double()}


def mean_slope(student: Maps, teacher: Maps, term: str, count: int) -> tuple[Tensor, float]:
    """The mean gradient over draws with respect to what `term` reads, and the mean length of a single one."""
    loss = LayerFeedbackLoss(["e1", "e2", "e3"], ["d3", "d2"], preset="paper")
    loss.activate([term])
    leaf = student["d2" if term == "ipd" else "d3"]
    slopes = torch.stack([torch.autograd.grad(loss(student, teacher)[term], leaf)[0].flatten() for _ in range(count)])
    return slopes.mean(0), slopes.norm(dim=1).mean().item()


def test_released_projections_teach_nothing_and_fixed_ones_do() -> None:
    """On average over the draws `ipd` shrinks activations, whatever the teacher says; known from the specification."""
    student, teacher = with_gradient(small()), small()
    mean, single = mean_slope(student, teacher, "ipd", 300)
    assert mean.norm() < 0.2 * single
    assert F.cosine_similarity(mean, student["d2"].detach().flatten(), dim=0) > 0.7
    fixed = (FixedHeads([4, 4], 2, 2), FixedHeads([4], 2, 2, seed=1))
    loss = LayerFeedbackLoss(["e1", "e2", "e3"], ["d3", "d2"], projection="fixed", heads=fixed)
    loss.activate(["ipd"])
    teachers = teacher, teacher | {"pred": -teacher["pred"]}
    slopes = [torch.autograd.grad(loss(student, one)["ipd"], student["d2"])[0].flatten() for one in teachers]
    assert F.cosine_similarity(*slopes, dim=0) < 0                 # opposite teachers, opposite lessons


def test_the_released_unified_term_flattens_the_channels_of_the_student() -> None:
    student = with_gradient(small())
    (first, _), (second, _) = (mean_slope(student, small(), "upd", 150) for _ in range(2))
    leaf = student["d3"]
    flat = F.kl_div((leaf / 4).log_softmax(1), torch.full_like(leaf, 0.25), reduction="sum")
    assert F.cosine_similarity(first, second, dim=0) > 0.98        # of two different teachers
    assert F.cosine_similarity(first, torch.autograd.grad(flat, leaf)[0].flatten(), dim=0) > 0.98


def test_each_step_draws_anew_and_a_resumed_run_goes_on() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    before = torch.get_rng_state()
    loss, other = a_loss("reference"), a_loss("reference", seed=1)
    first, second = loss(student, teacher), loss(student, teacher)
    assert torch.equal(torch.get_rng_state(), before)
    resumed = a_loss("reference")
    resumed.load_state_dict(loss.state_dict())
    third, again = loss(student, teacher), resumed(student, teacher)
    for term in ("upd", "ipd"):
        values = [terms[term].item() for terms in (first, second, third, other(student, teacher))]
        assert len(set(values[:3])) == 3
        assert values[3] != values[0]
        assert again[term] == third[term]
    for term in ("ufd", "ifd", "final_feature", "final_pixel"):
        assert first[term] == second[term]


# ---- preset `default` ----------------------------------------------------------------------------------------------


def pooled(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    return F.adaptive_avg_pool3d(maps, grid) if len(grid) == 3 else F.adaptive_avg_pool2d(maps, grid)


def plain_distance(student: Tensor, teacher: Tensor) -> Tensor:
    units = [F.normalize(maps.flatten(1)) for maps in (student, teacher)]
    return (units[0] - units[1]).square().sum(1).mean()


def plain_divergence(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    soft, target = (student / 4).softmax(1), (teacher / 4).softmax(1)
    divergence = (target * (target.log() - soft.log())).sum(1, keepdim=True)
    weight = torch.ones_like(divergence) if weight is None else weight
    return 16 * (weight * divergence).sum() / weight.sum()


def plain_terms(loss: LayerFeedbackLoss, student: Maps, teacher: Maps) -> Maps:
    """All terms of preset `default`, written down."""
    power = {name: value.pow(4).mean(1, keepdim=True) for name, value in student.items()}
    sums = {name: value.pow(4).sum(1, keepdim=True) for name, value in teacher.items()}
    grids = {name: tuple(value.shape[2:]) for name, value in student.items()}
    unified = sum(pooled(sums[name], grids["e4"]) for name in ("e2", "e3", "e4"))
    feedback = [plain_distance(pooled(power[name], grids["e5"]), sums["e5"]) for name in ("e2", "e3", "e4")]
    own = loss.student_heads([student[name] for name in DECODER])
    fitted = loss._heads_of_teacher("cpu")([teacher[name] for name in DECODER[:3]])
    target = torch.stack([pooled(logits, grids["d5"]) for logits in fitted]).mean(0)
    fine = [plain_divergence(oracle.resized(logits, grids["pred"]), teacher["pred"]) for logits in own[1:]]
    return {
        "ufd": plain_distance(pooled(power["e1"], grids["e4"]), unified), "ifd": torch.stack(feedback).mean(),
        "upd": plain_divergence(own[0], target), "ipd": torch.stack(fine).mean(),
        "final_feature": plain_distance(power["e5"], sums["e5"]),
        "final_pixel": plain_divergence(student["pred"], teacher["pred"]),
    }


@pytest.mark.parametrize("size", SIZES + ODD_SIZES)
@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_the_default_preset_equals_the_plain_formulas(kind: str, size: tuple[int, ...]) -> None:
    student, teacher = with_gradient(features(size, STUDENT)), features(size, TEACHER)
    loss = a_loss(kind, len(size))
    terms, expected = loss(student, teacher), plain_terms(loss, student, teacher)
    assert tuple(terms) == TERMS
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value)
        leaves = [student[name] for name in PLAIN[term]] + list(loss.parameters())
        slopes = [
            torch.autograd.grad(one, leaves, retain_graph=True, materialize_grads=True) for one in (terms[term], value)
        ]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kind", ["learned", "fixed", "reference"])
def test_a_sum_is_three_times_the_mean(kind: str) -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    total, mean = (a_loss(kind, reduction=reduction)(student, teacher) for reduction in ("sum", "mean"))
    for term in TERMS:
        torch.testing.assert_close(total[term], mean[term] * (3 if term in ("ifd", "ipd") else 1))


@pytest.mark.parametrize("kind", ["learned", "fixed", "reference"])
def test_the_loss_passes_gradcheck(kind: str) -> None:
    names = ["e1", "e2", "e3", "d3", "d2", "pred"]
    sizes = {"e1": (4, 4), "e2": (2, 4), "e3": (2, 2), "d3": (2, 4), "d2": (4, 4), "pred": (4, 4)}
    student, teacher = ({n: torch.randn(1, 2, *sizes[n]).double() for n in names} for _ in range(2))
    options: dict[str, Any] = {"preset": "paper"}
    if kind == "fixed":
        options = {"heads": (FixedHeads([2, 2], 2, 2), FixedHeads([2], 2, 2, seed=1)), "projection": "fixed"}
    elif kind == "learned":
        options = {"heads": (ClassHeads([2, 2], 2, 2, 1.0).double(), _Loaded(ClassHeads([2], 2, 2, 1.0).double()))}
    leaves = tuple(student[n].requires_grad_() for n in names)

    def total(*values: Tensor) -> Tensor:
        loss = LayerFeedbackLoss(["e1", "e2", "e3"], ["d3", "d2"], foreground=2.0, **options)
        return torch.stack(list(loss(dict(zip(names, values, strict=True)), teacher).values())).sum()

    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)


def test_foreground_of_the_teacher_weighs_more() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    teacher["pred"] *= 3
    loss = a_loss("fixed", foreground=4.0)
    terms, plain = loss(student, teacher), a_loss("fixed")(student, teacher)
    weight = 1 + 4.0 * (teacher["pred"].softmax(1)[:, 1:] > 0.1)
    expected = plain_divergence(student["pred"], teacher["pred"], weight)
    torch.testing.assert_close(terms["final_pixel"], expected)
    assert abs(terms["upd"] - plain["upd"]) > 1e-6
    assert abs(terms["ipd"] - plain["ipd"]) > 1e-6
    for term in ("ufd", "ifd", "final_feature"):
        assert terms[term] == plain[term]


def test_regions_and_a_single_channel_are_coins() -> None:
    student, teacher = features((16, 16), STUDENT, classes=3), features((16, 16), TEACHER, classes=3)
    single = [maps | {"pred": maps["pred"][:, :1]} for maps in (student, teacher)]
    doubled = [maps | {"pred": torch.cat([0 * maps["pred"], maps["pred"]], 1)} for maps in single]
    found = a_loss("fixed", classes=1)(*single)
    torch.testing.assert_close(found["final_pixel"], a_loss("fixed")(*doubled)["final_pixel"])
    coins = [a_loss("fixed", classes=1)(*(maps | {"pred": maps["pred"][:, k : k + 1]} for maps in (student, teacher)))
             for k in range(3)]
    regions = a_loss("fixed", classes=3, activation="sigmoid")(student, teacher)
    torch.testing.assert_close(regions["final_pixel"], torch.stack([one["final_pixel"] for one in coins]).sum())


def test_a_teacher_of_probabilities_teaches_what_its_logits_do() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    soft = teacher | {"pred": teacher["pred"].softmax(1)}
    found = a_loss("fixed", teacher_output="probabilities")(student, soft)
    torch.testing.assert_close(found, a_loss("fixed")(student, teacher))
    with pytest.raises(ValueError, match=r"`teacher\['pred'\]` must hold logits"):
        a_loss("fixed")(student, soft)


# ---- what must not change it ---------------------------------------------------------------------------------------

KINDS = ["learned", "fixed", "reference"]


@pytest.mark.parametrize("size", [(16, 32), (17, 19)])
@pytest.mark.parametrize("kind", KINDS)
def test_two_dimensions_equal_a_depth_of_one(kind: str, size: tuple[int, int]) -> None:
    student, teacher = features(size, STUDENT), features(size, TEACHER)
    deep = [{name: value.unsqueeze(2) for name, value in maps.items()} for maps in (student, teacher)]
    label = torch.randint(-1, 2, (2, 1, *size))
    for given in (None, label):
        solid = a_loss(kind, 3)(*deep, None if given is None else given.unsqueeze(2))
        torch.testing.assert_close(solid, a_loss(kind, 2)(student, teacher, given))


@pytest.mark.parametrize("kind", ["learned", "reference"])
def test_scaling_features_leaves_the_feature_terms(kind: str) -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    scaled = {name: value * 10 ** (n - 5) for n, (name, value) in enumerate(student.items())}
    larger = {name: value * 300 for name, value in teacher.items()}
    expected = a_loss(kind)(student, teacher)
    found = a_loss(kind)(scaled, larger)
    for term in ("ufd", "ifd", "final_feature"):
        torch.testing.assert_close(found[term], expected[term])


@pytest.mark.parametrize("axes", [(2,), (2, 3)])
@pytest.mark.parametrize("kind", ["learned", "reference"])
def test_flips_change_nothing(kind: str, axes: tuple[int, ...]) -> None:
    student, teacher = features((16, 32), STUDENT), features((16, 32), TEACHER)
    flipped = [{name: value.flip(axes) for name, value in maps.items()} for maps in (student, teacher)]
    torch.testing.assert_close(a_loss(kind)(*flipped), a_loss(kind)(student, teacher))


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_labels_change_nothing_unless_a_voxel_is_ignored(kind: str) -> None:
    student, teacher = features((32, 64), STUDENT), features((32, 64), TEACHER)
    label = torch.randint(0, 2, (2, 1, 32, 64))
    expected = a_loss(kind)(student, teacher)
    torch.testing.assert_close(a_loss(kind)(student, teacher, label), expected)
    label[:, :, :16, :32] = IGNORED
    ignoring = a_loss(kind)(student, teacher, label)
    assert all(abs(ignoring[term] - expected[term]) > 1e-6 for term in TERMS)
    changed = {name: value.clone() for name, value in student.items()}
    for value in changed.values():
        corner = value[:, :, : value.shape[2] // 2, : value.shape[3] // 2]
        corner.copy_(torch.randn_like(corner))
    found = a_loss(kind)(changed, teacher, label)
    for term in ("ufd", "ifd", "upd", "final_feature", "final_pixel"):   # `ipd` looks over the edge of what is known
        torch.testing.assert_close(found[term], ignoring[term])


def test_a_sample_of_ignored_voxels_alone_is_as_if_it_were_not_there() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    label = torch.zeros(2, 1, 16, 16)
    label[1] = IGNORED
    first = [{name: value[:1] for name, value in maps.items()} for maps in (student, teacher)]
    torch.testing.assert_close(a_loss("fixed")(student, teacher, label), a_loss("fixed")(*first))


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["ignored", "constant", "zero", "large", "small", "teacher zero", "one voxel"])
def test_degenerate_input_gives_finite_values_and_gradients(kind: str, size: tuple[int, ...], case: str) -> None:
    student, teacher = features(size, STUDENT, batch=1), features(size, TEACHER, batch=1)
    label = torch.zeros(1, 1, *size)
    if case == "ignored":
        label.fill_(IGNORED)
    elif case == "one voxel":
        label.flatten()[3] = 1
        teacher["pred"][:, 1:] = -30.0
        teacher["pred"][:, 1].flatten()[3] = 30.0
    elif case == "teacher zero":
        teacher = {name: torch.zeros_like(value) for name, value in teacher.items()}
    else:
        factor = {"constant": 0, "zero": 0, "large": 1e4, "small": 1e-4}[case]
        student = {name: value * factor + (case == "constant") for name, value in student.items()}
    student = with_gradient({name: value.float() for name, value in student.items()})
    loss = a_loss(kind, len(size), foreground=3.0).float()
    terms = loss(student, {name: value.float() for name, value in teacher.items()}, label)
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(value.grad is not None and value.grad.isfinite().all() for value in student.values())
    if case == "ignored":
        assert not any(value.any() for value in (*terms.values(), *(value.grad for value in student.values())))
    if case in ("zero", "teacher zero"):
        assert terms["ufd"].item() == pytest.approx(1.0, rel=1e-5)
        assert not student["e1"].grad.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fixed", "reference"])
def test_half_precision_under_autocast_equals_float32_of_the_rounded_values(dtype: torch.dtype, kind: str) -> None:
    student, teacher = ({n: (100 * v).to(dtype) for n, v in features((16, 16), c).items()} for c in (STUDENT, TEACHER))
    wide = [{name: value.float() for name, value in maps.items()} for maps in (student, teacher)]
    expected = a_loss(kind)(*wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = a_loss(kind)(student, teacher)
    assert all(value.dtype == torch.float32 and value.dim() == 0 and value.isfinite() for value in terms.values())
    torch.testing.assert_close(terms, expected)


def test_float32_keeps_five_digits_of_float64() -> None:
    student, teacher = features((16, 32), STUDENT), features((16, 32), TEACHER)
    single = [{name: value.float() for name, value in maps.items()} for maps in (student, teacher)]
    expected, found = a_loss("fixed")(student, teacher), a_loss("fixed")(*single)
    for term in TERMS:
        assert found[term].item() == pytest.approx(expected[term].item(), rel=1e-5)


def test_a_teacher_of_other_precision_works() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    single = {name: value.float() for name, value in student.items()}
    for kind in KINDS:
        expected = a_loss(kind)(student, teacher)
        found = a_loss(kind).float()(single, teacher)
        for term in TERMS:
            assert found[term].item() == pytest.approx(expected[term].item(), rel=1e-4), (kind, term)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_other_strides_meet(kind: str) -> None:
    student, teacher = with_gradient(features((16, 32), STUDENT)), features((48, 40), TEACHER)
    loss = a_loss(kind)
    loss.activate(HLFD)
    terms = loss(student, teacher)
    torch.stack(list(terms.values())).sum().backward()
    for name in ("e1", "e2", "e3", "e4", "d5", "d4", "d3", "d2"):
        assert student[name].grad is not None
        assert student[name].grad.isfinite().all()
        assert student[name].grad.any()
    loss = a_loss(kind)
    loss.activate(["final_pixel"])
    with pytest.raises(ValueError, match=r"`student\['pred'\]` and `teacher\['pred'\]` must share batch and spatial"):
        loss(student, teacher)


def test_inputs_stay_as_they_are() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    label = torch.randint(-1, 2, (2, 1, 16, 16))
    before = copy.deepcopy((student, teacher, label))
    a_loss()(with_gradient(student), teacher, label)
    torch.testing.assert_close((student, teacher, label), before, rtol=0, atol=0)


# ---- layers, heads, weights ----------------------------------------------------------------------------------------


def test_each_term_reads_its_layers_and_a_term_of_weight_zero_is_not_computed() -> None:
    student, teacher = with_gradient(features((16, 16), STUDENT)), features((16, 16), TEACHER)
    expected = a_loss()(student, teacher)
    reads = {"ufd": {"e2", "e3", "e4"}, "ifd": {"e5"}, "upd": {"d5", "d4", "d3"}, "ipd": {"d3"},
             "final_feature": {"e5"}, "final_pixel": set()}
    for count in range(4):
        for active in itertools.combinations(TERMS, count):
            loss = a_loss()
            loss.activate(active)
            needed = [{name for term in active for name in of[term] if name != "pred"} for of in (PLAIN, reads)]
            assert [{pair[role] for pair in loss.tap_pairs} for role in (0, 1)] == needed
            given = [
                {name: value for name, value in maps.items() if name in names or name == "pred"}
                for maps, names in zip((student, teacher), needed, strict=True)
            ]
            assert loss(*given) == {term: expected[term] for term in active}


def test_gradient_reaches_the_layers_of_section_three_and_never_the_teacher() -> None:
    student, teacher = with_gradient(features((32, 32), STUDENT)), with_gradient(features((32, 32), TEACHER))
    for kind in KINDS:
        loss = a_loss(kind)
        loss.activate(HLFD)
        for term, value in loss(student, teacher).items():
            slopes = torch.autograd.grad(value, list(student.values()), retain_graph=True, allow_unused=True)
            reached = [name for name, slope in zip(student, slopes, strict=True) if slope is not None and slope.any()]
            assert sorted(reached) == sorted(PLAIN[term])
            others = torch.autograd.grad(value, list(teacher.values()), retain_graph=True, allow_unused=True)
            assert all(slope is None for slope in others)


def test_layers_may_have_other_names_in_the_teacher_and_other_numbers() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    renamed = {f"teacher.{name}" if name != "pred" else name: value for name, value in teacher.items()}
    pairs = [[[name, f"teacher.{name}"] for name in names] for names in (ENCODER, DECODER)]
    loss = LayerFeedbackLoss(*pairs, projection="fixed", heads=heads("fixed", 2))
    torch.testing.assert_close(loss(student, renamed), a_loss("fixed")(student, teacher))
    few = LayerFeedbackLoss(
        ENCODER[:4], DECODER[1:], projection="fixed",
        heads=(FixedHeads(layers(STUDENT)[1:], 2, 2), FixedHeads(layers(TEACHER)[1:3], 2, 2)),
    )
    assert {pair[0] for pair in few.tap_pairs} == {*ENCODER[:4], *DECODER[1:]}
    assert all(value > 0 for value in few(student, teacher).values())


def test_the_weights_of_both_presets_are_the_released_ones() -> None:
    expected = {"ufd": 0.45, "ifd": 0.45, "upd": 0.05, "ipd": 0.05, "final_feature": 0.0, "final_pixel": 0.0}
    assert a_loss().preset_weights == expected
    assert a_loss("reference").preset_weights == expected
    assert (a_loss().reduction, a_loss("reference").reduction) == ("mean", "sum")


def test_only_the_students_heads_learn_and_are_saved() -> None:
    loss = a_loss()
    loss.activate(HLFD)
    student, teacher = with_gradient(features((16, 16), STUDENT)), features((16, 16), TEACHER)
    torch.stack(list(loss(student, teacher).values())).sum().backward()
    assert all(name.startswith("student_heads.layers.") for name in loss.state_dict())
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert sum(p.numel() for p in loss.parameters()) == 2 * (5 + 4 + 3 + 2) + 4 * 2
    assert not list(a_loss("fixed").parameters())
    assert list(a_loss("reference").state_dict()) == ["draws"]


def test_the_students_heads_learn_to_say_what_the_teacher_does() -> None:
    """The prediction lies in two channels of each layer, among others: heads alone bring the divergence near to 0."""
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    coarse = torch.randn(2, 2, 1, 1).double()
    teacher["pred"] = 6 * coarse.expand(2, 2, 16, 16).contiguous()
    for name in ("d4", "d3", "d2"):
        student[name][:, :2] = coarse.expand_as(student[name][:, :2])
    own = ClassHeads(layers(STUDENT), 2, 2).double()
    loss = LayerFeedbackLoss(ENCODER, DECODER, heads=(own, heads("learned", 2)[1]))
    loss.activate(["ipd"])
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(student, teacher)["ipd"]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.05 * values[0]


def test_the_teachers_heads_are_read_once_and_only_for_the_term_that_needs_them() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    loss = a_loss()
    loss.activate(HLFD)
    before = loss(student, teacher)["upd"]
    loss.teacher_heads.heads = ClassHeads(layers(TEACHER)[:3], 2, 2, 1.0, seed=2).double()
    assert loss(student, teacher)["upd"] == before
    loss.activate(HLFD)
    assert loss(student, teacher)["upd"] != before
    missing = TeacherHeads(layers(TEACHER)[:3], 2, "no.pt", 2)
    loss = LayerFeedbackLoss(ENCODER, DECODER, heads=(heads("learned", 2)[0], missing))
    loss.activate(["ufd", "ifd", "ipd"])
    loss(student, teacher)
    with pytest.raises(FileNotFoundError, match="`teacher_head` must be the weights of the teacher's class heads"):
        loss.activate(["upd"])


def test_a_student_that_is_distilled_has_nothing_of_the_loss() -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.e1, self.e2 = nn.Conv2d(1, width, 3, 1, 1), nn.Conv2d(width, width, 3, 2, 1)
            self.e3, self.d3 = nn.Conv2d(width, width, 3, 2, 1), nn.ConvTranspose2d(width, width, 2, 2)
            self.d2, self.head = nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 2, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.d2(self.d3(self.e3(self.e2(self.e1(image))))))

    student, teacher, image = Net(2), Net(4), torch.randn(1, 1, 16, 16)
    keys, names = list(student.state_dict()), (["e1", "e2", "e3"], ["d3", "d2"])
    fitted = _Loaded(ClassHeads([4], 2, 2, 1.0))
    loss = LayerFeedbackLoss(*names, heads=(ClassHeads([2, 2], 2, 2), fitted))
    loss.activate(HLFD)
    outputs = []
    for role, network in enumerate((student, teacher)):
        taps = FeatureTaps(network, [pair[role] for pair in loss.tap_pairs])
        taps.open()
        pred = network(image)
        outputs.append(taps.close() | {"pred": pred})
    torch.stack(list(loss(*outputs).values())).sum().backward()
    assert list(student.state_dict()) == keys
    assert all(p.grad is None for p in teacher.parameters())
    for name, parameter in student.named_parameters():             # the head gets the supervised loss only
        assert (parameter.grad is not None and parameter.grad.any().item()) is not name.startswith("head")


def test_the_spread_of_the_teachers_maps_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    for name in ("e2", "e3", "e4"):
        teacher[name][...] = 0.0
    teacher["e2"][..., 0, 0] = 5.0
    loss = a_loss("fixed")
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            loss(student, teacher)
    told = sorted((record.levelname, record.message) for record in caplog.records)
    assert told == [
        ("WARNING", "The teacher's attention maps of `ifd` are spread over 1.0 of 1 voxels. Of one voxel there is "
         "nothing to learn; take larger patches."),
        ("WARNING", "The teacher's attention maps of `ufd` are spread over 1.0 of 4 voxels. One has nearly all of it; "
         "a smaller `exponent` shows more of the layer."),
    ]
    caplog.clear()
    student, teacher = ({n: torch.ones_like(v) for n, v in features((32, 64), c).items()} for c in (STUDENT, TEACHER))
    loss = a_loss("fixed")
    loss.activate(["ifd"])
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            loss(student, teacher)
    message = "The teacher's attention maps of `ifd` are spread over 8.0 of 8 voxels."
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", message)]


# ---- errors --------------------------------------------------------------------------------------------------------


def test_missing_layers_and_wrong_channels_are_named() -> None:
    student, teacher = features((16, 16), STUDENT), features((16, 16), TEACHER)
    without = {name: value for name, value in student.items() if name != "e3"}
    with pytest.raises(ValueError, match=r"`student` must hold \['pred', 'e1', .*\], got .*; tap the layers"):
        a_loss()(without, teacher)
    without = {name: value for name, value in teacher.items() if name != "d5"}
    with pytest.raises(ValueError, match=r"`teacher` must hold \[.*'d5'.*\], got "):
        a_loss()(student, without)
    with pytest.raises(ValueError, match="`channels` and `spatial_dims` of head 0 must be 9 and 2, .* got 5 and 2"):
        a_loss()(student | {"d5": torch.zeros(2, 9, 2, 2)}, teacher)
    with pytest.raises(ValueError, match="of head 1 must be 9 and 2, those of the layer it reads, got 6 and 2"):
        a_loss()(student, teacher | {"d4": torch.zeros(2, 9, 4, 4).double()})
    with pytest.raises(ValueError, match="`heads` must give the 3 classes of the teacher's prediction, got 2"):
        a_loss()(*(maps | {"pred": torch.randn(2, 3, 16, 16).double()} for maps in (student, teacher)))
    with pytest.raises(ValueError, match=r"`tap e1` must be a floating map of shape \(B, C, \*S\)"):
        a_loss()(student | {"e1": torch.zeros(2, 4)}, teacher)
    with pytest.raises(ValueError, match=r"`label` must be class indices below 2, .* got 255"):
        a_loss()(student, teacher, torch.full((2, 1, 16, 16), 255))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`preset` must be one of \['default', 'paper'\], got 'free'"):
        LayerFeedbackLoss(ENCODER, DECODER, preset="free")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`projection` must be one of .* got 'random'"):
        LayerFeedbackLoss(ENCODER, DECODER, projection="random")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`reduction` must be one of .* got 'max'"):
        a_loss(reduction="max")
    with pytest.raises(ValueError, match="`projection` 'reference' must go with preset 'paper' .* got 'default'"):
        LayerFeedbackLoss(ENCODER, DECODER, projection="reference")
    with pytest.raises(ValueError, match="got 'paper' and 'sigmoid'"):
        a_loss("reference", activation="sigmoid")
    for options in ({"exponent": 0.5}, {"temperature": 0.0}, {"foreground": -1.0}):
        with pytest.raises(ValueError, match="`exponent` must be at least 1, `temperature` above 0 and"):
            a_loss(**options)
    with pytest.raises(ValueError, match=r"`encoder_taps` must name at least 3 layers, .* got \['e1', 'e2'\]"):
        LayerFeedbackLoss(ENCODER[:2], DECODER, preset="paper")
    with pytest.raises(ValueError, match=r"`decoder_taps` must name at least 2 layers, .* got \['d2'\]"):
        LayerFeedbackLoss(ENCODER, ["d2"], preset="paper")
    with pytest.raises(ValueError, match=r"`heads` must be \['ClassHeads', 'TeacherHeads'\] .* 'learned', got None"):
        LayerFeedbackLoss(ENCODER, DECODER)
    with pytest.raises(ValueError, match=r"`heads` must be \['FixedHeads', .* got \['ClassHeads', '_Loaded'\]"):
        LayerFeedbackLoss(ENCODER, DECODER, projection="fixed", heads=heads("learned", 2))
    with pytest.raises(ValueError, match=r"`heads` must be None .* 'reference', got \['FixedHeads', 'FixedHeads'\]"):
        a_loss("reference", heads=heads("fixed", 2))
    with pytest.raises(ValueError, match=r"for the 4 layers of `decoder_taps` and the first 3 .* got \[3, 3\] layers"):
        LayerFeedbackLoss(ENCODER, DECODER, heads=(ClassHeads([5, 4, 3], 2, 2), heads("learned", 2)[1]))
    with pytest.raises(ValueError, match=r"with the same classes, got \[4, 3\] layers and \[3, 2\] classes"):
        LayerFeedbackLoss(ENCODER, DECODER, heads=(heads("learned", 2, 3)[0], heads("learned", 2)[1]))
