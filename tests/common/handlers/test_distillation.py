# SPDX-License-Identifier: Apache-2.0
"""The distillation handler on MONAI's trainer."""

from __future__ import annotations

import logging
import random
import re
import weakref
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

import toys
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.teacher import Teacher
from medkd.losses.base import DistillationLoss, TapPair, trainable_parameters
from medkd.losses.features import HintLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.soft_target import SoftTargetLoss

BOTH = {"logits": 0.5, "features": 2.0}


class Tapped(DistillationLoss):
    """Two simple terms of any taps; remembers which were asked for and what came."""

    terms = ("first", "second")

    def __init__(self, *pairs: TapPair) -> None:
        super().__init__(pairs)
        self.preset_weights = {"first": 1.0}
        self.labels: list[Tensor | None] = []
        self.asked: list[str] = []

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        self.labels.append(label)
        values = {"first": student["pred"].square().mean(), "second": teacher["pred"].mean() * student["pred"].mean()}
        self.asked += [term for term in values if term in self.active_terms]
        return {term: value for term, value in values.items() if term in self.active_terms}


def both_losses() -> list[DistillationLoss]:
    return [SoftLabelLoss(), toys.hint_loss()]


def a_handler(weights: Mapping[str, float] | None = None, **options: Any) -> DistillationHandler:
    options.setdefault("loss", both_losses())
    return DistillationHandler(Teacher(toys.teacher), weights=BOTH if weights is None else weights, **options)


def run(*handlers: Any, network: nn.Module | None = None, **options: Any) -> Any:
    """Train for a few steps; the engine, its network at `engine.network`."""
    options.setdefault("epochs", 1)
    engine = toys.make_trainer(toys.student() if network is None else network, handlers, **options)
    engine.run()
    return engine


def train_all(weights: Mapping[str, float] | None, workers: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The student and its optimizer's state after training next to both losses; no handler when `weights` is None."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    network, losses = toys.student(), both_losses()
    handlers = [] if weights is None else [a_handler(weights, loss=losses)]
    parameters = list(trainable_parameters(network, losses))
    engine = run(*handlers, network=network, parameters=parameters, workers=workers, epochs=2)
    return network.state_dict(), engine.optimizer.state_dict()


# ---- weights 0 is plain training -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_weights_of_zero_train_the_student_of_plain_training_bit_for_bit(workers: int) -> None:
    plain = train_all(None, workers)
    assert toys.same(plain, train_all({}, workers))
    assert toys.same(plain, train_all({"logits": 0.0, "features": 0}, workers))
    assert not toys.same(plain[0], train_all(BOTH, workers)[0])


def test_the_teacher_costs_the_training_no_random_number() -> None:
    """A term with a weight so small that it vanishes: the teacher is built, checked and run, and nothing changes."""
    validator = toys.make_evaluator(toys.student())
    check = {"metric": "val_mean_dice", "mode": "warn"}

    def train(*handlers: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return toys.state_of(run(*handlers).network)

    plain = train()
    assert toys.same(plain, train(a_handler({"logits": 1e-30}, validator=validator, teacher_check=check)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_building_and_starting_leaves_the_global_generators_untouched(workers: int) -> None:
    validator = toys.make_evaluator(toys.student(), workers=workers)
    states: list[Any] = []

    def note(_engine: Any = None) -> None:
        states.append((torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))   # type: ignore[index]

    network, losses = toys.student(), both_losses()
    engine = toys.make_trainer(network, parameters=list(trainable_parameters(network, losses)))
    note()
    check = {"metric": "val_mean_dice", "mode": "warn"}
    a_handler(loss=losses, validator=validator, teacher_check=check).attach(engine)
    toys.on(Events.STARTED, note).attach(engine)
    engine.run()
    assert toys.same(states[0], states[1])


def test_with_weights_of_zero_no_teacher_is_built() -> None:
    def build() -> nn.Module:
        raise AssertionError("the teacher was built")

    engine = run(DistillationHandler(Teacher(build), SoftLabelLoss(), {"logits": 0.0}))
    assert engine.state.distillation == {"mode": "supervised", "teacher": None, "teacher_sha256": None}
    assert engine.state.distill_weights == {"logits": 0.0}


# ---- terms and their sum -------------------------------------------------------------------------------------------


def test_the_loss_is_the_supervised_one_plus_the_weighted_unweighted_terms() -> None:
    seen: list[dict[str, Any]] = []
    factor = toys.on(Events.ITERATION_STARTED, lambda engine: engine.state.distill_factors.update(features=0.25))
    note = toys.on(DistillationEvents.TERMS_COMPLETED, lambda engine: seen.append(dict(engine.state.output)))
    run(a_handler(), factor, note)
    assert len(seen) == 2
    for output in seen:
        terms = {name: value for name, value in output.items() if name.startswith("kd/")}
        assert list(terms) == ["kd/logits", "kd/features"]
        assert all(value.dim() == 0 and value > 0 and not value.requires_grad for value in terms.values())
        expected = output["supervised_loss"] + 0.5 * 1.0 * terms["kd/logits"] + 2.0 * 0.25 * terms["kd/features"]
        assert torch.equal(output["loss"], expected)
        assert output["loss"].requires_grad
        assert not output["supervised_loss"].requires_grad


def test_a_term_has_the_value_that_its_loss_gives_for_both_networks() -> None:
    network, values = toys.student().eval(), []
    engine = toys.make_trainer(network, [a_handler({"logits": 1.0})], epochs=1)
    expert = toys.teacher().eval()

    @engine.on(DistillationEvents.TEACHER_COMPLETED)
    def note(engine: Any) -> None:
        image = engine.state.batch["image"]
        pred = {"pred": engine.state.output["pred"].as_tensor()}
        values.append(SoftLabelLoss()(pred, {"pred": expert(image).as_tensor()})["logits"].item())

    @engine.on(DistillationEvents.TERMS_COMPLETED)
    def compare(engine: Any) -> None:
        assert engine.state.output["kd/logits"].item() == values[-1]

    engine.run()
    assert len(values) == 2


def test_terms_survive_decollation_for_the_loggers() -> None:
    output = run(a_handler()).state.output
    assert isinstance(output, list)
    assert all({"loss", "supervised_loss", "kd/logits", "kd/features"} <= item.keys() for item in output)


def test_teacher_and_terms_are_told_in_order_between_forward_and_backward() -> None:
    order: list[str] = []
    events = [
        IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED, IterationEvents.BACKWARD_COMPLETED,
        *DistillationEvents,
    ]
    watchers = [toys.on(event, lambda _, name=event.name: order.append(name)) for event in events]
    run(a_handler(), *watchers, data=toys.cases(2))
    assert order == [
        "TEACHER_COMPLETED", "FORWARD_COMPLETED", "TERMS_COMPLETED", "LOSS_COMPLETED", "BACKWARD_COMPLETED",
    ]


def test_features_of_both_networks_are_there_when_the_teacher_is_done_and_gone_after_the_terms() -> None:
    seen: list[Any] = []

    def note(engine: Any) -> None:
        seen.append((engine.state.student, engine.state.teacher))

    watchers = [toys.on(event, note) for event in DistillationEvents]
    run(a_handler(), *watchers, data=toys.cases(2))
    mine, other = seen[0]
    assert mine.keys() == other.keys() == {toys.TAP, "pred"}
    assert mine[toys.TAP].shape == (2, toys.STUDENT_WIDTH, toys.SIZE, toys.SIZE)
    assert other[toys.TAP].shape == (2, toys.TEACHER_WIDTH, toys.SIZE, toys.SIZE)
    assert all(type(value) is Tensor for value in [*mine.values(), *other.values()])
    assert mine[toys.TAP].requires_grad
    assert not any(value.requires_grad for value in other.values())
    assert seen[1] == (None, None)


@pytest.mark.parametrize(("weights", "told"), [
    ({"soft_target": 1.0}, "cached"), ({"soft_target": 1.0, "logits": 0.5}, "live"), ({"logits": 0.5}, "live"),
])
def test_losses_that_read_classes_only_take_them_from_the_batch(weights: dict[str, float], told: str) -> None:
    teacher = toys.teacher().eval()
    with torch.no_grad():
        classes = [teacher(case["image"][None].as_tensor()).argmax(1).float() for case in toys.cases(2)]
    data = [{**case, "teacher_classes": one} for case, one in zip(toys.cases(2), classes, strict=True)]
    losses = [SoftTargetLoss(), SoftLabelLoss()]
    seen: list[Any] = []
    watcher = toys.on(DistillationEvents.TEACHER_COMPLETED, lambda engine: seen.append(engine.state.teacher))
    engine = run(a_handler(weights, loss=losses), watcher, data=data)
    assert engine.state.distillation["predictions"] == told
    assert seen[0].keys() == ({"classes"} if told == "cached" else {"pred"})
    plain = run(a_handler(weights, loss=losses), data=toys.cases(2))
    assert toys.same(engine.network.state_dict(), plain.network.state_dict())


def test_a_term_of_weight_zero_is_not_computed() -> None:
    loss = Tapped()
    engine = run(a_handler({"second": 1.0}, loss=loss))
    assert set(loss.asked) == {"second"}
    assert "kd/first" not in engine.state.output[0]


def test_a_loss_without_any_weight_is_not_called_and_needs_no_taps() -> None:
    unused = Tapped(("not.there", "not.there"))
    run(a_handler({"logits": 1.0}, loss=[SoftLabelLoss(), unused]))
    assert unused.asked == []


def test_weights_of_null_are_the_preset_of_each_loss() -> None:
    handler = DistillationHandler(toys.teacher(), [Tapped(), SoftLabelLoss()], None)
    assert handler.weights == {"first": 1.0, "second": 0.0, "logits": 1.0}


def test_a_learnable_head_is_trained_with_the_student() -> None:
    network, loss = toys.student(), toys.hint_loss()
    before = toys.state_of(loss)
    run(a_handler({"features": 1.0}, loss=loss), network=network, parameters=list(trainable_parameters(network, loss)))
    assert not toys.same(before, toys.state_of(loss))


def test_the_log_is_a_sum_that_is_true_even_when_factors_change(caplog: pytest.LogCaptureFixture) -> None:
    values: dict[str, list[float]] = {"loss": [], "supervised_loss": [], "kd/logits": []}
    ramp = toys.on(Events.ITERATION_STARTED, lambda e: e.state.distill_factors.update(logits=e.state.iteration / 2))
    note = toys.on(
        DistillationEvents.TERMS_COMPLETED,
        lambda engine: [of_steps.append(engine.state.output[name].item()) for name, of_steps in values.items()],
    )
    with caplog.at_level(logging.INFO, "medkd"):
        run(a_handler({"logits": 40.0}), ramp, note)
    line = next(text for text in caplog.messages if text.startswith("Epoch 1/1"))
    match = re.search(r"loss (\S+) = supervised (\S+) \+ (\S+) \(logits (\S+)\)$", line)
    assert match is not None
    loss, supervised, part, term = map(float, match.groups())
    assert [loss, supervised, term] == pytest.approx([sum(of_steps) / 2 for of_steps in values.values()], abs=1e-4)
    assert loss == pytest.approx(supervised + part, abs=2e-4)


def test_each_epoch_is_logged_with_the_exact_mean_of_its_own_steps(caplog: pytest.LogCaptureFixture) -> None:
    """A float32 sum would lose the 1; a run that broke off before must leave nothing."""
    values = iter([2.0**24, 2.0**24, 1.0, 30.0, 41.0])

    def loss(pred: Tensor, _label: Tensor) -> Tensor:
        return pred.sum() * 0.0 + next(values)

    def stop(_engine: Any) -> None:
        raise RuntimeError("power failure")

    handler = a_handler({"logits": 1.0})
    with pytest.raises(RuntimeError, match="power failure"):
        run(handler, toys.on(IterationEvents.BACKWARD_COMPLETED, stop), loss_function=loss)
    with caplog.at_level(logging.INFO, "medkd"):
        run(handler, loss_function=loss, epochs=2)
    logged = re.findall(r"Epoch (\d)/2: loss \S+ = supervised (\S+) ", caplog.text)
    assert logged == [("1", "8388608.5000"), ("2", "35.5000")]


def test_the_graph_of_a_step_is_gone_with_the_step() -> None:
    """Sums over an epoch that keep graphs fill the memory."""

    class Kept(torch.autograd.Function):
        graphs: list[weakref.ref[Any]] = []

        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            ctx.mark = Tapped()
            Kept.graphs.append(weakref.ref(ctx.mark))
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    alive: list[int] = []
    note = toys.on(Events.ITERATION_COMPLETED, lambda _: alive.append(sum(one() is not None for one in Kept.graphs)))
    run(a_handler(), note, loss_function=lambda pred, label: Kept.apply(pred.square().mean()), data=toys.cases(8))
    assert max(alive) <= 2                                         # of the last step and this one
    assert len(Kept.graphs) == 4


# ---- wrong arguments -----------------------------------------------------------------------------------------------


def test_two_losses_with_one_term_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`loss` must list losses with distinct terms, got \['logits', 'logits'\]"):
        a_handler(loss=[SoftLabelLoss(), SoftLabelLoss(temperature=4.0)])


def test_an_unknown_weight_is_refused_with_the_nearest_term() -> None:
    with pytest.raises(ValueError, match="`weights` must name terms of the loss, got 'logit'; did you mean 'logits'"):
        a_handler({"logit": 1.0})


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_below_zero_or_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"`weights` must be finite numbers of at least 0, got {weight} for 'logits'"):
        a_handler({"logits": weight})


@pytest.mark.parametrize("options", [{"mode": "warn"}, {"metric": "a", "modus": "warn"}])
def test_unknown_keys_of_the_check_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="`teacher_check` must have the keys 'metric' and 'mode'"):
        a_handler(teacher_check=options)


def test_the_check_refuses_unless_told_otherwise() -> None:
    validator, check = toys.make_evaluator(toys.student()), {"metric": "val_mean_dice"}
    blind = toys.Bright(threshold=9.0)
    with pytest.raises(ValueError, match="must be better than that of class 1 everywhere"):
        run(DistillationHandler(blind, SoftLabelLoss(), validator=validator, teacher_check=check))


# ---- the teacher stays as it is ------------------------------------------------------------------------------------


def test_the_teacher_is_never_changed_even_when_someone_sets_it_to_training() -> None:
    expert = toys.teacher()
    before = toys.state_of(expert)
    wake = toys.on(Events.ITERATION_STARTED, lambda _: expert.train())
    engine = run(DistillationHandler(expert, SoftLabelLoss(), {"logits": 1.0}), wake, epochs=2)
    assert toys.same(before, toys.state_of(expert))
    assert not any(module.training for module in expert.modules())
    assert all(p.grad is None and not p.requires_grad for p in expert.parameters())
    held = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in expert.parameters())


def test_no_hook_is_left_on_either_network() -> None:
    expert, network = toys.teacher(), toys.student()
    run(DistillationHandler(expert, toys.hint_loss()), network=network)
    assert not any(module._forward_hooks for net in (expert, network) for module in net.modules())


def test_a_second_run_takes_the_hooks_off_that_one_that_broke_off_has_left() -> None:
    expert, first, second = toys.teacher(), toys.student(), toys.student()
    handler = DistillationHandler(expert, toys.hint_loss())

    def stop(_engine: Any) -> None:
        raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power failure"):
        run(handler, toys.on(IterationEvents.LOSS_COMPLETED, stop), network=first)
    run(handler, network=second)
    assert not any(module._forward_hooks for net in (expert, first, second) for module in net.modules())


def test_a_teacher_that_someone_has_thawed_is_no_part_of_the_graph() -> None:
    expert, thawed = toys.teacher(), list[bool]()
    thaw = toys.on(Events.ITERATION_STARTED, lambda _: expert.requires_grad_(True))
    note = toys.on(
        DistillationEvents.TEACHER_COMPLETED,
        lambda engine: thawed.extend(value.requires_grad for value in engine.state.teacher.values()),
    )
    run(DistillationHandler(expert, toys.hint_loss()), thaw, note)
    assert thawed == [False] * 4


# ---- what the teacher sees -----------------------------------------------------------------------------------------


def test_the_teacher_sees_the_key_that_it_is_told() -> None:
    expert, inputs = toys.Bright(), []
    expert.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    note: list[Tensor] = []
    keep = toys.on(DistillationEvents.TEACHER_COMPLETED, lambda e: note.append(e.state.batch["teacher_image"]))
    run(DistillationHandler(expert, SoftLabelLoss(), None, "teacher_image"), keep)
    assert len(inputs) == len(note) == 2
    assert all(torch.equal(a, b.as_tensor()) for a, b in zip(inputs, note, strict=True))


def test_a_teacher_of_another_precision_is_given_its_own() -> None:
    expert, inputs = toys.Bright().double(), list[torch.dtype]()
    expert.register_forward_hook(lambda _module, args, _output: inputs.append(args[0].dtype))
    run(DistillationHandler(expert, SoftLabelLoss()))
    assert inputs == [torch.float64] * 2


def test_labels_reach_the_loss_without_metadata() -> None:
    loss = Tapped()
    loss.eval()                                                    # as a loss is left that was looked at before
    run(a_handler({"first": 1.0}, loss=loss))
    assert [type(label) for label in loss.labels] == [Tensor] * 2
    assert loss.training


def test_a_missing_teacher_input_is_an_error_and_names_the_keys() -> None:
    with pytest.raises(KeyError, match=r"`teacher_input` .* got 'image_hr'; there are \['image', 'label'"):
        run(a_handler(teacher_input="image_hr"))


def test_a_batch_that_is_no_dict_has_no_image_for_the_teacher_alone() -> None:
    pairs = [(case["image"], case["label"]) for case in toys.cases()]
    assert "kd/logits" in run(a_handler(), data=cast(Any, pairs)).state.output[0]
    with pytest.raises(KeyError, match="got 'teacher_image'; there are list"):
        run(a_handler(teacher_input="teacher_image"), data=cast(Any, pairs))


def test_a_batch_without_label_is_distilled_from_the_teacher_alone() -> None:
    data = [{"image": case["image"]} for case in toys.cases()]
    network, loss = toys.student(), Tapped()
    before = toys.state_of(network)
    engine = run(
        a_handler({"first": 1.0}, loss=loss), network=network, data=data,
        loss_function=lambda pred, label: pred.sum() * 0.0,
    )
    assert loss.labels == [None, None]
    assert float(engine.state.output[0]["supervised_loss"]) == 0.0
    assert not toys.same(before, toys.state_of(network))


# ---- taps ----------------------------------------------------------------------------------------------------------


def hint(mine: str, other: str = toys.TAP) -> HintLoss:
    return HintLoss([[mine, other]], [[toys.STUDENT_WIDTH, toys.TEACHER_WIDTH]], spatial_dims=2)


def test_a_wrong_path_of_the_student_is_an_error_at_start_with_the_nearest_path() -> None:
    with pytest.raises(ValueError, match=r"A tap of the student .* got 'encoder.acts'; did you mean 'encoder.act'"):
        run(a_handler({"features": 1.0}, loss=hint("encoder.acts")))


def test_a_wrong_path_of_the_teacher_is_an_error_at_start() -> None:
    with pytest.raises(ValueError, match=r"A tap of the teacher .* got 'decoder'; did you mean 'encoder'"):
        run(a_handler({"features": 1.0}, loss=hint(toys.TAP, "decoder")))


class Odd(toys.ToyNetwork):
    """A student whose layers do what taps cannot read; `how` says which."""

    def __init__(self, how: str) -> None:
        super().__init__(toys.STUDENT_WIDTH)
        self.how = how
        self.layer = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        features = self.encoder(image)
        if self.how == "twice":
            features = self.layer(self.layer(features))
        elif self.how == "in place":
            features = self.layer(features * 1).mul_(2.0)
        elif self.how == "tuple":
            features = self.layer((features, image))[0]
        logits: Tensor = self.head(features)
        return logits


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("silent", RuntimeError, r"Taps \['layer'\] of the student never fired"),
        ("twice", RuntimeError, "Tap 'layer' of the student fired twice"),
        ("in place", RuntimeError, r"Taps \['layer'\] of the student were changed in place"),
        ("tuple", TypeError, "Tap 'layer' of the student must give one tensor, got tuple"),
    ],
)
def test_a_tap_that_would_falsify_the_loss_is_an_error(how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(a_handler({"features": 1.0}, loss=hint("layer")), network=Odd(how))


def test_a_student_wrapped_for_several_devices_keeps_its_paths() -> None:
    network = toys.student()
    wrapped = nn.DataParallel(network)
    engine = run(a_handler({"features": 1.0}, loss=hint(toys.TAP)), network=wrapped)
    assert "kd/features" in engine.state.output[0]


def test_a_layer_of_another_width_than_promised_is_named() -> None:
    with pytest.raises(ValueError, match=r"`channels` of taps \('encoder.act', 'head'\) must be \[2, 2\], got"):
        run(a_handler({"features": 1.0}, loss=hint(toys.TAP, "head")))


def test_a_teacher_that_may_be_missing_leaves_supervised_training(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reference = Teacher(toys.teacher, tmp_path / "model.pt")
    reference.allow_missing()
    torch.manual_seed(5)
    engine = run(DistillationHandler(reference, SoftLabelLoss(), {"logits": 1.0}))
    assert engine.state.distillation["mode"] == "supervised"
    assert "kd/logits" not in engine.state.output[0]
    assert "it does NOT distil" in caplog.text
    torch.manual_seed(5)
    assert toys.same(engine.network.state_dict(), run().network.state_dict())


def test_a_teacher_that_may_be_missing_distils_as_long_as_it_is_there(tmp_path: Any) -> None:
    torch.save(toys.teacher().state_dict(), tmp_path / "model.pt")
    reference = Teacher(toys.teacher, tmp_path / "model.pt")
    reference.allow_missing()
    engine = run(DistillationHandler(reference, SoftLabelLoss(), {"logits": 1.0}))
    assert engine.state.distillation["mode"] == "distilled"
    assert engine.state.distillation["teacher_sha256"] == reference.file_sha256
    (tmp_path / "model.pt").unlink()
    engine = run(DistillationHandler(reference, SoftLabelLoss(), {"logits": 1.0}))
    assert engine.state.distillation["mode"] == "supervised"


def test_a_missing_teacher_stops_the_run_before_the_first_step(tmp_path: Any) -> None:
    network = toys.student()
    before = toys.state_of(network)
    with pytest.raises(FileNotFoundError, match=r"`teacher_path` must be the teacher's weights, got .* or give"):
        run(DistillationHandler(Teacher(toys.teacher, tmp_path / "model.pt"), SoftLabelLoss()), network=network)
    assert toys.same(before, toys.state_of(network))
