# SPDX-License-Identifier: Apache-2.0
"""What less resolution saves, and the cost of class attention (AT+) in a training step, and of its closed form.

In 2-D student and teacher are VGG16 up to its last layer of features, batches of 8 images of 192 x 192 and 48 x 48. In
3-D they are five-level U-Nets of 32 and 16 channels at the head, on patches of 96 x 96 x 96 and 48 x 48 x 48 voxels.
Steps use two threads, the loss alone one. The released form asks autograd for the weights of each class, with the graph
of that backward pass (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from lab.bench.dynunets import STUDENT, TEACHER, make_network
from lab.bench.peers import against, memory_rows, step_works
from lab.measure import Row, compare, threads
from medkd.losses.inter_resolution_attention import InterResolutionAttentionLoss
from medkd.ops.class_attention import class_attention
from medkd.taps import FeatureTaps
from tests.oracles import inter_resolution_attention as plain

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))          # channels and convolutions of each level
CLASSES_2D, CLASSES_3D = 4, 3
STEP_GOAL, FORM_GOAL = 1.05, 2.0
FACTOR, SAVING_2D, SAVING_3D = 4, 8.0, 30.0
KEPT = 11.0                # MiB beyond the layer, of which the maps of all classes are 10.1


class Vgg(nn.Module):
    """Convolutions up to the layer that is averaged, and a linear head."""

    def __init__(self, levels: Sequence[tuple[int, int]], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n, (channels, count) in enumerate(levels):
            before = levels[n - 1][0] if n else 3
            for one, other in pairwise([before, *[channels] * count]):
                layers += [nn.Conv2d(one, other, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if n < len(levels) - 1 else []
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(levels[-1][0], classes)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K)."""
        logits: Tensor = self.head(self.features(image).mean((2, 3)))
        return logits


def _step(
    name: str, words: str, networks: tuple[nn.Module, nn.Module], images: tuple[Tensor, Tensor],
    loss: InterResolutionAttentionLoss, supervised: nn.Module, label: Tensor, quick: bool,
) -> list[Row]:
    """Compare a step with attention, without the optimizer, with the plain step and the teacher's forward pass."""
    loss.activate(["attention"])
    student, teacher = networks
    teacher.eval().requires_grad_(False)
    paths = [[pair[role] for pair in loss.tap_pairs] for role in (0, 1)]
    taps = [FeatureTaps(network, names) for network, names in zip(networks, paths, strict=True)]

    def run(role: int) -> dict[str, Tensor]:
        taps[role].open()
        pred = networks[role](images[role])
        return taps[role].close() | {"pred": pred}

    def run_student() -> dict[str, Tensor]:
        student.zero_grad()
        return run(0)

    def run_teacher() -> dict[str, Tensor]:
        with torch.no_grad():
            return run(1)

    works = step_works(run_student, run_teacher, supervised, loss, label)
    with threads(1 if quick else 2):
        return compare(name, (words, "plain step + teacher's forward"), works, 2 if quick else 7, "lower", STEP_GOAL)


def training_step_2d(quick: bool) -> list[Row]:
    """Time a classifier's step."""
    torch.manual_seed(0)
    levels = [(channels // 16, count) for channels, count in VGG16] if quick else VGG16
    networks = Vgg(levels, CLASSES_2D), Vgg(levels, CLASSES_2D)
    images = torch.rand(8, 3, 48, 48), torch.rand(8, 3, 192, 192)
    last = f"features.{len(networks[0].features) - 1}"
    loss = InterResolutionAttentionLoss(last, "head.weight", grid="teacher")           # 12 x 12 cells instead of 3 x 3
    label = torch.arange(8) % CLASSES_2D
    words = "VGG16 step with attention, 8 x 48^2 of 192^2"
    return _step("training_step_2d", words, networks, images, loss, nn.CrossEntropyLoss(), label, quick)


def training_step_3d(quick: bool) -> list[Row]:
    """Time a step of segmentation, whose maps are of the layer at full resolution."""
    torch.manual_seed(0)
    student, teacher = ([count // 4 for count in counts] if quick else counts for counts in (STUDENT, TEACHER))
    networks = make_network(student, CLASSES_3D), make_network(teacher, CLASSES_3D)
    size = 32 if quick else 48
    images = torch.rand(1, 1, *[size] * 3), torch.rand(1, 1, *[2 * size] * 3)
    loss = InterResolutionAttentionLoss("upsamples.3", "output_block.conv.conv.weight", task="segmentation")
    supervised, label = DiceCELoss(to_onehot_y=True, softmax=True), torch.randint(0, CLASSES_3D, images[0].shape)
    words = f"U-Net step with attention, {size}^3 of {2 * size}^3"
    return _step("training_step_3d", words, networks, images, loss, supervised, label, quick)


# ---- the network at less resolution ------------------------------------------------------------------------------


def _saving(name: str, network: nn.Module, image: Tensor, goal: float, quick: bool) -> list[Row]:
    """Compare the forward pass on a reduced image with that on the whole one; reading and reducing it is not in it."""
    pooling = nn.functional.avg_pool2d if image.dim() == 4 else nn.functional.avg_pool3d
    images, network = (pooling(image, FACTOR), image), network.eval()
    words = [f"{type(network).__name__}, {len(one)} x {one.shape[-1]}^{one.dim() - 2}" for one in images]

    def run(one: Tensor) -> Tensor:
        with torch.inference_mode():
            pred: Tensor = network(one)
        return pred

    works = partial(run, images[0]), partial(run, images[1])
    return compare(name, (words[0], words[1]), works, 2 if quick else 7, "higher", goal)


def saving_2d(quick: bool) -> list[Row]:
    """Time the published classifier at factor 4."""
    torch.manual_seed(0)
    levels = [(channels // 16, count) for channels, count in VGG16] if quick else VGG16
    return _saving("saving_2d", Vgg(levels, CLASSES_2D), torch.rand(4, 3, 192, 192), SAVING_2D, quick)


def saving_3d(quick: bool) -> list[Row]:
    """Time a U-Net of five levels at factor 4 along each axis; two windows, as torch is slow on a small one alone."""
    torch.manual_seed(0)
    network = make_network([count // 4 for count in STUDENT] if quick else STUDENT, CLASSES_3D)
    return _saving("saving_3d", network, torch.rand(2, 1, 128, 128, 128), SAVING_3D, quick)


# ---- the loss alone ------------------------------------------------------------------------------------------------


def closed_form(quick: bool) -> list[Row]:
    """Compare the loss with its released form, whose weights come by autograd: the same value and gradient."""
    torch.manual_seed(0)
    size, channels = (8, 32) if quick else (32, 512)
    leaf, other = torch.randn(2, 8, channels, size, size)
    heads = [nn.Linear(channels, CLASSES_2D) for _ in range(2)]
    loss = InterResolutionAttentionLoss("maps", "weight")
    loss.activate(["attention"])

    def released(maps: Tensor) -> Tensor:
        teacher = other.detach().requires_grad_()
        right = plain.attention(heads[1](teacher.mean((2, 3))), teacher, create_graph=False).detach()
        return plain.distance(plain.attention(heads[0](maps.mean((2, 3))), maps), right)

    def ours(maps: Tensor) -> Tensor:
        student, teacher = (
            {"maps": one, "weight": head.weight, "pred": head(one.mean((2, 3)))}
            for one, head in zip((maps, other), heads, strict=True)
        )
        value: Tensor = loss(student, teacher)["attention"]
        return value

    words = f"closed form, 8 x {channels} x {size}^2, {CLASSES_2D} classes", "autograd with create_graph"
    return against("closed_form", words, (ours, released), leaf.requires_grad_(), 2 if quick else 7, FORM_GOAL)


def _layer(quick: bool) -> tuple[Tensor, Tensor]:
    """The layer before a head in 3-D, and the head's weight."""
    torch.manual_seed(0)
    size = 16 if quick else 96
    return torch.randn(1, 32, size, size, size, requires_grad=True), torch.randn(CLASSES_3D, 32, requires_grad=True)


def _products(maps: Tensor, weight: Tensor) -> Tensor:
    """The same maps, as two products that autograd knows."""
    flat = maps.flatten(2)
    total = torch.matmul(weight.relu(), flat.relu()) + torch.matmul((-weight).relu(), (-flat).relu())
    return total.view(len(maps), -1, *maps.shape[2:])


def maps_time(quick: bool) -> list[Row]:
    """Compare maps with two products by autograd, forward and backward."""
    layer, weight = _layer(quick)
    words = f"in blocks of channels, 32 x {layer.shape[-1]}^3", "two products by autograd"
    functions = partial(class_attention, weight=weight, pooled=False), partial(_products, weight=weight)
    return against("maps", words, functions, layer, 2 if quick else 7)


def maps_memory(quick: bool) -> list[Row]:
    """Give what is kept for backward beyond the layer, and the peak with its gradient; also of two products."""
    layer, weight = _layer(quick)
    ours = partial(class_attention, weight=weight, pooled=False)
    rows = []
    for name, function, goal in (("ours", ours, KEPT), ("plain", partial(_products, weight=weight), None)):
        rows += memory_rows(("maps", name), f"{name}, 32 x {layer.shape[-1]}^3", function, layer, goal)
    return rows


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    measure.__name__: measure
    for measure in (saving_2d, saving_3d, training_step_2d, training_step_3d, closed_form, maps_time, maps_memory)
}
