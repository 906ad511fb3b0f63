# SPDX-License-Identifier: Apache-2.0
"""What every distillation loss has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medkd.losses.base import DistillationLoss, pointwise_convolution, tap_pairs, trainable_parameters


class DtypeLoss(DistillationLoss):
    """Keeps what it was given and multiplies it, which autocast would do in half precision."""

    terms = ("one", "two")
    preset_weights: Mapping[str, float] = {"one": 1.0, "two": 2.0}

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        self.seen = student, teacher, label
        value = (student["pred"].flatten(1) @ teacher["pred"].flatten(1).T).mean()
        return {term: value for term in self.terms if term in self.active_terms}


def test_half_precision_becomes_float32_with_autocast_off() -> None:
    loss = DtypeLoss()
    student, teacher = torch.randn(2, 1, 2, 3, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss({"pred": student}, {"pred": teacher})["one"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss({"pred": student.float()}, {"pred": teacher.float()})["one"])
    assert torch.is_autocast_enabled("cpu") is False


def test_whole_numbers_stay_whole() -> None:
    loss, maps, numbers = DtypeLoss(), torch.zeros(1, 2, 3, 3), torch.tensor([2**40 + 1])
    loss({"pred": maps, "numbers": numbers}, {"pred": maps, "numbers": numbers})
    assert [seen["numbers"].tolist() for seen in loss.seen[:2]] == [[2**40 + 1]] * 2


def test_double_precision_stays() -> None:
    maps = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    assert DtypeLoss()({"pred": maps}, {"pred": maps})["one"].dtype == torch.float64


def test_the_teacher_is_detached_and_the_student_is_not() -> None:
    student, teacher = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2))
    DtypeLoss()({"pred": student}, {"pred": teacher})["one"].backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_labels_are_optional_and_handed_on() -> None:
    loss, maps, label = DtypeLoss(), torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)
    loss({"pred": maps}, {"pred": maps})
    assert loss.seen[2] is None
    loss({"pred": maps}, {"pred": maps}, label)
    assert loss.seen[2] is label


def test_only_active_terms_are_computed() -> None:
    loss, maps = DtypeLoss(), torch.zeros(1, 2, 3, 3)
    assert set(loss({"pred": maps}, {"pred": maps})) == {"one", "two"}
    loss.activate(term for term in ["two"])
    assert set(loss({"pred": maps}, {"pred": maps})) == {"two"}
    loss.activate([])
    assert loss({"pred": maps}, {"pred": maps}) == {}


def test_an_unknown_term_is_refused_with_a_suggestion() -> None:
    loss = DtypeLoss()
    with pytest.raises(ValueError, match=r"`terms` must be of \['one', 'two'\], got 'tow'; did you mean 'two'\?"):
        loss.activate(["one", "tow"])
    assert loss.active_terms == {"one", "two"}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_prediction_is_named(role: str) -> None:
    maps = {"pred": torch.zeros(1, 2, 3, 3)}
    inputs = {"student": dict(maps), "teacher": dict(maps)}
    del inputs[role]["pred"]
    with pytest.raises(ValueError, match=rf"`{role}` must hold \['pred'\], got \[\]"):
        DtypeLoss()(**inputs)


@pytest.mark.parametrize(("role", "tap"), [("student", "a"), ("teacher", "b")])
def test_a_missing_tap_is_named(role: str, tap: str) -> None:
    maps = torch.zeros(1, 2, 3, 3)
    inputs = {"student": {"pred": maps, "a": maps}, "teacher": {"pred": maps, "b": maps}}
    loss = DtypeLoss([("a", "b")])
    loss(**inputs)
    del inputs[role][tap]
    with pytest.raises(ValueError, match=rf"`{role}` must hold \['pred', '{tap}'\], got \['pred'\]; tap"):
        loss(**inputs)


def test_a_path_stands_for_both_networks_and_a_pair_for_each_its_own() -> None:
    assert tap_pairs(["a", ["b", "c"], ("d", "e")], "taps") == (("a", "a"), ("b", "c"), ("d", "e"))


@pytest.mark.parametrize("taps", [[], [["a"]], [["a", "b", "c"]], [["a", 1]]])
def test_taps_that_are_neither_paths_nor_pairs_are_refused(taps: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="`taps` must list at least one layer path, or pairs"):
        tap_pairs(taps, "taps")


def test_trainable_parameters_are_those_of_student_and_heads_that_require_gradients() -> None:
    student, head, frozen = nn.Linear(2, 2), nn.Linear(2, 3, bias=False), nn.Linear(2, 2).requires_grad_(False)
    found = list(trainable_parameters(student, [head, frozen]))
    assert [id(p) for p in found] == [id(student.weight), id(student.bias), id(head.weight)]


@pytest.mark.parametrize("rank", [2, 3])
def test_a_pointwise_convolution_starts_with_a_bias_of_zero_whatever_memory_it_is_given(rank: int) -> None:
    torch.use_deterministic_algorithms(True)                       # fills new memory with NaN
    try:
        layer = pointwise_convolution(3, 2, rank, torch.Generator(), bias=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert layer.bias is not None
    assert layer.bias.tolist() == [0, 0]
    assert layer.weight.shape == (2, 3, *[1] * rank)
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize(("tap", "ones"), [((4, 2, 5, 5), (1, 1)), ((4, 2, 5, 5, 5), (1, 1, 1)), ((4, 7), (1, 1))])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_classification_is_a_map_of_one_voxel(
    tap: tuple[int, ...], ones: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    seen: list[tuple[int, ...]] = []

    class Looking(DistillationLoss):
        terms = ("a",)

        def compute_terms(self, student: Any, teacher: Any, label: Any) -> dict[str, Tensor]:
            seen.extend(tuple(one.shape) for one in (student["pred"], teacher["pred"], label, student["tap"]))
            return {"a": student["pred"].sum()}

    maps = {"pred": torch.zeros(4, 3), "tap": torch.zeros(tap)}
    Looking()(maps, maps, torch.zeros(shape, dtype=torch.int64))
    assert seen == [(4, 3, *ones), (4, 3, *ones), (4, 1, *ones), tap]
