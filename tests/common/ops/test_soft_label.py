# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from medkd.ops.soft_label import complete, pack_probabilities, unpack_probabilities


def certain(seed: int, classes: int = 7) -> torch.Tensor:
    """Logits as of a trained network, from certain to undecided."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, 5000, generator=generator) * torch.linspace(0.1, 8.0, 5000)


def test_probabilities_come_back_to_a_hundredth() -> None:
    given = certain(0).softmax(0)
    found = unpack_probabilities(pack_probabilities(given))
    assert (found - given).abs().max() < 0.01
    assert torch.allclose(found.sum(0), torch.ones(5000))


def test_tails_keep_their_odds() -> None:
    """A temperature of 2 takes roots, so what is small matters."""
    given = certain(1).softmax(0)
    found = unpack_probabilities(pack_probabilities(given))
    seen = given > 1e-5
    assert ((found.log() - given.log()).abs()[seen] < 0.07).all()


@pytest.mark.parametrize("classes", [1, 3])
def test_regions_come_back_on_both_sides(classes: int) -> None:
    given = certain(2, classes).sigmoid()
    found = unpack_probabilities(pack_probabilities(given, "sigmoid"), "sigmoid")
    assert (found - given).abs().max() < 0.01
    inside = given.logit().abs() < 14.0
    difference = (found.logit() - given.logit()).abs() / given.logit().abs().clamp(min=1.0)
    assert (difference[inside] < 0.07).all()


def test_hard_classes_stay_where_the_teacher_is_not_undecided() -> None:
    given = certain(3).softmax(0)
    found = unpack_probabilities(pack_probabilities(given))
    two = given.topk(2, dim=0).values
    sure = two[0] - two[1] > 0.02
    assert torch.equal(found.argmax(0)[sure], given.argmax(0)[sure])


def test_padding_becomes_background() -> None:
    packed = pack_probabilities(torch.full((4, 3), 0.25))
    packed[:, 1] = 0
    assert unpack_probabilities(packed)[:, 1].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_what_lacks_goes_to_the_background() -> None:
    half = torch.tensor([[[0.1, 0.0]], [[0.4, 0.0]], [[0.0, 0.0]]])[None]         # (1, 3, 1, 2)
    found = complete(half)
    assert torch.allclose(found, torch.tensor([[[0.6, 1.0]], [[0.4, 0.0]], [[0.0, 0.0]]])[None])
    assert half[0, 0, 0, 0] == pytest.approx(0.1)                  # the input stays as it is
