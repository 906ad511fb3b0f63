# SPDX-License-Identifier: Apache-2.0
"""Curves for TensorBoard that stop no run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.handlers.tensorboard_handlers import TensorBoardStatsHandler

from medkd.handlers.run_folder import check_writable

__all__ = ["CurvesHandler"]

logger = logging.getLogger(__name__)


class CurvesHandler(TensorBoardStatsHandler):
    """MONAI's `TensorBoardStatsHandler`, but where the disk gets full its curves end, and the run goes on.

    Args:
        log_dir: folder of the curves.
        options: those of MONAI's handler.

    Raises:
        OSError: `log_dir` cannot be written to.
    """

    def __init__(self, log_dir: str | os.PathLike[str], **options: Any) -> None:
        check_writable(Path(log_dir), "`log_dir`")
        super().__init__(log_dir=os.fspath(log_dir), **options)
        self._has_ended = False

    def epoch_completed(self, engine: Any) -> None:
        self._write(super().epoch_completed, engine)

    def iteration_completed(self, engine: Any) -> None:
        self._write(super().iteration_completed, engine)

    def _write(self, write: Callable[[Any], None], engine: Any) -> None:
        if self._has_ended:
            return
        try:
            write(engine)
        except OSError as error:                                   # of an earlier write, by TensorBoard's own thread
            self._has_ended = True
            logger.error("The curves end here, as they cannot be written: %s. The run goes on.", error)
