# SPDX-License-Identifier: Apache-2.0
"""Images that lists share or name twice, and cases of one list whose results would bear one name."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from medkd.data.naming import shorten, without_ending

__all__ = ["collisions", "is_path", "shared_files"]

logger = logging.getLogger(__name__)

Cases = Sequence[Mapping[str, Any]]


def is_path(value: object) -> bool:
    """Tell whether an item's value may name a file."""
    return isinstance(value, (str, os.PathLike)) and bool(str(value))


def shared_files(lists: Mapping[str, Cases], key: str) -> str | None:
    """Name the first two lists that have an image in common."""
    files = {
        name: {os.path.realpath(str(item[key])): str(item[key]) for item in items if is_path(item.get(key))}
        for name, items in lists.items()
    }
    for first, second in combinations(files, 2):
        both = sorted(files[first][path] for path in files[first].keys() & files[second].keys())
        if both:
            return (
                f"`{first}` and `{second}` must have no image in common, got {shorten(both)} in both; "
                "keep each in one list, or allow it for a test on a single case (--allow_shared)."
            )
    return None


def collisions(lists: Mapping[str, Cases], key: str) -> Iterator[str]:
    """Name cases of `test` with one name for two results; such cases of other lists are logged.

    Results bear the path of their image below the folder that all have in common, without its ending: files of one
    name in several folders are told apart, `x.png` and `x.tif` of one folder are not.
    """
    for name, items in lists.items():
        paths = [os.path.abspath(str(item[key])) for item in items if is_path(item.get(key))]
        twice = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
        by_stem: dict[str, set[str]] = defaultdict(set)
        by_name: dict[str, set[str]] = defaultdict(set)
        for path in paths:
            by_stem[without_ending(path)].add(path)
            by_name[os.path.basename(without_ending(path))].add(os.path.dirname(path))
        for files in (sorted(group) for group in by_stem.values() if len(group) > 1):
            text = f"`{name}` must have one name per case without its ending, got {shorten(files)}; rename one."
            yield from _tell(name, text)
        if twice:
            yield from _tell(name, f"`{name}` must have each image once, got {shorten(twice)} twice; leave one out.")
        several = [stem for stem, folders in by_name.items() if len(folders) > 1]
        if several:
            logger.info(
                "In `%s` %s is the name of files in %d folders; the results are told apart by the folders.",
                name, shorten(sorted(several)), len(by_name[several[0]]),
            )


def _tell(name: str, text: str) -> Iterator[str]:
    if name == "test":
        yield text
    else:
        logger.warning("%s", text)
