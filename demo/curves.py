# SPDX-License-Identifier: Apache-2.0
"""Curves of training from TensorBoard files, as SVG that takes the color of the text around it."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["RUN_COLORS", "curve_figure", "epoch_means", "read_curves"]

RUN_COLORS = {"teacher": "#8a8f98", "student alone": "#e07a1f", "distilled student": "#2f8fd8"}
INK = "#010203"  # becomes currentColor
Curve = Sequence[tuple[float, float]]


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read all scalars of a run; of a step that was logged twice (a resumed run) the later one.

    Returns:
        Tag -> points (epoch, value); tags of single steps have a point per step, at a fraction of an epoch.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {tag: {e.step: float(e.value) for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    epochs = max((max(c) for tag, c in curves.items() if not _by_step(tag)), default=1)
    steps = max((max(c) for tag, c in curves.items() if _by_step(tag)), default=1)
    return {
        tag: [(step * epochs / steps if _by_step(tag) else step, c[step]) for step in sorted(c)]
        for tag, c in curves.items()
    }


def _by_step(tag: str) -> bool:
    return tag in ("loss", "supervised_loss") or tag.startswith("kd/")


def epoch_means(curve: Curve) -> list[tuple[float, float]]:
    """Average the steps of each epoch, at the epoch's end.

    Example:
        >>> epoch_means([(0.5, 4.0), (1.0, 2.0), (1.5, 1.0), (2.0, 1.0)])
        [(1, 3.0), (2, 1.0)]
    """
    groups: dict[int, list[float]] = {}
    for epoch, value in curve:
        groups.setdefault(-int(-(epoch - 1e-6) // 1), []).append(value)
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(groups.items())]


def curve_figure(curves: Mapping[str, Curve], label: str, marks: bool = False) -> str:
    """Draw curves over epochs.

    Args:
        curves: run -> points; the run's name decides the color.
        label: what the points are.
        marks: show each point, for values that are there every few epochs.

    Returns:
        An `<svg>` element whose text and axes have the color of the surrounding text.
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif", "font.size": 10,
             "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
             "ytick.color": INK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes: Any = figure.add_subplot()
        for run, points in curves.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=RUN_COLORS.get(run), label=run, lw=1.8, marker="o" if marks else None, ms=3.5)
        values = [value for points in curves.values() for _, value in points]
        wide = min(values, default=0) > 0 and max(values) > 20 * min(values)
        axes.set(xlabel="epoch", title=label, yscale="log" if wide else "linear")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Keep the element alone, of the width it is given, in the color of the text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)   # a style would hold for the whole page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor")
