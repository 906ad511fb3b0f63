# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

import format_json


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "bundles" / "toy" / "configs" / "train.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "ci" / "skeleton").mkdir(parents=True)
    return path


def run(mode: str, config: Path) -> int:
    return format_json.main([mode, "--root", str(config.parents[3])])


def test_a_list_of_110_characters_stays_on_one_line_and_a_longer_one_does_not() -> None:
    fits = {"key": ["x" * 96]}  # two spaces, a key of 7, brackets, quotes and a comma make 110
    assert max(map(len, format_json.dumps(fits).splitlines())) + 1 == 110
    assert format_json.dumps({"key": ["x" * 97]}).splitlines()[1] == '  "key": ['


def test_a_short_dict_stays_on_one_line_inside_a_broken_one() -> None:
    value = {"loss": {"_target_": "DiceLoss", "softmax": True}, "names": ["y" * 60, "y" * 60], "empty": {}}
    assert format_json.dumps(value) == (
        '{\n  "loss": {"_target_": "DiceLoss", "softmax": true},\n'
        f'  "names": [\n    "{"y" * 60}",\n    "{"y" * 60}"\n  ],\n  "empty": {{}}\n}}\n'
    )


def test_letters_outside_ascii_stay_readable() -> None:
    assert "Dürer" in format_json.dumps({"authors": "Dürer"})


def test_keys_take_the_order_of_the_skeleton_and_new_keys_follow_their_neighbor() -> None:
    value = {"first": 0, "b": 1, "of b": 2, "a": {"d": 3, "c": 4}, "of a": 5}
    ordered = format_json.in_order_of(value, {"a": {"c": 0, "d": 0}, "b": 0, "absent": 0})
    assert json.dumps(ordered) == '{"first": 0, "a": {"c": 4, "d": 3}, "of a": 5, "b": 1, "of b": 2}'
    assert list(format_json.in_order_of(ordered, {"a": {"c": 0, "d": 0}, "b": 0})) == list(ordered)


def test_items_of_a_list_take_the_order_of_their_class_wherever_they_stand() -> None:
    skeleton = [{"_target_": "A", "x": 0, "y": 0}, "<more>", {"_target_": "B", "z": 0}]
    value = [{"y": 1, "_target_": "A"}, {"b": 1, "a": 2, "_target_": "Own"}, {"z": 1, "_target_": "B"}, {"y": 1}]
    assert json.dumps(format_json.in_order_of(value, skeleton)) == (
        '[{"_target_": "A", "y": 1}, {"b": 1, "a": 2, "_target_": "Own"}, {"_target_": "B", "z": 1}, {"y": 1}]'
    )


def test_check_names_the_file_and_the_repair_and_changes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text('{"a":   1}')
    assert run("--check", config) == 1
    assert f"{config}: layout differs; run python ci/format_json.py --write" in capsys.readouterr().out
    assert config.read_text() == '{"a":   1}'


def test_write_lays_out_in_the_order_of_the_skeleton_and_then_check_passes(config: Path) -> None:
    config.write_text('{"b": 2, "a": 1}')
    (config.parents[3] / "ci" / "skeleton" / "train.json").write_text('{\n  "a": "<own>",\n  "b": 2\n}\n')
    assert run("--write", config) == 0
    assert config.read_text() == '{\n  "a": 1,\n  "b": 2\n}\n'
    assert run("--check", config) == 0


def test_the_skeleton_itself_is_checked(config: Path) -> None:
    (config.parents[3] / "ci" / "skeleton" / "train.json").write_text('{"a": 1}')
    assert run("--check", config) == 1


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": 1, "a": 2}', "key 'a' stands twice"), ("{", "must be JSON")]
)
def test_a_broken_file_is_named_in_both_modes_and_kept(
    config: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    config.write_text(text)
    assert run("--check", config) == run("--write", config) == 1
    out = capsys.readouterr().out
    assert message in out
    assert str(config) in out
    assert config.read_text() == text


def test_without_bundles_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert format_json.main(["--check", "--root", str(tmp_path)]) == 0
