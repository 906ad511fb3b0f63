# SPDX-License-Identifier: Apache-2.0
"""Whether the teacher knows more than a constant."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data.dataloader import DataLoader
from monai.handlers.mean_dice import MeanDice
from monai.handlers.utils import from_engine
from monai.inferers.inferer import SimpleInferer
from monai.transforms.post.dictionary import AsDiscreted
from torch import Tensor, nn

import toys
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.teacher import teacher_image
from medkd.handlers.teacher_check import TeacherCheck
from medkd.losses.logits import SoftLabelLoss

METRIC = "val_mean_dice"
BRIGHT = 5 * 5 / toys.SIZE**2      # share of a toy case that is foreground
ALL_FOREGROUND = 2 * BRIGHT / (BRIGHT + 1)


class Constant(nn.Module):
    """Says class `index` everywhere."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, image: Tensor) -> Tensor:
        logits = torch.zeros(image.shape[0], 2, *image.shape[2:])
        logits[:, self.index] = 1.0
        return logits


def a_check(mode: Any = "refuse", **options: Any) -> TeacherCheck:
    return TeacherCheck(toys.make_evaluator(toys.student(), **options), METRIC, mode)


def test_a_teacher_that_sees_passes_and_its_metric_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "medkd"):
        value = a_check()(toys.Bright())
    assert value is not None
    assert value > 0.95
    expected = f"{value:.4f} (best constant prediction: class 1 everywhere, {ALL_FOREGROUND:.4f})"
    assert f"Teacher val_mean_dice on the validation data: {expected}" in caplog.text


@pytest.mark.parametrize("index", [0, 1])
def test_a_teacher_that_is_a_constant_is_refused(index: int) -> None:
    own = index * ALL_FOREGROUND
    message = f"val_mean_dice must be better than that of class 1 everywhere, {ALL_FOREGROUND:.4f}, got {own:.4f}"
    with pytest.raises(ValueError, match=message):
        a_check()(Constant(index))
    with pytest.raises(ValueError, match=message):
        TeacherCheck(toys.make_evaluator(toys.student()), METRIC)(Constant(index))   # refusing is the default


def test_a_check_leaves_the_validators_inferer_so_that_the_next_one_gives_the_same() -> None:
    check = a_check()
    inferer = check.validator.inferer   # type: ignore[union-attr]
    assert check(toys.Bright()) == check(toys.Bright())
    assert check.validator.inferer is inferer   # type: ignore[union-attr]


def test_a_metric_without_a_value_is_no_proof_whatever_the_engine_compares() -> None:
    check = a_check(metric_cmp_fn=lambda current, best: not current <= best)   # true of NaN

    def lose(engine: Any) -> None:
        if isinstance(engine.inferer, SimpleInferer):
            engine.state.metrics[METRIC] = float("nan")

    check.validator.add_event_handler(Events.COMPLETED, lose)   # type: ignore[union-attr]
    with pytest.raises(ValueError, match=f"{ALL_FOREGROUND:.4f}, got nan; it is untrained"):
        check(toys.Bright())


def test_an_inferer_may_name_the_constants_that_its_teacher_is_compared_with() -> None:
    class Named(SimpleInferer):
        constants, channels = (0, 1), 2

    discrete, seen = AsDiscreted(["pred", "label"], threshold=[0.5, None], to_onehot=[None, 2]), set[int]()

    def post(data: Any) -> Any:
        seen.add(len(data["pred"]))
        return discrete(data)

    with pytest.raises(ValueError, match=f"than that of the value 1 everywhere, {ALL_FOREGROUND:.4f}, got 0.0000"):
        a_check(inferer=Named(), postprocessing=post)(toys.Bright(threshold=9.0))
    assert seen == {2}


def test_a_teacher_that_sees_the_opposite_is_refused() -> None:
    class Inverted(toys.Bright):
        def forward(self, image: Tensor) -> Tensor:
            return -super().forward(image)

    with pytest.raises(ValueError, match="it is untrained, or trained for other data or another preprocessing"):
        a_check()(Inverted())


def test_warning_mode_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    assert a_check("warn")(Constant(0)) == 0.0
    assert [record.levelname for record in caplog.records if "must be better" in record.message] == ["WARNING"]


def test_off_runs_nothing() -> None:
    class Never(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            raise AssertionError("the teacher ran")

    assert a_check("off")(Never()) is None


def test_a_metric_that_is_better_when_lower_is_judged_by_the_engines_comparison() -> None:
    with pytest.raises(ValueError, match="must be better than that of class 0 everywhere, 0.0000"):
        a_check(metric_cmp_fn=lambda current, best: current < best)(toys.Bright())


def test_a_teacher_of_one_channel_is_compared_with_all_or_nothing() -> None:
    """Sigmoid outputs: class 0 everywhere has Dice 0, class 1 everywhere the share of the foreground."""
    class Sigmoid(toys.Bright):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image)[:, 1:]

    value = a_check(postprocessing=AsDiscreted("pred", threshold=0.0))(Sigmoid())
    assert value is not None
    assert value > 0.95
    with pytest.raises(ValueError, match=f"class 1 everywhere, {ALL_FOREGROUND:.4f}, got 0.0000"):
        a_check(postprocessing=AsDiscreted("pred", threshold=0.0))(Sigmoid(threshold=9.0))


@pytest.mark.parametrize("validator", [None, "empty"])
def test_without_validation_data_it_warns_and_goes_on(validator: str | None, caplog: pytest.LogCaptureFixture) -> None:
    engine = None if validator is None else toys.make_evaluator(toys.student(), count=0)
    assert TeacherCheck(engine, METRIC)(Constant(0)) is None
    assert "The teacher is not checked: there is no validation data." in caplog.text


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    check = TeacherCheck(toys.make_evaluator(toys.student()), "val_mean_dise")
    with pytest.raises(ValueError, match="must be a metric .* got 'val_mean_dise'; did you mean 'val_mean_dice'"):
        check(toys.Bright())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode` must be one of \('refuse', 'warn', 'off'\), got 'strict'"):
        a_check("strict")


def test_an_error_of_the_teacher_leaves_the_validators_inferer_and_no_hook() -> None:
    check = a_check()
    inferer, expert = check.validator.inferer, nn.Conv2d(3, 2, 1)   # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="expected input"):
        check(expert)
    assert check.validator.inferer is inferer   # type: ignore[union-attr]
    assert not expert._forward_hooks
    expert = toys.Bright()
    with pytest.raises(ValueError, match="must be a metric of the validation"):
        TeacherCheck(check.validator, "none")(expert)
    assert not expert._forward_hooks


# ---- in a run ------------------------------------------------------------------------------------------------------


def train(expert: nn.Module, mode: str, network: nn.Module) -> Any:
    """The trainer after an epoch with the check; the student's own evaluator, which ran before, must not notice it."""
    own = toys.make_evaluator(network)
    own.run()
    before = dict(own.state.metrics), own.state.best_metric, own.state.epoch, own.network
    check = {"metric": METRIC, "mode": mode}
    handler = DistillationHandler(
        expert, SoftLabelLoss(), None, validator=toys.make_evaluator(network), teacher_check=check
    )
    trainer = toys.make_trainer(network, [handler], epochs=1)
    trainer.run()
    assert before == (own.state.metrics, own.state.best_metric, own.state.epoch, own.network)
    return trainer


def test_a_refused_teacher_stops_the_run_before_the_first_step() -> None:
    network = toys.student()
    before = toys.state_of(network)
    with pytest.raises(ValueError, match="Set teacher_check#mode to 'warn' to distil from it all the same"):
        train(Constant(0), "refuse", network)
    assert toys.same(before, toys.state_of(network))


@pytest.mark.parametrize("mode", ["refuse", "warn", "off"])
def test_the_students_evaluator_is_untouched(mode: str) -> None:
    assert train(toys.Bright(), mode, toys.student()).state.iteration == 2


def test_global_generators_are_untouched() -> None:
    check = a_check(workers=0)
    check.validator.data_loader = DataLoader(check.validator.data_loader.dataset, shuffle=True)   # type: ignore[union-attr]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()   # type: ignore[index]
    check(toys.Bright())
    assert toys.same(before, (torch.get_rng_state(), np.random.get_state()[1].tolist()))   # type: ignore[index]


def test_the_teacher_is_validated_on_what_it_sees_in_training() -> None:
    class Brighter(toys.Bright):                                   # right for `teacher_image`, which is brighter by 1
        def __init__(self) -> None:
            super().__init__(threshold=1.5)

    check = TeacherCheck(toys.make_evaluator(toys.student()), METRIC, "refuse", teacher_input="teacher_image")
    before = check.validator.prepare_batch   # type: ignore[union-attr]
    value = check(Brighter())
    assert value is not None
    assert value > 0.95
    assert check.validator.prepare_batch is before   # type: ignore[union-attr]
    with pytest.raises(ValueError, match="must be better than that of class 1 everywhere"):
        a_check()(Brighter())


def test_a_check_without_the_key_that_the_teacher_sees_is_an_error() -> None:
    check = TeacherCheck(toys.make_evaluator(toys.student()), METRIC, "warn", teacher_input="image_hr")
    with pytest.raises(KeyError, match="`teacher_input` must be a key of the batch, got 'image_hr'; there are"):
        check(toys.Bright())


def test_what_no_transform_has_loaded_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"got 'teacher_image' with \['a.nii.gz'\]; load it in transforms"):
        teacher_image({"teacher_image": ["a.nii.gz"]}, "teacher_image")


# ---- regions, and metrics that say nothing -------------------------------------------------------------------------


class Regions(toys.Bright):
    """Two regions that are the same."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, 1:].expand(-1, 2, -1, -1)


def region_check(**options: Any) -> TeacherCheck:
    twice = AsDiscreted("pred", threshold=0.0)
    dice = MeanDice(include_background=True, output_transform=from_engine(["pred", "label"]))

    def post(data: Any) -> Any:
        return twice({**data, "label": data["label"].repeat(2, 1, 1)})

    evaluator = toys.make_evaluator(toys.student(), postprocessing=post)
    dice.attach(evaluator, "regions")
    return TeacherCheck(evaluator, "regions", **options)


def test_regions_everywhere_are_a_constant_prediction_too() -> None:
    """Each region alone has half of the Dice of both."""
    message = f"must be better than that of all regions everywhere, {ALL_FOREGROUND:.4f}, got {ALL_FOREGROUND:.4f}"
    with pytest.raises(ValueError, match=message):
        region_check(regions=True)(Regions(threshold=-9.0))
    value = region_check(regions=True)(Regions())
    assert value is not None
    assert value > 0.95


def test_a_loss_of_regions_tells_the_check_so() -> None:
    check = {"metric": METRIC}
    for activation, expected in (("sigmoid", True), ("softmax", False)):
        loss = SoftLabelLoss(activation=activation)   # type: ignore[arg-type]
        handler = DistillationHandler(toys.Bright(), loss, teacher_check=check)
        assert handler.check is not None
        assert handler.check.regions is expected


def test_where_no_label_has_anything_the_metric_and_not_the_teacher_is_blamed() -> None:
    check = a_check(postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2))
    for case in check.validator.data_loader.dataset.data:   # type: ignore[union-attr]
        case["label"] = case["label"] * 0
    with pytest.raises(ValueError, match="The metric val_mean_dice must have a value on the validation data, got none"):
        check(toys.Bright())
