# SPDX-License-Identifier: Apache-2.0
"""Proof, before the first step, that the teacher knows more than a constant."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from monai.engines.evaluator import SupervisedEvaluator
from monai.inferers.inferer import Inferer
from torch import Tensor, nn

from medkd.checks import suggest
from medkd.handlers.randomness import preserved_random_state
from medkd.handlers.teacher import teacher_image
from medkd.outputs import MainOutput

__all__ = ["CheckMode", "TeacherCheck", "as_the_teacher_sees", "replaced"]

CheckMode = Literal["refuse", "warn", "off"]
logger = logging.getLogger(__name__)


class TeacherCheck:
    """Validate the teacher and compare it with the best constant prediction.

    Args:
        validator: an evaluator without handlers, with its own copy of the key metric; its network is replaced.
            None (no validation data) only warns.
        metric: name of the metric in the validator.
        mode: `refuse` raises when the teacher is not better, `warn` logs it, `off` does not check.
        teacher_input: key of the batch that the teacher sees; it takes the place of the validator's `image`.
        regions: whether the channels are regions that may overlap: then none and all of them everywhere are constant
            predictions, too.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(
        self, validator: SupervisedEvaluator | None, metric: str, mode: CheckMode = "refuse",
        teacher_input: str = "image", regions: bool = False,
    ) -> None:
        if mode not in get_args(CheckMode):
            raise ValueError(f"`teacher_check#mode` must be one of {get_args(CheckMode)}, got {mode!r}.")
        self.validator = validator
        self.metric = metric
        self.mode = mode
        self.teacher_input = teacher_input
        self.regions = regions

    def __call__(self, teacher: nn.Module) -> float | None:
        """Log the teacher's metric, and judge it.

        Returns:
            The teacher's metric; None when it was not computed.

        Raises:
            ValueError: the metric does not exist, or the teacher is refused.
            KeyError: the validation data have no `teacher_input`.
        """
        if self.mode == "off":
            return None
        if self.validator is None or not len(self.validator.data_loader):   # type: ignore[arg-type]
            logger.warning("The teacher is not checked: there is no validation data.")
            return None
        prepare = as_the_teacher_sees(self.validator.prepare_batch, self.teacher_input)
        with preserved_random_state(), replaced(self.validator, prepare_batch=prepare):
            logger.info("Checking the teacher on %d validation batches ...", len(self.validator.data_loader))   # type: ignore[arg-type]
            shapes: list[torch.Size] = []
            main = MainOutput("The teacher", "wrap it so that `forward` returns the prediction alone")

            def take_main(_network: nn.Module, inputs: Any, output: Any) -> Tensor:
                pred = main(output, inputs[0].dim() if inputs else None)
                shapes.append(pred.shape)
                return output if isinstance(output, Tensor) and not output.is_inference() else pred

            hook = teacher.register_forward_hook(take_main)
            try:
                value = self._validate(teacher)
            finally:
                hook.remove()
            constant, best = self._best_constant(shapes[-1][1], len(shapes[-1]) == 2)
        logger.info(
            "Teacher %s on the validation data: %.4f (best constant prediction: %s everywhere, %.4f)",
            self.metric, value, constant, best,
        )
        proves = not math.isnan(value) and (math.isnan(best) or self.validator.metric_cmp_fn(value, best))
        if not proves:
            self._judge(value, constant, best)
        return value

    def _judge(self, value: float, constant: str, best: float) -> None:
        text = (
            f"The teacher's {self.metric} must be better than that of {constant} everywhere, {best:.4f}, got "
            f"{value:.4f}; it is untrained, or trained for other data or another preprocessing. "
            "Set teacher_check#mode to 'warn' to distil from it all the same."
        )
        if math.isnan(value) and math.isnan(best):
            text = (
                f"The metric {self.metric} must have a value on the validation data, got none for the teacher and for "
                "every constant prediction: no label there has anything that it counts. Give validation cases with "
                "labels; set teacher_check#mode to 'warn' to distil from an unproven teacher."
            )
        if self.mode == "refuse":
            raise ValueError(text)
        logger.warning(text)

    def _validate(self, network: nn.Module) -> float:
        validator: Any = self.validator
        validator.network = network
        validator.run()
        metrics = validator.state.metrics
        if self.metric not in metrics:
            raise ValueError(
                f"`teacher_check#metric` must be a metric of the validation, got {self.metric!r}; "
                f"{suggest(self.metric, metrics)}"
            )
        details = getattr(validator.state, "metric_details", {}).get(self.metric)
        if isinstance(details, Tensor) and details.numel() and bool(details.isnan().all()):
            return math.nan                                        # MONAI's mean of no value is 0
        return float(metrics[self.metric])

    def _best_constant(self, channels: int, whole: bool) -> tuple[str, float]:
        validator: Any = self.validator
        constant, best = "", math.nan
        for name, candidate in _constants(validator.inferer, channels, self.regions, whole):
            with replaced(validator, inferer=candidate):
                value = self._validate(validator.network)
            if not constant or (not math.isnan(value) and (math.isnan(best) or validator.metric_cmp_fn(value, best))):
                constant, best = name, value
        return constant, best


def _constants(inferer: Any, channels: int, regions: bool, whole: bool) -> Iterator[tuple[str, Inferer]]:
    """Constant predictions: every class; or, where an inferer has `constants` and `channels`, those values.

    Args:
        inferer: of the validation.
        channels: of the teacher's prediction.
        regions: whether they may overlap.
        whole: whether a prediction is of an image as a whole, (B, K).
    """
    if hasattr(inferer, "constants"):
        for value in inferer.constants:
            yield f"the value {value:g}", _Constant([float(value)] * inferer.channels)
        return
    if regions and channels > 1:
        yield "no region", _Constant([-10.0] * channels, whole)
        yield "all regions", _Constant([10.0] * channels, whole)
    for index in range(max(channels, 2)):                          # certain logits; one channel is a sigmoid output
        certain = [20.0 * index - 10.0] if channels == 1 else [10.0 if k == index else -10.0 for k in range(channels)]
        yield f"{'region' if regions and channels > 1 else 'class'} {index}", _Constant(certain, whole)


class _Constant(Inferer):
    """Gives a value per channel, everywhere, or of an image as a whole."""

    def __init__(self, values: Sequence[float], whole: bool = False) -> None:
        self.values = values
        self.whole = whole

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        blank = (inputs.flatten(1) if self.whole else inputs)[:, :1] * 0.0
        return torch.cat([blank + value for value in self.values], dim=1)


def as_the_teacher_sees(prepare_batch: Callable[..., Any], key: str) -> Callable[..., Any]:
    """A `prepare_batch` that gives what the batch has under `key`, the teacher's, in the place of its `image`."""

    def prepare(batch: Any, *args: Any, **options: Any) -> Any:
        if key != "image":
            batch = {**batch, "image": teacher_image(batch, key)}
        return prepare_batch(batch, *args, **options)

    return prepare


@contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes for a while."""
    before = {name: getattr(target, name) for name in attributes}
    try:
        vars(target).update(attributes)
        yield
    finally:
        vars(target).update(before)
