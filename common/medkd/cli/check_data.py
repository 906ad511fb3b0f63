# SPDX-License-Identifier: Apache-2.0
"""Read all files of a datalist, tell everything that is wrong, and show what the data look like.

With a bundle, by --bundle or because the current folder is one, files are read and judged as its training does. Who
has a teacher needs no labels: a bundle knows by its teacher's weights, else --label_free says so.
"""

from __future__ import annotations

import logging
import os
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from medkd.cli.lists import count_classes, load_lists
from medkd.cli.parser import Parser, literal

__all__ = ["run"]

logger = logging.getLogger(__name__)


def run(parser: Parser, words: Sequence[str]) -> None:
    """Run `medkd check-data`."""
    add = parser.add_argument
    add("datalist", help="the datalist.json, or its folder")
    add("--bundle", metavar="FOLDER", help="bundle that is to be trained on the data (default: the current folder, "
        "if it has configs/train.json); \"\" for none")
    add("--config_file", metavar="FILE", action="append", default=[],
        help="config that changes the bundle's train.json, such as 2d.json; may be given several times")
    add("--set", metavar="KEY=VALUE", action="append", default=[],
        help='option of the training, such as "spacing=[2,2,2]"; may be given several times')
    add("--num_classes", type=literal, metavar="K",
        help="number of label values with the background (default: by `labels` in the file, else any)")
    add("--allow_shared", action="store_true",
        help="accept an image that is in two lists, for tests on a single case")
    add("--label_free", action="store_true",
        help="there is, or will be, a teacher: accept a list without labels")
    options = parser.parse(words)
    path = os.path.join(options.datalist, "datalist.json") if os.path.isdir(options.datalist) else options.datalist
    lists, names = load_lists(path)
    number = count_classes(names) if options.num_classes is None else options.num_classes
    if number is not None and (not isinstance(number, int) or number < 2):
        raise ValueError(f"--num_classes must be an integer of 2 or more, got {number!r}.")
    bundle = _bundle(options)
    if bundle:
        report = _check_for(bundle, path, lists, number, options)
    else:
        from medkd.data.check import check_data

        report = check_data(
            lists["training"], lists["validation"], number, lists["test"],
            allow_shared=options.allow_shared, unlabeled=lists["unlabeled"], needs_labels=not options.label_free,
        )
    print(report.table(names or {str(value): "" for value in range(number or 0)}))
    print(_verdict(report, bundle))
    if not bundle:
        print("Not checked, as there is no bundle (--bundle FOLDER): size on its grid, window of intensities, "
              "channels.")
    print(_next_command(path, bundle, number, options))


def _verdict(report: Any, bundle: str) -> str:
    """What can be done with the data."""
    name = f" to train {os.path.basename(os.path.abspath(bundle))}" if bundle else ""
    usable = f"The data can be used{name}."
    lone = sum(report.without_label.get(key, 0) for key in ("training", "unlabeled"))
    labeled = report.cases["training"] - report.without_label["training"]
    if labeled and lone:
        usable += f"\n{labeled} training case(s) teach by labels. With a teacher, {lone} image(s) without are added."
    elif lone:
        usable += (
            f"\nNo training case has a label: a student learns from a teacher alone, on {lone} image(s); its weights "
            "are needed (`teacher_path`)."
        )
    if report.without_label["validation"]:
        number = report.cases["validation"]
        usable += f"\nThe best model is chosen by agreement with the teacher on {number} validation image(s)."
    return usable


def _bundle(options: Namespace) -> str:
    """The folder of the bundle, empty for none."""
    from medkd.data.bundle_check import is_bundle

    bundle: str = options.bundle if options.bundle is not None else "." if is_bundle(".") else ""
    if bundle and options.bundle is None:
        logger.info("The current folder is a bundle: checked as its training does; --bundle \"\" for none.")
    lone = [name for name in ("config_file", "set") if getattr(options, name)]
    if lone and not bundle:
        raise ValueError(f"--{lone[0]} must come with a bundle, got none; name its folder by --bundle.")
    return bundle


def _check_for(
    bundle: str, path: str, lists: Mapping[str, Sequence[Any]], number: int | None, options: Namespace
) -> Any:
    from medkd.data.bundle_check import check_for_bundle

    settings = {key: _value(text) for key, text in _settings(options).items()}
    if options.allow_shared:
        settings["data_check#allow_shared"] = True
    if options.label_free:
        settings["data_check#needs_labels"] = False
    return check_for_bundle(bundle, path, lists, options.config_file, settings, number)


def _settings(options: Namespace) -> dict[str, str]:
    """Key -> value of each `--set`, as it was typed."""
    pairs = [word.partition("=") for word in options.set]
    broken = [key for key, equals, _ in pairs if not equals or not key]
    if broken:
        raise ValueError(f"--set must be KEY=VALUE, got {broken[0]!r}; such as spacing=[2,2,2].")
    return {key: text for key, _, text in pairs}


def _value(text: str) -> Any:
    """A value as the command line of a run has it: a literal of Python, or of JSON."""
    words = {"true": True, "false": False, "null": None}
    return words[text] if text in words else literal(text)


def _next_command(path: str, bundle: str, number: int | None, options: Namespace) -> str:
    """The training with all that was told of it."""
    configs, settings = options.config_file, _settings(options)
    full = os.path.abspath(path)
    is_usual = os.path.basename(full) == "datalist.json"
    place = f"--dataset_dir {shlex.quote(os.path.dirname(full))}" if is_usual else f"--datalist {shlex.quote(full)}"
    files = [f"configs/{os.path.basename(name).removesuffix('.json')}.json" for name in ("train", *configs)]
    config = "[" + ",".join(map(repr, files)) + "]" if configs else files[0]
    command = f"python -m monai.bundle run training --config_file {_quoted(config)} --bundle_root . {place}"
    told = "".join(f" --{shlex.quote(key)} {shlex.quote(value)}" for key, value in settings.items())
    classes = "" if "out_channels" in settings else _classes(bundle, number)
    where = "" if bundle == "." else f", in the folder of {bundle or 'a bundle'}"
    return f"Next{where}: {command}{told}{classes}"


def _quoted(config: str) -> str:
    return f'"{config}"' if config.startswith("[") else config


def _classes(bundle: str, number: int | None) -> str:
    """The option that a bundle of another number of classes needs."""
    if not bundle or number is None:
        return ""
    from monai.bundle.config_parser import ConfigParser

    config = ConfigParser.load_config_file(os.path.join(bundle, "configs", "train.json"))
    linked = config["data_check"].get("num_classes") == "@out_channels"
    return f" --out_channels {number}" if linked and config["out_channels"] != number else ""
