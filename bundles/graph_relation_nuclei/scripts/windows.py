# SPDX-License-Identifier: Apache-2.0
"""Sliding window for affinities, also of networks whose result is smaller than their input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type
from torch import Tensor
from tqdm import tqdm

from .affinities import direct_affinity, embedding_affinity
from .lone_volume import run_lone_twice

__all__ = ["AffinityInferer"]

Blending = Literal["constant", "gaussian"]


class AffinityInferer(Inferer):
    """Blend affinities of overlapping windows; embeddings of two windows are not comparable and are never blended.

    The image is extended by `margin`, and to whole windows, by reflection, or by repeating its border where an axis is
    too short for that. In a window a pair of voxels counts only if both are in it, so the first planes of each negative
    offset have weight 0. The step is made so small that every pair inside the image is whole in some window; pairs that
    leave the image have affinity 0.

    Args:
        roi_size: input of the network, voxels per axis; the largest one, with `strides`.
        offsets: of the affinities, in the order of the channels.
        from_embedding: the network gives embeddings, as it does in training; False: it gives affinities.
        from_logits: the network gives logits of affinities, as one does in the training of `DirectAffinityLoss`, of
            these offsets first.
        foreground: the last channel, behind the affinities, is the probability of foreground.
        margin: voxels per axis that the network loses on each side; None for none.
        alignment: windows start at multiples of this, voxels per axis. A network that pools gives the same result in
            windows that are shifted by multiples of its strides; with "valid" convolutions the result is then that of
            the whole image at once. None for 1.
        strides: of the network, voxels per axis. Windows are smaller than `roi_size` by as many of these as leaves an
            image covered by as many windows, so that little is computed outside of it. None: always `roi_size`.
        overlap: share of the (output) window that at least overlaps with the next one.
        sw_batch_size: windows per forward pass. With more than 1 no volume is left alone, as torch may convolve a
            single volume more than ten times as slowly on a CPU: the last pass has one more, and where a small volume
            is one window, that is computed twice if the network has few channels, see `run_lone_twice`.
        mode: weights of a window, `gaussian` or `constant`.
        progress: show a bar.

    Raises:
        ValueError: unknown mode; sizes of another rank; no offsets, or one that is not inside a window; an overlap or a
            batch that cannot be; a network that gives another shape than promised.

    Reference:
        Liu et al., arXiv 2401.06370; its code overwrites windows and repeats their first planes, which is not followed.
    """

    constants = (0.0, 1.0)                                         # for the check of the teacher

    def __init__(   # noqa: PLR0913 - options of a config, each with a default
        self,
        roi_size: Sequence[int],
        offsets: Sequence[Sequence[int]],
        from_embedding: bool = False,
        from_logits: bool = False,
        foreground: bool = False,
        margin: Sequence[int] | None = None,
        alignment: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        mode: Blending = "gaussian",
        progress: bool = False,
    ) -> None:
        super().__init__()
        rank = len(roi_size)
        self.roi_size = list(roi_size)
        self.offsets = [list(offset) for offset in offsets]
        self.from_embedding = from_embedding
        self.from_logits = from_logits
        self.foreground = foreground
        self.channels = len(self.offsets) + int(foreground)
        self.margin = [0] * rank if margin is None else list(margin)
        self.alignment = [1] * rank if alignment is None else list(alignment)
        self.strides = None if strides is None else list(strides)
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.mode = mode
        self.progress = progress
        self._check()

    def _check(self) -> None:
        rank = len(self.roi_size)
        if self.mode not in get_args(Blending):
            raise ValueError(f"`mode` must be one of {get_args(Blending)}, got {self.mode!r}.")
        if not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"`overlap` must be a share of at least 0 and below 1, got {self.overlap}.")
        if self.sw_batch_size < 1:
            raise ValueError(f"`sw_batch_size` must be at least 1, got {self.sw_batch_size}.")
        told = [self.margin, self.alignment, *([] if self.strides is None else [self.strides])]
        if not self.offsets or any(len(one) != rank for one in (*told, *self.offsets)):
            raise ValueError(
                f"`offsets`, at least one, `margin`, `alignment` and `strides` must have {rank} axes, as `roi_size` "
                f"has, got {self.offsets}, {self.margin}, {self.alignment} and {self.strides}."
            )
        if self.strides is not None and min(self.strides) < 1:
            raise ValueError(f"`strides` must be at least 1, got {self.strides}.")
        self.window = [size - 2 * lost for size, lost in zip(self.roi_size, self.margin, strict=True)]   # the largest
        self.reach = [max(abs(offset[axis]) for offset in self.offsets) for axis in range(rank)]
        if any(self._step(size, axis) > size - self.reach[axis] for axis, size in enumerate(self.window)):
            raise ValueError(
                f"`roi_size` must leave windows that are larger than the offsets {self.reach} by `alignment` "
                f"{self.alignment}, got windows of {self.window}; take larger ones or shorter offsets."
            )

    def _step(self, window: int, axis: int) -> int:
        """From one window to the next, so that every pair is whole in some window, if that can be."""
        wanted = min(int(window * (1 - self.overlap)), window - self.reach[axis])
        return max(wanted, 1) // self.alignment[axis] * self.alignment[axis] or self.alignment[axis]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Affinities of images.

        Args:
            inputs: shape (B, C, *S).
            network: gives embeddings (B, C, *s) or affinities (B, O, *s) of windows of at most `roi_size`.
            args: further arguments of the network.
            kwargs: further arguments of the network.

        Returns:
            Shape (B, O, *S), float32, range [0, 1]; with `foreground` one channel more. Images with metadata, by which
            `Invertd` and savers know them, give theirs.
        """
        if inputs.dim() != len(self.roi_size) + 2:
            raise ValueError(
                f"`inputs` must have shape (B, C, *S) with {len(self.roi_size)} axes in S, got {tuple(inputs.shape)}."
            )
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        size = plain.shape[2:]
        window, starts = zip(*(self._plan(length, axis) for axis, length in enumerate(size)), strict=True)
        roi = [length + 2 * lost for length, lost in zip(window, self.margin, strict=True)]
        covered = [places[-1] + length for places, length in zip(starts, window, strict=True)]
        image = _extend(plain, self.margin, [to - length for to, length in zip(covered, size, strict=True)])
        weight = self._weight(window, plain.device)
        total = torch.zeros(len(plain), self.channels, *covered, device=plain.device)
        weights = torch.zeros(1, self.channels, *covered, device=plain.device)
        places = list(product(*starts))
        for chunk in self._chunks(places):
            for sample in range(len(plain)):
                windows = torch.cat([image[sample : sample + 1][_box(place, roi)] for place in chunk])
                for place, result in zip(chunk, self._run(windows, network, *args, **kwargs), strict=True):
                    total[sample : sample + 1][_box(place, window)] += result * weight
            for place in chunk:
                weights[_box(place, window)] += weight
        result = total.div_(weights.clamp_(min=torch.finfo(torch.float32).tiny))
        result = result[_box([0] * len(size), size)]
        self._drop_leaving_pairs(result)                           # into what the image was extended by
        return convert_to_dst_type(result, inputs, dtype=result.dtype)[0]   # with the metadata of the image

    def _drop_leaving_pairs(self, maps: Tensor) -> None:
        """Set to 0, in maps (..., channels, *S), the pairs that leave them."""
        rank = len(self.roi_size)
        for channel, offset in enumerate(self.offsets):
            plane = maps.select(-rank - 1, channel)
            for axis, step in enumerate(offset, start=-rank):
                length = plane.shape[axis]
                gone = min(abs(step), length)
                plane.narrow(axis, 0 if step < 0 else length - gone, gone).zero_()

    def _plan(self, length: int, axis: int) -> tuple[int, list[int]]:
        """Length of the windows along an axis, and their starts: the least that covers it in as few windows."""
        most = self.window[axis]
        fewest = self._starts(length, axis, most)
        if self.strides is None:
            return most, fewest
        least = self.reach[axis] + self.alignment[axis]
        sizes = range(most - (most - least) // self.strides[axis] * self.strides[axis], most, self.strides[axis])
        plans = ((size, self._starts(length, axis, size)) for size in sizes)
        return next((plan for plan in plans if len(plan[1]) <= len(fewest)), (most, fewest))

    def _starts(self, length: int, axis: int, window: int) -> list[int]:
        """Starts of the windows along an axis; the last one is flush with the end if `alignment` lets it."""
        unit = self.alignment[axis]
        last = -(-max(length - window, 0) // unit) * unit
        return [*range(0, last, self._step(window, axis)), last]

    def _chunks(self, places: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        left = len(places)
        rest = iter(tqdm(places, desc="windows", disable=not self.progress, leave=False))
        while left:
            count = min(self.sw_batch_size, left)
            count += len(self.roi_size) == 3 and left - count == 1 < count   # the last one with those before it
            yield list(islice(rest, count))
            left -= count

    def _run(self, windows: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        size = [one - 2 * lost for one, lost in zip(windows.shape[2:], self.margin, strict=True)]
        if self.sw_batch_size > 1:
            result = run_lone_twice(network, windows, *args, **kwargs)
        else:
            result = network(windows, *args, **kwargs)
        if self.from_embedding:
            result = embedding_affinity(result, self.offsets, self.foreground)
        elif self.from_logits:
            result = direct_affinity(result, len(self.offsets), self.foreground)
        if list(result.shape[1:]) != [self.channels, *size]:
            raise ValueError(
                f"`network` must give {self.channels} channels of {size} voxels for windows of "
                f"{list(windows.shape[2:])}, got {list(result.shape[1:])}; see `margin`, `offsets`, `foreground`, "
                "`from_embedding` and `from_logits`."
            )
        return result.float()

    def _weight(self, window: Sequence[int], device: torch.device) -> Tensor:
        """Weights of a window, (1, channels, *window): 0 where the partner of a pair is not in it."""
        blending = compute_importance_map(tuple(window), mode=self.mode, device=device, dtype=torch.float32)
        weight = blending.expand(1, self.channels, *window).clone()
        self._drop_leaving_pairs(weight)
        return weight


def _box(place: Sequence[int], size: Sequence[int]) -> tuple[Any, ...]:
    return (..., *(slice(start, start + length) for start, length in zip(place, size, strict=True)))


def _extend(image: Tensor, margin: Sequence[int], more: Sequence[int]) -> Tensor:
    """Pad by the margin on both sides and by `more` voxels at the ends: reflected, or repeated on a short axis."""
    rank = len(margin)
    for axis in range(rank):
        before, after = margin[axis], margin[axis] + more[axis]
        if before or after:
            pad = [0] * (2 * rank)
            pad[2 * (rank - 1 - axis) : 2 * (rank - axis)] = [before, after]
            mode = "reflect" if max(before, after) < image.shape[axis + 2] else "replicate"
            image = F.pad(image, pad, mode=mode)
    return image
