# SPDX-License-Identifier: Apache-2.0
"""Toy data, networks and trainers: bright squares on noise, three small layers, MONAI's own engines."""

from __future__ import annotations

import logging.handlers
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
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
from torch import Tensor, distributed, nn
from torch.utils.data.distributed import DistributedSampler

from medkd.handlers.adversarial import DiscriminatorDivergedError, DiscriminatorTraining
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.distillation import DistillationEvents, DistillationHandler
from medkd.handlers.gradient_norms import GradientNorms
from medkd.handlers.nan_guard import NanGuard
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.schedule import WeightSchedule
from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_fitting import TeacherFitting
from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.base import DistillationLoss, trainable_parameters
from medkd.losses.discriminator import Discriminator
from medkd.losses.features import HintLoss
from medkd.losses.graph_relation import GraphRelationLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.relation_bank import RelationBank
from medkd.ops.ignored import UNLABELED

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


class TwoLayers(nn.Module):
    """Two layers of unlike channels and grids, for what is fitted to a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.fine = nn.Conv2d(1, 6, 4, 2, 1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 2, H, W)."""
        logits: Tensor = self.head(self.norm(self.fine(self.deep(image).relu())))
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


def memory_loss() -> GraphRelationLoss:
    """A loss that remembers past images, and has a learnable head."""
    level = {"tap": TAP, "channels": [STUDENT_WIDTH, TEACHER_WIDTH], "stride": [1, 1]}
    return GraphRelationLoss([(0, -1)], levels=[level], bank=RelationBank(channels=2, capacity=5, sample=2))


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
    """An unmodified trainer on toy cases, two per batch; `options` go to it, but for `workers` and `sampler`.

    The optimizer holds the network and the learnable heads of the handlers' losses, or the `parameters` given.
    """
    dataset = Dataset(cases() if data is None else data, transform=random_transforms() if data is None else None)
    sampler = options.pop("sampler", lambda _: None)(dataset)
    loader = DataLoader(
        dataset, batch_size=2, shuffle=sampler is None, sampler=sampler, num_workers=options.pop("workers", 0)
    )
    if parameters is None:
        losses = [loss for one in handlers if isinstance(one, DistillationHandler) for loss in one.losses]
        parameters = [*network.parameters(), *trainable_parameters(losses)]
    options.setdefault("loss_function", DiceCELoss(to_onehot_y=True, softmax=True))
    options.setdefault("optimizer", torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01))
    return SupervisedTrainer("cpu", epochs, loader, network, train_handlers=list(handlers), **options)


def make_evaluator(
    network: nn.Module, count: int = 2, workers: int = 0, metric: Any = None, **options: Any
) -> SupervisedEvaluator:
    """An evaluator with the Dice of the squares, `val_mean_dice`, or another metric under that name."""
    loader = DataLoader(Dataset(cases(count, seed=9)), batch_size=1, num_workers=workers)
    options.setdefault("postprocessing", AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=2))
    dice = MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
    return SupervisedEvaluator("cpu", loader, network, key_val_metric={"val_mean_dice": metric or dice}, **options)


def on(event: Any, function: Callable[[Any], None]) -> Any:
    """A handler that calls `function(engine)` at an event."""

    class Handler:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(event, function)

    return Handler()


class Killer:
    """A handler that ends its process as a power cut does, in the middle of an epoch; not that of a resumed run."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.is_resumed = False

    def attach(self, engine: Any) -> None:
        """Register on a trainer, behind what resumes it."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._kill)

    def _start(self, engine: Any) -> None:
        self.is_resumed = engine.state.epoch > 0

    def _kill(self, engine: Any) -> None:
        if engine.state.epoch == self.epoch and not self.is_resumed:
            os.kill(os.getpid(), signal.SIGKILL)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def blob_batches(labeled: bool = True, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of two smooth images; what is above 0 is the foreground."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        image = F.interpolate(torch.randn(2, 1, 4, 4, generator=generator), scale_factor=4.0, mode="bilinear")
        label = (image > 0).float()
        found.append({"image": MetaTensor(image), "label": label if labeled else torch.full_like(label, UNLABELED)})
    return found


def attach_fitting(one: TeacherFitting, data: list[dict[str, Tensor]]) -> None:
    """Attach what is fitted to a teacher to a trainer that has only its data."""
    engine = Engine(lambda _engine, _batch: None)
    engine.data_loader, engine.state.device = data, torch.device("cpu")
    one.attach(engine)


def same(first: Any, second: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


# ---- whole runs ----------------------------------------------------------------------------------------------------


class Run:
    """Everything that a bundle's training has, with two losses, one of them learnable.

    Args:
        directory: where weights and checkpoints go.
        extra: handlers before the checkpoint's.
        memory: a third loss, that remembers past images.
        metric: of the validation, instead of the Dice.
    """

    def __init__(
        self,
        directory: Path,
        epochs: int = 5,
        workers: int = 0,
        resume: bool = False,
        seed: int = 3,
        extra: Sequence[Any] = (),
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
        memory: bool = False,
        metric: Any = None,
        **options: Any,
    ) -> None:
        network = wrap(student())
        self.network = network
        self.losses: list[DistillationLoss] = [SoftLabelLoss(), hint_loss(), *([memory_loss()] if memory else [])]
        parameters = list(trainable_parameters(network, self.losses))
        self.optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs)
        self.evaluator = make_evaluator(network, metric=metric)
        saver = CheckpointHandler(directory, self._objects(), self.evaluator, resume=resume)
        handlers = [*self._handlers(seed), *extra, saver]
        self.trainer = make_trainer(
            network, handlers, optimizer=self.optimizer, epochs=epochs, workers=workers, **options
        )

    def _objects(self) -> dict[str, Any]:
        return {
            "network": self.network, "distill_loss": self.losses,
            "optimizer": self.optimizer, "lr_scheduler": self.scheduler,
        }

    def _weights(self) -> dict[str, float]:
        weights = {"logits": 0.5, "features": 0.3, "node": 0.1, "inter_edge": 1.0, "inter_affinity": 4.0}
        return {name: weight for name, weight in weights.items() if any(name in loss.terms for loss in self.losses)}

    def _handlers(self, seed: int) -> list[Any]:
        return [
            ValidationHandler(interval=1, validator=self.evaluator),
            LrScheduleHandler(self.scheduler, print_lr=False),
            EpochSeed(seed),
            DistillationHandler(Teacher(teacher), self.losses, self._weights()),
            WeightSchedule(0.5),
            NanGuard(),
        ]

    def result(self) -> dict[str, Any]:
        """All that two equal runs have equal."""
        return {
            **{name: part.state_dict() for name, part in self._objects().items() if name != "distill_loss"},
            "distill_loss": nn.ModuleList(self.losses).state_dict(),
            "best_metric": float(self.evaluator.state.best_metric),
            "best_metric_epoch": self.evaluator.state.best_metric_epoch,
        }


# ---- in processes of their own, to be killed, starved or multiplied ------------------------------------------------


def start(target: Callable[..., None], *args: Any, **options: Any) -> BaseProcess:
    """Call a function of this module in a new process, forked from one that has imported torch but run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "medkd.handlers.checkpoint", "medkd.handlers.distillation", "medkd.losses.features", "medkd.losses.logits",
        "monai.bundle", "monai.handlers", "monai.losses", "monai.transforms", "monai.engines", "torch._dynamo",
        "tensorboard.backend.event_processing.event_accumulator", "torch.utils.tensorboard",
    ])
    process = context.Process(target=_in_child, args=(target, *args), kwargs=options)
    process.start()
    return process


def _in_child(target: Callable[..., None], *args: Any, **options: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)           # for the loaders' workers
    torch.set_num_threads(1)
    target(*args, **options)


def finish(*started: BaseProcess) -> None:
    """Wait for processes, which must end well."""
    for process in started:
        process.join()
        assert process.exitcode == 0, f"the process ended with {process.exitcode}"


def train(directory: Path, **options: Any) -> None:
    """Do a whole run and save what it ends with."""
    run = Run(directory, **options)
    run.trainer.run()
    torch.save(run.result(), directory / "result.pt")


def train_on_a_full_disk(directory: Path, log: Path) -> None:
    """From the second epoch on, no file may grow beyond 1000 bytes; the log is written at the end."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = on(Events.EPOCH_STARTED(once=2), lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most)))
    records = logging.handlers.BufferingHandler(10_000)
    logging.getLogger("medkd").addHandler(records)
    run = Run(directory, extra=[fill])
    try:
        run.trainer.run()
    except OSError as error:
        logging.getLogger("medkd").error(error)
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        log.write_text("\n".join(record.getMessage() for record in records.buffer))
        torch.save(run.result(), directory / "result.pt")


class Heavy(ToyNetwork):
    """A network of 4 MB, which says in every voxel of its ballast how many epochs it has seen."""

    def __init__(self) -> None:
        super().__init__(STUDENT_WIDTH)
        self.ballast = nn.Parameter(torch.zeros(1_000_000), requires_grad=False)


def save_for_ever(directory: Path) -> None:
    """Resume, and do little but write checkpoints until someone ends it."""
    network = Heavy()
    note = on(Events.EPOCH_STARTED, lambda engine: network.ballast.fill_(engine.state.epoch))
    saver = CheckpointHandler(directory, {"network": network}, resume=True)
    head = list(network.head.parameters())
    make_trainer(network, [note, saver], parameters=head, data=cases(1), epochs=100_000).run()


def train_one_rank(rank: int, ranks: int, directory: Path, weights: Path, last: int = 0, **options: Any) -> None:
    """Do one rank's part of a run, which ends after epoch `last`; save its end and its cases in `directory`."""
    distributed.init_process_group("gloo", f"file://{directory}/meeting_point", rank=rank, world_size=ranks)
    seen: list[str] = []
    extra = [
        on(Events.GET_BATCH_COMPLETED, lambda engine: seen.extend(engine.state.batch["image"].meta["filename_or_obj"])),
        on(Events.EPOCH_COMPLETED, lambda engine: engine.terminate() if engine.state.epoch == last else None),
    ]
    run = Run(
        weights, wrap=nn.parallel.DistributedDataParallel, extra=extra,
        sampler=lambda dataset: DistributedSampler(dataset, ranks, rank), **options,
    )
    run.trainer.run()
    torch.save((run.result(), seen), directory / f"result_{rank}.pt")
    distributed.destroy_process_group()


def balance_one_rank(rank: int, ranks: int, directory: Path) -> None:
    """Train one rank with balanced terms; save its own norms of the first step, what it was told, and the factors."""
    distributed.init_process_group("gloo", f"file://{directory}/meeting_point", rank=rank, world_size=ranks)
    network = nn.parallel.DistributedDataParallel(student())
    told: list[dict[str, float]] = []
    own: list[float] = []

    def measure(engine: Any) -> None:
        found = torch.autograd.grad(engine.state.supervised, list(network.parameters()), retain_graph=True)
        own.append(float(torch.cat([one.flatten() for one in found]).norm()))

    norms = GradientNorms(balance={"logits": 0.3}, steps=2)
    handlers = [
        DistillationHandler(Teacher(teacher), SoftLabelLoss(), {"logits": 0.5}),
        on(DistillationEvents.TERMS_COMPLETED, measure), norms,
        on(Events.ITERATION_COMPLETED, lambda engine: told.append(dict(engine.state.gradient_norms))),
    ]
    engine = make_trainer(
        network, handlers, epochs=3, sampler=lambda dataset: DistributedSampler(dataset, ranks, rank)
    )
    engine.run()
    weights = [one.detach() for one in network.parameters()]
    torch.save((own, told, norms.state_dict()["factors"], weights), directory / f"result_{rank}.pt")
    distributed.destroy_process_group()


def discriminate_one_rank(rank: int, ranks: int, directory: Path) -> None:
    """Train one rank with a discriminator of each form, by plain gradient descent, for a step and a bad one.

    Saved are, for each form, what it was shown, what the discriminator was after the first step, and whether the second
    was refused, in which that of the last rank alone gives large scores.
    """
    distributed.init_process_group("gloo", f"file://{directory}/meeting_point", rank=rank, world_size=ranks)
    results = {form: _discriminate(rank, ranks, form) for form in ("wgan_gp", "hinge")}
    torch.save(results, directory / f"result_{rank}.pt")
    distributed.destroy_process_group()


def _discriminate(rank: int, ranks: int, form: Any) -> tuple[Any, Any, bool]:
    network = nn.parallel.DistributedDataParallel(student())
    discriminator = Discriminator(2, 2, width=4, layers=1, seed=rank)   # the first rank's is to count
    loss = AdversarialLoss(discriminator, "paper", form)
    shown: list[tuple[Tensor, Tensor]] = []
    states: list[Mapping[str, Tensor]] = []

    def look(engine: Any) -> None:
        shown.append((engine.state.teacher["pred"].clone(), engine.state.student["pred"].detach().clone()))

    def spoil(_engine: Any) -> None:
        states.append(state_of(discriminator))
        with torch.no_grad():
            discriminator.body[-1].weight.mul_(1e8 if rank == ranks - 1 else 1.0)

    handlers = [
        DistillationHandler(Teacher(teacher), loss, {"adversarial": 0.1}),
        DiscriminatorTraining(loss, torch.optim.SGD(discriminator.parameters(), 0.1)),
        on(Events.ITERATION_COMPLETED, spoil),
    ]
    engine = make_trainer(
        network, handlers, epochs=2, sampler=lambda dataset: DistributedSampler(dataset, ranks, rank)
    )
    engine.add_event_handler(DistillationEvents.TEACHER_COMPLETED, look)
    try:
        engine.run()
    except DiscriminatorDivergedError:
        return shown[0], states[0], True
    return shown[0], states[0], False
