# SPDX-License-Identifier: Apache-2.0
"""Cost of graph relation distillation: op by op against the plain formulas, in a training step, and its students.

The plain formulas are batched torch with autograd, with loops over instances and past images (`tests/oracles`).
Shapes are those of the released code: crops of plants, and windows of EM.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import cast
from unittest.mock import patch

import torch
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.bench.peers import Function, against, error_rows, step_works
from lab.bundle import ROOT
from lab.measure import Row, Work, compare, compare_values, peak_memory
from medkd.handlers.cpu_autocast import CpuAutocast, CpuDtype
from medkd.handlers.distillation import DistillationHandler
from medkd.losses.affinity import AffinityLoss
from medkd.losses.graph_relation import GraphRelationLoss
from medkd.losses.relation_bank import RelationBank
from medkd.ops.embedding import offset_affinity, pooled_directions
from medkd.ops.graph import unit_vectors
from medkd.ops.instances import moment_distance, relation_edges, segment_mean
from tests.oracles import graph_relation as plain

CHANNELS, CAPACITY, SAMPLE = 16, 32, 12
OFFSETS: dict[int, list[tuple[int, ...]]] = {
    2: [(-step * (1 - axis), -step * axis) for step in (1, 3, 5, 9, 27) for axis in (0, 1)],
    3: [one for z, y in ((1, 1), (2, 3), (3, 9), (4, 27)) for one in ((-z, 0, 0), (0, -y, 0), (0, 0, -y))],
}


@dataclass(frozen=True)
class Shape:
    """Size of a batch of embeddings, and the goals for it: nodes and edges, affinities across images."""

    batch: int
    size: tuple[int, ...]
    instances: int
    graph_goal: float
    across_goal: float


SHAPES = [
    Shape(2, (544, 544), 20, 4, 20), Shape(2, (25, 56, 56), 30, 6, 5), Shape(1, (18, 160, 160), 30, 6, 8),
    Shape(2, (18, 160, 160), 30, 6, 8),
]
QUICK = [Shape(2, (56, 48), 4, 4, 20), Shape(1, (6, 30, 32), 4, 6, 5)]


class Batch:
    """Gaussian embeddings of both networks, Voronoi cells as labels, and those of the teacher's past images."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.name = shape, "x".join(map(str, (shape.batch, *shape.size)))
        self.offsets = OFFSETS[len(shape.size)]                       # those of the paper's code for this rank
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2 * shape.batch + SAMPLE, CHANNELS, *shape.size, generator=generator)
        student, self.teacher, self.past = torch.split(maps, [shape.batch, shape.batch, SAMPLE])
        self.student = student.clone().requires_grad_()
        seeds = [*range(shape.batch), *range(100, 100 + SAMPLE)]
        labels = torch.stack([_voronoi(shape.size, shape.instances, seed) for seed in seeds])
        self.label, self.past_label = labels[: shape.batch], labels[shape.batch :]

    def loss(self) -> GraphRelationLoss:
        """Give the loss, with the past images in its bank."""
        loss = GraphRelationLoss(self.offsets, bank=RelationBank(CHANNELS, CAPACITY, SAMPLE))
        with torch.no_grad():
            for maps, label in zip(torch.split(self.past, 2), torch.split(self.past_label, 2), strict=True):
                loss({"pred": maps}, {"pred": maps}, label)
        return loss

    def against(
        self, name: str, words: tuple[str, str], functions: tuple[Function, Function], pairs: int,
        goal: float | None = None,
    ) -> list[Row]:
        """Compare two functions of the student's embeddings."""
        return against(f"{name}_{self.name}", words, functions, self.student, pairs, goal)


def _voronoi(size: Sequence[int], count: int, seed: int) -> Tensor:
    """Cells of random points, without the quarter of the voxels that is farthest from them; (1, *S)."""
    points = torch.rand(count, len(size), generator=torch.Generator().manual_seed(seed)) * torch.tensor(size)
    voxels = torch.cartesian_prod(*map(torch.arange, size)).float()
    distance, nearest = torch.cdist(voxels, points).min(1)
    return torch.where(distance > distance.quantile(0.75), 0, nearest + 1).reshape(1, *size)


def _over_shapes(quick: bool, measure: Callable[[Batch, int], list[Row]]) -> list[Row]:
    return [row for shape in (QUICK if quick else SHAPES) for row in measure(Batch(shape), 2 if quick else 3)]


def affinities(batch: Batch, pairs: int) -> list[Row]:
    """Compare affinities at the offsets with rolled maps: their cosines, and products of unit vectors made once."""
    ours, cosine, unit = (
        partial(function, offsets=batch.offsets)
        for function in (offset_affinity, plain.offset_affinity, plain.unit_offset_affinity)
    )
    words = [("slices, own backward", other) for other in ("roll and cosine", "unit vectors, roll, product")]
    rows = batch.against("affinities", words[0], (ours, cosine), pairs, 10)
    return rows + batch.against("affinities_unit", words[1], (ours, unit), pairs)


def graph_within(batch: Batch, pairs: int) -> list[Row]:
    """Compare nodes and edges within images; the teacher's nodes are there."""
    nodes, present = segment_mean(batch.teacher, batch.label)
    count, edges = present.sum(1), relation_edges(nodes)
    others = plain.instance_nodes(batch.teacher, batch.label)

    def mine(student: Tensor) -> Tensor:
        own = segment_mean(student, batch.label)[0]
        node: Tensor = (torch.linalg.vector_norm(own - nodes, dim=2).sum(1) / count).mean()
        edge: Tensor = ((relation_edges(own) - edges).square().sum((1, 2)) / count.square()).mean()
        return node + edge

    def other(student: Tensor) -> Tensor:
        own = plain.instance_nodes(student, batch.label)
        return plain.node_distance(own, others) + plain.edge_distance(own, others)

    words = "nodes and edges, one scatter", "loop over instances"
    return batch.against("graph_within", words, (mine, other), 2 * pairs + 1, batch.shape.graph_goal)


def graph_across(batch: Batch, pairs: int) -> list[Row]:
    """Compare edges to 12 past images; the nodes of the teacher and of these are there, in ours as one moment."""
    moment = cast(Tensor, batch.loss().bank.draw()[1])
    nodes, present = segment_mean(batch.teacher, batch.label)
    units, padding = unit_vectors(nodes, dim=2), present.shape[1] / present.sum(1)
    others = plain.instance_nodes(batch.teacher, batch.label)
    past = plain.instance_nodes(batch.past, batch.past_label)

    def mine(student: Tensor) -> Tensor:
        own = unit_vectors(segment_mean(student, batch.label)[0], dim=2)
        return (moment_distance(own, units, moment) * padding).mean()

    def other(student: Tensor) -> Tensor:
        return plain.inter_edge_distance(plain.instance_nodes(student, batch.label), others, past)

    words = "edges to the bank, second moment", "loops over instances and pairs of images"
    return batch.against("graph_across", words, (mine, other), 2 * pairs + 1, batch.shape.graph_goal)


def affinity_across(batch: Batch, pairs: int) -> list[Row]:
    """Compare affinities to all blocks of 12 past images: one cached moment, and maps with matrices over pairs."""
    loss = batch.loss()
    cells, moment = loss.pooling, cast(Tensor, loss.bank.draw()[0])

    def mine(student: Tensor) -> Tensor:
        directions = pooled_directions(student, cells), pooled_directions(batch.teacher, cells)
        return moment_distance(*directions, moment).mean()

    def other(student: Tensor) -> Tensor:
        return plain.inter_affinity_distance(student, batch.teacher, batch.past, cells)

    words = "affinities to the bank, second moment", "matrices over pairs of blocks"
    return batch.against("affinity_across", words, (mine, other), pairs, batch.shape.across_goal)


def whole(quick: bool) -> list[Row]:
    """Compare supervised loss and all terms of a 2-D step, forward and backward to the embedding, bank and all."""
    batch = Batch((QUICK if quick else SHAPES)[0])
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
    (values, gradient), (others, pull) = mine(), other()           # both banks give all of their 12 images here
    off = float((values / others - 1.0).abs().max()), float((gradient - pull).norm() / pull.norm())
    rows = compare("whole", words, (mine, other), 2 if quick else 3, goal=15)
    return rows + error_rows("whole_error", words[0], {"value": off[0], "gradient": off[1]})


def _total(values: dict[str, Tensor], loss: GraphRelationLoss, student: Tensor) -> tuple[Tensor, Tensor]:
    """Every value of a step, and the gradient of their weighted sum."""
    weights = {"supervised": 1.0} | dict(loss.preset_weights)
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    gradient = torch.autograd.grad(total, student)[0]
    return torch.stack([value.detach() for value in values.values()]), gradient


def memory(batch: Batch, _: int) -> list[Row]:
    """Compare the peak memory of the loss, forward and backward, with the two embeddings it is given."""
    loss = batch.loss()
    maps = {"pred": batch.student}, {"pred": batch.teacher}
    peak = peak_memory(lambda: _total(loss(*maps, batch.label), loss, batch.student))
    words = "all terms, forward and backward", "the two embeddings"
    return [compare_values(f"memory_{batch.name}", words, [(peak, 2 * batch.teacher.nbytes / 2**20)], "lower", 3)]


@dataclass(frozen=True)
class Pair:
    """Published student and teacher."""

    names: tuple[str, str]
    networks: tuple[nn.Module, nn.Module]
    image: Tensor
    size: tuple[int, ...]      # of what they give
    goal: float                # how large the share of the student's forward time may be


def _predict(network: nn.Module, image: Tensor) -> Tensor:
    """Forward pass in evaluation mode without gradients."""
    with torch.no_grad():
        return network.eval()(image)   # type: ignore[no-any-return]


def _mala(quick: bool) -> Pair:
    """Those of EM, with valid convolutions."""
    network = _network("graph_relation_em_neurons", "MalaUNet")
    pair = network(channels=(8, 16, 32, 64), decoder_channels=(32, 32, 8)), network()
    image, size = (53, 268, 268), (25, 56, 56)
    if quick:
        pair = network(channels=(2,) * 4, padding="same"), network(channels=(2, 3, 4, 5), padding="same")
        image = size = (6, 30, 32)
    return Pair(("MALA-tiny", "MALA"), pair, torch.randn(1, 1, *image), size, 0.25)


def _resunet(quick: bool) -> Pair:
    """Those of plants."""
    network = partial(_network("graph_relation_nuclei", "ResidualUNet"), published_head=True)
    tiny, small, large = (2,) * 5, (4, 8, 16, 32, 64), (32, 64, 179, 349, 680)
    size, filters = ((48, 64), (tiny, small)) if quick else ((544, 544), (small, large))
    pair = network(filters=filters[0]), network(filters=filters[1])
    return Pair(("ResUNet-tiny", "ResUNet"), pair, torch.randn(1, 3, *size), size, 0.10)


PAIRS = {"mala": _mala, "resunet": _resunet}


def _network(bundle: str, name: str) -> type[nn.Module]:
    """Class of a bundle's networks; every bundle's package is `scripts`, so it is forgotten again."""
    with patch.object(sys, "path", [str(ROOT / "bundles" / bundle), *sys.path]), patch.dict(sys.modules):
        return getattr(importlib.import_module("scripts.networks"), name)   # type: ignore[no-any-return]


def step(quick: bool, key: str) -> list[Row]:
    """Time a distillation step, without the optimizer, against the plain step and the teacher's forward pass."""
    pair = PAIRS[key](quick)
    mine, other = pair.networks
    other.requires_grad_(False)
    offsets, widen = OFFSETS[len(pair.size)], len(pair.size) == 3  # EM widens borders, as its bundle does
    supervised, loss = AffinityLoss(offsets, widen=widen), GraphRelationLoss(offsets, widen=widen)
    label = _voronoi(pair.size, 30 if widen else 20, 0)[None]

    def run_student() -> dict[str, Tensor]:
        mine.train().zero_grad()
        return {"pred": mine(pair.image)}

    works = step_works(run_student, lambda: {"pred": _predict(other, pair.image)}, supervised, loss, label)
    words = f"step with all terms, {pair.names[0]}", f"plain step + forward of {pair.names[1]}"
    return compare(f"step_{key}", words, works, 2 if quick else 3, "lower", 1.15, memory=False)


def student(quick: bool, key: str) -> list[Row]:
    """Compare student and teacher: parameters, multiply-accumulates, forward time in torch and in OpenVINO."""
    pair = PAIRS[key](quick)
    mine, other = pair.networks
    rows = []
    for what, count, goal in (("parameters", _parameters, 0.01), ("gmac", _gigamacs, 0.10)):
        values = count(mine, pair.image), count(other, pair.image)
        rows.append(compare_values(f"student_{key}_{what}", pair.names, [values], "lower", goal, what))
    eager: tuple[Work, Work] = partial(_predict, mine, pair.image), partial(_predict, other, pair.image)
    runtimes = {"eager": eager}
    if find_spec("openvino") is None:
        print(f"student_{key}_openvino: left out, as the package openvino is not installed")
    else:
        runtimes["openvino"] = _compiled(mine, pair.image), _compiled(other, pair.image)
    for runtime, works in runtimes.items():
        words = f"{pair.names[0]}, {runtime}, forward", f"{pair.names[1]}, {runtime}, forward"
        pairs = 2 if quick else 3
        rows += compare(f"student_{key}_{runtime}", words, works, pairs, "lower", pair.goal, memory=False)
    return rows


def precision(quick: bool) -> list[Row]:
    """Time training steps of the EM bundle's default networks on a CPU, in bfloat16 against float32."""
    network = _network("graph_relation_em_neurons", "MalaUNet")
    size = (6, 30, 32) if quick else (20, 81, 81)
    mine = network(channels=(4, 6, 8, 10), decoder_channels=(8, 8, 8), padding="same")
    other = network(channels=(2, 3, 4, 5) if quick else (8, 24, 72, 216), padding="same")
    batch = {"image": torch.randn(1, 1, *size), "label": _voronoi(size, 30, 0)[None]}

    def steps(trained: nn.Module, handlers: Sequence[DistillationHandler], dtype: CpuDtype) -> Work:
        trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=1, train_data_loader=[batch] * 3, network=trained,
            optimizer=torch.optim.AdamW(trained.parameters()), loss_function=AffinityLoss(OFFSETS[3], widen=True),
            train_handlers=[CpuAutocast(dtype), *handlers],
        )
        return trainer.run

    rows = []
    handler = DistillationHandler(copy.deepcopy(other), GraphRelationLoss(OFFSETS[3], widen=True))
    for name, trained, own in (("teacher", other, []), ("distilled", mine, [handler])):
        words = f"{name}, bfloat16", f"{name}, float32"
        works = steps(trained, own, "bfloat16"), steps(trained, own, "float32")
        rows += compare(f"precision_{name}", words, works, 2 if quick else 3, memory=False)
    return rows


def _parameters(network: nn.Module, _: Tensor) -> float:
    return sum(one.numel() for one in network.parameters())


def _gigamacs(network: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates of a forward pass, counted on shapes alone."""
    shadow = copy.deepcopy(network).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(image.to("meta"))
    return float(counter.get_total_flops()) / 2e9


def _compiled(network: nn.Module, image: Tensor) -> Work:
    """Forward pass in OpenVINO on one thread, after seeing that it gives what torch gives."""
    openvino = importlib.import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    converted = openvino.convert_model(network.eval(), example_input=image)
    converted.reshape(list(image.shape))
    run, right = openvino.compile_model(converted, "CPU", options), _predict(network, image)
    if (torch.as_tensor(run(image.numpy())[0]) - right).abs().max() > 1e-3 * right.abs().max():
        raise RuntimeError("OpenVINO must give what torch gives, within 1e-3 of the largest value.")
    return partial(run, image.numpy())


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
