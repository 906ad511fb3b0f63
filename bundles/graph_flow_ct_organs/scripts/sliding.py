# SPDX-License-Identifier: Apache-2.0
"""MONAI's sliding window, without windows that torch convolves slowly."""

from __future__ import annotations

from functools import partial
from typing import Any

from monai.inferers import SlidingWindowInferer
from torch import Tensor

from .lone_volume import run_lone_twice

__all__ = ["QuickSlidingWindowInferer"]


class QuickSlidingWindowInferer(SlidingWindowInferer):
    """MONAI's `SlidingWindowInferer`; a window that is left alone goes to the network twice where that is quicker.

    The last window of a volume, or a volume that is one window, took a small student twice as long as two windows.
    Arguments and results are those of MONAI's, but for the last digits. With an `sw_batch_size` of 1, for the least
    memory, windows stay alone.

    Example:
        >>> import torch
        >>> inferer = QuickSlidingWindowInferer(roi_size=(16, 16, 16), sw_batch_size=2)
        >>> inferer(torch.zeros(1, 1, 16, 16, 16), torch.nn.Conv3d(1, 4, 3, padding=1)).shape
        torch.Size([1, 4, 16, 16, 16])
    """

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network on windows of images (B, C, *S)."""
        quick = partial(run_lone_twice, network) if self.sw_batch_size > 1 else network
        return super().__call__(inputs, quick, *args, **kwargs)
