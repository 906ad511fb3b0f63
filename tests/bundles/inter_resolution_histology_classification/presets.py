# SPDX-License-Identifier: Apache-2.0
"""The published experiment in small; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bundle_runs
from bundle_runs import parsed, scalars, weights

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from scripts import networks

BUNDLE = Path(os.environ["MEDKD_BUNDLE"])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]
SMALL: dict[str, Any] = {"patch_size": [64, 64], "out_channels": 3, "epochs": 1, "teacher_check#mode": "warn"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_runs.write_small_phantoms(BUNDLE, tmp_path_factory.mktemp("data"), training=2, validation=1, test=1)


@pytest.fixture(scope="module")
def narrow() -> Any:
    """VGG16 with a sixteenth of its channels, in this process."""
    before = networks._VGG16
    networks._VGG16 = tuple((channels // 16, count) for channels, count in before)
    yield
    networks._VGG16 = before


def test_the_published_pair_trains_evaluates_and_infers(
    run: Run, bundle: Path, data: Path, tmp_path: Path, narrow: Any
) -> None:
    backbone = networks.VGG16(2)
    torch.save(backbone.state_dict(), tmp_path / "vgg16.pth")
    options = {"dataset_dir": str(data), "backbone_path": str(tmp_path / "vgg16.pth"), **SMALL}
    options |= {"student_channels": 32, "teacher_channels": 32}
    teacher = {"teacher_path": str(tmp_path / "teacher/model.pt"), **options}
    run("training", "train", "paper", "teacher", into=tmp_path / "teacher", **teacher)
    folder = run("training", "train", "paper", into=tmp_path / "student", **teacher)
    told = json.loads((folder / "model.json").read_text())
    assert told["mode"] == "distilled"
    assert told["labels"] == json.loads((data / "datalist.json").read_text())["labels"]
    assert told["validation"].keys() <= {"val_quadratic_kappa"}
    terms = scalars(folder)
    assert all(np.isfinite(terms[f"kd/{name}"]).all() for name in ("attention", "feature"))
    assert weights(folder).keys() == backbone.state_dict().keys()
    moved = (weights(folder)["features.0.weight"] - backbone.features[0].weight).abs().max()
    assert 0 < float(moved) < 0.01                                     # it started from the file
    run("evaluating", "train", "paper", "evaluate", into=folder, **options)
    table = (folder / "eval/confusion_matrix.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["label \\ prediction", *told["labels"].values()]
    assert sum(int(value) for line in table[1:] for value in line.split(",")[1:]) == 3
    weighed = {"ckpt_path": str(folder / "model.pt"), "dataset_dir": str(data), "out_channels": 3}
    out = run("evaluating", "inference", "inference_paper", into=tmp_path / "out", **weighed)
    assert len((out / "eval/predictions.csv").read_text().splitlines()) == 1 + 3


def test_the_student_of_the_paper_sees_a_picture_of_full_size_without_its_detail(data: Path) -> None:
    parser = parsed(BUNDLE, "train", "paper")
    parser.update({"patch_size": [64, 64]})
    case = {"image": json.loads((data / "datalist.json").read_text())["training"][0]["image"]}
    case["image"] = str(data / case["image"])
    for name in ("deterministic", "random"):
        for step in parser.get_parsed_content(f"train#{name}_transforms"):
            case = step(case)
    student, teacher = (case[key].as_subclass(torch.Tensor) for key in ("image", "teacher_image"))
    assert student.shape == teacher.shape == (3, 64, 64)
    assert float(student.std()) < float(teacher.std())
    low = torch.nn.functional.avg_pool2d(teacher[None], 4)
    wanted = torch.nn.functional.interpolate(low, (64, 64), mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(student, wanted)
