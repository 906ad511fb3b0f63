# SPDX-License-Identifier: Apache-2.0
"""How well cases are classified: by the table of true and predicted classes, and by the order of the scores."""

from __future__ import annotations

import csv
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics.metric import CumulativeIterationMetric
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from medkd.taps import plain_tensor

__all__ = [
    "Accuracy", "BalancedAccuracy", "ClassificationMetric", "ConfusionMatrixSaver", "MacroAUC", "MacroF1",
    "QuadraticKappa", "balanced_accuracy", "class_probabilities", "confusion_matrix", "macro_auc", "macro_f1",
    "quadratic_kappa",
]

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion_matrix(label: Sequence[int] | Counts, pred: Sequence[int] | Counts, classes: int) -> Counts:
    """Count the cases of each true class that each class was predicted for.

    Args:
        label: class of each case, 0 to `classes` - 1. Shape (N,).
        pred: predicted class of each. Shape (N,).
        classes: number of classes, K.

    Returns:
        Shape (K, K): a row per true class, a column per predicted one.

    Example:
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
        [[1, 1], [0, 1]]
    """
    pairs = np.asarray(label, np.int64) * classes + np.asarray(pred, np.int64)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def balanced_accuracy(counts: Counts) -> float:
    """Mean over the classes that cases have of the share that is found; NaN without any case.

    Args:
        counts: table of `confusion_matrix`.

    Example:
        >>> balanced_accuracy(np.array([[8, 2], [1, 1]]))
        0.65
    """
    total = counts.sum(1)
    there = total > 0
    return float((counts.diagonal()[there] / total[there]).mean()) if there.any() else math.nan


def quadratic_kappa(counts: Counts) -> float:
    """Cohen's kappa of ordered classes: a slip by two classes weighs four times one by a single class.

    1 is right, 0 what chance gives, below is worse. NaN where label and prediction are one single class throughout, for
    which chance is always right, and without any case.

    Args:
        counts: table of `confusion_matrix`; classes in their order.

    Reference:
        J. Cohen, Weighted kappa, Psychological Bulletin 70 (1968): 1 - sum(w O) / sum(w E) with w = (i - j)^2.

    Example:
        >>> quadratic_kappa(np.array([[8, 2], [0, 0]])), quadratic_kappa(np.array([[4, 0], [0, 4]]))
        (0.0, 1.0)
        >>> quadratic_kappa(np.array([[8, 0], [0, 0]]))
        nan
    """
    classes = np.arange(len(counts))
    weight = (classes[:, None] - classes) ** 2
    expected = np.outer(counts.sum(1), counts.sum(0)) / max(int(counts.sum()), 1)
    chance = float((weight * expected).sum())
    return 1.0 - float((weight * counts).sum()) / chance if chance else math.nan


def macro_f1(counts: Counts) -> float:
    """Mean F1 of the classes that occur in label or prediction: 2 TP / (2 TP + FP + FN); NaN without any case.

    Args:
        counts: table of `confusion_matrix`.

    Example:
        >>> round(macro_f1(np.array([[8, 2], [1, 1]])), 4)
        0.6211
    """
    total = counts.sum(0) + counts.sum(1)
    there = total > 0
    return float((2 * counts.diagonal()[there] / total[there]).mean()) if there.any() else math.nan


def macro_auc(label: Sequence[int] | Counts, scores: Floats) -> float:
    """Mean over classes of the area under the ROC curve of one class against all others; ties count half.

    Args:
        label: class of each case. Shape (N,).
        scores: probability of each class. Shape (N, K).

    Returns:
        1 is perfect, 0.5 chance. Classes that no case has, or all have, do not count; NaN where none is left.

    Example:
        >>> macro_auc([0, 0, 1, 1], np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]]))
        0.875
    """
    areas, truth = [], np.asarray(label)
    for number in range(scores.shape[1]):
        positive = truth == number
        count, others = int(positive.sum()), int((~positive).sum())
        if count and others:
            ranks = float(rankdata(scores[:, number])[positive].sum())
            areas.append((ranks - count * (count + 1) / 2) / (count * others))
    return float(np.mean(areas)) if areas else math.nan


class ClassificationMetric(IgniteMetricHandler):
    """One value of all cases, of all ranks; a subclass has `grade`.

    Args:
        output_transform: gives `(pred, label)` from the engine's output, each a list or a batch: scores of the classes,
            shape (K,), logits or probabilities, and the number of the class. Cases with a negative label, which
            stands for none (`medkd.ops.ignored`), do not count; the value is NaN where no case has one.
        save_details: keep a row per case for `MetricsSaver`: in the column of its class 1 where that has the highest
            score, else 0, and NaN in all others. The mean of a column is the share of a class that is found.

    Raises:
        ValueError: in `update`, scores are of fewer than two classes, or a label is no class.
    """

    def __init__(self, output_transform: Callable[[Any], Any] = lambda x: x, save_details: bool = False) -> None:
        self.metric_fn: Any
        super().__init__(_Cases(self.grade), output_transform=output_transform, save_details=save_details)

    @staticmethod
    @abstractmethod
    def grade(label: Counts, scores: Floats) -> float:
        """Make the value of classes (N,) and scores (N, K), probabilities."""

    def update(self, output: Sequence[Any]) -> None:
        """Add cases; `output` is `(pred, label)`."""
        for scores, label in _pairs(*output):
            self.metric_fn.append(scores, label)
        self.metric_fn.is_updated = True


class _Cases(CumulativeIterationMetric):
    """Scores and classes of all cases, gathered from all ranks."""

    def __init__(self, grade: Callable[[Counts, Floats], float]) -> None:
        super().__init__()
        self.grade = grade
        self.is_updated = False

    def reset(self) -> None:
        """Forget all cases."""
        super().reset()   # type: ignore[no-untyped-call]
        self.is_updated = False

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        raise NotImplementedError("`ClassificationMetric` gives cases; this keeps them.")

    def cases(self) -> tuple[Counts, Floats]:
        """Classes (N,) and probabilities (N, K)."""
        found = super().get_buffer()   # type: ignore[no-untyped-call]
        if found is None:
            raise NotComputableError("The metric must be updated with a case before it is computed, got none.")
        scores, label = (side.cpu().numpy() for side in found)
        return label.astype(np.int64), class_probabilities(scores.astype(np.float64))

    def get_buffer(self) -> Tensor | None:
        """Details; see `ClassificationMetric`. None where no case has a label, as when a teacher stands for labels."""
        if self._has_no_label():
            return None
        label, scores = self.cases()
        details = np.full(scores.shape, np.nan)
        details[np.arange(len(label)), label] = scores.argmax(1) == label
        return torch.from_numpy(details)

    def aggregate(self) -> Tensor:
        value = math.nan if self._has_no_label() else self.grade(*self.cases())
        return torch.tensor(value, dtype=torch.float64)

    def _has_no_label(self) -> bool:
        return self.is_updated and super().get_buffer() is None   # type: ignore[no-untyped-call]


def _pairs(preds: Any, labels: Any) -> list[tuple[Tensor, Tensor]]:
    """Scores (K,), float64, and class () of each case that has one."""
    pairs = []
    for pred, value in zip(preds, labels, strict=True):
        scores, label = plain_tensor(torch.as_tensor(pred)).detach().double(), torch.as_tensor(value)
        if scores.numel() < 2 or scores.numel() != scores.shape[0]:
            raise ValueError(
                f"`pred` must be scores of the classes, shape (K,), got {tuple(scores.shape)}; take the network's "
                "output without argmax."
            )
        scores = scores.flatten()
        number = float(label) if label.numel() == 1 else math.nan
        if not number.is_integer() or number >= len(scores):
            got = tuple(label.shape) if label.numel() != 1 else number
            raise ValueError(
                f"`label` must be the number of a class, 0 to {len(scores) - 1}, or negative for none, got {got}."
            )
        if number >= 0:
            pairs.append((scores, torch.tensor(int(number), device=scores.device)))
    return pairs


def class_probabilities(scores: Floats) -> Floats:
    """Rows that sum to 1: logits are not comparable between cases, as they have no common zero.

    Args:
        scores: logits of all cases, or probabilities of all, which stay as they are. Shape (N, K).

    Example:
        >>> class_probabilities(np.array([[2.0, 2.0], [0.0, 0.0]])).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    if (scores >= 0).all() and np.allclose(scores.sum(1), 1.0, atol=1e-3):   # float16 in autocast
        return scores
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _counted(label: Counts, scores: Floats) -> Counts:
    return confusion_matrix(label, scores.argmax(1), scores.shape[1])


class Accuracy(ClassificationMetric):
    """Share of the cases whose class has the highest score. Arguments: those of `ClassificationMetric`.

    Example:
        >>> metric = Accuracy()
        >>> metric.update((torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), [0, 1, 1]))
        >>> round(metric.compute(), 4)
        0.6667
    """

    @staticmethod
    def grade(label: Counts, scores: Floats) -> float:
        """Count the right ones."""
        return float((scores.argmax(1) == label).mean())


class BalancedAccuracy(ClassificationMetric):
    """Mean over classes of the share that is found; see `balanced_accuracy`.

    Args:
        output_transform: as `ClassificationMetric`.
        save_details: as `ClassificationMetric`.
    """

    def __init__(self, output_transform: Callable[[Any], Any] = lambda x: x, save_details: bool = True) -> None:
        super().__init__(output_transform, save_details)

    @staticmethod
    def grade(label: Counts, scores: Floats) -> float:
        """Take the mean over classes."""
        return balanced_accuracy(_counted(label, scores))


class QuadraticKappa(ClassificationMetric):
    """Agreement on ordered classes; see `quadratic_kappa`. Arguments: those of `ClassificationMetric`."""

    @staticmethod
    def grade(label: Counts, scores: Floats) -> float:
        """Weigh the table."""
        return quadratic_kappa(_counted(label, scores))


class MacroF1(ClassificationMetric):
    """Mean F1 of the classes; see `macro_f1`. Arguments: those of `ClassificationMetric`."""

    @staticmethod
    def grade(label: Counts, scores: Floats) -> float:
        """Take the mean over classes."""
        return macro_f1(_counted(label, scores))


class MacroAUC(ClassificationMetric):
    """Mean area under the ROC curve, one class against the others; see `macro_auc`.

    Arguments: those of `ClassificationMetric`. Logits are brought to probabilities first.
    """

    @staticmethod
    def grade(label: Counts, scores: Floats) -> float:
        """Rank the cases of each class."""
        return macro_auc(label, scores)


class ConfusionMatrixSaver:
    """Write the table of true and predicted classes of an evaluation as `confusion_matrix.csv`, of all ranks.

    Args:
        output_dir: folder of the scores; it is made.
        classes: names of the classes in their order; None numbers them.
        output_transform: as `ClassificationMetric`.

    Raises:
        ValueError: at the end, the names are not as many as the classes.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], classes: Sequence[str] | None = None,
        output_transform: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        self.output_dir, self.classes = Path(output_dir), classes
        self._transform, self._cases = output_transform, _Cases(lambda label, scores: math.nan)

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _forget(self) -> None:
        self._cases.reset()

    def _add(self, engine: Engine) -> None:
        for scores, label in _pairs(*self._transform(engine.state.output)):
            self._cases.append(scores, label)

    def _write(self) -> None:
        label, scores = self._cases.cases()                          # on all ranks: they gather
        names = list(self.classes) if self.classes is not None else list(map(str, range(scores.shape[1])))
        if len(names) != scores.shape[1]:
            raise ValueError(f"`classes` must name {scores.shape[1]} classes, got {names}.")
        if idist.get_rank():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["label \\ prediction", *names])
            writer.writerows([name, *row] for name, row in zip(names, _counted(label, scores).tolist(), strict=True))
