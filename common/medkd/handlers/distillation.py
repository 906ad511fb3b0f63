# SPDX-License-Identifier: Apache-2.0
"""Distillation on MONAI's unmodified `SupervisedTrainer`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import EventEnum, Events
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.trainer import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from medkd.checks import suggest
from medkd.handlers.cpu_autocast import cpu_autocast
from medkd.handlers.teacher import Teacher, teacher_image
from medkd.handlers.teacher_check import TeacherCheck
from medkd.losses.base import DistillationLoss, TapPair, distils
from medkd.taps import FeatureTaps, plain_tensor

__all__ = ["DistillationEvents", "DistillationHandler"]

logger = logging.getLogger(__name__)


class DistillationEvents(EventEnum):
    """Events of one training step that the handler adds to the trainer.

    * `TEACHER_COMPLETED`: the teacher has seen the batch; its tensors are in `engine.state.teacher`.
    * `TERMS_COMPLETED`: the terms are in `engine.state.output["kd/<term>"]` and added to the loss.
    """

    TEACHER_COMPLETED = "teacher_completed"
    TERMS_COMPLETED = "terms_completed"


class DistillationHandler:
    """Add weighted distillation terms to the loss of a supervised trainer.

    Runs the frozen teacher on the very batch that the student saw, computes the terms of one loss or several from
    named layers of both networks, and adds `sum(weight * factor * term)` to `engine.state.output["loss"]` before MONAI
    calls backward. With all weights 0 no teacher is built and training equals plain training bit for bit.

    What it leaves on the trainer: `state.distill_weights` (term -> weight; fixed), `state.distill_factors` (term ->
    factor, 1.0; schedules write here at `ITERATION_STARTED`), `state.distillation` (mode, teacher, hash), and in
    `state.output`: `supervised_loss` and the unweighted `kd/<term>`.

    Args:
        teacher: the teacher by reference, or a ready network.
        loss: one loss, or a list of losses with distinct terms.
        weights: term -> weight; terms not named weigh 0. None takes the losses' `preset_weights`.
        teacher_input: key of the batch that the teacher sees, in training and in its check, shape (B, C, *S).
        validator: an evaluator without handlers for the teacher's check; None only warns.
        teacher_check: `{"metric": name, "mode": "refuse" | "warn" | "off"}`; None is off.

    Raises:
        ValueError: unknown weight, two losses with one term, wrong tap path (at start), refused teacher (at start).

    Example:
        >>> from medkd.losses.logits import SoftLabelLoss
        >>> handler = DistillationHandler(nn.Conv3d(1, 2, 1), SoftLabelLoss(), {"logits": 0.5})
        >>> handler.weights
        {'logits': 0.5}
    """

    def __init__(
        self, teacher: Teacher | nn.Module, loss: DistillationLoss | Sequence[DistillationLoss],
        weights: Mapping[str, float] | None = None, teacher_input: str = "image",
        validator: SupervisedEvaluator | None = None, teacher_check: Mapping[str, str] | None = None,
    ) -> None:
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.losses = [loss] if isinstance(loss, DistillationLoss) else list(loss)
        self.weights = _resolve_weights(self.losses, weights)
        self.teacher_input = teacher_input
        self.check = _make_check(validator, teacher_check, teacher_input)
        self._callables: list[nn.Module] = []
        self._network: nn.Module | None = None
        self._taps: tuple[FeatureTaps, FeatureTaps] | None = None
        self._sums: dict[str, float] = {}

    def attach(self, engine: SupervisedTrainer) -> None:
        """Register on a trainer; `compile` and several GPUs are the trainer's affair."""
        engine.register_events(*DistillationEvents)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._open_taps)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._run_teacher)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add_terms)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._finish(engine)                                       # hooks of a run that broke off
        state = engine.state
        state.distill_weights = dict(self.weights)
        state.distill_factors = dict.fromkeys(self.weights, 1.0)
        state.distillation = {"mode": "supervised", "teacher": None, "teacher_sha256": None}
        self._sums = {}
        if not distils(self.weights):
            logger.info("All distillation weights are 0: plain supervised training.")
            return
        if self.teacher.is_missing and self.teacher.may_be_missing:
            self.teacher.allow_missing()
            return
        self._network = self.teacher.load(state.device)
        if self.check is not None:
            self.check(self._network)
        pairs = self._activate_losses(state.device)
        self._taps = (
            FeatureTaps(engine.network, [student for student, _ in pairs], "student"),
            FeatureTaps(self._network, [teacher for _, teacher in pairs], "teacher"),
        )
        path, sha256 = self.teacher.path, self.teacher.file_sha256
        state.distillation = {"mode": "distilled", "teacher": path and str(path), "teacher_sha256": sha256}

    def _activate_losses(self, device: torch.device) -> list[TapPair]:
        """Ready the losses that have a weight, and collect the taps that they read."""
        active = [loss for loss in self.losses if any(self.weights[term] for term in loss.terms)]
        for loss in active:
            loss.activate(term for term in loss.terms if self.weights[term])
            loss.to(device).train()
        self._callables = [_distributed(loss, device) for loss in active]
        return [pair for loss in active for pair in loss.tap_pairs]

    def _open_taps(self, engine: SupervisedTrainer) -> None:
        if self._taps is not None:
            self._taps[0].open()

    def _run_teacher(self, engine: SupervisedTrainer) -> None:
        if self._taps is None or self._network is None:
            return
        student = self._taps[0].close()
        student["pred"] = plain_tensor(engine.state.output["pred"])
        image = plain_tensor(teacher_image(engine.state.batch, self.teacher_input)).to(
            device=engine.state.device, dtype=self.teacher.dtype, non_blocking=engine.non_blocking
        )
        self._network.eval()
        self._taps[1].open()
        with torch.no_grad(), cpu_autocast(engine):
            pred = self._network(image)
        teacher = self._taps[1].close()
        teacher["pred"] = plain_tensor(pred)
        engine.state.student, engine.state.teacher = student, teacher
        engine.fire_event(DistillationEvents.TEACHER_COMPLETED)

    def _add_terms(self, engine: SupervisedTrainer) -> None:
        output = engine.state.output
        output["supervised_loss"] = output["loss"].detach()
        if self._taps is None:
            return
        label = output.get("label")
        label = plain_tensor(label) if isinstance(label, Tensor) else None
        parts: dict[str, Tensor] = {}
        for loss in self._callables:
            for term, value in loss(engine.state.student, engine.state.teacher, label).items():
                output[f"kd/{term}"] = value.detach()
                parts[f"part/{term}"] = self.weights[term] * engine.state.distill_factors[term] * value
        output["loss"] = sum(parts.values(), output["loss"])
        engine.state.student = engine.state.teacher = None
        engine.fire_event(DistillationEvents.TERMS_COMPLETED)
        for name, value in {**output, **parts}.items():
            if name in ("loss", "supervised_loss") or name.startswith(("kd/", "part/")):
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def _log_epoch(self, engine: SupervisedTrainer) -> None:
        if not self._sums:
            return
        steps = engine.state.epoch_length
        mean = {name: float(value) / steps for name, value in self._sums.items()}
        terms = "".join(
            f" + {mean[f'part/{term}']:.4f} ({term} {mean[f'kd/{term}']:.4f})"
            for term in self.weights
            if f"kd/{term}" in mean
        )
        logger.info(
            "Epoch %d/%d: loss %.4f = supervised %.4f%s",
            engine.state.epoch, engine.state.max_epochs, mean["loss"], mean["supervised_loss"], terms,
        )
        self._sums = {}

    def _finish(self, engine: SupervisedTrainer) -> None:
        for taps in self._taps or ():
            taps.remove()
        self._taps = self._network = None


def _resolve_weights(losses: Sequence[DistillationLoss], weights: Mapping[str, float] | None) -> dict[str, float]:
    terms = [term for loss in losses for term in loss.terms]
    if len(set(terms)) != len(terms):
        raise ValueError(f"`loss` must list losses with distinct terms, got {terms}.")
    if weights is None:
        return {term: float(loss.preset_weights.get(term, 0.0)) for loss in losses for term in loss.terms}
    for name, weight in weights.items():
        if name not in terms:
            raise ValueError(f"`weights` must name terms of the loss, got {name!r}; {suggest(name, terms)}")
        if not 0.0 <= float(weight) < math.inf:
            raise ValueError(f"`weights` must be finite numbers of at least 0, got {weight!r} for {name!r}.")
    return {term: float(weights.get(term, 0.0)) for term in terms}


def _make_check(
    validator: SupervisedEvaluator | None, options: Mapping[str, Any] | None, teacher_input: str
) -> TeacherCheck | None:
    if options is None:
        return None
    unknown = set(options) - {"metric", "mode"}
    if unknown or "metric" not in options:
        raise ValueError(f"`teacher_check` must have the keys 'metric' and 'mode', got {sorted(options)}.")
    return TeacherCheck(validator, teacher_input=teacher_input, **options)


def _distributed(loss: DistillationLoss, device: torch.device) -> nn.Module:
    """Wrap a loss with learnable heads, or every rank would train its own; memories stay those of each rank."""
    trainable = any(p.requires_grad for p in loss.parameters())
    if not trainable or not (dist.is_available() and dist.is_initialized()):
        return loss
    ids = [device] if torch.device(device).type == "cuda" else None
    return nn.parallel.DistributedDataParallel(loss, device_ids=ids, find_unused_parameters=True,
                                               broadcast_buffers=False)
