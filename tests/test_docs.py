# SPDX-License-Identifier: Apache-2.0
"""Every example in the documentation runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import medkd

# wheels of the extras; a module that needs one of them may be absent from a plain installation
OPTIONAL = frozenset({
    "cc3d", "dask", "distributed", "highdicom", "mwatershed", "ome_zarr", "onnx", "onnxruntime", "onnxscript",
    "openvino", "pydicom", "waterz", "zarr",
})
MODULES = sorted(module.name for module in pkgutil.walk_packages(medkd.__path__, "medkd."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module)
    assert failed == 0, f"examples of {name} failed; their output stands above"
