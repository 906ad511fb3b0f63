# SPDX-License-Identifier: Apache-2.0
"""Both resolutions in the bundle's own chain of transforms; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.transforms import Compose
from PIL import Image

import bundle_runs
from bundle_runs import parsed, refused, weights

BUNDLE = Path(os.environ["MEDKD_BUNDLE"])
sys.path.insert(0, str(BUNDLE))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]


def chain(parser: ConfigParser, *lists: str) -> Compose:
    steps = [step for name in lists for step in parser.get_parsed_content(f"train#{name}_transforms")]
    return Compose(steps).set_random_state(0)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_both_pictures_show_the_same_block_after_the_whole_random_chain(tmp_path: Path, scale: int) -> None:
    """One bright block of the size of a cell; item 7 of the property tests of the specification."""
    parser = parsed(BUNDLE, "train")
    parser.update({"scale": scale, "patch_size": [96, 96]})
    draws = np.random.default_rng(scale)
    fixed, random = chain(parser, "deterministic"), chain(parser, "random")
    found = 0
    for _ in range(100):
        pixels = np.full((130, 118, 3), 30, np.uint8)
        top, left = draws.integers(8, 96, 2)
        pixels[top : top + 2 * scale, left : left + 2 * scale] = 255
        Image.fromarray(pixels).save(tmp_path / "a.png")
        case = random(fixed({"image": str(tmp_path / "a.png"), "label": 1}))
        student, teacher = (case[key].as_subclass(torch.Tensor).sum(0) for key in ("image", "teacher_image"))
        assert tuple(length * scale for length in student.shape) == tuple(teacher.shape) == (96, 96)
        torch.testing.assert_close(student.mean(), teacher.mean(), rtol=1e-5, atol=1e-6)
        pooled = torch.nn.functional.avg_pool2d(teacher[None], scale)[0]
        torch.testing.assert_close(student, pooled)
        if teacher.max() - teacher.min() > 0.3:                        # the block lies in the crop
            found += 1
            assert int(student.argmax()) == int(pooled.argmax())
    assert found > 50


def test_the_affine_of_the_student_is_that_of_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((98, 98, 3), np.uint8)).save(tmp_path / "a.png")
    case = chain(parsed(BUNDLE, "train"), "deterministic")({"image": str(tmp_path / "a.png")})
    student, teacher = (case[key].affine.double() for key in ("image", "teacher_image"))
    torch.testing.assert_close(student[:2, :2], 4 * teacher[:2, :2])
    torch.testing.assert_close(student[:2, -1], teacher[:2, -1] + 1.5 * teacher[:2, :2].sum(1))


def test_the_rim_is_seen_by_nobody(tmp_path: Path) -> None:
    pixels = np.zeros((50, 42, 3), np.uint8)
    pixels[1:-1, 1:-1] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    parser = parsed(BUNDLE, "train")
    case = chain(parser, "deterministic")({"image": str(tmp_path / "a.png")})
    assert case["teacher_image"].shape == (3, 40, 48)
    assert float(case["image"].min()) == float(case["image"].max()) == pytest.approx(200 / 255)
    parser.update({"rim": 25})
    with pytest.raises(RuntimeError, match="applying transform") as error:
        chain(parser, "deterministic")({"image": str(tmp_path / "a.png")})
    assert "must be larger than its rim of 25 pixels on each side" in str(error.value.__cause__)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_runs.write_small_phantoms(BUNDLE, tmp_path_factory.mktemp("data"), training=2, validation=1, test=1)


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path, data: Path) -> Path:
    options = {"into": bundle / "models/teacher", "dataset_dir": str(data), "epochs": 1}
    return run("training", "train", "smoke", "teacher", **options) / "model.pt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 3}, "`image` must be divisible by the stride .*4.* of the layer|"
                       "must be divisible by `scale` 3x3 along its axes, got .64, 64."),
        ({"scale": 0}, "`scale` must be a whole number of 1 or more"),
        ({"patch_size": [60, 64]}, r"`image` must be divisible by the stride .*4.* of the layer.*, got \(15, 16\)"),
        ({"patch_size": [62, 64]}, r"must be divisible by `scale` 4x4 along its axes, got \(62, 64\)"),
        ({"pairing_check#scale": 2}, r"`teacher_image` must have \(2, 2\) times `image`"),
        ({"teacher_input": "image"}, "`teacher_key` must differ from `student_key`, got 'image' twice"),
        ({"distill_loss#0#head": "head.bias"}, "head"),
        ({"student_input": "small"}, "`mode` must be one of native, upsampled, got 'small'"),
    ],
)
def test_resolutions_that_do_not_fit_are_refused(
    run: Run, teacher: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with refused(message):
        run("training", "train", "smoke", into=tmp_path, dataset_dir=str(data), **options)


def test_a_batch_without_the_picture_of_the_teacher_is_refused(
    run: Run, teacher: Path, data: Path, tmp_path: Path
) -> None:
    lost = {"_target_": "DeleteItemsd", "keys": "teacher_image"}
    transforms = {"+train#random_transforms": [lost], "teacher_check#mode": "off"}
    with refused("`teacher_(input|image)` must be (a key of|in) the batch, got "):
        run("training", "train", "smoke", into=tmp_path, dataset_dir=str(data), **transforms)


@pytest.mark.parametrize("scale", [2, 8])
def test_students_of_other_resolutions_train_and_hold_nothing_of_the_distillation(
    run: Run, bundle: Path, teacher: Path, data: Path, tmp_path: Path, scale: int
) -> None:
    options = {"scale": scale, "epochs": 1, "distill_weights": {"attention": 1.0, "feature": 0.1, "regression": 0.1}}
    run("training", "train", "smoke", into=tmp_path, dataset_dir=str(data), **options)
    network = parsed(bundle, "train").get_parsed_content("network_def")
    assert weights(tmp_path).keys() == network.state_dict().keys()


def test_a_student_of_little_resolution_is_compared_on_the_grid_of_the_teacher() -> None:
    grids = {}
    for scale in (2, 4, 8):
        parser = parsed(BUNDLE, "train")
        parser.update({"scale": scale})
        grids[scale] = parser.get_parsed_content("grid")
    assert grids == {2: "student", 4: "student", 8: "teacher"}
