# SPDX-License-Identifier: Apache-2.0
"""Graph Flow distillation as a whole: against the plain formulas, known answers, and what must not change it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medkd.losses.graph_flow import GraphFlowLoss
from medkd.losses.paraphraser import Paraphrasers, TeacherParaphrasers
from medkd.ops.ignored import IGNORED, UNLABELED
from oracles import graph_flow as oracle

Maps = dict[str, Tensor]
FLOW = [["e", "d"]]
SIZES = [(9, 7), (6, 5, 7)]
VARIATIONS = ["cosine", "difference", "distance"]
CHANNELS = 4


def features(size: tuple[int, ...], channels: int = CHANNELS, batch: int = 2) -> Maps:
    """An encoder and a decoder layer on one grid, a second pair on half of it, and a prediction; float64."""
    half = tuple(-(-length // 2) for length in size)
    shapes = {"e": size, "d": size, "e2": half, "d2": half}
    maps = {name: torch.randn(batch, channels, *grid, dtype=torch.float64) for name, grid in shapes.items()}
    return maps | {"pred": torch.randn(batch, 2, *size, dtype=torch.float64)}


def with_gradient(maps: Maps) -> Maps:
    return {name: value.detach().clone().requires_grad_() for name, value in maps.items()}


def a_loss(size: tuple[int, ...], flows: Any = FLOW, **options: Any) -> GraphFlowLoss:
    return GraphFlowLoss(flows, spatial_dims=len(size), **options)


class _Loaded(TeacherParaphrasers):
    """Fitted paraphrasers without a file."""

    def __init__(self, ready: Paraphrasers) -> None:
        layers = [(one.channels, one.factor) for one in ready.layers]
        super().__init__(["e", "d"], layers, "none", ready.layers[0].spatial_dims)
        self.ready = ready
        self.times = 0

    def load(self, device: torch.device | str = "cpu") -> Paraphrasers:
        self.times += 1
        return copy.deepcopy(self.ready).to(device).eval().requires_grad_(False)


# ---- the formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient_are_those_of_the_plain_formulas(
    size: tuple[int, ...], variation: str, reduction: str, window: int
) -> None:
    student, teacher = with_gradient(features(size)), features(size)
    loss = a_loss(size, [["e", "d"], ["e2", "d2"]], variation=variation, reduction=reduction, window=window)
    pairs = [[(maps["e"], maps["d"]), (maps["e2"], maps["d2"])] for maps in (student, teacher)]
    expected = oracle.graph_flow(*pairs, (window,) * len(size), variation, reduction)
    terms = loss(student, teacher)
    assert tuple(terms) == ("node", "edge")
    leaves = [student[name] for name in ("e", "d", "e2", "d2")]
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value)
        slopes = [torch.autograd.grad(one, leaves, retain_graph=True) for one in (terms[term], value)]
        torch.testing.assert_close(*slopes)


def peaks(*heights: float) -> Tensor:
    """One channel for each height, which has it in its middle and half of it to the right."""
    maps = torch.zeros(1, len(heights), 5, 5, dtype=torch.float64)
    for channel, height in enumerate(heights):
        maps[0, channel, 2, 2], maps[0, channel, 2, 3] = height, height / 2
    return maps


@pytest.mark.parametrize(
    ("variation", "node", "edge"),
    [
        # windows of the student: h (1, 1/2), so |v|^2 = 1.25 h^2; from 1 and 2 to 3 and 2; the teacher does not vary
        ("difference", 1.25 * 4, 1.25**2 * (8**2 + 2 * 4**2)),
        ("distance", (1.25 * 4) ** 2, 1.25**2 * (8**2 + 2 * 4**2)),
        ("cosine", 0.0, 0.0),                                      # all windows are parallel
    ],
)
def test_known_answers(variation: str, node: float, edge: float) -> None:
    pred = torch.zeros(1, 2, 5, 5)
    student = {"e": peaks(1.0, 2.0), "d": peaks(3.0, 2.0), "pred": pred}
    teacher = {"e": peaks(7.0, 5.0), "d": peaks(7.0, 5.0), "pred": pred}
    loss = GraphFlowLoss(FLOW, "paper", variation, "sum", spatial_dims=2)   # type: ignore[arg-type]
    terms = loss(student, teacher)
    assert terms["node"].item() == pytest.approx(node, abs=1e-12)
    assert terms["edge"].item() == pytest.approx(edge, abs=1e-12)
    mean = GraphFlowLoss(FLOW, "default", variation, "mean", spatial_dims=2)(student, teacher)   # type: ignore[arg-type]
    assert mean["node"].item() == pytest.approx(node / (18 if variation == "difference" else 2), abs=1e-12)
    assert mean["edge"].item() == pytest.approx(edge / 4, abs=1e-12)


def test_known_answer_of_cosines() -> None:
    """The student turns one of two channels, the teacher none."""
    turned = peaks(2.0, 3.0)
    turned[0, 1] = 0.0
    turned[0, 1, 2, 2], turned[0, 1, 2, 1] = 2.0, -4.0
    pred = torch.zeros(1, 2, 5, 5)
    student = {"e": peaks(2.0, 3.0), "d": turned, "pred": pred}
    teacher = {"e": peaks(1.0, 1.0), "d": peaks(1.0, 1.0), "pred": pred}
    cosine = 2.0 / (20 * 1.25) ** 0.5                              # of (-4, 2, 0) and (0, 1, 1/2)
    terms = GraphFlowLoss(FLOW, spatial_dims=2)(student, teacher)
    assert terms["node"].item() == pytest.approx((1 - cosine) ** 2 / 2)
    assert terms["edge"].item() == pytest.approx(2 * (1 - cosine) ** 2 / 4)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_loss_passes_gradcheck(variation: str) -> None:
    student, teacher = with_gradient(features((4, 3, 3), batch=1)), features((4, 3, 3), batch=1)

    def total(*layers: Tensor) -> Tensor:
        maps = student | dict(zip(("e", "d"), layers, strict=True))
        return torch.stack(list(a_loss((4, 3, 3), variation=variation)(maps, teacher).values())).sum()

    assert torch.autograd.gradcheck(total, (student["e"], student["d"]), fast_mode=True)


# ---- what must hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_a_student_that_is_its_teacher_has_loss_zero(size: tuple[int, ...], variation: str, preset: str) -> None:
    teacher = features(size)
    terms = a_loss(size, preset=preset, variation=variation)(with_gradient(teacher), teacher)
    assert {term: value.item() for term, value in terms.items()} == {"node": 0.0, "edge": 0.0}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_only_cosines_do_not_depend_on_the_scale_of_a_network(variation: str) -> None:
    student, teacher = features((9, 7)), features((9, 7))
    loss = a_loss((9, 7), variation=variation)
    before = loss(student, teacher)
    for factors in ((3.0, 1.0), (1.0, 0.2), (1e-9, 1e9)):
        scaled = [{k: v * f for k, v in maps.items()} for maps, f in zip((student, teacher), factors, strict=True)]
        for term, value in loss(*scaled).items():
            assert torch.isclose(value, before[term]).item() is (variation == "cosine")


@pytest.mark.parametrize("variation", VARIATIONS)
def test_moving_a_layer_away_from_the_border_changes_nothing(variation: str) -> None:
    student, teacher = features((14, 14)), features((14, 14))
    for maps in (student, teacher):
        for name in ("e", "d"):
            inner = maps[name][..., 4:10, 4:10].abs() + 0.1
            maps[name] = torch.zeros_like(maps[name])
            maps[name][..., 4:10, 4:10] = inner
    moved = student | {"e": student["e"].roll((2, -1), (2, 3)), "d": student["d"].roll(-2, 3)}
    loss = a_loss((14, 14), variation=variation)
    assert loss(student, teacher) == loss(moved, teacher)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_two_dimensions_equal_a_depth_of_one(variation: str) -> None:
    student, teacher = with_gradient(features((9, 7))), features((9, 7))
    deep = [{name: value.detach().unsqueeze(2) for name, value in maps.items()} for maps in (student, teacher)]
    deep[0] = with_gradient(deep[0])
    for preset in ("default", "paper"):
        losses = a_loss((9, 7), preset=preset, variation=variation, window=(3, 5)), a_loss(
            (1, 9, 7), preset=preset, variation=variation, window=(1, 3, 5)
        )
        flat, solid = losses[0](student, teacher), losses[1](*deep)
        assert flat == solid
        assert losses[0].preset_weights == losses[1].preset_weights
        for term in flat:
            slopes = [torch.autograd.grad(terms[term], maps["e"], retain_graph=True)[0]
                      for terms, maps in ((flat, student), (solid, deep[0]))]
            assert torch.equal(slopes[0], slopes[1].squeeze(2))


def test_the_gradient_reaches_the_windows_of_the_student_alone() -> None:
    student, teacher = with_gradient(features((8, 8, 8))), with_gradient(features((8, 8, 8)))
    torch.stack(list(a_loss((8, 8, 8))(student, teacher).values())).sum().backward()
    for name in ("e", "d"):
        slope = student[name].grad
        assert slope is not None
        assert 0 < slope.count_nonzero() <= 2 * CHANNELS * 27
        assert slope.flatten(2).any(2).all()                       # every channel
    assert student["pred"].grad is None
    assert all(value.grad is None for value in teacher.values())


def test_several_pairs_of_layers_are_averaged() -> None:
    student, teacher = features((9, 7)), features((9, 7))
    together = a_loss((9, 7), [["e", "d"], ["e2", "d2"], ["e", "d"]])(student, teacher)
    single = [a_loss((9, 7), flow)(student, teacher) for flow in ([["e", "d"]], [["e2", "d2"]])]
    for term, value in together.items():
        torch.testing.assert_close(value, (2 * single[0][term] + single[1][term]) / 3)


def test_student_and_teacher_may_have_layers_of_other_names_and_grids() -> None:
    student, teacher = features((9, 7)), features((9, 7))
    expected = a_loss((9, 7), window=1, variation="difference")(student, teacher)
    grown = {name: torch.nn.functional.pad(value, (3, 0, 0, 2), value=-9.0) for name, value in teacher.items()}
    renamed = {"a": grown["e"], "b": grown["d"], "pred": teacher["pred"]}
    loss = a_loss((9, 7), [[["e", "a"], ["d", "b"]]], window=1, variation="difference")
    assert loss.tap_pairs == (("e", "a"), ("d", "b"))
    assert loss(student, renamed) == expected                      # the border that was added has no maximum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, preset: str) -> None:
    student, teacher = ({n: (300 * v).to(dtype) for n, v in features((11, 13)).items()} for _ in range(2))
    student = with_gradient(student)
    loss = a_loss((11, 13), preset=preset, window=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(student, teacher)
    wide = loss({n: v.float() for n, v in student.items()}, {n: v.float() for n, v in teacher.items()})
    for term, value in terms.items():
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value == wide[term]
        slope = torch.autograd.grad(loss.preset_weights[term] * value, student["e"], retain_graph=True)[0]
        assert slope.dtype == dtype
        assert slope.isfinite().all()


def test_dead_channels_give_finite_terms_and_no_gradient() -> None:
    student, teacher = features((9, 7)), features((9, 7))
    for name in ("e", "d"):
        student[name][:, 1] = 0.0
        teacher[name][:, 2] = 0.0
    student = with_gradient(student)
    terms = a_loss((9, 7))(student, teacher)
    torch.stack(list(terms.values())).sum().backward()
    assert all(0 < value < 4 for value in terms.values())
    assert not student["e"].grad[:, 1].any()   # type: ignore[index]
    nothing = {name: torch.zeros_like(value) for name, value in teacher.items()}
    assert all(value == 0 for value in a_loss((9, 7))(nothing, nothing).values())


@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_feature_that_is_no_number_is_not_passed_over(variation: str) -> None:
    """So that a guard stops the run."""
    student, teacher = features((9, 7)), features((9, 7))
    student["e"][0, 1, 3, 3] = float("nan")
    assert all(value.isnan() for value in a_loss((9, 7), variation=variation)(student, teacher).values())


def test_a_term_that_is_not_asked_for_is_not_given() -> None:
    student, teacher = features((9, 7)), features((9, 7))
    loss = a_loss((9, 7))
    expected = loss(student, teacher)
    for term in ("node", "edge"):
        loss.activate([term])
        assert loss(student, teacher) == {term: expected[term]}
    loss.activate([])
    assert loss(student, teacher) == {}
    assert not loss.state_dict()


# ---- voxels that do not count --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variation", VARIATIONS)
def test_ignored_voxels_are_as_if_they_were_not_there(variation: str) -> None:
    student, teacher = with_gradient(features((9, 8))), features((9, 8))
    label = torch.zeros(2, 1, 9, 8, dtype=torch.int64)
    label[..., 5:] = IGNORED
    loss = a_loss((9, 8), variation=variation)
    cut = [{name: value[..., :5] for name, value in maps.items()} for maps in (student, teacher)]
    found, expected = loss(student, teacher, label), loss(*cut)
    for term, value in found.items():
        torch.testing.assert_close(value, expected[term])
    (slope,) = torch.autograd.grad(found["node"], student["e"])
    assert not slope[..., 5:].any()


def test_a_sample_of_ignored_voxels_alone_does_not_count() -> None:
    student, teacher = with_gradient(features((9, 7))), features((9, 7))
    label = torch.zeros(2, 1, 9, 7, dtype=torch.int64)
    label[1] = IGNORED
    first = [{name: value[:1] for name, value in maps.items()} for maps in (student, teacher)]
    for term, value in a_loss((9, 7))(student, teacher, label).items():
        torch.testing.assert_close(value, a_loss((9, 7))(*first)[term])
    assert all(value == 0 for value in a_loss((9, 7))(student, teacher, label.fill_(IGNORED)).values())


def test_a_case_without_a_label_counts_wholly() -> None:
    student, teacher = features((9, 7)), features((9, 7))
    label = torch.zeros(2, 1, 9, 7, dtype=torch.int64)
    expected = a_loss((9, 7))(student, teacher)
    assert a_loss((9, 7))(student, teacher, label) == expected
    label[1] = UNLABELED
    assert a_loss((9, 7))(student, teacher, label) == expected


# ---- presets -------------------------------------------------------------------------------------------------------


def test_the_weights_of_the_paper_are_those_of_two_dimensions_and_follow_the_window() -> None:
    """A sum over a window of k^3 voxels instead of k^2 is k times larger, one of products of such sums k^2 times."""
    def weights(**options: Any) -> list[float]:
        return list(GraphFlowLoss(FLOW, "paper", **options).preset_weights.values())

    assert weights(spatial_dims=2) == weights(spatial_dims=2, window=9) == [1e-5, 1e-9]
    for window in ((1, 3, 3), (3, 1, 3), (3, 3, 1), (9, 9, 1)):    # a slice, along whichever axis
        assert weights(window=window) == [1e-5, 1e-9]
    assert weights() == weights(window=(5, 5, 3)) == weights(window=(3, 5, 5)) == pytest.approx([1e-5 / 3, 1e-9 / 9])
    assert weights(window=5, variation="distance") == pytest.approx([1e-5 / 25, 1e-9 / 25])
    assert weights(reduction="mean") == pytest.approx([1e-5, 1e-9 / 9])
    assert weights(reduction="mean", variation="distance") == pytest.approx([1e-5 / 9, 1e-9 / 9])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("variation", ["difference", "distance"])
def test_weights_make_layers_of_one_value_pull_alike_in_two_and_three_dimensions(
    variation: str, reduction: str
) -> None:
    """Where all values of a window are one, sums grow with its volume exactly."""
    pulls = []
    for size in ((7, 7), (7, 7, 7)):
        maps = [{name: torch.full((1, 2, *size), value) for name, value in (("e", a), ("d", b), ("pred", 0.0))}
                for a, b in ((1.0, 3.0), (2.0, 1.0))]
        for one in maps:
            for name in ("e", "d"):
                one[name].flatten(2)[..., one[name][0, 0].numel() // 2] += 1e-6   # the maximum is in the middle
        loss = a_loss(size, variation=variation, reduction=reduction, window=5)
        pulls.append({term: loss.preset_weights[term] * value.item() for term, value in loss(*maps).items()})
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-4)


def test_the_presets_are_what_the_docs_say() -> None:
    default, paper = GraphFlowLoss(FLOW), GraphFlowLoss(FLOW, "paper")
    assert (default.variation, default.reduction, default.window) == ("cosine", "mean", (3, 3, 3))
    assert (paper.variation, paper.reduction, paper.window) == ("difference", "sum", (3, 3, 3))
    assert default.preset_weights == {"node": 1.0, "edge": 1.0}


def test_reduction_and_weights_follow_a_variation_that_is_given() -> None:
    for preset in ("default", "paper"):
        cosine, *raw = (GraphFlowLoss(FLOW, preset, one, spatial_dims=2)   # type: ignore[arg-type]
                        for one in ("cosine", "difference", "distance"))
        assert (cosine.reduction, cosine.preset_weights) == ("mean", {"node": 1.0, "edge": 1.0})
        for one in raw:
            assert (one.reduction, one.preset_weights) == ("sum", {"node": 1e-5, "edge": 1e-9})


# ---- paraphrasers --------------------------------------------------------------------------------------------------


def test_the_teacher_is_read_through_its_frozen_paraphrasers() -> None:
    student, teacher = with_gradient(features((9, 7))), with_gradient(features((9, 7), channels=6))
    ready = Paraphrasers([(6, CHANNELS), (6, CHANNELS)], spatial_dims=2).double()
    given = _Loaded(ready)
    loss = a_loss((9, 7), paraphrasers=given)
    loss.activate(loss.terms)
    terms = loss(student, teacher)
    with torch.no_grad():
        factors = ready([teacher["e"], teacher["d"]])
    expected = a_loss((9, 7))(student, teacher | dict(zip(("e", "d"), factors, strict=True)))
    assert terms == expected
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.grad is None for value in teacher.values())
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert given.times == 1
    loss.activate([])
    assert given.times == 1


def test_paraphrasers_come_from_their_file_and_belong_to_the_layers_in_order(tmp_path: Path) -> None:
    path, student, teacher = tmp_path / "p.pt", features((9, 7)), features((9, 7))
    teacher |= {"d": torch.randn(2, 6, 9, 7).double(), "e": torch.randn(2, 5, 9, 7).double()}
    channels = [(5, CHANNELS), (6, CHANNELS)]
    torch.save(Paraphrasers(channels, spatial_dims=2, seed=3).state_dict(), path)
    loss = a_loss((9, 7), paraphrasers=TeacherParaphrasers(["e", "d"], channels, path, 2))
    assert all(value > 0 for value in loss(student, teacher).values())
    swapped = a_loss((9, 7), [["d", "e"]], paraphrasers=TeacherParaphrasers(["d", "e"], channels, path, 2))
    with pytest.raises(ValueError, match="of a paraphraser must be 6 and 2, those of the layer it reads, got 5 and 2"):
        swapped(student, teacher)
    missing = a_loss((9, 7), paraphrasers=TeacherParaphrasers(["e", "d"], channels, tmp_path / "no.pt", 2))
    with pytest.raises(FileNotFoundError, match="`paraphrasers` must be the weights of the teacher's "):
        missing.activate(["node"])


# ---- errors --------------------------------------------------------------------------------------------------------


def test_layers_that_do_not_fit_are_named_with_the_way_out() -> None:
    student, teacher = features((9, 7)), features((9, 7))
    wide = features((9, 7), channels=6)
    with pytest.raises(ValueError, match=r"`paraphrasers` must bring the teacher's layer 'e' to the 4 channels "):
        a_loss((9, 7))(student, wide)
    with pytest.raises(ValueError, match=r"`flows` must be of layers of one stride, got 'e' .* student"):
        a_loss((9, 7), [[["e", "e"], ["d2", "d"]]])(student, teacher)
    with pytest.raises(ValueError, match=r"got 'e' of size \(9, 7\) and 'd2' of \(5, 4\) in the teacher"):
        a_loss((9, 7), [[["e", "e"], ["d", "d2"]]])(student, teacher)
    mixed = [maps | {"d": wide["d"]} for maps in (student, teacher)]
    with pytest.raises(ValueError, match="`flows` must be of layers of as many channels, got 4 at 'e' and 6 at 'd'"):
        a_loss((9, 7))(*mixed)
    with pytest.raises(ValueError, match=r"`spatial_dims` must be 2, as student\['e'\] has, got 3"):
        GraphFlowLoss([["e", "d"]])(student, teacher)
    with pytest.raises(ValueError, match=r"`student\['e'\]` must be a floating map of shape \(B, C, \*S\)"):
        a_loss((9, 7))(student | {"e": torch.zeros(2, 4)}, teacher)
    with pytest.raises(ValueError, match=r"`student` must hold \['pred', 'e', 'd'\], got"):
        a_loss((9, 7))({"pred": student["pred"]}, teacher)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`preset` must be one of \['default', 'paper'\], got 'free'"):
        GraphFlowLoss(FLOW, "free")   # type: ignore[arg-type]
    for name in ("variation", "reduction", "maximum"):
        with pytest.raises(ValueError, match=f"`{name}` must be one of .* got 'most'"):
            GraphFlowLoss(FLOW, **{name: "most"})   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 or 3, got 4"):
        GraphFlowLoss(FLOW, spatial_dims=4)
    for window in (2, 0, (3, 3), (3, 3, 4)):
        with pytest.raises(ValueError, match="`window` must be an odd number of voxels, or 3 of them, got"):
            GraphFlowLoss(FLOW, window=window)
    for flows in ([], ["e", "d"], [["e"]], [["e", "d", "f"]], "ed"):
        with pytest.raises(ValueError, match=r"`flows` must list at least one pair of layers \[earlier, later\]"):
            GraphFlowLoss(flows)
    for flow in (["e", "e"], [["e", "a"], ["d", "a"]]):
        with pytest.raises(ValueError, match="`flows` must name two different layers of each network, got"):
            GraphFlowLoss([flow])
    for taps in (["d", "e"], ["e", "f"], ["e"]):
        given = TeacherParaphrasers(taps, [(6, 4)] * len(taps), "p.pt")
        with pytest.raises(ValueError, match=r"for the teacher's layers \['e', 'd'\], in this order, got \['"):
            GraphFlowLoss(FLOW, paraphrasers=given)
    with pytest.raises(ValueError, match="`paraphrasers` must have the loss's 2 spatial axes, got 3"):
        GraphFlowLoss(FLOW, paraphrasers=TeacherParaphrasers(["e", "d"], [(6, 4), (6, 4)], "p.pt"), spatial_dims=2)
