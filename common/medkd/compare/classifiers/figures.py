# SPDX-License-Identifier: Apache-2.0
"""Pictures of a case: where each network sees evidence for each class, side by side over the image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.compare.cases import Case
from medkd.compare.classifiers.comparison import ClassComparison
from medkd.compare.figures import SMALL, gray_window, slice_canvas
from medkd.report import canvas, page
from medkd.report.pictures import DIFFERENT

__all__ = ["KNOWN", "TRUE", "ClassFigures"]

Array = NDArray[Any]

TRUE = "#3ddc84"          # of the predicted class where it is right
KNOWN = "#4cc9f0"         # of the predicted class where nobody knows
_SURE = 1e-6              # deviation of a map, below which it is flat


@dataclass(frozen=True)
class ClassFigures:
    """A case, a picture, with the maps of all networks.

    Args:
        found: of all cases.
        case: its image.
        window: level and width of gray values; None for that of the first network. Colors are shown as they are.
    """

    found: ClassComparison
    case: Case
    window: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """The case and its class."""
        label = self.found.label(self.case.name)
        return self.case.name if label is None else f"{self.case.name}: {self.found.class_name(label)}"

    @cached_property
    def planes(self) -> dict[tuple[str, int], Array]:
        """Maps of all classes in the frame of the picture: (network, number of the layer) -> (K, H, W), NaN outside."""
        planes = {}
        for name in self.found.names:
            look = self.found.outcomes[name].looks[self.case.name]
            for layer, maps in enumerate(look.maps):
                cells = maps.affine(look.affine)
                planes[name, layer] = np.stack([
                    self.case.frame.cut_cells(values, cells, look.affine, look.shape, 0) for values in maps.values
                ])
        return planes

    def alike(self) -> dict[tuple[str, str, int, int], float]:
        """Correlation of two networks' maps over the pixels that both see: (one, other, layer, class) -> -1 to 1."""
        values = {}
        for one, other in combinations(self.found.names, 2):
            for layer in range(self.layers):
                if (one, layer) not in self.planes or (other, layer) not in self.planes:
                    continue
                for number, pair in enumerate(zip(self.planes[one, layer], self.planes[other, layer], strict=True)):
                    values[one, other, layer, number] = _correlation(*pair)
        return values

    @property
    def layers(self) -> int:
        """Number of layers that are shown."""
        return max(len(outcome.layers) for outcome in self.found.outcomes.values())

    def rows(self) -> list[str]:
        """A row per layer and class: the image, and the map of each network."""
        parts = []
        image = page.figure(canvas.png(self._canvas()), f"{self.case.name}, the image")
        for layer in range(self.layers):
            for number in range(self.found.first.classes):
                figures = [image, *(self._figure(name, layer, number) for name in self.found.names)]
                parts += [f"<h4>{escape(self._heading(layer, number))}</h4>", page.rows(figures, len(figures))]
        return parts

    def _heading(self, layer: int, number: int) -> str:
        paths = dict.fromkeys(one.layers[layer] for one in self.found.outcomes.values() if layer < len(one.layers))
        where = f", {' and '.join(paths)}" if self.layers > 1 else ""
        is_label = number == self.found.label(self.case.name)
        return f"{self.found.class_name(number)}{where}{' (the label)' if is_label else ''}"

    def _figure(self, name: str, layer: int, number: int) -> str:
        text = f"{name}, {self.found.class_name(number)}: "
        text += f"{self.found.outcomes[name].probabilities[self.case.name][number]:.2f}"
        if self.found.predicted(name, self.case.name) == number:
            text += ", predicted" + (", wrong" if self.found.is_wrong(name, self.case.name) else "")
        if (name, layer) not in self.planes:
            return f"<figure><figcaption>{escape(text)}; no map</figcaption></figure>"
        axes = self._canvas()
        canvas.heat(axes, np.nan_to_num(self.planes[name, layer][number]), 1.0)
        self._mark(axes, name, number)
        return page.figure(canvas.png(axes), text)

    def _mark(self, axes: Any, name: str, number: int) -> None:
        """A border round the predicted class, and a dashed one round that of the label where it is another."""
        label = self.found.label(self.case.name)
        if self.found.predicted(name, self.case.name) == number:
            canvas.border(axes, KNOWN if label is None else TRUE if label == number else DIFFERENT)
        elif label == number:
            canvas.border(axes, TRUE, dashed=True)

    @cached_property
    def _gray(self) -> tuple[float, float]:
        return self.window or gray_window(self.found.first, self.case)

    def _canvas(self) -> Any:
        return slice_canvas(self.case, 0, self._gray, SMALL)


def _correlation(one: Array, other: Array) -> float:
    """Of the pixels that are in both; NaN where one of the maps is flat."""
    both = ~np.isnan(one) & ~np.isnan(other)
    if min(one[both].std(), other[both].std()) < _SURE:
        return float("nan")
    return float(np.corrcoef(one[both], other[both])[0, 1])
