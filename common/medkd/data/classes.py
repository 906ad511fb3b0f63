# SPDX-License-Identifier: Apache-2.0
"""Labels of whole images: a class each, by number or name in a datalist, or as the folder that a picture lies in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medkd.checks import suggest
from medkd.data.left_out import log_left_out
from medkd.data.naming import quote, shorten
from medkd.data.pairs import Pairs, find_files
from medkd.data.splits import LISTS, RandomSplits, SplitsFile, patients, read_splits

__all__ = ["assign_classes", "class_problem", "class_set_problems", "find_class_folders", "has_classes", "is_class",
           "number_classes"]

Item = Mapping[str, Any]


def is_class(value: object) -> bool:
    """Tell whether the label of an item is the number of a class, and not the path of a map.

    Example:
        >>> is_class(0), is_class(True), is_class("labels/a.png")
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def number_classes(items: Sequence[Item], names: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Give the items of a list with the numbers of their classes in place of the names, if their labels are classes.

    They are where one item has a number, or a name of `labels`, as `label`; then all that have a label need a class.

    Args:
        items: with an `image` each.
        names: `labels` of the datalist: number -> name of the class, from 0 on.
        where: the list, for messages.

    Raises:
        ValueError: an item has a label that is no class, where others have one.
    """
    numbers = {name: int(number) for number, name in names.items() if str(number).isdecimal()}
    labels = [item.get("label") for item in items]
    if not any(is_class(label) or (isinstance(label, str) and label in numbers) for label in labels):
        return [dict(item) for item in items]
    for place, label in enumerate(labels):
        if label is not None and not is_class(label) and not (isinstance(label, str) and label in numbers):
            raise ValueError(
                f"{where}[{place}] must have a class as `label`, as others have, got {label!r}; "
                f"{suggest(str(label), numbers)}"
            )
    return [
        dict(item) if label is None or is_class(label) else {**item, "label": numbers[str(label)]}
        for item, label in zip(items, labels, strict=True)
    ]


def has_classes(lists: Mapping[str, Sequence[Item]], label_key: str) -> bool:
    """Tell whether labels are classes of whole images: a number among more files is a slip."""
    labels = [item[label_key] for items in lists.values() for item in items if label_key in item]
    return sum(map(is_class, labels)) >= max(1, len(labels) / 2)


def class_problem(label: int, image: object, num_classes: int | None) -> str | None:
    """Say why the class of an image cannot be, if so."""
    if label < 0 or (num_classes is not None and label >= num_classes):
        known = "of 0 or more" if num_classes is None else f"in 0..{num_classes - 1}"
        return f"{image} must have a class {known} as label, got {label}; correct it, or leave it out of the datalist."
    return None


def class_set_problems(
    lists: Mapping[str, Sequence[Item]], label_key: str, num_classes: int | None, needs_labels: bool
) -> Iterator[str]:
    """Tell which classes no training case has, and whether some labels are classes and others maps.

    Args:
        lists: cases by list.
        label_key: key of the label in an item.
        num_classes: number of classes; None takes those that occur.
        needs_labels: False where a teacher knows the classes.
    """
    if not has_classes(lists, label_key):
        return
    labels = {name: [item[label_key] for item in items if label_key in item] for name, items in lists.items()}
    every = [label for group in labels.values() for label in group]
    maps = [str(label) for label in every if not is_class(label)]
    if maps:
        yield f"Labels must be all classes or all files, got {len(maps)} files beside classes: {shorten(maps)}."
    found = {int(label) for label in every if is_class(label)}
    classes = set(range(num_classes)) if num_classes is not None else {one for one in found if one >= 0}
    absent = sorted(classes - set(labels["training"]))
    if absent and needs_labels and labels["training"]:
        yield (
            f"`training` must have a case of each class, got none of {', '.join(map(str, absent))}; move some there, "
            "or write the list anew with `medkd datalist --class_folders`, which draws by class."
        )


def find_class_folders(source: Path, images: str) -> tuple[Pairs, dict[str, str]]:
    """Find pictures in a folder per class.

    Args:
        source: folder of the data.
        images: folder below it that holds a folder for each class; folders in these are taken as parts of names.

    Returns:
        The images, named by class and file (`polyp/a`), and case -> name of its class.

    Raises:
        ValueError: images lie beside the folders, or there are fewer than two classes.
    """
    found = find_files(source, images, "images")
    lone = [path for case, path in found.items() if "/" not in case]
    classes = {case: case.split("/")[0] for case in found if "/" in case}
    if lone or len(set(classes.values())) < 2:
        got = f"{shorten(lone)} beside them" if lone else f"{quote(sorted(set(classes.values())))}"
        raise ValueError(
            f"`images` must hold a folder per class, two or more, got {got} in {source / images}; sort the images into "
            "folders, or name the folder that holds those of the classes (--images)."
        )
    return Pairs(found), classes


def assign_classes(
    pairs: Pairs, classes: Mapping[str, str], splits: SplitsFile | RandomSplits | None, patient: str | None
) -> dict[str, list[str]]:
    """Tell which case goes to which list: by a file, or drawn so that each list has its share of every class.

    Args:
        pairs: images.
        classes: case -> name of its class.
        splits: the file, or shares; None draws `RandomSplits()`.
        patient: regular expression with one group, the patient, searched in `class/name`; None takes each image as one.

    Raises:
        ValueError: a split names an unknown case, a patient is in two lists, or training gets no case.
    """
    owner = patients(list(classes), patient, "image")
    if isinstance(splits, SplitsFile):
        lists = read_splits(splits, pairs, owner)
        log_left_out(pairs, lists, pairs.images.keys() - classes.keys(), has_labels=False)
    else:
        lists = _drawn(splits or RandomSplits(), classes, owner)
    if not lists["training"]:
        raise ValueError(f"`splits` must leave at least one training case, got {len(pairs.images)} in others.")
    return lists


def _drawn(splits: RandomSplits, classes: Mapping[str, str], owner: Mapping[str, str]) -> dict[str, list[str]]:
    """Give patients, those with most images first, each to the list that lacks most of what they have."""
    shares = {"training": 1 - splits.validation - splits.test, **splits.shares()}
    if shares["training"] < -1e-9:
        raise ValueError(f"`training` must be a share of the patients, 0 to 1, got {shares['training']:g}.")
    held: dict[str, Counter[str]] = {}
    for case, name in classes.items():
        held.setdefault(owner[case], Counter())[name] += 1
    totals = Counter(classes.values())
    lacking = {name: {one: share * total for one, total in totals.items()} for name, share in shares.items()}
    order = sorted(held)
    np.random.default_rng(splits.seed).shuffle(order)
    groups: dict[str, set[str]] = {name: set() for name in LISTS}
    for one in sorted(order, key=lambda name: -held[name].total()):
        need = {name: sum(count * lack[kind] / totals[kind] for kind, count in held[one].items())
                for name, lack in lacking.items() if shares[name] > 1e-9}
        chosen = max(need, key=lambda name: need[name] / shares[name])
        groups[chosen].add(one)
        for kind, count in held[one].items():
            lacking[chosen][kind] -= count
    return {name: [case for case in classes if owner[case] in group] for name, group in groups.items()}
