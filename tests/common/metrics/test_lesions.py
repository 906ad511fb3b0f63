# SPDX-License-Identifier: Apache-2.0
"""Lesions that were found and invented, and the relative difference of volumes."""

from __future__ import annotations

import itertools
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
from monai.transforms.post.dictionary import AsDiscreted
from torch import Tensor, nn

from medkd.handlers.records import case_meta
from medkd.metrics.base import CaseMetric
from medkd.metrics.connectivity import WrongComponents, connected_components
from medkd.metrics.lesions import (
    FalsePositiveLesions,
    LesionSensitivity,
    RelativeVolumeDifference,
    predicted_shares,
)

SPACING = (2.0, 0.5, 3.0)                                          # 3 mm^3 a voxel; 1 mm^2 in 2-D


def one_hot(label: Tensor, classes: int = 2, spacing: tuple[float, ...] = SPACING) -> MetaTensor:
    """Class indices (*S) -> (K, *S) with the affine of the spacing; ignored voxels are negative in all channels."""
    maps = torch.stack([torch.where(label < 0, label, (label == index).long()).float() for index in range(classes)])
    return MetaTensor(maps, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))


def line(text: str, axes: int = 3) -> Tensor:
    """Classes of the voxels along the last axis, such as `11.2`: . is background, ? is ignored."""
    row = torch.tensor([{".": 0, "?": -1}[letter] if letter in ".?" else int(letter) for letter in text])
    label = torch.zeros((5,) * (axes - 1) + (len(text),), dtype=torch.long)
    label[(2,) * (axes - 1)] = row
    return label


def value_of(metric: CaseMetric, *cases: tuple[Tensor, Tensor], classes: int = 2) -> float:
    metric.attach(Engine(lambda _engine, _batch: None), "value")
    metric.update(tuple([one_hot(side, classes) for side in sides] for sides in zip(*cases, strict=True)))
    return float(metric.compute())


def pieces(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Written down from the definition: visit all neighbors of a voxel, then theirs."""
    left = {tuple(voxel) for voxel in np.argwhere(mask)}
    steps = list(itertools.product((-1, 0, 1), repeat=mask.ndim))
    found = []
    while left:
        piece, waiting = set(), [left.pop()]
        while waiting:
            piece.add(voxel := waiting.pop())
            near = {tuple(np.add(voxel, step)) for step in steps} & left
            left -= near
            waiting += near
        found.append(piece)
    return found


@pytest.mark.parametrize("size", [(13, 16), (7, 8, 9)])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("min_overlap", [0.0, 0.1, 0.5, 1.0])
def test_values_agree_with_looking_at_each_lesion(size: tuple[int, ...], seed: int, min_overlap: float) -> None:
    random = np.random.default_rng(seed)
    pred, label = (random.random(size) < share for share in (0.15, 0.06))
    lesions = pieces(label)
    shares = [sum(pred[voxel] for voxel in lesion) / len(lesion) for lesion in lesions]
    found = np.mean([share > 0 and share >= min_overlap for share in shares])
    invented = sum(not any(label[voxel] for voxel in piece) for piece in pieces(pred))

    assert len(lesions) > 5
    assert 0 < found < 1 or min_overlap == 1.0
    assert sorted(predicted_shares(pred, label)) == pytest.approx(sorted(shares))
    case = torch.from_numpy(pred).long(), torch.from_numpy(label).long()
    assert value_of(LesionSensitivity(min_overlap), case) == pytest.approx(found)
    assert value_of(FalsePositiveLesions(), case) == value_of(WrongComponents(), case) == invented


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        ("11..11..11", "11..11..11", (1.0, 0.0, 0.0)),
        ("11......1.", "1.1..1....", (1 / 3, 1.0, 0.0)),
        ("..........", "11..11..11", (0.0, 0.0, 1.0)),
        ("1..11.....", "..........", (math.nan, 2.0, math.nan)),
        ("..........", "..........", (math.nan, 0.0, math.nan)),
        ("1111111111", "1....1...1", (1.0, 0.0, 7 / 3)),           # everything finds everything; the volume tells
        ("1111......", "...11.....", (1.0, 0.0, 1.0)),
    ],
    ids=["perfect", "one of three", "silent", "invented", "absent", "everything", "shifted"],
)
def test_known_answers_in_two_and_three_dimensions(
    pred: str, label: str, expected: tuple[float, float, float], axes: int
) -> None:
    for metric, value in zip(
        (LesionSensitivity(), FalsePositiveLesions(), RelativeVolumeDifference()), expected, strict=True
    ):
        assert value_of(metric, (line(pred, axes), line(label, axes))) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("voxels", "min_overlap", "found"),
    [
        (1, 0.1, 0.0), (2, 0.1, 1.0), (1, 0.05, 1.0), (6, 0.3, 1.0), (5, 0.3, 0.0), (1, 0.0, 1.0), (0, 0.0, 0.0),
        (19, 1.0, 0.0),
    ],
)
def test_a_lesion_of_twenty_voxels_is_found_by_as_many_as_are_asked_for(
    voxels: int, min_overlap: float, found: float
) -> None:
    label, pred = line("1" * 20), line("1" * voxels + "." * (20 - voxels))
    assert value_of(LesionSensitivity(min_overlap), (pred, label)) == found


def test_one_voxel_finds_a_lesion_of_ten_and_several_pieces_add_up() -> None:
    assert value_of(LesionSensitivity(), (line("1" + "." * 9), line("1" * 10))) == 1.0
    assert value_of(LesionSensitivity(0.4), (line("11.....1.1"), line("1" * 10))) == 1.0


def test_the_mean_is_over_cases_and_leaves_out_those_without_a_lesion() -> None:
    cases = [
        (line("11........"), line("1.1.1.1.1.")),                  # one of five
        (line("1........."), line("1.........")),                  # one of one
        (line(".1.1.1...."), line("..........")),                  # three invented
    ]
    assert value_of(LesionSensitivity(), *cases) == pytest.approx((0.2 + 1.0) / 2)
    assert value_of(FalsePositiveLesions(), *cases) == 1.0
    assert value_of(RelativeVolumeDifference(), *cases) == pytest.approx((0.6 + 0.0) / 2)


def test_classes_are_apart_and_the_background_does_not_count() -> None:
    label, pred = line("11..2..1."), line("22..2..1.")             # class 1: one of two found; class 2: one invented
    assert value_of(LesionSensitivity(), (pred, label), classes=3) == pytest.approx((0.5 + 1.0) / 2)
    assert value_of(FalsePositiveLesions(), (pred, label), classes=3) == pytest.approx((0.0 + 1.0) / 2)
    assert value_of(RelativeVolumeDifference(), (pred, label), classes=3) == pytest.approx((2 / 3 + 2.0) / 2)


def test_regions_that_overlap_have_a_value_each() -> None:
    whole, core = (line(text) for text in ("1111.11", ".11...."))
    label = torch.stack([whole, core]).float()
    pred = torch.stack([line("1111..."), line("1......")]).float()
    for kind, expected in ((LesionSensitivity, [0.5, 0.0]), (FalsePositiveLesions, [0.0, 1.0])):
        engine = Engine(lambda _engine, batch: batch)
        kind(include_background=True).attach(engine, "value")
        engine.run([([pred], [label])])
        assert engine.state.metric_details["value"].tolist() == [expected]


@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        ("1..1.", "???1.", (1.0, 0.0, 0.0)),                       # predicted where nobody knows
        ("..11.", "??.1.", (1.0, 0.0, 1.0)),
        (".11..", "1?...", (0.0, 0.0, 0.0)),                       # may belong to something ignored: not invented
        ("....1", "1?1..", (0.0, 1.0, 0.5)),                       # parted by what is ignored: two lesions
    ],
)
def test_ignored_voxels_count_nowhere(pred: str, label: str, expected: tuple[float, float, float]) -> None:
    for metric, value in zip(
        (LesionSensitivity(), FalsePositiveLesions(), RelativeVolumeDifference()), expected, strict=True
    ):
        assert value_of(metric, (line(pred), line(label))) == pytest.approx(value)


@pytest.mark.parametrize(("min_volume", "expected"), [(0.0, 3.0), (3.0, 3.0), (3.1, 2.0), (6.0, 2.0), (9.1, 0.0)])
def test_pieces_below_the_smallest_volume_are_no_lesions(min_volume: float, expected: float) -> None:
    pred = line("1..11..111")                                      # 3, 6 and 9 mm^3
    assert value_of(FalsePositiveLesions(min_volume), (pred, line("." * 10))) == expected


def test_the_smallest_volume_is_an_area_in_2d_and_counts_though_affines_are_rounded() -> None:
    pred, label = line("1..11", axes=2), line(".....", axes=2)
    assert value_of(FalsePositiveLesions(2.0), (pred, label)) == 1.0
    step = 0.7                                                     # a little less as float32
    sides = [one_hot(side, spacing=(step, step, 1.0)) for side in (pred, label)]
    for maps in sides:
        maps.affine = maps.affine.float()                          # as a NIfTI file keeps it
    metric = FalsePositiveLesions(2 * step**2, save_details=False)
    metric.update(([sides[0]], [sides[1]]))
    assert metric.compute() == 1.0


def test_signed_differences_of_volumes_cancel_out_and_their_amounts_do_not() -> None:
    cases = [(line("111..."), line("11....")), (line("1....."), line("11...."))]
    assert value_of(RelativeVolumeDifference(), *cases) == pytest.approx(0.5)
    assert value_of(RelativeVolumeDifference(signed=True), *cases) == pytest.approx(0.0)
    assert value_of(RelativeVolumeDifference(signed=True), cases[1]) == pytest.approx(-0.5)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_an_overlap_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="`min_overlap` must be a share of a lesion, 0 to 1, got .*; 0 is any voxel"):
        LesionSensitivity(share)


@pytest.mark.parametrize("volume", [-1.0, math.inf, math.nan])
def test_a_volume_that_is_none_is_refused(volume: float) -> None:
    message = r"`min_volume` must be 0 mm\^3 or more and finite, got .*; 0 counts all pieces"
    with pytest.raises(ValueError, match=message):
        FalsePositiveLesions(volume)


@pytest.mark.parametrize("size", [(6, 7), (5, 6, 7)])
def test_components_are_numbered_in_the_box_of_the_mask(size: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).random(size) < 0.2
    numbers, box = connected_components(mask)
    assert ((numbers > 0) == mask[box]).all()
    assert mask[box].sum() == mask.sum()
    assert numbers.max() == len(pieces(mask))
    assert connected_components(mask & False)[0].size == 0


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")    # MONAI's saver, of a case without a value
def test_an_evaluator_gives_the_values_of_each_case_and_measures_components_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = WrongComponents.measure

    def counting(*arguments: object) -> object:
        calls.append(1)
        return measure(*arguments)

    for kind in (WrongComponents, FalsePositiveLesions):
        monkeypatch.setattr(kind, "measure", staticmethod(counting))

    class Same(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.cat((1.0 - image, image), dim=1)

    data = []
    for index, (pred, label) in enumerate([("11..1..", "1.1...."), ("1......", ".......")]):
        image = one_hot(line(pred))[1:]
        image.meta["filename_or_obj"] = f"{index}.nii"
        data.append({"image": image, "label": one_hot(line(label))[1:]})
    output = from_engine(["pred", "label"])
    evaluator = SupervisedEvaluator(
        "cpu", DataLoader(Dataset(data), batch_size=1), Same(),
        postprocessing=AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2),
        key_val_metric={
            "sensitivity": LesionSensitivity(output_transform=output),
            "false_positives": FalsePositiveLesions(output_transform=output),
            "pieces": WrongComponents(output), "rvd": RelativeVolumeDifference(output_transform=output),
        },
        val_handlers=[MetricsSaver(str(tmp_path), metric_details="*", batch_transform=case_meta)],
    )
    evaluator.run()
    assert evaluator.state.metrics == {"sensitivity": 0.5, "false_positives": 1.0, "pieces": 1.0, "rvd": 0.5}
    assert len(calls) == len(data)
    assert (tmp_path / "sensitivity_raw.csv").read_text().splitlines()[1:] == ["0.nii,0.5,0.5", "1.nii,nan,nan"]
