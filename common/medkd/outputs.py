# SPDX-License-Identifier: Apache-2.0
"""The one tensor that a network gives: of deep supervision the full-resolution head, of anything else a sentence."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MainOutput", "plain_tensor"]

logger = logging.getLogger(__name__)


def plain_tensor(value: Tensor) -> Tensor:
    """Strip the metadata of a MONAI `MetaTensor`; the values and the graph stay."""
    return value.as_subclass(Tensor) if type(value) is not Tensor else value


class MainOutput:
    """Takes the one tensor out of what a network or a layer gives, and says once when it had a choice.

    A tensor is taken as it is. Of a list or tuple, nested or not, whose maps have one number of channels (the heads of
    deep supervision), the one of the largest size is taken, of equal ones the first. An output that was made under
    `torch.inference_mode` is copied, as a loss could not read it.

    Args:
        source: what gives it, for messages.
        way_out: what to do about any other output, for messages.
        equal_heads: False refuses a list whose largest maps are several: layers give such for other reasons.

    Example:
        >>> heads = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8)]
        >>> tuple(MainOutput("The teacher", "return one tensor")(heads).shape)
        (1, 2, 8, 8)
    """

    def __init__(self, source: str, way_out: str, equal_heads: bool = True) -> None:
        self.source = source
        self.way_out = way_out
        self.equal_heads = equal_heads
        self._is_told = False

    def __call__(self, output: Any, axes: int | None = None) -> Tensor:
        """Give the tensor, without MONAI's metadata.

        Args:
            output: of a network or layer.
            axes: dimensions of the image; a tensor of more has its heads stacked along one of them.

        Raises:
            TypeError: neither a tensor nor heads with one number of channels.
            ValueError: heads that are stacked in one tensor.
        """
        tensor = output if isinstance(output, Tensor) else self._full_resolution(output)
        if axes is not None and tensor.dim() > axes:
            raise ValueError(
                f"{self.source} must give maps of {axes} dimensions, like the image, got {tuple(tensor.shape)}; if "
                "axis 1 stacks the heads of deep supervision (DynUNet), set `deep_supervision` to false, or unbind "
                "them in `forward`: a list of heads is understood."
            )
        tensor = plain_tensor(tensor)
        if tensor.is_inference():
            with torch.inference_mode(False):                      # also where the layer itself runs under it
                tensor = tensor.clone()
        return tensor

    def _full_resolution(self, output: Any) -> Tensor:
        maps = [value for value in _flat(output) if isinstance(value, Tensor) and value.dim() > 2]
        are_heads = len({(value.dim(), value.shape[1]) for value in maps}) == 1
        sizes = sorted(math.prod(value.shape[2:]) for value in maps)
        if not are_heads or not (self.equal_heads or sizes[-1:] > sizes[-2:-1]):
            raise TypeError(
                f"{self.source} must give one tensor, got {_described(output)}; {self.way_out}. A list is understood "
                "when all its maps have one number of channels, as the heads of deep supervision have."
            )
        chosen = max(maps, key=lambda value: math.prod(value.shape[2:]))   # the first of equal ones
        if len(maps) > 1 and not self._is_told:
            self._is_told = True
            shapes = ", ".join(str(tuple(value.shape)) for value in maps)
            logger.info(
                "%s gives %d maps (%s): the one of full resolution is taken, %s.",
                self.source, len(maps), shapes, tuple(chosen.shape),
            )
        return chosen


def _flat(output: Any) -> Iterator[Any]:
    if not isinstance(output, (list, tuple)):
        yield output
        return
    for part in output:
        yield from _flat(part)


def _described(output: Any) -> str:
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"{name} with the keys {list(output)}"
    if isinstance(output, (list, tuple)):
        parts = [str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in _flat(output)]
        return f"{name} of {', '.join(parts) or 'nothing'}"
    return name
