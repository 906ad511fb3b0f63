# SPDX-License-Identifier: Apache-2.0
"""What a step leaves behind, in the form that MONAI's logging handlers take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["case_meta", "step_losses"]

_PREFIXES = ("kd/", "discriminator/")


def step_losses(output: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, float]:
    """Give the loss, the supervised loss, each unweighted `kd/<term>` and what a discriminator's step left behind.

    For an `output_transform`.

    Args:
        output: `engine.state.output` of a trainer, decollated or not.

    Example:
        >>> step_losses([{"loss": 1.5, "supervised_loss": 1.0, "kd/edge": 0.5, "pred": None}])
        {'kd/edge': 0.5, 'loss': 1.5, 'supervised_loss': 1.0}
        >>> step_losses({"loss": 1.5, "discriminator/loss": 2.0, "label": None})
        {'discriminator/loss': 2.0, 'loss': 1.5}
    """
    first = output if isinstance(output, Mapping) else output[0]
    names = sorted(name for name in first if name in ("loss", "supervised_loss") or name.startswith(_PREFIXES))
    return {name: float(torch.as_tensor(first[name]).detach()) for name in names}


def case_meta(batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give the metadata of each image of a decollated batch, for the `batch_transform` of `MetricsSaver`."""
    return [dict(item["image"].meta) for item in batch]
