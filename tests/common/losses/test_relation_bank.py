# SPDX-License-Identifier: Apache-2.0
"""The memory of past images: first in, first out, drawn before it is filled, resumed as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medkd.losses.relation_bank import RelationBank


def images(*numbers: float) -> Tensor:
    """Moments of 1 x 1 that say which image they are of."""
    return torch.tensor(numbers).reshape(-1, 1, 1)


def fill(bank: RelationBank, *numbers: float, with_instances: bool = True) -> None:
    bank.enqueue(images(*numbers), images(*numbers) * 10, torch.full((len(numbers),), with_instances))


def kept(bank: RelationBank) -> list[float]:
    return sorted(bank.voxel_moments.flatten()[: len(bank)].tolist())


def test_nothing_is_drawn_before_there_is_anything() -> None:
    assert RelationBank(1).draw() == (None, None)


def test_32_images_are_kept_and_12_drawn_unless_told_otherwise() -> None:
    bank = RelationBank(1)
    assert (len(bank.voxel_moments), bank.sample) == (32, 12)


def test_the_oldest_images_give_way() -> None:
    bank = RelationBank(1, capacity=3, sample=3)
    for number in range(1, 8, 2):
        fill(bank, number, number + 1)
        assert len(bank) == min(number + 1, 3)
    assert kept(bank) == [6, 7, 8]
    fill(bank, *range(20, 30))                                     # more at once than there is room for
    assert kept(bank) == [27, 28, 29]
    fill(bank, 30)
    assert kept(bank) == [28, 29, 30]


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (4, 4), (9, 4)])
def test_a_draw_is_a_mean_over_as_many_images_as_there_are_up_to_the_sample(count: int, drawn: int) -> None:
    bank = RelationBank(1, capacity=8, sample=4)
    for number in range(count):
        fill(bank, 2.0**number)
    voxels, instances = bank.draw()
    assert voxels is not None
    assert instances is not None
    assert bin(round(voxels.item() * drawn)).count("1") == drawn   # a sum of different powers of two
    assert instances.item() == pytest.approx(10 * voxels.item())


def test_draws_are_uniform_and_never_touch_the_global_generator() -> None:
    bank = RelationBank(1, capacity=6, sample=2)
    fill(bank, *(2.0**number for number in range(6)))
    state = torch.get_rng_state()
    counts = torch.zeros(6)
    for step in range(3000):
        bank.seen.fill_(6 * (step + 1))
        voxels, _ = bank.draw()
        assert voxels is not None
        for number in range(6):
            counts[number] += round(voxels.item() * 2) >> number & 1
    assert torch.equal(torch.get_rng_state(), state)
    assert (counts / 1000 - 1).abs().max() < 0.15                  # 5 standard deviations


def test_images_without_instances_do_not_thin_out_the_relations_to_instances() -> None:
    bank = RelationBank(1, capacity=4, sample=4)
    fill(bank, 1.0, 3.0)
    fill(bank, 100.0, with_instances=False)
    _, instances = bank.draw()
    assert instances is not None
    assert instances.item() == 20
    only = RelationBank(1)
    fill(only, 1.0, with_instances=False)
    voxels, instances = only.draw()
    assert voxels is not None
    assert instances is None


def test_a_resumed_bank_draws_as_the_first_one_would_have() -> None:
    first, second = (RelationBank(1, capacity=5, sample=2, seed=3) for _ in range(2))
    fill(first, 1, 2, 3, 4, 5, 6)
    second.load_state_dict(first.state_dict())
    for number in (7, 8, 9):
        for bank in (first, second):
            fill(bank, number)
        assert [one.item() for one in first.draw() if one is not None] == [
            one.item() for one in second.draw() if one is not None
        ]


def test_nothing_in_it_has_a_gradient() -> None:
    bank = RelationBank(1, capacity=2, sample=1)
    moments = images(1.0, 2.0).requires_grad_()
    bank.enqueue(moments, moments, torch.tensor([True, True]))
    voxels, instances = bank.draw()
    assert voxels is not None
    assert instances is not None
    assert not any(one.requires_grad for one in (voxels, instances))


@pytest.mark.parametrize("numbers", [(0, 4, 2), (3, 0, 1), (3, 4, 0), (3, 4, 5)])
def test_impossible_sizes_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1 and `sample` at most `capacity`"):
        RelationBank(*numbers)


def test_moments_of_another_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(B, 2, 2\), got \(1, 3, 3\)"):
        RelationBank(2).enqueue(torch.eye(3)[None], torch.eye(3)[None], torch.tensor([True]))


def test_the_seed_decides_what_is_drawn() -> None:
    draws = []
    for seed in (0, 0, 1):
        bank = RelationBank(1, capacity=30, sample=10, seed=seed)
        fill(bank, *(2.0**number for number in range(20)))
        voxels, _ = bank.draw()
        assert voxels is not None
        draws.append(voxels.item())
    assert draws[0] == draws[1] != draws[2]


def test_more_images_than_32_bits_can_count_go_on_giving_way() -> None:
    bank = RelationBank(1, capacity=3, sample=3)
    bank.seen.fill_(3 * 2**32)
    fill(bank, 1, 2, 3, 4)
    assert int(bank.seen) == 3 * 2**32 + 4
    assert kept(bank) == [2, 3, 4]


def test_moments_of_another_precision_are_kept_in_that_of_the_memory() -> None:
    bank = RelationBank(1, capacity=2, sample=1)
    bank.enqueue(images(1.0).double(), images(1.0).double(), torch.tensor([True]))
    voxels, _ = bank.draw()
    assert voxels is not None
    assert (voxels.dtype, voxels.item()) == (torch.float32, 1.0)


def test_a_memory_of_which_all_is_drawn_is_possible() -> None:
    bank = RelationBank(1, capacity=2, sample=2)
    fill(bank, 1.0, 3.0)
    voxels, _ = bank.draw()
    assert voxels is not None
    assert voxels.item() == 2
