# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed ends bit for bit where it would have ended."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import toys

EPOCHS = 5


def kill_after(folder: Path, epochs: int, delay: float, **options: Any) -> int:
    """Train until so many checkpoints are there, and `delay` seconds more; kill it. Gives the epochs it has saved."""
    process = toys.start(toys.train, folder, epochs=EPOCHS, **options)
    last = folder / "checkpoints" / f"epoch_{epochs:05d}.pt"
    try:
        while epochs and not last.exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        process.kill()
        process.join()
    return max((int(path.stem[-5:]) for path in folder.glob("checkpoints/epoch_*.pt")), default=0)


@pytest.fixture(scope="module", params=[0, 2], ids=["no workers", "2 workers"])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any]]:
    """The workers of a run, and what it ends with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    toys.finish(toys.start(toys.train, folder, epochs=EPOCHS, workers=request.param))
    return request.param, torch.load(folder / "result.pt")


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_killed_run_is_resumed_to_the_same_weights_optimizer_and_best_metric(
    uninterrupted: tuple[int, dict[str, Any]], tmp_path: Path, epochs: int
) -> None:
    workers, expected = uninterrupted
    saved = kill_after(tmp_path, epochs, random.random() * 0.1, workers=workers)
    assert epochs <= saved <= EPOCHS
    toys.finish(toys.start(toys.train, tmp_path, epochs=EPOCHS, workers=workers, resume=True))
    result = torch.load(tmp_path / "result.pt")
    for name in expected:
        assert toys.same(result[name], expected[name]), name
    student = torch.load(tmp_path / "model.pt")
    assert toys.same(student.keys(), expected["network"].keys())


def test_a_run_may_be_killed_again_and_again(uninterrupted: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    workers, expected = uninterrupted
    for epochs in (1, 2, 3):
        kill_after(tmp_path, epochs, random.random() * 0.05, workers=workers, resume=True)
    toys.finish(toys.start(toys.train, tmp_path, epochs=EPOCHS, workers=workers, resume=True))
    assert toys.same(torch.load(tmp_path / "result.pt"), expected)


def test_what_a_run_ends_with_depends_on_its_heads_and_random_numbers(tmp_path: Path) -> None:
    """The comparison above would see a head, a schedule or an augmentation that is not resumed."""
    first, second = tmp_path / "first", tmp_path / "second"
    toys.finish(toys.start(toys.train, first, epochs=2), toys.start(toys.train, second, epochs=2, seed=4))
    one, other = torch.load(first / "result.pt"), torch.load(second / "result.pt")
    assert "1.projectors.0.weight" in one["distill_loss"]
    assert not toys.same(one["distill_loss"], toys.hint_loss().state_dict())
    assert one["lr_scheduler"]["last_epoch"] == 2
    assert not toys.same(one["network"], other["network"])
