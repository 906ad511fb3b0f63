# SPDX-License-Identifier: Apache-2.0
"""Run a bundle in this process as `python -m monai.bundle run` does, and read what the run leaves."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def parsed(bundle: Path, *names: str, **options: Any) -> ConfigParser:
    """Config files by name, later ones over the first and options over all, as a run reads them."""
    parser = ConfigParser()
    parser.read_config([str(bundle / f"configs/{name}.json") for name in names])
    parser.update(options)
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


def student_patch(train: Mapping[str, Any]) -> list[int]:
    """Voxels of the student's image along each axis, where `patch_size` is the teacher's and `scale` lies between."""
    patch, scale = train["patch_size"], train.get("scale", 1)
    steps = scale if isinstance(scale, list) else [scale] * len(patch)
    return [length // step for length, step in zip(patch, steps, strict=True)]


def without_distillation(handlers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The handlers of plain training."""
    own = ("medkd.handlers.distillation", "medkd.handlers.schedule", "medkd.handlers.several")
    return [handler for handler in handlers if not handler["_target_"].startswith(own)]


# kind of data -> options of phantoms that are as small as they tell anything
SMALL: dict[str, dict[str, Any]] = {
    "ct": {"shape": (64, 56, 40), "spacing": (4.5, 4.5, 6.0)},
    "ct_tumor": {"shape": (64, 56, 40), "spacing": (4.5, 4.5, 6.0)},
    "em": {"shape": (16, 64, 56), "spacing": (15.0, 10.0, 10.0)},
    "nuclei": {"shape": (128, 112)},
    "histology": {"shape": (80, 72)},
}


def write_small_phantoms(bundle: Path, folder: Path, **counts: int) -> Path:
    """Write small phantoms of the bundle's kind; `counts` are those of the lists."""
    kind = kind_of(bundle)
    kind.write(folder, **SMALL.get(kind.name, {}), **counts)
    return folder


def run_direct(run_bundle: Callable[..., None], bundle: Path, folder: Path, channels: int) -> Path:
    """Teacher, student, evaluation and inference of networks that give affinities directly; gives the data.

    Scores and predictions lie in `folder/eval`; `channels` are those of the smoke.
    """
    data = write_small_phantoms(bundle, folder / "data", training=2, validation=1, test=1)
    options: dict[str, Any] = {"dataset_dir": str(data), "teacher_check#mode": "warn"}
    run_bundle("training", "train", "direct", "smoke", "teacher", **options)
    assert weights(bundle / "models/teacher/direct")["embedding.weight"].shape[0] == channels
    student = {**options, "ckpt_dir": str(folder / "student"), "output_dir": str(folder / "eval")}
    run_bundle("training", "train", "direct", "smoke", **student)
    terms = scalars(folder / "student")
    assert all(0 < value < 10 for value in terms["kd/affinity"])
    run_bundle("evaluating", "train", "direct", "smoke", "evaluate", **student)
    run_bundle(
        "evaluating", "inference", "inference_direct", dataset_dir=str(data), out_channels=channels,
        ckpt_path=str(folder / "student/model.pt"), output_dir=str(folder / "eval"),
    )
    return data


def picture(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A dark body with a bright organ without any symmetry, and its label: (rows, columns), uint8."""
    rng = np.random.default_rng(number)
    label = np.zeros((40, 52), np.uint8)
    top, left = rng.integers(6, 14, 2)
    label[top : top + 18, left : left + 6] = 1
    label[top + 12 : top + 18, left : left + 20] = 1
    image = np.where(label, rng.integers(190, 220, label.shape), rng.integers(40, 60, label.shape))
    return image.astype(np.uint8), label


def write_slices(folder: Path, counts: Mapping[str, int]) -> Path:
    """Pictures, every other one in color, and their labels, so many of each list."""
    def make(number: int) -> dict[str, str]:
        image, label = picture(number)
        color = np.stack([image] * 3, axis=-1) if number % 2 else image
        Image.fromarray(color).save(folder / f"{number}.png")
        Image.fromarray(label).save(folder / f"{number}_label.png")
        return {"image": f"{number}.png", "label": f"{number}_label.png"}

    return _list_data(folder, counts, make)


def write_neurons(folder: Path, counts: Mapping[str, int]) -> Path:
    """Cells of a Voronoi diagram with ids above 16 bits, dark where they touch, so many of each list."""
    shape = (20, 36, 40)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)

    def make(number: int) -> dict[str, str]:
        rng = np.random.default_rng(number)
        seeds = rng.random((12, 3)) * shape
        distance = np.linalg.norm(grid[..., None, :] - seeds, axis=-1)
        nearest = np.sort(distance, axis=-1)
        image = 60 + 80 * ((nearest[..., 1] - nearest[..., 0]) > 2) + rng.normal(0, 5, shape)
        label = distance.argmin(-1) + 70_000
        for name, volume in (("image", image.astype(np.uint8)), ("label", label.astype(np.uint32))):
            write(folder / f"{number}_{name}.nii.gz", volume, np.diag([10.0, 10.0, 10.0, 1.0]))
        return {"image": f"{number}_image.nii.gz", "label": f"{number}_label.nii.gz"}

    return _list_data(folder, counts, make)


def _list_data(folder: Path, counts: Mapping[str, int], make: Callable[[int], dict[str, str]]) -> Path:
    numbers = iter(range(sum(counts.values())))
    content = {name: [make(next(numbers)) for _ in range(count)] for name, count in counts.items()}
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder
