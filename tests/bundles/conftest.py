# SPDX-License-Identifier: Apache-2.0
"""For the files that `test_contract.py` runs in processes of their own: the bundle of the variable MEDKD_BUNDLE."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.utils import set_determinism


@pytest.fixture(scope="module")
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
    ignore = shutil.ignore_patterns("teacher", "checkpoints*", "logs", "runs", "eval", "__pycache__")
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("alone") / source.name, ignore=ignore))


@pytest.fixture(scope="module")
def run_bundle(bundle: Path) -> Callable[..., None]:
    """Run an id with config files by name and further options, in this process."""

    def call(run_id: str, *configs: str, **options: Any) -> None:
        files = [str(bundle / "configs" / f"{name}.json") for name in configs]
        if configs[0] == "train":
            options = {"train#dataset#num_workers": 0, "validate#dataset#num_workers": 0} | options
        try:
            monai.bundle.run(run_id, config_file=files, bundle_root=str(bundle), **options)
        finally:
            set_determinism(None)

    return call
