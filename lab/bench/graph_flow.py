# SPDX-License-Identifier: Apache-2.0
"""Cost of Graph Flow distillation: in a training step, alone, and of its nodes with all their memory.

Sizes are those of five-level U-Nets on a patch of 96 x 96 x 96 voxels: in a training step student 16 to 160 channels,
teacher 32 to 320, brought to the student's channels by paraphrasers; for the share of the loss alone a student of 6 to
60 channels, the least that we distil into, so that it is the largest. Steps use two threads, single terms one. The
plain formulas lay out every window of a map (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lab.bench.dynunets import DynUNets, Filters, loss_alone, make_network
from lab.bench.peers import against, memory_rows
from lab.measure import Row, compare, threads
from medkd.losses.discriminator import AdversarialForm, Discriminator, discriminator_loss, student_score_loss
from medkd.losses.graph_flow import GraphFlowLoss
from medkd.losses.paraphraser import Paraphrasers, TeacherParaphrasers
from medkd.ops.salience import salience_nodes
from medkd.taps import FeatureTaps
from tests.oracles import graph_flow as plain

STUDENT, CLASSES = (6, 12, 24, 48, 60), 2
# encoder and decoder layers of strides 4, 2 and 1
FLOWS = [["downsamples.1", "upsamples.1"], ["downsamples.0", "upsamples.2"], ["input_block", "upsamples.3"]]
WINDOW = (3, 3, 3)
GOAL = 0.03
KEPT = 0.5                 # MiB for backward beyond the taps


def _paraphrased(filters: Filters) -> GraphFlowLoss:
    """One pair of layers, with paraphrasers of first values from a file, as in a training."""
    channels = [[filters[1][2], filters[0][2]]] * 2
    with TemporaryDirectory() as folder:
        path = Path(folder) / "paraphrasers.pt"
        torch.save(Paraphrasers(channels).state_dict(), path)
        loss = GraphFlowLoss(FLOWS[:1], paraphrasers=TeacherParaphrasers(FLOWS[0], channels, path))
        loss.activate(loss.terms)
    return loss


def training_step(quick: bool) -> list[Row]:
    """Compare a step with both terms, the paraphrasers in it, with what it cannot do without."""
    nothing = partial(torch.zeros, 1, 1, dtype=torch.long)
    setting = DynUNets(quick, CLASSES, _paraphrased, lambda size: nothing(size, size, size))
    return setting.training_step("both terms, paraphrased teacher")


def _adversarial(quick: bool, form: AdversarialForm, width: int, attended: int) -> list[Row]:
    """A step of student and discriminator on the same predictions, against the student's alone."""
    torch.manual_seed(0)
    size = 48 if quick else 96
    network, image = make_network(STUDENT, CLASSES), torch.randn(1, 1, size, size, size)
    discriminator = Discriminator(CLASSES, width=width, layers=3, attended=attended)
    teacher = torch.randn(1, CLASSES, size, size, size)
    pull = torch.randn_like(teacher)

    def alone() -> None:
        network.zero_grad()
        torch.autograd.backward(network(image), pull)

    def both() -> None:
        network.zero_grad()
        pred = network(image)
        score = student_score_loss(discriminator.eval().requires_grad_(False)(pred))
        torch.autograd.backward([pred, score], [pull, torch.ones_like(score)])
        discriminator.train().requires_grad_(True).zero_grad()
        torch.autograd.backward(discriminator_loss(discriminator, teacher, pred.detach(), form)["loss"])

    words = f"student and discriminator of width {width}, {form}, {size}^3", "student, forward and backward"
    with threads(1 if quick else 2):
        return compare(f"adversarial_{form}_{width}", words, (both, alone), 2 if quick else 5, "lower",
                       memory=False)


def discriminator(quick: bool) -> list[Row]:
    """Tell what the discriminator costs beside the smallest student: the bundle's, and the published form and width."""
    bundle, published = _adversarial(quick, "hinge", 8, 216), _adversarial(quick, "hinge", 64, 1728)
    return [*bundle, *_adversarial(quick, "wgan_gp", 8, 1728), *published]


def _share(quick: bool, pairs: int) -> list[Row]:
    """The loss of some pairs of layers, down to the features, against the student's forward and backward pass."""
    torch.manual_seed(0)
    size = 32 if quick else 96
    network, image = make_network(STUDENT, CLASSES), torch.randn(1, 1, size, size, size)
    loss = GraphFlowLoss(FLOWS[:pairs])
    taps = FeatureTaps(network, [student for student, _ in loss.tap_pairs])
    taps.open()
    pred = network(image)
    student = {name: value.detach().requires_grad_() for name, value in taps.close().items()} | {"pred": pred}
    teacher = {name: torch.randn_like(value) for name, value in student.items()}
    student["pred"] = pred.detach()
    pull = torch.randn_like(pred.detach())

    def step() -> None:
        network.zero_grad()
        torch.autograd.backward(network(image), pull)

    words = f"both terms, {pairs} pair(s) of layers, {size}^3", "student, forward and backward"
    works = partial(loss_alone, loss, student, teacher, None), step
    with threads(1 if quick else 2):
        return compare(f"loss_share_{pairs}", words, works, 2 if quick else 7, "lower", GOAL, memory=False)


def loss_share_one(quick: bool) -> list[Row]:
    """Time the loss with the published one pair of layers at stride 4."""
    return _share(quick, 1)


def loss_share_three(quick: bool) -> list[Row]:
    """Time it with pairs at strides 4, 2 and 1."""
    return _share(quick, 3)


# ---- nodes of one layer --------------------------------------------------------------------------------------------


def _layer(quick: bool) -> Tensor:
    torch.manual_seed(0)
    size = 12 if quick else 48
    return torch.randn(2, 32, size, size, size, requires_grad=True)


def nodes_time(quick: bool) -> list[Row]:
    """Compare with the plain formula, forward and backward: the same value and gradient."""
    layer = _layer(quick)
    words = f"gathered windows, 2 x 32 x {layer.shape[-1]}^3", "all windows laid out"
    functions = partial(salience_nodes, window=WINDOW), partial(plain.salience, window=WINDOW)
    return against("nodes", words, functions, layer, 2 if quick else 5)


def nodes_memory(quick: bool) -> list[Row]:
    """Give what is kept for backward beyond the layer, and the peak with its gradient; also of the plain formula."""
    layer = _layer(quick)
    rows = []
    for name, function, goal in (("ours", salience_nodes, KEPT), ("plain", plain.salience, None)):
        words = f"{name}, 2 x 32 x {layer.shape[-1]}^3"
        rows += memory_rows(("nodes", name), words, partial(function, window=WINDOW), layer, goal)
    return rows


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    measure.__name__: measure
    for measure in (training_step, discriminator, loss_share_one, loss_share_three, nodes_time, nodes_memory)
}
