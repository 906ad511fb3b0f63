# SPDX-License-Identifier: Apache-2.0
"""Curves of training from TensorBoard files, as SVG that takes the color of the text around it."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Curve", "curve_figure", "epoch_means", "read_curves"]

_COLORS = ("#8a8f98", "#e07a1f", "#2f8fd8", "#3fa34d", "#b5489b", "#b48a3c", "#6f5fd0", "#c94f4f")  # run 1, 2, ...
_INK = "#010203"  # becomes currentColor
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
    """Draw curves of any number of runs over epochs, as an `<svg>` element that takes the color of the text around it.

    Args:
        curves: run -> points; a run without points is not drawn, but keeps its color, so that plots of the same runs
            agree.
        label: what the points are.
        marks: show each point, for values that are there every few epochs.
    """
    import matplotlib as mpl  # a second to import
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif", "font.size": 10}
    with mpl.rc_context(style | dict.fromkeys(inked, _INK)):
        figure = Figure(figsize=(4.2, max(2.9, 0.2 * len(curves))), layout="constrained")   # the legend has to fit
        _plot(figure.add_subplot(title=label, xlabel="epoch"), curves, marks)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _plot(axes: Any, curves: Mapping[str, Curve], marks: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (run, points) in enumerate(curves.items()):
        again, color = divmod(number, len(_COLORS))
        look = {"color": _COLORS[color], "ls": "--" if again else "-", "marker": "o" if marks else None}
        if points:
            axes.plot(*zip(*points, strict=True), label=run, lw=1.8, ms=3.5, **look)
    values = [value for points in curves.values() for _, value in points]
    wide = min(values, default=0) > 0 and max(values) > 20 * min(values)
    axes.set_yscale("log" if wide else "linear")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9)


def _inline(svg: str) -> str:
    """Keep the element alone, of the width it is given, in the color of the text."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)   # a style would hold for the whole page
    tag, inner = svg[svg.index("<svg") :].split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    return f"{tag}>{inner}".replace(_INK, "currentColor")
