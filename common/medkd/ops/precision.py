# SPDX-License-Identifier: Apache-2.0
"""The precision that ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(values: Tensor) -> Tensor:
    """Widen to float32 what is narrower, as differences of nearly equal vectors vanish in half precision.

    Args:
        values: any shape and type.

    Returns:
        float64 as it is, all else as float32.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values if values.dtype == torch.float64 else values.float()
