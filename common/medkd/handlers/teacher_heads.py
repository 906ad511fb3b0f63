# SPDX-License-Identifier: Apache-2.0
"""Inner layers of a frozen teacher, and what is fitted to them before it teaches: class heads, paraphrasers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from torch import Tensor, nn

from medkd.handlers.atomic import save_atomically
from medkd.handlers.cpu_autocast import cpu_autocast
from medkd.handlers.randomness import preserved_random_state, seed_everything
from medkd.handlers.teacher import Teacher, teacher_image
from medkd.losses.class_heads import TeacherHeads
from medkd.losses.fitted import FittedFile, digest, written_taps
from medkd.losses.paraphraser import (
    Paraphrasers,
    Reconstruction,
    TeacherParaphrasers,
    check_kind,
    reconstruction_loss,
)
from medkd.ops.ignored import samples_without_label
from medkd.ops.prediction import hard_labels
from medkd.ops.resample import pool_or_interpolate
from medkd.outputs import MainOutput, plain_tensor
from medkd.taps import FeatureTaps

__all__ = ["HeadFitting", "ParaphraserFitting", "TeacherFitting", "TeacherLayers"]

_WAY_OUT = "wrap the network so that `forward` returns the prediction alone"
logger = logging.getLogger(__name__)


class TeacherLayers:
    """The frozen teacher, asked for some of its layers; no module, so that what holds it does not have its weights.

    Args:
        teacher: loaded here.
        taps: paths of its layers.
    """

    def __init__(self, teacher: Teacher, taps: Sequence[str]) -> None:
        self.network = teacher.load()
        self.sha256 = torch.tensor(list(bytes.fromhex(teacher.file_sha256 or ""))).byte()   # of the teacher's file
        self.paths = tuple(taps)
        self.taps = FeatureTaps(self.network, taps, "teacher")
        self._main = MainOutput("The teacher", _WAY_OUT)

    def __call__(self, image: Tensor) -> list[Tensor]:
        """Give the layers (B, C_l, *S_l) for an image (B, C, *S), in the order of the taps."""
        return self.with_prediction(image)[0]

    def with_prediction(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Give the layers, and the prediction (B, K, *S)."""
        self.network.to(image.device).eval()
        self.taps.open()
        with torch.no_grad():
            pred = self._main(self.network(image), image.dim())
        outputs = self.taps.close()
        return [outputs[path] for path in self.paths], pred


class TeacherFitting(ABC):
    """Fits modules to layers of a frozen teacher at the start of a training whose loss asks for them.

    The teacher does not change, the run's random state neither. Attach it to the trainer in any order.

    Args:
        fitted: that of the loss. Its file is written where it is missing, or of another teacher, or fitted otherwise.
        teacher: whose layers are read.
        taps: the layers.
        steps: batches of the training's loader that are fitted with.
        learning_rate: of Adam.
        teacher_input: key of the batch that the teacher sees.
        seed: of the batches; not the run's, so that all runs on the same data have the same.

    Raises:
        ValueError: no step.
    """

    name = ""

    def __init__(
        self, fitted: FittedFile[Any], teacher: Teacher, taps: Sequence[str], steps: int, learning_rate: float,
        teacher_input: str, seed: int,
    ) -> None:
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        self._fitted = fitted
        self.teacher = teacher
        self.taps = tuple(taps)
        self.steps = steps
        self.learning_rate = learning_rate
        self.teacher_input = teacher_input
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register on a trainer: its data and device serve, when the loss asks for what is fitted."""
        self._fitted.before_loading = lambda: self._fit_where_missing(engine)

    @abstractmethod
    def build(self) -> nn.Module:
        """Give the modules with their first values."""

    @abstractmethod
    def value(self, modules: Any, levels: Sequence[Tensor], pred: Tensor, image: Tensor, batch: Any) -> Tensor:
        """Give the loss that they are fitted by, a scalar.

        Args:
            modules: what `build` gave.
            levels: the layers, (B, C_l, *S_l).
            pred: the teacher's prediction, (B, K, *S).
            image: what the teacher saw, (B, C, *S).
            batch: of the loader.
        """

    def notes(self) -> dict[str, Tensor]:
        """Give what else the file is to tell of itself; with `fitted_as`, one that was fitted otherwise is replaced."""
        return {}

    def _fit_where_missing(self, engine: Any) -> None:
        try:
            wanted = self.notes().get("fitted_as")
            if idist.get_rank() == 0 and not self._fitted.belong_to(sha256 := self.teacher.hash(), wanted):
                with preserved_random_state(), torch.enable_grad():
                    self._fit(engine, sha256)
        finally:
            idist.barrier()                                        # also where it fails, or the others would wait

    def _fit(self, engine: Any, sha256: str) -> None:
        loader, device = engine.data_loader, engine.state.device
        logger.info("%s of the teacher's layers are fitted, in %d steps, and kept in %s.",
                    self.name, self.steps, self._fitted.path)
        layers = TeacherLayers(self.teacher, self.taps)
        modules = self.build().to(device)
        optimizer = torch.optim.Adam(modules.parameters(), self.learning_rate)
        values = []
        seed_everything(self.seed, getattr(loader, "dataset", None))
        for batch in islice(_again(loader), self.steps):
            image = plain_tensor(teacher_image(batch, self.teacher_input)).to(device, self.teacher.dtype)
            with cpu_autocast(engine):
                levels, pred = layers.with_prediction(image)
            value = self.value(modules, levels, pred, image, batch)
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            values.append(value.item())
        logger.info("Their loss was %.4f in the first step and is %.4f in the last.", values[0], values[-1])
        notes = {"teacher_sha256": torch.tensor(list(bytes.fromhex(sha256))).byte(), **self.notes()}
        save_atomically({**modules.cpu().state_dict(), **notes}, self._fitted.path)


class HeadFitting(TeacherFitting):
    """Fits the class heads of a frozen teacher at the start of a training whose loss needs them, unless they are there.

    They learn from labels, by a supervised loss; where a sample has none, from the classes that the teacher predicts.
    The teacher does not change, the run's random state neither. Attach it to the trainer in any order.

    Args:
        heads: those of the loss. Their file is written where it is missing, or was fitted to another teacher.
        teacher: whose layers they read.
        taps: the layers, in the order of `heads`.
        loss: takes predictions (B, K, *S) and labels (B, 1, *S), and gives a scalar.
        steps: batches of the training's loader that they are fitted with.
        learning_rate: of Adam.
        teacher_input: key of the batch that the teacher sees.
        seed: of the batches; not the run's, so that all runs on the same data have the same heads.

    Raises:
        ValueError: not as many taps as heads, or no step.

    Reference:
        Lee et al., Deeply-Supervised Nets, arXiv 1409.5185; after the teacher's training instead of within it.
    """

    name = "Class heads"

    def __init__(
        self, heads: TeacherHeads, teacher: Teacher, taps: Sequence[str], loss: nn.Module, steps: int = 100,
        learning_rate: float = 0.01, teacher_input: str = "image", seed: int = 0,
    ) -> None:
        if len(taps) != len(heads.channels):
            raise ValueError(
                f"`taps` must be {len(heads.channels)} layers, one for each of `heads`, got {list(taps)}."
            )
        super().__init__(heads, teacher, taps, steps, learning_rate, teacher_input, seed)
        self.heads = heads
        self.loss = loss

    def build(self) -> nn.Module:
        """Give heads with their first values."""
        return self.heads.build()

    def value(self, modules: Any, levels: Sequence[Tensor], pred: Tensor, image: Tensor, batch: Any) -> Tensor:
        """Give the supervised loss of the heads, on the grid of the image."""
        target = _with_classes(plain_tensor(batch["label"]).to(image.device), pred)
        resized = (pool_or_interpolate(one.float(), image.shape[2:], "average") for one in modules(levels))
        return torch.stack([self.loss(one, target) for one in resized]).mean()


class ParaphraserFitting(TeacherFitting):
    """Fits the paraphrasers of a frozen teacher when a training's loss needs them, unless they are there.

    They learn to bring layers back from few channels, without labels: from `steps` batches of the training's loader,
    which may have cases without a label. A file that was fitted to other layers, for other channels, or by other
    arguments than these is replaced.

    Args:
        paraphrasers: those of the loss, with the layers that they read.
        teacher: whose layers they are.
        kind: of the reconstruction loss, `l1` or `mse`.
        steps: batches of the training's loader that they are fitted with.
        learning_rate: of Adam. Published is SGD at 3e-4 for 200 epochs, with a teacher in training mode.
        teacher_input: key of the batch that the teacher sees.
        seed: of the first values and of the batches; not the run's.

    Raises:
        ValueError: no step, or an unknown `kind`.

    Reference:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, arXiv 1802.04977.
    """

    name = "Paraphrasers"

    def __init__(
        self, paraphrasers: TeacherParaphrasers, teacher: Teacher, kind: Reconstruction = "l1", steps: int = 200,
        learning_rate: float = 0.001, teacher_input: str = "image", seed: int = 0,
    ) -> None:
        check_kind(kind)
        super().__init__(paraphrasers, teacher, paraphrasers.taps, steps, learning_rate, teacher_input, seed)
        self.paraphrasers = paraphrasers
        self.kind: Reconstruction = kind

    def build(self) -> nn.Module:
        """Give paraphrasers with their first values."""
        one = self.paraphrasers
        return Paraphrasers(one.channels, one.spatial_dims, one.squeeze, self.seed)

    def notes(self) -> dict[str, Tensor]:
        """Give the layers, and a digest of all that the weights depend on beside teacher and data."""
        one = self.paraphrasers
        fitted_as = digest(
            taps=one.taps, channels=one.channels, spatial_dims=one.spatial_dims, squeeze=one.squeeze, kind=self.kind,
            steps=self.steps, learning_rate=self.learning_rate, seed=self.seed,
        )
        return {"fitted_as": fitted_as, "taps": written_taps(one.taps)}

    def value(self, modules: Any, levels: Sequence[Tensor], pred: Tensor, image: Tensor, batch: Any) -> Tensor:
        """Give the mean over layers of their reconstruction losses."""
        pairs = [(layer, level.float()) for layer, level in zip(modules.layers, levels, strict=True)]
        values = [reconstruction_loss(layer.reconstruct(level), level, self.kind) for layer, level in pairs]
        return torch.stack(values).mean()


def _again(loader: Any) -> Iterator[Any]:
    """Batches of one pass after another."""
    while True:
        yield from loader


def _with_classes(label: Tensor, pred: Tensor) -> Tensor:
    """Labels (B, 1, *S) in which a sample without one has the classes of a prediction (B, K, *S)."""
    missing = samples_without_label(label).view(-1, *[1] * (label.dim() - 1))
    return torch.where(missing, hard_labels(pred).to(label.dtype), label)
