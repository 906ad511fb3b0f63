# SPDX-License-Identifier: Apache-2.0
"""Inner layers of a frozen teacher, and class heads that are fitted to them before the teacher teaches."""

from __future__ import annotations

import logging
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
from medkd.losses.class_heads import ClassHeads, TeacherHeads
from medkd.ops.ignored import samples_without_label
from medkd.ops.prediction import hard_labels
from medkd.ops.resample import pool_or_interpolate
from medkd.outputs import MainOutput, plain_tensor
from medkd.taps import FeatureTaps

__all__ = ["HeadFitting", "TeacherLayers"]

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


class HeadFitting:
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

    def __init__(
        self, heads: TeacherHeads, teacher: Teacher, taps: Sequence[str], loss: nn.Module, steps: int = 100,
        learning_rate: float = 0.01, teacher_input: str = "image", seed: int = 0,
    ) -> None:
        if len(taps) != len(heads.channels):
            raise ValueError(
                f"`taps` must be {len(heads.channels)} layers, one for each of `heads`, got {list(taps)}."
            )
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        self.heads = heads
        self.teacher = teacher
        self.taps = tuple(taps)
        self.loss = loss
        self.steps = steps
        self.learning_rate = learning_rate
        self.teacher_input = teacher_input
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register on a trainer: its data and device serve, when the loss asks for the heads."""
        self.heads.before_loading = lambda: self._fit_where_missing(engine)

    def _fit_where_missing(self, engine: Any) -> None:
        if idist.get_rank() == 0 and not self.heads.belong_to(self.teacher.hash()):
            with preserved_random_state(), torch.enable_grad():
                self._fit(engine)
        idist.barrier()

    def _fit(self, engine: Any) -> None:
        loader, device = engine.data_loader, engine.state.device
        logger.info("Class heads of the teacher's layers are fitted, in %d steps, and kept in %s.",
                    self.steps, self.heads.path)
        layers = TeacherLayers(self.teacher, self.taps)
        heads = ClassHeads(self.heads.channels, self.heads.classes, self.heads.spatial_dims, size=1.0).to(device)
        optimizer = torch.optim.Adam(heads.parameters(), self.learning_rate)
        values = []
        seed_everything(self.seed, getattr(loader, "dataset", None))
        for batch in islice(_again(loader), self.steps):
            image = plain_tensor(teacher_image(batch, self.teacher_input)).to(device, self.teacher.dtype)
            with cpu_autocast(engine):
                levels, pred = layers.with_prediction(image)
            target = _with_classes(plain_tensor(batch["label"]).to(device), pred)
            resized = (pool_or_interpolate(one.float(), image.shape[2:], "average") for one in heads(levels))
            value = torch.stack([self.loss(one, target) for one in resized]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            values.append(value.item())
        logger.info("Their loss was %.4f in the first step and is %.4f in the last.", values[0], values[-1])
        save_atomically({**heads.cpu().state_dict(), "teacher_sha256": layers.sha256}, self.heads.path)


def _again(loader: Any) -> Iterator[Any]:
    """Batches of one pass after another."""
    while True:
        yield from loader


def _with_classes(label: Tensor, pred: Tensor) -> Tensor:
    """Labels (B, 1, *S) in which a sample without one has the classes of a prediction (B, K, *S)."""
    missing = samples_without_label(label).view(-1, *[1] * (label.dim() - 1))
    return torch.where(missing, hard_labels(pred).to(label.dtype), label)
