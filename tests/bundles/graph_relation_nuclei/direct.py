# SPDX-License-Identifier: Apache-2.0
"""Networks that give affinities directly, from training to instances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bundle_runs import parsed, scalars, weights, write_small_phantoms

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_direct_affinities_train_distil_evaluate_and_infer(
    run_bundle: Callable[..., None], bundle: Path, tmp_path: Path
) -> None:
    data = write_small_phantoms(bundle, tmp_path / "data", training=2, validation=1, test=1)
    options: dict[str, Any] = {"dataset_dir": str(data), "teacher_check#mode": "warn"}
    run_bundle("training", "train", "direct", "smoke", "teacher", **options)
    assert weights(bundle / "models/teacher/direct")["embedding.weight"].shape[0] == 11
    student = {**options, "ckpt_dir": str(tmp_path / "student"), "output_dir": str(tmp_path / "eval")}
    run_bundle("training", "train", "direct", "smoke", **student)
    terms = scalars(tmp_path / "student")
    assert all(0 < value < 10 for value in terms["kd/affinity"])
    run_bundle("evaluating", "train", "direct", "smoke", "evaluate", **student)
    assert (tmp_path / "eval/val_pq_raw.csv").is_file()

    run_bundle(
        "evaluating", "inference", "inference_direct", dataset_dir=str(data),
        ckpt_path=str(tmp_path / "student/model.pt"), output_dir=str(tmp_path / "eval"),
    )
    case = json.loads((data / "datalist.json").read_text())["test"][0]
    [found] = (tmp_path / "eval").glob("*_seg.png")
    assert Image.open(found).size == Image.open(data / case["image"]).size


def test_the_network_of_inference_gives_the_chances_of_the_one_of_training(bundle: Path) -> None:
    training, inference = parsed(bundle, "train", "direct"), parsed(bundle, "inference", "inference_direct")
    logits = training.get_parsed_content("network_def").eval()
    chances = inference.get_parsed_content("network_def").eval()
    chances.load_state_dict(logits.state_dict())
    image = torch.randn(1, 3, 30, 31)
    with torch.no_grad():
        torch.testing.assert_close(chances(image), logits(image).sigmoid())
