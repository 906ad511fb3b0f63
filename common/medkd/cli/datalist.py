# SPDX-License-Identifier: Apache-2.0
"""Write a datalist.json for a folder of images and labels of the same names; the folder stays as it is.

Names may differ by usual words: liver_07_0000.nii.gz of nnU-Net, or img07.png, goes with liver_07_seg.nii.gz, or
label07.png. What belongs nowhere is named. Who has a teacher needs no labels: --no_labels lists images for it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medkd.cli.lists import tell_written
from medkd.cli.parser import Parser, literal

__all__ = ["run"]


def run(parser: Parser, words: Sequence[str]) -> None:
    """Run `medkd datalist`."""
    add = parser.add_argument
    add("source", help="folder of the data")
    add("output", help="datalist.json to write, or the folder for it; outside of SOURCE")
    add("--splits", metavar="FILE", help="JSON file of case names by split, such as "
        '{"train": ["a.nii.gz"], "val": ["b"], "test": []}; without it splits are drawn at random by patient')
    add("--training", metavar="SPLIT", help="the training split in that file (default: training, train or tr)")
    add("--validation", metavar="SPLIT", help="the validation split (default: validation, val or valid)")
    add("--test", metavar="SPLIT", help="the test split (default: test, testing or ts)")
    add("--fractions", type=literal, metavar="A,B,C",
        help="shares of training, validation and test for random splits (default: 0.65,0.15,0.2; with --no_labels "
        "0.85,0.15,0); 0,0,1 lists cases that are only scored")
    add("--seed", type=literal, default=0, help="integer of 0 or more, for random splits")
    add("--patient", metavar="REGEX", help="one group of it is the patient, in file names without extension, such as "
        '"^(p[0-9]+)_"; without it each file is a patient of its own')
    add("--images", metavar="FOLDER", default="images", help="images in SOURCE")
    add("--labels", metavar="FOLDER", default="labels", help="labels in SOURCE")
    add("--more", metavar="FOLDERS", default="",
        help="further folders in SOURCE, by commas, with images and labels in folders of the same two names: all that "
        "have a label are trained with, whatever the splits say")
    add("--unlabeled", metavar="FOLDER",
        help="images in SOURCE; those in no split and without label become `unlabeled`")
    add("--no_labels", action="store_true",
        help="list images only, for a teacher: some become `validation`, all others `unlabeled`; with --fractions "
        "0,0,1 all become `test`, to be predicted")
    add("--few", type=literal, metavar="N", help="only the first N training cases keep their labels, the others become "
        "`unlabeled`: shows what labels are worth")
    add("--exclude", metavar="FILE",
        help='JSON list of names of images to leave out, such as ["a.nii.gz"]; a path from here or from SOURCE')
    add("--label_names", metavar="NAMES",
        help='of the label values from 0 on, such as "background,liver,spleen", or a JSON file of them')
    add("--label_components", action="store_true",
        help="the labels are masks: give each connected part a number of its own, in new files beside OUTPUT")
    add("--class_folders", action="store_true",
        help="IMAGES holds a folder per class, each image is of the class of its folder; --label_names gives their "
        "order. Random splits give each list its share of every class")
    options = parser.parse(words)
    if options.class_folders:
        _write_classes(parser, options)
        return
    if options.no_labels and (options.label_components or options.labels != parser.get_default("labels")):
        raise ValueError("--no_labels must come without --labels and --label_components, got both; leave one out.")
    from medkd.data.datalist import make_datalist

    path = make_datalist(
        options.source, options.output, _plan(options), options.images, None if options.no_labels else options.labels,
        options.unlabeled, options.label_names, options.patient, options.exclude, options.few,
        [folder for folder in options.more.split(",") if folder],
    )
    if options.label_components:
        from medkd.data.components import label_components

        print(f"Wrote labels of instances to {label_components(path)}.")
    tell_written(path)


def _write_classes(parser: Parser, options: Namespace) -> None:
    others = ("labels", "more", "unlabeled", "no_labels", "few", "label_components")
    given = [f"--{name}" for name in others if getattr(options, name) != parser.get_default(name)]
    if given:
        raise ValueError(
            f"--class_folders must come without {', '.join(given)}, as the folder is the label; leave one out."
        )
    from medkd.data.datalist import make_class_datalist

    if options.splits is None and options.patient is None:
        print("Note: each image counts as a patient of its own; --patient keeps those of one patient in one list.")
    tell_written(make_class_datalist(
        options.source, options.output, _plan(options), options.images, options.label_names, options.patient,
        options.exclude,
    ))


def _plan(options: Namespace) -> Any:
    """Splits of a file, or random ones."""
    from medkd.data.datalist import RandomSplits, SplitsFile

    named = {name: getattr(options, name) for name in ("training", "validation", "test")}
    if options.splits is not None:
        if options.fractions is not None or options.seed != 0:
            raise ValueError("--fractions and --seed must come without --splits, got both; leave one out.")
        return SplitsFile(options.splits, **named)
    file = Path(options.source, "splits.json")
    if file.is_file() and options.fractions is None:
        print(f"Note: the cases are drawn at random, and {file} is not used; --splits {file} takes it.")
    lone = [f"--{name}" for name, split in named.items() if split is not None]
    if lone:
        raise ValueError(f"{', '.join(lone)} must name a split of a file, got no --splits; add it.")
    shares = options.fractions
    if shares is None:
        return RandomSplits(test=0.0, seed=options.seed) if options.no_labels else RandomSplits(seed=options.seed)
    are_shares = isinstance(shares, (tuple, list)) and all(isinstance(s, (int, float)) and 0 <= s <= 1 for s in shares)
    if not are_shares or len(shares) != 3 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"--fractions must be three shares with the sum 1, for training, validation and test, got {shares!r}; "
            "such as 0.65,0.15,0.2."
        )
    return RandomSplits(shares[1], shares[2], options.seed)
