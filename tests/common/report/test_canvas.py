# SPDX-License-Identifier: Apache-2.0
"""What is drawn over a slice stays in its place when a part of the slice is seen."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from medkd.compare.figures import CaseFigures, Slice
from medkd.compare.frames import frame_of
from medkd.report import canvas


def test_a_view_shows_its_rows_and_columns_alone_and_marks_stay_in_place() -> None:
    pixels, mask = np.zeros((40, 80)), np.zeros((40, 80), bool)
    pixels[10:20, 30:50] = 1.0
    mask[10:15, 30:40] = True

    axes = canvas.canvas(pixels, (2.0, 1.0), (0.5, 1.0), width=200, view=(slice(10, 20), slice(30, 50)))
    canvas.mark(axes, mask, "#ff0000", 1.0)
    seen = np.asarray(Image.open(io.BytesIO(canvas.png(axes))).convert("RGB")).astype(int)

    assert seen.shape == (200, 200, 3)                              # 20 x 20 mm
    assert (seen[10:90, 10:90] == [255, 0, 0]).all()
    assert (seen[110:190, 10:190] > 200).all()
    assert (seen[10:90, 110:190] > 200).all()


def test_a_border_lies_inside_of_the_picture_and_may_have_gaps() -> None:
    shares = []
    for dashed in (False, True):
        axes = canvas.canvas(np.zeros((50, 100)), (1.0, 1.0), (0.5, 1.0), width=200)
        canvas.border(axes, "#ff0000", dashed)
        seen = np.asarray(Image.open(io.BytesIO(canvas.png(axes))).convert("RGB"))
        is_red = seen[..., 0] > 200
        assert seen.shape == (100, 200, 3)
        assert not is_red[10:-10, 10:-10].any()
        shares.append(np.concatenate([is_red[1], is_red[-2], is_red[:, 1], is_red[:, -2]]).mean())
    assert shares[0] == 1.0
    assert 0.4 < shares[1] < 0.8


def test_a_case_is_seen_where_the_slices_that_are_shown_are_brighter_than_air(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.full((64, 64, 4), -1000.0)
    image[20:30, 40:60, 2] = 50.0
    image[:, :, 3] = 50.0                                            # a slice that is not shown
    case = SimpleNamespace(image=image, frame=frame_of(image.shape, np.eye(4), "mm"))
    figures = CaseFigures(cast(Any, None), cast(Any, case), window=(50.0, 500.0))
    monkeypatch.setitem(vars(figures), "slices", [Slice(1, ""), Slice(2, "")])

    assert figures.view == (slice(64 - 60 - 2, 64 - 40 + 2), slice(64 - 30 - 2, 64 - 20 + 2))   # a rim of 64 / 32
    monkeypatch.setitem(vars(figures), "slices", [Slice(0, "")])
    del vars(figures)["view"]
    assert figures.view is None                                     # of air alone all is shown
