# SPDX-License-Identifier: Apache-2.0
"""How strongly each part of the loss pulls at the student, and weights that follow from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn

import toys
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.gradient_norms import GradientNorms
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.schedule import WeightSchedule
from medkd.handlers.teacher import Teacher
from medkd.losses.base import DistillationLoss
from medkd.losses.ignoring import IgnoringLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.soft_target import SoftTargetLoss
from medkd.ops.ignored import UNLABELED

WEIGHTS = {"logits": 0.5, "soft_target": 2.0}
Norms = dict[str, float]


def distil(weights: Mapping[str, float] | None = None, *more: DistillationLoss) -> DistillationHandler:
    losses = [SoftLabelLoss(), SoftTargetLoss(), *more]
    return DistillationHandler(Teacher(toys.teacher), losses, WEIGHTS if weights is None else weights)


def run(*handlers: Any, network: nn.Module | None = None, epochs: int = 2, **options: Any) -> Any:
    """Two steps per epoch, always the same ones."""
    torch.manual_seed(4)
    engine = toys.make_trainer(toys.student() if network is None else network, handlers, epochs=epochs, **options)
    engine.run()
    return engine


def watched(norms: GradientNorms, *more: Any, **options: Any) -> tuple[list[Norms], list[Norms], Any]:
    """Norms and factors of each step, before the next one; and the engine."""
    seen: list[Norms] = []
    factors: list[Norms] = []

    def note(engine: Any) -> None:
        seen.append(dict(engine.state.gradient_norms))
        factors.append(norms.state_dict()["factors"])

    engine = run(options.pop("distil", distil()), *more, norms, toys.on(Events.ITERATION_COMPLETED, note), **options)
    return seen, factors, engine


def without_labels() -> list[dict[str, Tensor]]:
    return [{**case, "label": torch.full_like(case["label"], UNLABELED)} for case in toys.cases()]


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_the_norms_are_those_of_a_backward_pass_of_each_part_alone() -> None:
    expected: list[Norms] = []

    def measure(engine: Any) -> None:
        state, parameters = engine.state, list(engine.network.parameters())
        parts = {"supervised": state.supervised, **state.terms}
        grads = {
            name: torch.autograd.grad(part, parameters, retain_graph=True, materialize_grads=True)
            for name, part in parts.items()
        }
        expected.append({name: float(torch.cat([g.flatten() for g in found]).norm()) for name, found in grads.items()})

    norms = GradientNorms(interval_epochs=1)
    seen, _, _ = watched(norms, toys.on(DistillationEvents.TERMS_COMPLETED, measure))
    assert list(expected[0]) == ["supervised", "logits", "soft_target"]
    assert all(value > 0 for value in expected[0].values())
    assert [seen[0], seen[2]] == [pytest.approx(expected[0], rel=1e-5), pytest.approx(expected[2], rel=1e-5)]
    assert seen[1] == seen[0]                                      # stays until the next measurement


def test_a_line_of_the_log_tells_norm_weight_and_share_in_the_first_step_of_each_interval(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "medkd"):
        seen, _, _ = watched(GradientNorms(interval_epochs=2), WeightSchedule(0.5), epochs=4)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Gradient norms")]
    assert [line.split(":")[0] for line in lines] == ["Gradient norms of step 1", "Gradient norms of step 5"]
    first = seen[0]
    shares = [100 * WEIGHTS[term] * first[term] / first["supervised"] for term in ("logits", "soft_target")]
    logits, soft = (f"{share:.3g}" if share < 100 else f"{share:.0f}" for share in shares)
    assert lines[0] == (
        f"Gradient norms of step 1: supervised {first['supervised']:.3g}; logits {first['logits']:.3g} x 0.5 = "
        f"{logits} %; soft_target {first['soft_target']:.3g} x 2 = {soft} %"
    )


@pytest.mark.parametrize("interval", [1, 2])
def test_measuring_leaves_the_training_as_it_is_bit_for_bit(interval: int, tmp_path: Path) -> None:
    """With dropout, batch statistics, learnable heads and a memory of past images."""
    results = []
    for extra in ([], [GradientNorms(interval)]):
        torch.manual_seed(1)
        training = toys.Run(tmp_path / str(len(extra)), epochs=3, extra=extra, memory=True)
        training.trainer.run()
        results.append(training.result())
    assert toys.same(*results)


def test_the_graph_does_not_outlive_the_step() -> None:
    engine = run(distil(), GradientNorms())
    assert engine.state.terms is None
    assert engine.state.supervised is None


def test_without_a_label_shares_are_those_of_the_largest_term(caplog: pytest.LogCaptureFixture) -> None:
    loss = IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    with caplog.at_level(logging.INFO, "medkd"):
        seen, _, _ = watched(GradientNorms(), data=without_labels(), loss_function=loss)
    assert seen[0]["supervised"] == 0
    line = next(record.getMessage() for record in caplog.records if "Gradient norms" in record.getMessage())
    assert "supervised 0, shares of the largest term; logits" in line
    assert line.endswith("x 2 = 100 %")


@pytest.mark.parametrize("weights", [{}, {"logits": 0.0}])
def test_where_nothing_is_distilled_nothing_is_measured(weights: Mapping[str, float]) -> None:
    seen, factors, engine = watched(GradientNorms(balance={"logits": 1.0}), distil=distil(weights))
    assert seen == [{}] * 4
    assert factors == [{}] * 4
    assert toys.same(engine.network.state_dict(), run().network.state_dict())


def test_a_term_without_a_gradient_has_the_norm_zero() -> None:
    class Constant(DistillationLoss):
        terms = ("constant",)

        def compute_terms(self, student: Any, teacher: Any, label: Tensor | None) -> dict[str, Tensor]:
            return {"constant": student["pred"].new_zeros(())}

    seen, _, _ = watched(GradientNorms(), distil=distil({**WEIGHTS, "constant": 1.0}, Constant()))
    assert seen[0]["constant"] == 0
    assert seen[0]["logits"] > 0


# ---- balancing -----------------------------------------------------------------------------------------------------


def test_a_balanced_term_has_its_share_of_the_supervised_gradient_over_the_first_steps() -> None:
    seen, factors, engine = watched(GradientNorms(balance={"logits": 0.3}, steps=3), epochs=4)
    mean = {name: sum(one[name] for one in seen[:3]) / 3 for name in seen[0]}
    assert 0.5 * factors[2]["logits"] * mean["logits"] == pytest.approx(0.3 * mean["supervised"])
    assert factors[0]["logits"] == pytest.approx(0.3 * seen[0]["supervised"] / (0.5 * seen[0]["logits"]))
    assert factors[3:] == [factors[2]] * 5
    assert engine.state.distill_balance == {"logits": factors[2]["logits"], "soft_target": 1.0}


def test_the_factor_and_the_ramp_of_a_schedule_multiply_each_other_and_the_weight() -> None:
    seen: list[dict[str, Any]] = []

    def note(engine: Any) -> None:
        state = engine.state
        seen.append({**state.output, "ramp": dict(state.distill_factors), "balance": dict(state.distill_balance)})

    norms = GradientNorms(balance={"logits": 0.3}, steps=1)
    _, factors, _ = watched(norms, WeightSchedule(1.0), toys.on(DistillationEvents.TERMS_COMPLETED, note))
    assert [one["balance"]["logits"] for one in seen] == [1.0] + [factors[0]["logits"]] * 3
    assert [one["ramp"]["logits"] for one in seen] == [0.25, 0.5, 0.75, 1.0]
    for one in seen:
        terms = (one["ramp"][t] * one["balance"][t] * WEIGHTS[t] * one[f"kd/{t}"] for t in WEIGHTS)
        torch.testing.assert_close(one["loss"].detach(), one["supervised_loss"] + sum(terms))


def test_the_log_has_weights_with_the_factor(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "medkd"):
        _, factors, _ = watched(GradientNorms(1, {"logits": 0.3}, steps=2))
    messages = [record.getMessage() for record in caplog.records]
    told = {"logits": f"{factors[1]['logits']:.4g}"}
    assert f"Factors that balance the terms from step 3 on: {told}" in messages
    line = next(message for message in messages if message.startswith("Gradient norms of step 3"))
    assert f"x {0.5 * factors[1]['logits']:.3g} =" in line


def test_without_a_label_the_reference_is_the_largest_term_that_is_not_balanced() -> None:
    loss = IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    options: dict[str, Any] = {"data": without_labels(), "loss_function": loss}
    seen, factors, _ = watched(GradientNorms(balance={"logits": 0.3}, steps=1), **options)
    expected = 0.3 * 2.0 * seen[0]["soft_target"] / (0.5 * seen[0]["logits"])
    assert factors[0] == {"logits": pytest.approx(expected)}
    both = GradientNorms(balance={"logits": 0.3, "soft_target": 1.0}, steps=1)
    seen, factors, _ = watched(both, **options)
    pulls = {term: weight * seen[0][term] for term, weight in WEIGHTS.items()}
    largest = max(pulls.values())
    assert factors[0]["logits"] * pulls["logits"] == pytest.approx(0.3 * largest)
    assert factors[0]["soft_target"] * pulls["soft_target"] == pytest.approx(largest)


def test_a_term_without_a_gradient_keeps_its_weight_and_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Flat(DistillationLoss):
        terms = ("flat",)

        def compute_terms(self, student: Any, teacher: Any, label: Tensor | None) -> dict[str, Tensor]:
            return {"flat": (student["pred"] * 0.0).sum()}

    with caplog.at_level(logging.WARNING, "medkd"):
        _, factors, engine = watched(
            GradientNorms(balance={"flat": 0.3}, steps=2), distil=distil({**WEIGHTS, "flat": 1.0}, Flat())
        )
    assert factors[-1] == {}
    assert engine.state.distill_balance["flat"] == 1.0
    assert "Terms ['flat'] had no gradient in 2 steps: they keep their weights." in caplog.text


def test_a_step_whose_gradient_is_no_number_is_not_counted() -> None:
    class Broken(DistillationLoss):
        terms = ("broken",)
        steps = 0

        def compute_terms(self, student: Any, teacher: Any, label: Tensor | None) -> dict[str, Tensor]:
            self.steps += 1
            return {"broken": student["pred"].mean() * (float("nan") if self.steps == 2 else 1.0)}

    norms = GradientNorms(balance={"broken": 0.3}, steps=2)
    handlers = [distil({**WEIGHTS, "broken": 1.0}, Broken()), norms]
    measured: list[int] = []
    note = toys.on(Events.ITERATION_COMPLETED, lambda _: measured.append(norms.state_dict()["measured"]))
    still = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    run(*handlers, note, optimizer=still)
    assert measured == [1, 1, 2, 2]


# ---- resuming and ranks --------------------------------------------------------------------------------------------


def balanced(folder: Path, *extra: Any, listed: bool = True, resume: Any = False, share: float = 0.3) -> Any:
    """Six epochs of two steps with five measured ones, to be broken off in between; final weights and factors."""
    torch.manual_seed(4)
    network, norms = toys.student(), GradientNorms(2, {"logits": share}, steps=5)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    objects = {"network": network, "optimizer": optimizer, **({"gradient_norms": norms} if listed else {})}
    saver = CheckpointHandler(folder, objects, resume=resume)
    handlers = [EpochSeed(3), distil(), WeightSchedule(0.5), norms, *extra, saver]
    toys.make_trainer(network, handlers, epochs=6, optimizer=optimizer).run()
    return network.state_dict(), optimizer.state_dict(), norms.state_dict()


def stop(engine: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [2, 3, 5])
def test_a_resumed_run_ends_bit_identical_whether_the_factors_were_fixed_or_not(epoch: int, tmp_path: Path) -> None:
    whole = balanced(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        balanced(tmp_path / "broken", toys.on(Events.EPOCH_STARTED(once=epoch), stop))
    assert toys.same(balanced(tmp_path / "broken", resume=True), whole)


def test_the_factors_stand_beside_the_student(tmp_path: Path) -> None:
    state = balanced(tmp_path)[2]
    content = json.loads((tmp_path / "model.json").read_text())
    assert content["weights"] == WEIGHTS
    assert content["balance"] == state["factors"]


def test_a_checkpoint_that_lacks_the_factors_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "medkd"):
        balanced(tmp_path, listed=False)
    assert "`objects` has no gradient_norms of this trainer: a resumed run would start it anew. Add it." in caplog.text


def test_factors_of_another_balance_are_refused_and_measured_anew_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        balanced(tmp_path, toys.on(Events.EPOCH_STARTED(once=5), stop))
    with pytest.raises(ValueError, match=r"does not fit 'gradient_norms' .*`balance` must be that of the checkpoint"):
        balanced(tmp_path, resume=True, share=0.6)
    with caplog.at_level(logging.WARNING, "medkd"):
        state = balanced(tmp_path, resume="changed", share=0.6)[2]
    assert "gradient_norms starts anew" in caplog.text
    assert state["balance"] == {"logits": 0.6}
    assert state["measured"] == 4                                  # epochs 5 and 6


def test_ranks_take_the_mean_of_their_norms_and_have_the_same_factors(tmp_path: Path) -> None:
    toys.finish(*(toys.start(toys.balance_one_rank, rank, 2, tmp_path) for rank in range(2)))
    (own, told, factors, weights), other = (torch.load(tmp_path / f"result_{rank}.pt") for rank in range(2))
    assert own[0] != other[0][0]
    assert told[0]["supervised"] == pytest.approx((own[0] + other[0][0]) / 2, rel=1e-5)
    assert told == other[1]
    assert factors == other[2]
    assert factors["logits"] > 0
    assert toys.same(weights, other[3])


# ---- wrong use -----------------------------------------------------------------------------------------------------


def test_it_stands_behind_a_distillation_handler() -> None:
    with pytest.raises(ValueError, match="`GradientNorms` must stand behind a `DistillationHandler` in the list"):
        run(GradientNorms(), distil())


def test_a_term_that_is_not_there_or_has_no_weight_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="`balance` must name terms of the loss, got 'logit'; did you mean 'logits'"):
        run(distil(), GradientNorms(balance={"logit": 0.3}))
    with pytest.raises(ValueError, match="`balance` must name terms that have a weight, got 'logits' of weight 0"):
        run(distil({"soft_target": 1.0}), GradientNorms(balance={"logits": 0.3}))


@pytest.mark.parametrize("share", [0, -1.0, float("inf"), float("nan")])
def test_a_share_that_is_not_above_zero_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="`balance` must be finite shares above 0, got .* for 'logits'"):
        GradientNorms(balance={"logits": share})


@pytest.mark.parametrize("options", [{"interval_epochs": 0}, {"steps": 0}])
def test_intervals_and_steps_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`interval_epochs` and `steps` must be at least 1, got"):
        GradientNorms(**options)   # type: ignore[arg-type]


def test_a_compiled_network_that_cannot_run_backward_twice_is_told_of_with_the_way_out() -> None:
    class Compiled(torch.autograd.Function):
        """What torch.compile raises in some versions."""

        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> Tensor:
            raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")

    class Network(toys.ToyNetwork):
        def forward(self, image: Tensor) -> Tensor:
            value: Tensor = Compiled.apply(super().forward(image))   # type: ignore[no-untyped-call]
            return value

    with pytest.raises(RuntimeError, match="`GradientNorms` must run several .* set torch._functorch.config.donated"):
        run(distil(), GradientNorms(), network=Network(2))
