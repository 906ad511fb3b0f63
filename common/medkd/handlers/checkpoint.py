# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole whenever the machine stops, and from which a run ends bit-identical."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor, nn

from medkd.handlers.atomic import mark_unsaved, save_atomically, write_json
from medkd.handlers.resuming import Resume, as_resume, load_anew, load_objects
from medkd.handlers.run_folder import FolderInUseError, RunFolder, check_writable, newest_first
from medkd.handlers.run_record import built_settings, describe_data, differences
from medkd.handlers.selection import Selection
from medkd.losses.base import DistillationLoss
from medkd.settings import plain_options, run_class_names
from medkd.taps import unwrap
from medkd.weights import load_tensors

__all__ = ["CheckpointHandler", "save_atomically"]

_KEPT = 2
_ANEW = "without `--resume` a new run starts, which sets them aside"
logger = logging.getLogger(__name__)


class CheckpointHandler:
    """Save all that a run needs to go on at each epoch's end, and the best student as `model.pt`.

    Checkpoints lie in `directory/checkpoints/epoch_<n>.pt`, where MONAI Label does not offer them; the newest two are
    kept, and the older one is deleted only after the new one is on the disk. `model.pt` is the student's bare state
    dict, beside it `model.json` says how it was trained. What an earlier run left is set aside, see `RunFolder`. Place
    it last in the list, behind validation, learning-rate schedule and `DistillationHandler`.

    A failed write is logged and training goes on; `saved` in `model.json` is false then, with the `reason`, until the
    student is saved, which is tried again at each epoch's end. A run whose last state or best student is not on the
    disk at its end fails.

    The best student is that of the best validation. A value that is no number never chooses; when all validations gave
    one value, or none, the last student is taken.

    Args:
        directory: where weights go; `ckpt_dir` of the bundle. One run at a time may have it.
        objects: name -> module, optimizer or scheduler (or list of modules). `network` is the student; losses that
            learn or remember belong there, too. The gradient scaler and the epoch are added.
        evaluator: the validation engine, whose best metric decides on `model.pt`. None saves the last student.
        resume: true goes on from the newest whole checkpoint, if there is one, with the settings and data that it was
            made with; 'changed' goes on with those of this run: rates, weights of terms, epochs, data. A schedule is
            the new one then, wound forward by what is done.
        settings: what this run was asked for, `medkd.settings.run_settings()`; None compares optimizers and schedules.
        more_objects: further ones, as a config lists what only its distillation has.

    Raises:
        ValueError: `objects` without `network`, another `resume`; at start: a checkpoint of a run with another teacher,
            other networks, settings or data; a loss of the `DistillationHandler` that is not in `objects`.
        OSError: at start: `directory` cannot be written to; at the end: the last state or best student is not saved.
        FolderInUseError: at start: another run, which is alive, has `directory`.
    """

    def __init__(
        self, directory: str | os.PathLike[str], objects: Mapping[str, Any], evaluator: Any | None = None,
        resume: Resume | str = False, settings: Mapping[str, Any] | None = None,
        more_objects: Mapping[str, Any] | None = None,
    ) -> None:
        objects = {**objects, **(more_objects or {})}
        if "network" not in objects:
            raise ValueError(f"`objects` must have the key 'network', the student, got {sorted(objects)}.")
        self.objects = {name: _loadable(value) for name, value in objects.items()}
        self.evaluator = evaluator
        self.resume = as_resume(resume)
        self.settings = dict(settings or {})
        self._class_names = run_class_names()
        self._folder = RunFolder(directory)
        self._built = built_settings(self.objects)                 # before anything is loaded
        self._selection = Selection(evaluator)
        self._record: dict[str, Any] = {}
        self._unsaved_student: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._unsaved_state: tuple[int, Sequence[Any]] | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._check_losses)   # whatever the order of handlers
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._break_off)

    # ---- start -----------------------------------------------------------------------------------------------------

    def _start(self, engine: Any) -> None:
        self._check_objects(engine)
        self._unsaved_student = self._unsaved_state = None
        self._record = _of_first_rank(self._describe_run(engine))
        self._on_first_rank(self._folder.open)
        found = self._read_newest() if self.resume else None
        if found is not None:
            self._restore(engine, *found)
            return
        self._on_first_rank(self._begin)

    def _begin(self) -> None:
        self._folder.set_checkpoints_aside()
        check_writable(self._folder.checkpoints, "`ckpt_dir`")

    def _check_losses(self, engine: Any) -> None:
        """Refuse losses that a resumed run would lack."""
        modules = [part for value in self.objects.values() if isinstance(value, nn.Module) for part in value.modules()]
        for module in getattr(engine.state, "distill_modules", ()):
            if module.state_dict() and not any(module is part for part in modules):
                needed, added = "what is trained beside the student", '"discriminator": ..., "discriminator_optimizer"'
                if isinstance(module, DistillationLoss):
                    needed, added = "the losses of the `DistillationHandler`", '"distill_loss"'
                raise ValueError(
                    f"`objects` must have {needed}, got no {type(module).__name__}, which learns or remembers: a "
                    "resumed run would have it as it was before training. Add it: "
                    f'{{"network": ..., {added}: ..., "optimizer": ...}}.'
                )

    def _check_objects(self, engine: Any) -> None:
        """Also tell of what a resumed run would start anew."""
        self._check_losses(engine)
        for name, thing in _moved_by(engine):
            if not any(thing is value for value in self.objects.values()):
                logger.warning("`objects` has no %s of this trainer: a resumed run would start it anew. Add it.", name)

    def _describe_run(self, engine: Any) -> dict[str, Any]:
        validation = {} if self.evaluator is None else {"validation": self.evaluator.data_loader}
        return {
            "settings": self.settings,
            "built": {"max_epochs": engine.state.max_epochs, **self._built},
            "data": describe_data(training=engine.data_loader, **validation),
        }

    def _read_newest(self) -> tuple[dict[str, Any], Path] | None:
        folder = self._folder.checkpoints
        found = newest_first(folder)
        for path in found:
            try:
                return load_tensors(path), path
            except ValueError as error:
                logger.warning("Passing over a checkpoint: %s", error)
        if found:
            raise ValueError(
                f"`resume` needs a whole checkpoint with tensors only, got none of {len(found)} in {folder}; {_ANEW}."
            )
        logger.info("No checkpoint in %s to resume from: starting at the first epoch.", folder)
        return None

    def _restore(self, engine: Any, content: dict[str, Any], path: Path) -> None:
        if not isinstance(content.get("objects"), Mapping):
            raise ValueError(f"{path} must be a checkpoint of a training run, got {sorted(content)[:5]}.")
        self._compare(engine, content, path)
        epoch, state = content["epoch"], engine.state
        if self.resume == "changed":
            state.epoch, state.iteration = epoch, epoch * state.epoch_length
            load_anew(self.objects, content, path, state.iteration)
        else:
            state.epoch, state.iteration = epoch, content["iteration"]
            load_objects(self.objects, content, path)
        self._restore_memories(content.get("memories", []))
        if getattr(engine, "scaler", None) is not None and content["scaler"]:
            engine.scaler.load_state_dict(content["scaler"])
        self._restore_selection(content)
        unsaved = content.get("unsaved_student")
        self._unsaved_student = (unsaved["weights"], unsaved["description"]) if unsaved else None
        logger.info("Resuming after epoch %d of %d from %s", epoch, state.max_epochs, path)

    def _compare(self, engine: Any, content: Mapping[str, Any], path: Path) -> None:
        """Refuse a checkpoint that was made with something else, or say what is else, if that is asked for."""
        state, record = engine.state, content.get("record")
        if content["epoch"] > state.max_epochs:
            raise ValueError(
                f"{path} has done {content['epoch']} epochs, this run ends at {state.max_epochs}; give more epochs."
            )
        if record is None:
            logger.warning("%s has no record of its settings and data, which older versions did not write: they are "
                           "taken for those of this run.", path)
        lines = differences(record, self._record) if record else []
        for name, new in (("teacher_sha256", _teacher(state)), ("epoch_length", state.epoch_length)):
            if content[name] != new:
                lines.append(f"{name}: {content[name]}, now {new}")
        if not lines:
            return
        text = "\n  ".join(["", *lines])
        if self.resume != "changed":
            raise ValueError(
                f"{path} must be made with the settings and data of this run to be resumed exactly, got others:{text}\n"
                f"Give the same again; or go on with the new ones by `--resume changed`; {_ANEW}."
            )
        logger.warning("Going on with other settings than those of %s:%s", path, text)

    def _restore_selection(self, content: Mapping[str, Any]) -> None:
        """Go on with the best student, if this run measures by the same metric on the same cases."""
        best = [content["best_metric"], content["best_metric_epoch"]]
        old = {"metric": self._selection.name, "best": best, "count": 0, "first": 0.0, "differs": False, "nothing": 0}
        old |= content.get("selection") or {}
        validation = [(content.get("record") or self._record)["data"]["lists"].get("validation"),
                      self._record["data"]["lists"].get("validation")]
        if old["metric"] == self._selection.name and validation[0] == validation[1]:
            self._selection.load_state_dict(old)
            self._folder.go_on()
        else:
            logger.warning("The validation is another one than before: the best student is chosen anew.")

    def _restore_memories(self, memories: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Give each rank its own again; another number of ranks goes on with that of the first."""
        if len(memories) != idist.get_world_size():
            if memories:
                logger.warning("The checkpoint is of %d ranks: all take the memories of the first.", len(memories))
            return
        for name, buffers in memories[idist.get_rank()].items():
            for path, value in buffers.items():
                self.objects[name].get_buffer(path).copy_(value)

    # ---- epochs ----------------------------------------------------------------------------------------------------

    def _memories(self) -> list[dict[str, dict[str, Tensor]]]:
        """Buffers of all modules but the network, of each rank: what their losses remember."""
        own = {
            name: {path: buffer.detach().cpu() for path, buffer in value.named_buffers()}
            for name, value in self.objects.items() if name != "network" and isinstance(value, nn.Module)
        }
        if idist.get_world_size() == 1 or not any(own.values()):
            return []
        gathered: list[Any] = [None] * idist.get_world_size()
        dist.all_gather_object(gathered, own)
        return gathered

    def _end_epoch(self, engine: Any) -> None:
        memories = self._memories()                                # a matter of all ranks
        self._selection.look(engine.state.epoch)
        if idist.get_rank() == 0:
            if self._selection.epoch == engine.state.epoch:
                self._write_student(engine)
            elif self._unsaved_student is not None:
                self._try_to_save(*self._unsaved_student)
            self._write_checkpoint(engine, memories)

    def _write_student(self, engine: Any) -> None:
        state = self.objects["network"].state_dict()
        self._try_to_save({key: value.detach().cpu() for key, value in state.items()}, self._describe(engine))

    def _try_to_save(self, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
        path = self._folder.student
        try:
            self._folder.set_student_aside()
            save_atomically(weights, path)
            write_json(description, self._folder.description)
            self._unsaved_student = None
        except OSError as error:
            logger.error("The student was NOT saved to %s: %s. Training goes on; free some space.", path, error)
            if self._folder.student_is_own:
                mark_unsaved(self._folder.description, str(error))
            if self._unsaved_student is None or self._unsaved_student[0] is not weights:
                self._unsaved_student = {key: value.clone() for key, value in weights.items()}, description

    def _describe(self, engine: Any) -> dict[str, Any]:
        run = {"saved": True, **getattr(engine.state, "distillation", {"mode": "supervised"})}
        run["weights"] = getattr(engine.state, "distill_weights", {}) if run["mode"] == "distilled" else {}
        balance = {term: one for term, one in getattr(engine.state, "distill_balance", {}).items() if one != 1.0}
        run |= {"balance": balance} if balance else {}
        run["epoch"], run["max_epochs"] = engine.state.epoch, engine.state.max_epochs
        options = plain_options(self.settings)
        run |= {"options": options} if options else {}
        run |= {"labels": self._class_names} if self._class_names else {}
        if self._selection.epoch >= 1:
            run["validation"] = {self._selection.name: self._selection.metric}
        return run

    def _write_checkpoint(self, engine: Any, memories: Sequence[Any]) -> None:
        path = self._folder.checkpoints / f"epoch_{engine.state.epoch:05d}.pt"
        scaler, unsaved = getattr(engine, "scaler", None), self._unsaved_student
        content = {
            "objects": {name: value.state_dict() for name, value in self.objects.items()},
            "memories": list(memories),
            "scaler": scaler.state_dict() if scaler is not None else {},
            **{name: getattr(engine.state, name) for name in ("epoch", "iteration", "epoch_length")},
            "best_metric": self._selection.metric,
            "best_metric_epoch": self._selection.epoch,
            "selection": self._selection.state_dict(),
            "unsaved_student": unsaved and {"weights": unsaved[0], "description": unsaved[1]},
            "teacher_sha256": _teacher(engine.state),
            "record": self._record,
        }
        try:
            save_atomically(content, path)
        except OSError as error:
            self._unsaved_state = engine.state.iteration, memories
            logger.error("Checkpoint %s was NOT saved: %s. The previous one is whole; training goes on.", path, error)
            return
        self._unsaved_state = None
        for old in newest_first(self._folder.checkpoints)[_KEPT:]:
            old.unlink(missing_ok=True)

    # ---- end -------------------------------------------------------------------------------------------------------

    def _finish(self, engine: Any) -> None:
        if idist.get_rank() != 0:
            return
        reason = self._selection.verdict()
        if reason is not None:
            level = logging.INFO if self.evaluator is None else logging.WARNING
            logger.log(level, "%s: the last student is saved.", reason)
            self._write_student(engine)
        self._refuse_losses(engine)
        self._compare_with_earlier()
        self._folder.close()

    def _refuse_losses(self, engine: Any) -> None:
        """Try once more to save what is not on the disk; a run that cannot keep what it has worked out has failed."""
        if self._unsaved_student is not None:
            self._try_to_save(*self._unsaved_student)
        if self._unsaved_state is not None and self._unsaved_state[0] == engine.state.iteration:
            self._write_checkpoint(engine, self._unsaved_state[1])
        unsaved = {"its student": self._unsaved_student, "its last state": self._unsaved_state}
        lost = [name for name, thing in unsaved.items() if thing is not None]
        if lost:
            raise OSError(
                f"`ckpt_dir` must hold what the run ends with, got no room for {' and '.join(lost)} in "
                f"{self._folder.directory} (see the errors above); free some space, and go on with `--resume true`."
            )

    def _compare_with_earlier(self) -> None:
        """Say where a better student lies than this run's, if it replaced one."""
        name, best = self._selection.name, None
        for value, path in self._folder.earlier_students(name) if name is not None else ():
            if self._selection.is_better(value, self._selection.metric if best is None else best[0]):
                best = value, path
        if best is not None:
            logger.warning("%s: an earlier student had %s %.4f, this run's has %.4f; the earlier one is kept there.",
                           best[1], name, best[0], self._selection.metric)

    def _break_off(self, _engine: Any, error: BaseException) -> None:
        self._folder.close()
        raise error                                                # ignite would go on

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Do something on the first rank; where it fails, all ranks end with the same error, and none waits."""
        failed: Exception | None = None
        if idist.get_rank() == 0:
            try:
                action()
            except (OSError, FolderInUseError) as error:
                failed = error
        failed = _of_first_rank(failed)
        if failed is not None:
            raise failed


def _of_first_rank(value: Any) -> Any:
    """What the first rank has for it."""
    shared = [value]
    if idist.get_world_size() > 1:
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _loadable(value: Any) -> Any:
    """Something with a state dict; wrapped networks lose their wrapper, lists of modules become one module."""
    if isinstance(value, (list, tuple)):
        return nn.ModuleList(value)
    return unwrap(value) if isinstance(value, nn.Module) else value


def _teacher(state: Any) -> str | None:
    """Hash of the teacher's weights."""
    sha256: str | None = getattr(state, "distillation", {}).get("teacher_sha256")
    return sha256


def _moved_by(engine: Any) -> Iterator[tuple[str, Any]]:
    """What a trainer steps: optimizers, the schedules of its handlers, and factors that follow gradients."""
    if getattr(engine, "optimizer", None) is not None:
        yield "optimizer", engine.optimizer
    for event in (Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED):
        for handler, *_ in engine._event_handlers[event]:          # ignite has no public list of its handlers
            schedule = getattr(handler, "lr_scheduler", None)
            if schedule is not None:
                yield "lr_scheduler", schedule
    yield from getattr(engine.state, "distill_moved", {}).items()
