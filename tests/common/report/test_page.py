# SPDX-License-Identifier: Apache-2.0
"""Pages: what is set in them is text, columns are where their titles are, and a page loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from medkd.report.page import facts, figure, grid, legend, table, write_page


def test_columns_stand_in_groups_and_an_edge_divides_them() -> None:
    rows = [["liver", "0.9", "0.8", "3.0", "4.0"], ["mean", "0.9", "0.8", "3.0", "4.0"], ["seconds", "1", "2"]]

    text = table(rows, ["", "a", "b", "a", "b"], [("Dice", 2), ("HD95", 2)], strong=["mean"])

    assert "<tr><th></th><th colspan=2>Dice</th><th colspan=2 class=edge>HD95</th></tr>" in text
    assert "<tr><th></th><th>a</th><th>b</th><th class=edge>a</th><th>b</th></tr></thead>" in text
    assert "<tr><td>liver</td><td>0.9</td><td>0.8</td><td class=edge>3.0</td><td>4.0</td></tr>" in text
    assert "<tr class=strong><td>mean</td>" in text
    assert "<tr><td>seconds</td><td>1</td><td>2</td></tr></tbody>" in text


def test_a_table_without_groups_has_one_line_of_titles() -> None:
    assert table([["a", "1"]], ["", "Dice"]).count("<tr>") == 2


def test_what_is_told_is_text_and_no_markup() -> None:
    told = "<b>&"

    parts = [figure(b"", told), legend({told: "#fff"}), table([[told]], [told], [(told, 1)]), facts([(told, told)])]

    assert all(told not in part and "&lt;b&gt;&amp;" in part for part in parts)


def test_a_page_is_one_file_that_loads_nothing_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"

    write_page(path, "Two & three", ["<h1>one</h1>", grid([figure(b"\x89PNG", "a picture")])])

    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>Two &amp; three</title>" in text
    assert '<div class=grid><figure><img alt="a picture" src="data:image/png;base64,iVBORw==">' in text
    assert not re.search(r"url\(|@import|<script|<link|https?:", text)
