# SPDX-License-Identifier: Apache-2.0
"""Compare two or more networks on the same cases: an HTML report of how good they are, where they err and look.

Networks that segment, into classes or instances, or that classify whole images: of these a table of what each case is
taken for, and maps of where each network sees evidence for each class.

A network is [NAME=]PATH[+CONFIG][+KEY=VALUE]: the folder of a bundle, a zip of `make pack`, or a file of weights in a
bundle, with the configs and settings it was trained with. In a bundle's folder, for example:

  medkd compare teacher=models/teacher/model.pt+teacher alone=runs/baseline/model.pt+baseline distilled=models/model.pt
      --data data --set out_channels=7 --set spacing=[4,4,3] --output report.html

A bundle and its configs are code: compare only what you would run.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medkd.cli.lists import load_lists
from medkd.cli.parser import Parser, literal

if TYPE_CHECKING:
    from medkd.compare.comparison import Compared

__all__ = ["run"]

logger = logging.getLogger(__name__)
_EXPONENT = 4.0


def run(parser: Parser, words: Sequence[str]) -> None:
    """Run `medkd compare`."""
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="two or more; see above")
    add("--data", metavar="PATH", help="a datalist.json, or its folder")
    add("--list", default="test", help="list of the datalist that is taken")
    add("--case", metavar="NAME", action="append", default=[],
        help="case of the list, a file's name without ending; may be given several times (default: all)")
    add("--image", metavar="FILE", help="an image, in place of --data")
    add("--label", metavar="FILE", help="the label of --image, if there is one; not for classifiers")
    add("--output", metavar="FILE", default="compare.html", help="the report")
    add("--set", metavar="KEY=VALUE", action="append", default=[],
        help='setting of all networks, such as "spacing=[2,2,2]", but for the scale of a teacher that sees all; may be '
        "given several times")
    add("--bundle", metavar="FOLDER", help="bundle of weights that lie in none (default: the current folder, if it is "
        "one)")
    add("--tap", metavar="PATHS", action="append", default=[],
        help="layer whose attention is shown, a path of the network's modules, or one for each network with commas "
        "between; may be given several times (default: encoder and decoder levels; of classifiers the last with maps)")
    add("--exponent", type=literal, default=_EXPONENT,
        help="p of the attention maps, the mean over channels of |x|^p; at least 1; not for classifiers")
    add("--window", type=literal, metavar="LEVEL,WIDTH",
        help="of the gray values, in the unit of the images (default: what the first network sees)")
    add("--slices", type=literal, metavar="N", default=3, help="slices that are shown of a case, at most")
    add("--pictures", type=literal, metavar="N", default=3,
        help="cases with pictures, the first ones; of classifiers those on which they differ or err; all have scores")
    options = parser.parse(words)
    _check(options)
    with tempfile.TemporaryDirectory(prefix="medkd_compare_") as folder:
        _compare(options, Path(folder), f"medkd compare {shlex.join(words)}")


def _check(options: Namespace) -> None:
    if (options.data is None) == (options.image is None):
        raise ValueError("`medkd compare` needs cases, got "
                         f"{'both' if options.data else 'neither'}; give --data DATALIST or --image FILE.")
    if options.label is not None and options.image is None:
        raise ValueError("--label must come with --image, got --data, whose list names the labels; leave it out.")
    for name, least in (("slices", 1), ("pictures", 0)):
        value = getattr(options, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"--{name} must be a whole number of {least} or more, got {value!r}.")
    if not isinstance(options.exponent, (int, float)) or not 1 <= options.exponent < math.inf:
        raise ValueError(f"--exponent must be a number of at least 1, got {options.exponent!r}.")
    window = options.window
    if window is not None and not (isinstance(window, (tuple, list)) and len(window) == 2
                                   and all(isinstance(one, (int, float)) for one in window) and window[1] > 0):
        raise ValueError(f"--window must be LEVEL,WIDTH with a width above 0, got {window!r}; such as 40,400.")
    output = Path(options.output)
    if output.is_dir():
        raise ValueError(f"--output must be a file, got the folder {output}; such as {output / 'compare.html'}.")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"--output must be in a folder that can be written, got {above}; name another one.")


def _refuse_for_classifiers(options: Namespace, name: str) -> None:
    """Raise where an option is for networks that segment; --slices is nothing to pictures, as there."""
    if options.label is not None:
        raise ValueError(
            f"--label must be left out, as `{name}` classifies whole images, whose label is no file, got "
            f"{options.label}; for scores give the class as `label` in a datalist, with --data."
        )
    if options.exponent != _EXPONENT:
        raise ValueError(
            f"--exponent must be left out, as maps of `{name}` are of classes and have no power, got "
            f"{options.exponent:g}."
        )


def _read_cases(options: Namespace) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Files of the cases, and names of the label values."""
    from medkd.data.datalist import load_datalist

    if options.image is not None:
        files = {"image": options.image} | ({"label": options.label} if options.label else {})
        return [{key: str(Path(file).absolute()) for key, file in files.items()}], {}
    path = Path(options.data, "datalist.json") if Path(options.data).is_dir() else Path(options.data)
    listed = load_datalist(path, options.list)
    items = [{key: one[key] for key in ("image", "label") if one.get(key) is not None} for one in listed]
    return items, {int(value): name for value, name in load_lists(path)[1].items()}


def _compare(options: Namespace, folder: Path, command: str) -> None:
    from medkd.cli.networks import read_network, read_settings
    from medkd.compare.cases import choose_cases
    from medkd.compare.classifiers.comparing import compare_classifiers
    from medkd.compare.classifiers.report import write_class_report
    from medkd.compare.comparing import compare
    from medkd.compare.networks import check_comparable
    from medkd.compare.report import write_report
    from medkd.data.bundle_check import is_bundle

    items, names = _read_cases(options)
    bundle = options.bundle or ("." if is_bundle(".") else None)
    settings = read_settings(options.set, "--set")
    networks = [read_network(word, folder / f"zip_{n}", bundle, settings) for n, word in enumerate(options.networks)]
    check_comparable(networks)
    taps, output, shown = [one.split(",") for one in options.tap], Path(options.output), options.pictures
    found: Compared[Any]
    if networks[0].kind == "whole images":
        _refuse_for_classifiers(options, networks[0].name)
        cases = choose_cases(items, options.case)
        found = compare_classifiers(networks, cases, taps, names, shown, logger.info)
        write_class_report(output, found, command, options.window, shown, _tell_drawing)
    else:
        cases = choose_cases(items, options.case)
        found = compare(networks, cases, folder, options.exponent, taps, names, shown, logger.info)
        write_report(output, found, command, options.exponent, options.window, options.slices, shown, _tell_drawing)
    _tell(found, output)


def _tell_drawing(case: str) -> None:
    logger.info("drawing %s", case)


def _tell(found: Compared[Any], output: Path) -> None:
    print(found.verdict())
    head, rows = found.summary()
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for cells in (head, *rows):
        first, *rest = (cell.ljust(width) if not n else cell.rjust(width)
                        for n, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        print("  ".join((first, *rest)))
    print(f"Report with pictures: {output}")
