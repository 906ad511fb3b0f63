# SPDX-License-Identifier: Apache-2.0
"""Heads that were fitted to a frozen teacher: read strictly, and only with the teacher that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from medkd.weights import load_tensors

__all__ = ["fitted_to", "load_fitted"]

Head = TypeVar("Head", bound=nn.Module)


def fitted_to(tensors: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of the teacher that a head was fitted to, hexadecimal; None where its weights do not tell."""
    told = tensors.get("teacher_sha256")
    return None if told is None else bytes(told.tolist()).hex()


def load_fitted(
    head: Head, path: Path, teacher_path: Path | None, device: torch.device | str, name: str, contents: str,
    way_out: str,
) -> Head:
    """Load the weights of a head strictly, and freeze it on `device`.

    Args:
        head: to load into.
        path: its weights; `teacher_sha256` among them, uint8 of shape (32,), tells what teacher it was fitted to.
        teacher_path: weights of the teacher, which must be those; None does not look.
        device: where it will run.
        name: what it is, in words, such as "boundary head".
        contents: what the file must hold, in words, such as "a head for levels of [3, 4] channels".
        way_out: how it is fitted, in words, for messages.

    Raises:
        FileNotFoundError: there is no such file; the message tells what makes it.
        ValueError: weights of another head, or of a head that was fitted to another teacher.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`teacher_head` must be the weights of the teacher's {name}, got {str(path)!r}, which does not exist; "
            f"{way_out}."
        )
    tensors = load_tensors(path)
    _check_teacher(fitted_to(tensors), path, teacher_path, way_out)
    tensors.pop("teacher_sha256", None)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"`teacher_head` must hold {contents}, but {path} does not: {error}") from error
    return head.to(device).eval().requires_grad_(False)


def _check_teacher(wanted: str | None, path: Path, teacher_path: Path | None, way_out: str) -> None:
    if teacher_path is None or wanted is None:
        return
    hashes = [wanted, hashlib.sha256(teacher_path.read_bytes()).hexdigest()]
    if hashes[0] != hashes[1]:
        raise ValueError(
            f"`teacher_head` must be fitted to the teacher {teacher_path} (SHA-256 {hashes[1][:12]}...), but "
            f"{path} was fitted to {hashes[0][:12]}...; {way_out}."
        )
