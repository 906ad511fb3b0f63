# SPDX-License-Identifier: Apache-2.0
"""Curves are MONAI's, and a full disk ends them alone."""

from __future__ import annotations

import logging.handlers
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events

import toys
from bundle_runs import scalars
from medkd.handlers.curves import CurvesHandler
from medkd.handlers.records import step_losses


def train(folder: Path, said: Path | None = None, steps: int = 2) -> Any:
    """Train with curves; with `said`, no file may grow beyond 1000 bytes from the second epoch on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = logging.handlers.BufferingHandler(10_000)
    logging.getLogger("medkd").addHandler(records)

    def fill(_: Any) -> None:
        time.sleep(0.5)                                            # what has been told is on the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    def wait(_: Any) -> None:
        time.sleep(0.02)                                           # for TensorBoard's thread

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    extra = [toys.on(Events.EPOCH_STARTED(once=2), fill), toys.on(Events.ITERATION_COMPLETED, wait)] if said else []
    curves = CurvesHandler(folder, tag_name="train", output_transform=step_losses)
    curves._writer._get_file_writer().event_writer._async_writer._worker._flush_secs = 0.01
    engine = toys.make_trainer(toys.student(), [*extra, curves], epochs=4, epoch_length=steps)
    engine.run()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if said is not None:
        said.write_text("\n".join(record.getMessage() for record in records.buffer))
    curves.close()
    return engine


def test_curves_tell_the_losses_of_each_step(tmp_path: Path) -> None:
    train(tmp_path / "new/logs")
    (values,) = scalars(tmp_path / "new").values()
    assert len(values) == 8


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path: Path) -> None:
    process = toys.start(train, tmp_path / "logs", tmp_path / "said.txt", steps=40)
    process.join()
    said = (tmp_path / "said.txt").read_text()
    end = "The curves end here, as they cannot be written: [Errno 27] File too large. The run goes on."
    assert said.count(end) == 1


def test_a_folder_that_cannot_be_written_to_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(OSError, match=rf"`log_dir` must be a folder that can be written to, got {tmp_path}/logs: File"):
        CurvesHandler(tmp_path / "logs")
