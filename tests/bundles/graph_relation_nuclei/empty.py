# SPDX-License-Identifier: Apache-2.0
"""The committed student on pictures with nothing, with one nucleus, and on tiny ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Run = Callable[..., None]
Pixels = NDArray[np.uint16]
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(shape: tuple[int, int], level: float, deviation: float) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(level, deviation, shape)


def nucleus(shape: tuple[int, int]) -> NDArray[np.float64]:
    """One soft disk of 253 pixels, range [0, 1]."""
    row, column = np.mgrid[: shape[0], : shape[1]]
    disk: NDArray[np.float64] = 1.0 / (1.0 + np.exp(np.hypot(row - 100, column - 120) - 9.0))
    return disk


def infer(run_bundle: Run, folder: Path, picture: NDArray[np.float64], depth: int = 16) -> NDArray[np.int64]:
    """Instances of one picture of 8 or 16 bits by the bundle as it is."""
    pixels = np.rint(picture).clip(0, 2**depth - 1).astype(np.uint8 if depth == 8 else np.uint16)
    Image.fromarray(pixels).save(folder / "case.png")
    (folder / "datalist.json").write_text(json.dumps({"test": [{"image": "case.png"}]}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Divide by zero")
        run_bundle("evaluating", "inference", dataset_dir=str(folder), output_dir=str(folder / "eval"))
    found = np.asarray(Image.open(folder / "eval/case_seg.png")).astype(np.int64)
    assert found.shape == pixels.shape
    return found


@quiet
@pytest.mark.parametrize(("level", "deviation", "depth"), [(500, 20, 16), (100, 3, 8), (10, 0.4, 8), (30_000, 900, 16)])
def test_noise_of_a_camera_has_no_instance(
    run_bundle: Run, tmp_path: Path, level: float, deviation: float, depth: int
) -> None:
    assert not infer(run_bundle, tmp_path, noise((300, 400), level, deviation), depth).any()


@quiet
@pytest.mark.parametrize("value", [0, 1, 255])
def test_constant_picture_has_no_instance(run_bundle: Run, tmp_path: Path, value: float) -> None:
    assert not infer(run_bundle, tmp_path, np.full((90, 70), value, float), 8).any()


@quiet
@pytest.mark.parametrize(("deviation", "height", "depth"), [(20, 4000, 16), (20, 300, 16), (2, 100, 8), (0, 100, 8)])
def test_one_nucleus_is_one_instance(
    run_bundle: Run, tmp_path: Path, deviation: float, height: float, depth: int
) -> None:
    shape = (520, 696)
    level = 500 if depth == 16 else 10
    found = infer(run_bundle, tmp_path, noise(shape, level, deviation) + height * nucleus(shape), depth)
    assert found.max() == 1
    assert found[100, 120] == 1
    assert 150 < (found > 0).sum() < 450


@quiet
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (20, 25), (27, 60)])
def test_pictures_smaller_than_an_offset_have_a_result(
    run_bundle: Run, tmp_path: Path, shape: tuple[int, int]
) -> None:
    picture = noise(shape, 100, 2)
    picture[: shape[0] // 2, : shape[1] // 2] += 120
    infer(run_bundle, tmp_path, picture, 8)
