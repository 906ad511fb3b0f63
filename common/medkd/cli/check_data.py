# SPDX-License-Identifier: Apache-2.0
"""Read all files of a datalist, tell everything that is wrong, and show what the data look like."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from medkd.cli.lists import count_classes, load_lists
from medkd.cli.parser import Parser, literal

__all__ = ["run"]


def run(parser: Parser, words: Sequence[str]) -> None:
    """Run `medkd check-data`."""
    parser.add_argument("datalist", help="the datalist.json, or its folder")
    parser.add_argument("--num_classes", type=literal, metavar="K",
                        help="number of label values with the background (default: by `labels` in the file, else any)")
    parser.add_argument("--allow_shared", action="store_true",
                        help="accept an image that is in two lists, for tests on a single case")
    options = parser.parse(words)
    from medkd.data.check import check_data

    path = os.path.join(options.datalist, "datalist.json") if os.path.isdir(options.datalist) else options.datalist
    lists, names = load_lists(path)
    number = count_classes(names) if options.num_classes is None else options.num_classes
    if number is not None and (not isinstance(number, int) or number < 2):
        raise ValueError(f"--num_classes must be an integer of 2 or more, got {number!r}.")
    report = check_data(
        lists["training"], lists["validation"], number, lists["test"],
        allow_shared=options.allow_shared, unlabeled=lists["unlabeled"],
    )
    print(report.table(names or {str(value): "" for value in range(number or 0)}))
    print("The data can be used.")
    folder = shlex.quote(os.path.dirname(os.path.abspath(path)))
    command = "python -m monai.bundle run training --config_file configs/train.json --bundle_root ."
    print(f"Next, in the folder of a bundle: {command} --dataset_dir {folder}")
