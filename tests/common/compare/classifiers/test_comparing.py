# SPDX-License-Identifier: Apache-2.0
"""Classifiers of the histology bundle with weights by hand: maps lie where the picture says, and tables count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medkd.compare.cases import read_case
from medkd.compare.classifiers.comparing import compare_classifiers
from medkd.compare.classifiers.comparison import ClassComparison
from medkd.compare.classifiers.figures import ClassFigures
from medkd.compare.classifiers.running import ClassOutcome
from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of

HISTOLOGY = Path(__file__).parents[4] / "bundles/inter_resolution_histology_classification"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
NAMES = {0: "regular", 1: "moderate", 2: "severe"}


def see_colors(name: str, configs: tuple[str, ...], folder: Path, **settings: Any) -> Network:
    """A network whose features are red, green and blue at the center of each cell; their means score classes 0 to 2."""
    network = Network(name, HISTOLOGY, configs, settings, folder / f"{name}.pt")
    with scripts_of(HISTOLOGY):
        module = network.parse().get_parsed_content("network")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
                center = (1,) * (parameter.dim() - 2)
                for channel in range(3):
                    parameter[(channel, channel, *center)] = 1.0
    torch.save(module.state_dict(), network.given_weights)
    return network


def compared(folder: Path, pixels: np.ndarray, taps: list[list[str]] | None = None, **settings: Any) -> ClassFigures:
    Image.fromarray(pixels).save(folder / "a.png")
    networks = [see_colors("teacher", ("teacher",), folder), see_colors("student", (), folder, **settings)]
    found = compare_classifiers(networks, {"a": {"image": str(folder / "a.png"), "label": 1}}, taps or [])
    return ClassFigures(found, read_case(networks[0], "a", {"image": str(folder / "a.png")}))


@pytest.mark.parametrize("settings", [{}, {"scale": 2, "rim": 3}, {"student_input": "upsampled"}])
def test_a_ramp_of_brightness_lies_where_it_does_in_the_picture(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of green to the right and blue downwards: sizes that no scale divides, so that the last blocks are padded."""
    rows, columns = np.mgrid[:101, :118].astype(np.uint8)
    figures = compared(tmp_path, np.stack([0 * rows, columns, rows], -1), **settings)
    for name in ("teacher", "student"):
        red, green, blue = figures.planes[name, 0]                  # (101, 118) each
        rim = settings.get("rim", 1) if name == "student" else 1
        for plane in (red, green, blue):
            assert np.isnan(plane[:rim]).all()                      # cut off, so that the network does not see it
            assert np.isnan(plane[:, -rim:]).all()
            assert not np.isnan(plane[rim:-rim, rim:-rim]).any()
        inner = (slice(16, -32), slice(16, -32))                    # between centers of cells
        np.testing.assert_allclose(np.diff(green[inner], axis=1), np.diff(green[inner], axis=1)[0, 0], atol=1e-5)
        slope = np.diff(green[inner], axis=1)[0, 0]
        np.testing.assert_allclose(green[inner] / slope, columns[inner], atol=0.05)   # in pixels
        np.testing.assert_allclose(blue[inner] / slope, rows[inner], atol=0.05)
        assert np.nanmax(red) < 1e-6
        assert np.nanmax(np.stack([green, blue])) == pytest.approx(1.0, abs=1e-5)
    alike = figures.alike()
    assert alike["teacher", "student", 0, 1] > 0.99
    assert alike["teacher", "student", 0, 2] > 0.99
    assert np.isnan(alike["teacher", "student", 0, 0])              # nothing is red


def test_taps_show_other_layers_for_each_network(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:64, :64].astype(np.uint8)
    taps = [["features"], ["features.3", "features.1"]]
    figures = compared(tmp_path, np.stack([0 * rows, columns, rows], -1), taps)
    looks = {name: outcome.looks["a"] for name, outcome in figures.found.outcomes.items()}
    assert [maps.cells[0] for maps in looks["teacher"].maps] == [8, 2]
    assert [maps.cells[0] for maps in looks["student"].maps] == [4, 1]
    assert "features.3 and features.1" in "".join(figures.rows())
    with pytest.raises(ValueError, match=r"A tap of the student must be .* got 'features.9'"):
        compared(tmp_path, np.stack([rows] * 3, -1), [["features.7", "features.9"]])


# tables


def found_of(taken: Mapping[str, list[int]], labels: list[int | None]) -> ClassComparison:
    """Networks that take case 0, 1, ... for these classes, the more surely the later they come."""
    outcomes = {}
    for place, (name, classes) in enumerate(taken.items()):
        outcomes[name] = ClassOutcome(parameters=1000 * (place + 1), totals={"val_balanced_accuracy": 0.5 + place / 10})
        for case, chosen in enumerate(classes):
            scores = np.full(3, (0.5 - 0.1 * place) / 2)
            scores[chosen] = 0.5 + 0.1 * place
            outcomes[name].probabilities[str(case)] = scores
            outcomes[name].seconds[str(case)] = 0.002
    cases = {str(n): {"image": f"{n}.png"} | ({} if label is None else {"label": label})
             for n, label in enumerate(labels)}
    return ClassComparison([Network(name, HISTOLOGY) for name in taken], outcomes, cases, NAMES)


TAKEN = {"a": [0, 1, 2, 0, 1], "b": [0, 1, 0, 0, 0]}


def test_cases_on_which_networks_differ_come_first_and_then_those_that_they_get_wrong() -> None:
    found = found_of(TAKEN, [0, 0, 2, 0, 0])
    assert found.ranked == ["2", "4", "1", "0", "3"]
    head, rows, marked = found.case_table()
    assert head == ["case", "label", "a", "b"]
    assert rows[0] == ["2", "severe", "severe 0.50", "regular 0.60"]
    assert {rows[line][0] + head[column] for line, column in marked} == {"2b", "4a", "1a", "1b"}


def test_confusion_and_agreement_count_cases() -> None:
    found = found_of(TAKEN, [0, 0, 2, 0, None])
    head, rows, marked = found.confusion_table("b")
    assert head == ["label", "regular", "moderate", "severe", "found"]
    assert rows == [["regular", "2", "1", "0", "0.667"], ["moderate", "0", "0", "0", "-"],
                    ["severe", "1", "0", "0", "0.000"]]
    assert sorted(marked) == [(0, 2), (2, 1)]
    assert found.agreement_table()[1] == [["a and b", "3 of 5", "2", "1", "0", "1"]]


def test_verdict_tells_who_is_right_more_often_and_how_little_few_cases_say() -> None:
    assert found_of(TAKEN, [0, 1, 0, 0, 0]).verdict() == (
        "b is nearest to the labels: balanced accuracy 0.600, against 0.500 of a; it is right in 5 of 5 case(s), a in "
        "3. a has 50 % of the parameters of b and takes 0.002 s per case instead of 0.002 s. So few cases say little "
        "about others."
    )


def test_cases_without_a_label_are_compared_with_each_other_only() -> None:
    found = found_of(TAKEN, [None] * 5)
    assert "without scores: that one is better than another cannot be told here" in found.verdict()
    assert found.ranked[:2] == ["2", "4"]
    assert found.case_table()[0] == ["case", "a", "b"]
    assert found.case_table()[2] == []
    assert found.agreement_table() == (["networks", "same class"], [["a and b", "3 of 5"]])
    assert found.summary()[0] == ["network", "parameters", "s per case"]
