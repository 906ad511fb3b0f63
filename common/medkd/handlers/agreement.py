# SPDX-License-Identifier: Apache-2.0
"""Choosing a student without labels: by its agreement with the teacher on validation images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from medkd.handlers.randomness import preserved_random_state
from medkd.handlers.teacher_check import as_the_teacher_sees, replaced
from medkd.outputs import plain_tensor

__all__ = ["TeacherAgreement"]

_SUFFIX = "_with_teacher"
logger = logging.getLogger(__name__)


class TeacherAgreement:
    """Give validation cases without a label what the teacher says of them, and name the metric after that.

    Where no validation case has a label, metrics compare the student with the teacher: `val_mean_dice` becomes
    `val_mean_dice_with_teacher`, in the log, in `model.json` and in TensorBoard. It tells which student is the most
    like the teacher, not how good it is. Where cases have labels nothing is changed.

    Of predictions of whole images, scores of the classes (K,) or a class (1,), what the teacher says is the class.

    Attach it to the evaluator of the student, as one of its handlers.

    Args:
        evaluator: an evaluator without handlers on the same loader, by which the teacher predicts; as for its check.
        teacher_input: key of the batch that the teacher sees.
        label_key: of the cases.
        mode: of the teacher's check; `refuse` raises when the teacher says one thing of all voxels of all images.

    Raises:
        ValueError: at the start of a validation without labels: there are no predictions of a teacher.
    """

    def __init__(
        self, evaluator: SupervisedEvaluator, teacher_input: str = "image", label_key: str = "label",
        mode: str = "refuse",
    ) -> None:
        self.evaluator = evaluator
        self.teacher_input = teacher_input
        self.label_key = label_key
        self.mode = mode
        self._labels: list[list[Tensor]] = []

    @property
    def is_needed(self) -> bool:
        """True when there are validation cases and none has a label."""
        data = getattr(getattr(self.evaluator.data_loader, "dataset", None), "data", ())
        cases = [item for item in data if isinstance(item, Mapping)]
        return len(data) > 0 and not any(_is_given(case.get(self.label_key)) for case in cases)

    def named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics, under names that say what they compare.

        Example:
            >>> from types import SimpleNamespace
            >>> loader = SimpleNamespace(dataset=SimpleNamespace(data=[{"image": "a.nii.gz"}]))
            >>> list(TeacherAgreement(SimpleNamespace(data_loader=loader)).named({"val_mean_dice": None}))
            ['val_mean_dice_with_teacher']
        """
        return {f"{name}{_SUFFIX}" if self.is_needed else name: metric for name, metric in metrics.items()}

    def attach(self, engine: Engine) -> None:
        """Register on the evaluator of the student."""
        if self.is_needed:
            engine.add_event_handler(Events.STARTED, self._check)
            engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._replace_labels)

    def predict(self, teacher: nn.Module) -> None:
        """Let the teacher predict the validation images, and keep what it says, postprocessed as the student's.

        Raises:
            ValueError: it says one thing everywhere, and `mode` is `refuse`.
            KeyError: the images have no `teacher_input`.
        """
        self._labels = []
        evaluator = self.evaluator
        prepare = as_the_teacher_sees(evaluator.prepare_batch, self.teacher_input)
        logger.info("No validation image has a label: the student is chosen by its agreement with the teacher.")
        with (
            evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, self._keep),
            preserved_random_state(), replaced(evaluator, network=teacher, prepare_batch=prepare),
        ):
            evaluator.run()
        self._judge()

    def _keep(self, engine: Any) -> None:
        self._labels.append([_small(_said(sample["pred"])) for sample in _samples(engine.state.output)])

    def _judge(self) -> None:
        found = set[int]().union(*(_values(label) for batch in self._labels for label in batch))
        if len(found) > 1:
            logger.info("The teacher tells %d classes or objects in the validation images.", len(found))
            return
        text = (
            "The teacher must find something in the validation images, got one class for all voxels; it is untrained, "
            "or trained for other data or another preprocessing. Set teacher_check#mode to 'warn' to distil from it "
            "all the same."
        )
        if self.mode == "refuse":
            raise ValueError(text)
        if self.mode == "warn":
            logger.warning(text)

    def _check(self, _engine: Any) -> None:
        if not self._labels:
            raise ValueError(
                "`validation` must have labels where nothing is distilled, got images alone; add labels, or give a "
                "teacher with which the student's predictions can be compared."
            )

    def _replace_labels(self, engine: Any) -> None:
        labels = self._labels[engine.state.iteration - 1]
        for sample, label in zip(_samples(engine.state.output), labels, strict=True):
            sample[self.label_key] = label.to(sample["pred"])


def _is_given(label: Any) -> bool:
    """Whether a case of a datalist has a label; 0 is a class."""
    return bool(label) if isinstance(label, (str, list, tuple)) else label is not None and label is not False


def _samples(output: Any) -> Sequence[dict[str, Any]]:
    """The samples of a batch; a batch that is not decollated cannot be told apart."""
    if not isinstance(output, list):
        raise TypeError("The evaluator must decollate its batches, `decollate=True`, to validate without labels.")
    return output


def _values(label: Tensor) -> set[int]:
    """Numbers that occur in (1, *S), or classes in (K, *S) with a channel for each."""
    if len(label) > 1:
        return {place for place, channel in enumerate(label) if bool(channel.any())}
    return {int(value) for value in torch.unique(label)}


def _said(pred: Tensor) -> Tensor:
    """What a prediction says in place of a label: of scores of a whole image, (K,), the class, (1,); else itself."""
    return pred.argmax(0, keepdim=True) if pred.dim() == 1 and len(pred) > 1 else pred


def _small(pred: Tensor) -> Tensor:
    """The same values, in as few bytes as hold them."""
    pred = plain_tensor(pred).detach().cpu()
    low, high = (float(value) for value in pred.aminmax())
    if low >= 0 and high < 256 and bool((pred == pred.round()).all()):
        return pred.to(torch.uint8)
    return pred
