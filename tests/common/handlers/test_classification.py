# SPDX-License-Identifier: Apache-2.0
"""Distilling a classifier: one prediction and one class per image, a student that sees half the resolution."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from ignite.metrics import Accuracy
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.data.meta_tensor import MetaTensor
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.trainer import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import from_engine
from monai.handlers.validation_handler import ValidationHandler
from monai.networks.nets.densenet import DenseNet
from monai.transforms.intensity.dictionary import RandGaussianNoised
from monai.transforms.post.dictionary import AsDiscreted
from torch import Tensor, nn

import toys
from medkd.handlers.agreement import TeacherAgreement
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.gradient_norms import GradientNorms
from medkd.handlers.nan_guard import NanGuard
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.schedule import WeightSchedule
from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_check import TeacherCheck
from medkd.losses.base import trainable_parameters
from medkd.losses.ignoring import IgnoringLoss
from medkd.losses.inter_resolution_attention import InterResolutionAttentionLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.soft_target import SoftTargetLoss
from medkd.metrics.classification import BalancedAccuracy
from medkd.ops.ignored import IGNORED, UNLABELED

TAP, HEAD = "class_layers.relu", "class_layers.out.weight"
METRIC = "val_accuracy"
WEIGHTS = {"attention": 10.0, "feature": 0.1, "regression": 0.3, "logits": 0.5}


def densenet(width: int, seed: int, dropout: float = 0.0) -> DenseNet:
    """A small one, of stride 4; the global generator stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DenseNet(2, 1, 2, width, growth_rate=width, block_config=(1,), dropout_prob=dropout)


class Striped(nn.Module):
    """A teacher that needs no training: how much neighboring columns differ is the evidence of class 1.

    With a negative sign it is a student: at half the resolution only stripes of class 0 are left.
    """

    def __init__(self, sign: float = 1.0, threshold: float = 0.5) -> None:
        super().__init__()
        self.first, self.last = nn.Identity(), nn.Identity()
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, -40.0 * sign], [1.0, 40.0 * sign]]))
            self.head.bias.copy_(torch.tensor([1.0, -1.0]) * 40.0 * sign * threshold)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 2)."""
        fine = (image - image.roll(1, 3)).abs()
        maps = self.first(torch.cat([fine, image.abs()], 1))
        logits: Tensor = self.head(self.last(maps.flip(1)).mean((2, 3)))
        return logits


class Blank(nn.Module):
    """Says the same of all images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Tensor) -> Tensor:
        return torch.zeros(len(image), self.channels)


def cases(count: int = 8, labeled: bool = True) -> list[dict[str, Any]]:
    """Stripes of one voxel (class 1) or of four, on noise; `image` has half the resolution of `teacher_image`."""
    generator = torch.Generator().manual_seed(count)
    result = []
    for index in range(count):
        label = index % 2
        column = torch.arange(32)
        stripes = (column if label else column // 4) % 2
        fine = stripes.float().expand(1, 32, 32) + 0.05 * torch.randn(1, 32, 32, generator=generator)
        case = {"image": MetaTensor(F.avg_pool2d(fine, 2)), "teacher_image": MetaTensor(fine)}
        result.append({**case, "label": label} if labeled else case)
    return result


class AsTwo(nn.Module):
    """Cross entropy of classes (B,) that came as numbers of any type."""

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(pred, label.long())


def stacked(output: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What Ignite's accuracy takes, of decollated samples."""
    pairs = [(one["pred"].as_subclass(Tensor).flatten(), torch.as_tensor(one["label"]).flatten()) for one in output]
    preds, labels = zip(*pairs, strict=True)
    return torch.cat(preds).long(), torch.cat(labels).long().clamp(min=0)   # it refuses negative ones


def make_evaluator(network: nn.Module, data: Sequence[Any] | None = None, **options: Any) -> SupervisedEvaluator:
    listed = Dataset(cases(4) if data is None else data, lambda case: {"label": UNLABELED, **case})
    loader = DataLoader(listed, batch_size=2)
    options.setdefault("postprocessing", AsDiscreted("pred", argmax=True))
    metric = {METRIC: Accuracy(output_transform=stacked)}
    return SupervisedEvaluator("cpu", loader, network, key_val_metric=metric, **options)


def losses(width: int = 3) -> list[Any]:
    """AT+ with a projection, and soft labels."""
    attention = InterResolutionAttentionLoss(TAP, HEAD, channels=[2 * width, 16])
    return [attention, SoftLabelLoss(temperature=4.0)]


class Run:
    """A whole training that can be resumed."""

    def __init__(self, folder: Path, resume: bool = False, extra: Sequence[Any] = (), epochs: int = 4) -> None:
        self.network, self.losses = densenet(3, seed=1, dropout=0.1), losses()
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.network, self.losses), lr=0.02)
        self.evaluator = make_evaluator(self.network)
        self.norms = GradientNorms(interval_epochs=2, balance={"logits": 0.5}, steps=3)
        objects = {
            "network": self.network, "distill_loss": self.losses, "optimizer": self.optimizer, "norms": self.norms,
        }
        handlers = [
            ValidationHandler(interval=1, validator=self.evaluator),
            EpochSeed(3),
            DistillationHandler(Teacher(lambda: densenet(8, seed=2)), self.losses, WEIGHTS, "teacher_image"),
            WeightSchedule(0.5), self.norms, NanGuard(), *extra,
            CheckpointHandler(folder, objects, self.evaluator, resume=resume),
        ]
        data = Dataset(cases(), RandGaussianNoised(["image"], std=0.1, prob=0.7))
        self.trainer = SupervisedTrainer(
            "cpu", epochs, DataLoader(data, batch_size=2, shuffle=True), self.network, self.optimizer,
            nn.CrossEntropyLoss(), train_handlers=handlers,
        )

    def result(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(), "heads": nn.ModuleList(self.losses).state_dict(),
            "optimizer": self.optimizer.state_dict(), "norms": self.norms.state_dict(),
            "best": float(self.evaluator.state.best_metric),
        }


def train(data: Sequence[Any], loss: Any, weights: Any, supervised: nn.Module | None = None, **options: Any) -> Any:
    """One epoch with a ready teacher; gives the network, the handler's trainer and its outputs."""
    network = densenet(3, seed=1)
    outputs: list[dict[str, Any]] = []

    def keep(engine: Any) -> None:
        outputs.append(dict(engine.state.output))

    handler = DistillationHandler(options.pop("teacher", Striped()), loss, weights, "teacher_image", **options)
    trainer = SupervisedTrainer(
        "cpu", 1, DataLoader(Dataset(data), batch_size=4), network,
        torch.optim.SGD(trainable_parameters(network, handler.losses), lr=0.01), supervised or nn.CrossEntropyLoss(),
        train_handlers=[handler, toys.on(IterationEvents.BACKWARD_COMPLETED, keep)],
    )
    trainer.run()
    return network, trainer, outputs


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """A projection, dropout, batch norms, schedules and balanced weights are in it."""

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    whole = Run(tmp_path / "whole")
    whole.trainer.run()
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "parts", extra=[toys.on(Events.EPOCH_STARTED(once=3), stop)]).trainer.run()
    resumed = Run(tmp_path / "parts", resume=True)
    resumed.trainer.run()
    assert toys.same(whole.result(), resumed.result())
    assert not toys.same(whole.result()["heads"], nn.ModuleList(losses()).state_dict())
    student = torch.load(tmp_path / "whole" / "model.pt")
    assert toys.same(student.keys(), densenet(3, seed=1).state_dict().keys())       # the projection stays behind


def test_every_term_is_there_and_the_teacher_stays_as_it_is() -> None:
    teacher = densenet(8, seed=2)
    before = toys.state_of(teacher)
    network, trainer, outputs = train(cases(), losses(), WEIGHTS, teacher=teacher)
    assert toys.same(toys.state_of(teacher), before)
    assert not toys.same(toys.state_of(network), densenet(3, seed=1).state_dict())
    assert trainer.state.distillation["mode"] == "distilled"
    for output in outputs:
        terms = {name: float(output[f"kd/{name}"]) for name in WEIGHTS}
        assert all(value > 0 for value in terms.values())
        whole = float(output["supervised_loss"]) + sum(WEIGHTS[name] * value for name, value in terms.items())
        assert float(output["loss"].detach()) == pytest.approx(whole)


def test_the_teacher_sees_its_own_image_which_may_be_of_another_size() -> None:
    seen: list[tuple[int, ...]] = []
    teacher = Striped()
    teacher.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape)))
    train(cases(), SoftLabelLoss(4.0), {"logits": 1.0}, teacher=teacher)
    assert seen == [(4, 1, 32, 32)] * 2


def test_weights_of_zero_are_plain_training_bit_for_bit() -> None:
    plain, _, _ = train(cases(), losses(), dict.fromkeys(WEIGHTS, 0.0))
    network = densenet(3, seed=1)
    loader = DataLoader(Dataset(cases()), batch_size=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    SupervisedTrainer("cpu", 1, loader, network, optimizer, nn.CrossEntropyLoss()).run()
    assert toys.same(plain.state_dict(), network.state_dict())


@pytest.mark.parametrize("loss", [SoftLabelLoss(4.0), SoftTargetLoss(include_background=True)])
def test_samples_without_a_class_are_distilled_and_not_supervised(loss: Any) -> None:
    data = cases(4)
    for case, label in zip(data, (0, UNLABELED, 1, UNLABELED), strict=True):
        case["label"] = label
    (term,) = loss.terms
    _, _, outputs = train(data, loss, {term: 1.0}, IgnoringLoss(AsTwo()))
    with torch.no_grad():
        images, fine = (torch.stack([case[key].as_subclass(Tensor) for case in data])
                        for key in ("image", "teacher_image"))
        pred = densenet(3, seed=1)(images)
        expected = AsTwo()(pred[::2], torch.tensor([0, 1]))
        torch.testing.assert_close(outputs[0]["supervised_loss"].as_subclass(Tensor), expected)
        value = loss({"pred": pred}, {"pred": Striped()(fine)})[term]
    torch.testing.assert_close(outputs[0][f"kd/{term}"], value)


def test_soft_labels_that_a_batch_brings_take_the_place_of_the_teacher() -> None:
    data = cases(4)
    for case in data:
        case["teacher_pred"] = torch.tensor([0.25, 0.75])
    calls: list[int] = []
    teacher = Striped()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    _, trainer, outputs = train(data, SoftLabelLoss(1.0), {"logits": 1.0}, teacher=teacher)
    assert not calls
    assert trainer.state.distillation["predictions"] == "cached"
    assert torch.isfinite(outputs[0]["kd/logits"])


# ---- before the first step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["image", "teacher_image"])
def test_a_teacher_is_checked_on_its_own_image(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """Half the resolution hides the stripes that tell the classes apart."""
    check = TeacherCheck(make_evaluator(densenet(3, seed=1)), METRIC, teacher_input=key)
    if key == "image":
        with pytest.raises(ValueError, match="val_accuracy must be better than that of class 0 everywhere, 0.5000"):
            check(Striped())
        return
    with caplog.at_level(logging.INFO, "medkd"):
        assert check(Striped()) == 1.0
    assert "(best constant prediction: class 0 everywhere, 0.5000)" in caplog.text


def test_a_teacher_of_one_channel_has_two_constants(caplog: pytest.LogCaptureFixture) -> None:
    evaluator = make_evaluator(densenet(3, seed=1), postprocessing=AsDiscreted("pred", threshold=0.0))
    with caplog.at_level(logging.WARNING, "medkd"):
        assert TeacherCheck(evaluator, METRIC, "warn")(Blank(1)) == 0.5
    assert "must be better than that of class 0 everywhere, 0.5000, got 0.5000" in caplog.text


def test_without_classes_the_student_is_chosen_by_its_agreement() -> None:
    data = cases(4, labeled=False)
    agreement = TeacherAgreement(make_evaluator(densenet(3, seed=1), data), "teacher_image")
    agreement.predict(Striped())
    for student, expected in ((Blank(2), 0.5), (Striped(-1.0, 0.25), 1.0)):
        evaluator = make_evaluator(student, data, val_handlers=[agreement])
        evaluator.run()
        assert evaluator.state.metrics[METRIC] == expected
    assert list(agreement.named({METRIC: None})) == [f"{METRIC}_with_teacher"]


def test_metrics_of_scores_compare_them_with_the_class_that_the_teacher_tells(caplog: pytest.LogCaptureFixture) -> None:
    """Such a metric takes scores (K,) and a class, so nothing stands behind the network."""
    data = cases(4, labeled=False)
    options = {"postprocessing": None, "key_val_metric": {METRIC: BalancedAccuracy(from_engine(["pred", "label"]))}}

    def evaluator(network: nn.Module, **more: Any) -> SupervisedEvaluator:
        loader = DataLoader(Dataset(data, lambda case: {"label": UNLABELED, **case}), batch_size=2)
        return SupervisedEvaluator("cpu", loader, network, **options, **more)

    agreement = TeacherAgreement(evaluator(densenet(3, seed=1)), "teacher_image")
    with caplog.at_level(logging.INFO, "medkd"):
        agreement.predict(Striped())
    assert "The teacher tells 2 classes" in caplog.text
    for student, expected in ((Blank(2), 0.5), (Striped(-1.0, 0.25), 1.0)):
        engine = evaluator(student, val_handlers=[agreement])
        engine.run()
        assert engine.state.metrics[METRIC] == expected
    with pytest.raises(ValueError, match="The teacher must find something in the validation images, got one class"):
        agreement.predict(Blank(2))


@pytest.mark.parametrize(("label", "needed"), [(0, False), (1, False), (None, True), ("", True), ([], True)])
def test_class_0_is_a_label(label: Any, needed: bool) -> None:
    data = [{"image": torch.zeros(1, 4, 4), "label": label}]
    assert TeacherAgreement(make_evaluator(densenet(3, seed=1), data)).is_needed == needed


def test_the_wrong_layer_of_a_teacher_is_refused_in_the_first_step() -> None:
    for tap in ("last", "first"):
        loss = InterResolutionAttentionLoss([TAP, tap], [HEAD, "head.weight"], channels=[6, 2])
        if tap == "last":
            train(cases(), loss, None)
            continue
        with pytest.raises(ValueError, match="`head` must read the mean of `tap` and nothing else, but the teacher's"):
            train(cases(), loss, None)


def test_a_class_that_is_ignored_is_in_no_term() -> None:
    data = cases(4)
    for case, label in zip(data, (0, IGNORED, 1, IGNORED), strict=True):
        case["label"] = label
    _, _, outputs = train(data, losses(), WEIGHTS, IgnoringLoss(AsTwo()), teacher=densenet(8, seed=2))
    _, _, expected = train(data[::2], losses(), WEIGHTS, teacher=densenet(8, seed=2))
    assert outputs[0]["kd/attention"] != expected[0]["kd/attention"]   # batch norm saw all four
    assert all(torch.isfinite(outputs[0][f"kd/{name}"]) for name in WEIGHTS)
