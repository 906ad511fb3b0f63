# SPDX-License-Identifier: Apache-2.0
"""A discriminator that is trained beside the student, in each of its steps."""

from __future__ import annotations

import logging
import math
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.trainer import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.optim import Optimizer

from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.discriminator import discriminator_loss

__all__ = ["DiscriminatorDivergedError", "DiscriminatorTraining"]

_RANK_STEP = 1_000_003    # ranks must not draw the same mixtures
_PENALTY = 10.0
_FAR = 20.0               # times the root of a sample's size: so far apart no scores are that mean anything
logger = logging.getLogger(__name__)


class DiscriminatorDivergedError(RuntimeError):
    """The loss, the gradient or the scores of the discriminator are out of all bounds."""


class DiscriminatorTraining:
    """One step of the discriminator after each backward pass of the student, on the same predictions, detached.

    In a config, with the handler behind the `DistillationHandler` in `train#handlers`, and both objects in the
    `CheckpointHandler`'s:

    ```json
    {
      "discriminator": {"_target_": "medkd.losses.discriminator.Discriminator", "channels": 2},
      "discriminator_optimizer": {
        "_target_": "torch.optim.Adam",
        "params": "$@discriminator.parameters()",
        "lr": 3e-05,
        "betas": [0.9, 0.99]
      },
      "adversarial_loss": {
        "_target_": "medkd.losses.adversarial.AdversarialLoss",
        "discriminator": "@discriminator"
      },
      "discriminator_training": {
        "_target_": "medkd.handlers.adversarial.DiscriminatorTraining",
        "loss": "@adversarial_loss",
        "optimizer": "@discriminator_optimizer"
      }
    }
    ```

    Published is a step after the student's step, which comes to the same, as neither reads what the other changes.
    Cases count with or without a label. The rate follows the step alone, `rate (1 - (step - 1) / steps)^power`, and so
    do the mixtures of the gradient penalty, which come from a generator of their own: a resumed run ends bit-identical,
    and the student's random numbers are those of a run without a discriminator. Without a weight nothing happens.

    It leaves in `engine.state.output` `discriminator/loss`, `/teacher` and `/student` (mean scores) and `/penalty`, and
    their means in a line of the log at each epoch's end. Place it behind the `DistillationHandler`, and put the
    discriminator and the optimizer into the `objects` of the `CheckpointHandler`:
    `{"network": ..., "discriminator": ..., "discriminator_optimizer": ...}`. Several ranks start with the weights of
    the first, take the mean gradient, and decide by mean values whether to go on.

    A discriminator that diverges is an error, before any weights change: a loss or gradient that is not finite, or mean
    scores that lie more than 20 sqrt(n) apart for n logits per sample. That is a loose guard against overflow and no
    bound of the method: a slope of 1 of the sum of all scores, which the penalty asks for, lets that sum differ by at
    most 2 sqrt(n) between logits within [-1, 1], and the mean by as many times less as there are scores; `hinge` asks
    for no slope.

    Args:
        loss: that of the `DistillationHandler`, with the discriminator.
        optimizer: over all parameters of the discriminator. Published: Adam, rate 3e-5, betas 0.9 and 0.99.
        power: of the decay of the rate; 0.9 as published, 0 for none.
        weight: of the discriminator's loss; 1 as published.
        penalty: weight of the gradient penalty of `wgan_gp`; None is 10, as published. `hinge` has none.
        seed: of the mixtures.

    Raises:
        ValueError: a wrong number, or a penalty for `hinge`; an optimizer without some parameter of the discriminator;
            no `DistillationHandler` before, or one without this loss.
        DiscriminatorDivergedError: in a step.

    Reference:
        Zou et al., Graph Flow, arXiv 2203.08667, released code, without its discriminator that iterates in the
        student's pass too.
    """

    def __init__(
        self, loss: AdversarialLoss, optimizer: Optimizer, power: float = 0.9, weight: float = 1.0,
        penalty: float | None = None, seed: int = 0,
    ) -> None:
        if penalty is not None and loss.form != "wgan_gp":
            raise ValueError(f"`penalty` must be None for the form {loss.form!r}, which has none, got {penalty}.")
        penalty = _PENALTY if penalty is None else penalty
        if not (power >= 0 and 0 < weight < math.inf and 0 <= penalty < math.inf):
            raise ValueError(
                f"`power` and `penalty` must be at least 0 and `weight` above, got {power}, {penalty} and {weight}."
            )
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        own = {id(one) for one in loss.discriminator.parameters()}
        if held != own:
            raise ValueError(
                f"`optimizer` must hold the {len(own)} parameters of the discriminator and no other, got "
                f"{len(held & own)} of them and {len(held - own)} others."
            )
        self.loss = loss
        self.optimizer = optimizer
        self.power, self.weight, self.penalty, self.seed = power, weight, penalty, seed
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]   # before a checkpoint is loaded
        self._sums: dict[str, Tensor | float] = {}

    def attach(self, engine: SupervisedTrainer) -> None:
        """Register on a trainer that has a `DistillationHandler` with this loss.

        Raises:
            ValueError: it has none, or one without this loss.
        """
        handler = getattr(engine.state, "distillation_handler", None)
        if handler is None or not any(one is self.loss for one in handler.losses):
            raise ValueError(
                "`DiscriminatorTraining` must stand behind a `DistillationHandler` that has its loss, got "
                f"{'none before' if handler is None else 'one without it'}."
            )
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)   # output is still one dict
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)

    def _start(self, engine: Any) -> None:
        state = engine.state
        self._sums = {}
        self.loss.take_shown()                                     # of a run that broke off
        self.loss.discriminator.to(state.device)
        if idist.get_world_size() > 1:
            for value in self.loss.discriminator.state_dict().values():
                value.copy_(torch.as_tensor(idist.broadcast(value, src=0)))
        if state.distillation["mode"] == "distilled" and state.distill_weights["adversarial"]:
            state.distill_modules = [*state.distill_modules, self.loss.discriminator]
            state.distill_moved["discriminator_optimizer"] = self.optimizer

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Train the discriminator with what the student's step has shown."""
        shown = self.loss.take_shown()
        if shown is None:
            return
        state: Any = engine.state
        self._set_rate(state.iteration, state.epoch_length * state.max_epochs)
        discriminator = self.loss.discriminator
        try:
            discriminator.requires_grad_(True).train()
            with torch.enable_grad(), torch.autocast(shown[0].device.type, enabled=False):
                values = self._step(discriminator, *shown, step=state.iteration)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            discriminator.requires_grad_(False).eval()
        for name, value in values.items():
            state.output[f"discriminator/{name}"] = value
            self._sums[name] = self._sums.get(name, 0.0) + value.double()

    def _step(self, discriminator: nn.Module, teacher: Tensor, student: Tensor, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + step + _RANK_STEP * idist.get_rank())
        values = discriminator_loss(discriminator, teacher, student, self.loss.form, generator, self.penalty)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.weight * values["loss"])
        values["loss"] = values["loss"].detach()
        gradients = [one.grad for one in discriminator.parameters() if one.grad is not None]
        told = torch.stack([values[name] for name in ("loss", "teacher", "student")])
        if (ranks := idist.get_world_size()) > 1:
            for value in (*gradients, told):                       # with what is checked, or one rank would stop alone
                value.copy_(torch.as_tensor(idist.all_reduce(value)) / ranks)
        self._check(told, torch.nn.utils.get_total_norm(gradients), _FAR * math.sqrt(student[0].numel()), step)
        self.optimizer.step()
        return values

    def _check(self, told: Tensor, norm: Tensor, most: float, step: int) -> None:
        """Refuse a step that would leave nothing of the discriminator."""
        loss, teacher, student, slope = torch.cat([told, norm.to(told).view(1)]).tolist()   # asks the device once
        if math.isfinite(loss) and math.isfinite(slope) and abs(teacher - student) <= most:
            return
        way_out = "" if self.loss.form == "hinge" else ", or take the form 'hinge'"
        raise DiscriminatorDivergedError(
            f"The discriminator must stay within bounds, but it diverged in step {step}: loss {loss:.4g}, mean scores "
            f"{teacher:.4g} of the teacher and {student:.4g} of the student, gradient norm {slope:.4g}. No weights "
            "were changed by this step; the last checkpoint is good. Lower the rate of its optimizer, or the "
            f"weight of `adversarial`{way_out}."
        )

    def _set_rate(self, step: int, steps: int) -> None:
        factor = (1.0 - (step - 1) / steps) ** self.power
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _log_epoch(self, engine: Any) -> None:
        if not self._sums:
            return
        state, steps = engine.state, engine.state.epoch_length
        loss, teacher, student = (float(self._sums[name]) / steps for name in ("loss", "teacher", "student"))
        logger.info(
            "Epoch %d/%d: discriminator %.4f, mean scores %.4f of the teacher and %.4f of the student",
            state.epoch, state.max_epochs, loss, teacher, student,
        )
        self._sums = {}
