# SPDX-License-Identifier: Apache-2.0
"""Images that a window makes constant are told."""

from __future__ import annotations

import re

import pytest
import torch
from monai.data import MetaTensor

from medkd.inference.window import TellWindowd

HU = torch.linspace(-1000, 1500, 1000).reshape(1, 10, 10, 10)


def told(values: torch.Tensor, caplog: pytest.LogCaptureFixture) -> str:
    image = MetaTensor(values, meta={"filename_or_obj": "a.nii.gz"})
    result = TellWindowd("image", [-200, 300])({"image": image})
    assert result["image"] is image
    return caplog.text


def test_an_image_in_the_scale_of_training_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    assert told(HU, caplog) == ""


@pytest.mark.parametrize(
    ("values", "range_"),
    [((HU + 1000) / 2500, "0 to 1"), (HU.clamp(-1000, -900), "-1000 to -900"), (HU * 0 + 7, "7 to 7"),
     (HU.abs() + 4000, r"4\d+ to 5500")],
    ids=["scaled", "air", "constant", "shifted"],
)
def test_an_image_that_the_window_makes_constant_is_told(
    caplog: pytest.LogCaptureFixture, values: torch.Tensor, range_: str
) -> None:
    text = told(values, caplog)
    assert "a.nii.gz is nearly constant within -200..300, where the network looks" in text
    assert re.search(f"its values are {range_}", text)
