# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from medkd.handlers.ranks import end_ranks


def test_group_is_left_once(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    end_ranks()
    assert not dist.is_initialized()
    end_ranks()                                                    # and where there is none, nothing happens
    assert not dist.is_initialized()
