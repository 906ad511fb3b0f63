# SPDX-License-Identifier: Apache-2.0
"""Curves: what TensorBoard files hold, means of epochs, and plots in which a run has one color."""

from __future__ import annotations

import re
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from medkd.report.curves import curve_figure, epoch_means, read_curves

ONE, OTHER = [(1.0, 0.1), (2.0, 0.2)], [(2.0, 0.1), (3.0, 0.3)]


def strokes(svg: str) -> list[str]:
    """Colors of the curves, in the order in which they are drawn; axes and grid have other widths."""
    return re.findall(r"stroke: (#\w+); stroke-width: 1.8", svg)


def test_steps_of_a_run_are_told_as_fractions_of_an_epoch(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 5):
            writer.add_scalar("loss", 1.0 / step, step)
        for epoch in (1, 2):
            writer.add_scalar("val_mean_dice", 0.25 * epoch, epoch)
        writer.add_scalar("val_mean_dice", 0.75, 2)   # a resumed run tells its last epoch again

    curves = read_curves(tmp_path)

    assert curves["loss"] == [(0.5, 1.0), (1.0, 0.5), (1.5, curves["loss"][2][1]), (2.0, 0.25)]
    assert curves["val_mean_dice"] == [(1, 0.25), (2, 0.75)]


def test_steps_are_averaged_by_epoch() -> None:
    assert epoch_means([(0.5, 4.0), (1.0, 2.0), (1.5, 1.0), (2.0, 1.0)]) == [(1, 3.0), (2, 1.0)]
    assert [epoch for epoch, _ in epoch_means([(step * 25 / 300, 1.0) for step in range(1, 301)])] == list(range(1, 26))


def test_a_plot_takes_the_color_of_the_text_around_it() -> None:
    svg = curve_figure({"teacher": ONE, "student alone": OTHER}, "Dice")

    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "student alone" in svg


def test_a_run_without_points_keeps_its_color_and_is_not_named() -> None:
    both, second = (strokes(curve_figure({"a run": one, "b": OTHER, "c": OTHER}, "x")) for one in (ONE, []))

    assert len(set(both)) == 3
    assert set(second) == set(both) - {both[0]}
    assert "a run" not in curve_figure({"a run": [], "b": OTHER, "c": OTHER}, "x")


def test_any_number_of_runs_is_drawn() -> None:
    svg = curve_figure({f"run {number}": ONE for number in range(20)}, "loss")

    assert all(f"run {number}<" in svg for number in range(20))
    assert curve_figure({}, "nothing").startswith("<svg")
