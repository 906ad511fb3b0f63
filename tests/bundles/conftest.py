# SPDX-License-Identifier: Apache-2.0
"""For tests that run a bundle: that of the variable MEDKD_BUNDLE, or the one that a test file makes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bundle_runs


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy networks gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle as a fresh clone has it."""
    source = Path(os.environ["MEDKD_BUNDLE"])
    ignore = shutil.ignore_patterns("teacher", "checkpoints", "before_*", "logs", "runs", "eval", "__pycache__")
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("alone") / source.name, ignore=ignore))


@pytest.fixture(scope="module")
def run_bundle(bundle: Path) -> Callable[..., None]:
    """Run an id with config files by name and further options, in this process."""
    return partial(bundle_runs.run, bundle)


@pytest.fixture(scope="module")
def run(run_bundle: Callable[..., None]) -> Callable[..., Path]:
    """Run an id with config files by name; gives the folder that is written to."""

    def call(run_id: str, *configs: str, into: Path, **options: Any) -> Path:
        options |= {"ckpt_dir": str(into)} if configs[0] == "train" else {}
        run_bundle(run_id, *configs, output_dir=str(into / "eval"), **options)
        return into

    return call
