# SPDX-License-Identifier: Apache-2.0
"""Torch convolves a lone volume of few channels slowly on a CPU: it is given to the network twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_slow_alone", "run_lone_twice"]

_SLOW = 20480              # up to this many channels x planes x rows of one volume torch takes `slow_conv3d`
_CHANNELS = 4              # of the first level of a network that cannot be looked into


def run_lone_twice(network: Callable[..., Tensor], windows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a network on windows (B, C, *S); on a lone volume twice at once, where that takes less time.

    A convolution of a batch of two is then up to ten times as fast as one of a single volume. The result differs in the
    last digits only.

    Args:
        network: gives a tensor (B, ...).
        windows: its input.
        args: further arguments of the network.
        kwargs: further arguments of the network.

    Example:
        >>> run_lone_twice(nn.Conv3d(1, 4, 3), torch.zeros(1, 1, 8, 8, 8)).shape
        torch.Size([1, 4, 6, 6, 6])
    """
    if not is_slow_alone(network, windows):
        return network(windows, *args, **kwargs)
    return network(windows.expand(2, *[-1] * 4), *args, **kwargs)[:1]


def is_slow_alone(network: Callable[..., Tensor], windows: Tensor) -> bool:
    """Whether windows are a lone volume that torch convolves slowly at the network's first level.

    Deeper levels have more channels and fewer voxels, so that they matter less or are alike.
    """
    precise = windows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if windows.dim() != 5 or len(windows) != 1 or windows.device.type != "cpu" or not precise:
        return False
    modules = network.modules() if isinstance(network, nn.Module) else ()
    first = next((module for module in modules if isinstance(module, nn.Conv3d)), None)
    channels, strides = (_CHANNELS, (1, 1)) if first is None else (first.out_channels, first.stride[:2])
    return channels * math.prod(size // step for size, step in zip(windows.shape[2:4], strides, strict=True)) <= _SLOW
