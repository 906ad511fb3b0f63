# SPDX-License-Identifier: Apache-2.0
"""One bundle at work: run by `test_contract.py` in a process of its own, on a copy, with small phantoms.

The bundle's folder comes in the variable MEDKD_BUNDLE. Two bundles in one process would share the name `scripts`. What
ci/skeleton pins for all bundles is tested in `test_plumbing.py`; here is what a bundle's own values may break.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import Compose

import toys
from bundle_runs import (
    parsed,
    read,
    refused,
    scalars,
    student_patch,
    weights,
    without_distillation,
    write,
    write_small_phantoms,
)
from medkd.inference.options import check_options

SOURCE = Path(os.environ["MEDKD_BUNDLE"])
TRAIN, EVALUATE, SMOKE = (
    json.loads((SOURCE / f"configs/{name}.json").read_text()) for name in ("train", "evaluate", "smoke")
)
SCORES, SCORE_COLUMNS = EVALUATE["validate#key_metric"], EVALUATE["score_columns"]
METRIC = TRAIN["teacher_check"]["metric"]
TEACHER_INPUT = TRAIN["teacher_input"]
CLASSIFIES = TRAIN["label_filling"]["dtype"] == "class"            # a case has one class, and no map of them
TERMS = {term for term, weight in TRAIN["distill_weights"].items() if weight}
STUDENT_PATCH = student_patch(TRAIN)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
no_map = pytest.mark.skipif(CLASSIFIES, reason="it classifies whole images, whose results are tested by itself")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_phantoms(SOURCE, tmp_path_factory.mktemp("data"), training=3, validation=1, test=2)


@pytest.fixture(scope="module")
def run(run_bundle: Callable[..., None], bundle: Path, data: Path) -> Run:
    """Run an id of the bundle with config files by name; gives its `ckpt_dir`."""

    def call(run_id: str, *configs: str, **options: Any) -> Path:
        run_bundle(run_id, *configs, **{"dataset_dir": str(data), **options})
        return Path(options.get("ckpt_dir", bundle))

    return call


@pytest.fixture(scope="module")
def teacher(run: Run, bundle: Path) -> Path:
    return run("training", "train", "smoke", "teacher", ckpt_dir=str(bundle / "models/teacher")) / "model.pt"


@pytest.fixture(scope="module")
def teacher_hash(teacher: Path) -> str:
    return hashlib.sha256(teacher.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def distilled(run: Run, bundle: Path, teacher_hash: str) -> Path:
    return run("training", "train", "smoke", ckpt_dir=str(bundle / "runs/distilled"))


def distillation_terms(folder: Path) -> dict[str, list[float]]:
    return {tag.rpartition("kd/")[2]: value for tag, value in scalars(folder).items() if "kd/" in tag}


def test_training_distils_and_leaves_the_teacher_as_it_is(distilled: Path, teacher: Path, teacher_hash: str) -> None:
    terms = distillation_terms(distilled)
    assert terms.keys() == TERMS
    assert all(np.isfinite(value).all() and np.max(np.abs(value)) > 0 for value in terms.values()), terms
    description = json.loads((distilled / "model.json").read_text())
    assert description["mode"] == "distilled"
    assert description["teacher_sha256"] == teacher_hash == hashlib.sha256(teacher.read_bytes()).hexdigest()


def test_same_seed_gives_the_same_student(run: Run, distilled: Path, tmp_path: Path) -> None:
    assert toys.same(weights(distilled), weights(run("training", "train", "smoke", ckpt_dir=str(tmp_path))))


def test_a_run_is_resumed_with_what_it_was_made_with_or_with_other_settings_on_request(
    run: Run, distilled: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(distilled, tmp_path / "run")
    weights = {name: weight / 2 for name, weight in TRAIN["distill_weights"].items()}
    other = {"learning_rate": 0.001, "epochs": 3, "seed": 5, "distill_weights": weights}
    told = "".join(rf"(?=.*\n  {name}[^\n]*: \S+, now )" for name in other)
    with refused(rf"(?s)epoch_00002.pt must be made with the settings and data of this run{told}.*`--resume changed`"):
        run("training", "train", "smoke", ckpt_dir=str(folder), resume="true", **other)
    run("training", "train", "smoke", ckpt_dir=str(folder), resume="changed", **other)
    content = torch.load(folder / "checkpoints/epoch_00003.pt", weights_only=True)
    (group,) = content["objects"]["optimizer"]["param_groups"]
    assert (group["initial_lr"], content["objects"]["lr_scheduler"]["T_max"]) == (0.001, 3)
    assert group["lr"] == pytest.approx(0.0, abs=1e-9)             # the end of the new cosine
    assert {str(path.name) for path in folder.iterdir()} >= {"model.pt", "model.json", "checkpoints"}
    assert not list(folder.glob("before_*"))


@pytest.mark.skipif(len(STUDENT_PATCH) != 3, reason="only volumes are convolved slowly")
@torch.inference_mode()
def test_a_lone_window_is_not_convolved_by_the_slow_path_of_torch(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "inference")
    network, inferer = (parser.get_parsed_content(key) for key in ("network_def", "inferer"))
    channels = parsed(bundle, "metadata")["network_data_format#inputs#image#num_channels"]
    image = torch.zeros(1, channels, *inferer.roi_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        inferer(image, network.eval())
    kernels: dict[str, list[int]] = {}                             # operator -> the longest side of each of its kernels
    for event in profiler.events():
        if "conv" in event.name and len(event.input_shapes) > 1 and len(event.input_shapes[1]) == 5:
            kernels.setdefault(event.name, []).append(max(event.input_shapes[1][2:]))
    assert max(kernels["aten::convolution"]) == 3
    slow = [side for name, sides in kernels.items() if "slow" in name for side in sides]
    assert max(slow, default=1) == 1, kernels                      # which is quick there for 1 x 1 x 1


def test_other_data_are_named_at_a_resumption(run: Run, data: Path, distilled: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(data, tmp_path / "data")
    listing = json.loads((moved / "datalist.json").read_text())
    gone = listing["training"].pop()["image"]
    (moved / "datalist.json").write_text(json.dumps(listing))
    options = {"dataset_dir": str(moved), "resume": True, "ckpt_dir": str(shutil.copytree(distilled, tmp_path / "run"))}
    with refused(rf"got others:\n  training data: {Path(gone)} is missing\n"):
        run("training", "train", "smoke", **options)


def test_every_parameter_that_the_optimizer_has_is_trained(distilled: Path) -> None:
    """Several ranks would else wait for the gradient of one that nobody uses."""
    (last,) = sorted((distilled / "checkpoints").glob("*.pt"))[-1:]
    optimizer = torch.load(last, weights_only=True)["objects"]["optimizer"]
    assert optimizer["state"].keys() == {number for group in optimizer["param_groups"] for number in group["params"]}


@pytest.mark.parametrize("baseline", ["logits", "features"])
def test_baseline_methods_train(run: Run, teacher: Path, tmp_path: Path, baseline: str) -> None:
    wanted = json.loads((SOURCE / f"configs/{baseline}.json").read_text())["distill_weights"]
    options = {"epochs": 1, "teacher_check#mode": "off"}
    terms = distillation_terms(run("training", "train", "smoke", baseline, ckpt_dir=str(tmp_path), **options))
    assert sorted(terms) == sorted(name for name, weight in wanted.items() if weight)
    assert terms
    assert all(np.isfinite(value).all() for value in terms.values())


@pytest.mark.parametrize("labeled", [0, 1])
def test_images_without_labels_teach_the_student(
    run: Run, data: Path, teacher: Path, tmp_path: Path, labeled: int
) -> None:
    content = json.loads((data / "datalist.json").read_text())
    root = str((data / content.get("data_root", "")).resolve())
    images = {name: [{"image": item["image"]} for item in content[name]] for name in ("training", "validation")}
    lists = {"training": content["training"][:labeled], "unlabeled": images["training"][labeled:], "data_root": root}
    if not labeled:
        lists["validation"] = images["validation"]
    (tmp_path / "list.json").write_text(json.dumps({**content, **lists}))
    options = {"datalist": str(tmp_path / "list.json"), "teacher_check#mode": "off", "epochs": 1, "val_interval": 1}
    folder = run("training", "train", "smoke", "logits", ckpt_dir=str(tmp_path / "run"), **options)
    assert all(np.max(np.abs(values)) > 0 for values in distillation_terms(folder).values())
    assert (max(scalars(folder)["supervised_loss"]) > 0) is bool(labeled)
    told = json.loads((folder / "model.json").read_text())
    assert told["mode"] == "distilled"
    if "validation" in told:                                       # the student of one epoch may find nothing at all
        assert told["validation"].keys() == {METRIC if labeled else f"{METRIC}_with_teacher"}


def test_weights_of_zero_equal_plain_training_bit_for_bit(run: Run, teacher: Path, tmp_path: Path) -> None:
    none = dict.fromkeys(TERMS, 0.0)
    off = run("training", "train", "smoke", distill_weights=none, ckpt_dir=str(tmp_path / "off"))
    kept = without_distillation(TRAIN["train"]["handlers"])
    plain = run("run", "train", "smoke", ckpt_dir=str(tmp_path / "plain"), **{"train#handlers": kept})
    assert toys.same(weights(off), weights(plain))


def columns(score: dict[str, Any], classes: int) -> int:
    """How many values a case has in the file of a score."""
    counts = {"classes": classes - (not CLASSIFIES), "blocks": int(np.prod(score.get("blocks", 1))), "case": 1}
    return counts[SCORE_COLUMNS]


def test_evaluation_gives_all_metrics_per_case_and_class_or_block(
    run: Run, bundle: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    configs = ("train", "smoke", "teacher", "evaluate")
    run("evaluating", *configs, ckpt_dir=str(teacher.parent), output_dir=str(tmp_path))
    classes = parsed(bundle, *configs)["out_channels"]
    told = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert {name for name, value in told if np.isfinite(float(value))} == SCORES.keys()
    for metric, score in SCORES.items():
        if CLASSIFIES and metric != METRIC:                        # one value of all cases
            continue
        rows = (tmp_path / f"{metric}_raw.csv").read_text().splitlines()
        assert len(rows) == 1 + len(json.loads((data / "datalist.json").read_text())["test"])
        assert len(rows[1].split(",")) == 2 + columns(score, classes)
        values = [float(value) for value in rows[1].split(",")[1:]]
        assert np.isfinite(values).sum() == (2 if CLASSIFIES else len(values))   # that of its class, and the mean


def test_evaluation_of_cases_without_a_label_is_refused_before_the_first(
    run: Run, data: Path, tmp_path: Path
) -> None:
    content = json.loads((data / "datalist.json").read_text())
    del content["test"][-1]["label"]
    (tmp_path / "datalist.json").write_text(json.dumps(content | {"data_root": str(data)}))
    count = len(content["test"])
    with refused(f"`test` of .*datalist.json must have a label for each image, .* got none for 1 of {count}: "):
        run("evaluating", "train", "smoke", "evaluate", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@no_map
def test_evaluation_of_a_label_that_does_not_lie_on_its_image_is_refused_before_the_first(
    run: Run, data: Path, tmp_path: Path
) -> None:
    content = json.loads((data / "datalist.json").read_text())
    pixels, affine = read(data / content["test"][-1]["label"])
    file = tmp_path / Path(content["test"][-1]["label"]).name
    write(file, pixels[:-1] if affine is None else pixels, None if affine is None else affine * [[-1], [1], [1], [1]])
    content["test"][-1]["label"] = str(file)
    (tmp_path / "datalist.json").write_text(json.dumps(content | {"data_root": str(data)}))
    with refused(f"{file.name} must have the (shape|affine) of its image"):
        run("evaluating", "train", "smoke", "evaluate", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def predictions(folder: Path, data: Path) -> Iterator[tuple[Path, Path]]:
    """Image and prediction of each test case."""
    for case in json.loads((data / "datalist.json").read_text())["test"]:
        name, dot, ending = Path(case["image"]).name.partition(".")
        yield data / case["image"], folder / f"{name}_seg{dot}{ending}"


@no_map
def test_prediction_has_the_geometry_of_its_image(run: Run, bundle: Path, data: Path, tmp_path: Path) -> None:
    run("evaluating", "inference", output_dir=str(tmp_path))
    classes = parsed(bundle, "inference")["out_channels"]
    for image_file, pred_file in predictions(tmp_path, data):
        (image, affine), (pred, found) = read(image_file), read(pred_file)
        assert pred.shape == image.shape[: pred.ndim]
        if affine is not None:
            np.testing.assert_allclose(found, affine, atol=1e-4)
        assert pred.max() < classes if SCORE_COLUMNS == "classes" else pred.max() > 0
        instances = np.uint16 if affine is None else np.int32
        assert pred.dtype == (np.uint8 if SCORE_COLUMNS == "classes" else instances)


@no_map
def test_image_smaller_than_the_window_is_handled(run: Run, data: Path, tmp_path: Path) -> None:
    file, _ = next(predictions(tmp_path, data))
    image, affine = read(file)
    axes = image.shape if affine is not None else image.shape[:2]  # of a picture in color, not its channels
    small = image[tuple(slice(size // 4, size // 4 + max(size // 3, 5)) for size in axes)]
    name = f"small{'.png' if affine is None else '.nii.gz'}"
    write(tmp_path / name, small, affine)
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": name}]}))
    run("evaluating", "inference", output_dir=str(tmp_path / "out"), dataset_dir=str(tmp_path))
    pred, _ = read(tmp_path / "out" / name.replace("small", "small_seg"))
    assert pred.shape == small.shape[: pred.ndim]


def test_teacher_that_says_one_class_everywhere_is_refused(run: Run, teacher: Path, tmp_path: Path) -> None:
    silent = {key: torch.zeros_like(value) for key, value in weights(teacher.parent).items()}
    torch.save(silent, tmp_path / "silent.pt")
    options = {"teacher_path": str(tmp_path / "silent.pt"), "teacher_check#mode": "refuse"}
    with refused(f"The teacher's {METRIC} must be better than that of"):
        run("training", "train", "smoke", ckpt_dir=str(tmp_path / "run"), **options)


def test_images_much_smaller_than_a_patch_are_filled_up(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "train")
    patch = parser["patch_size"]
    size = [-(-length // 3) for length in patch]
    channels = parsed(bundle, "metadata")["network_data_format#inputs#image#num_channels"]
    case = {
        "image": MetaTensor(torch.rand(channels, *size)),
        "label": 1 if CLASSIFIES else MetaTensor(torch.ones(1, *size, dtype=torch.int64)),
    }
    case.setdefault(TEACHER_INPUT, case["image"])
    fixed, random = (parser.get_parsed_content(f"train#{name}_transforms") for name in ("deterministic", "random"))
    shaping = [step for step in fixed if type(step).__name__ in ("SpatialPadd", "CopyItemsd", "PairResolutionsd")]
    result = Compose(shaping + random)(case)
    for one in result if isinstance(result, list) else [result]:
        assert list(one["image"].shape[1:]) == STUDENT_PATCH
        assert list(one[TEACHER_INPUT].shape[1:]) == patch
        assert CLASSIFIES or list(one["label"].shape[1:]) == patch


@no_map
def test_what_the_network_says_where_the_label_is_negative_does_not_count(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the labels of a file to the supervised loss and the metric of the validation."""
    monkeypatch.syspath_prepend(str(bundle))
    parser = parsed(bundle, "train")
    patch, classes = parser["patch_size"], parser.get_parsed_content("out_channels")
    label = torch.arange(2).repeat_interleave(patch[0] // 2 + 1)[: patch[0]].view(1, -1, *[1] * (len(patch) - 1))
    label = label.expand(1, *patch).clone()
    label[..., -patch[-1] // 3 :] = -1
    case = {"image": MetaTensor(torch.rand(1, *patch)), "label": MetaTensor(label)}
    numbering = [step for step in parser.get_parsed_content("train#deterministic_transforms")
                 if type(step).__name__ == "ConsecutiveLabelsd"]
    case = Compose(numbering)(case)
    ignored = (case["label"] < 0).expand(classes, *patch).as_subclass(torch.Tensor)
    assert 0 < int(ignored.sum()) < ignored.numel()
    pred = torch.randn(classes, *patch)
    other = torch.where(ignored, torch.randn(classes, *patch), pred)
    loss, post = parser.get_parsed_content("loss"), parser.get_parsed_content("train#postprocessing")
    values = [loss(one[None], case["label"][None]) for one in (pred, other)]
    assert values[0].isfinite()
    torch.testing.assert_close(*(torch.as_tensor(value) for value in values))
    results = [post({"pred": MetaTensor(one), "label": case["label"]}) for one in (pred, other)]
    metric = next(iter(parser.get_parsed_content("validate#key_metric").values()))
    if len(results[0]["label"]) > 1:                               # classes; instances are decoded in the validation
        scores = []
        metric.attach(Engine(lambda _engine, _batch: None), "score")
        for result in results:
            metric.reset()
            metric.update(([result["pred"]], [result["label"]]))
            scores.append(float(metric.compute()))
        assert scores[0] == scores[1]


def test_files_are_read_and_prepared_once(bundle: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    parser = parsed(bundle, "train")
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(copy), "train#dataset#num_workers": 0})
    parser.get_parsed_content("initialize#0")
    dataset = parser.get_parsed_content("train#dataset")
    shutil.rmtree(copy)
    crops = dataset[0]
    assert list((crops[0] if isinstance(crops, list) else crops)["image"].shape[1:]) == STUDENT_PATCH


@pytest.mark.parametrize("names", [["multi_gpu_train", "teacher"], ["teacher", "multi_gpu_train"]])
def test_a_teacher_is_trained_on_several_gpus_in_any_order_of_the_configs(bundle: Path, names: list[str]) -> None:
    parser = parsed(bundle, "train", *names)
    assert parser["network"]["_target_"] == "torch.nn.parallel.DistributedDataParallel"
    network, built = parser.get_parsed_content("network_def"), parser.get_parsed_content("teacher_def")()
    assert [p.shape for p in network.parameters()] == [p.shape for p in built.parameters()]


@pytest.mark.parametrize("file", sorted(path.stem for path in (SOURCE / "configs").glob("*.json")))
def test_every_config_file_passes_the_check_of_options(file: str) -> None:
    if file == "metadata":
        pytest.skip("no config")
    base = "inference" if file.startswith("inference") else "train"
    config = parsed(SOURCE, *dict.fromkeys([base, file])).get()
    check_options(config, json.loads((SOURCE / f"configs/{base}.json").read_text()), f"{base}.json")
    for slip in ({"epohcs": 1}, {"num_workers": "two"}, {"patch_size": 64}):
        parser = parsed(SOURCE, *dict.fromkeys([base, file]))
        parser.update(slip)
        with pytest.raises(ValueError, match="Option `"):
            check_options(parser.get(), json.loads((SOURCE / f"configs/{base}.json").read_text()), f"{base}.json")
