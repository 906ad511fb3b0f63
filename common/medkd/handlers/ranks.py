# SPDX-License-Identifier: Apache-2.0
"""The end of a run of several ranks."""

from __future__ import annotations

import time

import torch.distributed as dist

__all__ = ["end_ranks"]

_GRACE = 0.2   # seconds; a thread that waits for the interpreter gets it at once, on a crowded machine a little later


def end_ranks() -> None:
    """Wait for the other ranks and leave their group; nothing happens in a run of one process without a group.

    Gloo's threads let go of the tensors of the last collective operation a moment after it has ended, for which they
    need the interpreter. If that is shutting down already, the process aborts after all its work is done
    (github.com/pytorch/pytorch/issues/190489), and leaving the group alone does not wait for them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.barrier()
    time.sleep(_GRACE)
    dist.destroy_process_group()
