# SPDX-License-Identifier: Apache-2.0
"""Affinities of embeddings against those that the losses train with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medkd.inference.affinities import EmbeddingAffinity, direct_affinity, embedding_affinity, output_head
from medkd.ops.embedding import offset_affinity

PLANE = [[-1, 0], [0, -1], [-3, 0], [0, -3], [-5, 0], [0, -5], [-9, 0], [0, -9], [-27, 0], [0, -27]]
SPACE = [
    [-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -3, 0], [0, 0, -3],
    [-3, 0, 0], [0, -9, 0], [0, 0, -9], [-4, 0, 0], [0, -27, 0], [0, 0, -27],
]


@pytest.mark.parametrize(
    ("size", "offsets"),
    [
        *((size, offsets) for size in ((30, 31), (1, 1), (9, 27), (4, 40))
          for offsets in (PLANE, [[4, 0], [3, -2], [-1, 5]], [[0, 60]])),
        *((size, offsets) for size in ((5, 30, 31), (1, 1, 1), (3, 9, 27), (4, 4, 40))
          for offsets in (SPACE, [[4, 0, 0], [0, 3, -2], [-1, 1, 5]], [[0, 0, 60]])),
    ],
)
def test_affinity_is_the_one_of_training_without_the_negative(size: tuple[int, ...], offsets: list[list[int]]) -> None:
    embedding = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    embedding[(0, slice(None), *[0] * (len(size) - 1))] = 0.0      # embeddings without a length
    expected = offset_affinity(embedding, offsets).clamp(0, 1)
    torch.testing.assert_close(embedding_affinity(embedding, offsets), expected)
    torch.testing.assert_close(torch.jit.script(embedding_affinity)(embedding, offsets), expected)


def test_foreground_is_what_points_away_from_the_first_axis() -> None:
    embedding = torch.tensor([[[[2.0, 0.0, -1.0, 3.0]], [[0.0, 5.0, 0.0, 4.0]]]])   # (1, 2, 1, 4)
    affinity = embedding_affinity(embedding, [[0, -1]], foreground=True)
    torch.testing.assert_close(affinity[0, :, 0], torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.4]]))


@pytest.mark.parametrize("size", [(1, 2), (1, 1, 2)])
def test_affinity_of_half_precision_is_computed_in_single(size: tuple[int, ...]) -> None:
    embedding = torch.full((1, 16, *size), 200.0, dtype=torch.float16)   # its squares are no halves
    affinity = embedding_affinity(embedding, [[*[0] * (len(size) - 1), -1]])
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity.flatten(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("offset", [[1, -1], [0, 1, -1]])
def test_affinity_leaves_its_input(offset: list[int]) -> None:
    embedding = torch.randn(1, 3, *(2, 3, 4)[-len(offset):])
    before = embedding.clone()
    EmbeddingAffinity([offset], spatial_dims=len(offset))(embedding)
    assert torch.equal(embedding, before)


@pytest.mark.parametrize("foreground", [False, True])
def test_head_of_a_network_gives_the_output_that_is_asked_for(foreground: bool) -> None:
    embedding = torch.randn(1, 3, 4, 5)
    head = output_head("affinity", PLANE[:2], 2, foreground)
    assert torch.equal(head(embedding), embedding_affinity(embedding, PLANE[:2], foreground))
    assert not head.state_dict()
    for offsets in (None, PLANE[:2]):
        assert output_head("embedding", offsets, 2, foreground)(embedding) is embedding


def test_a_direct_head_gives_the_first_channels_and_the_last() -> None:
    logits = torch.randn(2, 5, 4, 6)
    chances = logits.sigmoid()
    torch.testing.assert_close(output_head("direct_affinity", PLANE[:2], 2)(logits), chances[:, :2])
    head = output_head("direct_affinity", PLANE[:2], 2, foreground=True)
    torch.testing.assert_close(head(logits), chances[:, [0, 1, 4]])
    torch.testing.assert_close(torch.jit.script(head)(logits), chances[:, [0, 1, 4]])
    assert not head.state_dict()
    half = direct_affinity(logits.half(), 2)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="`offsets` must be given for the output 'direct_affinity', got None"):
        output_head("direct_affinity", None, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "mask"}, r"`output` must be one of \['embedding', 'affinity', 'direct_affinity'\], got 'mask'"),
        ({"offsets": None}, "`offsets` must be given for the output 'affinity', got None"),
        ({"offsets": []}, r"`offsets` must be vectors of 2 whole numbers, not all 0, got \[\]"),
        ({"offsets": [[0, -1, 0]]}, r"`offsets` must be vectors of 2 whole numbers, not all 0, got \[\[0, -1, 0\]\]"),
        ({"offsets": [[0, -1]], "spatial_dims": 3}, r"vectors of 3 whole numbers, not all 0, got \[\[0, -1\]\]"),
        ({"offsets": [[0, 0]]}, "`offsets` must be vectors of 2 whole numbers, not all 0"),
        ({"offsets": [[0, 0, 0]], "spatial_dims": 3}, "`offsets` must be vectors of 3 whole numbers, not all 0"),
        ({"offsets": [[0.5, 0]]}, "`offsets` must be vectors of 2 whole numbers, not all 0"),
        ({"output": "embedding", "offsets": [[0.5, 0]]}, "`offsets` must be vectors of 2 whole numbers, not all 0"),
    ],
)
def test_outputs_and_offsets_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_head(**({"output": "affinity", "offsets": PLANE, "spatial_dims": 2} | options))
