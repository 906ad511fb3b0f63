# SPDX-License-Identifier: Apache-2.0
"""A value per case and class, and measuring once for several metrics."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from monai.data.meta_tensor import MetaTensor
from torch import Tensor

import toys
from medkd.metrics.base import CaseMetric, Mask, bounding_box
from medkd.metrics.connectivity import WrongComponents, WrongVolume
from medkd.metrics.lesions import FalsePositiveLesions, LesionSensitivity, RelativeVolumeDifference
from medkd.metrics.surface import AverageSurfaceDistance, HausdorffDistance95, SurfaceDice
from medkd.ops.ignored import UNLABELED

measured: list[tuple[int, int]] = []


class Extra(CaseMetric):
    """Voxels that the prediction has more than the label, each counted with its volume; NaN without a label."""

    @staticmethod
    def measure(pred: Mask, label: Mask, spacing: Sequence[float], ignored: Mask | None = None) -> tuple[int, int]:
        measured.append((int(pred.sum()), int(label.sum())))
        return measured[-1]

    def score(self, measured: Any, spacing: Sequence[float]) -> float:
        pred, label = measured
        return (pred - label) * math.prod(spacing) if label else math.nan


class Ratio(Extra):
    def score(self, measured: Any, spacing: Sequence[float]) -> float:
        return measured[0] / measured[1]


@pytest.fixture(autouse=True)
def nothing_measured_yet() -> None:
    measured.clear()


def one_hot(*counts: int, size: tuple[int, ...] = (4, 4)) -> Tensor:
    """As many voxels of class 1, 2, ... as given, the rest is background."""
    sizes = torch.tensor([math.prod(size) - sum(counts), *counts])
    label = torch.arange(len(sizes)).repeat_interleave(sizes).reshape(size)
    return torch.stack([(label == index).float() for index in range(len(sizes))])


def compute(metric: CaseMetric, *cases: tuple[Tensor, Tensor]) -> float:
    metric.attach(Engine(lambda _engine, _batch: None), "value")
    metric.update(([pred for pred, _ in cases], [label for _, label in cases]))
    return float(metric.compute())


def test_the_mean_is_over_classes_and_then_cases_and_leaves_nan_and_background_out() -> None:
    cases = [(one_hot(3, 4), one_hot(1, 1)), (one_hot(5, 5), one_hot(4, 0))]
    assert compute(Extra(), *cases) == pytest.approx(((2 + 3) / 2 + 1) / 2)


@pytest.mark.parametrize("size", [(4, 4), (3, 2, 4)])
def test_the_spacing_is_that_of_each_label(size: tuple[int, ...]) -> None:
    affines = [torch.diag(torch.tensor([step, 0.5, 2.0, 1.0])) for step in (1.0, 3.0)]
    cases = [(one_hot(3, size=size), MetaTensor(one_hot(1, size=size), affine=affine)) for affine in affines]
    depth = 1.0 if len(size) == 2 else 2.0
    assert compute(Extra(), *cases) == pytest.approx((2 * 0.5 + 2 * 1.5) / 2 * depth)


def test_a_voxel_that_is_a_class_by_half_is_none_of_it() -> None:
    label = one_hot(2)
    compute(Extra(), (label * 0.5, label), (label * 0.6, label))
    assert measured == [(0, 2), (2, 2)]


def test_a_batch_is_a_list_of_cases() -> None:
    pred, label = torch.stack((one_hot(3), one_hot(2))), torch.stack((one_hot(1), one_hot(1)))
    metric = Extra(save_details=False)
    metric.update((pred, label))
    assert metric.compute() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("pred", "label"),
    [((3, 4, 4), (3, 4, 5)), ((1, 4, 4), (1, 4, 4)), ((3, 4), (3, 4)), ((2, 3, 4, 4), (3, 4, 4))],
    ids=["other size", "class numbers", "no class axis", "other rank"],
)
def test_what_is_not_one_hot_of_one_shape_is_refused(pred: tuple[int, ...], label: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be one-hot of one shape \(K, \*S\), got .* put `AsDiscreted`"):
        Extra().update(([torch.zeros(pred)], [torch.zeros(label)]))


def test_prediction_and_label_are_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        Extra().update(([one_hot(1)], [one_hot(1), one_hot(1)]))


def test_a_mean_of_cases_without_a_value_is_none() -> None:
    metric = HausdorffDistance95(save_details=False)
    metric.update(([one_hot(16)], [one_hot(0)]))
    assert math.isnan(metric.compute())


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(NotComputableError, match="must be updated with a case"):
        Extra(save_details=False).compute()


def evaluate(batches: Sequence[Any], **metrics: CaseMetric) -> Engine:
    """Run an engine whose output is the batch."""
    engine = Engine(lambda _engine, batch: batch)
    for name, metric in metrics.items():
        metric.attach(engine, name)
    engine.run(batches)
    return engine


def test_metrics_on_one_engine_measure_each_case_once() -> None:
    batches = [([one_hot(3), one_hot(5)], [one_hot(1), one_hot(2)]), ([one_hot(4)], [one_hot(1)])]
    engine = evaluate(batches, extra=Extra(), ratio=Ratio())
    assert measured == [(3, 1), (5, 2), (4, 1)]
    assert engine.state.metrics == {"extra": pytest.approx(8 / 3), "ratio": pytest.approx((3.0 + 2.5 + 4.0) / 3)}
    assert engine.state.metric_details["extra"].tolist() == [[2.0], [3.0], [3.0]]


def test_memory_that_the_next_iteration_fills_anew_is_measured_anew() -> None:
    pred, label = one_hot(0), one_hot(1)

    def fill(_engine: Engine, count: int) -> Any:
        pred.copy_(one_hot(count))
        return [pred], [label]

    engine = Engine(fill)
    for name, metric in {"extra": Extra(), "ratio": Ratio()}.items():
        metric.attach(engine, name)
    for _ in range(2):
        engine.run([3, 6])
        assert engine.state.metric_details["ratio"].tolist() == [[3.0], [6.0]]
    assert measured == [(3, 1), (6, 1)] * 2


def test_metrics_of_other_tensors_do_not_share() -> None:
    """The first two make tensors that are gone after the update, if nobody keeps them, and their memory used again."""
    size = 2, 600, 600                                             # large enough to be given back to the system
    label, other = (one_hot(count, size=size[1:]) for count in (1, 5))
    metrics = {
        "all": Extra(lambda output: ([one_hot(360_000, size=size[1:])], output[1])),
        "none": Extra(lambda output: ([torch.zeros(size)], output[1])),
        "own": Extra(),
        "swapped": Extra(lambda output: output[::-1]),
        "relabeled": Extra(lambda output: (output[0], [other])),
    }
    engine = evaluate([([one_hot(count, size=size[1:])], [label]) for count in (2, 3)], **metrics)
    expected = {"all": 360_000.0 - 1, "none": -1.0, "own": 1.5, "swapped": -1.5, "relabeled": -2.5}
    assert engine.state.metrics == expected


def test_tensors_that_were_measured_live_as_long_as_their_values() -> None:
    """Else another one may get their memory in the same iteration, and be taken for them."""
    made: list[weakref.ref[Tensor]] = []

    def make(output: Any) -> Any:
        pred = output[0][0] * 1
        made.append(weakref.ref(pred))
        return [pred], output[1]

    engine = Engine(lambda _engine, batch: batch)
    Extra(make).attach(engine, "value")
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _engine: alive.append(made[-1]() is not None))
    alive: list[bool] = []
    engine.run([([one_hot(3)], [one_hot(1)])])
    assert alive == [True]


def test_views_of_one_memory_are_not_taken_for_each_other() -> None:
    pred, label = (one_hot(count).flip(1, 2).contiguous() for count in (3, 1))   # in the first row
    first = Extra(lambda output: tuple([maps[..., :1] for maps in side] for side in output))
    engine = evaluate([([pred], [label])], whole=Extra(), column=first)
    assert engine.state.metrics == {"whole": 2.0, "column": 0.0}


def test_the_box_of_a_mask_is_as_small_as_it_gets() -> None:
    mask = np.zeros((5, 6, 7), dtype=bool)
    assert mask[bounding_box(mask)].size == 0
    mask[1, 2, 3] = mask[4, 2, 5] = True
    assert bounding_box(mask) == (slice(1, 5), slice(2, 3), slice(3, 6))


RANK = """
import json
import torch
from ignite.engine import Engine
from medkd.metrics.border import BorderAUC
from medkd.metrics.connectivity import WrongComponents
from medkd.metrics.connectivity import WrongComponents, WrongVolume
from medkd.metrics.surface import AverageSurfaceDistance, HausdorffDistance95, SurfaceDice

torch.distributed.init_process_group("gloo", f"file://{folder}/meeting_point", rank=rank, world_size=2)
label, batches = torch.zeros(8, 8), []
label[0, 0] = 1
for distance in ([2], [4, 6])[rank]:
    pred = torch.zeros(8, 8)
    pred[distance, 0] = 1
    batches.append([[torch.stack((1 - mask, mask))] for mask in (pred, label)])
engine = Engine(lambda _engine, batch: batch)
for metric in (HausdorffDistance95(), WrongComponents()):
    metric.attach(engine, type(metric).__name__)
BorderAUC(lambda output: tuple([maps[1:] for maps in side] for side in output)).attach(engine, "BorderAUC")
engine.run(batches)
details = {name: sorted(values.flatten().tolist()) for name, values in engine.state.metric_details.items()}
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump([engine.state.metrics, details], file)
torch.distributed.destroy_process_group()
"""


def test_ranks_gather_the_values_of_all_cases(tmp_path: Path) -> None:
    toys.finish(*(toys.start(exec, RANK, {"rank": rank, "folder": str(tmp_path)}) for rank in range(2)))
    for rank in range(2):
        metrics, details = json.loads((tmp_path / f"{rank}.json").read_text())
        area = pytest.approx(60 / 2 / 61)                          # off the border all are equal but one
        assert metrics == {"HausdorffDistance95": 4.0, "WrongComponents": 1.0, "BorderAUC": area}
        assert details == {"HausdorffDistance95": [2.0, 4.0, 6.0], "WrongComponents": [1.0, 1.0, 1.0]}


# ---- regions and ignored voxels ------------------------------------------------------------------------------------


def regions() -> Tensor:
    """Two regions, one inside the other, of 6 and 2 voxels; shape (2, 4, 4)."""
    whole, core = torch.zeros(2, 4, 4)
    whole[0], whole[1, :2], core[0, :2] = 1, 1, 1
    return torch.stack([whole, core])


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        (regions(), regions(), "`pred` must be one-hot, .* got 2 voxels of several classes; .*`include_background`"),
        (one_hot(3), regions(), "`label` must be one-hot, .* got 12 voxels of several classes"),
        (one_hot(3), one_hot(3) * torch.tensor([0.0, 1.0])[:, None, None], "`label` .* got 13 voxels of no class"),
    ],
    ids=["both", "label", "regions apart"],
)
def test_channels_that_overlap_or_have_no_background_are_refused(pred: Tensor, label: Tensor, message: str) -> None:
    for kind in (Extra, HausdorffDistance95, AverageSurfaceDistance, SurfaceDice, WrongComponents, WrongVolume):
        with pytest.raises(ValueError, match=message):
            kind(save_details=False).update(([pred], [label]))


def test_regions_have_a_value_each_if_the_metric_is_told_so() -> None:
    pred = regions()
    pred[1] = 0
    engine = evaluate([([pred], [regions()])], extra=Extra(include_background=True))
    assert measured == [(6, 6), (0, 2)]
    assert engine.state.metric_details["extra"].tolist() == [[0.0, -2.0]]
    for kind in (HausdorffDistance95, AverageSurfaceDistance, SurfaceDice, WrongComponents, WrongVolume):
        engine = evaluate([([regions()], [regions()])], value=kind(include_background=True))
        assert engine.state.metric_details["value"].tolist() == [[float(kind is SurfaceDice)] * 2]


def test_metrics_with_and_without_background_do_not_share() -> None:
    case = [one_hot(3)], [one_hot(1)]
    engine = evaluate([case], classes=Extra(), regions=Extra(include_background=True))
    assert engine.state.metric_details["classes"].tolist() == [[2.0]]
    assert engine.state.metric_details["regions"].tolist() == [[-2.0, 2.0]]


KINDS = [
    HausdorffDistance95, AverageSurfaceDistance, SurfaceDice, WrongComponents, WrongVolume,
    FalsePositiveLesions, LesionSensitivity, RelativeVolumeDifference,
]
SHARES = {SurfaceDice, LesionSensitivity}                          # of which 1 is perfect, and 0 of the others


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(9, 12), (5, 7, 8)])
def test_what_is_predicted_at_ignored_voxels_does_not_count(kind: type[CaseMetric], size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    classes = [torch.randint(0, 3, size, generator=generator) for _ in range(3)]
    pred, label, other = (torch.stack([(one == index).float() for index in range(3)]) for one in classes)
    label[..., -3:] = -1
    changed = pred.clone()
    changed[..., -3:] = other[..., -3:]
    assert compute(kind(), (pred, label)) == compute(kind(), (changed, label)) != 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_of_the_part_that_is_known_is_perfect(kind: type[CaseMetric]) -> None:
    whole = torch.zeros(8, 8)
    whole[2:6, 2:] = 1
    label = torch.stack([1 - whole, whole])
    pred = label.clone()
    label[..., 5:] = -1
    pred[..., 5:] = pred[..., 5:].flip(0)                           # wrong where nobody knows
    assert compute(kind(), (pred, label)) == float(kind in SHARES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_without_two_voxels_that_count_has_no_value(kind: type[CaseMetric]) -> None:
    one = one_hot(1, size=(1, 1))
    assert math.isnan(compute(kind(), (one, one)))
    label = one_hot(3)
    label[:, 1:] = label[:, :, 1:] = -1
    assert math.isnan(compute(kind(), (one_hot(3), label)))
    assert math.isnan(compute(kind(), (one_hot(3), torch.full_like(label, -1))))


def test_a_case_without_a_value_leaves_the_mean_of_the_others() -> None:
    nothing = torch.full((2, 4, 4), -1.0)
    assert compute(Extra(), (one_hot(3), one_hot(1)), (one_hot(3), nothing)) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_without_a_label_has_no_value_and_counts_nothing_in_the_mean(kind: type[CaseMetric]) -> None:
    unlabeled = torch.full_like(one_hot(3), UNLABELED)
    unlabeled[:, :2] = torch.tensor([1, 0]).reshape(2, 1, 1)       # padded by a transform
    known = one_hot(5), one_hot(4)
    assert compute(kind(), known, (one_hot(3), unlabeled)) == compute(kind(), known)
    for label in (unlabeled, torch.full_like(unlabeled, UNLABELED)):
        assert math.isnan(compute(kind(), (one_hot(3), label)))
