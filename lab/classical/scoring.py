# SPDX-License-Identifier: Apache-2.0
"""A rule scored as a network is: by the metrics of the bundle's evaluation, in the geometry of the files.

    python -m lab.classical.scoring REQUEST.json ANSWER.json       in a program of its own, as `lab.networks`
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Engine
from monai.bundle.config_parser import ConfigParser
from monai.data.meta_tensor import MetaTensor
from monai.handlers.metrics_saver import MetricsSaver
from monai.transforms import Compose
from numpy.typing import NDArray
from skimage import io
from torch import Tensor

from lab.bundle import BundleRun
from lab.classical import RULES
from lab.classical.case import Case, Rule, Segment
from lab.execute import write_json
from lab.networks import enter_bundle
from lab.score import columns_of, read_scores
from medkd.data.datalist import load_datalist
from medkd.handlers.records import case_meta
from medkd.metrics.ignored import IgnoredAsBackgroundd

__all__ = ["Loaded", "choose", "measure_rules", "to_case", "to_file_axes", "to_picture"]

orientations: Any = nibabel.orientations   # untyped

Loaded = dict[str, Any]                    # image and label of a case, MetaTensors of shape (1, *S)


def to_case(image: Tensor, label: Tensor | None = None) -> Case:
    """Turn what was loaded, shape (1, *S), to the orientation that rules know; without an affine it stays.

    Of colors, shape (3, H, W), or (4, H, W) with transparency, it is the mean.
    """
    turn = _turn(image)
    gray = image[:3].float().mean(0) if len(image) > 2 else image[0]
    marks = None if label is None else label[0]
    values = [None if one is None else _apply(np.asarray(one), turn) for one in (gray, marks)]
    spacing = np.asarray(getattr(image, "pixdim", np.ones(image.dim() - 1)), float)[: image.dim() - 1]
    spacing = spacing if turn is None else spacing[np.argsort(turn[:, 0])]
    pixels = np.asarray(values[0], np.float32)
    return Case(pixels, tuple(map(float, spacing)), None if values[1] is None else np.asarray(values[1], np.int16))


def to_picture(image: Tensor, label: int | None = None) -> Case:
    """Take a picture (3, H, W) whose class is asked for, as a student sees it."""
    pixels = np.asarray(image, np.float32)
    return Case(pixels, (1.0,) * (pixels.ndim - 1), None if label is None else np.asarray(label, np.int16))


def to_file_axes(found: NDArray[Any], image: Tensor) -> NDArray[Any]:
    """Turn a label map of a rule, shape (*S), back to the axes of the image it was made for."""
    turn = _turn(image)
    if turn is None:
        return found
    canonical = orientations.axcodes2ornt("RAS")
    return np.ascontiguousarray(_apply(found, orientations.ornt_transform(canonical, _axes(image))))


def _axes(image: Any) -> NDArray[Any]:
    axes: NDArray[Any] = orientations.io_orientation(np.asarray(image.affine))
    return axes


def _turn(image: Tensor) -> NDArray[Any] | None:
    """How the axes of a volume come to RAS; None for pictures, which lie as they do."""
    if image.dim() < 4 or not isinstance(image, MetaTensor):
        return None
    turn: NDArray[Any] = orientations.ornt_transform(_axes(image), orientations.axcodes2ornt("RAS"))
    return turn


def _apply(values: NDArray[Any], turn: NDArray[Any] | None) -> NDArray[Any]:
    turned: NDArray[Any] = values if turn is None else orientations.apply_orientation(values, turn)
    return turned


def _values(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for one in itertools.product(*grid.values()):
        yield dict(zip(grid, one, strict=True))


class _Scorer:
    """Scores label maps by the metrics of an evaluation."""

    def __init__(self, parser: ConfigParser, has_instances: bool) -> None:
        self._parser = parser
        self._has_instances = has_instances
        self._classes = int(parser.get_parsed_content("out_channels"))

    def run(self, cases: Sequence[Loaded], found: Sequence[NDArray[Any]], names: Sequence[str] | None,
            folder: Path | None = None) -> dict[str, float]:
        """Means of metrics, all if no `names` are given; values per case go to files in `folder`."""
        engine = Engine(lambda _, batch: batch)
        for name, metric in self._metrics().items():
            if names is None or name in names:
                metric.attach(engine, name)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            saver = MetricsSaver(str(folder), metric_details="*", batch_transform=case_meta, summary_ops="*")
            saver.attach(engine)
        engine.run([[self._item(case, one)] for case, one in zip(cases, found, strict=True)])
        return {name: float(value) for name, value in engine.state.metrics.items()}

    def _metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self._parser.get_parsed_content("validate#key_metric", instantiate=True)
        self._parser.parse(reset=True)                             # or the next engine would get the same objects
        return metrics

    def _item(self, case: Loaded, found: NDArray[Any]) -> Loaded:
        label = case["label"]
        if found.ndim == 1:                                        # scores of classes
            return {"image": case["image"], "label": torch.as_tensor(label), "pred": torch.as_tensor(found)}
        told = {"image": case["image"], "label": label, "pred": torch.as_tensor(found)[None]}
        if self._has_instances:
            return told
        mask: Any = IgnoredAsBackgroundd("pred", kind="classes")
        item: Loaded = mask(told)
        for key in ("pred", "label"):
            maps = torch.stack([(item[key][0] == value).float() for value in range(self._classes)])
            item[key] = MetaTensor(torch.as_tensor(np.asarray(maps)), affine=getattr(label, "affine", None))
        return item


def choose(rule: Rule, segment: Segment, cases: Sequence[Loaded], scorer: Any, metric: str,
           higher_is_better: bool, view: Callable[..., Case] = to_case) -> tuple[dict[str, Any], float]:
    """The parameters of a rule that are best on cases, the first of equal ones, and the score there."""
    views = [view(case["image"]) for case in cases]
    scores = []
    for values in _values(rule.grid):
        found = [to_file_axes(segment(view, **values), case["image"]) for view, case in zip(views, cases, strict=True)]
        scores.append((scorer.run(cases, found, [metric])[metric], values))
    best = (max if higher_is_better else min)(score for score, _ in scores)
    return next((values, score) for score, values in scores if score == best)


def measure_rules(request: Mapping[str, Any]) -> dict[str, Any]:
    """Tune and score rules.

    Args:
        request: `rules`, names in `RULES`; `configs` and `options` of an evaluation, with `datalist`; `metric`,
            `higher_is_better`, `patient`, `test` as `lab.score` takes them; `output`, a folder for what is written.

    Returns:
        Name -> `parameters`, `validation`, `mean`, `per_case`, `metrics`.
    """
    config = BundleRun(Path(), "", request["configs"], {**request["options"], "bundle_root": "."}).config
    parser = ConfigParser(config)
    lists = {name: load_datalist(config["datalist"], name) for name in ("training", "validation", "test")}
    view: Callable[..., Case]
    kind = config.get("label_filling", {}).get("dtype")            # int32: of instances
    if kind == "class":                                            # what the student sees, at its resolution
        view, loading = to_picture, Compose(parser.get_parsed_content("train#deterministic_transforms"))
    else:
        steps = [key for key in ("loading", "numbering") if key in config]
        view, loading = to_case, Compose([parser.get_parsed_content(key) for key in steps])
    loaded = {name: [loading(case) for case in lists[name]] for name in ("validation", "test")}
    classes, scorer = int(parser.get_parsed_content("out_channels")), _Scorer(parser, kind == "int32")
    answer = {}
    for name in request["rules"]:
        rule = RULES[name]
        known = (loading(case) for case in lists["training"]) if rule.uses_training else ()
        segment = rule.prepare([view(case["image"], case["label"]) for case in known], classes)
        parameters, validation = choose(
            rule, segment, loaded["validation"], scorer, request["metric"], request["higher_is_better"], view
        )
        found = [
            to_file_axes(segment(view(case["image"]), **parameters), case["image"]) for case in loaded["test"]
        ]
        folder = Path(request["output"]) / name
        scorer.run(loaded["test"], found, None, folder / "scores")
        for case, one in zip(loaded["test"], found, strict=True):
            _write(one, case["image"], folder)
        values = read_scores(folder / "scores", columns_of(config), request["patient"], request["test"])
        means = {metric: round(fmean(of.values()), 4) for metric, of in values.items() if of}
        cases = {case: round(value, 4) for case, value in values[request["metric"]].items()}
        answer[name] = {
            "mean": means.pop(request["metric"]), "per_case": cases, "metrics": means, "parameters": parameters,
            "validation": round(validation, 4),
        }
    return answer


def _write(found: NDArray[Any], image: Any, folder: Path) -> None:
    """Write a label map beside no other file: NIfTI as its image lies, or a picture; scores of classes have no map."""
    if found.ndim == 1:
        return
    source = Path(str(image.meta["filename_or_obj"]))
    if source.name.endswith((".nii", ".nii.gz")):
        volume: Any = nibabel.Nifti1Image
        nibabel.save(volume(found, np.asarray(image.affine)), folder / source.name)
    else:
        numbers = found.T.astype(np.uint8 if found.max() < 256 else np.uint16)       # MONAI loads pictures transposed
        io.imsave(folder / f"{source.stem}.png", numbers, check_contrast=False)


def main(request: str, answer: str) -> None:
    """Answer a request."""
    target, content = Path(answer).resolve(), json.loads(Path(request).read_text())
    enter_bundle(content["bundle"])
    write_json(target, measure_rules(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
