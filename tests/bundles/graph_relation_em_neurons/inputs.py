# SPDX-License-Identifier: Apache-2.0
"""Unusual volumes: a clear error before the first step, or a defined result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from bundle_runs import refused
from medkd.phantoms.em import em_phantom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE = (20, 40, 36)
Case = tuple[np.ndarray, np.ndarray]


def save(folder: Path, name: str, case: Case, turn: tuple[int, ...] | None = None) -> dict[str, str]:
    """Write image and label; `turn` permutes the axes of the label only."""
    label = case[1] if turn is None else case[1].transpose(turn)
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(case[0], affine), folder / f"{name}_image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label, affine), folder / f"{name}_label.nii.gz")
    return {"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz"}


def phantom(seed: int) -> Case:
    case = em_phantom(seed, shape=SHAPE, spacing=(10.0, 10.0, 10.0))
    return case.image, case.label.astype(np.int32)


def listing(folder: Path, training: list[dict[str, str]], validation: list[dict[str, str]]) -> Path:
    folder.joinpath("datalist.json").write_text(
        json.dumps({"training": training, "validation": validation, "test": validation, "labels": {}})
    )
    return folder


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases with background only, one instance, large ids and a missing section."""
    folder = tmp_path_factory.mktemp("unusual")
    cases = {name: phantom(seed) for seed, name in enumerate(("background", "one", "large", "missing", "validation"))}
    cases["background"][1][:] = 0
    cases["one"][1][:] = 1
    large = cases["large"][1]
    large[large > 0] += 2**24 + 70_000                              # floats no longer tell neighbors apart
    cases["missing"][0][6] = 0
    saved = {name: save(folder, name, case) for name, case in cases.items()}
    return listing(folder, [saved[name] for name in ("background", "one", "large", "missing")], [saved["validation"]])


def test_background_one_instance_large_ids_and_missing_sections_are_trained_with(
    run_bundle: Callable[..., None], bundle: Path, unusual: Path
) -> None:
    options: dict[str, Any] = {"dataset_dir": str(unusual), "epochs": 1, "train#trainer#epoch_length": 4}
    run_bundle("training", "train", "smoke", "teacher", **options, ckpt_dir=str(bundle / "models/teacher"))
    run_bundle("training", "train", "smoke", **options, ckpt_dir=str(bundle / "runs/unusual"))
    weights = torch.load(bundle / "runs/unusual/model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in weights.values())
    run_bundle(
        "evaluating", "train", "smoke", "evaluate", dataset_dir=str(unusual), num_workers=0,
        ckpt_dir=str(bundle / "runs/unusual"), output_dir=str(bundle / "eval"),
    )
    assert np.isfinite(float((bundle / "eval/val_voi_raw.csv").read_text().splitlines()[1].split(",")[-1]))


@pytest.mark.parametrize("turn", [(1, 0, 2), (0, 2, 1)])
def test_labels_with_swapped_axes_are_refused(
    run_bundle: Callable[..., None], tmp_path: Path, turn: tuple[int, ...]
) -> None:
    good, bad = save(tmp_path, "good", phantom(0)), save(tmp_path, "bad", phantom(1), turn)
    folder = listing(tmp_path, [bad], [good])
    with refused(r"(?s)(?=.*shape)(?=.*bad_label)"):
        run_bundle("training", "train", "smoke", "teacher", dataset_dir=str(folder), ckpt_dir=str(tmp_path / "run"))


def test_labels_without_any_instance_are_refused(run_bundle: Callable[..., None], tmp_path: Path) -> None:
    image, label = phantom(0)
    empty = save(tmp_path, "empty", (image, np.zeros_like(label)))
    folder = listing(tmp_path, [empty], [save(tmp_path, "good", (image, label))])
    with refused("must mark something, got only 0"):
        run_bundle("training", "train", "smoke", "teacher", dataset_dir=str(folder), ckpt_dir=str(tmp_path / "run"))
