# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what they hold, which are kept, and that a whole one is there whatever happens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.handlers.lr_schedule_handler import LrScheduleHandler
from torch import nn

import toys
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.teacher import Teacher
from medkd.losses.logits import SoftLabelLoss
from medkd.weights import load_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def run(folder: Path, epochs: int = 2, resume: Any = False, handlers: Any = (), **options: Any) -> Any:
    """Train with a checkpoint handler that has no validation; the engine, its network at `engine.network`."""
    network = toys.student()
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    saver = CheckpointHandler(folder, {"network": network, "optimizer": optimizer}, resume=resume)
    engine = toys.make_trainer(network, [*handlers, saver], optimizer=optimizer, epochs=epochs, **options)
    engine.run()
    return engine


# ---- the student -----------------------------------------------------------------------------------------------


def test_the_student_of_the_best_validation_is_saved_as_tensors_alone(tmp_path: Path) -> None:
    history: list[tuple[float, dict[str, Any]]] = []

    def spoil(engine: Any) -> None:
        if engine.state.epoch > 3:
            nn.init.zeros_(engine.network.head.weight)

    whole = toys.Run(tmp_path, epochs=5, extra=[toys.on(Events.ITERATION_COMPLETED, spoil)])
    whole.evaluator.add_event_handler(
        Events.COMPLETED,
        lambda engine: history.append((engine.state.metrics["val_mean_dice"], toys.state_of(whole.network))),
    )
    whole.trainer.run()
    best = max(history, key=lambda entry: entry[0])
    assert best is not history[-1]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert toys.same(saved, best[1])
    toys.student().load_state_dict(saved, strict=True)


def test_beside_the_student_lies_how_it_was_trained(tmp_path: Path) -> None:
    expert = tmp_path / "teacher.pt"
    torch.save(toys.teacher().state_dict(), expert)
    reference = Teacher(toys.teacher, expert)
    run(tmp_path, handlers=[DistillationHandler(reference, SoftLabelLoss(), {"logits": 0.5})])
    assert json.loads((tmp_path / "model.json").read_text()) == {
        "saved": True, "mode": "distilled", "teacher": str(expert), "teacher_sha256": reference.file_sha256,
        "predictions": "live", "weights": {"logits": 0.5}, "epoch": 2, "max_epochs": 2,
    }


def test_the_metric_of_the_saved_student_is_told(tmp_path: Path) -> None:
    whole = toys.Run(tmp_path, epochs=2)
    whole.trainer.run()
    told = json.loads((tmp_path / "model.json").read_text())
    assert told["validation"] == {"val_mean_dice": float(whole.evaluator.state.best_metric)}
    assert told["epoch"] == whole.evaluator.state.best_metric_epoch
    assert told["teacher"] is None


def test_the_description_is_replaced_as_a_whole_like_the_weights(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    for name in ("model.pt", "model.json"):
        (tmp_path / f"old_{name}").hardlink_to(tmp_path / name)
    run(tmp_path, epochs=2)
    assert json.loads((tmp_path / "old_model.json").read_text())["epoch"] == 1
    assert json.loads((tmp_path / "model.json").read_text())["epoch"] == 2
    assert not toys.same(load_tensors(tmp_path / "old_model.pt"), load_tensors(tmp_path / "model.pt"))


@pytest.mark.parametrize("weights", [None, {}])
def test_a_student_without_teacher_is_told_to_be_supervised(tmp_path: Path, weights: dict[str, float] | None) -> None:
    handlers = [] if weights is None else [DistillationHandler(toys.Bright(), SoftLabelLoss(), weights)]
    run(tmp_path, handlers=handlers)
    told = json.loads((tmp_path / "model.json").read_text())
    assert (told["mode"], told["weights"]) == ("supervised", {})


def test_a_student_that_was_best_after_the_first_epoch_stays(tmp_path: Path) -> None:
    whole = toys.Run(tmp_path, epochs=2)
    whole.evaluator.metric_cmp_fn = lambda _current, best: best == -1   # nothing is better than the first
    whole.trainer.run()
    told = json.loads((tmp_path / "model.json").read_text())
    assert told["epoch"] == 1
    assert told["validation"] == {"val_mean_dice": float(whole.evaluator.state.best_metric)}
    assert not toys.same(load_tensors(tmp_path / "model.pt"), whole.network.state_dict())


def test_without_validation_the_last_student_is_saved(tmp_path: Path) -> None:
    engine = run(tmp_path)
    assert toys.same(torch.load(tmp_path / "model.pt", weights_only=True), engine.network.state_dict())


def test_a_wrapper_leaves_no_trace_in_the_names(tmp_path: Path) -> None:
    network = toys.student()
    toys.make_trainer(network, [CheckpointHandler(tmp_path, {"network": nn.DataParallel(network)})], epochs=1).run()
    assert load_tensors(tmp_path / "model.pt").keys() == network.state_dict().keys()


# ---- which checkpoints are there -----------------------------------------------------------------------------------


def test_the_two_newest_epochs_are_kept_and_hold_tensors_and_numbers_alone(tmp_path: Path) -> None:
    toys.Run(tmp_path, epochs=4).trainer.run()
    assert names(tmp_path / "checkpoints") == ["epoch_00003.pt", "epoch_00004.pt"]
    content = torch.load(tmp_path / "checkpoints" / "epoch_00004.pt", weights_only=True)
    assert content["objects"].keys() == {"network", "distill_loss", "optimizer", "lr_scheduler"}
    assert (content["epoch"], content["iteration"], content["epoch_length"]) == (4, 8, 2)
    assert "1.projectors.0.weight" in content["objects"]["distill_loss"]


def test_a_new_run_sets_the_checkpoints_of_an_earlier_one_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, epochs=5)
    with caplog.at_level(logging.INFO, "medkd"):
        run(tmp_path, epochs=1)
    assert names(tmp_path / "checkpoints") == ["epoch_00001.pt"]
    assert names(tmp_path / "before_1/checkpoints") == ["epoch_00004.pt", "epoch_00005.pt"]
    assert f"checkpoints of an earlier run are now in {tmp_path / 'before_1'}" in caplog.text
    run(tmp_path, epochs=2)
    assert names(tmp_path / "before_2/checkpoints") == ["epoch_00001.pt"]
    assert names(tmp_path / "before_1/checkpoints") == ["epoch_00004.pt", "epoch_00005.pt"]


def test_a_rank_that_is_not_the_first_writes_nothing_and_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    run(tmp_path, epochs=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_objects_without_the_student_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`objects` must have the key 'network', the student, got \['model'\]"):
        CheckpointHandler(tmp_path, {"model": toys.student()})


# ---- resuming from the right run -----------------------------------------------------------------------------------


def test_resuming_without_a_checkpoint_starts_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "medkd"):
        assert run(tmp_path, resume=True).state.iteration == 4
    assert "to resume from: starting at the first epoch" in caplog.text


def test_resuming_a_finished_run_trains_no_step(tmp_path: Path) -> None:
    first = run(tmp_path)
    steps: list[int] = []
    count = toys.on(Events.ITERATION_STARTED, lambda engine: steps.append(engine.state.iteration))
    second = run(tmp_path, resume=True, handlers=[count])
    assert steps == []
    assert toys.same(first.network.state_dict(), second.network.state_dict())


def test_resuming_goes_on_with_the_best_validation_and_the_scale_of_gradients(tmp_path: Path) -> None:
    def run_with(scale: float, resume: bool) -> toys.Run:
        scaler = toys.on(Events.STARTED, lambda e: setattr(e, "scaler", torch.amp.GradScaler("cpu", init_scale=scale)))
        whole = toys.Run(tmp_path, epochs=2, resume=resume, extra=[scaler])
        whole.trainer.run()
        return whole

    first, second = run_with(1024.0, resume=False), run_with(1.0, resume=True)
    assert second.trainer.scaler.get_scale() == 1024   # type: ignore[union-attr]
    assert second.evaluator.state.best_metric_epoch == first.evaluator.state.best_metric_epoch >= 1
    assert second.evaluator.state.best_metric == first.evaluator.state.best_metric > 0


def test_a_checkpoint_of_more_ranks_is_resumed_with_the_memory_of_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toys.Run(tmp_path, epochs=1, memory=True).trainer.run()
    assert "ranks" not in caplog.text
    path = tmp_path / "checkpoints" / "epoch_00001.pt"
    content = load_tensors(path)
    other = {"distill_loss": {"2.bank.voxel_moments": torch.full((5, 2, 2), 7.0)}}
    torch.save(content | {"memories": [other, other]}, path)
    resumed = toys.Run(tmp_path, epochs=1, memory=True, resume=True)
    resumed.trainer.run()
    assert "The checkpoint is of 2 ranks: all take the memories of the first." in caplog.text
    assert toys.same(resumed.result()["distill_loss"], content["objects"]["distill_loss"])


def test_resuming_with_more_epochs_goes_on_where_that_is_asked_for(tmp_path: Path) -> None:
    run(tmp_path, epochs=2)
    with pytest.raises(ValueError, match=r"max_epochs: 2, now 3\nGive the same again; or go on .* `--resume changed`"):
        run(tmp_path, epochs=3, resume=True)
    assert run(tmp_path, epochs=3, resume="changed").state.iteration == 6
    assert names(tmp_path / "checkpoints") == ["epoch_00002.pt", "epoch_00003.pt"]


def test_resuming_with_another_teacher_is_refused(tmp_path: Path) -> None:
    def with_teacher(seed: int) -> list[Any]:
        path = tmp_path / f"teacher_{seed}.pt"
        torch.save(toys.teacher(seed).state_dict(), path)
        return [DistillationHandler(Teacher(toys.teacher, path), SoftLabelLoss())]

    run(tmp_path, handlers=with_teacher(1))
    message = r"epoch_00002.pt must be made with .* got others:\n  teacher_sha256: [0-9a-f]{64}, now [0-9a-f]{64}\nGive"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=True, handlers=with_teacher(2))
    with pytest.raises(ValueError, match="teacher_sha256: [0-9a-f]{64}, now None"):
        run(tmp_path, resume=True)
    run(tmp_path, epochs=3, resume="changed", handlers=with_teacher(2))


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="\n  training data: 4 cases, now 6\n  epoch_length: 2, now 3\n"):
        run(tmp_path, resume=True, data=toys.cases(6))


def test_resuming_with_fewer_epochs_is_refused(tmp_path: Path) -> None:
    run(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="epoch_00003.pt has done 3 epochs, this run ends at 2; give more epochs"):
        run(tmp_path, epochs=2, resume=True)


def test_resuming_with_another_student_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    saver = CheckpointHandler(tmp_path, {"network": toys.teacher()}, resume=True)
    with pytest.raises(ValueError, match="epoch_00002.pt does not fit 'network' of this run"):
        toys.make_trainer(toys.student(), [saver]).run()


def test_resuming_with_an_object_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    saver = CheckpointHandler(tmp_path, {"network": toys.student(), "bank": toys.student()}, resume=True)
    with pytest.raises(ValueError, match=r"epoch_00002.pt must hold 'bank' to resume, got \['network', 'optimizer'\]"):
        toys.make_trainer(toys.student(), [saver]).run()


def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    torch.save(toys.student().state_dict(), tmp_path / "checkpoints" / "epoch_00001.pt")
    with pytest.raises(ValueError, match="epoch_00001.pt must be a checkpoint of a training run, got"):
        run(tmp_path, resume=True)


def test_a_checkpoint_says_with_which_settings_it_was_made(tmp_path: Path) -> None:
    def settled(resume: Any = False, epochs: int = 2, **settings: Any) -> None:
        network = toys.student()
        saver = CheckpointHandler(tmp_path, {"network": network}, resume=resume, settings=settings)
        toys.make_trainer(network, [saver], epochs=epochs).run()

    settled(rate=0.1, spacing=[1, 2], seed=0, **{"amp": "$True", "loss#rate": 2})
    assert json.loads((tmp_path / "model.json").read_text())["options"] == {"rate": 0.1, "spacing": [1, 2], "seed": 0}
    record = load_tensors(tmp_path / "checkpoints/epoch_00002.pt")["record"]
    assert record["settings"] == {"rate": 0.1, "spacing": [1, 2], "seed": 0, "amp": "$True", "loss#rate": 2}
    assert record["built"]["max_epochs"] == 2
    message = (
        r"epoch_00002.pt must be made with the settings and data of this run to be resumed exactly, got others:\n"
        r"  spacing: \[1, 2\], now \[1, 3\]\n  seed: 0, now 1\n  amp: '\$True', now not set\n"
        r"  loss#rate: 2, now not set\nGive the same again; or go on with the new ones by `--resume changed`; "
        r"without `--resume` a new run starts, which sets them aside."
    )
    with pytest.raises(ValueError, match=message):
        settled(resume=True, rate=0.1, spacing=[1, 3], seed=1)
    settled(resume="changed", epochs=3, rate=0.1, spacing=[1, 3], seed=1)
    settled(resume=True, epochs=3, rate=0.1, spacing=[1, 3], seed=1)


def test_a_checkpoint_of_an_older_version_is_resumed_as_before_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = toys.Run(tmp_path, epochs=2)
    whole.trainer.run()
    path = tmp_path / "checkpoints/epoch_00002.pt"
    content = load_tensors(path)
    new = {"record", "selection", "unsaved_student"}
    torch.save({key: value for key, value in content.items() if key not in new}, path)
    resumed = toys.Run(tmp_path, epochs=2, resume=True)
    resumed.trainer.run()
    assert toys.same(whole.result(), resumed.result())
    assert caplog.text.count("epoch_00002.pt has no record of its settings and data") == 1


# ---- what has to be in it ------------------------------------------------------------------------------------------


class Publisher:
    """Says which losses are at work, as the `DistillationHandler` does."""

    def __init__(self, *losses: nn.Module) -> None:
        self.losses = list(losses)

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "distill_modules", self.losses))


def test_a_loss_that_learns_has_to_be_saved_whatever_the_order_of_handlers(tmp_path: Path) -> None:
    network = toys.student()
    handlers = [CheckpointHandler(tmp_path, {"network": network}), Publisher(toys.hint_loss())]
    with pytest.raises(ValueError, match="`objects` must have the losses of the .*, got no HintLoss"):
        toys.make_trainer(network, handlers, epochs=1).run()


@pytest.mark.parametrize("nested", [False, True])
def test_a_loss_that_learns_or_remembers_has_to_be_saved(tmp_path: Path, nested: bool) -> None:
    learning, remembering, plain = toys.hint_loss(), toys.memory_loss(), SoftLabelLoss()
    network = toys.student()

    def train(**objects: Any) -> None:
        saver = CheckpointHandler(tmp_path, {"network": network, **objects})
        toys.make_trainer(network, [Publisher(learning, remembering, plain), saver], epochs=1).run()

    message = r"`objects` must have the losses of the `DistillationHandler`, got no HintLoss, .* Add it: \{\"network"
    with pytest.raises(ValueError, match=message):
        train()
    with pytest.raises(ValueError, match="got no GraphRelationLoss"):
        train(distill_loss=learning)
    train(distill_loss=nn.ModuleList([learning, remembering]) if nested else [plain, remembering, learning])


def test_an_optimizer_or_schedule_that_is_not_saved_is_told_in_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = toys.Run(tmp_path, epochs=1)
    whole.trainer.run()
    assert "a resumed run would start it anew" not in caplog.text
    network = toys.student()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = LrScheduleHandler(torch.optim.lr_scheduler.ConstantLR(optimizer), print_lr=False)
    saver = CheckpointHandler(tmp_path, {"network": network})
    toys.make_trainer(network, [schedule, saver], optimizer=optimizer, epochs=1).run()
    for name in ("optimizer", "lr_scheduler"):
        assert f"`objects` has no {name} of this trainer: a resumed run would start it anew. Add it." in caplog.messages


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_an_untrusted_checkpoint_is_not_run_and_not_taken_for_no_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    path, mark = tmp_path / "checkpoints" / "epoch_00001.pt", tmp_path / "was_here"
    torch.save({"objects": Attack(mark)}, path)
    with pytest.raises(ValueError, match="`resume` needs a whole checkpoint with tensors only, got none of 1 in"):
        run(tmp_path, resume=True)
    assert not mark.exists()
    assert names(tmp_path / "checkpoints") == ["epoch_00001.pt"]


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path, epochs=3)
    path = tmp_path / "checkpoints" / "epoch_00003.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert run(tmp_path, epochs=3, resume=True).state.iteration == whole.state.iteration
    assert "Passing over a checkpoint" in caplog.text
    assert "epoch_00003.pt` must be a whole weights file" in caplog.text
    load_tensors(path)
