# SPDX-License-Identifier: Apache-2.0
"""Run a bundle in this process as `python -m monai.bundle run` does, and read what the run leaves."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.utils import set_determinism
from PIL import Image

from medkd.phantoms.kinds import kind_of


def run(bundle: Path, run_id: str, *configs: str, **options: Any) -> None:
    """Run an id with config files by name and further options; datasets are filled without threads."""
    files = [str(bundle / "configs" / f"{name}.json") for name in configs]
    if configs[0] == "train":
        threads = ("train#dataset#num_workers", "train#unlabeled#num_workers", "validate#dataset#num_workers")
        options = dict.fromkeys(threads, 0) | options
    try:
        monai.bundle.run(run_id, config_file=files, bundle_root=str(bundle), **options)
    finally:
        set_determinism(None)


def parsed(bundle: Path, *names: str) -> ConfigParser:
    """Config files by name, later ones over the first, as a run reads them."""
    parser = ConfigParser()
    parser.read_config([str(bundle / f"configs/{name}.json") for name in names])
    return parser


def run_tests(bundle: Path, words: Sequence[str], log: Path) -> None:
    """Be the process in which pytest tests one bundle; all that is written goes to `log`."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"MEDKD_BUNDLE": str(bundle), "OMP_NUM_THREADS": "1"}
    os.chdir(log.parent)
    sys.exit(pytest.main(list(words)))


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a run to end with an error; `message` matches its first cause, under MONAI's wrappers."""
    with pytest.raises(Exception) as error:   # noqa: PT011
        yield
    cause: BaseException = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert re.search(message, str(cause)), cause


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The student that a run has saved."""
    content: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return content


def scalars(folder: Path) -> dict[str, list[float]]:
    """What a run has written for TensorBoard: tag -> values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels or voxels, and the affine; a picture has none."""
    if file.suffix == ".png":
        return np.asarray(Image.open(file)), None
    image = nibabel.load(file)
    return np.asarray(image.dataobj), image.affine


def write(file: Path, pixels: np.ndarray, affine: np.ndarray | None) -> None:
    """The reverse of `read`."""
    if affine is None:
        Image.fromarray(pixels).save(file)
    else:
        nibabel.save(nibabel.Nifti1Image(pixels, affine), file)


def without_distillation(handlers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The handlers of plain training."""
    own = ("medkd.handlers.distillation", "medkd.handlers.schedule", "medkd.handlers.gradient_norms")
    return [handler for handler in handlers if not handler["_target_"].startswith(own)]


# kind of data -> options of phantoms that are as small as they tell anything
SMALL: dict[str, dict[str, Any]] = {
    "ct": {"shape": (64, 56, 40), "spacing": (4.5, 4.5, 6.0)},
    "em": {"shape": (16, 64, 56), "spacing": (15.0, 10.0, 10.0)},
    "nuclei": {"shape": (128, 112)},
}


def write_small_phantoms(bundle: Path, folder: Path, **counts: int) -> Path:
    """Write small phantoms of the bundle's kind; `counts` are those of the lists."""
    kind = kind_of(bundle)
    kind.write(folder, **SMALL.get(kind.name, {}), **counts)
    return folder
