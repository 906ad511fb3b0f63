# SPDX-License-Identifier: Apache-2.0
"""Random states: kept as they are around extra work, and set anew at each epoch so that a run can be resumed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd

__all__ = ["EpochSeed", "preserved_random_state", "seed_everything"]

_RANK_STEP = 1_000_003   # ranks must not draw the same crops


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the global generators of torch (all devices), NumPy and Python as they were found."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_everything(seed: int, dataset: Any = None) -> None:
    """Seed torch, NumPy, Python and the random transforms of a data set."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    set_rnd(dataset, seed)


class EpochSeed:
    """Seed everything at the start of each epoch with `seed + epoch`, so that a resumed run ends bit-identical.

    Seeds torch, NumPy, Python and the random transforms of the trainer's data set, then starts a fresh pass over the
    data. What happened before (the teacher's check, an interrupted epoch) leaves no trace. Loader workers draw their
    seeds from torch's generator; `persistent_workers` would keep old ones and is refused.

    Args:
        seed: the run's seed. Other ranks than 0 add a large multiple of their rank.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def _check(self, engine: Any) -> None:
        if getattr(engine.data_loader, "persistent_workers", False):
            raise ValueError(
                "`persistent_workers` of the training data loader must be False, got True; "
                "workers that outlive an epoch cannot be seeded, and the run could not be resumed exactly."
            )

    def __call__(self, engine: Any) -> None:
        seed = (self.seed + engine.state.epoch + _RANK_STEP * idist.get_rank()) % 2**32
        seed_everything(seed, getattr(engine.data_loader, "dataset", None))
        engine.set_data(engine.data_loader)                        # the iterator draws its seeds now
