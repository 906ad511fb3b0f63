# SPDX-License-Identifier: Apache-2.0
"""The teacher: a network by reference, loaded strictly, frozen, and known by its SHA-256."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medkd.handlers.randomness import preserved_random_state
from medkd.losses.base import distils
from medkd.weights import load_tensors

__all__ = ["Teacher", "teacher_image"]

_NESTED_KEYS = ("state_dict", "model", "network")
logger = logging.getLogger(__name__)


class Teacher:
    """A frozen network that is built and loaded when it is needed, without touching the global random state.

    Args:
        network: the teacher's network, or a callable that builds it (in a config: `"_mode_": "partial"`).
        path: its weights, a bare state dict (or one under `state_dict`, `model` or `network`); None keeps the
            weights that `network` has.
        sha256: expected hash of the file, hexadecimal; checked when given.
        weights: the run's `distill_weights`; where none is above 0 nobody needs the teacher, and it may be missing.

    Attributes:
        file_sha256: hash of the loaded file, None before `load` and without a file.
        dtype: of the network's parameters, known after `load`; the teacher's input is cast to it.
    """

    def __init__(
        self, network: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str] | None = None,
        sha256: str | None = None, weights: Mapping[str, float] | None = None,
    ) -> None:
        self._network = network
        self.path = None if path is None else Path(path)
        self.sha256 = sha256
        self.is_needed = distils(weights)
        self.file_sha256: str | None = None
        self.dtype = torch.float32
        self.may_be_missing = False

    @property
    def is_missing(self) -> bool:
        """True when weights are wanted and their file is not there."""
        return self.path is not None and not self.path.is_file()

    def require(self) -> None:
        """Stop at once, before any data is read, when the run needs the weights and they are not there.

        Raises:
            FileNotFoundError: the file is missing; the message gives the command that trains the teacher.
        """
        if self.is_needed:
            self._refuse_missing()

    def _refuse_missing(self) -> None:
        if self.is_missing:
            raise FileNotFoundError(
                f"`teacher_path` must be the teacher's weights, got {str(self.path)!r}, which does not exist; train it "
                "with --config_file \"['configs/train.json','configs/teacher.json']\", or give --teacher_path FILE."
            )

    def allow_missing(self) -> None:
        """Let a run go on without distillation when the weights are not there, and say so where it would need them."""
        self.may_be_missing = True
        if self.is_needed and self.is_missing:
            logger.warning(
                "No teacher at %s: this run fine-tunes the student with labels only, it does NOT distil.", self.path
            )

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """Build the network, load it strictly, freeze it and put it into eval mode on `device`.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: other hash, not only tensors, or weights of another architecture.
        """
        self._refuse_missing()
        with preserved_random_state():
            network = self._network if isinstance(self._network, nn.Module) else self._network()
        if self.path is not None:
            self._check_hash(self.path)
            _load_strictly(network, load_tensors(self.path), self.path)
        count = sum(p.numel() for p in network.parameters())
        origin = f"from {self.path}, sha256 {self.file_sha256}" if self.path else "as built (no weights file)"
        logger.info("Teacher %s, %s parameters, %s", type(network).__name__, f"{count:,}", origin)
        self.dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        return network.to(device).eval().requires_grad_(False)

    def _check_hash(self, path: Path) -> None:
        with path.open("rb") as file:
            self.file_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 is not None and self.sha256.lower() != self.file_sha256:
            raise ValueError(
                f"`teacher_sha256` must be the hash of {path}, which is {self.file_sha256}, got {self.sha256}; "
                "this is another file than the one that was meant."
            )


def teacher_image(batch: Any, key: str) -> Tensor:
    """What the teacher sees of a batch.

    Args:
        batch: of a data loader.
        key: `teacher_input` of the config.

    Raises:
        KeyError: the batch has no such key; there is no fall-back to what the student sees.
        TypeError: what is there is no tensor, such as a path that no transform loads.
    """
    if not isinstance(batch, Mapping) or key not in batch:
        keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(f"`teacher_input` must be a key of the batch, got {key!r}; there are {keys}.")
    image = batch[key]
    if not isinstance(image, Tensor):
        raise TypeError(
            f"`teacher_input` must be the key of images, got {key!r} with {image!r:.80}; load it in transforms."
        )
    return image


def _load_strictly(network: nn.Module, content: dict[str, Any], path: Path) -> None:
    nested = next((key for key in _NESTED_KEYS if isinstance(content.get(key), Mapping)), None)
    weights: dict[str, Tensor] = content if nested is None else dict(content[nested])
    own = network.state_dict()
    problems = [f"misses {key!r}" for key in own if key not in weights]
    problems += [f"has {key!r} too much" for key in weights if key not in own]
    problems += [
        f"{key!r} is {_shape(weights[key])} instead of {_shape(value)}"
        for key, value in own.items()
        if key in weights and _shape(weights[key]) != _shape(value)
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"`teacher_path` must hold weights of the teacher's network {type(network).__name__}, but {path} "
            f"{'; '.join(problems[:3])}{more}. Is `teacher_def` the definition it was trained with?"
        )
    network.load_state_dict(weights, strict=True)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
