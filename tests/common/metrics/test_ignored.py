# SPDX-License-Identifier: Apache-2.0
"""MONAI's metrics over the voxels that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.metrics.meandice import DiceMetric
from monai.transforms.post.dictionary import AsDiscreted
from torch import Tensor

from medkd.metrics.ignored import IgnoredAsBackgroundd
from medkd.ops.ignored import UNLABELED

ONE_HOT = AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=3)


def a_case() -> dict[str, Any]:
    return {"pred": torch.randn(3, 6, 7), "label": torch.randint(0, 3, (1, 6, 7))}


def dice(case: dict[str, Any]) -> Tensor:
    metric = DiceMetric(include_background=False)
    value: Tensor = metric([case["pred"]], [case["label"]])
    return value


@pytest.mark.parametrize("kind", [torch.as_tensor, MetaTensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dice_is_that_of_the_labeled_part(kind: Any, dtype: torch.dtype) -> None:
    case = a_case()
    case["pred"] = case["pred"].to(dtype)
    expected = dice(ONE_HOT({key: value[..., :4] for key, value in case.items()}))
    case["label"][..., 4:] = -1
    case = {key: kind(value) for key, value in case.items()}
    before = {key: value.clone() for key, value in case.items()}
    torch.testing.assert_close(dice(ONE_HOT(IgnoredAsBackgroundd()(case))), expected)
    assert all(torch.equal(before[key], value) for key, value in case.items())


def test_a_map_of_classes_and_one_of_regions_have_no_foreground_there() -> None:
    label = torch.tensor([[1, -1, 0]])
    classes = IgnoredAsBackgroundd(kind="classes")({"pred": torch.tensor([[2, 2, 2]]), "label": label})
    assert classes["pred"].tolist() == [[2, 0, 2]]
    assert classes["label"].tolist() == [[1, 0, 0]]
    regions = torch.tensor([[1, -1, 0], [0, 0, 0]])                # unknown in any region is unknown
    given = {"pred": torch.ones(2, 3), "label": regions}
    assert (IgnoredAsBackgroundd(kind="regions")(given)["pred"] > 0).tolist() == [[True, False, True]] * 2
    single = IgnoredAsBackgroundd()({"pred": torch.ones(1, 3), "label": label})
    assert (single["pred"] > 0).tolist() == [[True, False, True]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_without_ignored_voxels_or_label_the_tensors_stay_themselves(dtype: torch.dtype) -> None:
    case = a_case()
    case["label"] = case["label"].to(dtype)
    assert all(value is case[key] for key, value in IgnoredAsBackgroundd()(case).items())
    assert IgnoredAsBackgroundd()({"pred": case["pred"]})["pred"] is case["pred"]


def test_wrong_options_and_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`kind` must be one of \('logits', 'regions', 'classes'\), got 'softmax'"):
        IgnoredAsBackgroundd(kind="softmax")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`pred` must have the size of the label \(6, 7\) .* got \(6, 5\)"):
        IgnoredAsBackgroundd()({"pred": torch.zeros(3, 6, 5), "label": torch.full((1, 6, 7), -1)})


@pytest.mark.parametrize("kind", [torch.as_tensor, MetaTensor])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
def test_a_case_without_a_label_keeps_its_prediction_and_has_a_label_of_background(
    kind: Any, dtype: torch.dtype
) -> None:
    given = {"pred": a_case()["pred"], "label": kind(torch.full((1, 6, 7), UNLABELED, dtype=dtype))}
    for padded in (False, True):
        if padded:
            given["label"][..., :2] = -1
        result = IgnoredAsBackgroundd()(given)
        assert result["pred"] is given["pred"]
        assert not result["label"].any()
        assert result["label"].dtype == dtype
        assert isinstance(result["label"], type(given["label"]))
        assert given["label"].min() == UNLABELED
    ONE_HOT(result)
