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
from medkd.handlers.agreement import TeacherAgreement
from medkd.handlers.cpu_autocast import cpu_autocast
from medkd.handlers.start_checks import check_optimizer, with_state
from medkd.handlers.step_checks import TermCheck, refuse_deaf
from medkd.handlers.teacher import Teacher, TeacherView
from medkd.handlers.teacher_check import TeacherCheck
from medkd.losses.base import DistillationLoss, TapPair, distils
from medkd.ops.prediction import Activation, logits_of
from medkd.ops.soft_label import complete
from medkd.outputs import MainOutput, plain_tensor
from medkd.taps import FeatureTaps, unwrap

__all__ = ["DistillationEvents", "DistillationHandler"]

CACHED = ("teacher_classes", "teacher_pred")    # keys of a batch
_WAY_OUT = "wrap the network so that `forward` returns the prediction alone, shape (B, K, *S) or (B, K)"
logger = logging.getLogger(__name__)


class DistillationEvents(EventEnum):
    """Events of one training step that the handler adds to the trainer.

    * `TEACHER_COMPLETED`: the teacher has seen the batch; its tensors are in `engine.state.teacher`.
    * `TERMS_COMPLETED`: the terms are in `engine.state.output["kd/<term>"]` and added to the loss. While it lasts,
      `engine.state.supervised` and `engine.state.terms` have the supervised loss and the terms with their graph.
    """

    TEACHER_COMPLETED = "teacher_completed"
    TERMS_COMPLETED = "terms_completed"


class DistillationHandler:
    """Add weighted distillation terms to the loss of a supervised trainer.

    Runs the frozen teacher on the very batch that the student saw, computes the terms of one loss or several from
    named layers of both networks, and adds `sum(weight * factors * term)` to `engine.state.output["loss"]` before MONAI
    calls backward. With all weights 0 no teacher is built and training equals plain training bit for bit.

    What it leaves on the trainer: `state.distill_weights` (term -> weight; fixed), `state.distill_factors` (term ->
    factor, 1.0; schedules write here at `ITERATION_STARTED`), `state.distill_balance` (a second factor, 1.0, that of
    `GradientNorms`), `state.distillation` (mode, teacher, hash), `state.distill_modules` (losses in use that a
    checkpoint must hold), `state.distill_moved` (key of a checkpoint -> what else handlers move from step to step,
    which it should hold; they write it at `STARTED`), and in `state.output`: `supervised_loss` and the unweighted
    `kd/<term>`. A trainer takes one handler.

    A network may give the heads of deep supervision as a list: the one of full resolution is distilled. It may be a
    classifier, too, with predictions (B, K) and labels (B,) or (B, 1).

    A batch may bring what the teacher says of it, cut out of soft labels of whole volumes, as `teacher_pred`: class
    probabilities (B, K, *S), or as `teacher_classes`: the likeliest of each voxel, (B, 1, *S), for losses that read no
    more; see `medkd.data.soft_labels`. Where all losses with a weight read the prediction only, and none
    `needs_live_teacher`, the teacher does not run in the steps then. Samples without a label, `UNLABELED` everywhere,
    are distilled like others.

    Args:
        teacher: the teacher by reference, or a ready network.
        loss: one loss, or a list of losses with distinct terms.
        weights: term -> weight; terms not named weigh 0. None takes the losses' `preset_weights`.
        teacher_input: key of the batch that the teacher sees, in training and in its check, shape (B, C, *S). For
            `image` it is what `prepare_batch` gave the student's network.
        validator: an evaluator without handlers for the teacher's check; None only warns.
        agreement: what replaces the labels of validation cases that have none; the teacher is then checked by it.
        teacher_check: `{"metric": name, "mode": "refuse" | "warn" | "off"}`; None is off.

    Raises:
        ValueError: unknown weight, two losses with one term, a second handler on the trainer; at start: a wrong tap
            path, a refused teacher or one that shares parts with the student, learnable heads that are not in the
            optimizer.
        RuntimeError: in a step: a tap of the student or a term without a gradient.

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
        agreement: TeacherAgreement | None = None,
    ) -> None:
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.losses = [loss] if isinstance(loss, DistillationLoss) else list(loss)
        self.weights = _resolve_weights(self.losses, weights)
        self.teacher_input = teacher_input
        self.agreement = agreement
        self._view = TeacherView(teacher_input)
        self._cached_views = {key: TeacherView(key) for key in CACHED}
        self._readable: tuple[str, ...] = ()
        regions = any(getattr(one, "activation", "softmax") == "sigmoid" for one in self.losses)
        self.check = _make_check(validator, teacher_check, teacher_input, regions)
        self._callables: list[nn.Module] = []
        self._network: nn.Module | None = None
        self._taps: tuple[FeatureTaps, FeatureTaps] | None = None
        self._main: tuple[MainOutput, ...] = ()
        self._terms = TermCheck()
        self._sums: dict[str, float] = {}
        self._running: SupervisedTrainer | None = None

    def attach(self, engine: SupervisedTrainer) -> None:
        """Register on a trainer; `compile` and several GPUs are the trainer's affair.

        Raises:
            ValueError: the trainer has a handler already.
        """
        if getattr(engine.state, "distillation_handler", None) is not None:
            raise ValueError(
                "`engine` must have one DistillationHandler, got a second; put all losses into one handler, `loss` "
                "takes a list. Several teachers (one for each organ group, say) become one network that runs them and "
                "gives one prediction with a channel for each class of the student."
            )
        engine.state.distillation_handler = self
        engine.register_events(*DistillationEvents)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._open_taps)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._run_teacher)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add_terms)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._finish(engine)                                       # hooks of a run that broke off
        self._running = engine
        self._view.start()
        for view in self._cached_views.values():
            view.start()
        state = engine.state
        state.distill_weights = dict(self.weights)
        state.distill_factors = dict.fromkeys(self.weights, 1.0)
        state.distill_balance = dict.fromkeys(self.weights, 1.0)
        state.distillation = {"mode": "supervised", "teacher": None, "teacher_sha256": None}
        state.distill_modules, state.distill_moved = [], {}
        self._sums = {}
        self._readable = ()
        if not distils(self.weights):
            logger.info("All distillation weights are 0: plain supervised training.")
            return
        if self.teacher.is_missing and self.teacher.may_be_missing:
            self.teacher.allow_missing()
            return
        active = [loss for loss in self.losses if any(self.weights[term] for term in loss.terms)]
        check_optimizer(engine.optimizer, engine.network, active)
        heads = {f"the loss {type(loss).__name__}": loss for loss in active}
        self._network = self.teacher.load(state.device, apart_from={"the student": engine.network, **heads})
        if self.agreement is not None and self.agreement.is_needed:
            self.agreement.predict(self._network)
        elif self.check is not None:
            self.check(self._network)
        pairs = self._activate_losses(active, state.device)
        self._taps = (
            FeatureTaps(engine.network, [student for student, _ in pairs], "student"),
            FeatureTaps(self._network, [teacher for _, teacher in pairs], "teacher"),
        )
        if not pairs and not any(loss.needs_live_teacher for loss in active):
            self._readable = CACHED if all(loss.reads_classes for loss in active) else CACHED[1:]
        state.distill_modules = with_state(active)
        path, sha256 = self.teacher.path, self.teacher.file_sha256
        state.distillation = {"mode": "distilled", "teacher": path and str(path), "teacher_sha256": sha256}

    def _activate_losses(self, active: Sequence[DistillationLoss], device: torch.device) -> list[TapPair]:
        """Ready the losses that have a weight, and collect the taps that they read."""
        for loss in active:
            loss.activate(term for term in loss.terms if self.weights[term])
            loss.to(device).train()
        self._callables = [_distributed(loss, device) for loss in active]
        self._main = tuple(MainOutput(f"The {role}", _WAY_OUT) for role in ("student", "teacher"))
        self._terms = TermCheck(term for loss in active for term in loss.active_terms)
        return [pair for loss in active for pair in loss.tap_pairs]

    def _open_taps(self, engine: SupervisedTrainer) -> None:
        if self._running is not engine:
            raise RuntimeError(
                "The DistillationHandler must belong to one run at a time, got a trainer whose handler another one has "
                "started in the meantime, so that this one would no longer distil; give each trainer its own handler."
            )
        if self._taps is not None:
            self._taps[0].open()
            view = self._cached_views.get(self._cached_key(engine.state.batch), self._view)
            view.remember(engine.state.batch)

    def _cached_key(self, batch: Any) -> str:
        """Key under which a batch brings all that the losses read of the teacher; empty if it does not."""
        return next((key for key in self._readable if isinstance(batch, Mapping) and key in batch), "")

    def _run_teacher(self, engine: SupervisedTrainer) -> None:
        if self._taps is None or self._network is None:
            return
        output = engine.state.output
        student = self._taps[0].close()
        axes = output["image"].dim() if isinstance(output["image"], Tensor) else None
        student["pred"] = self._main[0](output["pred"], axes)
        refuse_deaf(student)
        engine.state.student = student
        if key := self._cached_key(engine.state.batch):
            engine.state.teacher = self._remembered(engine, key)
        else:
            engine.state.teacher = self._live(engine, self._network, self._taps[1])
        engine.state.distillation["predictions"] = "cached" if key else "live"
        engine.fire_event(DistillationEvents.TEACHER_COMPLETED)

    def _live(self, engine: SupervisedTrainer, network: nn.Module, taps: FeatureTaps) -> dict[str, Tensor]:
        """What the teacher says of the very batch that the student saw."""
        image = plain_tensor(self._view.image(engine.state.batch, engine.state.output["image"])).to(
            device=engine.state.device, dtype=self.teacher.dtype, non_blocking=engine.non_blocking
        )
        network.eval()
        taps.open()
        with torch.no_grad(), cpu_autocast(engine):
            pred = network(image)
        teacher = taps.close()
        teacher["pred"] = self._main[1](pred, image.dim())
        return teacher

    def _remembered(self, engine: SupervisedTrainer, key: str) -> dict[str, Tensor]:
        """What soft labels of whole volumes say of it, in the form in which the losses read the teacher."""
        given = plain_tensor(self._cached_views[key].image(engine.state.batch, engine.state.output["image"]))
        if key == "teacher_classes":
            return {"classes": given.to(engine.state.device, torch.int64, non_blocking=engine.non_blocking)}
        pred = given.to(device=engine.state.device, dtype=torch.float32, non_blocking=engine.non_blocking)
        reader = next((loss for loss in self.losses if hasattr(loss, "activation")), None)
        activation: Activation = getattr(reader, "activation", "softmax")
        if activation == "softmax" and pred.shape[1] > 1:
            pred = complete(pred)
        output = getattr(reader, "teacher_output", "logits")
        return {"pred": pred if output == "probabilities" else logits_of(pred, activation)}

    def _add_terms(self, engine: SupervisedTrainer) -> None:
        output = engine.state.output
        output["supervised_loss"] = output["loss"].detach()
        if self._taps is None:
            return
        label = output.get("label")
        label = plain_tensor(label) if isinstance(label, Tensor) else None
        parts: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        for loss in self._callables:
            values = loss(engine.state.student, engine.state.teacher, label)
            self._terms(values, unwrap(loss))
            for term, value in values.items():
                output[f"kd/{term}"] = value.detach()
                factor = engine.state.distill_factors[term] * engine.state.distill_balance[term]
                parts[f"part/{term}"] = self.weights[term] * factor * value
            terms |= values
        engine.state.supervised, engine.state.terms = output["loss"], terms
        output["loss"] = sum(parts.values(), output["loss"])
        engine.state.student = engine.state.teacher = None
        engine.fire_event(DistillationEvents.TERMS_COMPLETED)
        engine.state.supervised = engine.state.terms = None        # or the graph would outlive the step
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
        self._terms.end_epoch()

    def _finish(self, engine: SupervisedTrainer) -> None:
        for taps in self._taps or ():
            taps.remove()
        self._taps = self._network = self._running = None


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
    validator: SupervisedEvaluator | None, options: Mapping[str, Any] | None, teacher_input: str, regions: bool
) -> TeacherCheck | None:
    if options is None:
        return None
    unknown = set(options) - {"metric", "mode"}
    if unknown or "metric" not in options:
        raise ValueError(f"`teacher_check` must have the keys 'metric' and 'mode', got {sorted(options)}.")
    return TeacherCheck(validator, teacher_input=teacher_input, regions=regions, **options)


def _distributed(loss: DistillationLoss, device: torch.device) -> nn.Module:
    """Wrap a loss with learnable heads, or every rank would train its own; memories stay those of each rank."""
    trainable = any(p.requires_grad for p in loss.parameters())
    if not trainable or not (dist.is_available() and dist.is_initialized()):
        return loss
    ids = [device] if torch.device(device).type == "cuda" else None
    return nn.parallel.DistributedDataParallel(loss, device_ids=ids, find_unused_parameters=True,
                                               broadcast_buffers=False)
