# SPDX-License-Identifier: Apache-2.0
"""Paraphrasers on a frozen teacher: when they are fitted, to what, what is left behind, and that a loss reads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

import toys
from medkd.handlers.adversarial import DiscriminatorTraining
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_fitting import ParaphraserFitting, TeacherLayers
from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.discriminator import Discriminator
from medkd.losses.graph_flow import GraphFlowLoss
from medkd.losses.paraphraser import TeacherParaphrasers, reconstruction_loss


def test_layers_come_in_the_order_of_the_taps_with_the_prediction(teacher: Teacher) -> None:
    layers, network, image = TeacherLayers(teacher, ["fine", "deep"]), teacher.load(), torch.randn(1, 1, 8, 8)
    (fine, deep), pred = layers.with_prediction(image)
    assert (fine.shape, deep.shape) == ((1, 4, 8, 8), (1, 6, 4, 4))
    torch.testing.assert_close(pred, network(image))
    assert not any(value.requires_grad for value in (fine, deep, pred))


def paraphrasing(
    teacher: Teacher, folder: Path, taps: Sequence[str] = ("deep", "fine"),
    channels: Sequence[Sequence[int]] = ((6, 3), (4, 2)), squeeze: int | None = None, **options: Any,
) -> ParaphraserFitting:
    given = TeacherParaphrasers(taps, channels, folder / "paraphrasers.pt", 2, squeeze, teacher.path)
    one = ParaphraserFitting(given, teacher, **{"steps": 60, "learning_rate": 0.02, **options})
    toys.attach_fitting(one, toys.blob_batches(labeled=False))
    return one


def own_error(one: ParaphraserFitting, kind: Any = "l1") -> float:
    levels = TeacherLayers(one.teacher, one.taps)(toys.blob_batches()[0]["image"].as_subclass(Tensor))
    loaded = one.paraphrasers.load()
    pairs = zip(loaded.layers, levels, strict=True)
    return sum(float(reconstruction_loss(layer.reconstruct(level), level, kind)) for layer, level in pairs)


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_missing_paraphrasers_are_fitted_without_labels_and_then_frozen(
    teacher: Teacher, tmp_path: Path, kind: str
) -> None:
    before = torch.get_rng_state()
    first, longer = (paraphrasing(teacher, tmp_path / name, steps=n, kind=kind) for name, n in (("a", 1), ("b", 60)))
    assert not longer.paraphrasers.path.exists()
    assert own_error(longer, kind) < 0.7 * own_error(first, kind)
    assert torch.equal(torch.get_rng_state(), before)
    content = torch.load(longer.paraphrasers.path, weights_only=True)
    assert bytes(content["teacher_sha256"].tolist()) == sha256(teacher.path.read_bytes()).digest()
    assert not any(one.requires_grad for one in longer.paraphrasers.load().parameters())


@pytest.mark.parametrize("change", [
    {"channels": ((6, 2), (4, 2))}, {"squeeze": 2}, {"kind": "mse"}, {"steps": 3}, {"learning_rate": 0.01}, {"seed": 1},
    {"taps": ("fine", "deep"), "channels": ((4, 2), (6, 3))}, {"taps": ("deep", "norm")}, {"teacher_input": "label"},
])
def test_paraphrasers_are_kept_as_long_as_they_are_fitted_so(
    teacher: Teacher, tmp_path: Path, change: dict[str, Any]
) -> None:
    one = paraphrasing(teacher, tmp_path, steps=2).paraphrasers
    one.load()
    before = one.path.read_bytes()
    paraphrasing(teacher, tmp_path, steps=2).paraphrasers.load()
    assert one.path.read_bytes() == before
    paraphrasing(teacher, tmp_path, **{"steps": 2, **change}).paraphrasers.load()
    assert one.path.read_bytes() != before


def test_paraphrasers_of_layers_of_as_many_channels_are_told_apart(teacher: Teacher, tmp_path: Path) -> None:
    one = paraphrasing(teacher, tmp_path, ["fine", "norm"], [(4, 2), (4, 2)], steps=2).paraphrasers
    one.load()
    swapped = TeacherParaphrasers(["norm", "fine"], [(4, 2), (4, 2)], one.path, 2, teacher_path=teacher.path)
    with pytest.raises(ValueError, match=r"the teacher's layers \['norm', 'fine'\], in this order, but .* to \['fine'"):
        swapped.load()                                             # of no trainer
    toys.attach_fitting(ParaphraserFitting(swapped, teacher, steps=2), toys.blob_batches())
    swapped.load()
    with pytest.raises(ValueError, match=r"was fitted to \['norm', 'fine'\]"):
        TeacherParaphrasers(one.taps, one.channels, one.path, 2).load()


def test_paraphrasers_of_another_teacher_are_replaced(teacher: Teacher, tmp_path: Path) -> None:
    one = paraphrasing(teacher, tmp_path, steps=2).paraphrasers
    one.load()
    before = one.path.read_bytes()
    torch.save(toys.TwoLayers().state_dict(), teacher.path)
    paraphrasing(Teacher(toys.TwoLayers, teacher.path), tmp_path, steps=2).paraphrasers.load()
    assert one.path.read_bytes() != before


def test_a_teacher_without_a_file_is_known_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = paraphrasing(Teacher(toys.TwoLayers()), tmp_path, steps=2)
    one.paraphrasers.load()
    assert one.paraphrasers.belong_to(one.teacher.hash())
    assert not one.paraphrasers.belong_to(Teacher(toys.TwoLayers()).hash())


def test_weights_that_are_no_numbers_are_not_saved(teacher: Teacher, tmp_path: Path) -> None:
    one = paraphrasing(teacher, tmp_path, steps=4, learning_rate=1e30)
    with pytest.raises(RuntimeError, match="Paraphrasers must be fitted with a finite loss, got .*; nothing is saved"):
        one.paraphrasers.load()
    assert not one.paraphrasers.path.exists()


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_the_log_tells_how_much_of_a_layer_is_lost_and_warns_where_the_mean_would_do(
    teacher: Teacher, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "medkd"):
        one = paraphrasing(teacher, tmp_path / "long", steps=150, kind=kind)
        loaded = one.paraphrasers.load()
    told = [record for record in caplog.records if record.getMessage().startswith("Layer ")]
    batch = toys.blob_batches()[2]                                 # that of step 150
    level = TeacherLayers(teacher, ["deep"])(batch["image"].as_subclass(Tensor))[0]
    power = 1 if kind == "l1" else 2
    share = (loaded.layers[0].reconstruct(level) - level).abs().pow(power).mean() / level.abs().pow(power).mean()
    assert told[0].args[:2] == ("deep", pytest.approx(100 * share.item(), rel=1e-4))
    assert told[0].args[1] < told[0].args[2]
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    with caplog.at_level(logging.INFO, "medkd"):
        paraphrasing(teacher, tmp_path / "short", steps=1, learning_rate=1e-9, kind=kind).paraphrasers.load()
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(" brings")[0] for line in warned] == [
        f"The paraphraser of layer {path!r}" for path in ("deep", "fine")
    ]


def test_a_loss_that_is_activated_has_its_paraphrasers_fitted(teacher: Teacher, tmp_path: Path) -> None:
    class Flat(nn.Module):
        """Two layers of one grid."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.second(self.first(image).relu()))

    torch.save(Flat().state_dict(), teacher.path)
    flat = Teacher(Flat, teacher.path)
    given = TeacherParaphrasers(
        ["first", "second"], [(6, 3), (6, 3)], tmp_path / "p.pt", 2, teacher_path=teacher.path
    )
    toys.attach_fitting(ParaphraserFitting(given, flat, steps=2), toys.blob_batches())
    loss = GraphFlowLoss([["first", "second"]], paraphrasers=given, spatial_dims=2)
    assert not given.path.exists()
    loss.activate(["node"])
    assert given.path.exists()
    layers = TeacherLayers(flat, ["first", "second"])
    (first, second), pred = layers.with_prediction(toys.blob_batches()[0]["image"].as_subclass(Tensor))
    student = {"first": torch.randn(2, 3, 16, 16), "second": torch.randn(2, 3, 16, 16), "pred": pred}
    assert loss(student, {"first": first, "second": second, "pred": pred})["node"] > 0


def test_wrong_options_of_paraphrasers_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    given = TeacherParaphrasers(["deep", "fine"], [(6, 3), (4, 2)], tmp_path / "p.pt", 2)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        ParaphraserFitting(given, teacher, steps=0)
    with pytest.raises(ValueError, match="`kind` must be one of .* got 'l2'"):
        ParaphraserFitting(given, teacher, "l2")   # type: ignore[arg-type]


# ---- in a trainer --------------------------------------------------------------------------------------------------

FLOW = ("encoder.conv", "encoder.act")
WEIGHTS = {"node": 0.5, "edge": 0.5, "adversarial": 0.1}


def whole(folder: Path, weights: Mapping[str, float] = WEIGHTS, extra: Sequence[Any] = (), resume: bool = False) -> Any:
    """A run with all that the method has, two steps per epoch; its trainer, and what it ends with."""
    teacher, network = Teacher(toys.teacher, folder / "teacher.pt"), toys.student()
    width = [toys.TEACHER_WIDTH, toys.STUDENT_WIDTH]
    given = TeacherParaphrasers(FLOW, [width, width], folder / "paraphrasers.pt", 2, teacher_path=teacher.path)
    discriminator = Discriminator(2, 2, width=4, layers=1)
    losses = [GraphFlowLoss([FLOW], paraphrasers=given, spatial_dims=2), AdversarialLoss(discriminator)]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    own = torch.optim.Adam(discriminator.parameters(), 1e-3)
    objects = {
        "network": network, "optimizer": optimizer, "discriminator": discriminator, "discriminator_optimizer": own,
    }
    handlers = [
        EpochSeed(3), ParaphraserFitting(given, teacher, steps=20), DistillationHandler(teacher, losses, weights),
        DiscriminatorTraining(losses[1], own), *extra, CheckpointHandler(folder / "run", objects, resume=resume),
    ]
    toys.make_trainer(network, handlers, optimizer=optimizer, epochs=2).run()
    return [one.state_dict() for one in objects.values()]


def test_a_training_with_all_parts_resumes_bit_identical_and_keeps_its_paraphrasers(tmp_path: Path) -> None:
    torch.save(toys.teacher().state_dict(), tmp_path / "teacher.pt")
    kept, outputs = (tmp_path / "teacher.pt").read_bytes(), []
    teachers: list[dict[str, Tensor]] = []

    def note(engine: Any) -> None:
        outputs.append(dict(engine.state.output))
        teachers.append(toys.state_of(engine.state.distillation_handler._network))

    end = whole(tmp_path, extra=[toys.on(IterationEvents.BACKWARD_COMPLETED, note)])
    assert len(outputs) == 4
    assert all(output[f"kd/{term}"].isfinite() and output[f"kd/{term}"] != 0 for output in outputs for term in WEIGHTS)
    assert all(output["kd/node"] > 0 and output["discriminator/loss"] > 0 for output in outputs)
    assert all(toys.same(one, toys.teacher().state_dict()) for one in teachers)
    assert (tmp_path / "teacher.pt").read_bytes() == kept
    file = tmp_path / "paraphrasers.pt"
    fitted, written = file.read_bytes(), file.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path, extra=[toys.on(Events.ITERATION_STARTED(once=4), stop)])
    assert toys.same(whole(tmp_path, resume=True), end)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (fitted, written)


def test_with_all_weights_zero_it_equals_plain_training_and_fits_nothing(tmp_path: Path) -> None:
    torch.save(toys.teacher().state_dict(), tmp_path / "teacher.pt")
    network, *_ = whole(tmp_path, dict.fromkeys(WEIGHTS, 0.0))
    plain = toys.student()
    toys.make_trainer(plain, [EpochSeed(3)], optimizer=torch.optim.Adam(plain.parameters(), 0.01), epochs=2).run()
    assert toys.same(network, plain.state_dict())
    assert not (tmp_path / "paraphrasers.pt").exists()


def stop(engine: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", [0, 1])
def test_what_the_docs_say_of_a_config_builds_a_training(tmp_path: Path, place: int) -> None:
    kind = (ParaphraserFitting, DiscriminatorTraining)[place]
    text = (kind.__doc__ or "").split("```json")[1].split("```")[0]
    own = json.loads(text)
    parser = ConfigParser(
        {"ckpt_dir": str(tmp_path), "teacher_path": "teacher.pt", "teacher": Teacher(toys.teacher), **own}
    )
    found = {name: parser.get_parsed_content(name) for name in reversed(own)}   # the loss before the optimizer
    if place == 0:
        assert found["paraphraser_fitting"].taps == found["distill_loss"].teacher_taps
        assert found["paraphraser_fitting"].paraphrasers is found["distill_loss"].paraphrasers
    else:
        assert found["discriminator_training"].loss.discriminator is found["discriminator"]
        assert found["discriminator_training"].optimizer.defaults["betas"] == (0.9, 0.99)
