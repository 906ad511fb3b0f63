# SPDX-License-Identifier: Apache-2.0
"""Soft labels: what the teacher says of whole volumes, computed once, kept on disk, and cut out with the image."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from monai.utils.type_conversion import convert_to_dst_type
from torch import Tensor, nn

from medkd.handlers.teacher import Teacher, teacher_image
from medkd.losses.base import DistillationLoss
from medkd.ops.ignored import UNLABELED
from medkd.ops.prediction import Activation, TeacherOutput
from medkd.ops.soft_label import pack_probabilities, unpack_probabilities
from medkd.outputs import MainOutput, plain_tensor

__all__ = ["FillLabeld", "SoftLabeld", "SoftLabels", "UnpackSoftLabeld"]

_PLAIN = (int, float, str, tuple, list)
_WAY_OUT = "wrap the network so that `forward` returns the prediction alone"
logger = logging.getLogger(__name__)


class SoftLabels:
    """Class probabilities of whole volumes by the teacher, in 8 bits, each computed once for all runs.

    A file is known by the teacher's SHA-256 and by a hash of the prepared image, so another preprocessing, another
    teacher or another version of a case never meets an old file. They lie in `directory/<teacher>/<image>.npz`.

    Args:
        teacher: whose they are; it is loaded for the first volume that has no file.
        directory: where files go; may be shared by runs at the same time.
        inferer: cuts volumes into windows, such as MONAI's `SlidingWindowInferer`.
        losses: one loss or several, of the run.
        weights: term -> weight, as the `DistillationHandler` has them.
        cache: let the losses learn from soft labels in place of the live teacher, where all that have a weight read
            its prediction only. Without it, soft labels only tell where to cut crops from images without a label.
            Where the losses read its likeliest classes only, crops carry one class map and not K probabilities.
        device: where the teacher runs.

    Raises:
        ValueError: losses that read the teacher's output differently (`activation`, `teacher_output`).
    """

    def __init__(
        self, teacher: Teacher, directory: str | os.PathLike[str], inferer: Callable[..., Any],
        losses: DistillationLoss | Sequence[DistillationLoss], weights: Mapping[str, float] | None = None,
        cache: bool = True, device: torch.device | str = "cpu",
    ) -> None:
        self.teacher = teacher
        self.directory = Path(directory)
        self.inferer = inferer
        self._options = _plain_options(inferer)                    # as it is configured: SliceInferer changes its own
        self.device = torch.device(device)
        every = [losses] if isinstance(losses, DistillationLoss) else list(losses)
        active = [loss for loss in every if weights is None or any(weights.get(term) for term in loss.terms)]
        self.activation: Activation = _common(active, "activation", "softmax")
        self.output: TeacherOutput = _common(active, "teacher_output", "logits")
        is_live = any(loss.tap_pairs or loss.needs_live_teacher for loss in active)
        self.replaces_teacher = cache and teacher.teaches and not is_live
        self.gives_classes = (
            self.replaces_teacher and self.activation == "softmax" and all(loss.reads_classes for loss in active)
        )
        self._guard = Lock()
        self._network: nn.Module | None = None
        self._sha256: str | None = None

    def are_wanted(self, labeled: bool) -> bool:
        """Whether a case needs a soft label: to be learned from, or to tell where its classes are."""
        return self.replaces_teacher or (self.teacher.teaches and not labeled)

    def __call__(self, image: Tensor) -> Tensor:
        """Soft label of a volume.

        Args:
            image: as the teacher sees it, shape (C, *S), float.

        Returns:
            Packed probabilities, shape (K, *S), uint8, see `medkd.ops.soft_label`.

        Raises:
            ValueError: a file of another teacher, or of another shape, in the place of this one's.
        """
        image = plain_tensor(image)
        with self._guard:                                          # one volume at a time; the rest waits for the cores
            path = self._path(image)
            packed = self._read(path, image) if path.exists() else None
            if packed is None:
                packed = self._predict(image)
                self._write(path, packed)
        return packed

    def _path(self, image: Tensor) -> Path:
        if self._sha256 is None:
            self._sha256 = self.teacher.hash()
        values = image.detach().cpu().contiguous()
        digest = hashlib.blake2b(digest_size=12)
        digest.update(repr((tuple(values.shape), str(values.dtype), self._options, self.activation)).encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
        return self.directory / self._sha256[:12] / f"{digest.hexdigest()}.npz"

    def _read(self, path: Path, image: Tensor) -> Tensor | None:
        """The soft label in a file; None where the file is broken and has to be made again."""
        try:
            with np.load(path, allow_pickle=False) as content:
                sha256, classes = str(content["teacher"]), content["classes"]
                stored = content["values"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is no soft label (%s): it is made again.", path, error)
            return None
        if sha256 != self._sha256 or stored.shape[1:] != tuple(image.shape[1:]):
            raise ValueError(
                f"`soft_label_dir` must hold soft labels of the teacher {self._sha256}, got {path} of {sha256}, shape "
                f"{stored.shape[1:]} for an image of {tuple(image.shape[1:])}; remove the file, or name another folder."
            )
        packed = np.zeros((len(classes), *stored.shape[1:]), np.uint8)
        packed[classes] = stored
        return torch.from_numpy(packed)

    def _write(self, path: Path, packed: Tensor) -> None:
        classes = (packed.flatten(1) > 0).any(1).numpy()           # of what is nowhere nothing is stored
        content = {"teacher": np.array(self._sha256), "classes": classes, "values": packed.numpy()[classes]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.stem}.{os.getpid()}.npz")
            try:
                np.savez_compressed(draft, **content)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("A soft label could not be kept in %s: %s. The next run predicts it again.", path, error)

    def _predict(self, image: Tensor) -> Tensor:
        if self._network is None:
            logger.info("The teacher predicts whole volumes, once; they are kept in %s.", self.directory)
            self._network = self.teacher.load(self.device)
        main = MainOutput("The teacher", _WAY_OUT)
        with torch.no_grad():
            batch = image[None].to(self.device, self.teacher.dtype)
            pred = main(self.inferer(batch, self._network), batch.dim())[0].float()
            if self.output == "logits":
                pred = pred.sigmoid() if self.activation == "sigmoid" or len(pred) == 1 else pred.softmax(0)
            return pack_probabilities(pred, self.activation).cpu()

    def __getstate__(self) -> dict[str, Any]:
        """For workers of a data loader: without the lock and the network."""
        return {**self.__dict__, "_guard": None, "_network": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._guard = Lock()


def _plain_options(inferer: Any) -> list[tuple[str, Any]]:
    options = getattr(inferer, "__dict__", {}).items()
    return sorted((name, copy(value)) for name, value in options if isinstance(value, _PLAIN))


def _common(losses: Sequence[DistillationLoss], name: str, default: Any) -> Any:
    values = {getattr(loss, name) for loss in losses if hasattr(loss, name)}
    if len(values) > 1:
        raise ValueError(f"`losses` must agree on `{name}` to share soft labels, got {sorted(values)}.")
    return values.pop() if values else default


class SoftLabeld(MapTransform):
    """Add what the teacher says of a case, on the grid of the whole prepared volume.

    Adds `soft_label` if the losses learn from it, packed or, where they read no more, as the class of each voxel, and
    `centers`: class of each voxel by which crops are cut, from the label, or from the teacher where there is none.
    Place it first behind what is cached, before padding.

    Args:
        soft_labels: where they come from.
        keys: what the teacher sees, one key.
        label_key: of the label, which is `UNLABELED` everywhere or missing in a case without one.
    """

    def __init__(self, soft_labels: SoftLabels, keys: str = "image", label_key: str = "label") -> None:
        super().__init__(keys)
        self.soft_labels = soft_labels
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with more keys."""
        result = dict(data)
        label = result.get(self.label_key)
        labeled = isinstance(label, Tensor) and not bool((label == UNLABELED).all())
        image = teacher_image(result, str(self.keys[0]))
        centers = label if labeled else torch.zeros_like(image[:1], dtype=torch.uint8)
        if self.soft_labels.are_wanted(labeled):
            packed = self.soft_labels(image)
            if self.soft_labels.gives_classes or not labeled:
                classes = _with_meta(hard_classes(packed, self.soft_labels.activation), image)
                centers = centers if labeled else classes
            if self.soft_labels.replaces_teacher:
                result["soft_label"] = classes if self.soft_labels.gives_classes else _with_meta(packed, image)
        result["centers"] = centers
        return result


def hard_classes(packed: Tensor, activation: Activation) -> Tensor:
    """Likeliest class of each voxel, shape (1, *S), uint8; of regions 1 where there is one."""
    if activation == "sigmoid" or len(packed) == 1:
        return (packed > 127).any(0, keepdim=True).to(torch.uint8)
    return packed.max(0, keepdim=True).indices.to(torch.uint8)


def _with_meta(values: Tensor, image: Tensor) -> Tensor:
    """With the metadata of the image, which transforms that move voxels ask for."""
    result: Tensor = convert_to_dst_type(values, image, dtype=values.dtype)[0]
    return result


class UnpackSoftLabeld(MapTransform):
    """Turn the `soft_label` of a crop into what losses read of the teacher, and drop what cut the crop.

    That is `teacher_pred`, probabilities (K, *S), or `teacher_classes`, (1, *S), if the losses read no more. Place it
    behind the cropping and before what moves voxels, which then takes them along: bilinear, and nearest as a label.

    Args:
        soft_labels: as for `SoftLabeld`.
        keys: of the packed soft label.
    """

    def __init__(self, soft_labels: SoftLabels, keys: str = "soft_label") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.soft_labels = soft_labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data`."""
        result = {key: value for key, value in data.items() if key != "centers"}
        for key in self.key_iterator(data):
            packed = result.pop(key)
            if self.soft_labels.gives_classes:
                result["teacher_classes"] = packed.float()
            else:
                probabilities = unpack_probabilities(plain_tensor(packed), self.soft_labels.activation)
                result["teacher_pred"] = _with_meta(probabilities, packed)
        return result


class FillLabeld(MapTransform):
    """Give a case without a label one of `UNLABELED` everywhere, so that it shares a batch with others.

    Also a label of which padding has changed some voxels becomes `UNLABELED` again everywhere. Place it last.

    Args:
        keys: of the label.
        image_key: whose grid the label gets.
        dtype: that of the labels of other cases, such as `float32`; "class" where these are the numbers of classes of
            whole images, which become tensors of shape (), int64.
    """

    def __init__(self, keys: str = "label", image_key: str = "image", dtype: str = "float32") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.image_key = image_key
        self.is_class = dtype == "class"
        self.dtype: torch.dtype = getattr(torch, "int64" if self.is_class else dtype)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data`."""
        result = dict(data)
        for key in self.keys:
            label = result.get(key)
            if self.is_class:
                result[key] = torch.tensor(UNLABELED if label is None else int(label), dtype=self.dtype)
                continue
            if isinstance(label, Tensor) and not bool((label == UNLABELED).any()):
                continue
            image: Tensor = result[self.image_key]
            result[key] = torch.full_like(image[:1], UNLABELED, dtype=self.dtype)
        return result
