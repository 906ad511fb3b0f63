# SPDX-License-Identifier: Apache-2.0
"""`medkd compare` of networks that classify whole images: the report, its scores and pictures, and what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bundle_runs
from medkd.cli import main
from medkd.compare.classifiers.figures import TRUE
from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of
from medkd.report.pictures import DIFFERENT

Refused = Callable[[list[str], str], None]
BUNDLES = Path(__file__).parents[3] / "bundles"
METRICS = ("balanced_accuracy", "quadratic_kappa", "macro_f1", "auc", "accuracy")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The histology bundle with its committed student, and a teacher of random weights."""
    name = "inter_resolution_histology_classification"
    ignore = shutil.ignore_patterns("runs", "eval", "teacher", "checkpoints", "logs", "__pycache__")
    root = Path(shutil.copytree(BUNDLES / name, tmp_path_factory.mktemp("bundle") / name, ignore=ignore))
    network = Network("teacher", root, ["teacher"])
    torch.manual_seed(0)
    with scripts_of(root):
        module = network.parse().get_parsed_content("network")
    (root / "models/teacher").mkdir()
    torch.save(module.state_dict(), root / "models/teacher/model.pt")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("histology")
    counts = ["--training", "1", "--validation", "1", "--test", "2"]
    assert main(["phantom", "histology", str(folder), "--shape", "81,74", *counts]) == 0
    return folder


@pytest.fixture(scope="module")
def words(bundle: Path, data: Path) -> list[str]:
    networks = [f"teacher={bundle / 'models/teacher/model.pt'}+teacher", f"student={bundle / 'models/model.pt'}"]
    return ["compare", *networks, "--data", str(data)]


@pytest.fixture(scope="module")
def report(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "compare.html"
    assert main([*words, "--set", "scale=4", "--pictures", "2", "--output", str(path)]) == 0
    return path.read_text()


def table(html: str, title: str) -> list[list[str]]:
    """Cells of the first table after a title, its head first."""
    rows = re.findall(r"<tr>(.*?)</tr>", html[html.index(title) :].partition("</table>")[0])
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def pictures(html: str) -> list[tuple[str, np.ndarray]]:
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', html)
    return [(text, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))) for text, data in found]


@pytest.mark.parametrize(("name", "configs"), [("teacher", ["teacher"]), ("student", [])])
def test_scores_are_those_of_the_bundles_own_evaluation(
    name: str, configs: list[str], report: str, bundle: Path, data: Path, tmp_path: Path
) -> None:
    before = list(sys.path)
    try:
        with scripts_of(bundle):
            bundle_runs.run(bundle, "evaluating", "train", *configs, "evaluate", dataset_dir=str(data),
                            output_dir=str(tmp_path))
    finally:
        sys.path[:] = before
    told = dict(line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    head, *rows = table(report, "<strong>")
    row = next(cells for cells in rows if cells[0] == name)
    for metric in METRICS:
        value = float(told[f"val_{metric}"])
        shown = "-" if np.isnan(value) else f"{value:.3f}"
        title = metric.replace("_", " ").replace("auc", "AUC").replace("f1", "F1")
        assert row[head.index(title)] == shown
    with (tmp_path / "confusion_matrix.csv").open() as file:
        counts = [line[1:] for line in csv.reader(file)][1:]
    title = f"<h3>{name}</h3>"
    confusion = table(report[report.index("Which classes are taken for which") :], title)
    assert [cells[1:-1] for cells in confusion[1:]] == counts
    assert [cells[0] for cells in confusion[1:]] == ["regular", "moderate", "severe"]   # names of the datalist


def test_wrong_classes_are_marked_case_by_case(report: str) -> None:
    head, *rows = table(report, "Case by case")
    assert head == ["case", "label", "teacher", "student"]
    assert len(rows) == 6
    part = report[report.index("Case by case") :].partition("</table>")[0]
    marked = re.findall(r"<td style=[^>]*>(.*?)</td>", part)
    wrong = [cell for row in rows for cell in row[2:] if cell.split()[0] != row[1]]
    assert marked == wrong
    assert wrong


def test_each_class_has_a_map_of_each_network_beside_the_image(report: str) -> None:
    shown = pictures(report)
    cases = [row[0] for row in table(report, "Case by case")[1:3]]
    assert len(shown) == 2 * 3 * 3                                  # cases, classes, image and two networks
    for start, case in ((0, cases[0]), (9, cases[1])):
        for row in range(3):
            (image, pixels), (teacher, first), (student, second) = shown[start + 3 * row : start + 3 * row + 3]
            name = ("regular", "moderate", "severe")[row]
            assert image == f"{case}, the image"
            assert (teacher[: len(name) + 9], student[: len(name) + 9]) == (f"teacher, {name}", f"student, {name}")
            assert pixels.shape == first.shape == second.shape
            assert not np.array_equal(first, second)


def test_the_predicted_class_and_that_of_the_label_have_borders(report: str) -> None:
    colors = {"predicted, wrong": DIFFERENT, "predicted": TRUE}
    found = []
    for text, pixels in pictures(report):
        said = text.partition(", ")[2].partition(": ")[2].partition(", ")[2]
        corner = "#" + "".join(f"{value:02x}" for value in pixels[1, 1])
        assert (corner in colors.values()) >= (said in colors)
        if said in colors:
            assert corner == colors[said]
            found.append(said)
    assert len(found) == 4                                          # of two networks and cases


def test_cases_without_a_label_have_no_scores(words: list[str], data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "datalist.json").read_text())
    for item in content["test"][1:]:
        del item["label"]
    (tmp_path / "datalist.json").write_text(json.dumps(content | {"data_root": str(data)}))
    some = [*words[:3], "--data", str(tmp_path), "--output", str(tmp_path / "r.html")]
    assert main([*some, "--pictures", "0"]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "6 case(s), 1 of them with a label" in html
    assert [row[1] for row in table(html, "Case by case")[1:]].count("-") == 5
    image = str(data / content["test"][0]["image"])
    assert main([*words[:3], "--image", image, "--output", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "without scores" in html
    assert "Which classes are taken for which" not in html
    assert "predicted; there is no label" in html


def test_what_does_not_belong_to_classifiers_is_refused(words: list[str], data: Path, refused: Refused) -> None:
    image = next((data / "images").iterdir())
    refused([*words[:3], "--image", str(image), "--label", "2"],
            "--label must be left out, as `teacher` classifies whole images, whose label is no file, got 2; for scores")
    refused([*words, "--exponent", "2"], "--exponent must be left out, as maps of `teacher` are of classes")
    refused([*words, "--tap", "features.9"], "A tap of the teacher must be a module or parameter path")
    refused([*words, "--tap", "head"], "A tap of `teacher` must give maps (B, C, *S) of 2 axes, got (1, 3) of 'head'")
    other = f"cells={BUNDLES / 'graph_relation_nuclei'}"
    refused([*words[:3], other, *words[3:]],
            "the same task, got labels of whole images for `teacher` and instances for `cells`")
    refused([words[0], words[2], f"{words[2].replace('student', 'more')}+out_channels=4", *words[3:]],
            "the same number of classes, got 3 for `student` and 4 for `more`")
