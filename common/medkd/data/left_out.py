# SPDX-License-Identifier: Apache-2.0
"""Cases that a user takes out of a datalist, and a log line for all that get into none of its lists."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medkd.data.naming import quote, shorten, without_ending
from medkd.data.pairs import Pairs

__all__ = ["excluded_cases", "log_left_out"]

logger = logging.getLogger(__name__)


def excluded_cases(
    exclude: str | Path | Sequence[str] | None, source: Path, pairs: Pairs, extra: Mapping[str, str]
) -> set[str]:
    """Find the cases that are to be left out.

    Args:
        exclude: a JSON file with a list of names, from the working directory or `source`; or the names. A name is that
            of a case or of one of its files, with or without ending and folders; None leaves nothing out.
        source: folder of the data.
        pairs: images and labels.
        extra: case -> path of the image, of further cases.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no list of names, or none of them is a case.
    """
    names = [] if exclude is None else _names(exclude, source)
    if not names:
        return set()
    known: dict[str, set[str]] = {}
    for case, path in [*pairs.images.items(), *pairs.labels.items(), *extra.items()]:
        for name in (case, Path(case).name, without_ending(path)):
            known.setdefault(name, set()).add(case)
    for name, case in pairs.other_names.items():
        known.setdefault(name, {case})
    found = {name: known.get(Path(without_ending(name)).as_posix(), set()) for name in names}
    unknown = [name for name, cases in found.items() if not cases]
    if len(unknown) == len(found):
        raise ValueError(
            f"`exclude` must name images of {source}, got {quote(unknown)}, which it does not have; correct the names, "
            "or the folder of the images (--images, --unlabeled)."
        )
    if unknown:
        text = "%d of %d names to leave out are no images here: %s."
        logger.warning(text, len(unknown), len(found), shorten(unknown))
    cases = {case for named in found.values() for case in named}
    logger.info("%d images are left out, as `exclude` names them.", len(cases))
    return cases


def _names(exclude: str | Path | Sequence[str], source: Path) -> list[str]:
    names: Any = exclude
    if isinstance(exclude, (str, Path)):
        path = Path(exclude) if Path(exclude).is_file() else source / exclude
        if not path.is_file():
            raise FileNotFoundError(
                f"`exclude` must name a JSON file with a list of names, got {str(exclude)!r}, which is no file here "
                f"nor in {source}."
            )
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`exclude` must name a list of names in JSON, got {str(path)!r}: {error}.") from error
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"`exclude` must be a list of names, such as [\"a.nii.gz\"], got {json.dumps(names)[:80]}.")
    return list(names)


def log_left_out(pairs: Pairs, lists: Mapping[str, Sequence[str]], known: set[str], has_labels: bool) -> None:
    """Name all files that get into no list.

    Args:
        pairs: images and labels.
        lists: cases by list.
        known: cases that are in `unlabeled`, or left out by intent.
        has_labels: labels were looked for.
    """
    listed = {case for cases in lists.values() for case in cases} | known
    rest = [case for case in pairs.images if case not in listed]
    lone = [pairs.images[case] for case in rest if case not in pairs.labels]
    if lone and has_labels:
        logger.warning(
            "%d of %d images have no label of their name, and are left out: %s; rename the labels, or list such "
            "images by `unlabeled` (--unlabeled FOLDER).", len(lone), len(pairs.images), shorten(lone),
        )
    elif lone:
        text = "%d of %d images are in no split, and left out: %s."
        logger.warning(text, len(lone), len(pairs.images), shorten(lone))
    if pairs.lone_labels:
        number = len(pairs.labels) + len(pairs.lone_labels)
        logger.warning(
            "%d of %d labels have no image of their name, and are left out: %s; rename them.",
            len(pairs.lone_labels), number, shorten(pairs.lone_labels),
        )
    unused = [pairs.images[case] for case in rest if case in pairs.labels]
    if unused:
        logger.warning("%d labeled cases are in no split, and left out: %s.", len(unused), shorten(unused))
    if not lists["validation"] and (lists["training"] or not lists["test"]):
        logger.warning("No validation case: training needs one; name a split for it, or draw one by a share.")
