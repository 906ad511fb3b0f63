# SPDX-License-Identifier: Apache-2.0
"""Run a network that segments on cases as its bundle evaluates it, and keep what a report shows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medkd.compare.attention import attention_maps
from medkd.compare.evaluating import Evaluation, Measured, image_affine
from medkd.compare.levels import Level, find_levels, named_levels
from medkd.compare.networks import Network
from medkd.outputs import plain_tensor

__all__ = ["AFFINITY", "Outcome", "Runner", "Seen"]

Array = NDArray[Any]

AFFINITY = "affinities"        # path of what is no layer: the mean affinity to the nearest voxels
_WHEELS = {"waterz": "waterz", "mutex": "mwatershed"}
_SOME = 32                     # voxels per axis where an inferer has no windows


@dataclass(frozen=True)
class Seen:
    """Maps of a case on the grid that the network sees it on, in files: path of the layer -> file, shape (*S)."""

    files: Mapping[str, Path]
    affine: Array

    def load(self, path: str) -> Array:
        """A map, float32."""
        values: Array = np.load(self.files[path]).astype(np.float32)
        return values


@dataclass
class Outcome(Measured):
    """What a network made of the cases."""

    predictions: dict[str, Path] = field(default_factory=dict)    # case -> file of numbers (*S) on the file's grid
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)   # metric -> case -> value of each column
    seen: dict[str, Seen] = field(default_factory=dict)           # case -> maps, of cases with pictures

    def prediction(self, case: str) -> Array | None:
        """Class or instance numbers; None where there are none."""
        values: Array | None = np.load(self.predictions[case]) if case in self.predictions else None
        return values

    def score(self, metric: str, case: str) -> float:
        """Mean over the columns that a case has; NaN without any."""
        values = [value for value in self.scores.get(metric, {}).get(case, ()) if not math.isnan(value)]
        return float(np.mean(values)) if values else math.nan


class Runner(Evaluation[Outcome]):
    """A network that segments, built and loaded, that is to be run on cases once.

    Args:
        network: what to build.
        folder: for maps and predictions, which are large.
        exponent: of attention maps.
        taps: paths of layers; None takes the levels of the network.
        looked_at: cases whose maps are kept, for pictures: they take as long again, and more room.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights are of another network, or it was trained otherwise; there is no such tap.
    """

    def __init__(
        self, network: Network, folder: Path, exponent: float, taps: Sequence[str] | None = None,
        looked_at: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.exponent = exponent
        self._taps, self._looked_at = taps, frozenset(looked_at)
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(network, Outcome())

    def build(self, parser: Any) -> None:
        """Make the network and what its evaluation needs."""
        self._decodes = self._can_decode(parser)
        super().build(parser)
        offsets = [key for key in ("decoded_offsets", "offsets") if key in parser and self.network.kind == "instances"]
        self._offsets = parser.get_parsed_content(offsets[0]) if offsets else []
        roi = getattr(self.parts["inferer"], "roi_size", None) or [0] * self.network.axes
        self.window = [length if length > 0 else _SOME for length in roi]

    def _can_decode(self, parser: Any) -> bool:
        """Whether instances can be made; without the package for it affinities are all there is."""
        method = parser.get("decoding", {}).get("method") if self.network.kind == "instances" else None
        wheel = _WHEELS.get(method or "")
        if wheel is None or find_spec(wheel) is not None:
            return True
        parser["validate#postprocessing#transforms"] = []
        parser["validate#key_metric"] = None
        self.outcome.left_out.append(
            f"Instances of `{self.network.name}` and their scores: the package {wheel} is not installed "
            "(pip install medkd[em])."
        )
        return False

    def prepare(self) -> None:
        """Find the levels."""
        self.levels = self._levels(self._taps)

    def _levels(self, taps: Sequence[str] | None) -> list[Level]:
        if any(getattr(self.module, "margin", ())):
            self.outcome.left_out.append(
                f"Attention of `{self.network.name}`: its maps are smaller than its image (padding 'valid'), so that "
                "they do not lie on it."
            )
            return []
        if taps is not None:
            return named_levels(self.module, taps, self.window, self.network.name)
        try:
            return find_levels(self.module, self.window)
        except (RuntimeError, ValueError) as error:   # a network unknown to us, whose layers run twice, for example
            self.outcome.left_out.append(
                f"Attention of `{self.network.name}`: its levels are not found ({error}); name layers by --tap."
            )
            return []

    def score(self, evaluator: Any, cases: Sequence[str]) -> None:
        """Keep each case's scores."""
        for metric, values in getattr(evaluator.state, "metric_details", {}).items():
            rows = torch.as_tensor(values).float().reshape(len(cases), -1).tolist()
            self.outcome.scores.setdefault(metric, {}).update(zip(cases, rows, strict=True))

    def look(self, case: str, image: Tensor, result: Tensor) -> None:
        """Keep maps in files, in half precision: they are looked at."""
        if case not in self._looked_at:
            return
        paths = [level.path for level in self.levels]
        files: dict[str, Path] = {}
        for path, values in attention_maps(self.module, image, paths, self.window, self.exponent):
            files[path] = self._save(f"{case} {path}", values.clamp(max=6e4).numpy().astype(np.float16))
        near = [n for n, offset in enumerate(self._offsets) if sum(map(abs, offset)) == 1]
        if near:
            mean = plain_tensor(result)[0, near].mean(0)
            files[AFFINITY] = self._save(f"{case} {AFFINITY}", mean.cpu().numpy().astype(np.float16))
        self.outcome.seen[case] = Seen(files, image_affine(image, image.dim() - 2))

    def keep(self, case: str, pred: Any) -> None:
        """Keep a prediction in a file."""
        if not self._decodes:
            return
        values: Array = plain_tensor(pred).cpu().numpy()
        if self.network.kind == "classes":
            values = (values.argmax(0) if len(values) > 1 else values[0]).astype(np.int32)
        else:
            values = values[0].astype(np.int64)
        self.outcome.predictions[case] = self._save(f"{case} prediction", values)

    def _save(self, name: str, values: Array) -> Path:
        file = self.folder / f"{len(list(self.folder.iterdir()))}_{''.join(c for c in name if c.isalnum())}.npy"
        np.save(file, values)
        return file
