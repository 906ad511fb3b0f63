# SPDX-License-Identifier: Apache-2.0
"""Classes of whole images as a table: a row per image with its class and the probability of each."""

from __future__ import annotations

import csv
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["SaveClassesd", "class_names_of"]

_FILE = "predictions.csv"


def class_names_of(datalist: str, classes: int) -> list[str]:
    """Names of the classes by the key `labels` of a datalist; their numbers where it names none.

    Args:
        datalist: the file; it may be absent.
        classes: how many there are, K.

    Raises:
        ValueError: it names others than the K classes.
    """
    numbers = list(map(str, range(classes)))
    if not os.path.isfile(datalist):
        return numbers
    from monai.bundle import ConfigParser

    labels = ConfigParser.load_config_file(datalist).get("labels") or {}
    if labels and set(labels) != set(numbers):
        raise ValueError(
            f"`labels` of {datalist} must name the classes {', '.join(numbers)}, got {', '.join(labels)}; correct "
            "them, or give `out_channels` and weights for as many classes."
        )
    return [str(labels.get(number, number)) for number in numbers]


class SaveClassesd(MapTransform):
    """Write `predictions.csv`: image, class, and a column with the probability of each class.

    The file is begun anew by the first image, and each further one is written at once.

    Args:
        keys: probabilities of the classes, shape (K,), which sum to 1.
        output_dir: folder of the file; it is made.
        class_names: names of the columns, K; None numbers them.
        image_key: image whose metadata name the file.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: probabilities of another shape, or as many names as there are not classes.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | os.PathLike[str], class_names: Sequence[str] | None = None,
        image_key: str = "image", allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.file = Path(output_dir, _FILE)
        self.class_names = None if class_names is None else list(map(str, class_names))
        self.image_key = image_key
        self._begun = False

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the row, and give a copy of `data`."""
        for key in self.key_iterator(data):
            self._write(data, torch.as_tensor(data[key]).detach().cpu())
        return dict(data)

    def _write(self, data: Mapping[Hashable, Any], scores: torch.Tensor) -> None:
        names = list(map(str, range(scores.numel()))) if self.class_names is None else self.class_names
        if scores.dim() != 1 or len(scores) != len(names):
            raise ValueError(
                f"`pred` must be the probabilities of {len(names)} classes, {', '.join(names)}, got shape "
                f"{tuple(scores.shape)}; give `class_names` for the classes of the network."
            )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a" if self._begun else "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self._begun:
                writer.writerow(["image", "class", *names])
            self._begun = True
            path = getattr(data.get(self.image_key), "meta", {}).get("filename_or_obj", "")
            writer.writerow([path, names[int(scores.argmax())], *(f"{float(score):.6f}" for score in scores)])
