# SPDX-License-Identifier: Apache-2.0
"""Find the images and labels of a folder, and which belong together by their names."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medkd.data.naming import has_ending, is_label_name, plain, quote, shorten, split_channel, without_ending

__all__ = ["Pairs", "add_folders", "find_files", "find_images", "find_pairs"]

logger = logging.getLogger(__name__)


@dataclass
class Pairs:
    """Images and labels by case; a case has one name, that of its image without ending and number of a channel.

    Attributes:
        images: case -> path of the image, relative to the source.
        labels: case -> path of the label; each is a case of `images`, too.
        other_names: what a file of splits may call a case: names of its files -> case.
        lone_labels: paths of labels without an image.
        by_channel: names of images end in the number of a channel, as nnU-Net writes them.
    """

    images: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    other_names: dict[str, str] = field(default_factory=dict)
    lone_labels: list[str] = field(default_factory=list)
    by_channel: bool = False

    def case(self, name: str) -> str | None:
        """Case that a name stands for, with or without ending and folders."""
        full = Path(without_ending(name)).as_posix()
        for candidate in (full, Path(full).name):
            if candidate in self.images:
                return candidate
            if candidate in self.other_names:
                return self.other_names[candidate]
        return None


def find_files(source: Path, folder: str, argument: str, without: Sequence[str] = ()) -> dict[str, str]:
    """Map the case name to its path relative to `source`, for all visible files below a folder.

    Args:
        source: folder of the data.
        folder: below it.
        argument: name of the argument that gave the folder, for messages.
        without: folders below `source` that are left out, as they hold something else.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no volumes or pictures, or two of one name.
    """
    if not (source / folder).is_dir():
        there = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
        raise FileNotFoundError(
            f"`{argument}` must be a folder of {source}, got {folder!r}; it has {quote(there)}"
            + ("; give --images imagesTr --labels labelsTr" if {"imagesTr", "labelsTr"} <= set(there) else "")
            + ("; where there are no labels, give --no_labels." if argument == "labels" else ".")
        )
    found: dict[str, str] = {}
    strange: list[str] = []
    for path in _visible(source / folder, [source / other for other in without]):
        name = path.relative_to(source / folder).as_posix()
        if not has_ending(name):
            strange.append(name)
            continue
        case = without_ending(name)
        if case in found:
            raise ValueError(
                f"`{argument}` must hold one file per case, got {found[case]!r} and {name!r}; rename one."
            )
        found[case] = Path(folder, name).as_posix()
    if not found:
        raise ValueError(f"`{argument}` must hold volumes or images, got {source / folder}, which has none.")
    if strange:
        logger.info("%d files of %s are of another kind, and left out: %s.", len(strange), folder, shorten(strange))
    return found


def _visible(folder: Path, without: Sequence[Path]) -> list[Path]:
    """All files below a folder, where a folder with an ending, such as .zarr, is one."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not has_ending(path.name):
            found += [] if any(_same(path, other) for other in without) else _visible(path, without)
        else:
            found.append(path)
    return found


def _same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def find_pairs(source: Path, images: str, labels: str, unlabeled: str | None = None) -> Pairs:
    """Pair images and labels of one name, then those of one name but for words such as `_seg`, or nnU-Net's `_0000`.

    Args:
        source: folder of the data.
        images: folder of the images below it.
        labels: folder of the labels; may be that of the images, where labels have a word that marks them.
        unlabeled: folder of further images, which are not looked at here.

    Raises:
        ValueError: an image has several channels or labels, or nothing belongs together.
    """
    others = [folder for folder in (images, labels, unlabeled) if folder]
    found = find_files(source, images, "images", [other for other in others if other != images])
    if _same(source / images, source / labels):
        marks = {case: path for case, path in found.items() if is_label_name(case)}
        found = {case: path for case, path in found.items() if case not in marks}
    else:
        marks = find_files(source, labels, "labels", [other for other in others if other != labels])
    pairs = Pairs(found)
    same = found.keys() & marks.keys()
    pairs.labels = {case: path for case, path in marks.items() if case in same}
    left = {case: path for case, path in marks.items() if case not in same}
    left = _pair_by_words(pairs, left)
    left = _pair_by_channel(pairs, left)
    pairs.lone_labels = list(left.values())
    if not pairs.labels:
        raise ValueError(
            f"`labels` must have the names of `images`, got {quote(list(marks.values())[:3])} for "
            f"{quote(list(found.values())[:3])}; rename them, words such as _seg may differ."
        )
    _add_bare_names(pairs)
    return pairs


def add_folders(pairs: Pairs, source: Path, folders: Sequence[str], images: str, labels: str) -> list[str]:
    """Add the cases of further folders, each with images and labels of its own, and give those that have a label.

    Args:
        pairs: of the data; what is found is added.
        source: folder of the data.
        folders: below it.
        images: folder of the images in each of them.
        labels: folder of the labels in each of them.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: as `find_pairs`, or a case has the name of another one.
    """
    added = []
    for folder in folders:
        found = find_pairs(source, f"{folder}/{images}", f"{folder}/{labels}")
        known = sorted(found.labels.keys() & pairs.images.keys())
        if known:
            raise ValueError(
                f"`more` must hold cases of other names, got {quote(known)} in {folder!r}, too; rename them, or take "
                "the files away that are there twice."
            )
        for case, path in found.labels.items():
            pairs.images[case], pairs.labels[case] = found.images[case], path
            added.append(case)
        pairs.lone_labels += found.lone_labels
    _add_bare_names(pairs)
    return added


def find_images(source: Path, images: str, unlabeled: str | None = None) -> Pairs:
    """Find images that have no labels, or whose labels are not wanted.

    Args:
        source: folder of the data.
        images: folder of the images below it; labels that lie among them are left out.
        unlabeled: folder of further images, which are not looked at here.

    Raises:
        ValueError: there is none, or several images are channels of one case.
    """
    found = find_files(source, images, "images", [unlabeled] if unlabeled and unlabeled != images else [])
    owners = {plain(case, label=False) for case in found if not is_label_name(case)}
    marks = [case for case in found if _is_named_label(case) or (is_label_name(case) and plain(case, True) in owners)]
    if marks:
        named = shorten([found[case] for case in marks])
        logger.warning("%d files are labels by their names, and left out: %s.", len(marks), named)
    pairs = Pairs({case: path for case, path in found.items() if case not in marks})
    if not pairs.images:
        raise ValueError(f"`images` must hold images, got {source / images}, whose files are labels by their names.")
    channels: dict[str, dict[str, str]] = defaultdict(dict)
    for case in pairs.images:
        name, number = split_channel(case)
        channels[name][number] = case
    several = [numbers for numbers in channels.values() if {"0000", "0001"} <= numbers.keys()]
    if len(several) > 1:                                            # one alone may count cases
        files = [pairs.images[case] for case in several[0].values()]
        raise ValueError(
            f"`images` must have one channel per case, got {quote(files)}; move the others away, or merge the channels "
            "of a case into one file."
        )
    pairs.other_names = {name: numbers["0000"] for name, numbers in channels.items() if numbers.keys() == {"0000"}}
    _add_bare_names(pairs)
    return pairs


def _is_named_label(case: str) -> bool:
    """A file or a folder of the path has no other name than labels have."""
    return any(not plain(part, label=True) for part in Path(case).parts)


def _add_bare_names(pairs: Pairs) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for case in pairs.images:
        names[Path(case).name].append(case)
    pairs.other_names |= {name: cases[0] for name, cases in names.items() if len(cases) == 1}


def _pair_by_words(pairs: Pairs, labels: Mapping[str, str]) -> dict[str, str]:
    by_plain: dict[str, list[str]] = defaultdict(list)
    for case in pairs.images:
        if case not in pairs.labels:
            by_plain[plain(case, label=False)].append(case)
    wanted: dict[str, list[str]] = defaultdict(list)
    for case in labels:
        wanted[plain(case, label=True)].append(case)
    left = dict(labels)
    for name, cases in wanted.items():
        images = by_plain.get(name, [])
        if not images:
            continue
        if len(cases) > 1 or len(images) > 1:
            raise ValueError(
                f"`labels` must hold one label per image, got {quote([labels[case] for case in cases])} for "
                f"{quote([pairs.images[case] for case in images])}; move one of them away."
            )
        _join(pairs, images[0], cases[0], left.pop(cases[0]))
    return left


def _pair_by_channel(pairs: Pairs, labels: Mapping[str, str]) -> dict[str, str]:
    channels: dict[str, dict[str, str]] = defaultdict(dict)
    for case in pairs.images:
        name, number = split_channel(case)
        if number and case not in pairs.labels:
            channels[name][number] = case
    left = dict(labels)
    for case in labels:
        name = case if case in channels else plain(case, label=True)
        images = channels.get(name, {})
        if len(images) > 1:
            raise ValueError(
                f"`images` must have one channel per case, got {quote([pairs.images[one] for one in images.values()])};"
                " move the others away, or merge the channels of a case into one file."
            )
        if "0000" in images:
            old = images["0000"]
            pairs.images = {name if key == old else key: path for key, path in pairs.images.items()}
            pairs.other_names[old], pairs.by_channel = name, True
            _join(pairs, name, case, left.pop(case))
    return left


def _join(pairs: Pairs, case: str, label_case: str, label: str) -> None:
    pairs.labels[case] = label
    pairs.other_names[label_case] = case
