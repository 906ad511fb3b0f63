# SPDX-License-Identifier: Apache-2.0
"""In a step: what does not reach the student, and what the two networks see and give."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from monai.engines.utils import default_prepare_batch
from monai.losses.dice import DiceCELoss
from monai.losses.ds_loss import DeepSupervisionLoss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import toys
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_check import TeacherCheck
from medkd.losses.base import DistillationLoss
from medkd.losses.features import HintLoss
from medkd.losses.logits import SoftLabelLoss


def run(network: nn.Module, *handlers: Any, **options: Any) -> Any:
    options.setdefault("epochs", 1)
    engine = toys.make_trainer(network, handlers, **options)
    engine.run()
    return engine


# ---- the gradient reaches the student ------------------------------------------------------------------------------


class Hindered(toys.ToyNetwork):
    """A student whose encoder gets no gradient; `how` says why."""

    def __init__(self, how: str) -> None:
        super().__init__(toys.STUDENT_WIDTH)
        self.how = how
        if how == "frozen":
            self.encoder.requires_grad_(False)
        if how == "detached":
            self.encoder.norm.register_forward_hook(lambda _module, _inputs, output: output.detach())

    def forward(self, image: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.encoder(image)
            return self.head(features)   # type: ignore[no-any-return]
        if self.how.endswith("reentrant"):
            image = image.as_subclass(Tensor).requires_grad_()
            features = checkpoint(self.encoder, image, use_reentrant=self.how == "reentrant")
            return self.head(features)   # type: ignore[no-any-return]
        if self.how == "pred":
            return (super().forward(image).detach() + 0.0)   # type: ignore[no-any-return]
        return super().forward(image)


@pytest.mark.parametrize("how", ["frozen", "detached", "no_grad", "reentrant"])
def test_a_tap_without_a_gradient_is_refused_and_named(how: str) -> None:
    network = Hindered(how)
    before = toys.state_of(network.head)
    loss = HintLoss(["encoder.norm"], [[toys.STUDENT_WIDTH, toys.TEACHER_WIDTH]], spatial_dims=2)
    with pytest.raises(RuntimeError, match=r"Taps \['encoder.norm'\] of the student must require .* reentrant"):
        run(network, DistillationHandler(Teacher(toys.teacher), loss))
    assert toys.same(before, toys.state_of(network.head))


def test_an_output_without_a_gradient_is_refused_too() -> None:
    with pytest.raises(RuntimeError, match=r"Taps \['pred'\] of the student must require a gradient"):
        run(Hindered("pred"), DistillationHandler(Teacher(toys.teacher), SoftLabelLoss()))


def test_checkpointing_that_is_not_reentrant_distils() -> None:
    engine = run(Hindered("not reentrant"), DistillationHandler(Teacher(toys.teacher), toys.hint_loss()))
    assert "kd/features" in engine.state.output[0]


def test_a_parameter_that_is_tapped_and_frozen_is_refused() -> None:
    class Weights(DistillationLoss):
        terms = ("kernel",)

        def __init__(self) -> None:
            super().__init__([("head.weight", "head.weight")])
            self.preset_weights = {"kernel": 1.0}

        def compute_terms(self, student: Any, teacher: Any, label: Any) -> dict[str, Tensor]:
            return {"kernel": (student["head.weight"].mean() - teacher["head.weight"].mean()).square()}

    run(toys.student(), DistillationHandler(toys.teacher(), Weights()))
    network = toys.student()
    network.head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"Taps \['head.weight'\] of the student must require a gradient"):
        run(network, DistillationHandler(toys.teacher(), Weights()))


class Said(DistillationLoss):
    """A loss that gives what it is told to."""

    terms = ("first", "second")

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values
        self.preset_weights = {"first": 1.0, "second": 0.0}

    def compute_terms(self, student: Any, teacher: Any, label: Any) -> dict[str, Tensor]:
        return {term: value(student["pred"]) if callable(value) else value for term, value in self.values.items()}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"first": torch.tensor(0.5)}, RuntimeError, "Term 'first' must require a gradient, got 0.5 without one"),
        ({"first": lambda pred: pred.detach().mean()}, RuntimeError, "Said detaches the student"),
        ({}, RuntimeError, r"Said must give the terms \['first'\], got \[\]"),
        ({"first": torch.mean, "second": torch.mean}, RuntimeError, r"got \['first', 'second'\]"),
        ({"first": 0.5}, TypeError, "Term 'first' must be a scalar tensor, got float"),
        ({"first": lambda pred: pred.mean((1, 2, 3))}, TypeError, r"must be a scalar tensor, got \(2,\)"),
    ],
)
def test_a_term_that_teaches_nothing_is_refused_and_named(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(toys.student(), DistillationHandler(toys.teacher(), Said(values)))


def test_a_term_of_zero_for_want_of_instances_is_legitimate_and_told_if_it_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sometimes(Said):
        step = 0

        def compute_terms(self, student: Any, teacher: Any, label: Any) -> dict[str, Tensor]:
            self.step += 1
            return {"first": student["pred"].mean() if self.step == 2 else torch.zeros(())}

    with caplog.at_level(logging.WARNING, "medkd"):
        run(toys.student(), DistillationHandler(toys.teacher(), Sometimes({})))
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "medkd"):
        run(toys.student(), DistillationHandler(toys.teacher(), Said({"first": torch.zeros(())})), epochs=2)
    assert [text[:67] for text in caplog.messages] == [
        "Terms ['first'] were 0 without a gradient in every step of this epo"
    ] * 2


# ---- both see the same -----------------------------------------------------------------------------------------------


def brighter(batch: Any, device: Any = None, non_blocking: bool = False, **options: Any) -> Any:
    """A `prepare_batch` that augments, in a new tensor."""
    image, label = default_prepare_batch(batch, device, non_blocking, **options)
    return image * 2.0, label


def brighter_in_place(batch: Any, device: Any = None, non_blocking: bool = False, **options: Any) -> Any:
    batch["image"].mul_(2.0)
    return default_prepare_batch(batch, device, non_blocking, **options)


def brighter_in_the_batch(batch: Any, device: Any = None, non_blocking: bool = False, **options: Any) -> Any:
    batch["image"] = batch["image"] * 2.0
    return default_prepare_batch(batch, device, non_blocking, **options)


def copied(batch: Any, device: Any = None, non_blocking: bool = False, **options: Any) -> Any:
    """What moving to another device does."""
    image, label = default_prepare_batch(batch, device, non_blocking, **options)
    return image.clone(), label


@pytest.mark.parametrize("prepare", [brighter, brighter_in_place, brighter_in_the_batch, copied])
def test_the_teacher_sees_the_image_that_the_network_was_given(prepare: Any) -> None:
    expert, network, seen = toys.Bright(), toys.student(), dict[str, list[Tensor]](expert=[], network=[])
    expert.register_forward_hook(lambda _module, args, _output: seen["expert"].append(args[0]))
    network.register_forward_hook(lambda _module, args, _output: seen["network"].append(args[0].as_tensor()))
    run(network, DistillationHandler(expert, SoftLabelLoss()), prepare_batch=prepare)
    assert len(seen["expert"]) == 2
    assert toys.same(seen["expert"], seen["network"])


@pytest.mark.parametrize("prepare", [brighter, brighter_in_place, brighter_in_the_batch])
def test_an_image_that_is_changed_for_the_student_alone_is_refused(prepare: Any) -> None:
    handler = DistillationHandler(toys.Bright(), SoftLabelLoss(), None, "teacher_image")
    with pytest.raises(ValueError, match="`prepare_batch` must leave the image .* `teacher_input` is 'teacher_image'"):
        run(toys.student(), handler, prepare_batch=prepare)


def test_an_image_that_is_only_moved_is_the_same() -> None:
    handler = DistillationHandler(toys.Bright(), SoftLabelLoss(), None, "teacher_image")
    assert "kd/logits" in run(toys.student(), handler, prepare_batch=copied).state.output[0]


# ---- one tensor of each network --------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A network whose output is of several parts, or stacked; the first one counts."""

    def __init__(self, network: nn.Module, how: str) -> None:
        super().__init__()
        self.network = network
        self.how = how

    def forward(self, image: Tensor) -> Any:
        if self.how == "inference":
            with torch.inference_mode():
                return self.network(image)
        pred = self.network(image)
        small = nn.functional.avg_pool2d(pred, 2)
        return {
            "list": lambda: [small, pred, small], "nested": lambda: ((pred, [small]),), "single": lambda: [pred],
            "equal": lambda: [pred, pred * 0.0], "dict": lambda: {"out": pred, "aux": small},
            "stack": lambda: torch.stack([pred, pred], dim=1), "other": lambda: (pred, image),
            "nothing": lambda: None,
        }[self.how]()


def term_values(network: nn.Module, expert: nn.Module) -> list[float]:
    """The term in each step of a run that starts with the same random numbers."""
    torch.manual_seed(3)
    np.random.seed(3)
    values: list[float] = []
    note = toys.on(DistillationEvents.TERMS_COMPLETED, lambda e: values.append(float(e.state.output["kd/logits"])))
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    run(network, DistillationHandler(expert, SoftLabelLoss()), note, loss_function=loss, decollate=False)
    return values


@pytest.mark.parametrize("how", ["list", "nested", "single", "equal", "inference"])
def test_of_the_teachers_heads_the_one_of_full_resolution_teaches(how: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = term_values(toys.student(), toys.teacher())
    with caplog.at_level(logging.INFO, "medkd"):
        assert term_values(toys.student(), Heads(toys.teacher(), how)) == expected
    told = [text for text in caplog.messages if "the one of full resolution is taken" in text]
    assert len(told) == (how not in ("single", "inference"))
    assert all(text.startswith("The teacher gives") for text in told)


def test_of_the_students_heads_the_one_of_full_resolution_learns(caplog: pytest.LogCaptureFixture) -> None:
    expected = term_values(toys.student(), toys.teacher())
    with caplog.at_level(logging.INFO, "medkd"):
        values = term_values(Heads(toys.student(), "list"), toys.teacher())
    assert values[0] == expected[0]
    assert "The student gives 3 maps ((2, 2, 6, 6), (2, 2, 12, 12), (2, 2, 6, 6)): the one of full" in caplog.text


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("dict", TypeError, r"The teacher must give one tensor, got dict with the keys \['out', 'aux'\]; wrap the"),
        ("other", TypeError, r"The teacher must give one tensor, got tuple of \(2, 2, 12, 12\), \(2, 1, 12, 12\)"),
        ("nothing", TypeError, "The teacher must give one tensor, got NoneType; wrap the network"),
        ("stack", ValueError, r"The teacher must give maps of 4 dim.* got \(2, 2, 2, 12, 12\); .*deep_supervision"),
    ],
)
def test_any_other_output_is_named_with_the_way_out(how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        term_values(toys.student(), Heads(toys.teacher(), how))
    with pytest.raises(error, match=message.replace("teacher", "student")):
        term_values(Heads(toys.student(), how), toys.teacher())


def test_taps_of_a_teacher_under_inference_mode_are_usable() -> None:
    class Inferring(toys.ToyNetwork):
        def forward(self, image: Tensor) -> Tensor:
            with torch.inference_mode():
                return super().forward(image)

    torch.manual_seed(2)
    engine = run(toys.student(), DistillationHandler(Inferring(toys.TEACHER_WIDTH), toys.hint_loss()))
    assert float(engine.state.output[0]["kd/features"]) > 0


@pytest.mark.parametrize("how", ["list", "equal", "inference"])
def test_the_teachers_check_takes_the_head_of_full_resolution_too(how: str) -> None:
    validator = toys.make_evaluator(toys.student())
    expert = Heads(toys.Bright(), how)
    value = TeacherCheck(validator, "val_mean_dice")(expert)
    assert value is not None
    assert value > 0.95
    assert not expert._forward_hooks


def test_the_teachers_check_names_an_output_that_it_cannot_read() -> None:
    with pytest.raises(TypeError, match=r"The teacher must give one tensor, got dict with the keys \['out', 'aux'\]"):
        TeacherCheck(toys.make_evaluator(toys.student()), "val_mean_dice")(Heads(toys.Bright(), "dict"))


def test_a_check_sees_what_prepare_batch_gives() -> None:
    class Dark(toys.Bright):
        def __init__(self) -> None:
            super().__init__(threshold=1.0)                        # right for an image that is twice as bright

    value = TeacherCheck(toys.make_evaluator(toys.student(), prepare_batch=brighter), "val_mean_dice")(Dark())
    assert value is not None
    assert value > 0.95
