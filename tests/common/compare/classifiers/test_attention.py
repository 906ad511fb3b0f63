# SPDX-License-Identifier: Apache-2.0
"""Maps of classes: those of the head's weight, and cells that lie where the layers read the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medkd.compare.classifiers.attention import class_maps
from medkd.ops.class_attention import class_attention
from medkd.ops.map_distance import normalized_maps


def classifier(*layers: nn.Module, channels: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(nn.Sequential(*layers), head).eval().requires_grad_(False)


def read_center(layers: nn.Module, size: tuple[int, ...], cell: tuple[int, ...]) -> list[float]:
    """The mean place of the pixels that a cell reads, all of them with weight 1: a slow, obvious way."""
    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1))
    changed = image + 5.0 * torch.eye(size[0] * size[1]).view(-1, 1, *size)        # one pixel in each
    difference = (layers(changed) - layers(image))[(slice(None), slice(None), *cell)]
    counts = (difference.abs().amax(1) > 1e-6).double().view(size).numpy()
    return [float((counts.sum(tuple(a for a in range(len(size)) if a != axis)) * np.arange(n)).sum() / counts.sum())
            for axis, n in enumerate(size)]


LAYERS = {
    "strided": [nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 2, 1)],
    "pooled": [nn.Conv2d(1, 2, 3, 1, 1), nn.AvgPool2d(2), nn.Conv2d(2, 2, 3, 1, "same"), nn.AvgPool2d(2)],
    "without padding": [nn.Conv2d(1, 2, 3, 1, "valid"), nn.Conv2d(2, 2, (3, 5), (2, 1), (1, 0))],
    "dilated": [nn.Conv2d(1, 2, 3, 2, padding=0, dilation=2)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_cells_lie_in_the_middle_of_what_they_read(name: str) -> None:
    network = classifier(*LAYERS[name], channels=2)
    size, cell = (25, 22), (2, 3)
    maps = class_maps(network, torch.rand(1, 1, *size), "0")
    found = [start + step * place for start, step, place in zip(maps.start, maps.cells, cell, strict=True)]
    assert found == pytest.approx(read_center(network[0], size, cell))


def test_cells_of_a_layer_that_is_not_understood_share_the_image() -> None:
    network = classifier(nn.Conv2d(1, 2, 3, 1, 1), nn.AdaptiveAvgPool2d((4, 2)), channels=2)
    maps = class_maps(network, torch.rand(1, 1, 12, 6), "0")
    assert (maps.cells, maps.start) == ((3.0, 3.0), (1.0, 1.0))


def test_maps_are_those_of_the_heads_weight_and_of_the_loss() -> None:
    network = classifier(nn.Conv2d(1, 4, 3, 2, 1), channels=4)      # features of both signs
    image = torch.rand(1, 1, 10, 14)
    closed = class_attention(network[0](image), network[1][2].weight)
    expected = normalized_maps(closed)[0].numpy()
    np.testing.assert_allclose(class_maps(network, image, "0").values, expected, atol=1e-6)
    assert (expected.min(), expected.max()) == (0.0, 1.0)


def test_a_layer_that_is_changed_in_place_afterwards_and_3d_are_fine() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(1, 3, 3, 2, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                           nn.Linear(3, 2)).eval()
    image = torch.rand(1, 1, 8, 6, 4)
    maps = class_maps(layers, image, "0")
    assert maps.values.shape == (2, 4, 3, 2)
    assert np.isfinite(maps.values).all()
    with torch.no_grad():                                           # as in an evaluation
        np.testing.assert_array_equal(class_maps(layers, image, "0").values, maps.values)


def test_affine_goes_from_cells_to_places() -> None:
    network = classifier(nn.Conv2d(1, 2, 3, 2, 1), channels=2)
    maps = class_maps(network, torch.rand(1, 1, 8, 8), "0")
    image = np.array([[4.0, 0, 2.5], [0, 4.0, 2.5], [0, 0, 1]])       # blocks of 4 pixels, one cut off on each side
    np.testing.assert_allclose(maps.affine(image) @ [3, 1, 1], [4 * 6 + 2.5, 4 * 2 + 2.5, 1])


def test_a_layer_that_no_score_depends_on_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.used, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Linear(2, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.idle(image)
            return self.head(self.used(image).mean((2, 3)))

    with pytest.raises(ValueError, match="must depend on|on the way to"):
        class_maps(Idle().eval().requires_grad_(False), torch.rand(1, 1, 8, 8), "idle")
