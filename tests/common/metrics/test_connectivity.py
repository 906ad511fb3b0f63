# SPDX-License-Identifier: Apache-2.0
"""Pieces of a prediction where the label has nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

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
from monai.transforms.post.dictionary import AsDiscreted
from torch import Tensor, nn

from medkd.handlers.records import case_meta
from medkd.metrics.base import CaseMetric
from medkd.metrics.connectivity import WrongComponents, WrongVolume, wrong_component_sizes

SPACING = (2.0, 0.5, 3.0)                                          # 0.003 ml a voxel; 0.01 cm^2 in 2-D


def one_hot(label: Tensor, classes: int = 2, spacing: tuple[float, ...] = SPACING) -> MetaTensor:
    """Class indices (*S) -> (K, *S) with the affine of the spacing."""
    maps = torch.stack([(label == index).float() for index in range(classes)])
    return MetaTensor(maps, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))


def points(*voxels: tuple[int, ...], size: tuple[int, ...] = (6, 6, 6)) -> Tensor:
    label = torch.zeros(size, dtype=torch.long)
    for voxel in voxels:
        label[voxel] = 1
    return label


def value_of(metric: CaseMetric, *cases: tuple[Tensor, Tensor]) -> float:
    metric.attach(Engine(lambda _engine, _batch: None), "value")
    metric.update(([pred for pred, _ in cases], [label for _, label in cases]))
    return float(metric.compute())


def count_and_size(*cases: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return value_of(WrongComponents(), *cases), value_of(WrongVolume(), *cases)


def by_flooding(pred: np.ndarray, label: np.ndarray) -> list[int]:
    """Written down from the definition: visit all neighbors of a voxel, then theirs, and look whether any is right."""
    left = {tuple(voxel) for voxel in np.argwhere(pred)}
    steps = list(itertools.product((-1, 0, 1), repeat=pred.ndim))
    wrong = []
    while left:
        piece, waiting = [], [left.pop()]
        while waiting:
            piece.append(waiting.pop())
            near = {tuple(np.add(piece[-1], step)) for step in steps} & left
            left -= near
            waiting += near
        if not any(label[voxel] for voxel in piece):
            wrong.append(len(piece))
    return wrong


@pytest.mark.parametrize("size", [(9, 12), (5, 7, 6)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_agrees_with_flooding_from_voxel_to_voxel(size: tuple[int, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    pred, label = random.random(size) < 0.1, random.random(size) < 0.05
    sizes = wrong_component_sizes(pred, label).tolist()
    assert sorted(sizes) == sorted(by_flooding(pred, label))
    assert sizes


def test_pieces_that_share_a_voxel_with_the_label_are_right() -> None:
    pred = points((0, 0, 0), (0, 0, 1), (3, 3, 3), (5, 5, 5), (5, 5, 4))
    label = points((0, 0, 1), (0, 1, 2), (3, 3, 4))                # the second one is next to (3, 3, 3), which is wrong
    assert count_and_size((one_hot(pred), one_hot(label))) == pytest.approx((2.0, 3 * 0.003))


@pytest.mark.parametrize("other", [(1, 1, 1), (0, 1, 1), (0, 0, 1)], ids=["corner", "edge", "face"])
def test_voxels_that_meet_are_one_piece(other: tuple[int, ...]) -> None:
    pred = points((0, 0, 0), other)
    assert count_and_size((one_hot(pred), one_hot(points()))) == pytest.approx((1.0, 2 * 0.003))
    assert value_of(WrongComponents(), (one_hot(pred), one_hot(points(other)))) == 0.0


def test_pixels_that_meet_in_a_corner_are_one_piece_and_sizes_are_areas_in_2d() -> None:
    pred, label = points((0, 0), (1, 1), (4, 4), size=(6, 6)), points((4, 4), size=(6, 6))
    assert count_and_size((one_hot(pred), one_hot(label))) == pytest.approx((1.0, 2 * 0.01))


@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        (points(), points((1, 1, 1)), (0.0, 0.0)),
        (points((1, 1, 1), (4, 4, 4)), points(), (2.0, 0.006)),
        (points(), points(), (0.0, 0.0)),
        (points((1, 1, 1)), points((1, 1, 1)), (0.0, 0.0)),
    ],
    ids=["missed", "invented", "absent", "perfect"],
)
def test_every_case_has_a_value(pred: Tensor, label: Tensor, expected: tuple[float, float]) -> None:
    assert count_and_size((one_hot(pred), one_hot(label))) == pytest.approx(expected)


def test_each_case_has_its_own_spacing_and_a_label_without_one_has_voxels_of_one_millimeter() -> None:
    pred, label = points((1, 1, 1), (1, 1, 2)), points()
    spacings = (SPACING, (1.0, 1.0, 4.0))
    cases = [(one_hot(pred, spacing=spacing), one_hot(label, spacing=spacing)) for spacing in spacings]
    plain = one_hot(pred).as_tensor(), one_hot(label).as_tensor()
    assert value_of(WrongVolume(), *cases, plain) == pytest.approx(2 * (0.003 + 0.004 + 0.001) / 3)


def test_classes_are_apart_and_the_background_does_not_count() -> None:
    label, pred = points((0, 0, 0), (0, 0, 1)), points((0, 0, 0))
    pred[0, 0, 1] = pred[5, 5, 5] = pred[3, 3, 3] = 2              # on class 1 of the label, and far from all
    pred[2] = 0
    assert count_and_size((one_hot(pred, classes=4), one_hot(label, classes=4))) == pytest.approx((1.0, 0.003))


def test_an_evaluator_of_2d_images_gives_the_values_of_each_case(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.cat((1.0 - image, image), dim=1)

    data = []
    for index, spacing in enumerate([(2.0, 0.5), (5.0, 1.0)]):
        image = one_hot(points((0, 0), (3, 3), (3, 4), size=(6, 7)), spacing=(*spacing, 1.0))[1:]
        image.meta["filename_or_obj"] = f"{index}.png"
        label = image.clone()
        label[0, 3] = 0
        data.append({"image": image, "label": label})
    output = from_engine(["pred", "label"])
    evaluator = SupervisedEvaluator(
        "cpu", DataLoader(Dataset(data), batch_size=2), Same(),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2),
        key_val_metric={"components": WrongComponents(output), "area": WrongVolume(output)},
        val_handlers=[MetricsSaver(str(tmp_path), metric_details="*", batch_transform=case_meta)],
    )
    evaluator.run()
    assert evaluator.state.metrics == {"components": 1.0, "area": pytest.approx((0.02 + 0.1) / 2)}
    assert (tmp_path / "components_raw.csv").read_text().splitlines()[1:] == ["0.png,1.0,1.0", "1.png,1.0,1.0"]
    areas = [float(line.split(",")[1]) for line in (tmp_path / "area_raw.csv").read_text().splitlines()[1:]]
    assert areas == pytest.approx([0.02, 0.1])
