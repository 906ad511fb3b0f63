# SPDX-License-Identifier: Apache-2.0
"""Cost of graph relation distillation: op by op against the plain formulas, in a training step, and its students.

One thread throughout. The plain formulas are batched torch with autograd, with loops over instances and past images
(`tests/oracles`). Shapes are those of the released code: crops of plants, and windows of EM.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch
from measure import Row, compare_memory, compare_times, peak_memory, plain_row, threads
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medkd.handlers.cpu_autocast import CpuAutocast, CpuDtype
from medkd.handlers.distillation import DistillationHandler
from medkd.losses.affinity import AffinityLoss
from medkd.losses.graph_relation import GraphRelationLoss
from medkd.losses.relation_bank import RelationBank
from medkd.ops.embedding import offset_affinity, pooled_directions
from medkd.ops.graph import unit_vectors
from medkd.ops.instances import moment_distance, relation_edges, segment_mean
from oracles import graph_relation as plain

__all__ = ["MEASUREMENTS"]

CHANNELS, CAPACITY, SAMPLE = 16, 32, 12
TOLERANCE = 1e-5                                                   # relative, of values and gradients
OFFSETS = {
    2: [(-step * (1 - axis), -step * axis) for step in (1, 3, 5, 9, 27) for axis in (0, 1)],
    3: [one for z, y in ((1, 1), (2, 3), (3, 9), (4, 27)) for one in ((-z, 0, 0), (0, -y, 0), (0, 0, -y))],
}
BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
Function = Callable[[Tensor], Tensor]


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Size of a batch of embeddings, and the goals for it: nodes and edges, affinities across images."""

    batch: int
    size: tuple[int, ...]
    instances: int
    graph_goal: float
    across_goal: float

    @property
    def name(self) -> str:
        """Batch and size."""
        return "x".join(map(str, (self.batch, *self.size)))


SHAPES = [
    Shape(2, (544, 544), 20, 4, 20), Shape(2, (25, 56, 56), 30, 6, 5), Shape(1, (18, 160, 160), 30, 6, 8),
    Shape(2, (18, 160, 160), 30, 6, 8),
]
QUICK = [Shape(2, (56, 48), 4, 4, 20), Shape(1, (6, 30, 32), 4, 6, 5)]


@dataclass(frozen=True)
class Batch:
    """Embeddings of both networks with their labels, and those of the teacher's past images."""

    student: Tensor
    teacher: Tensor
    label: Tensor
    past: Tensor
    past_label: Tensor

    @classmethod
    def make(cls, shape: Shape) -> Batch:
        """Build Gaussian embeddings, and Voronoi cells as labels."""
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2 * shape.batch + SAMPLE, CHANNELS, *shape.size, generator=generator)
        student, teacher, past = maps.split([shape.batch, shape.batch, SAMPLE])
        seeds = [*range(shape.batch), *range(100, 100 + SAMPLE)]
        label = torch.stack([_voronoi(shape.size, shape.instances, seed) for seed in seeds])
        return cls(student.clone().requires_grad_(), teacher, label[: shape.batch], past, label[shape.batch :])

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Those of the paper's code for this rank."""
        return OFFSETS[self.student.dim() - 2]

    def loss(self) -> GraphRelationLoss:
        """Give the loss, with the past images in its bank."""
        loss = GraphRelationLoss(self.offsets, bank=RelationBank(CHANNELS, CAPACITY, SAMPLE))
        with torch.no_grad():
            for maps, label in zip(self.past.split(2), self.past_label.split(2), strict=True):
                loss({"pred": maps}, {"pred": maps}, label)
        return loss


def _voronoi(size: Sequence[int], count: int, seed: int) -> Tensor:
    """Cells of random points, without the quarter of the voxels that is farthest from them; (1, *S)."""
    points = torch.rand(count, len(size), generator=torch.Generator().manual_seed(seed)) * torch.tensor(size)
    voxels = torch.cartesian_prod(*map(torch.arange, size)).float()
    distance, nearest = torch.cdist(voxels, points).min(1)
    return torch.where(distance > distance.quantile(0.75), 0, nearest + 1).reshape(1, *size)


# ---- op by op ------------------------------------------------------------------------------------------------------


def _over_shapes(quick: bool, measure: Callable[[Shape, int], list[Row]]) -> list[Row]:
    return [row for shape in (QUICK if quick else SHAPES) for row in measure(shape, 2 if quick else 3)]


def _against(
    name: str, subject: tuple[str, Function], reference: tuple[str, Function], leaf: Tensor, pairs: int,
    goal: float | None = None,
) -> list[Row]:
    """Time forward and backward to `leaf`, after seeing that both give the same value and gradient."""

    def run(function: Function) -> tuple[Tensor, Tensor]:
        value = function(leaf)
        pull = torch.linspace(1.0, -1.0, value.numel()).reshape(value.shape)
        return value.detach(), torch.autograd.grad(value, leaf, pull)[0]

    works = [lambda: run(subject[1]), lambda: run(reference[1])]
    with threads(1):
        for what, found, right in zip(("value", "gradient"), works[0](), works[1](), strict=True):
            if (error := float((found - right).norm() / right.norm())) > TOLERANCE:
                raise RuntimeError(f"{name}: the {what} is off by {error:.1e} of it, more than {TOLERANCE:.0e}.")
        rows = compare_times(name, (subject[0], works[0]), (reference[0], works[1]), pairs, goal=goal)
        peaks = [peak_memory(work) for work in works]
    return [*rows, compare_memory(f"{name}_memory", (subject[0], peaks[0]), (reference[0], peaks[1]))]


def affinities(shape: Shape, pairs: int) -> list[Row]:
    """Compare affinities at the offsets with rolled maps: their cosines, and products of unit vectors made once."""
    batch = Batch.make(shape)
    mine = "slices, own backward", lambda s: offset_affinity(s, batch.offsets)
    cosine = "roll and cosine", lambda s: plain.offset_affinity(s, batch.offsets)
    unit = "unit vectors, roll, product", lambda s: plain.unit_offset_affinity(s, batch.offsets)
    rows = _against(f"affinities_{shape.name}", mine, cosine, batch.student, pairs, 10)
    return rows + _against(f"affinities_unit_{shape.name}", mine, unit, batch.student, pairs)


def graph_within(shape: Shape, pairs: int) -> list[Row]:
    """Compare nodes and edges within images; the teacher's nodes are there."""
    batch = Batch.make(shape)
    label = batch.label
    nodes, present = segment_mean(batch.teacher, label)
    count = present.sum(1)
    edges = relation_edges(nodes)
    others = plain.instance_nodes(batch.teacher, label)

    def mine(student: Tensor) -> Tensor:
        own = segment_mean(student, label)[0]
        node = (torch.linalg.vector_norm(own - nodes, dim=2).sum(1) / count).mean()
        return node + ((relation_edges(own) - edges).square().sum((1, 2)) / count**2).mean()

    def other(student: Tensor) -> Tensor:
        own = plain.instance_nodes(student, label)
        return plain.node_distance(own, others) + plain.edge_distance(own, others)

    return _against(
        f"graph_within_{shape.name}", ("nodes and edges, one scatter", mine), ("loop over instances", other),
        batch.student, 2 * pairs + 1, shape.graph_goal,
    )


def graph_across(shape: Shape, pairs: int) -> list[Row]:
    """Compare edges to 12 past images; the nodes of the teacher and of these are there, in ours as one moment."""
    batch = Batch.make(shape)
    label = batch.label
    moment = batch.loss().bank.draw()[1]
    nodes, present = segment_mean(batch.teacher, label)
    units, padding = unit_vectors(nodes, dim=2), present.shape[1] / present.sum(1)
    others = plain.instance_nodes(batch.teacher, label)
    past = plain.instance_nodes(batch.past, batch.past_label)

    def mine(student: Tensor) -> Tensor:
        own = unit_vectors(segment_mean(student, label)[0], dim=2)
        return (moment_distance(own, units, moment) * padding).mean()

    def other(student: Tensor) -> Tensor:
        return plain.inter_edge_distance(plain.instance_nodes(student, label), others, past)

    return _against(
        f"graph_across_{shape.name}", ("edges to the bank, second moment", mine),
        ("loops over instances and pairs of images", other), batch.student, 2 * pairs + 1, shape.graph_goal,
    )


def affinity_across(shape: Shape, pairs: int) -> list[Row]:
    """Compare affinities to all blocks of 12 past images: one cached moment, and maps with matrices over pairs."""
    batch = Batch.make(shape)
    loss = batch.loss()
    cells, moment = loss.pooling, loss.bank.draw()[0]

    def mine(student: Tensor) -> Tensor:
        directions = [pooled_directions(maps, cells) for maps in (student, batch.teacher)]
        return moment_distance(*directions, moment).mean()

    def other(student: Tensor) -> Tensor:
        return plain.inter_affinity_distance(student, batch.teacher, batch.past, cells)

    return _against(
        f"affinity_across_{shape.name}", ("affinities to the bank, second moment", mine),
        ("matrices over pairs of blocks", other), batch.student, pairs, shape.across_goal,
    )


# ---- all of distillation -------------------------------------------------------------------------------------------


def whole(quick: bool) -> list[Row]:
    """Compare supervised loss and all terms of a 2-D step, forward and backward to the embedding, bank and all."""
    batch = Batch.make((QUICK if quick else SHAPES)[0])
    loss, supervised = batch.loss(), AffinityLoss(batch.offsets)
    bank = plain.MapBank(CAPACITY, CHANNELS, batch.student.shape[2:])
    bank.enqueue(batch.past, batch.past_label)

    def mine() -> tuple[Tensor, Tensor]:
        values = {"supervised": supervised(batch.student, batch.label)}
        values |= loss({"pred": batch.student}, {"pred": batch.teacher}, batch.label)
        return _total(values, loss, batch.student)

    def other() -> tuple[Tensor, Tensor]:
        maps = batch.student, batch.teacher, batch.label
        return _total(plain.flat_step(*maps, bank, batch.offsets, loss.pooling, SAMPLE), loss, batch.student)

    words = "supervised loss and all terms, 2-D", "plain formulas, maps in the bank"
    with threads(1):
        (values, gradient), (others, pull) = mine(), other()       # both banks give all of their 12 images here
        errors = {"value": (values / others - 1.0).abs().max(), "gradient": (gradient - pull).norm() / pull.norm()}
        rows = compare_times("whole", (words[0], mine), (words[1], other), 2 if quick else 3, goal=15)
        peaks = [peak_memory(work) for work in (mine, other)]
    rows.append(compare_memory("whole_memory", (words[0], peaks[0]), (words[1], peaks[1])))
    for what, error in errors.items():
        rows.append(plain_row(f"whole_error_{what}", words[0], float(error), TOLERANCE, "relative"))
    return rows


def _total(values: dict[str, Tensor], loss: GraphRelationLoss, student: Tensor) -> tuple[Tensor, Tensor]:
    """Every value of a step, and the gradient of their weighted sum."""
    weights = {"supervised": 1.0} | dict(loss.preset_weights)
    total = sum(weights[name] * value for name, value in values.items())
    gradient = torch.autograd.grad(total, student)[0]   # type: ignore[arg-type]
    return torch.stack([value.detach() for value in values.values()]), gradient


def memory(shape: Shape, _: int) -> list[Row]:
    """Compare the peak memory of the loss, forward and backward, with the two embeddings it is given."""
    batch = Batch.make(shape)
    loss = batch.loss()

    def work() -> None:
        _total(loss({"pred": batch.student}, {"pred": batch.teacher}, batch.label), loss, batch.student)

    given = "the two embeddings", 2 * batch.teacher.nbytes / 2**20
    with threads(1):
        sides = ("all terms, forward and backward", peak_memory(work)), given
    return [compare_memory(f"memory_{shape.name}", *sides, "lower", 3)]


# ---- networks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Published student and teacher, an image, and how large the student's forward time may be."""

    names: tuple[str, str]
    student: nn.Module
    teacher: nn.Module
    image: Tensor
    size: tuple[int, ...]
    goal: float

    @classmethod
    def mala(cls, quick: bool) -> Pair:
        """Build those of EM, with valid convolutions."""
        network = _network("graph_relation_em_neurons", "MalaUNet")
        names, image, size = ("MALA-tiny", "MALA"), (1, 1, 53, 268, 268), (25, 56, 56)
        if quick:
            students, teachers = ({"channels": one, "padding": "same"} for one in ((2,) * 4, (2, 3, 4, 5)))
            image, size = (1, 1, 6, 30, 32), (6, 30, 32)
        else:
            students, teachers = {"channels": (8, 16, 32, 64), "decoder_channels": (32, 32, 8)}, {}
        return cls(names, network(**students), network(**teachers), torch.randn(image), size, 0.25)

    @classmethod
    def resunet(cls, quick: bool) -> Pair:
        """Build those of plants."""
        network = _network("graph_relation_nuclei", "ResidualUNet")
        filters = [(2,) * 5, (4, 8, 16, 32, 64)] if quick else [(4, 8, 16, 32, 64), (32, 64, 179, 349, 680)]
        size = (48, 64) if quick else (544, 544)
        networks = [network(filters=one, published_head=True) for one in filters]
        return cls(("ResUNet-tiny", "ResUNet"), *networks, torch.randn(1, 3, *size), size, 0.10)

    def predict(self, network: nn.Module) -> Tensor:
        """Forward pass in evaluation mode without gradients."""
        with torch.no_grad():
            return network.eval()(self.image)   # type: ignore[no-any-return]


PAIRS = {"mala": Pair.mala, "resunet": Pair.resunet}


def _network(bundle: str, name: str) -> type[nn.Module]:
    """Class of a bundle's networks; every bundle's package is `scripts`, so it is forgotten again."""
    root = str(BUNDLES / bundle)
    sys.path.insert(0, root)
    try:
        return getattr(importlib.import_module("scripts.networks"), name)   # type: ignore[no-any-return]
    finally:
        sys.path.remove(root)
        for module in [one for one in sys.modules if one.partition(".")[0] == "scripts"]:
            del sys.modules[module]


def step(quick: bool, key: str) -> list[Row]:
    """Time a distillation step, without the optimizer, against the plain step and the teacher's forward pass."""
    pair = PAIRS[key](quick)
    pair.teacher.requires_grad_(False)
    offsets, widen = OFFSETS[len(pair.size)], len(pair.size) == 3  # EM widens borders, as its bundle does
    supervised, loss = AffinityLoss(offsets, widen=widen), GraphRelationLoss(offsets, widen=widen)
    label = _voronoi(pair.size, 30 if widen else 20, 0)[None]

    def plain_step() -> tuple[Tensor, Tensor]:
        pair.student.train().zero_grad()
        pred = pair.student(pair.image)
        return pred, supervised(pred, label)

    def distilled() -> None:
        pred, total = plain_step()
        terms = loss({"pred": pred}, {"pred": pair.predict(pair.teacher)}, label)
        (total + sum(loss.preset_weights[term] * value for term, value in terms.items())).backward()

    def apart() -> None:
        plain_step()[1].backward()
        pair.predict(pair.teacher)

    sides = (f"step with all terms, {pair.names[0]}", distilled), (f"plain step + forward of {pair.names[1]}", apart)
    with threads(1):
        return compare_times(f"step_{key}", *sides, 2 if quick else 3, "lower", 1.15)


def student(quick: bool, key: str) -> list[Row]:
    """Compare student and teacher: parameters, multiply-accumulates, forward time in torch and in OpenVINO."""
    pair = PAIRS[key](quick)
    networks = pair.student, pair.teacher
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    products = [_gigamacs(network, pair.image) for network in networks]
    rows = [
        compare_memory(f"student_{key}_{what}", *zip(pair.names, values, strict=True), "lower", goal, what)
        for what, values, goal in (("parameters", sizes, 0.01), ("gmac", products, 0.10))
    ]
    runtimes = {"eager": [lambda n=n: pair.predict(n) for n in networks]}
    if find_spec("openvino") is None:
        print(f"student_{key}_openvino: left out, as the package openvino is not installed")
    else:
        runtimes["openvino"] = [_compiled(network, pair) for network in networks]
    for runtime, runs in runtimes.items():
        sides = [(f"{words}, {runtime}, forward", run) for words, run in zip(pair.names, runs, strict=True)]
        with threads(1):
            rows += compare_times(f"student_{key}_{runtime}", *sides, 2 if quick else 3, "lower", pair.goal)
    return rows


def precision(quick: bool) -> list[Row]:
    """Time training steps of the EM bundle's default networks on a CPU, in bfloat16 against float32."""
    network = _network("graph_relation_em_neurons", "MalaUNet")
    size = (6, 30, 32) if quick else (20, 81, 81)
    mine = network(channels=(4, 6, 8, 10), decoder_channels=(8, 8, 8), padding="same")
    other = network(channels=(2, 3, 4, 5) if quick else (8, 24, 72, 216), padding="same")
    batch = {"image": torch.randn(1, 1, *size), "label": _voronoi(size, 30, 0)[None]}

    def steps(trained: nn.Module, handler: DistillationHandler | None, dtype: CpuDtype) -> Callable[[], None]:
        trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=1, train_data_loader=[batch] * 3, network=trained,
            optimizer=torch.optim.AdamW(trained.parameters()), loss_function=AffinityLoss(OFFSETS[3], widen=True),
            train_handlers=[CpuAutocast(dtype), *filter(None, [handler])],
        )
        return trainer.run

    rows = []
    for name, trained, handler in (
        ("teacher", other, None),
        ("distilled", mine, DistillationHandler(copy.deepcopy(other), GraphRelationLoss(OFFSETS[3], widen=True))),
    ):
        sides = [(f"{name}, {dtype}", steps(trained, handler, dtype)) for dtype in get_args(CpuDtype)]
        with threads(1):
            rows += compare_times(f"precision_{name}", sides[1], sides[0], 2 if quick else 3)
    return rows


def _gigamacs(network: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates of a forward pass, counted on shapes alone."""
    shadow = copy.deepcopy(network).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(image.to("meta"))
    return counter.get_total_flops() / 2e9


def _compiled(network: nn.Module, pair: Pair) -> Callable[[], object]:
    """Forward pass in OpenVINO on one thread, after seeing that it gives what torch gives."""
    openvino = importlib.import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    converted = openvino.convert_model(network.eval(), example_input=pair.image)
    converted.reshape(list(pair.image.shape))
    run = openvino.compile_model(converted, "CPU", options)
    image, right = pair.image.numpy(), pair.predict(network)
    if (torch.as_tensor(run(image)[0]) - right).abs().max() > 1e-3 * right.abs().max():
        raise RuntimeError("OpenVINO must give what torch gives, within 1e-3 of the largest value.")
    return lambda: run(image)


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    **{
        measure.__name__: partial(_over_shapes, measure=measure)
        for measure in (affinities, graph_within, graph_across, affinity_across, memory)
    },
    "whole": whole,
    "precision": precision,
    **{f"step_{key}": partial(step, key=key) for key in PAIRS},
    **{f"student_{key}": partial(student, key=key) for key in PAIRS},
}
