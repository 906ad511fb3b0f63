# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole whenever the machine stops, and from which a run ends bit-identical."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor, nn

from medkd.taps import unwrap
from medkd.weights import load_tensors

__all__ = ["CheckpointHandler", "save_atomically"]

_KEPT = 2
logger = logging.getLogger(__name__)


def save_atomically(content: Any, path: Path) -> None:
    """Write with `torch.save` to a temporary file beside `path`, sync it to the disk, and rename it.

    At every moment `path` is either the old file or the new one, whole.

    Raises:
        OSError: the disk is full or read-only; the old file stays.
    """
    _write_atomically(path, lambda file: torch.save(content, file))


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":                                     # the name is in the folder: sync that, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except RuntimeError as error:                                  # how torch reports a failed write
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


class CheckpointHandler:
    """Save all that a run needs to go on at each epoch's end, and the best student as `model.pt`.

    Checkpoints lie in `directory/checkpoints/epoch_<n>.pt`, where MONAI Label does not offer them; the newest two are
    kept, and the older one is deleted only after the new one is on the disk. `model.pt` is the student's bare state
    dict, beside it `model.json` says how it was trained. A failed write is logged and training goes on; `saved` in
    `model.json` is false then, with the `reason`, until a later student is saved. Place it last in the list, behind
    validation, learning-rate schedule and `DistillationHandler`.

    Args:
        directory: where weights go; `ckpt_dir` of the bundle.
        objects: name -> module, optimizer or scheduler (or list of modules). `network` is the student. The gradient
            scaler and the epoch are added.
        evaluator: the validation engine, whose best metric decides on `model.pt`. None saves the last student.
        resume: True goes on from the newest whole checkpoint, if there is one.

    Raises:
        ValueError: `objects` without `network`; at start: a checkpoint of another run (teacher, networks, epochs).
    """

    def __init__(
        self, directory: str | os.PathLike[str], objects: Mapping[str, Any], evaluator: Any | None = None,
        resume: bool = False,
    ) -> None:
        if "network" not in objects:
            raise ValueError(f"`objects` must have the key 'network', the student, got {sorted(objects)}.")
        self.directory = Path(directory)
        self._folder = self.directory / "checkpoints"
        self.objects = {name: _loadable(value) for name, value in objects.items()}
        self.evaluator = evaluator
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Any) -> None:
        found = _newest_first(self._folder)
        if not self.resume:
            if found and idist.get_rank() == 0:
                self._set_aside()
            return
        for path in found:
            try:
                content = load_tensors(path)
            except ValueError as error:
                logger.warning("Passing over a checkpoint: %s", error)
                continue
            self._restore(engine, content, path)
            return
        if found:
            raise ValueError(
                f"`resume` needs a whole checkpoint with tensors only, got none of {len(found)} in {self._folder}; "
                "start anew without `--resume`, which sets them aside."
            )
        logger.info("No checkpoint in %s to resume from: starting at the first epoch.", self._folder)

    def _set_aside(self) -> None:
        """Keep the checkpoints of an earlier run out of this one's way: a later `resume` must not mix two runs."""
        aside = self._folder.with_name("checkpoints_before")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(self._folder, aside)
        logger.info(
            "Starting anew; the checkpoints of an earlier run are now in %s. To go on with them instead, rename the "
            "folder back to %s and give `--resume true`.", aside, self._folder.name,
        )

    def _restore(self, engine: Any, content: dict[str, Any], path: Path) -> None:
        problem = _misfit(engine, content)
        if problem:
            raise ValueError(f"{path} {problem}")
        for name, target in self.objects.items():
            if name not in content["objects"]:
                raise ValueError(f"{path} must hold {name!r} to resume, got {sorted(content['objects'])}.")
            try:
                target.load_state_dict(content["objects"][name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(f"{path} does not fit {name!r} of this run; it cannot be resumed: {error}") from error
        self._restore_memories(content.get("memories", []))
        if getattr(engine, "scaler", None) is not None and content["scaler"]:
            engine.scaler.load_state_dict(content["scaler"])
        engine.state.epoch, engine.state.iteration = content["epoch"], content["iteration"]
        if self.evaluator is not None:
            self.evaluator.state.best_metric = content["best_metric"]
            self.evaluator.state.best_metric_epoch = content["best_metric_epoch"]
        logger.info("Resuming after epoch %d of %d from %s", content["epoch"], engine.state.max_epochs, path)

    def _restore_memories(self, memories: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Give each rank its own again; another number of ranks goes on with that of the first."""
        if len(memories) != idist.get_world_size():
            if memories:
                logger.warning("The checkpoint is of %d ranks: all take the memories of the first.", len(memories))
            return
        for name, buffers in memories[idist.get_rank()].items():
            for path, value in buffers.items():
                self.objects[name].get_buffer(path).copy_(value)

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
        if idist.get_rank() == 0:
            if self.evaluator is not None and self._best_epoch() == engine.state.epoch:
                self._write_student(engine)
            self._write_checkpoint(engine, memories)

    def _best_epoch(self) -> int:
        return int(self.evaluator.state.best_metric_epoch) if self.evaluator is not None else -1

    def _finish(self, engine: Any) -> None:
        if idist.get_rank() == 0 and self._best_epoch() < 1:
            logger.info("No validation took place: the last student is saved.")
            self._write_student(engine)

    def _write_student(self, engine: Any) -> None:
        state = self.objects["network"].state_dict()
        path = self.directory / "model.pt"
        try:
            save_atomically({key: value.detach().cpu() for key, value in state.items()}, path)
            _write_json(self._describe(engine), path.with_suffix(".json"))
        except OSError as error:
            logger.error("The student was NOT saved to %s: %s. Training goes on; free some space.", path, error)
            _mark_unsaved(path.with_suffix(".json"), str(error))

    def _describe(self, engine: Any) -> dict[str, Any]:
        run = {"saved": True, **getattr(engine.state, "distillation", {"mode": "supervised"})}
        run["weights"] = getattr(engine.state, "distill_weights", {}) if run["mode"] == "distilled" else {}
        run["epoch"], run["max_epochs"] = engine.state.epoch, engine.state.max_epochs
        if self._best_epoch() >= 1:
            state = self.evaluator.state   # type: ignore[union-attr]
            run["validation"] = {state.key_metric_name: float(state.best_metric)}
        return run

    def _write_checkpoint(self, engine: Any, memories: Sequence[Any]) -> None:
        path = self._folder / f"epoch_{engine.state.epoch:05d}.pt"
        best = self.evaluator.state if self.evaluator is not None else None
        scaler = getattr(engine, "scaler", None)
        content = {
            "objects": {name: value.state_dict() for name, value in self.objects.items()},
            "memories": list(memories),
            "scaler": scaler.state_dict() if scaler is not None else {},
            **{name: getattr(engine.state, name) for name in ("epoch", "iteration", "epoch_length")},
            "best_metric": float(best.best_metric) if best is not None else -1.0,
            "best_metric_epoch": self._best_epoch(),
            "teacher_sha256": getattr(engine.state, "distillation", {}).get("teacher_sha256"),
        }
        try:
            save_atomically(content, path)
        except OSError as error:
            logger.error("Checkpoint %s was NOT saved: %s. The previous one is whole; training goes on.", path, error)
            return
        for old in _newest_first(self._folder)[_KEPT:]:
            old.unlink(missing_ok=True)


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(content, indent=2) + "\n"
    _write_atomically(path, lambda file: file.write(text.encode()))


def _mark_unsaved(path: Path, reason: str) -> None:
    """Say in the description of the older weights that better ones are lost; a disk too full for that loses it."""
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
        _write_json({**before, "saved": False, "reason": reason}, path)
    except (OSError, ValueError):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _loadable(value: Any) -> Any:
    """Something with a state dict; wrapped networks lose their wrapper, lists of modules become one module."""
    if isinstance(value, (list, tuple)):
        return nn.ModuleList(value)
    return unwrap(value) if isinstance(value, nn.Module) else value


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch_*.pt"), reverse=True)


def _misfit(engine: Any, content: Mapping[str, Any]) -> str | None:
    """Say why a checkpoint is not of this run, if so."""
    if not isinstance(content.get("objects"), Mapping):
        return f"must be a checkpoint of a training run, got {sorted(content)[:5]}."
    old, run = content["teacher_sha256"], engine.state
    teacher = getattr(run, "distillation", {}).get("teacher_sha256")
    if old != teacher:
        return (
            f"was trained with the teacher {old}, this run has {teacher}; resume with the same teacher and "
            "weights, or start anew without `--resume`."
        )
    steps, epoch, own = content["epoch_length"], content["epoch"], run.epoch_length
    if steps != own:
        return f"has {steps} steps per epoch, this run {own}; resume with the same data and batch size."
    if epoch > run.max_epochs:
        return f"has done {epoch} epochs, this run ends at {run.max_epochs}; give more epochs."
    return None
