# SPDX-License-Identifier: Apache-2.0
"""Attention maps of tapped layers for an image of any size: where a layer's activations are large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from medkd.data.grid import free_memory
from medkd.ops.attention import attention_map
from medkd.ops.resample import resize_linearly
from medkd.outputs import plain_tensor
from medkd.taps import FeatureTaps

__all__ = ["attention_maps", "normalized"]

_OVERLAP = 0.25       # of windows; maps are looked at, not scored
_SHARE = 0.25         # of the free memory that maps may take


def normalized(attention: Tensor) -> Tensor:
    """Divide a map by its L2 norm, and multiply by the root of its size: 1 is its quadratic mean, on any grid.

    A map of zeros stays as it is; so does its last bit below 1e-12 of a norm.

    Example:
        >>> normalized(torch.tensor([3.0, 4.0, 0.0, 0.0])).tolist()
        [1.2000000476837158, 1.600000023841858, 0.0, 0.0]
    """
    norm = torch.linalg.vector_norm(attention.double()).clamp(min=1e-12)
    scale: Tensor = attention.numel() ** 0.5 / norm
    return (attention.double() * scale).float()


def attention_maps(
    network: nn.Module, image: Tensor, paths: Sequence[str], window: Sequence[int], exponent: float = 4.0,
    batch: int = 1,
) -> Iterator[tuple[str, Tensor]]:
    """Attention maps on the grid of an image, one layer after the other.

    The network runs on windows, as in inference. A window's maps are scaled to the window's size and blended with those
    of its neighbors, which needs no normalization, as they are of one layer; the whole map is normalized in the end.
    As many layers are done at once as a quarter of the free memory holds. A network of slices sees those of a volume
    along its last axis.

    Args:
        network: in eval mode.
        image: shape (1, C, *S).
        paths: of layers, as `FeatureTaps` takes them.
        window: voxels per axis that the network works on; one less than the image has for a network of slices.
        exponent: of the attention maps, at least 1.
        batch: windows per forward pass.

    Yields:
        Path, and its map (*S), float32, see `normalized`.
    """
    plain = plain_tensor(image)
    cost = 8 * plain[0, 0].numel()                                 # a float32 of a map, and of its weights
    is_sliced = len(window) == plain.dim() - 3
    size = [*window, 1] if is_sliced else window
    most = max(int(_SHARE * min(free_memory(), 1e15) / cost), 1)
    for start in range(0, len(paths), most):
        chosen = paths[start : start + most]
        taps = FeatureTaps(network, chosen, "network")

        def look(windows: Tensor, taps: FeatureTaps = taps) -> Tensor:
            seen = windows.squeeze(-1) if is_sliced else windows
            taps.open()
            network(seen)
            maps = (attention_map(features, exponent) for features in taps.close().values())
            found = torch.cat([resize_linearly(one, seen.shape[2:]) for one in maps], 1)   # (b, layers, *window)
            return found.unsqueeze(-1) if is_sliced else found

        try:
            with torch.no_grad():
                maps = sliding_window_inference(plain, size, batch, look, _OVERLAP, mode="gaussian")
        finally:
            taps.remove()
        assert isinstance(maps, Tensor)   # noqa: S101 - for mypy: one tensor comes back where one is given
        for number, path in enumerate(chosen):
            yield path, normalized(maps[0, number]).cpu()
