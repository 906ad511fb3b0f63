# SPDX-License-Identifier: Apache-2.0
"""Preset `paper` at work: the teacher's head, then the student; run by `test_contract.py` in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import monai.bundle
import pytest
import torch

from bundle_runs import refused, write_small_phantoms

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def data(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_phantoms(bundle, tmp_path_factory.mktemp("data"), training=2, validation=1, test=1)


@pytest.fixture(scope="module")
def train(run_bundle: Callable[..., None], data: Path) -> Callable[..., None]:
    return partial(run_bundle, "training", "train", "smoke", dataset_dir=str(data))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def test_the_teachers_head_is_fitted_and_a_student_is_distilled_with_it(
    train: Callable[..., None], bundle: Path
) -> None:
    train("teacher")
    teacher = weights(bundle / "models/teacher/model.pt")
    with refused("fit it with the config file teacher_head.json"):
        train("heads", ckpt_dir=str(bundle / "runs/none"))
    train("heads", "teacher_head")
    head = weights(bundle / "models/teacher/boundary_head/model.pt")
    fitted_to = bytes(head.pop("teacher_sha256").tolist()).hex()
    assert fitted_to == sha256((bundle / "models/teacher/model.pt").read_bytes()).hexdigest()
    assert sum(value.numel() for value in head.values()) == 32 * (24 + 48 + 96 + 192) + 64 * 4 + 32 * 4 + 1
    fitted = json.loads((bundle / "models/teacher/boundary_head/model.json").read_text())
    assert 0 <= fitted["validation"]["val_border_auc"] <= 1
    train("heads", ckpt_dir=str(bundle / "runs/heads"))
    assert weights(bundle / "models/teacher/model.pt").keys() == teacher.keys()
    assert all(torch.equal(value, teacher[key]) for key, value in weights(bundle / "models/teacher/model.pt").items())
    student = weights(bundle / "runs/heads/model.pt")
    assert not any("head" in name for name in student)
    assert json.loads((bundle / "runs/heads/model.json").read_text())["mode"] == "distilled"


def test_the_published_sizes_are_exact(bundle: Path) -> None:
    parser = monai.bundle.ConfigParser()
    parser.read_config([str(bundle / "configs" / f"{name}.json") for name in ("train", "paper")])
    parser["out_channels"] = 14
    student, teacher = parser.get_parsed_content("network_def"), parser.get_parsed_content("teacher_def")()
    counts = [sum(p.numel() for p in network.parameters()) for network in (student, teacher)]
    assert counts == [4_137_630, 16_544_046]
    loss = parser.get_parsed_content("distill_loss")[0]
    assert sum(p.numel() for p in loss.parameters()) == 13_281
    taps = {path for pair in loss.tap_pairs for path in pair}
    for network in (student, teacher):
        assert taps <= {name for name, _ in network.named_modules()}
