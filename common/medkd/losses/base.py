# SPDX-License-Identifier: Apache-2.0
"""What every distillation loss has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.checks import suggest
from medkd.ops.ignored import UNLABELED, may_be_negative
from medkd.ops.precision import at_least_float32
from medkd.ops.prediction import as_map

__all__ = [
    "DistillationLoss", "TapPair", "distils", "drawn_convolution", "pointwise_convolution", "tap_pairs",
    "trainable_parameters",
]

TapPair = tuple[str, str]
Convolution = TypeVar("Convolution", bound=nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d)


class DistillationLoss(nn.Module, ABC):
    """Unweighted scalar terms from tapped tensors of student and teacher; the supervised loss is never one.

    A subclass names its `terms`, gives `preset_weights`, and implements `compute_terms`. Everything is computed in
    float32 with autocast off, as differences of nearly equal vectors vanish in half precision.

    Cases without a label count in every term: `compute_terms` gets None for a batch of them, and for a batch of both
    kinds a label whose unlabeled voxels have what `stand_in` gives, which is background unless a loss says otherwise.

    A classification is a map of one voxel: `compute_terms` gets a `pred` (B, K) as (B, K, 1, 1), or (B, K, 1, 1, 1)
    where a layer that is read has three spatial axes, and a label (B,), (B, 1) or (B, K) likewise. So a negative label
    leaves a whole sample out.

    Attributes:
        terms: names of the terms, in the order of the docs.
        preset_weights: term -> weight, used when the config gives `distill_weights: null`.
        tap_pairs: paths (student, teacher) of the layers that the loss reads; `pred`, the networks' output, is
            always there and is not listed.
        reads_classes: whether the teacher's `classes`, the likeliest of each voxel, (B, 1, *S), may stand in the place
            of its `pred`.
        needs_live_teacher: whether the teacher must see the batch itself, as soft labels of whole volumes, which are
            written in 8 bits and blended of windows, would tell the networks apart.
    """

    terms: ClassVar[tuple[str, ...]] = ()
    preset_weights: Mapping[str, float]
    reads_classes = False
    needs_live_teacher = False

    def __init__(self, tap_pairs: Sequence[TapPair] = ()) -> None:
        super().__init__()
        self.tap_pairs = tuple(tap_pairs)
        self.active_terms = frozenset(self.terms)

    def activate(self, terms: Iterable[str]) -> None:
        """Compute only these terms from now on (those whose weight is not 0).

        Raises:
            ValueError: a term that the loss does not have.
        """
        for term in (terms := tuple(terms)):
            if term not in self.terms:
                raise ValueError(f"`terms` must be of {list(self.terms)}, got {term!r}; {suggest(term, self.terms)}")
        self.active_terms = frozenset(terms)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the active terms.

        Args:
            student: tap path -> tensor, (B, C, *s) for layers; `pred` holds the logits (B, K, *S), or (B, K) of a
                classification.
            teacher: the same of the teacher, or its `classes` if the loss reads no more; detached here.
            label: class indices, shape (B, 1, *S), or (B,) or (B, 1) of a classification; negative is ignored, and
                `UNLABELED` are cases without a label. None where no case has one.

        Returns:
            Term -> unweighted scalar, float32, attached to the student's graph.

        Raises:
            ValueError: `pred` or a tap is missing.
        """
        self._check_paths(student, teacher)
        device = student["pred"].device.type
        rank = max((value.dim() for value in student.values() if value.dim() > 2), default=4) - 2
        if label is not None and student["pred"].dim() == 2:
            label = as_map(label, rank)
        with torch.autocast(device, enabled=False):
            frozen = {path: value.detach() for path, value in teacher.items()}
            frozen = _as_maps(_widened(frozen), rank)
            return self.compute_terms(_as_maps(_widened(student), rank), frozen, self._completed(label, frozen))

    def stand_in(self, teacher: Mapping[str, Tensor], label: Tensor) -> Tensor | None:
        """Give labels for cases without one that share a batch with others; the loss must not tell both ways apart.

        Args:
            teacher: as in `forward`, in float32.
            label: that of the batch; what is given has its channels.

        Returns:
            Shape (B, 1, *s) or (B, K, *s), of which unlabeled voxels take the nearest one; None for 0: background, no
            instance, and nothing ignored.
        """
        return None

    def _completed(self, label: Tensor | None, teacher: Mapping[str, Tensor]) -> Tensor | None:
        """The label with a stand-in where a case has none; None where no case has one."""
        if label is None or not may_be_negative(label):
            return label
        unlabeled = label == UNLABELED
        if (count := int(unlabeled.sum())) in (0, label.numel()):  # asks the device once
            return label if count == 0 else None
        if (other := self.stand_in(teacher, label)) is None:
            return label.masked_fill(unlabeled, 0)
        if other.shape[2:] != label.shape[2:]:
            other = F.interpolate(other.float(), size=label.shape[2:], mode="nearest-exact")
        return torch.where(unlabeled, other.to(label.dtype), label)

    def _check_paths(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        for role, given, position in (("student", student, 0), ("teacher", teacher, 1)):
            pred = "classes" if position and self.reads_classes and "classes" in given else "pred"
            needed = list(dict.fromkeys([pred, *(pair[position] for pair in self.tap_pairs)]))
            if not given.keys() >= set(needed):
                raise ValueError(f"`{role}` must hold {needed}, got {sorted(given)}; tap the layers of `tap_pairs`.")

    @abstractmethod
    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give each term of `active_terms`; inputs are as in `forward`, in float32."""


def _widened(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: at_least_float32(value) if value.is_floating_point() else value for path, value in values.items()}


def _as_maps(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    predictions = {name: as_map(values[name], rank) for name in ("pred", "classes") if name in values}
    return {**values, **predictions}


def distils(weights: Mapping[str, float] | None) -> bool:
    """Tell whether a run with these weights distils; the one place where that is decided.

    Args:
        weights: term -> weight, as `distill_weights` of a config; None takes the losses' `preset_weights`.

    Example:
        >>> distils(None), distils({"logits": 0.5, "features": 0.0}), distils({"logits": 0.0}), distils({})
        (True, True, False, False)
    """
    return weights is None or any(weights.values())


def tap_pairs(taps: Sequence[str | Sequence[str]], argument: str) -> tuple[TapPair, ...]:
    """Read a list of taps: a path stands for both networks, a pair `[student, teacher]` for each its own.

    Raises:
        ValueError: the list is empty, or an entry is neither a path nor a pair of paths.

    Example:
        >>> tap_pairs(["encoder.1", ["encoder.2", "backbone.layer2"]], "taps")
        (('encoder.1', 'encoder.1'), ('encoder.2', 'backbone.layer2'))
    """
    pairs = [(tap, tap) if isinstance(tap, str) else tuple(tap) for tap in taps]
    wrong = [pair for pair in pairs if len(pair) != 2 or not all(isinstance(p, str) for p in pair)]
    if not pairs or wrong:
        raise ValueError(
            f"`{argument}` must list at least one layer path, or pairs [student path, teacher path], got {taps!r}."
        )
    return tuple((student, teacher) for student, teacher in pairs)


def trainable_parameters(*modules: nn.Module | Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Parameters of the student and of the learnable heads of one loss or several, for the optimizer."""
    flat = chain.from_iterable([m] if isinstance(m, nn.Module) else m for m in modules)
    return (p for module in flat for p in module.parameters() if p.requires_grad)


def pointwise_convolution(
    channels_in: int, channels_out: int, rank: int, generator: torch.Generator, bias: bool = False
) -> nn.Conv2d | nn.Conv3d:
    """A 1 x 1 convolution for a learnable head, whose first values come from `generator` alone.

    Weights are normal with variance 1 / channels_in, the bias is 0; the global random generators stay untouched.
    """
    convolution = nn.Conv3d if rank == 3 else nn.Conv2d

    def build() -> nn.Conv2d | nn.Conv3d:
        return convolution(channels_in, channels_out, kernel_size=1, bias=bias)

    return drawn_convolution(build, channels_in**-0.5, generator)


def drawn_convolution(build: Callable[[], Convolution], std: float, generator: torch.Generator) -> Convolution:
    """A convolution with normal weights of this deviation and a bias of 0, without a draw from the global generator."""
    with torch.device("meta"):
        layer = build()
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.normal_(std=std, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer
