# SPDX-License-Identifier: Apache-2.0
"""Pictures of a case: what each network predicts on the slices that matter, and where its layers look."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medkd.compare.cases import Case
from medkd.compare.comparison import Comparison
from medkd.compare.errors import differ, wrong
from medkd.compare.networks import Network
from medkd.compare.running import AFFINITY
from medkd.report import canvas, page
from medkd.report.pictures import DIFFERENT, class_color

__all__ = ["INSTANCES", "SMALL", "CaseFigures", "Slice", "gray_window", "slice_canvas"]

Array = NDArray[Any]

INSTANCES = "#4cc9f0"
SMALL = 300              # pixels of a picture of attention


def gray_window(network: Network, case: Case) -> tuple[float, float]:
    """Level and width of the gray values that a network is shown, else of those that the case has."""
    seen = network.value("intensity_range")
    low, high = seen or np.percentile(case.image[::2, ::2], (0.5, 99.5))
    return (low + high) / 2, max(high - low, 1e-6)


def slice_canvas(
    case: Case, position: int, gray: tuple[float, float], width: int, view: tuple[slice, slice] | None = None
) -> Any:
    """Axes with a slice of a case, in its colors or in a window of gray values; see `medkd.report.canvas`."""
    frame, image = case.frame, case.image
    if image.ndim > len(frame.shape):                              # colors
        pixels = np.stack([frame.cut(image[..., channel], position) for channel in range(3)], -1)
    else:
        pixels = frame.cut(image, position)
    return canvas.canvas(pixels, frame.pixel, gray, frame.letters, width, view)


@dataclass(frozen=True)
class Slice:
    """A slice that is shown."""

    position: int
    why: str


@dataclass(frozen=True)
class CaseFigures:
    """A case with all predictions; equal slices and window for all networks.

    Args:
        found: of all cases.
        case: its files.
        window: level and width of the gray values; None for that of the first network, or the values that there are.
        most: slices.
    """

    found: Comparison
    case: Case
    window: tuple[float, float] | None = None
    most: int = 3

    @cached_property
    def predictions(self) -> dict[str, Array]:
        """Of the networks that have one."""
        values = {name: self.found.outcomes[name].prediction(self.case.name) for name in self.found.names}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def errors(self) -> dict[str, Array]:
        """Marked voxels of each prediction: wrong, or without a label those where the networks differ."""
        kind = self.found.first.kind
        if self.case.label is not None:
            counts = self.found.first.config.get("unit") != "nm"   # there 0 is not labeled
            return {name: wrong(pred, self.case.label, kind, counts) for name, pred in self.predictions.items()}
        if len(self.predictions) < 2:
            return {}
        return dict.fromkeys(self.predictions, differ(list(self.predictions.values()), kind))

    @cached_property
    def gray(self) -> tuple[float, float]:
        """Level and width of the window."""
        return self.window or gray_window(self.found.first, self.case)

    @cached_property
    def foreground(self) -> Array | None:
        """What the label calls foreground; without a label, what all networks do."""
        sides = list(self.predictions.values()) if self.case.label is None else [self.case.label]
        return np.all([side > 0 for side in sides], axis=0) if sides else None

    @cached_property
    def slices(self) -> list[Slice]:
        """The slices that matter, in their order."""
        if self.case.frame.depth == 1:
            return [Slice(0, "")]
        chosen = self._of_classes() if self.found.first.kind == "classes" else self._of_errors()
        return chosen or [Slice(self.case.frame.depth // 2, "the middle")]

    def _of_classes(self) -> list[Slice]:
        """Per class the slice with most of its label, else with most disagreement; those with most errors stay."""
        per_slice, votes = self.case.frame.per_slice, dict[int, list[str]]()
        for number in range(1, self.found.first.classes):
            name = self.found.class_name(number)
            if self.case.label is not None:
                counts, what = per_slice(self.case.label == number), f"most {name}"
            else:
                masks = [pred == number for pred in self.predictions.values()]
                counts, what = per_slice(np.any(masks, axis=0) & ~np.all(masks, axis=0)), f"most differ in {name}"
            if counts.max(initial=0) > 0:
                votes.setdefault(int(counts.argmax()), []).append(what)
        errors = np.sum([per_slice(mask) for mask in self.errors.values()], axis=0)
        order = sorted(votes, key=lambda position: -float(np.asarray(errors)[position] if np.ndim(errors) else 0))
        return [Slice(position, ", ".join(votes[position])) for position in sorted(order[: self.most])]

    def _of_errors(self) -> list[Slice]:
        """The slices with most errors, apart from each other."""
        if not self.errors:
            return []
        left = np.sum([self.case.frame.per_slice(mask) for mask in self.errors.values()], axis=0).astype(float)
        apart, chosen = max(self.case.frame.depth // (2 * self.most), 1), list[int]()
        while len(chosen) < self.most and left.max() > 0:
            position = int(left.argmax())
            chosen.append(position)
            left[max(position - apart, 0) : position + apart + 1] = 0
        what = "most errors" if self.case.label is not None else "most differences"
        return [Slice(position, what) for position in sorted(chosen)]

    @property
    def main_slice(self) -> Slice:
        """The slice that attention is shown on: of those above the one with most foreground."""
        if self.foreground is None:
            return self.slices[0]
        counts = self.case.frame.per_slice(self.foreground)
        return max(self.slices, key=lambda one: int(counts[one.position]))

    @cached_property
    def view(self) -> tuple[slice, slice] | None:
        """Rows and columns in which a slice that is shown is brighter than black, with a rim; None for all of them.

        A scan is mostly air, and a head in it small.
        """
        frame, image = self.case.frame, self.case.image
        if image.ndim > len(frame.shape):                          # colors
            return None
        black = self.gray[0] - self.gray[1] / 2
        plane: Array = np.any([frame.cut(image, one.position) > black for one in self.slices], axis=0)
        if not plane.any():
            return None
        found = []
        for axis, length in enumerate(plane.shape):
            places = np.flatnonzero(plane.any(1 - axis))
            rim = max(length // 32, 1)
            found.append(slice(max(int(places[0]) - rim, 0), min(int(places[-1]) + 1 + rim, length)))
        return found[0], found[1]

    # ---- pictures --------------------------------------------------------------------------------------------------

    def overlays(self) -> list[str]:
        """A row per slice: the label, and each prediction with its errors."""
        parts = []
        for one in self.slices:
            where = self._where(one)
            truth = "label" if self.case.label is not None else "image"
            figures = [page.figure(self._overlay(one.position, self.case.label, None), f"{truth}{where}")]
            for name in self.found.names:
                pred, marked = self.predictions.get(name), self.errors.get(name)
                count = 0 if marked is None else int(self.case.frame.cut(marked, one.position).sum())
                share = "" if marked is None else f": {count} pixels marked"
                text = f"{name}{share}" if pred is not None else f"{name}: no instances"
                figures.append(page.figure(self._overlay(one.position, pred, marked), text))
            parts.append(page.rows(figures, len(figures)))
        return parts

    def _where(self, one: Slice) -> str:
        if self.case.frame.depth == 1:
            return ""
        return f", slice {one.position + 1} of {self.case.frame.depth}{f' ({one.why})' if one.why else ''}"

    def _overlay(self, position: int, numbers: Array | None, marked: Array | None) -> bytes:
        frame = self.case.frame
        axes = self._canvas(position)
        if numbers is not None:
            plane = frame.cut(numbers, position)
            if self.found.first.kind == "classes":
                for number in np.unique(plane[plane > 0]):
                    canvas.outline(axes, plane == number, frame.pixel, class_color(int(number)))
            else:
                canvas.edges(axes, plane, INSTANCES)
        if marked is not None:
            canvas.mark(axes, frame.cut(marked, position), DIFFERENT, 0.55)
        return canvas.png(axes)

    def _canvas(self, position: int, width: int = 460) -> Any:
        return slice_canvas(self.case, position, self.gray, width, self.view)

    def attention(self) -> list[str]:
        """A row per level, a picture per network, on one slice; colors mean the same in a row."""
        one, parts = self.main_slice, []
        for row in self.found.rows:
            planes = {name: self._plane(name, path, one.position) for name, path in row.paths.items()}
            known = {name: plane for name, plane in planes.items() if plane is not None}
            top = max((float(np.percentile(plane, 99.5)) for plane in known.values()), default=0.0)
            figures = []
            for name in self.found.names:
                if name in known:
                    caption = name if AFFINITY in row.paths.values() else f"{name}: {row.paths[name]}"
                    caption += " (the logits)" if name in row.logits else ""
                    figures.append(page.figure(self._map(known[name], one.position, top, row.paths[name]), caption))
                else:
                    figures.append(f"<figure><figcaption>{escape(name)}: no such level</figcaption></figure>")
            parts += [f"<h4>{escape(row.title)}</h4>", page.rows(figures, len(figures))]
        return parts

    def _plane(self, name: str, path: str, position: int) -> Array | None:
        seen = self.found.outcomes[name].seen[self.case.name]
        if path not in seen.files:
            return None
        return self.case.frame.cut_other(seen.load(path), seen.affine, position)

    def _map(self, plane: Array, position: int, top: float, path: str) -> bytes:
        frame = self.case.frame
        if path == AFFINITY:
            return canvas.png(canvas.canvas(plane, frame.pixel, (0.5, 1.0), frame.letters, SMALL, self.view))
        axes = self._canvas(position, SMALL)
        canvas.heat(axes, plane, top)
        if self.found.first.kind == "classes" and self.foreground is not None:
            canvas.outline(axes, frame.cut(self.foreground, position), frame.pixel, "#ffffff", 0.9)
        return canvas.png(axes)

    def attention_text(self) -> str:
        """Which slice attention is shown on."""
        return f"{self.case.name}{self._where(self.main_slice)}"
