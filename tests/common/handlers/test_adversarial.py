# SPDX-License-Identifier: Apache-2.0
"""A discriminator beside the student: order of steps, resuming, batches without labels, divergence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn
from torch.nn.utils import parametrize

import toys
from medkd.handlers.adversarial import DiscriminatorDivergedError, DiscriminatorTraining
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.cpu_autocast import CpuAutocast
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.gradient_norms import GradientNorms
from medkd.handlers.nan_guard import NanGuard
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.records import step_losses
from medkd.handlers.teacher import Teacher
from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.discriminator import Discriminator, discriminator_loss
from medkd.losses.ignoring import IgnoringLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.ops.ignored import UNLABELED

WEIGHTS = {"logits": 0.5, "adversarial": 0.1}
FORMS = ["wgan_gp", "hinge"]


@dataclass
class Training:
    """A student and a discriminator with an optimizer each, and what their run ends with."""

    network: nn.Module
    discriminator: Discriminator
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    trainer: Any

    def result(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(), "discriminator": self.discriminator.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
        }


def training(
    *extra: Any, folder: Path | None = None, form: str = "wgan_gp", weights: Mapping[str, float] = WEIGHTS,
    rate: float = 1e-3, epochs: int = 4, resume: Any = False, saved: bool = True, power: float = 0.9, **options: Any,
) -> Training:
    """Two steps per epoch, with augmentation and dropout."""
    torch.manual_seed(5)
    network, discriminator = toys.student(), Discriminator(2, 2, width=4, layers=1)
    loss = AdversarialLoss(discriminator, "paper", form)   # type: ignore[arg-type]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    own = torch.optim.Adam(discriminator.parameters(), rate, betas=(0.9, 0.99))
    objects = {"network": network, "optimizer": optimizer}
    objects |= {"discriminator": discriminator, "discriminator_optimizer": own} if saved else {}
    handlers = [
        EpochSeed(3), DistillationHandler(Teacher(toys.teacher), [SoftLabelLoss(), loss], weights), NanGuard(),
        DiscriminatorTraining(loss, own, power), *extra,
        *([] if folder is None else [CheckpointHandler(folder, objects, resume=resume)]),
    ]
    trainer = toys.make_trainer(network, handlers, optimizer=optimizer, epochs=epochs, **options)
    return Training(network, discriminator, (optimizer, own), trainer)


def run(*extra: Any, **options: Any) -> Training:
    made = training(*extra, **options)
    made.trainer.run()
    return made


def stop(engine: Any) -> None:
    raise KeyboardInterrupt


# ---- a step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_discriminator_takes_one_step_on_the_predictions_of_the_students(form: str) -> None:
    seen: dict[str, Any] = {}

    def remember(engine: Any) -> None:
        if engine.state.iteration == 1:
            seen["teacher"] = engine.state.teacher["pred"].clone()
            seen["pred"] = engine.state.student["pred"].detach().clone()

    def after(engine: Any) -> None:
        seen["output"] = dict(engine.state.output)
        engine.terminate()

    made = training(form=form)
    made.trainer.add_event_handler(DistillationEvents.TEACHER_COMPLETED, remember)
    made.trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, after)
    made.trainer.run()
    twin = Discriminator(2, 2, width=4, layers=1).train()
    optimizer = torch.optim.Adam(twin.parameters(), 1e-3, betas=(0.9, 0.99))
    values = discriminator_loss(
        twin, seen["teacher"], seen["pred"], form, torch.Generator().manual_seed(1)   # type: ignore[arg-type]
    )
    values["loss"].backward()
    optimizer.step()
    assert toys.same(made.discriminator.state_dict(), twin.state_dict())
    for name in ("loss", "teacher", "student", "penalty"):
        assert torch.equal(seen["output"][f"discriminator/{name}"], values[name].detach())
    twin = Discriminator(2, 2, width=4, layers=1).eval()           # as it was in the student's step
    torch.testing.assert_close(seen["output"]["kd/adversarial"], -twin(seen["pred"]).mean().detach())


def test_a_step_of_the_student_leaves_the_discriminator_as_it_is_and_the_other_way_round() -> None:
    seen: list[Any] = []

    def note(engine: Any) -> None:
        seen.append((toys.state_of(engine.network), toys.state_of(made.discriminator)))

    made = training(toys.on(Events.ITERATION_COMPLETED, note))
    made.trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, note)
    made.trainer.run()
    assert all(one.grad is None and not one.requires_grad for one in made.discriminator.parameters())
    assert not made.discriminator.training
    for (_, before), (_, after) in zip(seen[::2], seen[1::2], strict=True):
        assert not toys.same(before, after)
    for (_, before), (_, after) in zip(seen[1::2], seen[2::2], strict=False):
        assert toys.same(before, after)                            # the student's forward passes do not iterate


def test_the_rate_falls_with_the_steps_alone() -> None:
    made, rates = training(), []
    made.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: rates.append(made.optimizers[1].param_groups[0]["lr"])
    )
    made.trainer.run()
    assert rates == pytest.approx([1e-3 * (1 - step / 8) ** 0.9 for step in range(8)])


def test_without_a_weight_it_equals_training_without_a_discriminator_bit_for_bit() -> None:
    made = run(weights={"logits": 0.5, "adversarial": 0.0})
    assert toys.same(made.discriminator.state_dict(), Discriminator(2, 2, width=4, layers=1).state_dict())
    torch.manual_seed(5)
    network = toys.student()
    plain = [EpochSeed(3), DistillationHandler(Teacher(toys.teacher), SoftLabelLoss(), {"logits": 0.5})]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    toys.make_trainer(network, plain, optimizer=optimizer, epochs=4).run()
    assert toys.same(made.network.state_dict(), network.state_dict())


def test_the_students_random_numbers_are_those_of_a_run_without_a_discriminator() -> None:
    """With a weight so small that it is lost, the student ends where it would have ended."""
    tiny, none = (run(weights={"logits": 0.5, "adversarial": weight}) for weight in (1e-30, 0.0))
    assert toys.same(tiny.network.state_dict(), none.network.state_dict())
    assert not toys.same(tiny.discriminator.state_dict(), none.discriminator.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_it_works_without_any_label(form: str) -> None:
    cases = [{**case, "label": torch.full_like(case["label"], UNLABELED)} for case in toys.cases()]
    supervised = IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    outputs: list[dict[str, Tensor]] = []
    note = toys.on(IterationEvents.BACKWARD_COMPLETED, lambda engine: outputs.append(dict(engine.state.output)))
    made = run(note, form=form, data=cases, loss_function=supervised, epochs=2)
    assert all(output["supervised_loss"] == 0 and output["kd/adversarial"] != 0 for output in outputs)
    assert all(output["discriminator/loss"].isfinite() for output in outputs)
    told = ["discriminator/loss", "discriminator/penalty", "discriminator/student", "discriminator/teacher"]
    assert list(step_losses(outputs[0])) == [*told, "kd/adversarial", "kd/logits", "loss", "supervised_loss"]
    assert not toys.same(made.discriminator.state_dict(), Discriminator(2, 2, width=4, layers=1).state_dict())


def test_a_batch_of_cases_with_and_without_labels_shows_all_of_them() -> None:
    cases = toys.cases()
    cases[1] = {**cases[1], "label": torch.full_like(cases[1]["label"], UNLABELED)}
    sizes: list[int] = []
    supervised = IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    made = training(data=cases, loss_function=supervised, epochs=1)
    made.discriminator.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    made.trainer.run()
    assert sizes == [2, 4, 2] * 2                                  # the student's; both networks'; mixtures


def test_epochs_are_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "medkd"):
        run(epochs=2)
    lines = [record.getMessage() for record in caplog.records if "discriminator" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]
    assert "mean scores" in lines[0]


def test_its_pull_is_measured_and_balanced_like_that_of_any_term() -> None:
    seen: list[Mapping[str, float]] = []
    norms = GradientNorms(interval_epochs=1, balance={"adversarial": 0.2}, steps=2)
    note = toys.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(dict(engine.state.gradient_norms)))
    run(norms, note)
    assert all(one["adversarial"] > 0 for one in seen)
    assert norms.state_dict()["factors"]["adversarial"] > 0


def test_ranks_take_the_mean_gradient_have_the_same_discriminator_and_stop_together(tmp_path: Path) -> None:
    toys.finish(*(toys.start(toys.discriminate_one_rank, rank, 2, tmp_path) for rank in range(2)))
    first, second = (torch.load(tmp_path / f"result_{rank}.pt") for rank in range(2))
    for form in FORMS:
        (shown, weights, stopped), (other_shown, other, other_stopped) = first[form], second[form]
        assert toys.same(weights, other)
        assert not toys.same(shown, other_shown)
        assert stopped
        assert other_stopped                                       # although only one of them has large scores
        twin = Discriminator(2, 2, width=4, layers=1).train()
        with parametrize.cached():                                 # one iteration of the normalization
            losses = [
                discriminator_loss(twin, *pair, form, torch.Generator().manual_seed(1 + 1_000_003 * rank))["loss"]   # type: ignore[arg-type]
                for rank, pair in enumerate((shown, other_shown))
            ]
        torch.stack(losses).mean().backward()
        torch.optim.SGD(twin.parameters(), 0.1).step()
        torch.testing.assert_close(weights, dict(twin.state_dict()))


@pytest.mark.parametrize("form", FORMS)
def test_its_step_is_in_float32_where_the_networks_compute_in_bfloat16(form: str) -> None:
    seen: dict[str, Any] = {}

    def remember(engine: Any) -> None:
        if engine.state.iteration == 1:
            seen["teacher"], seen["pred"] = engine.state.teacher["pred"], engine.state.student["pred"].detach()
        elif "result" not in seen:
            seen["result"] = toys.state_of(made.discriminator)

    made = training(CpuAutocast("bfloat16"), form=form, epochs=1)
    made.trainer.add_event_handler(DistillationEvents.TEACHER_COMPLETED, remember)
    made.trainer.run()
    assert seen["teacher"].dtype == torch.bfloat16
    twin = Discriminator(2, 2, width=4, layers=1).train()
    optimizer = torch.optim.Adam(twin.parameters(), 1e-3, betas=(0.9, 0.99))
    shown = seen["teacher"].float(), seen["pred"].float()
    discriminator_loss(twin, *shown, form, torch.Generator().manual_seed(1))["loss"].backward()   # type: ignore[arg-type]
    optimizer.step()
    assert toys.same(seen["result"], twin.state_dict())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epoch", [2, 4])
def test_a_resumed_run_ends_bit_identical(tmp_path: Path, form: str, epoch: int) -> None:
    expected = run(form=form, folder=tmp_path / "whole").result()
    with pytest.raises(KeyboardInterrupt):
        run(toys.on(Events.ITERATION_STARTED(once=2 * epoch), stop), form=form, folder=tmp_path / "broken")
    found = run(form=form, folder=tmp_path / "broken", resume=True).result()
    assert toys.same(found, expected)
    other = run(form=form, folder=tmp_path / "other", rate=2e-3).result()
    assert not toys.same(other["discriminator"], expected["discriminator"])   # the comparison would see a difference
    assert not toys.same(other["network"], expected["network"])


def test_a_checkpoint_without_the_discriminator_is_refused(tmp_path: Path) -> None:
    way_out = r'got no Discriminator, which learns or remembers: .* "discriminator": \.\.\., "discriminator_optimizer"'
    with pytest.raises(ValueError, match=way_out):
        run(folder=tmp_path, saved=False)


def test_an_optimizer_that_is_not_saved_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = training(epochs=1)
    saver = CheckpointHandler(
        tmp_path, {"network": made.network, "optimizer": made.optimizers[0], "discriminator": made.discriminator}
    )
    saver.attach(made.trainer)
    with caplog.at_level(logging.WARNING, "medkd"):
        made.trainer.run()
    assert "`objects` has no discriminator_optimizer of this trainer" in caplog.text


def test_another_rate_is_refused_or_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(toys.on(Events.ITERATION_STARTED(once=6), stop), folder=tmp_path)
    with pytest.raises(ValueError, match="must be made with the settings and data of this run"):
        run(folder=tmp_path, resume=True, rate=5e-3)
    made = run(folder=tmp_path, resume="changed", rate=5e-3)
    assert made.optimizers[1].param_groups[0]["lr"] == pytest.approx(5e-3 * (1 / 8) ** 0.9)
    assert all(state["step"] == 8 for state in made.optimizers[1].state.values())


# ---- divergence ----------------------------------------------------------------------------------------------------


def spoil(change: Callable[[Discriminator], None], form: str = "wgan_gp") -> Training:
    """Change a discriminator before its third step."""
    made = training(form=form)
    made.trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: change(made.discriminator))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_run_away_name_the_discriminator_and_leave_it_as_it_was(form: str) -> None:
    def enlarge(discriminator: Discriminator) -> None:
        with torch.no_grad():
            discriminator.body[-1].weight.mul_(1e8)

    made = spoil(enlarge, form)
    kept: list[dict[str, Tensor]] = []
    made.trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED,
        lambda _: kept.append({name: one.detach().clone() for name, one in made.discriminator.named_parameters()}),
    )
    message = "but it diverged in step 3: loss .* Lower the rate of its .*"
    message += "`adversarial`, or take the form 'hinge'." if form == "wgan_gp" else "`adversarial`.$"
    with pytest.raises(DiscriminatorDivergedError, match=message):
        made.trainer.run()
    assert toys.same(kept[-1], {name: one.detach() for name, one in made.discriminator.named_parameters()})


def test_a_gradient_that_is_not_finite_names_the_discriminator() -> None:
    made = training()
    parameter = made.discriminator.body[-1].bias
    made.trainer.add_event_handler(
        Events.ITERATION_STARTED(once=2),
        lambda _: parameter.requires_grad_(True).register_hook(lambda slope: slope * float("nan")),
    )
    with pytest.raises(DiscriminatorDivergedError, match="gradient norm nan"):
        made.trainer.run()


def test_a_term_that_is_not_finite_is_named_before_anything_changes() -> None:
    def poison(discriminator: Discriminator) -> None:
        with torch.no_grad():
            discriminator.body[-1].bias.fill_(float("nan"))

    with pytest.raises(RuntimeError, match="kd/adversarial = nan"):
        spoil(poison).trainer.run()


# ---- wrong use -----------------------------------------------------------------------------------------------------


def test_it_stands_behind_a_distillation_handler_with_its_loss() -> None:
    discriminator = Discriminator(2, 2, width=4, layers=1)
    loss, optimizer = AdversarialLoss(discriminator), torch.optim.Adam(discriminator.parameters())
    with pytest.raises(ValueError, match="must stand behind a `DistillationHandler` .* got none before"):
        toys.make_trainer(toys.student(), [DiscriminatorTraining(loss, optimizer)])
    handler = DistillationHandler(Teacher(toys.teacher), SoftLabelLoss())
    with pytest.raises(ValueError, match="got one without it"):
        toys.make_trainer(toys.student(), [handler, DiscriminatorTraining(loss, optimizer)])


def test_a_discriminator_that_nobody_trains_ends_the_run() -> None:
    loss = AdversarialLoss(Discriminator(2, 2, width=4, layers=1))
    handler = DistillationHandler(Teacher(toys.teacher), loss, {"adversarial": 0.1})
    with pytest.raises(RuntimeError, match="`AdversarialLoss` must have a discriminator that is trained in each step"):
        toys.make_trainer(toys.student(), [handler]).run()


def test_wrong_options_are_refused() -> None:
    discriminator = Discriminator(2, 2, width=4, layers=1)
    loss, optimizer = AdversarialLoss(discriminator, "paper"), torch.optim.Adam(discriminator.parameters())
    assert DiscriminatorTraining(loss, optimizer).penalty == 10.0
    with pytest.raises(ValueError, match="`penalty` must be None for the form 'hinge', which has none, got 10.0"):
        DiscriminatorTraining(AdversarialLoss(discriminator), optimizer, penalty=10.0)
    for options in ({"power": -1.0}, {"weight": 0.0}, {"weight": float("inf")}, {"penalty": -1.0}):
        with pytest.raises(ValueError, match="`power` and `penalty` must be at least 0 and `weight` above, got"):
            DiscriminatorTraining(loss, optimizer, **options)   # type: ignore[arg-type]
    parts = list(discriminator.parameters())
    for held in (parts[1:], [*parts, nn.Parameter(torch.zeros(1))]):
        with pytest.raises(ValueError, match=r"`optimizer` must hold the \d+ parameters of the discriminator and no"):
            DiscriminatorTraining(loss, torch.optim.Adam(held))
