# SPDX-License-Identifier: Apache-2.0
"""What was fitted to a frozen teacher: read strictly, and only with the teacher that it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from medkd.weights import load_tensors

__all__ = ["FittedFile", "digest", "read_taps", "written_taps"]

Fitted = TypeVar("Fitted", bound=nn.Module)
_NOTES = ("teacher_sha256", "fitted_as", "taps")   # of a file, beside its weights


def digest(**settings: Any) -> Tensor:
    """SHA-256 of settings, uint8 of shape (32,), by which a file is known again."""
    return _as_tensor(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest())


def written_taps(taps: Sequence[str]) -> Tensor:
    """Paths of layers as a tensor, uint8, as a file of tensors holds them."""
    return _as_tensor(json.dumps(list(taps)).encode())


def read_taps(tensors: Mapping[str, Tensor]) -> list[str] | None:
    """Paths of the layers that a file was fitted to, in their order; None where it does not tell."""
    told = tensors.get("taps")
    return None if told is None else list(json.loads(bytes(told.tolist())))


def _as_tensor(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


class FittedFile(ABC, Generic[Fitted]):
    """Modules that were fitted to a teacher and then frozen: read when they are needed, in no optimizer or checkpoint.

    Beside the weights a file may tell, as uint8: `teacher_sha256`, of the teacher's weights; `fitted_as`, a `digest` of
    how they were fitted; `taps`, the paths of the teacher's layers as JSON. What it does not tell is not looked at.

    Args:
        path: of the file.
        spatial_dims: 2 or 3.
        teacher_path: weights of the teacher, which must be those that they were fitted to; None does not look.

    Attributes:
        argument: of a loss, that takes them, for messages.
        name: what they are, in words.
        way_out: how they are fitted, in words.
        before_loading: called before the file is read; it may write it.
    """

    argument: ClassVar[str] = "teacher_head"
    name: ClassVar[str]
    way_out: ClassVar[str]

    def __init__(
        self, path: str | os.PathLike[str], spatial_dims: int, teacher_path: str | os.PathLike[str] | None
    ) -> None:
        self.path = Path(path)
        self.spatial_dims = spatial_dims
        self.teacher_path = None if teacher_path is None else Path(teacher_path)
        self.before_loading: Callable[[], None] = lambda: None

    @abstractmethod
    def build(self) -> Fitted:
        """Give the modules with some first values."""

    @abstractmethod
    def describe(self) -> str:
        """Say what the file must hold, in words, such as "a head for levels of [3, 4] channels"."""

    def check_notes(self, notes: Mapping[str, Tensor]) -> None:
        """Refuse what the file tells of itself, beside the teacher, which is looked at already."""

    def belong_to(self, sha256: str, fitted_as: Tensor | None = None) -> bool:
        """Whether the file is there and was fitted to the teacher of this hash, and so, if that is asked for."""
        if not self.path.is_file():
            return False
        tensors = load_tensors(self.path)
        told = tensors.get("fitted_as")
        return _teacher_of(tensors) == sha256 and (
            fitted_as is None or (told is not None and torch.equal(told, fitted_as))
        )

    def load(self, device: torch.device | str = "cpu") -> Fitted:
        """Build the modules, load them strictly, and freeze them on `device`.

        Raises:
            FileNotFoundError: there is no such file; the message tells what makes it.
            ValueError: weights of others, or of such that were fitted to another teacher or other layers.
        """
        self.before_loading()
        if not self.path.is_file():
            raise FileNotFoundError(
                f"`{self.argument}` must be the weights of the teacher's {self.name}, got {str(self.path)!r}, which "
                f"does not exist; {self.way_out}."
            )
        tensors = load_tensors(self.path)
        self._check_teacher(_teacher_of(tensors))
        self.check_notes(tensors)
        built = self.build()
        try:
            built.load_state_dict({name: value for name, value in tensors.items() if name not in _NOTES})
        except RuntimeError as error:
            raise ValueError(
                f"`{self.argument}` must hold {self.describe()}, but {self.path} does not: {error}"
            ) from error
        return built.to(device).eval().requires_grad_(False)

    def _check_teacher(self, wanted: str | None) -> None:
        if self.teacher_path is None or wanted is None:
            return
        found = hashlib.sha256(self.teacher_path.read_bytes()).hexdigest()
        if wanted != found:
            raise ValueError(
                f"`{self.argument}` must be fitted to the teacher {self.teacher_path} (SHA-256 {found[:12]}...), but "
                f"{self.path} was fitted to {wanted[:12]}...; {self.way_out}."
            )


def _teacher_of(tensors: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of the teacher that a file was fitted to, hexadecimal; None where it does not tell."""
    told = tensors.get("teacher_sha256")
    return None if told is None else bytes(told.tolist()).hex()
