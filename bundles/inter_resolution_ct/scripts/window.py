# SPDX-License-Identifier: Apache-2.0
"""Say when an image hardly has values where a network looks for them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["TellWindowd"]

_LEAST = 0.02                         # share of the voxels, and of the window, as `medkd check-data` has it
logger = logging.getLogger(__name__)


class TellWindowd(MapTransform):
    """Log a warning where a window makes an image nearly constant: CT scaled to 0..1, or without its offset.

    Training refuses such files; a prediction may be asked for all the same, of air, say.

    Args:
        keys: images of shape (C, *S), before the window is applied; they stay as they are.
        window: lowest and highest value that the network tells apart.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(self, keys: KeysCollection, window: Sequence[float], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.low, self.high = float(window[0]), float(window[1])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data`."""
        result = dict(data)
        for key in self.key_iterator(result):
            values = torch.as_tensor(result[key])
            inside = values[(values > self.low) & (values < self.high)]
            spread = float(inside.max() - inside.min()) / (self.high - self.low) if inside.numel() else 0.0
            if inside.numel() < _LEAST * values.numel() or spread < _LEAST:
                name = getattr(result[key], "meta", {}).get("filename_or_obj", key)
                logger.warning(
                    "%s is nearly constant within %g..%g, where the network looks: its values are %g to %g. Give it in "
                    "the scale of the training data (HU for CT), or the prediction means nothing.",
                    name, self.low, self.high, float(values.min()), float(values.max()),
                )
        return result
