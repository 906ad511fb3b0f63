# SPDX-License-Identifier: Apache-2.0
"""A pair of images that cannot be of one tissue stops the run before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ignite.engine import Events

import toys
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.pairing_check import PairingCheck
from medkd.inference.degradation import PairResolutionsd
from medkd.losses.logits import SoftLabelLoss


def paired(scale: int, mode: str = "native") -> list[dict[str, Any]]:
    return [PairResolutionsd(scale, mode)({"image": case["image"], "label": case["label"]}) for case in toys.cases(2)]


def run(check: PairingCheck, data: Sequence[dict[str, Any]], *handlers: Any) -> Any:
    engine = toys.make_trainer(toys.student(), [*handlers, check], data=data)
    engine.run()
    return engine


@pytest.mark.parametrize("mode", ["native", "upsampled"])
def test_a_pair_of_the_transform_passes_and_is_distilled(mode: str) -> None:
    data = paired(2, mode)
    if mode == "native":                                            # a student that is compared on its own grid
        data = [case | {"label": case["label"][:, ::2, ::2]} for case in data]
        run(PairingCheck((2, 2), mode, stride=3), data)
    else:
        handler, terms = DistillationHandler(toys.Bright(), SoftLabelLoss(), teacher_input="teacher_image"), []
        note = toys.on(
            DistillationEvents.TERMS_COMPLETED, lambda engine: terms.append(float(engine.state.output["kd/logits"]))
        )
        run(PairingCheck((2, 2), mode), data, handler, note)
        assert min(terms) > 0


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (PairingCheck(4), r"`teacher_image` must have \(4, 4\) times `image`, \(24, 24\) for \(6, 6\) .*\(12, 12\)"),
        (PairingCheck((2, 1)), r"must have \(2, 1\) times `image`, \(12, 6\) for \(6, 6\)"),
        (PairingCheck(2, "upsampled"), r"`teacher_image` must have the size of `image`, \(6, 6\) .* got \(12, 12\)"),
        (PairingCheck((2, 2, 2)), r"`scale` must have a number for each of 2 spatial axes, got \(2, 2, 2\)"),
        (PairingCheck(2, stride=4), r"`image` must be divisible by the stride \(4, 4\) .* got \(6, 6\)"),
        (PairingCheck(2, stride=[3, 4]), r"`image` must be divisible by the stride \(3, 4\) .* got \(6, 6\)"),
        (PairingCheck(2, stride=[3, 3, 3]), r"`stride` must have a number for each of 2 spatial axes"),
    ],
)
def test_sizes_that_do_not_fit_stop_the_run(check: PairingCheck, message: str) -> None:
    network = toys.student()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    with pytest.raises(ValueError, match=message):
        toys.make_trainer(network, [check], data=paired(2)).run()
    assert toys.same(before, dict(network.named_parameters()))


def test_a_missing_key_is_told_with_those_that_are_there() -> None:
    data = [{"image": torch.rand(1, 6, 6), "label": torch.zeros(1, 6, 6)}]
    with pytest.raises(KeyError, match=r"`teacher_image` must be in the batch, got the keys \['image', 'label'\]"):
        run(PairingCheck(2), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": 0}, "`scale` must be whole numbers of 1 or more"), ({"scale": [2.0, 2]}, "`scale` must be whole"),
     ({"scale": 2, "mode": "pyramid"}, "`mode` must be one of native, upsampled, got 'pyramid'"),
     ({"scale": 2, "stride": 0}, "`stride` must be whole numbers")],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairingCheck(**options)


def test_a_run_that_goes_on_is_looked_at_again() -> None:
    """Its steps are counted from where the run before it ended."""
    check = PairingCheck(2)
    resumed = toys.on(Events.STARTED, lambda engine: setattr(engine.state, "iteration", 1))
    for _ in range(2):
        with pytest.raises(ValueError, match="`teacher_image` must have"):
            run(check, paired(2, "upsampled"), resumed)
