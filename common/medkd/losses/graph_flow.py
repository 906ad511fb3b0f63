# SPDX-License-Identifier: Apache-2.0
"""Graph Flow distillation: how the channels of a network change from one layer to a later one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor

from medkd.checks import check_maps
from medkd.losses.base import DistillationLoss, TapPair, tap_pairs
from medkd.losses.paraphraser import Paraphrasers, TeacherParaphrasers
from medkd.ops.ignored import ignored_voxels, on_grid
from medkd.ops.salience import Maximum, Variation, salience_nodes, variation_graph

__all__ = ["GraphFlowLoss", "Reduction"]

Reduction = Literal["mean", "sum"]
Tap = str | Sequence[str]
Maps = Mapping[str, Tensor]
_PRESETS: dict[str, Variation] = {"default": "cosine", "paper": "difference"}


class GraphFlowLoss(DistillationLoss):
    """Let the student's channels change from an encoder layer to a decoder layer as the teacher's do.

    A channel is a node: the values in a window around its largest voxel. Edges tell how alike two nodes of a layer are.
    The variation graph of two layers is how nodes and edges differ between them; the terms are the squared differences
    of the variation graphs of student and teacher, mean over pairs of layers and samples:

    * `node`: of the nodes, matched by channel;
    * `edge`: of the C x C edges.

    The paper's body could not be obtained, and the released code lacks the file with this loss; certain are salience of
    channels, a window, one encoder and one decoder layer, and tiny weights of nodes and edges. So all three readings
    that go with that are here:

    | `variation` | node | edge | |
    |---|---|---|---|
    | `cosine` | cosine of the channel's two windows | difference of cosines | any scale of features, 2-D as 3-D |
    | `difference` | difference of the windows | difference of products | the word taken literally |
    | `distance` | its squared length | the same | as a graph of scalar nodes (IRG) |

    | | `default` (ours) | `paper` (the released weights need it so) |
    |---|---|---|
    | variation | `cosine` | `difference` |

    The rest follows the variation, also where it is given:

    | | `cosine` | `difference`, `distance` |
    |---|---|---|
    | reduction over nodes and edges | mean | sum |
    | weights `node edge` | 1, 1 | 1e-5, 1e-9 in 2-D |

    The code of the networks has 1e-8 for edges where its page says 1e-9, which is taken. In 3-D a window has as many
    times more voxels than in 2-D as it has along its shortest axis, k: weights are divided by k for the summed nodes of
    `difference`, and by k^2 for those of `distance` and for edges, which are made of sums over a window with either
    reduction, so that they pull alike. For `cosine` with `sum`, and for the other two with `mean`, no weights are
    known: what stands here is then a number to start a search from.

    Ours: zeros outside of the maps; the first of equal maxima; a channel whose window is shorter than 1e-6 of the
    largest value in all windows of its layer and sample has cosine 0 and no gradient, where a clamped norm would give
    it one of 1e6. Positions have no gradient: it reaches N voxels per channel. Each value of a tapped layer is looked
    at once, all else is small; layers in half precision, as under autocast, are copied to float32 before.

    Works without labels, which only tell the voxels that are ignored, those with a negative one: they are no maximum,
    and 0 in a window, as if they were not there.

    Args:
        flows: pairs of layers `[earlier, later]`, each a path for both networks or `[student, teacher]`: the same roles
            in both, and of one stride within a network. Published is one pair at stride 4.
        preset: `default` or `paper`; the arguments below win over it.
        variation: `cosine`, `difference` or `distance`.
        reduction: over nodes and over edges, `mean` or `sum`; None takes that of the variation.
        window: odd number of voxels, for all axes or for each: 1 along the axis where slices are far apart, (3, 3, 1)
            for volumes that are loaded with that axis last, as in orientation RAS. Published are 3 and 9.
        maximum: `signed`, or `absolute` for the largest magnitude.
        paraphrasers: bring the teacher's layers to the student's channels; None where they have as many.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: unknown option, an even window; layers of other channels, strides or ranks than agreed.

    Reference:
        Zou et al., Graph Flow: Cross-layer Graph Flow Distillation for Dual Efficient Medical Image Segmentation,
        arXiv 2203.08667.

    Example:
        >>> loss = GraphFlowLoss([["encoder", "decoder"]], spatial_dims=2)
        >>> shapes = {"encoder": (1, 4, 6, 6), "decoder": (1, 4, 6, 6), "pred": (1, 2, 24, 24)}
        >>> student = {name: torch.rand(shape, requires_grad=True) for name, shape in shapes.items()}
        >>> terms = loss(student, {name: torch.rand(shape) for name, shape in shapes.items()})
        >>> sum(loss.preset_weights[name] * value for name, value in terms.items()).backward()
        >>> sorted(terms), int(student["encoder"].grad.count_nonzero()) <= 4 * 9
        (['edge', 'node'], True)
    """

    terms = ("node", "edge")

    def __init__(
        self,
        flows: Sequence[Sequence[Tap]],
        preset: Literal["default", "paper"] = "default",
        variation: Variation | None = None,
        reduction: Reduction | None = None,
        window: int | Sequence[int] = 3,
        maximum: Maximum = "signed",
        paraphrasers: TeacherParaphrasers | None = None,
        spatial_dims: int = 3,
    ) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"`preset` must be one of {list(_PRESETS)}, got {preset!r}.")
        if spatial_dims not in (2, 3):
            raise ValueError(f"`spatial_dims` must be 2 or 3, got {spatial_dims}.")
        pairs = _read_flows(flows)
        super().__init__(tuple(dict.fromkeys(chain.from_iterable(pairs))))
        self.flows = pairs
        self.variation: Variation = variation or _PRESETS[preset]
        self.reduction: Reduction = reduction or ("mean" if self.variation == "cosine" else "sum")
        self.maximum: Maximum = maximum
        _check_options(self.variation, self.reduction, maximum)
        self.spatial_dims = spatial_dims
        self.window = _read_window(window, spatial_dims)
        self.paraphrasers = paraphrasers
        self.student_taps = tuple(dict.fromkeys(student for student, _ in self.tap_pairs))
        self.teacher_taps = tuple(dict.fromkeys(teacher for _, teacher in self.tap_pairs))
        _check_paraphrasers(paraphrasers, self.teacher_taps, spatial_dims)
        self._frozen: list[Paraphrasers] = []                      # a list keeps them out of optimizer and checkpoint
        self.preset_weights = _weights(self.variation, self.reduction, self.window)

    def activate(self, terms: Iterable[str]) -> None:
        """Compute only these terms from now on; the paraphrasers are read from their file."""
        super().activate(terms)
        self._frozen.clear()
        if self.active_terms and self.paraphrasers is not None:
            self._frozen.append(self.paraphrasers.load())

    def compute_terms(self, student: Maps, teacher: Maps, label: Tensor | None) -> dict[str, Tensor]:
        """Give each of `active_terms`; the labels tell which voxels are ignored."""
        if not self.active_terms:
            return {}
        ignored = ignored_voxels(label)
        layers = self._paraphrased(teacher)
        nodes: dict[tuple[str, str], Tensor] = {}                  # a layer may be in several flows
        for role, maps, paths in (("student", student, self.student_taps), ("teacher", layers, self.teacher_taps)):
            for path in paths:
                nodes[role, path] = self._nodes(f"{role}[{path!r}]", maps[path], ignored)
        values: dict[str, list[Tensor]] = {term: [] for term in self.terms if term in self.active_terms}
        for flow in self.flows:
            _check_flow(flow, student, layers)
            mine, other = (
                variation_graph(nodes[role, flow[0][n]], nodes[role, flow[1][n]], self.variation)
                for n, role in enumerate(("student", "teacher"))
            )
            grids = [maps[flow[0][n]].shape[2:] for n, maps in enumerate((student, layers))]
            counts = _samples_that_count(ignored, grids)
            for term, found, right in zip(self.terms, mine, other, strict=True):
                if term in values:
                    values[term].append(self._error(found, right.to(found.dtype), counts))
        return {term: torch.stack(errors).mean() for term, errors in values.items()}

    def _nodes(self, name: str, maps: Tensor, ignored: Tensor | None) -> Tensor:
        """Nodes (B, C, N) of one layer."""
        check_maps(name, maps)
        if maps.dim() - 2 != self.spatial_dims:
            raise ValueError(f"`spatial_dims` must be {maps.dim() - 2}, as {name} has, got {self.spatial_dims}.")
        counted = None if ignored is None else ~on_grid(ignored, maps.shape[2:])
        return salience_nodes(maps, self.window, self.maximum, counted)

    def _error(self, student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
        """Mean of the samples that count, of each one's mean or sum of squares."""
        squares = (student - teacher).square().flatten(1)
        errors = squares.mean(1) if self.reduction == "mean" else squares.sum(1)     # (B,)
        if counts is None:
            return errors.mean()
        return errors.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)

    def _paraphrased(self, teacher: Maps) -> Maps:
        """The teacher's layers in the student's channels."""
        if self.paraphrasers is None:
            return teacher
        device = teacher[self.teacher_taps[0]].device
        if not self._frozen:
            self._frozen.append(self.paraphrasers.load(device))
        frozen = self._frozen[0].to(device)
        dtype = next(frozen.parameters()).dtype
        with torch.no_grad():
            factors = frozen([teacher[path].to(dtype) for path in self.teacher_taps])
        return {**teacher, **dict(zip(self.teacher_taps, factors, strict=True))}


def _read_flows(flows: Sequence[Sequence[Tap]]) -> tuple[tuple[TapPair, TapPair], ...]:
    if isinstance(flows, str) or not flows or any(isinstance(flow, str) or len(flow) != 2 for flow in flows):
        raise ValueError(
            "`flows` must list at least one pair of layers [earlier, later], each a path or [student path, teacher "
            f"path], got {flows!r}."
        )
    read = [tap_pairs(list(flow), "flows") for flow in flows]
    if same := [flow for flow, (first, second) in zip(flows, read, strict=True) if _share(first, second)]:
        raise ValueError(
            f"`flows` must name two different layers of each network, got {same}; within one layer nothing varies."
        )
    return tuple((first, second) for first, second in read)


def _share(first: TapPair, second: TapPair) -> bool:
    return any(mine == other for mine, other in zip(first, second, strict=True))


def _read_window(window: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    lengths = (window,) * spatial_dims if isinstance(window, int) else tuple(window)
    if len(lengths) != spatial_dims or any(length < 1 or length % 2 == 0 for length in lengths):
        raise ValueError(
            f"`window` must be an odd number of voxels, or {spatial_dims} of them, got {window!r}; 3 is published."
        )
    return lengths


def _weights(variation: Variation, reduction: Reduction, window: Sequence[int]) -> dict[str, float]:
    """Weights of the terms; the published ones are for windows of 2-D."""
    if variation == "cosine":
        return {"node": 1.0, "edge": 1.0}
    thickness = min(window) if len(window) == 3 else 1             # whichever axis the slices lie along
    # how often a sum over the window enters a node's error; a mean over the nodes of `difference` takes it out
    power = 2 if variation == "distance" else int(reduction == "sum")
    return {"node": 1e-5 / thickness**power, "edge": 1e-9 / thickness**2}


def _check_options(variation: str, reduction: str, maximum: str) -> None:
    for name, value, known in (
        ("variation", variation, get_args(Variation)), ("reduction", reduction, get_args(Reduction)),
        ("maximum", maximum, get_args(Maximum)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


def _check_paraphrasers(paraphrasers: TeacherParaphrasers | None, taps: Sequence[str], spatial_dims: int) -> None:
    if paraphrasers is None:
        return
    if paraphrasers.taps != tuple(taps):
        raise ValueError(
            f"`paraphrasers` must be for the teacher's layers {list(taps)}, in this order, got "
            f"{list(paraphrasers.taps)}."
        )
    if paraphrasers.spatial_dims != spatial_dims:
        raise ValueError(
            f"`paraphrasers` must have the loss's {spatial_dims} spatial axes, got {paraphrasers.spatial_dims}."
        )


def _check_flow(flow: tuple[TapPair, TapPair], student: Maps, teacher: Maps) -> None:
    """Refuse layers of two strides within a network, and other channels than the student's."""
    for role, n, maps in (("student", 0, student), ("teacher", 1, teacher)):
        sizes = [tuple(maps[pair[n]].shape[2:]) for pair in flow]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`flows` must be of layers of one stride, got {flow[0][n]!r} of size {sizes[0]} and {flow[1][n]!r} of "
                f"{sizes[1]} in the {role}: a window of one is another part of the image than of the other; pair "
                "encoder and decoder layers of the same level."
            )
    for mine, other in flow:
        channels = student[mine].shape[1], teacher[other].shape[1]
        if channels[0] != channels[1]:
            raise ValueError(
                f"`paraphrasers` must bring the teacher's layer {other!r} to the {channels[0]} channels of the "
                f"student's {mine!r}, got {channels[1]}: nodes are matched by channel; fit `Paraphrasers` with "
                f"channels [C_T, {channels[0]}], or tap layers of as many channels."
            )
    first, second = (student[mine].shape[1] for mine, _ in flow)
    if first != second:
        raise ValueError(
            f"`flows` must be of layers of as many channels, got {first} at {flow[0][0]!r} and {second} at "
            f"{flow[1][0]!r}: a node is a channel, and varies from layer to layer; tap layers of one level."
        )


def _samples_that_count(ignored: Tensor | None, grids: Sequence[Sequence[int]]) -> Tensor | None:
    """Those with a voxel that counts on the grids of both networks, (B,); None where all do."""
    if ignored is None:
        return None
    first, second = ((~on_grid(ignored, grid)).flatten(1).any(1) for grid in grids)
    return first & second
