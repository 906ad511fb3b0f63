# SPDX-License-Identifier: Apache-2.0
"""Cost of distillation that reads predictions alone: its loss, and a training step whose teacher was asked before.

Sizes are those of the CT bundle: two crops of 48 x 48 x 48 voxels, 8 classes, one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.data.meta_tensor import MetaTensor
from monai.engines.trainer import SupervisedTrainer
from monai.inferers.inferer import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandAffined, RandCropByLabelClassesd, RandScaleIntensityd
from torch import Tensor

from lab.bench.peers import Function, against
from lab.measure import Row, compare
from medkd.data.soft_labels import SoftLabeld, SoftLabels, UnpackSoftLabeld
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.teacher import Teacher
from medkd.losses.ignoring import IgnoringLoss
from medkd.losses.soft_target import SoftTarget, SoftTargetLoss
from medkd.ops.ignored import UNLABELED

CLASSES, CASES, STEPS = 8, 4, 32   # steps of each training, so that its start weighs little
WEIGHTS = {"soft_target": 1.0}                                     # plain distillation of the CT bundle
LAYOUTS = {"": torch.contiguous_format, "_channels_last": torch.channels_last_3d}


def loss(quick: bool, layout: str) -> list[Row]:
    """Compare the loss with MONAI's, whose target is made of the teacher's prediction first, or was there before."""
    torch.manual_seed(0)
    size = _crop(quick)
    maps = torch.randn(2, 2, CLASSES, *[size] * 3)
    student, teacher = (one.to(memory_format=LAYOUTS[layout]) for one in maps)
    leaf, label = student.detach().requires_grad_(), teacher.argmax(1, keepdim=True)
    hard, soft = (DiceCELoss(False, to_onehot_y=hot, softmax=True, batch=True) for hot in (True, False))
    cases: dict[str, tuple[SoftTarget, str, Function]] = {
        "argmax": ("argmax", "argmax, MONAI's DiceCELoss", lambda pred: hard(pred, teacher.argmax(1, keepdim=True))),
        "label": ("argmax", "MONAI's DiceCELoss of that label", lambda pred: hard(pred, label)),
        "probabilities": ("probabilities", "softmax, MONAI's DiceCELoss", lambda pred: soft(pred, teacher.softmax(1))),
    }
    rows = []
    for name, (target, other, plain) in cases.items():
        mine = SoftTargetLoss(target)
        words = f"Dice and cross entropy, teacher's {target}", other
        ours = partial(_term, loss=mine, teacher=teacher)
        rows += against(f"{name}{layout}", words, (ours, plain), leaf, 2 if quick else 9)
    return rows


def _term(pred: Tensor, loss: SoftTargetLoss, teacher: Tensor) -> Tensor:
    value: Tensor = loss({"pred": pred}, {"pred": teacher})["soft_target"]
    return value


def _crop(quick: bool) -> int:
    return 16 if quick else 48


def _student() -> UNet:
    torch.manual_seed(0)
    network = UNet(3, 1, CLASSES, (4, 8, 16, 32), (2, 2, 2), num_res_units=1)
    return network.to(memory_format=torch.channels_last_3d)   # type: ignore[no-any-return, call-overload]


def _teacher(quick: bool) -> UNet:
    torch.manual_seed(1)
    return UNet(3, 1, CLASSES, (2, 4, 8, 8) if quick else (24, 48, 96, 192), (2, 2, 2), num_res_units=2)


class Trainings:
    """Trainings of a few steps each on volumes whose soft labels are on the disk, with a teacher and without."""

    def __init__(self, quick: bool, folder: Path) -> None:
        self.size = _crop(quick)
        self.network = _teacher(quick)
        torch.save(self.network.state_dict(), folder / "teacher.pt")
        self.losses = [SoftTargetLoss()]
        self.teacher = Teacher(partial(_teacher, quick), folder / "teacher.pt", weights=WEIGHTS)
        inferer = SlidingWindowInferer([self.size] * 3, overlap=0.25)
        self.soft_labels = SoftLabels(self.teacher, folder / "soft_labels", inferer, self.losses, WEIGHTS)
        shape = (1, *[self.size + self.size // 2] * 3)
        generator = torch.Generator().manual_seed(0)
        self.cases = [
            {"image": MetaTensor(torch.rand(shape, generator=generator)),
             "label": MetaTensor(torch.randint(0, CLASSES, shape, generator=generator).float())}
            for _ in range(CASES)
        ]
        self.loss = IgnoringLoss(DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True))

    def transforms(self, distills: bool) -> Compose:
        """What the CT bundle does to a cached case; the soft label is moved with the image."""
        cut = ["image", "label", *(["centers", "soft_label"] if distills else [])]
        moved = ["image", "label", *(["teacher_classes"] if distills else [])]
        crop = RandCropByLabelClassesd(
            cut, "centers" if distills else "label", [self.size] * 3, num_classes=CLASSES, num_samples=2, warn=False,
            allow_missing_keys=True,
        )
        affine = RandAffined(
            moved, prob=0.5, rotate_range=[0.15] * 3, scale_range=[0.1] * 3, padding_mode="border",
            mode=["bilinear", "nearest", "nearest"][: len(moved)],
        )
        own = [UnpackSoftLabeld(self.soft_labels)] if distills else []
        chain = Compose([crop, *own, affine, RandScaleIntensityd("image", 0.1, 0.5)])
        chain.set_random_state(0)
        return chain

    def batches(self, distills: bool, labeled: bool = True) -> DataLoader:
        """Two crops of one case in each step; soft labels are cached with the cases, as MONAI's `CacheDataset` does."""
        cases: list[dict[Any, Any]] = [dict(case) for case in self.cases]
        if not labeled:
            cases = [{**case, "label": torch.full_like(case["label"], UNLABELED)} for case in cases]
        if distills:
            cases = [SoftLabeld(self.soft_labels)(case) for case in cases]
        return DataLoader(Dataset(cases, self.transforms(distills)), batch_size=1, num_workers=0)

    def run(self, batches: Any, distills: bool) -> None:
        """Train; without a teacher there is no handler at all, and with one it is there already: steps are compared."""
        network = _student()
        handlers = [DistillationHandler(self.network, self.losses, WEIGHTS)] if distills else []
        SupervisedTrainer(
            torch.device("cpu"), 1, batches, network, torch.optim.AdamW(network.parameters(), lr=0.002), self.loss,
            epoch_length=STEPS, train_handlers=handlers,
        ).run()


def cached_step(quick: bool) -> list[Row]:
    """Compare training steps with a cached teacher and soft targets with steps without a teacher.

    With batches that are ready, with all that is done to a case behind the cache, and that without labels: then the
    teacher takes the place of the supervised loss, and does not come on top of it.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(quick, Path(folder))
        for name, ready, labeled in (("step", True, True), ("training", False, True), ("unlabeled", False, False)):
            sources: Sequence[Any] = [trainings.batches(True, labeled), trainings.batches(False)]
            sources = [list(source) for source in sources] if ready else sources
            works = tuple(partial(trainings.run, one, n == 0) for n, one in enumerate(sources))
            what = ("batches ready" if ready else "with crops and augmentation") + ("" if labeled else ", no labels")
            words = f"steps with a cached teacher, {what}", f"steps without a teacher, {what}"
            rows += compare(f"cached_{name}", words, works, 2 if quick else 7, "lower", 1.1, memory=False)   # type: ignore[arg-type]
    return rows


MEASUREMENTS: Mapping[str, Callable[[bool], list[Row]]] = {
    **{f"loss{layout}": partial(loss, layout=layout) for layout in LAYOUTS},
    "cached_step": cached_step,
}
