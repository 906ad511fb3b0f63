# SPDX-License-Identifier: Apache-2.0
"""A toy bundle made from ci/skeleton, and its data: the plumbing of all bundles is tested on it, once."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

import format_json
import sync_bundles
import toys

ROOT = Path(__file__).resolve().parents[1]
NAME = "soft_label_toy_squares"
OWN, MORE = "<own>", "<more>"
LISTS = {"training": 4, "validation": 2, "test": 2}
Config = dict[str, Any]

LEVEL = {"tap": toys.TAP, "channels": [toys.STUDENT_WIDTH, toys.TEACHER_WIDTH], "stride": [1, 1]}
LOAD = [
    {"_target_": "LoadImaged", "keys": ["image", "label"], "allow_missing_keys": True},
    {"_target_": "EnsureChannelFirstd", "keys": ["image", "label"], "allow_missing_keys": True},
]
ENSURE = {"_target_": "EnsureTyped", "keys": ["image", "label"], "allow_missing_keys": True}
CUT = {"keys": ["image", "label", "centers", "soft_label"], "allow_missing_keys": True}
MOVED = {"keys": ["image", "label", "teacher_pred", "teacher_classes"], "allow_missing_keys": True}
SOFT_LABELS = {"_target_": "medkd.data.soft_labels.SoftLabeld", "soft_labels": "@soft_labels", "keys": "@teacher_input"}
KNOWN = {"_target_": "medkd.metrics.ignored.IgnoredAsBackgroundd", "keys": "pred"}
ONE_HOT = {"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": "@out_channels"}
DICE = {"_target_": "MeanDice", "include_background": False, "output_transform": "@pred_and_label"}
WINDOWS = {"_target_": "SlidingWindowInferer", "roi_size": "@patch_size", "sw_batch_size": 4}
STUDENT = {"_target_": "scripts.networks.ToyNetwork", "width": toys.STUDENT_WIDTH, "dropout": 0.2}
TERMS = {"logits": 0.5, "features": 0.3, "node": 0.1, "inter_edge": 1.0, "inter_affinity": 4.0}
CHANNEL = {"type": "image", "num_channels": 1, "spatial_shape": [8, 8], "dtype": "float32", "value_range": [0, 1]}
PACKAGES = ("nibabel", "pytorch-ignite", "scipy", "scikit-image", "safetensors", "tensorboard", "tqdm")

# file of the skeleton -> path of a place for own values -> what stands there
OWN_VALUES: dict[str, Config] = {
    "train": {
        "teacher_check": {"metric": "val_mean_dice", "mode": "refuse"},
        "epochs": 2,
        "val_interval": 1,
        "learning_rate": 0.05,
        "batch_size": 2,
        "out_channels": 2,
        "patch_size": [8, 8],
        "network_def": STUDENT,
        "teacher_def": {**STUDENT, "width": toys.TEACHER_WIDTH, "dropout": 0.0, "_mode_": "callable"},
        "distill_loss": [
            {"_target_": "medkd.losses.logits.SoftLabelLoss"},
            {
                "_target_": "medkd.losses.features.HintLoss",
                "taps": [LEVEL["tap"]],
                "channels": [LEVEL["channels"]],
                "spatial_dims": 2,
            },
            {
                "_target_": "medkd.losses.graph_relation.GraphRelationLoss",
                "offsets": [[0, -1]],
                "levels": [LEVEL],
                "bank": {
                    "_target_": "medkd.losses.relation_bank.RelationBank",
                    "channels": 2,
                    "capacity": 5,
                    "sample": 2,
                },
            },
        ],
        "distill_weights": TERMS,
        "distill_ramp": 0.5,
        "cache_teacher": True,
        "soft_label_dir": "$os.path.dirname(@teacher_path) + '/soft_labels'",
        "soft_labels": {
            "_target_": "medkd.data.soft_labels.SoftLabels",
            "teacher": "@teacher",
            "directory": "@soft_label_dir",
            "inferer": "@validate#inferer",
            "losses": "@distill_loss",
            "weights": "@distill_weights",
            "cache": "@cache_teacher",
            "device": "@device",
        },
        "loss": {
            "_target_": "medkd.losses.ignoring.IgnoringLoss",
            "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True},
        },
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "params": "$@trainable_parameters(@network, @distill_loss)",
            "lr": "@learning_rate",
        },
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "optimizer": "@optimizer",
            "T_max": "@train#trainer#max_epochs",
        },
        "data_check#num_classes": "@out_channels",
        "loading": {"_target_": "Compose", "transforms": LOAD},
        "train#deterministic_transforms": ["@loading", ENSURE],
        "train#random_transforms": [
            SOFT_LABELS,
            {"_target_": "RandSpatialCropd", **CUT, "roi_size": "@patch_size"},
            {"_target_": "medkd.data.soft_labels.UnpackSoftLabeld", "soft_labels": "@soft_labels"},
            {"_target_": "RandFlipd", **MOVED, "prob": 0.5, "spatial_axis": 0},
            {"_target_": "RandGaussianNoised", "keys": "image", "std": 0.1, "prob": 0.7},
        ],
        "train#inferer": {"_target_": "SimpleInferer"},
        "train#postprocessing": {"_target_": "Compose", "transforms": []},
        "train#key_metric": None,
        "train#trainer#epoch_length": None,
        "validate#inferer": WINDOWS,
        "validate#postprocessing": {"_target_": "Compose", "transforms": [KNOWN, ONE_HOT]},
        "validate#key_metric": {"val_mean_dice": DICE},
    },
    "evaluate": {
        "score_columns": "classes",
        "validate#postprocessing#transforms": [ONE_HOT],
        "validate#key_metric": {
            "val_mean_dice": DICE,
            "val_assd": {
                "_target_": "medkd.metrics.surface.AverageSurfaceDistance",
                "output_transform": "@pred_and_label",
            },
        },
    },
    "inference": {
        "out_channels": 2,
        "patch_size": [8, 8],
        "overlap": 0.25,
        "network_def": STUDENT,
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{**step, "keys": "image"} for step in (*LOAD, ENSURE)],
        },
        "inferer": {**WINDOWS, "overlap": "@overlap"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "output_dtype": "uint8",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
    },
}

# files that the skeleton does not have
OWN_FILES: dict[str, Config] = {
    "teacher": {
        "ckpt_dir": "$os.path.dirname(@teacher_path)",
        "output_dir": "$@bundle_root + '/runs/teacher/eval'",
        "epochs": 12,
        "network_def": "$@teacher_def()",
        "distill_weights": {},
    },
    "baseline": {
        "ckpt_dir": "$@bundle_root + '/runs/baseline'",
        "output_dir": "$@bundle_root + '/runs/baseline/eval'",
        "distill_weights": {},
    },
    "logits": {
        "ckpt_dir": "$@bundle_root + '/runs/logits'",
        "output_dir": "$@bundle_root + '/runs/logits/eval'",
        "distill_weights": {"logits": 1.0},
    },
    "features": {
        "ckpt_dir": "$@bundle_root + '/runs/features'",
        "output_dir": "$@bundle_root + '/runs/features/eval'",
        "distill_weights": {"features": 1.0},
    },
    "smoke": {
        "ckpt_dir": "$@bundle_root + '/runs/smoke'",
        "output_dir": "$@bundle_root + '/runs/smoke/eval'",
        "epochs": 1,
        "teacher_check": {"metric": "val_mean_dice", "mode": "warn"},
    },
    "metadata": {
        "version": "0.1.0",
        "changelog": {"0.1.0": "first version"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in PACKAGES},
        "name": "Bright squares",
        "task": "Segmentation of bright squares",
        "network_data_format": {
            "inputs": {"image": CHANNEL | {"format": "magnitude", "channel_def": {"0": "image"}}},
            "outputs": {
                "pred": CHANNEL | {
                    "format": "probability",
                    "num_channels": 2,
                    "channel_def": {"0": "background", "1": "square"},
                },
            },
        },
    },
}


def write_toy_bundle(folder: Path, own: Mapping[str, Config] | None = None) -> Path:
    """Write the bundle: the skeleton with own values, a student of random weights.

    Args:
        folder: where it goes; usually `bundles/NAME` below the root that `sync_bundles` is given.
        own: file -> path -> value, in place of or beyond OWN_VALUES and OWN_FILES; a path of the skeleton ends in
            `#<more>` where any number of own items or keys may stand, and another path is a key of the bundle's own.

    Returns:
        The folder.
    """
    own = own or {}
    for part in ("configs", "docs", "models", "scripts"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for file in (file for file in sorted((ROOT / "ci/skeleton").glob("*")) if file.is_file()):
        target = folder / "configs" / file.name
        if file.suffix == ".json":
            skeleton = json.loads(file.read_text())
            values = {**OWN_VALUES.get(file.stem, {}), **own.get(file.stem, {})}
            target.write_text(format_json.dumps(fill(skeleton, values)))
        else:
            shutil.copy(file, target)
    for name, content in OWN_FILES.items():
        (folder / f"configs/{name}.json").write_text(format_json.dumps({**content, **own.get(name, {})}))
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "docs/README.md").write_text("# Bright squares\n")
    (folder / "scripts/networks.py").write_text(
        f"import torch\nfrom torch import Tensor, nn\n\n\n{inspect.getsource(toys.ToyNetwork)}"
    )
    for source, copy in sync_bundles.shared_scripts(folder / "scripts", ROOT / "common/medkd"):
        shutil.copy(source, copy)
    torch.save(toys.student().state_dict(), folder / "models/model.pt")
    return folder


def fill(skeleton: Config, own: Mapping[str, Any]) -> Config:
    """Put own values into a skeleton; those that it has no place for become keys of the bundle's own."""
    left = dict(own)
    filled: Config = _filled(skeleton, left, "")
    for path, value in left.items():
        *parents, last = path.split("#") if path not in filled else [path]
        node = filled
        for part in parents:
            node = node[part]
        node[last] = value
    return filled


def _filled(node: Any, own: Config, path: str) -> Any:
    """What stands at this path; takes the values that it uses out of `own`."""
    if path in own or node == OWN:
        return own.pop(path)
    if isinstance(node, dict) and set(node) == {OWN}:
        return node[OWN]
    if isinstance(node, dict):
        filled: Config = {}
        for key, value in node.items():
            at = f"{path}#{key}" if path else key
            filled |= own.pop(at, {}) if key == MORE else {key: _filled(value, own, at)}
        return filled
    if isinstance(node, list):
        items: list[Any] = []
        for index, item in enumerate(node):
            at = f"{path}#{MORE if item == MORE else index}"
            items += own.pop(at, []) if item == MORE else [_filled(item, own, at)]
        return items
    return node


def write_toy_data(folder: Path) -> Path:
    """Write bright squares as NIfTI slices of 12 x 12 pixels, with a datalist; each has a `teacher_image` too."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(enumerate(toys.cases(sum(LISTS.values()))))
    content = {name: [_write_case(folder, *next(numbers)) for _ in range(count)] for name, count in LISTS.items()}
    (folder / "datalist.json").write_text(json.dumps({**content, "labels": {"0": "background", "1": "square"}}))
    return folder


def _write_case(folder: Path, number: int, case: Mapping[str, torch.Tensor]) -> dict[str, str]:
    affine = np.diag([2.0, 3.0, 1.0, 1.0])
    for key, value in case.items():
        pixels = value[0].numpy().astype(np.uint8 if key == "label" else np.float32)
        nibabel.save(nibabel.Nifti1Image(pixels, affine), folder / f"{number}_{key}.nii.gz")
    return {key: f"{number}_{key}.nii.gz" for key in case}
