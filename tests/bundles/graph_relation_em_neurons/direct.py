# SPDX-License-Identifier: Apache-2.0
"""Networks that give affinities directly, from training to instances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from bundle_runs import parsed, run_direct

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_direct_affinities_train_distil_evaluate_and_infer(
    run_bundle: Callable[..., None], bundle: Path, tmp_path: Path
) -> None:
    data = run_direct(run_bundle, bundle, tmp_path, channels=8)
    assert np.isfinite(float((tmp_path / "eval/val_voi_raw.csv").read_text().splitlines()[1].split(",")[-1]))
    case = json.loads((data / "datalist.json").read_text())["test"][0]
    [found] = (tmp_path / "eval").glob("*_seg.nii.gz")
    assert nibabel.load(found).shape == nibabel.load(data / case["image"]).shape


def test_the_network_of_inference_gives_the_chances_of_the_one_of_training(bundle: Path) -> None:
    training, inference = parsed(bundle, "train", "direct"), parsed(bundle, "inference", "inference_direct")
    logits = training.get_parsed_content("network_def").eval()
    chances = inference.get_parsed_content("network_def").eval()
    chances.load_state_dict(logits.state_dict())
    image = torch.randn(1, 1, 4, 30, 31)
    with torch.no_grad():
        torch.testing.assert_close(chances(image), logits(image)[:, :3].sigmoid())
