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
from medkd.handlers.start_checks import refuse_shared
from medkd.losses.base import distils
from medkd.weights import load_tensors

__all__ = ["Teacher", "TeacherView", "teacher_image"]

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

    @property
    def teaches(self) -> bool:
        """True when the run needs the teacher and its weights are there: only then unlabeled images teach anything."""
        return self.is_needed and not self.is_missing

    def hash(self) -> str:
        """SHA-256 of the weights file, hexadecimal; of a network without a file, that of its weights.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: other hash than `sha256`.
        """
        self._refuse_missing()
        if self.path is not None:
            return self._check_hash(self.path)
        network = self._build()
        digest = hashlib.sha256()
        for name, value in network.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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

    def load(
        self, device: torch.device | str = "cpu", apart_from: Mapping[str, nn.Module] | None = None
    ) -> nn.Module:
        """Build the network, load it strictly, freeze it and put it into eval mode on `device`.

        Args:
            device: where it runs.
            apart_from: modules that are trained, by what to call them; the teacher must share no part with them.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: other hash, not only tensors, weights of another architecture, or a part that is shared.
        """
        self._refuse_missing()
        network = self._build()
        refuse_shared(network, apart_from or {})                   # before anything is loaded into it or frozen
        if self.path is not None:
            self._check_hash(self.path)
            _load_strictly(network, load_tensors(self.path), self.path)
        count = sum(p.numel() for p in network.parameters())
        origin = f"from {self.path}, sha256 {self.file_sha256}" if self.path else "as built (no weights file)"
        logger.info("Teacher %s, %s parameters, %s", type(network).__name__, f"{count:,}", origin)
        self.dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        return network.to(device).eval().requires_grad_(False)

    def _build(self) -> nn.Module:
        with preserved_random_state():
            return self._network if isinstance(self._network, nn.Module) else self._network()

    def _check_hash(self, path: Path) -> str:
        with path.open("rb") as file:
            self.file_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 is not None and self.sha256.lower() != self.file_sha256:
            raise ValueError(
                f"`teacher_sha256` must be the hash of {path}, which is {self.file_sha256}, got {self.sha256}; "
                "this is another file than the one that was meant."
            )
        return self.file_sha256


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


class TeacherView:
    """What the teacher sees of each training step: for `image` what the student's network was given.

    With another key the teacher has an image of its own, which `prepare_batch` does not know: if it changes the
    student's `image` (augmentation on the device), the two would see different things, and that is refused. It is
    looked at in every step as long as that is free, and by the values in the first steps of a run.

    Args:
        key: `teacher_input` of the config.
        steps: how many steps are looked at by their values where the image was moved to another device.
    """

    def __init__(self, key: str, steps: int = 8) -> None:
        self.key = key
        self.steps = steps
        self._looked = 0
        self._before: tuple[Tensor, int] | None = None

    def start(self) -> None:
        """Begin a run."""
        self._looked, self._before = 0, None

    def remember(self, batch: Any) -> None:
        """Keep what the loader gave, before `prepare_batch` sees it."""
        image = batch.get("image") if isinstance(batch, Mapping) and self.key != "image" else None
        self._before = (image, image._version) if isinstance(image, Tensor) and not image.is_inference() else None

    def image(self, batch: Any, given: Any) -> Tensor:
        """The teacher's image.

        Args:
            batch: of the data loader.
            given: what `prepare_batch` made of `image` for the student.

        Raises:
            KeyError, TypeError: as `teacher_image`.
            ValueError: `prepare_batch` changes the student's image.
        """
        if self.key == "image":
            return teacher_image({"image": given}, "image")
        image = teacher_image(batch, self.key)
        before, self._before = self._before, None
        if before is not None and isinstance(given, Tensor) and self._is_changed(*before, given):
            raise ValueError(
                f"`prepare_batch` must leave the image as the loader gave it when `teacher_input` is {self.key!r}, got "
                "another one: the teacher would not see what the student sees. Augment in the transforms, with both "
                "keys, or take `teacher_input` 'image', for which the teacher sees what the network was given."
            )
        return image

    def _is_changed(self, before: Tensor, version: int, given: Tensor) -> bool:
        if before._version != version or before.shape != given.shape:
            return True
        if before.data_ptr() == given.data_ptr() and before.stride() == given.stride():
            return False
        self._looked += 1
        return self._looked <= self.steps and not torch.equal(before.to(given).as_subclass(Tensor), given)


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
