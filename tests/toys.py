# SPDX-License-Identifier: Apache-2.0
"""Toy data, networks and trainers: bright discs on noise, three small layers, MONAI's own engines."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.data.meta_tensor import MetaTensor
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.trainer import SupervisedTrainer
from monai.handlers.lr_schedule_handler import LrScheduleHandler
from monai.handlers.mean_dice import MeanDice
from monai.handlers.utils import from_engine
from monai.handlers.validation_handler import ValidationHandler
from monai.losses.dice import DiceCELoss
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import RandGaussianNoised, RandScaleIntensityd
from monai.transforms.post.dictionary import AsDiscreted
from monai.transforms.spatial.dictionary import RandFlipd
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.nan_guard import NanGuard
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.schedule import WeightSchedule
from medkd.losses.base import DistillationLoss, trainable_parameters
from medkd.losses.features import HintLoss
from medkd.losses.logits import SoftLabelLoss

SIZE = 12
STUDENT_WIDTH, TEACHER_WIDTH = 2, 4
TAP = "encoder.act"


class ToyNetwork(nn.Module):
    """Two convolutions with what can go wrong between them: batch statistics and dropout."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential()
        self.encoder.add_module("conv", nn.Conv2d(1, width, 3, padding=1))
        self.encoder.add_module("norm", nn.BatchNorm2d(width, momentum=0.5))
        self.encoder.add_module("act", nn.LeakyReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 2, H, W)."""
        logits: Tensor = self.head(self.dropout(self.encoder(image)))
        return logits


class Bright(nn.Module):
    """A teacher that needs no training: what is brighter than the threshold is foreground."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.threshold = threshold

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 2, H, W)."""
        foreground = self.scale * (image - self.threshold)
        return torch.cat((-foreground, foreground), dim=1)


def student(seed: int = 1) -> ToyNetwork:
    """A student with dropout; the global generator stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyNetwork(STUDENT_WIDTH, dropout=0.2)


def teacher(seed: int = 2) -> ToyNetwork:
    """A teacher of random weights; draws from the global generator, as a config's does."""
    torch.manual_seed(seed)
    return ToyNetwork(TEACHER_WIDTH)


def hint_loss() -> HintLoss:
    """A loss with a learnable head."""
    return HintLoss([TAP], [[STUDENT_WIDTH, TEACHER_WIDTH]], spatial_dims=2)


def cases(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Bright squares on noise, with file names; `teacher_image` is the same image, brighter."""
    generator = torch.Generator().manual_seed(seed)
    result: list[dict[str, Tensor]] = []
    for index in range(count):
        label = torch.zeros(1, SIZE, SIZE)
        row, column = torch.randint(0, SIZE - 5, (2,), generator=generator).tolist()
        label[:, row : row + 5, column : column + 5] = 1
        noise = 0.1 * torch.randn(label.shape, generator=generator)
        meta = {"filename_or_obj": f"case_{index}.nii.gz"}
        image = MetaTensor(label + noise, meta=meta)
        result.append({"image": image, "label": MetaTensor(label, meta=meta), "teacher_image": image + 1.0})
    return result


def random_transforms() -> Compose:
    """What a bundle's augmentation does, small."""
    return Compose([
        RandFlipd(["image", "label", "teacher_image"], prob=0.5, spatial_axis=0),
        RandScaleIntensityd(["image"], factors=0.2, prob=0.7),
        RandGaussianNoised(["image"], std=0.1, prob=0.7),
    ])


def make_trainer(
    network: nn.Module,
    handlers: Sequence[Any] = (),
    parameters: Sequence[nn.Parameter] | None = None,
    data: Sequence[Mapping[str, Any]] | None = None,
    epochs: int = 2,
    **options: Any,
) -> SupervisedTrainer:
    """An unmodified trainer on toy cases, two per batch; `options` go to it, but for `workers` and `sampler`."""
    dataset = Dataset(cases() if data is None else data, transform=random_transforms() if data is None else None)
    sampler = options.pop("sampler", lambda _: None)(dataset)
    loader = DataLoader(
        dataset, batch_size=2, shuffle=sampler is None, sampler=sampler, num_workers=options.pop("workers", 0)
    )
    parameters = list(network.parameters()) if parameters is None else parameters
    options.setdefault("loss_function", DiceCELoss(to_onehot_y=True, softmax=True))
    options.setdefault("optimizer", torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01))
    return SupervisedTrainer("cpu", epochs, loader, network, train_handlers=list(handlers), **options)


def make_evaluator(network: nn.Module, count: int = 2, workers: int = 0, **options: Any) -> SupervisedEvaluator:
    """An evaluator with the Dice of the squares, `val_mean_dice`."""
    loader = DataLoader(Dataset(cases(count, seed=9)), batch_size=1, num_workers=workers)
    discrete = AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2)
    dice = MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
    return SupervisedEvaluator(
        "cpu", loader, network, postprocessing=Compose([discrete]), key_val_metric={"val_mean_dice": dice}, **options
    )


def on(event: Any, function: Callable[[Any], None]) -> Any:
    """A handler that calls `function(engine)` at an event."""

    class Handler:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(event, function)

    return Handler()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


# ---- runs in processes of their own ---------------------------------------------------------------------------------


def processes() -> ForkServerContext:
    """Processes that can be killed, forked from one that has imported torch and MONAI but run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module.__name__ for module in (torch, multiprocessing)] + ["monai.engines", __name__])
    return context


class Run:
    """Everything that a bundle's training has, with two losses, one of them learnable.

    Args:
        directory: where weights and checkpoints go.
        extra: handlers before the checkpoint's.
    """

    def __init__(
        self,
        directory: Path,
        epochs: int = 5,
        workers: int = 0,
        resume: bool = False,
        extra: Sequence[Any] = (),
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
        **options: Any,
    ) -> None:
        network = wrap(student())
        self.network = network
        self.losses: list[DistillationLoss] = [SoftLabelLoss(), hint_loss()]
        parameters = list(trainable_parameters(network, self.losses))
        self.optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs)
        self.evaluator = make_evaluator(network)
        objects = {
            "network": network, "distill_loss": self.losses, "optimizer": self.optimizer, "lr_scheduler": self.scheduler,
        }
        handlers = [
            ValidationHandler(interval=1, validator=self.evaluator),
            LrScheduleHandler(self.scheduler, print_lr=False),
            EpochSeed(3),
            DistillationHandler(teacher, self.losses, {"logits": 0.5, "features": 0.3}),   # type: ignore[arg-type]
            WeightSchedule(0.5),
            NanGuard(),
            *extra,
            CheckpointHandler(directory, objects, self.evaluator, resume=resume),
        ]
        self.trainer = make_trainer(
            network, handlers, optimizer=self.optimizer, epochs=epochs, workers=workers, **options
        )

    def result(self) -> dict[str, Any]:
        """All that two equal runs have equal."""
        return {
            "network": self.network.state_dict(),
            "distill_loss": nn.ModuleList(self.losses).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "best_metric": float(self.evaluator.state.best_metric),
            "best_metric_epoch": self.evaluator.state.best_metric_epoch,
        }
