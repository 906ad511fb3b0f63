# SPDX-License-Identifier: Apache-2.0
"""Inner layers of a frozen teacher, and what is fitted to them before it teaches."""

from __future__ import annotations

import logging
import math
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
from medkd.losses.fitted import FittedFile, digest, written_taps
from medkd.losses.paraphraser import (
    Paraphrasers,
    Reconstruction,
    TeacherParaphrasers,
    check_kind,
    reconstruction_loss,
)
from medkd.outputs import MainOutput, plain_tensor
from medkd.taps import FeatureTaps

__all__ = ["ParaphraserFitting", "TeacherFitting", "TeacherLayers"]

_LEAST = 1e-12             # a layer of zeros
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
        RuntimeError: at the start of a training: the fitting ended with a loss that is not finite; nothing is saved.
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
        self._fitted.before_loading = lambda: self.fit(engine)

    def fit(self, engine: Any) -> None:
        """Fit with a trainer's data, on its device, and write the file, unless it is there and fitted so.

        A training does it by itself; `configs/paraphraser.json` of a bundle does nothing else.
        """
        try:
            if idist.get_rank() == 0:
                wanted, sha256 = self.notes().get("fitted_as"), self.teacher.hash()
                if self._fitted.belong_to(sha256, wanted):
                    logger.info("%s of this teacher are in %s.", self.name, self._fitted.path)
                    return
                with preserved_random_state(), torch.enable_grad():
                    self._fit(engine, sha256)
        finally:
            idist.barrier()                                        # also where it fails, or the others would wait

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

    def judge(self, modules: Any, levels: Sequence[Tensor]) -> None:  # noqa: B027 (not all kinds have more to tell)
        """Tell in the log how well they do on layers (B, C_l, *S_l), those of the last batch."""

    def notes(self) -> dict[str, Tensor]:
        """Give what else the file is to tell of itself; with `fitted_as`, one that was fitted otherwise is replaced."""
        return {}

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
        if not math.isfinite(values[-1]):
            raise RuntimeError(
                f"{self.name} must be fitted with a finite loss, got {values[0]:.4g} in the first and {values[-1]} in "
                f"the last of {self.steps} steps; nothing is saved. Lower `learning_rate`, now {self.learning_rate}."
            )
        logger.info("Their loss was %.4f in the first step and is %.4f in the last.", values[0], values[-1])
        with torch.no_grad():
            self.judge(modules, levels)
        notes = {"teacher_sha256": torch.tensor(list(bytes.fromhex(sha256))).byte(), **self.notes()}
        save_atomically({**modules.cpu().state_dict(), **notes}, self._fitted.path)


class ParaphraserFitting(TeacherFitting):
    """Fits the paraphrasers of a frozen teacher when a training's loss needs them, unless they are there.

    They learn to bring layers back from few channels, without labels: from `steps` batches of the training's loader,
    which may have cases without a label. A file that was fitted to other layers, for other channels, or by other
    arguments than these is replaced. The log tells how much of each layer is lost; where it is no less than with the
    layer's mean alone, it warns.

    In a config, with the handler in front of the `CheckpointHandler` in `train#handlers`:

    ```json
    {
      "paraphrasers": {
        "_target_": "medkd.losses.paraphraser.TeacherParaphrasers",
        "taps": ["downsamples.1", "upsamples.1"],
        "channels": [[128, 24], [128, 24]],
        "path": "$@ckpt_dir + '/paraphrasers/model.pt'",
        "teacher_path": "@teacher_path"
      },
      "paraphraser_fitting": {
        "_target_": "medkd.handlers.teacher_fitting.ParaphraserFitting",
        "paraphrasers": "@paraphrasers",
        "teacher": "@teacher"
      },
      "distill_loss": {
        "_target_": "medkd.losses.graph_flow.GraphFlowLoss",
        "flows": [["downsamples.1", "upsamples.1"]],
        "paraphrasers": "@paraphrasers"
      }
    }
    ```

    Args:
        paraphrasers: those of the loss, with the layers that they read.
        teacher: whose layers they are.
        kind: of the reconstruction loss, `l1` or `mse`.
        steps: batches of the training's loader that they are fitted with.
        learning_rate: of Adam. Published is SGD at 3e-4 for 200 epochs, with a teacher in training mode.
        teacher_input: key of the batch that the teacher sees.
        seed: of the first values and of the batches; not the run's.

    Raises:
        ValueError: no paraphrasers, no step, or an unknown `kind`.

    Reference:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, arXiv 1802.04977.
    """

    name = "Paraphrasers"

    def __init__(
        self, paraphrasers: TeacherParaphrasers, teacher: Teacher, kind: Reconstruction = "l1", steps: int = 200,
        learning_rate: float = 0.001, teacher_input: str = "image", seed: int = 0,
    ) -> None:
        check_kind(kind)
        if paraphrasers is None:                                   # a config's null
            raise ValueError(
                "`paraphrasers` must be those of the loss, got None; leave this handler out of the config where the "
                "loss has none."
            )
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
            steps=self.steps, learning_rate=self.learning_rate, seed=self.seed, teacher_input=self.teacher_input,
        )
        return {"fitted_as": fitted_as, "taps": written_taps(one.taps)}

    def value(self, modules: Any, levels: Sequence[Tensor], pred: Tensor, image: Tensor, batch: Any) -> Tensor:
        """Give the mean over layers of their reconstruction losses."""
        pairs = [(layer, level.float()) for layer, level in zip(modules.layers, levels, strict=True)]
        values = [reconstruction_loss(layer.reconstruct(level), level, self.kind) for layer, level in pairs]
        return torch.stack(values).mean()

    def judge(self, modules: Any, levels: Sequence[Tensor]) -> None:
        """Tell of each layer how much is lost: the loss, relative to that of a reconstruction of zeros."""
        for path, layer, level in zip(self.taps, modules.layers, levels, strict=True):
            level = level.float()
            mean = level.mean([0, *range(2, level.dim())], keepdim=True).expand_as(level)   # of each channel
            lost, plain, size = (
                reconstruction_loss(found, level, self.kind).item()
                for found in (layer.reconstruct(level), mean, torch.zeros_like(level))
            )
            share, by_mean = lost / max(size, _LEAST), plain / max(size, _LEAST)
            logger.info("Layer %r: %.1f %% of its mean magnitude are lost, with its mean alone %.1f %%.", path,
                        100 * share, 100 * by_mean)
            if lost >= plain:
                logger.warning("The paraphraser of layer %r brings back no more than its mean: the student would learn "
                               "nothing of it. Give the fitting more `steps`, or another `learning_rate`.", path)


def _again(loader: Any) -> Iterator[Any]:
    """Batches of one pass after another."""
    while True:
        yield from loader
