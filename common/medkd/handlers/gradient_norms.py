# SPDX-License-Identifier: Apache-2.0
"""How strongly each part of the loss pulls at the student, and weights that follow from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor, nn

from medkd.checks import suggest
from medkd.handlers.distillation import DistillationEvents
from medkd.taps import unwrap

__all__ = ["GradientNorms"]

_SUPERVISED = "supervised"
logger = logging.getLogger(__name__)


class GradientNorms:
    """Log how large the gradients of the supervised loss and of each distillation term are, as shares of the first.

    A term teaches by its gradient, whatever its value is: a term whose weighted gradient has a hundredth of the norm
    of the supervised one's changes nothing, and one with a hundred times that leaves no other. In the first step of
    some epochs the L2 norms over all parameters of the student are measured; several ranks take their mean. They stand
    in `engine.state.gradient_norms` (`supervised` or term -> norm, without weights) and in a line of the log, with
    weights, but without the ramps of schedules. Where no case of the step has a label the largest term is the
    reference. Measuring changes nothing: the training is the same bit for bit. It costs a backward pass per term.

    With `balance` the weights follow from the norms: in each of the first `steps` steps all is measured, and the factor
    `engine.state.distill_balance[term]` makes the mean norm of the weighted term that share of the reference's; then it
    is fixed. Ramps multiply it. The reference is the supervised loss; without any label it is the largest of the terms
    that are not balanced, or of all, if all are. Put the handler into `objects` of the `CheckpointHandler`, or a
    resumed run measures anew.

    Place it behind the `DistillationHandler`. Where nothing is distilled it does nothing.

    Args:
        interval_epochs: epochs from one measurement to the next, from the first one on.
        balance: term -> share of the reference's norm that its weighted gradient is to have, above 0; None leaves all
            weights as they are.
        steps: number of steps that the balance is a mean of.

    Raises:
        ValueError: a number below 1, a share that is not above 0, no `DistillationHandler` before; at start: a
            balanced term that the loss does not have, or that has no weight.
        RuntimeError: in a step: a network that `torch.compile` has made unfit for a second backward pass.

    Reference:
        Ours; the norms are those of Chen et al., GradNorm, arXiv 1711.02257, over all parameters, and not learned by.

    Example:
        >>> GradientNorms(interval_epochs=10, balance={"logits": 0.3}).state_dict()
        {'balance': {'logits': 0.3}, 'measured': 0, 'sums': {}, 'factors': {}}
    """

    def __init__(
        self, interval_epochs: int = 10, balance: Mapping[str, float] | None = None, steps: int = 8
    ) -> None:
        if interval_epochs < 1 or steps < 1:
            raise ValueError(f"`interval_epochs` and `steps` must be at least 1, got {interval_epochs} and {steps}.")
        for term, share in (balance or {}).items():
            if not 0.0 < float(share) < math.inf:
                raise ValueError(f"`balance` must be finite shares above 0, got {share!r} for {term!r}.")
        self.interval_epochs = interval_epochs
        self.balance = {term: float(share) for term, share in (balance or {}).items()}
        self.steps = steps
        self._restart()

    def _restart(self) -> None:
        self._measured = 0
        self._sums: dict[str, float] = {}
        self._factors: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs: norms so far, and the factors."""
        return {
            "balance": dict(self.balance), "measured": self._measured, "sums": dict(self._sums),
            "factors": dict(self._factors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the factors of an earlier run.

        Raises:
            ValueError: they were made for another balance.
        """
        if dict(state["balance"]) != self.balance:
            raise ValueError(f"`balance` must be that of the checkpoint, {dict(state['balance'])}, got {self.balance}.")
        self._measured = int(state["measured"])
        self._sums, self._factors = dict(state["sums"]), dict(state["factors"])

    def attach(self, engine: SupervisedTrainer) -> None:
        """Register on a trainer that has a `DistillationHandler`.

        Raises:
            ValueError: it has none.
        """
        if getattr(engine.state, "distillation_handler", None) is None:
            raise ValueError("`GradientNorms` must stand behind a `DistillationHandler` in the list, got none before.")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._set_factors)
        engine.add_event_handler(DistillationEvents.TERMS_COMPLETED, self)

    def _start(self, engine: Any) -> None:
        state = engine.state
        self._restart()                                            # what a checkpoint holds is loaded after this
        if self.balance:
            state.distill_moved["gradient_norms"] = self
        state.gradient_norms = {}
        for term in self.balance:
            if term not in state.distill_weights:
                known = state.distill_weights
                raise ValueError(f"`balance` must name terms of the loss, got {term!r}; {suggest(term, known)}")
            if state.distillation["mode"] == "distilled" and not state.distill_weights[term]:
                raise ValueError(
                    f"`balance` must name terms that have a weight, got {term!r} of weight 0; give it the weight 1."
                )

    def _set_factors(self, engine: Any) -> None:
        engine.state.distill_balance.update(self._factors)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Measure, if it is time; `engine.state.supervised` and `engine.state.terms` are there."""
        state: Any = engine.state
        is_first = (state.iteration - 1) % state.epoch_length == 0
        is_due = is_first and (state.epoch - 1) % self.interval_epochs == 0
        is_balancing = bool(self.balance) and self._measured < self.steps
        if not is_due and not is_balancing:
            return
        state.gradient_norms = norms = self._measure(engine, {_SUPERVISED: state.supervised, **state.terms})
        if is_due:
            logger.info("Gradient norms of step %d: %s", state.iteration, _line(norms, _weights(state)))
        if is_balancing:
            self._follow(norms, state.distill_weights, state.iteration)

    def _measure(self, engine: SupervisedTrainer, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Norm of the gradient of each value, the mean over ranks."""
        parameters = [one for one in unwrap(engine.network).parameters() if one.requires_grad]
        scaler = getattr(engine, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        with torch.autocast(values[_SUPERVISED].device.type, enabled=False):
            norms = torch.stack([_norm(value, parameters, scale) for value in values.values()])
        if idist.get_world_size() > 1:
            norms = torch.as_tensor(idist.all_reduce(norms)) / idist.get_world_size()
        return dict(zip(values, norms.tolist(), strict=True))

    def _follow(self, norms: Mapping[str, float], weights: Mapping[str, float], step: int) -> None:
        """Set factors by the mean norms so far."""
        if not all(map(math.isfinite, norms.values())):
            return                                                 # an overflow in half precision: no step either
        self._measured += 1
        self._sums = {name: self._sums.get(name, 0.0) + norm for name, norm in norms.items()}
        pulls = {name: weights.get(name, 1.0) * value for name, value in self._sums.items()}
        others = [pull for name, pull in pulls.items() if name not in self.balance and name != _SUPERVISED]
        reference = pulls[_SUPERVISED] or max(others, default=0.0) or max(pulls.values())
        self._factors = {
            term: share * reference / pulls[term] for term, share in self.balance.items() if pulls.get(term)
        }
        if self._measured == self.steps:
            told = {term: f"{factor:.4g}" for term, factor in self._factors.items()}
            logger.info("Factors that balance the terms from step %d on: %s", step + 1, told)
            if silent := sorted(set(self.balance) - set(self._factors)):
                logger.warning("Terms %s had no gradient in %d steps: they keep their weights.", silent, self.steps)


def _norm(value: Tensor, parameters: Sequence[nn.Parameter], scale: float) -> Tensor:
    """L2 norm of the gradient, float64; scaled on the way, or small ones would vanish in half precision."""
    nothing = torch.zeros((), dtype=torch.float64, device=value.device)
    if not value.requires_grad:
        return nothing
    try:
        found = torch.autograd.grad(value * scale, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "`GradientNorms` must run several backward passes through the student, but torch.compile has given the "
            "memory away that they need; set torch._functorch.config.donated_buffer to False, or leave it out."
        ) from error
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in found if one is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) / scale if norms else nothing


def _weights(state: Any) -> dict[str, float]:
    return {term: weight * state.distill_balance[term] for term, weight in state.distill_weights.items()}


def _line(norms: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """Norms, weights and shares of the supervised gradient; of the largest term's where that is 0.

    Example:
        >>> _line({"supervised": 0.41, "soft_target": 0.38}, {"soft_target": 1.0})
        'supervised 0.41; soft_target 0.38 x 1 = 92.7 %'
    """
    pulls = {name: weights.get(name, 1.0) * norm for name, norm in norms.items()}
    reference = norms[_SUPERVISED] or max(pulls.values())
    first = f"{_SUPERVISED} {norms[_SUPERVISED]:.3g}"
    parts = [first if norms[_SUPERVISED] else f"{first}, shares of the largest term"]
    for term in (name for name in norms if name != _SUPERVISED):
        share = 100.0 * pulls[term] / reference if reference else 0.0
        percent = f"{share:.3g}" if share < 100 else f"{share:.0f}"
        parts.append(f"{term} {norms[term]:.3g} x {weights[term]:.3g} = {percent} %")
    return "; ".join(parts)
