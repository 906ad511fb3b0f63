# SPDX-License-Identifier: Apache-2.0
"""Pictures of a results file: per row a panel with all arms and seeds; the metric against the labeled cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lab.pages import finished_rows, main_rows, metric_title

STYLE = {
    "student_alone": ("student\nalone", "#e07a1f"), "logits_kd": ("plain\nKD", "#7d838c"),
    "features_kd": ("feature\nhints", "#b48a3c"), "distilled": ("distilled", "#2f8fd8"),
}
COLUMNS = 3


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw all rows that have results, but no details; without any, nothing is written."""
    rows = main_rows(content)
    if not rows:
        return
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(lines, columns, squeeze=False).flat, rows, strict=False):
        _panel(axes, row)
    for axes in figure.axes[len(rows):]:
        axes.set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_curve(content: Mapping[str, Any], path: Path) -> None:
    """Draw the curve of the first row that has one; a bar stands for the sd of several seeds."""
    row = next((row for row in finished_rows(content) if "curve" in row), None)
    if row is None:
        return
    figure = Figure(figsize=(5.2, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes, points = figure.subplots(), row["curve"]["points"]
    places = {point["labels"]: place for place, point in enumerate(points)}      # as wide apart as they are listed
    lines = {"student_alone": "student alone", "logits_kd": "plain KD", "distilled": "distilled, with further images"}
    for name, title in lines.items():
        found = [point for point in points if name in point]
        spread = [point[name]["sd"] or 0.0 for point in found]
        axes.errorbar(
            [places[point["labels"]] for point in found], [point[name]["mean"] for point in found], yerr=spread,
            color=STYLE[name][1], marker="o", ms=5, lw=1.8, capsize=3, label=title,
        )
    teacher = row["teacher"]["mean"]
    axes.axhline(teacher, color="#444444", lw=1.2, ls="--", label=f"teacher {teacher:.3f}")
    if "classical" in row:
        value = row["classical"]["mean"]
        axes.axhline(value, color="#8a8a8a", lw=1.2, ls=":", label=f"classical {value:.3f}")
    axes.set_xticks(range(len(points)), list(map(str, places)), fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("labeled training cases", fontsize=9)
    axes.set_ylabel(f"test {metric_title(row['metric'])}", fontsize=9)
    axes.set_title(row["data"].replace("_", " "), fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axes: Any, row: Mapping[str, Any]) -> None:
    arms = [(*STYLE[name], row[name]) for name in STYLE if name in row]
    teacher = row["teacher"]["mean"]
    values = [teacher, *(value for *_, arm in arms for value in (*arm["runs"], arm["mean"]))]
    room = max(max(values) - min(values), 0.02)
    axes.axhline(teacher, color="#444444", lw=1.2, ls="--", zorder=1)
    for position, (_, color, arm) in enumerate(arms):
        axes.hlines(arm["mean"], position - 0.34, position + 0.34, color=color, lw=2.2, alpha=0.55, zorder=2)
        spots = [position + 0.14 * (number - (len(arm["runs"]) - 1) / 2) for number in range(len(arm["runs"]))]
        axes.plot(spots, arm["runs"], "o", ms=4.5, mfc=color, mec="white", mew=0.8, zorder=3)
    axes.set_ylim(min(values) - 0.12 * room, max(values) + 0.12 * room)
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_xticks(range(len(arms)), [f"{title}\n{arm['mean']:.3f}" for title, _, arm in arms], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel(f"test {metric_title(row['metric'])}", fontsize=9)
    axes.set_title(f"{row['id'].replace('_', ' ')}\ndashed: teacher {teacher:.3f}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
