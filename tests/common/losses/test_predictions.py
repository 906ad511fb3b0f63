# SPDX-License-Identifier: Apache-2.0
"""Logits, probabilities, and regions that overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medkd.losses.boundary_relation import BoundaryRelationLoss
from medkd.losses.features import HintLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.predictions import Predictions

SIGMOID: dict[str, Any] = {"activation": "sigmoid"}


def logits(channels: int = 3) -> Tensor:
    """What a trained network gives: mostly certain."""
    return 6.0 * torch.randn(2, channels, 6, 8)


def value_of(student: Tensor, teacher: Tensor, label: Tensor | None = None, **options: Any) -> Tensor:
    return SoftLabelLoss(**options)({"pred": student}, {"pred": teacher}, label)["logits"]


# ---- probabilities are recognized ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "activation", "output"),
    [(3, "softmax", "softmax"), (3, "softmax", "sigmoid"), (1, "softmax", "sigmoid"), (3, "sigmoid", "sigmoid"),
     (3, "softmax", "one-hot")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_in_the_place_of_logits_are_refused(
    channels: int, activation: Any, output: str, dtype: torch.dtype
) -> None:
    maps = logits(channels)
    activated = {
        "softmax": lambda: maps.softmax(1), "sigmoid": lambda: maps.sigmoid(),
        "one-hot": lambda: F.one_hot(maps.argmax(1), channels).movedim(-1, 1),
    }[output]().to(dtype)
    with pytest.raises(ValueError, match=r"`teacher\['pred'\]` must hold logits, got values within .*'probabilities'"):
        value_of(logits(channels), activated, activation=activation)
    with pytest.raises(ValueError, match=r"`student\['pred'\]` must hold logits, .*without its last activation"):
        value_of(activated, logits(channels), activation=activation)


def test_values_that_never_leave_0_to_1_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    loss, vague = SoftLabelLoss(), 0.3 + 0.2 * torch.rand(2, 3, 6, 8)
    for _ in range(20):
        loss({"pred": logits()}, {"pred": vague})
    assert caplog.text.count("All values of `teacher['pred']` lie within [0, 1] so far") == 1
    assert "student" not in caplog.text


def test_a_batch_that_tells_nothing_is_followed_by_a_look_at_the_next() -> None:
    loss = SoftLabelLoss(**SIGMOID)
    nothing, something = torch.full((2, 3, 6, 8), -9.0).sigmoid(), logits().sigmoid()
    loss({"pred": logits()}, {"pred": nothing})
    with pytest.raises(ValueError, match="must hold logits"):
        loss({"pred": logits()}, {"pred": something})


def test_after_logits_beyond_doubt_nobody_looks_again() -> None:
    predictions = Predictions()
    predictions.teacher(logits())
    assert predictions.teacher(torch.full((1, 2, 4, 4), 0.5)) is not None


@pytest.mark.parametrize("maps", [torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.rand(1, 3, 4, 4)])
def test_constant_or_small_logits_are_no_probabilities(maps: Tensor) -> None:
    assert value_of(logits()[:1, :, :4, :4], maps).isfinite()


# ---- and can be said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "foreground"])
@pytest.mark.parametrize(("channels", "activation"), [(3, "softmax"), (1, "softmax"), (3, "sigmoid"), (1, "sigmoid")])
def test_a_teacher_of_probabilities_teaches_what_its_logits_do(channels: int, activation: Any, weighting: Any) -> None:
    student, teacher = torch.randn(2, 2, channels, 6, 8)
    coins = activation == "sigmoid" or channels == 1
    options: dict[str, Any] = {"activation": activation, "weighting": weighting, "temperature": 3.0}
    activated = teacher.sigmoid() if coins else teacher.softmax(1)
    value = value_of(student, activated, teacher_output="probabilities", **options)
    torch.testing.assert_close(value, value_of(student, teacher, **options))


def test_certain_probabilities_stay_finite() -> None:
    student = logits().requires_grad_()
    teacher = F.one_hot(student.argmax(1), 3).movedim(-1, 1).float()
    for options in ({}, SIGMOID):
        value = value_of(student, teacher, teacher_output="probabilities", **options)
        value.backward()
        assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_in_the_place_of_probabilities_are_refused(activation: Any) -> None:
    with pytest.raises(ValueError, match=r"`teacher\['pred'\]` must hold probabilities that .* 'logits'"):
        value_of(logits(), logits(), activation=activation, teacher_output="probabilities")
    if activation == "softmax":
        with pytest.raises(ValueError, match="must hold probabilities that sum to 1 over the channels"):
            value_of(logits(), logits().sigmoid(), teacher_output="probabilities")


@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"teacher_output": "log"}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    name = next(iter(options))
    for make in (
        lambda: SoftLabelLoss(**options), lambda: HintLoss(["e"], [[1, 1]], **options),
        lambda: BoundaryRelationLoss(["e"], ["e"], **options),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got '{options[name]}'"):
            make()


# ---- regions -------------------------------------------------------------------------------------------------------


def test_regions_are_coins_for_each_channel() -> None:
    student, teacher = torch.randn(2, 2, 3, 6, 8)
    q, p = (torch.sigmoid(maps / 2.0) for maps in (student, teacher))
    coins = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(value_of(student, teacher, **SIGMOID), 4.0 * coins.sum(1).mean())


def test_one_region_equals_a_sigmoid_output() -> None:
    student, teacher = torch.randn(2, 2, 1, 6, 8)
    for weighting in ("uniform", "foreground"):
        options: dict[str, Any] = {"weighting": weighting}
        torch.testing.assert_close(
            value_of(student, teacher, **options, **SIGMOID), value_of(student, teacher, **options)
        )


def test_the_foreground_of_regions_is_where_any_region_is() -> None:
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[9.0, -9.0]], [[-9.0, -9.0]]]])
    near = value_of(student, teacher, weighting="foreground", floor=0.0, **SIGMOID)
    inside = value_of(student, teacher[..., :1].expand(1, 2, 1, 2), **SIGMOID)
    assert near.item() == pytest.approx(inside.item(), rel=1e-3)


def test_labels_of_regions_are_no_class_indices_but_tell_what_is_ignored() -> None:
    student, teacher = torch.randn(2, 1, 3, 6, 8)
    label = torch.randint(0, 2, (1, 3, 6, 8)).float()
    assert value_of(student, teacher, label, **SIGMOID) == value_of(student, teacher, **SIGMOID)
    label[..., 4:] = -1
    expected = value_of(student[..., :4], teacher[..., :4], **SIGMOID)
    torch.testing.assert_close(value_of(student, teacher, label, **SIGMOID), expected)


def features(size: int = 8) -> dict[str, Tensor]:
    return {"e": torch.randn(1, 3, size, size), "pred": torch.randn(1, 2, size, size)}


@pytest.mark.parametrize("kind", ["contrast", "prob"])
def test_relations_take_a_combination_of_regions_for_a_class(kind: Any) -> None:
    """Two regions, one inside the other, are three classes."""
    student, teacher, classes = features(), features(), torch.randint(0, 3, (1, 1, 8, 8))
    options: dict[str, Any] = {"boundary_map": kind, "min_boundary_auc": 0.0}
    regions = torch.cat([classes > 0, classes > 1], dim=1).float()
    loss = BoundaryRelationLoss(["e"], ["e"], activation="sigmoid", **options)
    terms = loss(student, teacher, regions)
    for term, value in loss(student, teacher, classes).items():
        torch.testing.assert_close(value, terms[term])
    if kind == "prob":
        return
    three = [maps | {"pred": torch.zeros(1, 3, 8, 8)} for maps in (student, teacher)]
    for term, value in BoundaryRelationLoss(["e"], ["e"], **options)(*three, classes).items():
        torch.testing.assert_close(value, terms[term])


def test_relations_without_labels_take_the_teachers_regions() -> None:
    student, teacher = features(), features()
    loss = BoundaryRelationLoss(["e"], ["e"], activation="sigmoid", min_boundary_auc=0.0)
    for term, value in loss(student, teacher, (teacher["pred"] > 0).float()).items():
        torch.testing.assert_close(value, loss(student, teacher)[term])


def test_relations_without_labels_read_the_teachers_probabilities() -> None:
    student, teacher = features(), features() | {"pred": torch.randn(1, 1, 8, 8)}
    student["pred"] = torch.randn(1, 1, 8, 8)
    given = teacher | {"pred": teacher["pred"].sigmoid()}
    options: dict[str, Any] = {"min_boundary_auc": 0.0}
    terms = BoundaryRelationLoss(["e"], ["e"], teacher_output="probabilities", **options)(student, given)
    for term, value in BoundaryRelationLoss(["e"], ["e"], **options)(student, teacher).items():
        torch.testing.assert_close(value, terms[term])
    given["pred"] = (9.0 * teacher["pred"]).sigmoid()
    with pytest.raises(ValueError, match="must hold logits, got values within .* as after a sigmoid"):
        BoundaryRelationLoss(["e"], ["e"], **options)(student, given)


def test_the_map_of_regions_is_hellinger_contrast_of_all_coins() -> None:
    student, teacher = features(), features()
    one = [maps | {"pred": maps["pred"][:, :1]} for maps in (student, teacher)]
    options: dict[str, Any] = {"boundary_map": "prob", "min_boundary_auc": 0.0}
    label = torch.randint(0, 2, (1, 1, 8, 8))
    value = BoundaryRelationLoss(["e"], ["e"], activation="sigmoid", **options)(*one, label)["boundary"]
    torch.testing.assert_close(value, BoundaryRelationLoss(["e"], ["e"], **options)(*one, label)["boundary"])
    assert BoundaryRelationLoss(["e"], ["e"], activation="sigmoid", **options)(student, teacher, label)["boundary"] > 0


def test_labels_of_regions_under_softmax_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`label` must have shape \(B, 1, \*S\)"):
        BoundaryRelationLoss(["e"], ["e"])(features(), features(), torch.zeros(1, 2, 8, 8))


def test_hints_read_the_foreground_of_probabilities() -> None:
    maps, pred = {"e": torch.randn(1, 3, 8, 8)}, torch.randn(1, 2, 8, 8)
    loss = HintLoss(["e"], [[3, 3]], spatial_dims=2, weighting="foreground", teacher_output="probabilities")
    value = loss(maps | {"pred": pred}, maps | {"pred": pred.softmax(1)})["features"]
    plain = HintLoss(["e"], [[3, 3]], spatial_dims=2, weighting="foreground")
    torch.testing.assert_close(value, plain(maps | {"pred": pred}, maps | {"pred": pred})["features"])
    plain = HintLoss(["e"], [[3, 3]], spatial_dims=2, weighting="foreground")
    with pytest.raises(ValueError, match="must hold logits"):
        plain(maps | {"pred": pred}, maps | {"pred": (6 * pred).softmax(1)})
