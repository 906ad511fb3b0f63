# SPDX-License-Identifier: Apache-2.0
"""Ignored voxels for metrics of classes that do not know of them, such as MONAI's."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from medkd.ops.ignored import is_ignored, is_without_label

__all__ = ["IgnoredAsBackgroundd"]

Prediction = Literal["logits", "regions", "classes"]
_CERTAIN = 1e4                                                     # also in half precision


class IgnoredAsBackgroundd(MapTransform):
    """Make background of ignored voxels, in the label and in the prediction alike, so that they count in no class.

    A case without a label (`medkd.ops.ignored.UNLABELED`) keeps its prediction, and its label becomes 0 everywhere:
    what it is to be measured against, such as the teacher's prediction, has to be put there by whoever wants a value.

    Place it first in the postprocessing, before `AsDiscreted`, which cannot read a negative label. Metrics that count
    the background (`include_background`) would count these voxels as agreement.

    Args:
        keys: predictions of shape (K, *S).
        label_key: label of shape (1, *S) or, of regions, (K, *S); negative where a voxel is ignored. It may be absent.
        kind: what the predictions are: `logits`, of which channel 0 is background (a single channel is that of a
            sigmoid), logits of `regions`, none of which is background, or `classes`, numbers in a single channel.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: unknown kind.

    Example:
        >>> data = {"pred": torch.tensor([[0.0, 0.0], [3.0, 3.0]]), "label": torch.tensor([[1, -1]])}
        >>> {key: value.argmax(0).tolist() for key, value in IgnoredAsBackgroundd()(data).items() if key == "pred"}
        {'pred': [1, 0]}
    """

    def __init__(
        self, keys: KeysCollection = "pred", label_key: str = "label", kind: Prediction = "logits",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if kind not in get_args(Prediction):
            raise ValueError(f"`kind` must be one of {get_args(Prediction)}, got {kind!r}.")
        self.label_key = label_key
        self.kind: Prediction = kind

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data`, with the tensors themselves where no voxel is ignored."""
        result = dict(data)
        label = result.get(self.label_key)
        if not isinstance(label, Tensor):
            return result
        if is_without_label(label):
            result[self.label_key] = torch.zeros_like(label)
            return result
        ignored = is_ignored(label).any(0)                         # (*S)
        if not bool(ignored.any()):
            return result
        result[self.label_key] = label.masked_fill(ignored, 0)
        for key in self.key_iterator(result):
            pred: Tensor = result[key]
            if pred.shape[1:] != label.shape[1:]:
                raise ValueError(
                    f"`{key}` must have the size of the label {tuple(label.shape[1:])} where voxels are ignored, got "
                    f"{tuple(pred.shape[1:])}; place this where both are on one grid."
                )
            result[key] = pred.masked_fill(ignored.to(pred.device), 0 if self.kind == "classes" else -_CERTAIN)
            if self.kind == "logits" and len(pred) > 1:
                result[key][0].masked_fill_(ignored.to(pred.device), _CERTAIN)
        return result
