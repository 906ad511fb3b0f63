# SPDX-License-Identifier: Apache-2.0
"""A run of a bundle: the merged config, the command, and copies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fire.parser import DefaultParseValue

from lab.bundle import BundleRun, copy_bundle, freeze_bundle, show_words


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_merged_config_takes_what_comes_last(tmp_path: Path) -> None:
    write(tmp_path / "configs" / "train.json", {"a": {"b": 1, "c": [1, 2]}, "d": 1, "w": {"x": 1.0}})
    write(tmp_path / "configs" / "other.json", {"a#c#1": 5, "w": {}})

    run = BundleRun(tmp_path, "training", ["train", "other"], {"a#b": 7, "w#x": 0.5})

    assert run.config == {"a": {"b": 7, "c": [1, 5]}, "d": 1, "w": {"x": 0.5}}


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": [{"_target_": "x.Y", "z": None}]}, [1, 2.5, -3], [4.0, 4.0], True, -1, 1e-5, "../data", "007",
        "1_2", "1e3", "$@a + 'b'", "@x", "a b", "it's", "'quoted'", "[a]", "", "None",
    ],
)
def test_an_option_is_read_back_from_the_command_line_as_it_was(value: Any) -> None:
    words = BundleRun(Path(), "training", ["train"], {"key#1": value}).words()

    assert words[-2] == "--key#1"
    assert DefaultParseValue(words[-1]) == value
    assert type(DefaultParseValue(words[-1])) is type(value)


def test_none_becomes_an_expression_as_monai_drops_it_else() -> None:
    assert BundleRun(Path(), "training", ["train"], {"key": None}).words()[-2:] == ["--key", "$None"]


def test_a_command_is_shown_as_it_is_typed() -> None:
    words = [sys.executable, "-m", "monai.bundle", "--config_file", "['a.json','b.json']"]
    shown = show_words(words, Path("/home/me/medkd/demo"), Path("/home/me/medkd"))
    assert shown == "cd demo && python -m monai.bundle --config_file \"['a.json','b.json']\""
    assert show_words(["a", "it's $x"]) == "a 'it'\"'\"'s $x'"


def test_the_copy_of_the_sources_is_made_once_per_content(tmp_path: Path) -> None:
    train = write(tmp_path / "bundle" / "configs" / "train.json", "{}")
    write(tmp_path / "medkd" / "a.py", "")

    first = freeze_bundle(tmp_path / "bundle", tmp_path / "copies", tmp_path / "medkd")
    assert freeze_bundle(tmp_path / "bundle", tmp_path / "copies", tmp_path / "medkd") == first
    train.write_text("{ }")
    assert freeze_bundle(tmp_path / "bundle", tmp_path / "copies", tmp_path / "medkd") != first
    assert (first / "configs" / "train.json").read_text() == "{}"
    assert len(list((tmp_path / "copies").iterdir())) == 2
    assert BundleRun(first, "training", ["train"]).package == first / "package" / "medkd"


def test_a_copy_that_is_brought_up_to_date_keeps_what_runs_wrote(tmp_path: Path) -> None:
    write(tmp_path / "bundle" / "configs" / "train.json", "{}")
    for name in ("configs/old.json", "models/model.pt"):
        write(tmp_path / "copy" / name, "")

    copy_bundle(tmp_path / "bundle", tmp_path / "copy")

    assert sorted(p.name for p in (tmp_path / "copy").rglob("*.*")) == ["model.pt", "train.json"]
