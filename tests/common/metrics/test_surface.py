# SPDX-License-Identifier: Apache-2.0
"""Surface distances in millimeters."""

from __future__ import annotations

import math
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
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from monai.transforms.post.dictionary import AsDiscreted
from scipy import ndimage
from torch import Tensor, nn

from medkd.handlers.records import case_meta
from medkd.metrics.base import CaseMetric
from medkd.metrics.surface import AverageSurfaceDistance, HausdorffDistance95, SurfaceDice, surface_distances

SPACING = (2.0, 0.5, 3.0)


def affine_of(spacing: tuple[float, ...], rotated: bool = True) -> Tensor:
    """An affine with these voxel sizes, rotated about the third axis and shifted."""
    turn = math.radians(30.0) if rotated else 0.0
    rotation = torch.eye(4, dtype=torch.float64)
    rotation[:2, :2] = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    scale = torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))], dtype=torch.float64))
    scale[:3, 3] = torch.tensor([10.0, -20.0, 5.0], dtype=torch.float64)
    return rotation @ scale


def one_hot(label: Tensor, classes: int = 2, spacing: tuple[float, ...] = SPACING) -> MetaTensor:
    """Class indices (*S) -> (K, *S) with the affine of the spacing."""
    maps = torch.stack([(label == index).float() for index in range(classes)])
    return MetaTensor(maps, affine=affine_of(spacing))


def value_of(*cases: tuple[Tensor, Tensor], metric: CaseMetric | None = None) -> float:
    metric = metric or HausdorffDistance95()
    metric.attach(Engine(lambda _engine, _batch: None), "value")
    metric.update(([pred for pred, _ in cases], [label for _, label in cases]))
    return float(metric.compute())


def points(*voxels: tuple[int, ...], size: tuple[int, ...] = (8, 8, 8)) -> Tensor:
    label = torch.zeros(size, dtype=torch.long)
    for voxel in voxels:
        label[voxel] = 1
    return label


def blobs(seed: int, size: tuple[int, ...] = (12, 14, 10)) -> Tensor:
    noise = np.random.default_rng(seed).normal(size=size)
    return torch.from_numpy((ndimage.gaussian_filter(noise, 2.0) > 0.03).astype(np.int64))


def by_scipy(pred: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]) -> list[np.ndarray]:
    """Written down from the definition: the distance of each edge voxel of one to the nearest of the other."""

    def edge(mask: np.ndarray) -> np.ndarray:
        return mask & ~ndimage.binary_erosion(mask)

    def directed(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return ndimage.distance_transform_edt(~edge(end), sampling=spacing)[edge(start)]

    return [directed(pred, label), directed(label, pred)]


@pytest.mark.parametrize(
    ("voxel", "expected"),
    [((5, 2, 2), 3 * 2.0), ((2, 6, 2), 4 * 0.5), ((2, 2, 3), 3.0), ((4, 5, 3), math.hypot(2 * 2.0, 3 * 0.5, 3.0))],
)
def test_the_distance_of_two_voxels_is_in_millimeters_along_each_axis(voxel: tuple[int, ...], expected: float) -> None:
    value = value_of((one_hot(points(voxel)), one_hot(points((2, 2, 2)))))
    assert value == pytest.approx(expected, rel=1e-6)


def test_each_case_has_its_own_spacing() -> None:
    pred, label = points((4, 2, 2)), points((2, 2, 2))
    cases = [(one_hot(pred, spacing=(step, 1.0, 1.0)), one_hot(label, spacing=(step, 1.0, 1.0))) for step in (1.0, 4.0)]
    assert value_of(*cases) == pytest.approx((2 * 1.0 + 2 * 4.0) / 2)


def test_the_spacing_of_two_axes_in_2d() -> None:
    pred, label = points((4, 2), size=(8, 8)), points((2, 3), size=(8, 8))
    spacing = (2.0, 0.5)
    value = value_of((one_hot(pred, spacing=spacing), one_hot(label, spacing=spacing)))
    assert value == pytest.approx(math.hypot(4.0, 0.5))


def test_a_label_without_metadata_has_voxels_of_one_millimeter() -> None:
    pred, label = (one_hot(points(voxel)).as_tensor() for voxel in ((5, 2, 2), (2, 2, 2)))
    assert value_of((pred, label)) == pytest.approx(3.0)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*:FutureWarning")
@pytest.mark.parametrize("size", [(12, 14, 10), (25, 31)])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_values_agree_with_the_definition_by_scipy_and_with_monai(seed: int, size: tuple[int, ...]) -> None:
    pred, label, spacing = blobs(seed, size), blobs(seed + 1, size), SPACING[: len(size)]
    case = one_hot(pred, spacing=spacing), one_hot(label, spacing=spacing)
    tensors = [maps.as_tensor().unsqueeze(0) for maps in case]
    distances = by_scipy(pred.numpy() > 0, label.numpy() > 0, spacing)
    for own, expected in zip(surface_distances(pred.numpy() > 0, label.numpy() > 0, spacing), distances, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-9)

    value = value_of(case)
    assert value == pytest.approx(max(np.percentile(one, 95) for one in distances), rel=1e-5)
    assert value == pytest.approx(float(compute_hausdorff_distance(*tensors, percentile=95, spacing=spacing)))

    both = np.concatenate(distances)
    value = value_of(case, metric=AverageSurfaceDistance())
    assert value == pytest.approx(both.mean(), rel=1e-5)
    assert value == pytest.approx(float(compute_average_surface_distance(*tensors, symmetric=True, spacing=spacing)))

    value = value_of(case, metric=SurfaceDice(tolerance=1.25))
    assert 0.1 < value < 0.9
    assert value == pytest.approx((both <= 1.25).mean(), rel=1e-5)
    assert value == pytest.approx(float(compute_surface_dice(*tensors, class_thresholds=[1.25], spacing=spacing)))


def test_the_average_is_over_the_voxels_of_both_surfaces() -> None:
    pred, label = points((2, 2, 2), (5, 2, 2)), points((2, 2, 2))
    value = value_of((one_hot(pred), one_hot(label)), metric=AverageSurfaceDistance())
    assert value == pytest.approx((0.0 + 3 * 2.0 + 0.0) / 3)


@pytest.mark.parametrize("tolerance", [2.9, 3.0, None])
def test_a_distance_up_to_the_tolerance_is_right(tolerance: float | None) -> None:
    """SPACING has a largest step of 3 mm, and 2 of the 3 surface voxels are at 0 mm."""
    pred, label = points((2, 2, 2), (2, 2, 3)), points((2, 2, 2))
    value = value_of((one_hot(pred), one_hot(label)), metric=SurfaceDice(tolerance))
    assert value == pytest.approx(2 / 3 if tolerance == 2.9 else 1.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [(1.1, 1.3, 1.7), SPACING, (0.9765625, 0.9765625, 5.0)])
def test_a_surface_shifted_by_one_voxel_is_right_though_affines_are_rounded(
    spacing: tuple[float, ...], axis: int
) -> None:
    label = torch.zeros(8, 9, 10, dtype=torch.long)
    label[2:5, 2:6, 2:7] = 1
    case = [one_hot(mask, spacing=spacing) for mask in (label.roll(1, axis), label)]
    for maps in case:
        maps.affine = maps.affine.float()                          # as a NIfTI file keeps it
    for tolerance in (None, max(spacing)):
        assert value_of((case[0], case[1]), metric=SurfaceDice(tolerance)) == 1.0
    twice = one_hot(label.roll(2, 2), spacing=spacing)             # two voxels along the axis of the largest step
    assert value_of((twice, case[1]), metric=SurfaceDice()) < 1.0


@pytest.mark.parametrize("tolerance", [-1.0, math.inf, math.nan])
def test_a_tolerance_that_is_no_distance_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="`tolerance` must be 0 mm or more and finite, got .*; None is one voxel"):
        SurfaceDice(tolerance)


@pytest.mark.parametrize(
    ("metric", "expected"), [(HausdorffDistance95, 0.0), (AverageSurfaceDistance, 0.0), (SurfaceDice, 1.0)]
)
def test_a_perfect_prediction_has_the_best_value(metric: type[CaseMetric], expected: float) -> None:
    assert value_of((one_hot(blobs(0)), one_hot(blobs(0))), metric=metric()) == expected


def test_with_a_tolerance_of_zero_only_what_is_the_same_is_right() -> None:
    pred, label = points((2, 2, 2), (2, 2, 3)), points((2, 2, 2))
    assert value_of((one_hot(pred), one_hot(label)), metric=SurfaceDice(0.0)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [HausdorffDistance95, AverageSurfaceDistance])
@pytest.mark.parametrize("size", [(8, 6, 4), (8, 6)])
def test_a_missed_organ_counts_with_the_diagonal_of_its_image(metric: type[CaseMetric], size: tuple[int, ...]) -> None:
    label, spacing = points((2,) * len(size), size=size), SPACING[: len(size)]
    diagonal = math.hypot(*(count * step for count, step in zip(size, spacing, strict=True)))
    case = one_hot(torch.zeros_like(label), spacing=spacing), one_hot(label, spacing=spacing)
    assert value_of(case, metric=metric()) == pytest.approx(diagonal, rel=1e-6)


def test_a_missed_organ_has_a_surface_dice_of_zero() -> None:
    assert value_of((one_hot(points()), one_hot(points((2, 2, 2)))), metric=SurfaceDice()) == 0.0


@pytest.mark.parametrize(
    ("metric", "expected"), [(HausdorffDistance95(), 6.0), (AverageSurfaceDistance(), 6.0), (SurfaceDice(6.0), 1.0)]
)
@pytest.mark.parametrize("pred", [points((1, 1, 1)), points()], ids=["invented", "silent"])
def test_an_organ_that_the_label_does_not_have_counts_nothing(
    pred: Tensor, metric: CaseMetric, expected: float
) -> None:
    metric.reset()
    seen = one_hot(points((5, 2, 2))), one_hot(points((2, 2, 2)))
    assert value_of(seen, (one_hot(pred), one_hot(points())), metric=metric) == pytest.approx(expected)


def test_classes_are_measured_apart_and_the_background_is_not() -> None:
    label, pred = points((2, 2, 2)), points((2, 2, 3))
    label[6, 6, 6] = pred[5, 6, 6] = 2
    label[0, 0, 0] = 3                                             # missed
    diagonal = math.hypot(16.0, 4.0, 24.0)
    value = value_of((one_hot(pred, classes=4), one_hot(label, classes=4)))
    assert value == pytest.approx((3.0 + 2.0 + diagonal) / 3, rel=1e-6)


def test_an_evaluator_gives_the_mean_and_the_values_of_each_case(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.cat((1.0 - image, image), dim=1).roll(1, dims=2)

    data = []
    for index, spacing in enumerate([(2.0, 1.0, 1.0), (5.0, 1.0, 1.0)]):
        meta = {"filename_or_obj": f"{index}.nii"}
        image = MetaTensor(points((2, 2, 2))[None].float(), affine=affine_of(spacing), meta=meta)
        data.append({"image": image, "label": image.clone()})
    evaluator = SupervisedEvaluator(
        "cpu", DataLoader(Dataset(data), batch_size=1), Shifted(),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2),
        key_val_metric={"val_hd95": HausdorffDistance95(output_transform=from_engine(["pred", "label"]))},
        val_handlers=[MetricsSaver(str(tmp_path), metric_details="*", batch_transform=case_meta)],
        metric_cmp_fn=lambda current, best: current < best,
    )
    for _ in range(2):                                             # a second validation starts at nothing
        evaluator.run()
        assert evaluator.state.metrics["val_hd95"] == pytest.approx(3.5)
        assert evaluator.state.metric_details["val_hd95"].flatten().tolist() == pytest.approx([2.0, 5.0])
    assert "1.nii" in (tmp_path / "val_hd95_raw.csv").read_text()
