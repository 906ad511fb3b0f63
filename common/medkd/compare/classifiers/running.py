# SPDX-License-Identifier: Apache-2.0
"""Run a classifier on cases as its bundle evaluates it, and keep probabilities, scores and where it looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medkd.compare.cases import Files
from medkd.compare.classifiers.attention import ClassMaps, class_maps
from medkd.compare.evaluating import Evaluation, Measured, image_affine
from medkd.compare.levels import empty_image, find_levels, named_levels
from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of
from medkd.metrics.classification import class_probabilities
from medkd.outputs import plain_tensor

__all__ = ["ClassOutcome", "ClassRunner", "Look"]

Array = NDArray[Any]
_SIZE = 64                     # pixels per axis of the image that layers are found with


@dataclass(frozen=True)
class Look:
    """Maps of a case, a set per layer, and the image that the network sees: its affine and its size."""

    maps: Sequence[ClassMaps]
    affine: Array
    shape: tuple[int, ...]


@dataclass
class ClassOutcome(Measured):
    """What a classifier made of the cases."""

    probabilities: dict[str, Array] = field(default_factory=dict)   # case -> of each class, shape (K,)
    totals: dict[str, float] = field(default_factory=dict)          # metric -> of all cases with a label
    layers: list[str] = field(default_factory=list)                 # paths that are looked at
    looks: dict[str, Look] = field(default_factory=dict)            # of cases with pictures


class ClassRunner(Evaluation[ClassOutcome]):
    """A classifier, built and loaded, that is to be run on cases once.

    Args:
        network: what to build.
        taps: paths of layers; None takes the last layer with maps, which a linear head reads.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights are of another network, or it was trained otherwise; there is no such tap, or the
            prediction does not depend on it.
    """

    def __init__(self, network: Network, taps: Sequence[str] | None = None) -> None:
        self._taps = taps
        self._scores: dict[str, Array] = {}
        super().__init__(network, ClassOutcome())

    def prepare(self) -> None:
        """Find the layers that are looked at."""
        self.module.requires_grad_(False)
        size = [_SIZE] * self.network.axes
        if self._taps is not None:
            levels = named_levels(self.module, self._taps, size, self.network.name)
            self.outcome.layers = [level.path for level in levels]
            self._try(self.outcome.layers)
            return
        try:
            levels = find_levels(self.module, size)
            last = [level.path for level in levels if min(level.stride) < _SIZE][-1:]   # not the mean of all positions
            self._try(last)
        except (RuntimeError, ValueError) as error:
            self.outcome.left_out.append(
                f"Attention of `{self.network.name}`: its last layer with maps is not found ({error}); name one by "
                "--tap."
            )
            return
        self.outcome.layers = last

    def _try(self, paths: Sequence[str]) -> None:
        for path in paths:
            class_maps(self.module, empty_image(self.module, [_SIZE] * self.network.axes), path)

    def keep(self, case: str, pred: Any) -> None:
        """Keep the scores of a case, logits or probabilities."""
        scores = plain_tensor(pred).detach().double().cpu().numpy().ravel()
        if len(scores) != self.network.classes:
            raise ValueError(f"scores of {self.network.classes} classes are expected, got shape {tuple(pred.shape)}")
        self._scores[case] = scores

    def run(self, cases: Mapping[str, Files], told: Callable[[str], None] = lambda case: None) -> ClassOutcome:
        """Predict all cases, see `Evaluation`; their scores together tell whether they are logits."""
        outcome = super().run(cases, told)
        rows = class_probabilities(np.stack(list(self._scores.values())))
        outcome.probabilities = dict(zip(self._scores, rows, strict=True))
        return outcome

    def score(self, evaluator: Any, cases: Sequence[str]) -> None:
        """Keep what the metrics make of all cases together."""
        names = self.network.config["validate"]["key_metric"]
        self.outcome.totals |= {name: float(value) for name, value in evaluator.state.metrics.items() if name in names}

    def look_at(self, cases: Mapping[str, Files]) -> None:
        """Keep maps of cases, as the evaluation prepares their images."""
        with scripts_of(self.network.root):
            for case, files in cases.items():
                image = self.parts["preprocessing"](dict(files))["image"]            # (C, *S)
                device = next(self.module.parameters()).device
                batch = plain_tensor(image)[None].to(device, torch.float32)
                maps = [class_maps(self.module, batch, path) for path in self.outcome.layers]
                affine = image_affine(image, image.dim() - 1)
                self.outcome.looks[case] = Look(maps, affine, tuple(image.shape[1:]))
