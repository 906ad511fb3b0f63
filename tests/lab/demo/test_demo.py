# SPDX-License-Identifier: Apache-2.0
"""The whole demo in a minute, as a user runs it: `python -m lab.demo --quick`."""

from __future__ import annotations

import base64
import html
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

from lab.demo.__main__ import FULL, QUICK, main, parse_options
from lab.demo.steps import Sizes
from medkd.phantoms.ct import CT_LABELS

pytestmark = pytest.mark.timeout(900)   # a minute on two idle cores


class Demo(NamedTuple):
    """What a run of the demo left."""

    text: str
    output: Path
    report: str


class Page(HTMLParser):
    """Collects what a page would load, its pictures, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.plots = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "srcset")]
        self.plots += tag == "svg"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def run_demo(repository: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lab.demo", "--quick", "--output", str(output), *more]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    output = tmp_path_factory.mktemp("demo")
    done = run_demo(Path(__file__).parents[3], output)
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(done.stdout, output, (output / "report.html").read_text())


def test_the_report_loads_nothing(demo: Demo) -> None:
    links = Page(demo.report).links

    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<script|<link", demo.report)


def test_the_report_holds_pictures_of_two_cases_and_a_plot_of_each_loss(demo: Demo) -> None:
    page = Page(demo.report)
    pictures = [base64.b64decode(link.split(",")[1]) for link in page.links if link.startswith("data:")]

    assert len(pictures) == 2 * 2 * 4 + 2 * 2 * 2   # cases, planes, networks and truth; cases, planes, students
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert page.plots >= 4                          # Dice, supervised and total loss, a term of distillation


def test_the_table_has_every_organ_and_finite_numbers(demo: Demo) -> None:
    rows = {row[0]: row[1:] for row in Page(demo.report).rows if row}

    for organ in [name.replace("_", " ") for name in CT_LABELS.values()][1:] + ["mean"]:
        assert len(rows[organ]) == 6
        assert all(0 <= float(cell) <= 1 for cell in rows[organ][:3])
        assert all(0 <= float(cell) < 1000 for cell in rows[organ][3:])


def test_the_terminal_and_the_report_have_a_row_per_network_with_the_labels_it_saw(demo: Demo) -> None:
    expected = [
        ["teacher", "3", "-"], ["student alone", "2", "-"], ["student alone", "3", "-"],
        ["distilled student", "2", "2"],
    ]
    rows = [row for row in Page(demo.report).rows if len(row) == 8 and row[1].isdigit()]

    assert [row[:3] for row in rows] == expected
    for row in rows:
        assert " ".join(row).split() in [line.split() for line in demo.text.splitlines()]
        assert 0 <= float(row[3]) <= 1
        assert all(float(cell) >= 0 for cell in (*row[4:6], row[7]))


def test_the_first_sentence_of_the_results_says_what_was_gained_alike_on_terminal_and_page(demo: Demo) -> None:
    sentence = re.search(r"<p><strong>(.*?)</strong>", demo.report)

    assert sentence
    assert html.unescape(sentence[1]) in demo.text
    assert "mean Dice" in sentence[1]


def test_the_terminal_shows_commands_best_scores_and_what_to_type_next(demo: Demo) -> None:
    assert demo.text.count("python -m monai.bundle run training") == 4
    assert demo.text.count("best validation Dice") == 4
    assert "One seed. Steps: teacher 20, students alone 40, distilled student 20 of twice the crops." in demo.text
    assert "configs/inference.json" in demo.text.splitlines()[-1]


def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.nii.gz").touch()

    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path), "--fresh"])

    assert stop.value.code == 2
    assert "--output must be a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "data" / "mine.nii.gz").exists()


@pytest.mark.parametrize(("words", "sizes"), [
    ([], FULL),
    (["--quick"], QUICK),
    (["--epochs", "5", "--labels", "16", "--unlabeled", "8"], replace(
        FULL, labels=16, unlabeled=8, teacher_epochs=5, alone_epochs=10, distilled_epochs=5, val_interval=5
    )),
])
def test_the_command_line_decides_on_the_sizes(words: list[str], sizes: Sizes) -> None:
    assert parse_options(words).sizes == sizes


def test_finished_steps_are_skipped_and_a_failing_one_shows_the_end_of_its_log(
    demo: Demo, repository: Path
) -> None:
    weights = demo.output / "bundle" / "runs" / "logits" / "model.pt"
    before = weights.read_bytes()
    step = demo.output / "steps" / "prediction_and_speed"
    (step / "run.json").unlink()
    weights.write_bytes(b"torn")

    done = run_demo(repository, demo.output)
    weights.write_bytes(before)

    assert done.stdout.count("finished before") == 7
    assert done.returncode == 1
    assert "Step 'prediction and speed' failed" in done.stderr
    assert str(step / "log.txt") in done.stderr
