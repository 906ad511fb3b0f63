# SPDX-License-Identifier: Apache-2.0
"""Metrics of instance segmentation, against scikit-image, loops and values by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.data.meta_tensor import MetaTensor
from monai.engines.evaluator import SupervisedEvaluator
from monai.handlers.metrics_saver import MetricsSaver
from monai.handlers.utils import from_engine
from skimage import metrics as skimage_metrics
from torch import Tensor, nn

import toys
from medkd.handlers.records import case_meta
from medkd.metrics import instances
from medkd.metrics.contingency import (
    Contingency,
    adapted_rand_error,
    aggregated_jaccard,
    contingency,
    count_difference,
    panoptic_quality,
    symmetric_best_dice,
    variation_of_information,
)
from medkd.metrics.instances import (
    AdaptedRandError,
    AggregatedJaccard,
    CountDifference,
    DetectionQuality,
    InstanceMetric,
    PanopticQuality,
    SegmentationQuality,
    SymmetricBestDice,
    VariationOfInformation,
    VariationOfInformationMerge,
    VariationOfInformationSplit,
)
from medkd.ops.ignored import UNLABELED

SIZES = [(9, 14), (5, 7, 6)]
METRICS: dict[str, type[InstanceMetric]] = {
    "voi": VariationOfInformation, "split": VariationOfInformationSplit, "merge": VariationOfInformationMerge,
    "arand": AdaptedRandError, "pq": PanopticQuality, "dq": DetectionQuality, "sq": SegmentationQuality,
    "aji": AggregatedJaccard, "sbd": SymmetricBestDice, "dic": CountDifference,
}


def random_maps(size: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Instances of 3 voxels along the last axis and more, most of them seen by the prediction, some not."""
    random = np.random.default_rng(seed)
    label = np.repeat(random.integers(0, 7, size), 3, axis=-1)[..., : size[-1]]
    other = np.repeat(random.integers(0, 9, size), 2, axis=-1)[..., : size[-1]]
    return np.where(random.random(size) < 0.6, label, other), label


def all_values(pred: Any, label: Any) -> dict[str, float]:
    """Every value of a pair of maps, by the metrics; (*S) each."""
    pair = [torch.as_tensor(pred)[None]], [torch.as_tensor(label)[None]]
    values = {}
    for name, kind in METRICS.items():
        metric = kind(save_details=False)
        metric.update(pair)
        values[name] = float(metric.compute())
    return values


def row(*ids: int) -> Tensor:
    return torch.tensor([ids])                                     # (1, W)


# Written down from the definitions: sets of voxels, and loops over them.

def voxel_sets(ids: np.ndarray) -> dict[int, set[tuple[int, ...]]]:
    return {int(one): set(map(tuple, np.argwhere(ids == one))) for one in np.unique(ids) if one}


def iou(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / len(first | second)


def pq_by_loops(pred: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    preds, labels = voxel_sets(pred), voxel_sets(label)
    found = [one for pair in itertools.product(preds.values(), labels.values()) if (one := iou(*pair)) > 0.5]
    wrong, missed = len(preds) - len(found), len(labels) - len(found)
    detection = len(found) / (len(found) + wrong / 2 + missed / 2)
    segmentation = sum(found) / len(found) if found else 0.0
    return detection * segmentation, detection, segmentation


def aji_by_loops(pred: np.ndarray, label: np.ndarray) -> float:
    left, common, union = voxel_sets(pred), 0, 0
    for _, voxels in sorted(voxel_sets(label).items()):
        best = max(left, key=lambda one: iou(voxels, left[one]), default=None)   # the first of equal ones
        if best is None or not voxels & left[best]:
            union += len(voxels)
            continue
        common += len(voxels & left[best])
        union += len(voxels | left.pop(best))
    return common / (union + sum(map(len, left.values())))


def best_dice_by_loops(first: np.ndarray, second: np.ndarray) -> float:
    others = voxel_sets(second).values()
    best = [max(2 * len(one & other) / (len(one) + len(other)) for other in others)
            for one in voxel_sets(first).values()]
    return sum(best) / len(best)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_the_table_agrees_with_counting_voxel_by_voxel(size: tuple[int, ...], seed: int) -> None:
    pred, label = random_maps(size, seed)
    table = contingency(pred, label)
    found = zip(table.pred_ids[table.pred_index].tolist(), table.label_ids[table.label_index].tolist(),
                table.counts.tolist(), strict=True)
    counted = Counter(zip(pred.ravel().tolist(), label.ravel().tolist(), strict=True))
    assert sorted(found) == sorted((*pair, count) for pair, count in counted.items())
    for ids, sizes, image in ((table.pred_ids, table.pred_sizes, pred), (table.label_ids, table.label_sizes, label)):
        assert dict(zip(ids.tolist(), sizes.tolist(), strict=True)) == {0: 0} | Counter(image.ravel().tolist())
    assert table.instances == (len(set(pred.ravel()) - {0}), len(set(label.ravel()) - {0}))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_information_and_rand_error_agree_with_scikit_image(size: tuple[int, ...], seed: int) -> None:
    pred, label = random_maps(size, seed)
    split, merge = skimage_metrics.variation_of_information(label, pred, ignore_labels=(0,))
    assert split != merge
    values = all_values(pred, label)
    assert [values["split"], values["merge"], values["voi"]] == pytest.approx([split, merge, split + merge])
    assert values["arand"] == pytest.approx(skimage_metrics.adapted_rand_error(label, pred)[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_matching_agrees_with_loops_over_instances(size: tuple[int, ...], seed: int) -> None:
    pred, label = random_maps(size, seed)
    values = all_values(pred, label)
    assert [values["pq"], values["dq"], values["sq"]] == pytest.approx(pq_by_loops(pred, label))
    assert values["aji"] == pytest.approx(aji_by_loops(pred, label))
    directions = best_dice_by_loops(pred, label), best_dice_by_loops(label, pred)
    assert values["sbd"] == pytest.approx(min(directions))
    assert directions[0] != directions[1]
    assert values["pq"] > 0


def test_values_by_hand() -> None:
    """Label 1 is found with 3 of 4 voxels, label 2 is cut into halves, a third instance is invented."""
    label = row(1, 1, 1, 1, 2, 2, 2, 2, 0, 0)
    pred = row(5, 5, 5, 0, 6, 6, 7, 7, 8, 8)
    cut = (3 * math.log2(4 / 3) + 1 * 2) / 4                       # bits of label 1: 3 to 1
    assert all_values(pred, label) == pytest.approx({
        "split": (cut + 1) / 2, "merge": 0.0, "voi": (cut + 1) / 2,
        "arand": 1 - 2 * (6 + 2 + 2) / ((12 + 12) + (6 + 2 + 2)),  # n (n - 1) pairs of n voxels
        "pq": 0.25, "dq": 1 / (1 + 3 / 2 + 1 / 2), "sq": 0.75,     # a half is not more than one half
        "aji": (3 + 2) / (8 + 9 - 3 - 2),                          # label 2 takes prediction 6, as 7 is no better
        "sbd": (6 / 7 + 4 / 6 + 4 / 6 + 0) / 4,                    # the other direction: (6 / 7 + 4 / 6) / 2
        "dic": 2.0,
    })


def test_the_rand_error_of_billions_of_voxels_is_exact() -> None:
    """Two labels of 4 and 2 billion voxels, which one prediction merges: squares beyond 64 bits."""
    sizes = np.array([4_000_000_000, 2_000_000_000])
    table = Contingency(
        pred_ids=np.array([0, 1]), label_ids=np.array([0, 1, 2]), pred_sizes=np.array([0, sizes.sum()]),
        label_sizes=np.array([0, *sizes]), pred_index=np.array([1, 1]), label_index=np.array([1, 2]), counts=sizes,
    )
    both, merged = 4**2 + 2**2, 6**2
    assert adapted_rand_error(table) == pytest.approx(1 - 2 * both / (merged + both))


def test_thousands_of_instances_are_numbered_by_a_table() -> None:
    ids = 3 * np.arange(12_000)                                    # beyond 15 bits, and less than four for each voxel
    table = contingency(ids, ids[::-1])
    assert table.instances == (11_999, 11_999)
    assert table.pred_ids[[1, -1]].tolist() == [3, 35_997]
    assert table.counts.tolist() == [1] * 12_000


def test_labels_take_predictions_in_the_order_of_their_ids() -> None:
    merged = row(9, 9, 9, 9, 9)
    assert aggregated_jaccard(contingency(merged, row(1, 1, 2, 2, 2))) == pytest.approx(2 / (5 + 5 - 2))
    assert aggregated_jaccard(contingency(merged, row(2, 2, 1, 1, 1))) == pytest.approx(3 / (5 + 5 - 3))


def test_a_label_takes_the_best_prediction_that_is_left() -> None:
    label = row(1, 1, 1, 1, 2, 2, 2, 2)
    pred = row(0, 4, 4, 4, 4, 4, 4, 3)                             # label 1 takes 4, though label 2 has as much of it
    assert aggregated_jaccard(contingency(pred, label)) == pytest.approx((3 + 1) / (8 + 7 - 3 - 1))


def test_of_two_predictions_that_fit_as_well_a_label_takes_the_one_of_the_lower_id() -> None:
    table = contingency(row(3, 4, 3, 4), row(1, 1, 2, 0))          # 1 / 3 each, and label 2 overlaps 3 only
    assert aggregated_jaccard(table) == pytest.approx(1 / (3 + 4 - 1))


@pytest.mark.parametrize("size", SIZES)
def test_permuting_ids_changes_nothing_but_the_order_of_the_jaccard_index(size: tuple[int, ...]) -> None:
    pred, label = random_maps(size, seed=3)
    random = np.random.default_rng(0)
    ids = [np.append(0, 1 + random.permutation(20)) for _ in range(2)]
    before, after = all_values(pred, label), all_values(ids[0][pred], ids[1][label])
    in_order = all_values(pred * 1000, label * 70_000)             # 0 stays 0
    assert in_order == before
    before.pop("aji")
    after.pop("aji")
    assert after == pytest.approx(before)


@pytest.mark.parametrize("dtype", [
    torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
])
def test_every_type_gives_the_same(dtype: torch.dtype) -> None:
    pred, label = random_maps((9, 14), seed=1)
    expected = all_values(pred, label)
    assert all_values(torch.as_tensor(pred).to(dtype), torch.as_tensor(label)) == expected
    assert all_values(torch.as_tensor(pred), torch.as_tensor(label).to(dtype)) == expected
    if dtype != torch.bfloat16:                                    # which NumPy does not have
        cast = [torch.as_tensor(ids).to(dtype).numpy() for ids in (pred, label)]
        assert variation_of_information(contingency(*cast)) == variation_of_information(contingency(pred, label))


def test_masks_are_one_instance() -> None:
    pred, label = torch.tensor([[True, True, False, False]]), torch.tensor([[True, True, True, False]])
    assert all_values(pred, label)["pq"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("dtype", "first"),
    [
        (np.int32, 65_535), (np.uint32, 65_536), (np.int32, 2**24), (np.int64, 2**24), (np.int64, 2**53),
        (np.uint64, 2**63), (np.uint64, 2**64 - 3), (np.float32, 2**24 - 3), (np.float64, 2**24),
    ],
)
def test_large_ids_are_told_apart(dtype: Any, first: int) -> None:
    """Two ids next to each other, as prediction and as label."""
    large = np.array([[first, first, first + 1, first + 1, 0]], dtype=dtype)
    small = np.array([[1, 1, 2, 2, 2]], dtype=dtype)
    for pred, label in ((large, small), (large, large), (small, large)):
        assert contingency(pred, label).instances == (2, 2)
        consecutive = [np.where(ids >= first, ids - first + 1, ids).astype(np.int64) for ids in (pred, label)]
        assert all_values(pred, label) == all_values(*consecutive)
    assert contingency(large, small).pred_ids.tolist() == [0, first, first + 1]


@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        (row(0, 0, 0, 0), row(0, 0, 0, 0), {"voi": math.nan, "arand": math.nan, "pq": math.nan, "dic": math.nan}),
        (row(1, 1, 2, 0), row(0, 0, 0, 0), {"voi": math.nan, "arand": math.nan, "pq": 0.0, "dic": 2.0}),
        (row(3, 3, 0, 0), row(1, 1, 0, 0), {"voi": 0.0, "arand": 0.0, "pq": 1.0, "dic": 0.0}),
        (row(3, 3, 3, 3), row(1, 1, 1, 1), {"voi": 0.0, "arand": 0.0, "pq": 1.0, "dic": 0.0}),
        (row(3, 4, 5, 6), row(9, 8, 7, 6), {"voi": 0.0, "arand": math.nan, "pq": 1.0, "dic": 0.0}),
        (row(3), row(1), {"voi": math.nan, "arand": math.nan, "pq": math.nan, "dic": math.nan}),
        (row(1, 2, 3), row(-1, -2, -1), {"voi": math.nan, "arand": math.nan, "pq": math.nan, "dic": math.nan}),
        (row(1, 1, 2, 3), row(-1, 4, 4, 0), {"voi": 1.0, "split": 1.0, "merge": 0.0, "arand": 1.0, "pq": 0.0,
                                             "aji": 0.25, "sbd": 4 / 9, "dic": 2.0}),
        (row(3, 3, 3, 3), row(9, 8, 7, 6), {"voi": 2.0, "split": 0.0, "arand": 1.0, "pq": 0.0, "aji": 0.25 / 1.75,
                                            "sbd": 0.4, "dic": 3.0}),
        (row(0, 0, 0, 0), row(1, 1, 2, 2), {"voi": 1.0, "split": 0.0, "arand": 1 - 2 * 4 / (4 + 12), "pq": 0.0,
                                            "dic": 2.0}),
    ],
    ids=["nothing at all", "all invented", "one instance", "one that fills the image", "single voxels", "one voxel",
         "everything ignored", "one voxel ignored", "all merged",
         "nothing predicted"],
)
def test_edge_cases_have_the_documented_values(pred: Tensor, label: Tensor, expected: dict[str, float]) -> None:
    same = dict.fromkeys(("dq", "sq", "aji", "sbd"), expected["pq"])
    parts = {"split": expected["voi"], "merge": expected["voi"]}   # of 0 and NaN, and where all is merged
    assert all_values(pred, label) == pytest.approx(parts | same | expected, nan_ok=True)


def test_a_map_without_voxels_has_an_empty_table() -> None:
    table = contingency(np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3)))
    assert table.instances == (0, 0)
    assert table.pred_ids.tolist() == table.label_ids.tolist() == table.pred_sizes.tolist() == [0]
    assert table.counts.size == 0
    assert math.isnan(adapted_rand_error(table))
    values = *panoptic_quality(table), symmetric_best_dice(table), aggregated_jaccard(table), count_difference(table)
    assert all(map(math.isnan, values))


def test_inputs_stay_as_they_are_and_views_are_read_in_order() -> None:
    pred, label = random_maps((9, 14), seed=2)
    copies = pred.copy(), label.copy()
    expected = variation_of_information(contingency(pred, label))
    for flip in (lambda ids: ids[::-1], lambda ids: ids.T, lambda ids: torch.as_tensor(ids).T, MetaTensor):
        assert variation_of_information(contingency(flip(pred), flip(label))) == pytest.approx(expected)
    np.testing.assert_array_equal((pred, label), copies)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(0, 1, -1), r"must have whole ids of 0 or more, got -1; 0 is background or not labeled\."),
        (torch.tensor([[0.0, 1.5, 2.0]]), r"must have whole ids of 0 or more, got 1\.5; 0 is background"),
        (torch.tensor([[0.0, -2.0, 2.0]]), r"must have whole ids of 0 or more, got -2\.0; 0 is background"),
        (torch.tensor([[0.0, math.nan, 2.0]]), r"must have whole ids of 0 or more, got nan; 0 is background"),
        (torch.tensor([[0.0, math.inf, 2.0]]), r"must have ids below 16777216 .* got inf; load and keep"),
        (torch.tensor([[0.0, 2.0**24, 2.0]]),
         r"must have ids below 16777216 as long as they are torch\.float32, .* got 16777216; load and keep ids as int"),
        (np.array([[0.0, 2.0**53, 2.0]]), r"must have ids below 9007199254740992 as long as they are float64, .* load"),
        (torch.tensor([[0, 2048, 2]]).half(), r"must have ids below 2048 as long as they are torch\.float16"),
        (torch.tensor([[0, 256, 2]]).bfloat16(), r"must have ids below 256 as long as they are torch\.bfloat16"),
    ],
    ids=["negative", "fraction", "negative float", "nan", "inf", "float32", "float64", "half", "bfloat16"],
)
def test_what_is_no_id_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`pred` {message}"):
        contingency(wrong, row(0, 1, 2))
    if (wrong < 0).any():
        assert contingency(row(0, 1, 2), wrong).counts.sum() == 2   # ignored in the label
        return
    with pytest.raises(ValueError, match=f"`label` {message}"):
        contingency(row(0, 1, 2), wrong)


def test_maps_of_different_shape_have_no_table() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got \(1, 4\) and \(1, 3\); resample the prediction"):
        contingency(row(1, 1, 1, 1), row(1, 1, 1))


@pytest.mark.parametrize(
    ("pred", "label"),
    [((1, 4, 4), (1, 4, 5)), ((2, 4, 4), (2, 4, 4)), ((1, 4), (1, 4)), ((4, 4, 4), (1, 4, 4)), ((1, 1, 2, 4, 4),) * 2],
    ids=["other size", "one-hot", "no channel", "other channels", "batch axis"],
)
def test_what_is_no_instance_map_of_one_shape_is_refused(pred: tuple[int, ...], label: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"instance maps of one shape \(1, \*S\), got .* and .*; make instances of"):
        PanopticQuality().update(([torch.zeros(pred)], [torch.zeros(label)]))


def test_prediction_and_label_are_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        PanopticQuality().update(([row(1)[None]], [row(1)[None]] * 2))


@pytest.mark.parametrize("blocks", [(2,), (2, 2, 2, 2), (), (0, 1), (2, -1), (2.0, 2)])
def test_blocks_are_positive_numbers(blocks: Any) -> None:
    with pytest.raises(ValueError, match=r"a positive number for each of 2 or 3 spatial axes, got .*; None scores"):
        PanopticQuality(blocks)


@pytest.mark.parametrize(("blocks", "shape"), [((2, 2), (1, 4, 4, 4)), ((2, 2, 2), (1, 4, 4)), ((1, 5), (1, 9, 4))])
def test_blocks_fit_into_the_case(blocks: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a number for each spatial axis and at most its voxels, got .*; divide into"):
        PanopticQuality(blocks).update(([torch.ones(shape)], [torch.ones(shape)]))


def evaluate(batches: list[Any], **metrics: InstanceMetric) -> Any:
    """Run an engine whose output is the batch, and give its state."""
    engine = Engine(lambda _engine, batch: batch)
    for name, metric in metrics.items():
        metric.attach(engine, name)
    engine.run(batches)
    return engine.state


@pytest.mark.parametrize(("size", "blocks"), [((9, 14), [2, 3]), ((5, 7, 6), (2, 1, 4))])
def test_blocks_are_scored_like_cases_of_their_own(size: tuple[int, ...], blocks: Any) -> None:
    pairs = [random_maps(size, seed) for seed in range(3)]
    expected = []
    for pred, label in pairs:
        edges = [np.array_split(np.arange(length), count) for length, count in zip(size, blocks, strict=True)]
        boxes = [np.ix_(*box) for box in itertools.product(*edges)]
        expected.append([all_values(pred[box], label[box]) for box in boxes])
    batch = tuple(torch.stack([torch.as_tensor(pair[side])[None] for pair in pairs]) for side in range(2))
    state = evaluate([batch], **{name: kind(blocks) for name, kind in METRICS.items()})
    for name in METRICS:
        values = torch.tensor([[block[name] for block in case] for case in expected])
        assert state.metric_details[name].shape == (3, math.prod(blocks))
        torch.testing.assert_close(state.metric_details[name], values)
        assert state.metrics[name] == pytest.approx(float(values.mean()))


def test_blocks_and_cases_without_a_value_count_nothing() -> None:
    label = torch.tensor([[[1, 1, 1, 1], [0, 0, 2, 2]]])           # the third block has no label
    pred = torch.tensor([[[1, 2, 1, 1], [0, 0, 0, 3]]])
    unlabeled = torch.zeros_like(label)
    metrics = {"voi": VariationOfInformation((2, 2)), "dic": CountDifference((2, 2))}
    state = evaluate([([pred, pred], [label, unlabeled])], **metrics)
    expected = torch.tensor([[1.0, 0.0, math.nan, 1.0], [math.nan] * 4])
    torch.testing.assert_close(state.metric_details["voi"], expected, equal_nan=True)
    assert state.metrics["voi"] == pytest.approx(2 / 3)
    expected = torch.tensor([[1.0, 0.0, math.nan, 0.0], [2.0, 1.0, math.nan, 1.0]])
    torch.testing.assert_close(state.metric_details["dic"], expected, equal_nan=True)
    assert math.isnan(evaluate([([pred], [unlabeled])], voi=VariationOfInformation()).metrics["voi"])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the maps that were counted."""
    calls: list[tuple[int, ...]] = []

    def count(pred: Tensor, label: Tensor) -> instances.Contingency:
        calls.append(tuple(label.shape))
        return contingency(pred, label)

    monkeypatch.setattr(instances, "contingency", count)
    return calls


def test_metrics_on_one_engine_count_each_case_once(counted: list[tuple[int, ...]]) -> None:
    pairs = [[torch.as_tensor(ids)[None] for ids in random_maps(size, seed=0)] for size in ((4, 5), (6, 3), (7, 7))]
    batches = [([pairs[0][0], pairs[1][0]], [pairs[0][1], pairs[1][1]]), ([pairs[2][0]], [pairs[2][1]])]
    state = evaluate(batches, **{name: kind() for name, kind in METRICS.items()})
    assert counted == [(4, 5), (6, 3), (7, 7)]
    for index, (pred, label) in enumerate(pairs):
        expected = all_values(pred[0], label[0])
        assert {name: float(state.metric_details[name][index]) for name in METRICS} == pytest.approx(expected)


def test_metrics_count_apart_only_for_other_blocks(counted: list[tuple[int, ...]]) -> None:
    ids = torch.ones(1, 6, 4, dtype=torch.int64)
    evaluate([([ids], [ids])], first=PanopticQuality((2, 1)), second=AdaptedRandError([2, 1]), whole=PanopticQuality())
    assert counted == [(3, 4), (3, 4), (6, 4)]


def test_views_of_one_memory_are_not_taken_for_each_other() -> None:
    ids = torch.tensor([[[1, 1], [2, 2]]])
    state = evaluate(
        [([ids], [ids])],
        same=PanopticQuality(), turned=PanopticQuality(output_transform=lambda x: ([x[0][0].mT], x[1])),
    )
    assert state.metrics == {"same": 1.0, "turned": 0.0}


def test_memory_that_the_next_iteration_fills_anew_is_counted_anew() -> None:
    pred, label = torch.zeros(2, 1, 1, 4, dtype=torch.int64)
    label.copy_(row(1, 1, 2, 2))

    def fill(_engine: Engine, ids: Tensor) -> Any:
        pred.copy_(ids)
        return [pred], [label]

    engine = Engine(fill)
    for name, kind in METRICS.items():
        kind().attach(engine, name)
    engine.run([row(1, 1, 2, 2), row(1, 1, 1, 1)])
    assert engine.state.metric_details["merge"].tolist() == [[0.0], [1.0]]
    assert engine.state.metric_details["dq"].tolist() == [[1.0], [0.0]]


def evaluator_of(folder: Path, data: list[dict[str, Tensor]], **metrics: InstanceMetric) -> SupervisedEvaluator:
    """The image is the prediction; values per case and block are saved."""
    return SupervisedEvaluator(
        "cpu", DataLoader(Dataset(data), batch_size=2), nn.Identity(), key_val_metric=dict(metrics),
        val_handlers=[MetricsSaver(str(folder), metric_details="*", batch_transform=case_meta)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_an_evaluator_saves_the_values_of_each_block(tmp_path: Path, dtype: torch.dtype) -> None:
    label = torch.tensor([[[1, 1, 2, 2], [3, 3, 4, 4]]], dtype=dtype)
    preds = [[[[1, 1, 2, 2], [3, 3, 4, 4]]], [[[1, 1, 2, 2], [3, 5, 9, 0]]]]
    data = [
        {"image": MetaTensor(torch.tensor(pred, dtype=dtype), meta={"filename_or_obj": f"{index}.png"}),
         "label": MetaTensor(label)}
        for index, pred in enumerate(preds)
    ]
    output: Callable[[Any], Any] = from_engine(["pred", "label"])
    evaluator = evaluator_of(
        tmp_path, data, split=VariationOfInformationSplit([2, 2], output), difference=CountDifference(None, output),
        quality=PanopticQuality([1, 2], output),
    )
    evaluator.run()
    assert evaluator.state.metrics == {
        "split": (0 + (0 + 0 + 1 + 1) / 4) / 2, "difference": 0.5,
        "quality": pytest.approx((1 + (1 / 2.5 + 1 / 2) / 2) / 2),
    }
    saved = {name: (tmp_path / f"{name}_raw.csv").read_text().splitlines() for name in evaluator.state.metrics}
    assert saved["split"] == [
        "filename,class0,class1,class2,class3,mean", "0.png,0.0,0.0,0.0,0.0,0.0", "1.png,0.0,0.0,1.0,1.0,0.5",
    ]
    assert saved["difference"] == ["filename,class0,mean", "0.png,0.0,0.0", "1.png,1.0,1.0"]
    assert saved["quality"][1:] == ["0.png,1.0,1.0,1.0", "1.png,0.4,0.5,0.45"]


RANK = """
import json
import torch
from ignite.engine import Engine
from medkd.metrics.instances import CountDifference, VariationOfInformationSplit

torch.distributed.init_process_group("gloo", f"file://{folder}/meeting_point", rank=rank, world_size=2)
label = torch.tensor([[[1, 1, 2, 2]]])
preds = ([[1, 1, 2, 2]], [[1, 3, 2, 2], [1, 3, 2, 4]])[rank]
engine = Engine(lambda _engine, pred: ([torch.tensor([[pred]])], [label]))
for metric in (CountDifference((1, 2)), VariationOfInformationSplit((1, 2))):
    metric.attach(engine, type(metric).__name__)
engine.run(preds)
details = {name: sorted(values.tolist()) for name, values in engine.state.metric_details.items()}
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump([engine.state.metrics, details], file)
torch.distributed.destroy_process_group()
"""


def test_ranks_gather_the_values_of_all_blocks(tmp_path: Path) -> None:
    toys.finish(*(toys.start(exec, RANK, {"rank": rank, "folder": str(tmp_path)}) for rank in range(2)))
    expected = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    for rank in range(2):
        metrics, details = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics == {"CountDifference": 0.5, "VariationOfInformationSplit": 0.5}
        assert details == {"CountDifference": expected, "VariationOfInformationSplit": expected}


@pytest.mark.parametrize("size", [(9, 14), (4, 6, 9)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_values_are_those_of_the_part_that_is_not_ignored(size: tuple[int, ...], dtype: Any) -> None:
    pred, label = (ids.astype(dtype) for ids in random_maps(size, seed=4))
    unknown = label.copy()
    unknown[..., 6:] = -1
    assert all_values(pred, unknown) == all_values(pred[..., :6].copy(), label[..., :6].copy())


def test_a_negative_prediction_is_still_refused() -> None:
    with pytest.raises(ValueError, match="`pred` must have whole ids of 0 or more, got -1"):
        contingency(row(0, -1, 1), row(0, 1, 1))


@pytest.mark.parametrize("name", list(METRICS))
def test_a_case_without_a_label_has_no_value(name: str) -> None:
    pred = torch.randint(0, 3, (1, 6, 7))
    padded = torch.full((1, 6, 7), UNLABELED)
    padded[..., :3] = 0
    for label in (torch.full((1, 6, 7), UNLABELED), padded, padded.float()):
        metric = METRICS[name](save_details=False)
        metric.update(([pred], [label]))
        assert math.isnan(float(metric.compute()))
