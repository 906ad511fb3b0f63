# SPDX-License-Identifier: Apache-2.0
"""Random states: kept around extra work, and set anew at each epoch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data.dataloader import DataLoader
from torch import Tensor

import toys
from medkd.handlers.randomness import EpochSeed, preserved_random_state


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def images_of(seed: int, epochs: int = 2, disturbed: bool = False, **options: Any) -> list[list[Tensor]]:
    """The augmented images of each epoch; when disturbed, others draw numbers between the epochs."""
    seen: list[list[Tensor]] = []
    handlers = [
        toys.on(Events.STARTED | Events.EPOCH_COMPLETED, lambda _: draw() if disturbed else None),
        EpochSeed(seed),
        toys.on(Events.EPOCH_STARTED, lambda _: seen.append([])),
        toys.on(Events.GET_BATCH_COMPLETED, lambda engine: seen[-1].append(engine.state.batch["image"].as_tensor())),
    ]
    toys.make_trainer(toys.student(), handlers, epochs=epochs, **options).run()
    return seen


def test_the_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    with preserved_random_state():
        before = draw()
    with preserved_random_state():
        assert draw() == before


def test_the_generators_are_set_back_after_an_error() -> None:
    @preserved_random_state()
    def draw_and_fail() -> None:
        draw()
        raise RuntimeError("in between")

    with preserved_random_state():
        before = draw()
    with pytest.raises(RuntimeError, match="in between"):
        draw_and_fail()
    with preserved_random_state():
        assert draw() == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_on_its_seed_alone(workers: int) -> None:
    first = images_of(seed=1, workers=workers)
    torch.rand(3)
    assert toys.same(first, images_of(seed=1, workers=workers, disturbed=True))
    assert not toys.same(first[0], first[1])


def test_an_epochs_seed_is_the_runs_seed_plus_its_number() -> None:
    assert toys.same(images_of(seed=1, epochs=2)[1], images_of(seed=2, epochs=1)[0])
    assert not toys.same(images_of(seed=1, epochs=1), images_of(seed=2, epochs=1))


def test_an_epoch_shorter_than_the_data_does_not_go_on_with_the_pass_of_the_one_before() -> None:
    assert toys.same(images_of(seed=1, epoch_length=1)[1], images_of(seed=2, epochs=1, epoch_length=1)[0])


def test_other_ranks_draw_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    first = images_of(seed=1)
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    second = images_of(seed=1)
    assert not any(toys.same(mine, other) for mine in first for other in second)


def test_an_epoch_starts_with_all_global_generators_seeded() -> None:
    seen: list[list[float]] = []
    for _ in range(2):
        draw()                                                     # the second run finds other states
        note = toys.on(Events.EPOCH_STARTED, lambda _: seen.append(draw()))
        toys.make_trainer(toys.student(), [EpochSeed(1), note], epochs=1).run()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert len(images_of(seed, epochs=1)[0]) == 2


def test_workers_that_outlive_an_epoch_are_refused() -> None:
    engine: Any = toys.make_trainer(toys.student(), [EpochSeed()])
    engine.data_loader = DataLoader(engine.data_loader.dataset, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="`persistent_workers` of the training data loader must be False, got True"):
        engine.run()
