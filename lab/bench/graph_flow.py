# SPDX-License-Identifier: Apache-2.0
"""Cost of Graph Flow distillation: in a training step, alone, and of its nodes with all their memory.

Sizes are those of a five-level U-Net on a patch of 96 x 96 x 96 voxels. It has 6 to 60 channels, the least that we
distil into, so that the share of the loss is the largest. Steps use two threads, single terms one. The plain formulas
lay out every window of a map (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from lab.bench.dynunets import loss_alone
from lab.bench.peers import against
from lab.measure import Row, compare, kept_memory, peak_memory, threads
from medkd.losses.graph_flow import GraphFlowLoss
from medkd.ops.salience import salience_nodes
from medkd.taps import FeatureTaps
from tests.oracles import graph_flow as plain

STUDENT, CLASSES = (6, 12, 24, 48, 60), 2
# encoder and decoder layers of strides 4, 2 and 1
FLOWS = [["downsamples.1", "upsamples.1"], ["downsamples.0", "upsamples.2"], ["input_block", "upsamples.3"]]
WINDOW = (3, 3, 3)
GOAL = 0.03
MEBI = 2.0**20
KEPT = 0.5                 # MiB for backward beyond the taps


def _network() -> nn.Module:
    levels = len(STUDENT)
    strides = [1] + [2] * (levels - 1)
    return DynUNet(3, 1, CLASSES, [3] * levels, strides, strides[1:], filters=STUDENT)


def _share(quick: bool, pairs: int) -> list[Row]:
    """The loss of some pairs of layers, down to the features, against the student's forward and backward pass."""
    torch.manual_seed(0)
    size = 32 if quick else 96
    network, image = _network(), torch.randn(1, 1, size, size, size)
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
    size = layer.numel() * layer.element_size() / MEBI
    goals = {"ours": (KEPT, KEPT + 1.2 * size), "plain": (None, None)}
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": partial(salience_nodes, window=WINDOW), "plain": partial(plain.salience, window=WINDOW)
    }
    rows = []
    for name, function in functions.items():
        kept = kept_memory(partial(function, layer))
        peak = peak_memory(partial(_both_ways, function, layer))
        words = f"{name}, 2 x 32 x {layer.shape[-1]}^3: "
        for what, value, goal in (("kept", kept, goals[name][0]), ("peak", peak, goals[name][1])):
            tail = "for backward beyond the layer" if what == "kept" else f"with a gradient of {size:.1f} MiB"
            reached = None if goal is None else value <= goal
            rows.append(Row(f"nodes_{what}_{name}", f"{words}{what} {tail}", None, value, None, None, "lower", goal,
                            reached, "MiB", None))
    return rows


def _both_ways(function: Callable[[Tensor], Tensor], layer: Tensor) -> Tensor:
    return torch.autograd.grad(function(layer).sum(), layer)[0]


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    measure.__name__: measure for measure in (loss_share_one, loss_share_three, nodes_time, nodes_memory)
}
