# SPDX-License-Identifier: Apache-2.0
"""What the methods compare in the same way: an operation with its plain formula, a distillation step with its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lab.measure import Row, Work, compare, kept_memory, peak_memory
from medkd.losses.base import DistillationLoss

TOLERANCE = 1e-5    # relative, of values and gradients
MEBI = 2.0**20
Function = Callable[[Tensor], Tensor]
Forward = Callable[[], dict[str, Tensor]]


def value_and_gradient(function: Function, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward, and backward from a slope over the values."""
    value = function(leaf)
    pull = torch.linspace(1.0, -1.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad(value, leaf, pull)[0]


def relative_errors(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Give those of value and gradient."""
    errors = [float((mine - other).norm() / other.norm()) for mine, other in zip(found, right, strict=True)]
    return dict(zip(("value", "gradient"), errors, strict=True))


def error_rows(name: str, subject: str, errors: Mapping[str, float]) -> list[Row]:
    """Give a row for each relative error, which should be within the tolerance."""
    return [
        Row(f"{name}_{of}", subject, None, error, None, None, "lower", TOLERANCE, error <= TOLERANCE, "relative", None)
        for of, error in errors.items()
    ]


def against(
    name: str, words: tuple[str, str], functions: tuple[Function, Function], leaf: Tensor, pairs: int,
    goal: float | None = None,
) -> list[Row]:
    """Compare forward and backward to `leaf`, after seeing that both give the same value and gradient."""
    works = partial(value_and_gradient, functions[0], leaf), partial(value_and_gradient, functions[1], leaf)
    for what, error in relative_errors(works[0](), works[1]()).items():
        if error > TOLERANCE:
            raise RuntimeError(f"{name}: the {what} is off by {error:.1e} of it, more than {TOLERANCE:.0e}.")
    return compare(name, words, works, pairs, goal=goal)


def both_ways(function: Function, leaf: Tensor) -> Tensor:
    """Run forward, and backward from the sum; gives the gradient."""
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def memory_rows(
    names: tuple[str, str], subject: str, function: Function, leaf: Tensor, goal: float | None = None
) -> list[Row]:
    """Give what a function keeps for backward beyond a layer, and its peak with the layer's gradient.

    Args:
        names: what rows are called, `<first>_kept_<second>` and `<first>_peak_<second>`.
        subject: what is measured, in words.
        function: of the layer.
        leaf: the layer.
        goal: MiB that may be kept; the peak may have 1.2 times the layer more.
    """
    size = leaf.numel() * leaf.element_size() / MEBI
    peak_goal = None if goal is None else goal + 1.2 * size
    kept, peak = kept_memory(partial(function, leaf)), peak_memory(partial(both_ways, function, leaf))
    measured = (
        ("kept", "kept for backward beyond the layer", kept, goal),
        ("peak", f"peak, with a gradient of {size:.1f} MiB", peak, peak_goal),
    )
    return [
        Row(f"{names[0]}_{what}_{names[1]}", f"{subject}: {words}", None, value, None, None, "lower", most,
            None if most is None else value <= most, "MiB", None)
        for what, words, value, most in measured
    ]


def step_works(
    student: Forward, teacher: Forward, supervised: Callable[[Tensor, Tensor], Tensor], loss: DistillationLoss,
    label: Tensor,
) -> tuple[Work, Work]:
    """Give a distillation step without the optimizer, and what it cannot do without: plain step, teacher's forward."""

    def distilled() -> None:
        own = student()
        terms = loss(own, teacher(), label)
        weighted = (loss.preset_weights[name] * value for name, value in terms.items())
        torch.autograd.backward(sum(weighted, start=supervised(own["pred"], label)))

    def apart() -> None:
        own = student()
        teacher()
        torch.autograd.backward(supervised(own["pred"], label))

    return distilled, apart
