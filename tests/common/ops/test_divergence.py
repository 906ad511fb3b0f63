# SPDX-License-Identifier: Apache-2.0
"""Divergence of softened distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medkd.ops.divergence import softened_divergence


def written_out(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = ((maps / temperature).softmax(1) for maps in (student, teacher))
    return (q * (q.log() - p.log())).sum(1, keepdim=True)


@pytest.mark.parametrize("size", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_formula(
    size: tuple[int, ...], temperature: float, dtype: torch.dtype
) -> None:
    student, teacher = torch.randn(2, 2, 4, *size, dtype=dtype)
    student.requires_grad_()
    before = [one.detach().clone() for one in (student, teacher)]
    values = softened_divergence(student, teacher, temperature), written_out(student, teacher, temperature)
    assert values[0].shape == (2, 1, *size)
    torch.testing.assert_close(*values)
    pull = torch.randn_like(values[0])
    slopes = [torch.autograd.grad(value, student, pull)[0] for value in values]
    torch.testing.assert_close(*slopes)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_it_passes_gradcheck() -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: softened_divergence(x, teacher, 2.0), student.requires_grad_())


def test_equal_maps_have_exactly_no_divergence_and_certain_ones_a_finite_one() -> None:
    student, teacher = 1e4 * torch.randn(2, 1, 3, 4, 4)
    assert not softened_divergence(student, student, 2.0).any()
    assert softened_divergence(student, teacher, 2.0).isfinite().all()
    assert (softened_divergence(student, teacher, 2.0) >= 0).all()


def test_memory_format_does_not_matter_and_the_teacher_has_no_gradient() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5, 6)
    last = [one.to(memory_format=torch.channels_last_3d).requires_grad_() for one in (student, teacher)]
    value = softened_divergence(*last, 2.0)
    torch.testing.assert_close(value, softened_divergence(student, teacher, 2.0))
    value.sum().backward()
    assert last[0].grad is not None
    assert last[1].grad is None
