# SPDX-License-Identifier: Apache-2.0
"""Metrics of classification against the specification's numbers, slow definitions and SciPy."""

from __future__ import annotations

import csv
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from monai.data.meta_tensor import MetaTensor
from monai.handlers import MetricsSaver, from_engine
from scipy.stats import mannwhitneyu
from torch import distributed

import toys
from medkd.metrics.classification import (
    Accuracy,
    BalancedAccuracy,
    ClassificationMetric,
    ConfusionMatrixSaver,
    MacroAUC,
    MacroF1,
    QuadraticKappa,
    balanced_accuracy,
    confusion_matrix,
    macro_auc,
    macro_f1,
    quadratic_kappa,
)

# section 16 of the specification of inter-resolution attention
LABEL = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
PRED = [0, 0, 1, 1, 2, 2, 3, 3, 2, 0]
ALL = (Accuracy, BalancedAccuracy, QuadraticKappa, MacroF1, MacroAUC)


def one_hot(pred: list[int], classes: int = 4) -> torch.Tensor:
    return torch.eye(classes)[pred]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Accuracy, 0.6), (BalancedAccuracy, 0.666667), (QuadraticKappa, 0.589041), (MacroF1, 0.583333)],
)
def test_the_metrics_are_those_of_the_specification(kind: type[ClassificationMetric], expected: float) -> None:
    metric = kind(save_details=False)
    metric.update((one_hot(PRED[:4]), torch.tensor(LABEL[:4])))
    metric.update((list(one_hot(PRED[4:])), LABEL[4:]))             # a batch, and lists as of a decollated one
    assert metric.compute() == pytest.approx(expected, abs=1e-6)
    metric.reset()
    with pytest.raises(NotComputableError, match="must be updated with a case"):
        metric.compute()


@pytest.mark.parametrize("kind", ALL)
def test_cases_without_a_label_alone_have_no_value(kind: type[ClassificationMetric]) -> None:
    metric = kind(save_details=False)
    metric.update((one_hot(PRED[:2]), [-2, -1]))
    assert np.isnan(metric.compute())


def test_kappa_is_one_minus_the_mean_square_over_that_of_all_pairs() -> None:
    draw = np.random.default_rng(0)
    label, pred = draw.integers(0, 5, 60), draw.integers(0, 5, 60)
    chance = np.mean([(i - j) ** 2 for i, j in product(label, pred)])
    expected = 1 - np.mean((label - pred) ** 2) / chance
    assert quadratic_kappa(confusion_matrix(label, pred, 5)) == pytest.approx(expected, abs=1e-12)
    assert quadratic_kappa(confusion_matrix(label, label, 5)) == 1.0


def test_f1_and_balanced_accuracy_are_the_means_of_their_definitions() -> None:
    draw = np.random.default_rng(1)
    label, pred = draw.integers(0, 4, 80), draw.integers(0, 4, 80)
    recalls, scores = [], []
    for one in range(4):
        hit, found, there = ((label == one) & (pred == one)).sum(), (pred == one).sum(), (label == one).sum()
        recall, precision = hit / there, hit / found
        recalls.append(recall)
        scores.append(2 * recall * precision / (recall + precision))
    counts = confusion_matrix(label, pred, 4)
    assert balanced_accuracy(counts) == pytest.approx(np.mean(recalls), abs=1e-12)
    assert macro_f1(counts) == pytest.approx(np.mean(scores), abs=1e-12)


def test_auc_is_the_share_of_ordered_pairs_with_ties_as_halves() -> None:
    draw = np.random.default_rng(2)
    label = draw.integers(0, 3, 40)
    scores = np.round(draw.dirichlet(np.ones(3), 40), 1)
    expected = [
        mannwhitneyu(scores[label == one, one], scores[label != one, one]).statistic
        / ((label == one).sum() * (label != one).sum()) for one in range(3)
    ]
    assert macro_auc(label, scores) == pytest.approx(np.mean(expected), abs=1e-12)


def test_classes_without_a_case_count_nothing() -> None:
    assert balanced_accuracy(confusion_matrix([0, 0, 2], [0, 1, 2], 4)) == 0.75
    assert macro_f1(confusion_matrix([0, 0, 2], [0, 1, 2], 4)) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert macro_auc([0, 2], np.array([[0.9, 0.0, 0.1, 0.0], [0.2, 0.0, 0.8, 0.0]])) == 1.0


def test_there_is_no_value_where_all_is_one_class() -> None:
    single = confusion_matrix([1, 1], [1, 1], 3)
    assert math.isnan(quadratic_kappa(single))
    assert quadratic_kappa(confusion_matrix([1, 1], [1, 0], 3)) == 0.0
    assert balanced_accuracy(single) == macro_f1(single) == 1.0
    assert math.isnan(macro_auc([1, 1], np.array([[0.1, 0.9], [0.2, 0.8]])))
    nothing = np.zeros((3, 3), np.int64)
    assert all(math.isnan(grade(nothing)) for grade in (balanced_accuracy, quadratic_kappa, macro_f1))


def test_logits_are_ranked_as_probabilities() -> None:
    logits = torch.tensor([[9.0, 8.0], [1.0, -5.0], [0.0, 0.5], [-7.0, 2.0]])   # class 1: 8 is no high score
    values = []
    for scores in (logits, logits.softmax(1), logits.softmax(1).half()):
        metric = MacroAUC()
        metric.update((scores, [0, 0, 1, 1]))
        values.append(metric.compute())
    assert values == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ALL)
def test_cases_without_a_label_count_nothing_and_maps_of_one_pixel_do(kind: type[ClassificationMetric]) -> None:
    few, all_cases = kind(save_details=False), kind(save_details=False)
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    few.update((scores[:4], [0, 1, 2, 1]))
    labels = [MetaTensor(torch.tensor([float(one)])) for one in (0, 1, 2, 1, -2, -2)]
    all_cases.update((MetaTensor(scores), labels))
    assert few.compute() == all_cases.compute()


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        (torch.rand(1, 3), [3], "`label` must be the number of a class, 0 to 2, or negative for none, got 3"),
        (torch.rand(1, 3), [0.5], "`label` must be the number of a class, .* got 0.5"),
        (torch.rand(1, 3), torch.zeros(1, 1, 4, 4), r"`label` must be the number .* got \(1, 4, 4\)"),
        (torch.tensor([2]), [0], r"`pred` must be scores of the classes, shape \(K,\), got \(\); take"),
        (torch.rand(1, 3, 4, 4), [0], r"`pred` must be scores of the classes, shape \(K,\), got \(3, 4, 4\)"),
    ],
)
def test_what_is_no_classification_is_refused(pred: Any, label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Accuracy().update((pred, label))


def evaluate(folder: Path, names: list[str] | None) -> Engine:
    """An evaluation of the specification's cases in batches of 3, with all that is written."""
    batches = [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]

    def step(engine: Engine, place: slice) -> list[dict[str, Any]]:
        return [{"pred": pred, "label": label} for pred, label in zip(one_hot(PRED[place]), LABEL[place], strict=True)]

    engine, pair = Engine(step), from_engine(["pred", "label"])
    BalancedAccuracy(output_transform=pair).attach(engine, "val_balanced_accuracy")
    QuadraticKappa(output_transform=pair).attach(engine, "val_kappa")
    ConfusionMatrixSaver(folder, names, pair).attach(engine)
    MetricsSaver(
        str(folder), metric_details="*", summary_ops="*",
        batch_transform=lambda places: [{"filename_or_obj": f"{n}.png"} for n in range(10)[places]],
    ).attach(engine)
    engine.state.metric_details = {}
    engine.run(batches)
    return engine


def test_table_and_details_are_saved_beside_the_scores(tmp_path: Path) -> None:
    engine = evaluate(tmp_path / "eval", ["NC", "G3", "G4", "G5"])
    assert engine.state.metrics["val_balanced_accuracy"] == pytest.approx(2 / 3)
    lines = (tmp_path / "eval" / "confusion_matrix.csv").read_text().splitlines()
    assert lines == ["label \\ prediction,NC,G3,G4,G5", "NC,2,1,0,0", "G3,0,1,1,0", "G4,0,0,1,0", "G5,1,0,1,2"]
    assert set(engine.state.metric_details) == {"val_balanced_accuracy"}
    with (tmp_path / "eval" / "val_balanced_accuracy_raw.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == [one == other for one, other in zip(LABEL, PRED, strict=True)]
    assert [row["class3"] for row in rows[:2]] == ["nan", "nan"]


def test_names_are_as_many_as_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`classes` must name 4 classes, got \['NC'\]"):
        evaluate(tmp_path, ["NC"])
    evaluate(tmp_path, None)
    assert (tmp_path / "confusion_matrix.csv").read_text().startswith("label \\ prediction,0,1,2,3\n0,2,")


def score_one_rank(rank: int, folder: Path) -> None:
    """Half of the cases, of unequal number, on each of two ranks."""
    distributed.init_process_group("gloo", f"file://{folder}/meeting_point", rank=rank, world_size=2)
    mine = slice(0, 4) if rank == 0 else slice(4, 10)
    engine = Engine(lambda _, batch: {"pred": one_hot(PRED[mine]), "label": LABEL[mine]})
    for kind in ALL:
        kind(output_transform=lambda out: (out["pred"], out["label"]), save_details=False).attach(engine, kind.__name__)
    ConfusionMatrixSaver(folder / f"{rank}", None, lambda out: (out["pred"], out["label"])).attach(engine)
    engine.run([0])
    torch.save(engine.state.metrics, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_gather_all_cases_and_one_writes(tmp_path: Path) -> None:
    toys.finish(*(toys.start(score_one_rank, rank, tmp_path) for rank in range(2)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first["QuadraticKappa"] == pytest.approx(0.589041, abs=1e-6)
    assert first["MacroAUC"] == pytest.approx(macro_auc(LABEL, one_hot(PRED).numpy()))
    assert (tmp_path / "0" / "confusion_matrix.csv").is_file()
    assert not (tmp_path / "1").exists()
