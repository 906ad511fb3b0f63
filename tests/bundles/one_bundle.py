# SPDX-License-Identifier: Apache-2.0
"""One bundle at work: run by `test_contract.py` in a process of its own, on a copy, with small phantoms.

The bundle's folder comes in the variable MEDKD_BUNDLE. Two bundles in one process would share the name `scripts`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from PIL import Image

from medkd.phantoms.ct import write_ct_phantoms
from medkd.phantoms.em import write_em_phantoms
from medkd.phantoms.nuclei import write_nuclei_phantoms

SOURCE = Path(os.environ["MEDKD_BUNDLE"])
TRAIN = json.loads((SOURCE / "configs/train.json").read_text())
SCORES = json.loads((SOURCE / "configs/evaluate.json").read_text())["validate#key_metric"]
SMOKE = json.loads((SOURCE / "configs/smoke.json").read_text())
KIND = next(part for part in SOURCE.name.split("_") if part in ("ct", "em", "nuclei"))
ORGANS = SMOKE.get("out_channels", TRAIN["out_channels"]) - 1   # of CT phantoms
WIDTH = "channels" if "channels" in TRAIN["teacher_def"] else "filters"
METRIC = TRAIN["teacher_check"]["metric"]
TERMS_OFF = json.loads((SOURCE / "configs/baseline.json").read_text())["distill_weights"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    if KIND == "ct":
        write_ct_phantoms(folder, training=3, validation=1, test=2, shape=(64, 56, 40), spacing=(4.5, 4.5, 6.0))
    elif KIND == "em":
        write_em_phantoms(folder, training=3, validation=1, test=2, shape=(16, 64, 56), spacing=(20.0, 10.0, 10.0))
    else:
        write_nuclei_phantoms(folder, training=3, validation=1, test=2, shape=(128, 112))
    return folder


@pytest.fixture(scope="module")
def run(run_bundle: Callable[..., None], bundle: Path, data: Path) -> Run:
    """Run an id of the bundle with config files by name; gives its `ckpt_dir`."""

    def call(run_id: str, *configs: str, **options: Any) -> Path:
        folder = options.get("ckpt_dir", str(bundle / "runs/test"))
        if configs[0] == "train":
            options |= {"num_workers": 0, "ckpt_dir": folder}
        run_bundle(run_id, *configs, **{"dataset_dir": str(data), **options})
        return Path(folder)

    return call


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path) -> Path:
    return run("training", "train", "smoke", "teacher", ckpt_dir=str(bundle / "models/teacher")) / "model.pt"


def cause(error: BaseException) -> str:
    """Message of the first cause, under MONAI's wrappers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def scalars(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_training_without_the_teacher_stops_before_any_data_is_read(run: Run) -> None:
    with pytest.raises(RuntimeError) as error:
        run("training", "train", "smoke", datalist="nowhere.json")
    assert re.search("does not exist; train it with .*teacher.json", cause(error.value))


def test_run_without_the_teacher_trains_with_labels_only_and_says_so(run: Run, capsys: Any, tmp_path: Path) -> None:
    folder = run("run", "train", "smoke", ckpt_dir=str(tmp_path))
    assert "it does NOT distil" in capsys.readouterr().out
    assert json.loads((folder / "model.json").read_text())["mode"] == "supervised"


def test_training_distils_and_leaves_the_teacher_as_it_is(run: Run, teacher: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(teacher.read_bytes()).hexdigest()
    folder = run("training", "train", "smoke", ckpt_dir=str(tmp_path))
    values = scalars(folder)
    terms = {tag: value for tag, value in values.items() if "kd/" in tag}
    assert len(terms) == len(TERMS_OFF)
    assert all(np.isfinite(value).all() and np.max(np.abs(value)) > 0 for value in terms.values()), terms
    description = json.loads((folder / "model.json").read_text())
    assert description["mode"] == "distilled"
    assert description["teacher_sha256"] == before == hashlib.sha256(teacher.read_bytes()).hexdigest()


@pytest.mark.parametrize("baseline", ["logits", "features"])
def test_baseline_methods_train(run: Run, teacher: Path, tmp_path: Path, baseline: str) -> None:
    weights = json.loads((SOURCE / f"configs/{baseline}.json").read_text())["distill_weights"]
    (term,) = [name for name, weight in weights.items() if weight]
    folder = run("training", "train", "smoke", baseline, ckpt_dir=str(tmp_path))
    values = {tag: value for tag, value in scalars(folder).items() if "kd/" in tag}
    assert [tag for tag in values if tag.endswith(f"kd/{term}")] == list(values)
    assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_of_zero_equal_plain_training_bit_for_bit(
    run: Run, teacher: Path, tmp_path: Path, workers: int
) -> None:
    options = {"num_workers": workers}
    off = run("training", "train", "smoke", distill_weights=TERMS_OFF, ckpt_dir=str(tmp_path / "off"), **options)
    kept = [h for h in TRAIN["train"]["handlers"] if "medkd.handlers.distillation" not in h["_target_"]
            and "medkd.handlers.schedule" not in h["_target_"]]
    plain = run(
        "run", "train", "smoke", ckpt_dir=str(tmp_path / "plain"), **options, **{"train#handlers": kept}
    )
    assert equal(weights(off), weights(plain))


def test_same_seed_gives_the_same_student(run: Run, teacher: Path, tmp_path: Path) -> None:
    folders = [run("training", "train", "smoke", ckpt_dir=str(tmp_path / name)) for name in ("first", "second")]
    assert equal(weights(folders[0]), weights(folders[1]))


def test_killed_run_resumes_bit_identical(bundle: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "monai.bundle", "run", "training", "--config_file",
            "['configs/train.json','configs/smoke.json']", "--bundle_root", ".", "--dataset_dir", str(data),
            "--ckpt_dir", str(folder), "--epochs", "6", *more,
        ]
        return subprocess.Popen(command, cwd=bundle, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "killed")
    while killed.poll() is None and not (tmp_path / "killed/checkpoints/epoch_00002.pt").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed", "--resume", "true").wait() == 0
    assert whole.wait() == 0
    last = "checkpoints/epoch_00006.pt"
    states = [torch.load(tmp_path / name / last, weights_only=True) for name in ("whole", "killed")]
    assert equal(states[0]["objects"]["network"], states[1]["objects"]["network"])
    assert states[0]["best_metric"] == states[1]["best_metric"]


def columns(score: dict[str, Any]) -> int:
    """How many values a case has: one per organ, or per block of instances."""
    return int(np.prod(score.get("blocks", 1))) if "instances" in score["_target_"] else ORGANS


def test_evaluation_gives_all_metrics_per_case_and_organ_or_block(run: Run, teacher: Path, tmp_path: Path) -> None:
    run("evaluating", "train", "smoke", "teacher", "evaluate", ckpt_dir=str(teacher.parent), output_dir=str(tmp_path))
    for metric, score in SCORES.items():
        rows = (tmp_path / f"{metric}_raw.csv").read_text().splitlines()
        assert len(rows) == 1 + 2
        assert len(rows[1].split(",")) == 2 + columns(score)
        assert np.isfinite([float(value) for value in rows[1].split(",")[1:]]).all()


def read(file: Path) -> tuple[np.ndarray, Any]:
    """Pixels or voxels, and the affine; a picture has none."""
    if file.suffix == ".png":
        return np.asarray(Image.open(file)), None
    image = nibabel.load(file)
    return np.asarray(image.dataobj), image.affine


def predictions(folder: Path, data: Path) -> Iterator[tuple[Path, Path]]:
    """Image and prediction of each test case."""
    for case in json.loads((data / "datalist.json").read_text())["test"]:
        name, dot, ending = Path(case["image"]).name.partition(".")
        yield data / case["image"], folder / f"{name}_seg{dot}{ending}"


def test_prediction_has_the_geometry_of_its_image(run: Run, data: Path, tmp_path: Path) -> None:
    spacing = {"spacing": [8.0, 8.0, 8.0]} if KIND == "ct" else {}
    run("evaluating", "inference", output_dir=str(tmp_path), **spacing)
    for image_file, pred_file in predictions(tmp_path, data):
        (image, affine), (pred, found) = read(image_file), read(pred_file)
        assert pred.shape == image.shape[: pred.ndim]
        if affine is not None:
            np.testing.assert_allclose(found, affine, atol=1e-4)
        assert pred.dtype == {"ct": np.uint8, "em": np.int32, "nuclei": np.uint16}[KIND]
        assert pred.max() <= ORGANS if KIND == "ct" else pred.max() > 0


def test_image_smaller_than_the_window_is_handled(run: Run, data: Path, tmp_path: Path) -> None:
    file, _ = next(predictions(tmp_path, data))
    image, affine = read(file)
    axes = image.shape[: 2 + (KIND != "nuclei")]                    # of a picture in color, not its channels
    small = image[tuple(slice(size // 4, size // 4 + max(size // 3, 5)) for size in axes)]
    if affine is None:
        Image.fromarray(small).save(tmp_path / "small.png")
    else:
        nibabel.save(nibabel.Nifti1Image(small, affine), tmp_path / "small.nii.gz")
    name = f"small{'.png' if affine is None else '.nii.gz'}"
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": name}]}))
    run("evaluating", "inference", output_dir=str(tmp_path / "out"), dataset_dir=str(tmp_path))
    pred, _ = read(tmp_path / "out" / name.replace("small", "small_seg"))
    assert pred.shape == small.shape[: pred.ndim]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher_sha256": "00"}, "`teacher_sha256` must be the hash of"),
        ({f"teacher_def#{WIDTH}": [2, 3, 4, 5, 6][: len(TRAIN["teacher_def"][WIDTH])]},
         "must hold weights of the teacher's network"),
        ({"distill_weights": {"boundry": 1.0}}, "must name terms of the loss, got 'boundry'"),
        ({"teacher_input": "teacher_image"}, "`teacher_input` must be a key of the batch, got 'teacher_image'"),
        ({"teacher_check#metric": "dice"}, "`teacher_check#metric` must be a metric of the validation"),
    ],
)
def test_wrong_options_are_refused(
    run: Run, teacher: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception) as error:   # noqa: PT011  (MONAI wraps it; the cause is matched)
        run("training", "train", "smoke", ckpt_dir=str(tmp_path), **overrides)
    assert message in cause(error.value)


def test_teacher_that_says_one_class_everywhere_is_refused(run: Run, teacher: Path, tmp_path: Path) -> None:
    silent = {key: torch.zeros_like(value) for key, value in torch.load(teacher, weights_only=True).items()}
    torch.save(silent, tmp_path / "silent.pt")
    options = {"teacher_path": str(tmp_path / "silent.pt"), "teacher_check#mode": "refuse"}
    with pytest.raises(Exception) as error:   # noqa: PT011
        run("training", "train", "smoke", ckpt_dir=str(tmp_path / "run"), **options)
    assert f"The teacher's {METRIC} must be better than that of" in cause(error.value)


def test_broken_data_is_refused_before_the_first_iteration(run: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    listing = json.loads((data / "datalist.json").read_text())
    pixels, affine = read(data / listing["training"][1]["label"])
    if affine is None:
        short = tmp_path / "short.png"
        Image.fromarray(pixels[:-1]).save(short)
    else:
        short = tmp_path / "short.nii.gz"
        nibabel.save(nibabel.Nifti1Image(pixels[:-1], affine), short)
    listing["training"][1]["label"] = str(short)
    (tmp_path / "datalist.json").write_text(json.dumps({**listing, "data_root": str(data)}))
    with pytest.raises(Exception) as error:   # noqa: PT011
        run("training", "train", "smoke", datalist=str(tmp_path / "datalist.json"), ckpt_dir=str(tmp_path / "run"))
    assert "shape" in cause(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_ranks_end_with_one_student(bundle: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    configs = "['configs/train.json','configs/smoke.json','configs/multi_gpu_train.json']"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle",
        "run", "training", "--config_file", configs, "--bundle_root", ".", "--dataset_dir", str(data),
        "--ckpt_dir", str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False,
                            timeout=200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert weights(tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2


def test_images_much_smaller_than_a_patch_are_filled_up(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    patch = parser["patch_size"]
    size = [-(-length // 3) for length in patch]
    case = {
        "image": MetaTensor(torch.rand(3 if KIND == "nuclei" else 1, *size)),
        "label": MetaTensor(torch.ones(1, *size, dtype=torch.int64)),
    }
    fixed = parser["train#deterministic_transforms"]
    pads = [index for index, transform in enumerate(fixed) if transform["_target_"] == "SpatialPadd"]
    steps = [parser.get_parsed_content(f"train#deterministic_transforms#{index}") for index in pads]
    result = Compose(steps + parser.get_parsed_content("train#random_transforms"))(case)
    for one in result if isinstance(result, list) else [result]:
        assert list(one["image"].shape[1:]) == list(one["label"].shape[1:]) == patch


@pytest.mark.parametrize("names", [["multi_gpu_train", "teacher"], ["teacher", "multi_gpu_train"]])
def test_a_teacher_is_trained_on_several_gpus_in_any_order_of_the_configs(bundle: Path, names: list[str]) -> None:
    parser = ConfigParser()
    parser.read_config([str(bundle / f"configs/{name}.json") for name in ("train", *names)])
    assert parser["network"]["_target_"] == "torch.nn.parallel.DistributedDataParallel"
    network, built = parser.get_parsed_content("network_def"), parser.get_parsed_content("teacher_def")()
    assert [p.shape for p in network.parameters()] == [p.shape for p in built.parameters()]


def test_misspelled_option_of_the_command_line_is_refused(bundle: Path, data: Path) -> None:
    command = [
        sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json",
        "--bundle_root", ".", "--dataset_dir", str(data), "--epoch", "1",
    ]
    result = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "got 'epoch'; did you mean 'epochs'" in result.stderr.splitlines()[-1]
