# SPDX-License-Identifier: Apache-2.0
"""What a run was asked for, found in the config that is being evaluated."""

from __future__ import annotations

from typing import Any

from monai.bundle.config_parser import ConfigParser

from medkd.inference.options import current_parser
from medkd.settings import flatten, run_settings

ASKED = {"_target_": "medkd.settings.run_settings"}


def settings(**config: Any) -> dict[str, Any]:
    """The settings as a component of a config gets them."""
    parser = ConfigParser({**config, "run_settings": ASKED, "user": {"_target_": "dict", "settings": "@run_settings"}})
    found: dict[str, Any] = parser.get_parsed_content("user")["settings"]
    return {key: value for key, value in found.items() if not key.startswith("user#")}


def test_a_component_gets_the_merged_config_of_its_run() -> None:
    loss = {"_target_": "dict", "weights": [1, 2.5], "levels": [], "parts": [{"size": 3}]}
    assert settings(epochs=3, twice="$@epochs * 2", amp=False, nothing=None, loss=loss) == {
        "epochs": 3, "twice": "$@epochs * 2", "amp": False, "nothing": None,
        "loss#_target_": "dict", "loss#weights": [1, 2.5], "loss#levels": [], "loss#parts#0#size": 3,
    }


def test_an_override_wins_and_a_copied_text_is_told_where_it_was_copied_to() -> None:
    parser = ConfigParser({"a": {"rate": 0.1}, "b": "%a", "run_settings": ASKED})
    parser.update({"a#rate": 0.2})
    assert parser.get_parsed_content("run_settings") == {"a#rate": 0.2, "b#rate": 0.2}


def test_an_expression_knows_its_own_parser_and_not_one_around_it() -> None:
    outer = ConfigParser({"x": "$options.current_parser()", "imports": ["$from medkd.inference import options"]})
    assert outer.get_parsed_content("x") is outer
    assert current_parser() is None
    assert run_settings() == {}


def test_places_commands_machine_and_watchers_are_no_settings() -> None:
    handlers = [{"_target_": "StatsHandler"}, "@own", {"_target_": "medkd.handlers.schedule.WeightSchedule", "x": 1}]
    config = {
        "ckpt_dir": "here", "resume": True, "device": "cpu", "training": ["$1"], "seed": 1, "_meta_": {"version": "2"},
        "train": {"dataset": {"data": [{"image": "a"}], "num_workers": 2, "x": 1}, "handlers": handlers},
    }
    assert flatten(config) == {
        "seed": 1, "train#dataset#x": 1, "train#handlers#0": "@own",
        "train#handlers#1#_target_": "medkd.handlers.schedule.WeightSchedule", "train#handlers#1#x": 1,
    }


def test_an_object_that_a_program_put_in_is_known_by_its_type() -> None:
    assert flatten({"loss": object(), "size": (1, 2)}) == {"loss": "an object of builtins.object", "size": [1, 2]}
