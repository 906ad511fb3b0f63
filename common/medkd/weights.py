# SPDX-License-Identifier: Apache-2.0
"""Weights files, read without running the code that a pickle may hold."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

__all__ = ["load_tensors"]


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that holds tensors and plain values only; code in it is never run.

    Args:
        path: a `.safetensors` file, or one written by `torch.save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is torn, or holds anything but tensors and plain containers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a weights file, got {str(path)!r}, which does not exist.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{path}` must hold tensors only, got other objects, which could run code when loaded "
            "(or it is no weights file at all); save the state dict alone, or convert it to safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"`{path}` must be a whole weights file, got one that cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"`{path}` must hold a state dict, got {type(content).__name__}.")
    return dict(content)
