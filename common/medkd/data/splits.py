# SPDX-License-Identifier: Apache-2.0
"""Which case goes to which list: by a file of splits, or drawn at random by patient."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medkd.data.naming import quote
from medkd.data.pairs import Pairs

__all__ = ["LISTS", "RandomSplits", "SplitsFile", "draw_splits", "patients", "read_json", "read_splits"]

_Lists = dict[str, list[str]]   # list -> cases

LISTS = ("training", "validation", "test")
_SYNONYMS = {
    "training": ("training", "train", "tr"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing", "ts"),
}


@dataclass(frozen=True)
class SplitsFile:
    """Splits from a JSON file such as `{"train": ["a.nii.gz"], "val": ["b"], "test": []}`.

    Args:
        path: the file; case names with or without their extension.
        training: name of the split to take; None takes `training`, `train` or `tr`.
        validation: the same; None takes `validation`, `val` or `valid`, if there is one.
        test: the same; None takes `test`, `testing` or `ts`, if there is one.
    """

    path: str | Path
    training: str | None = None
    validation: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class RandomSplits:
    """Splits drawn by patient: all cases of a patient go to one list.

    Args:
        validation: share of the patients, 0 to 1.
        test: share of the patients, 0 to 1; training gets the rest. With 1 nothing is trained with.
        seed: non-negative integer; the same seed gives the same splits.
    """

    validation: float = 0.15
    test: float = 0.2
    seed: int = 0

    def shares(self) -> dict[str, float]:
        """Give the shares of validation and test.

        Raises:
            ValueError: one is no share.
        """
        shares = {"validation": self.validation, "test": self.test}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must be a share of the patients, 0 to 1, got {share}.")
        return shares


def read_json(path: Path, argument: str, kind: str, way_out: str) -> dict[str, Any]:
    """Read a JSON object; `kind` says in messages what it is, and `way_out` how to get one."""
    if not path.is_file():
        raise FileNotFoundError(
            f"`{argument}` must name {kind}, got {str(path)!r}, which is no file; {way_out}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must name {kind} in JSON, got {str(path)!r}: {error}; {way_out}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}; {way_out}.")
    return content


def patients(names: Sequence[str], pattern: str | None, what: str = "labeled case") -> dict[str, str]:
    """Map each case to its patient; `what` says in a message what the names are of."""
    if pattern is None:
        return {name: name for name in names}
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`patient` must be a regular expression, got {pattern!r}: {error}.") from error
    if regex.groups != 1:
        raise ValueError(f"`patient` must have one group, the patient, got {pattern!r} with {regex.groups}.")
    found = {name: match[1] for name in names if (match := regex.search(name)) and match[1] is not None}
    strange = [name for name in names if name not in found]
    if strange:
        raise ValueError(f"`patient` must match every {what}, got {pattern!r} for {quote(strange)}.")
    return found


def draw_splits(
    splits: RandomSplits, cases: Sequence[str], owner: Mapping[str, str], what: str = "labeled patients"
) -> _Lists:
    """Draw which cases go to which list; all cases of an owner go to one. `what` names the owners in a message."""
    shares = splits.shares()
    names = sorted({owner[case] for case in cases})
    np.random.default_rng(splits.seed).shuffle(names)
    wanted = [share * len(names) for share in shares.values()]
    first, second = (max(1, round(number)) if number else 0 for number in wanted)
    if first + second >= len(names):
        raise ValueError(
            f"`source` must have enough {what} for training, got {len(names)} with {first} for "
            f"validation and {second} for test; lower these shares."
        )
    drawn = names[first + second :], names[:first], names[first : first + second]
    groups = dict(zip(LISTS, map(set, drawn), strict=True))
    return {name: [case for case in cases if owner[case] in group] for name, group in groups.items()}


def read_splits(
    splits: SplitsFile, pairs: Pairs, owner: Mapping[str, str], needs_training: bool = True
) -> _Lists:
    """Read which cases go to which list; names are those of images or labels, with or without ending."""
    content = read_json(Path(splits.path), "splits", "a file of splits", "give lists of case names by split")
    lists: _Lists = {}
    for name in LISTS:
        is_needed = needs_training and name == "training"
        split = _pick_split(content, name, splits, is_needed)
        cases = content[split] if split else []
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise ValueError(
                f"{splits.path} must hold a list of names as {split!r}, got {json.dumps(cases)[:80]}."
            )
        found = {case: pairs.case(case) for case in cases}
        unknown = [case for case, known in found.items() if known is None]
        if unknown:
            raise ValueError(
                f"{splits.path} must name images that exist, got {quote(unknown)} in {split!r}."
            )
        lists[name] = [known for case in cases if (known := found[case]) is not None]
        repeated = [case for case, count in Counter(lists[name]).items() if count > 1]
        if repeated:
            raise ValueError(
                f"{splits.path} must name each case once, got {quote(repeated)} twice in {split!r}."
            )
    _refuse_overlap(lists, splits, owner)
    return lists


def _pick_split(content: Mapping[str, Any], name: str, splits: SplitsFile, is_needed: bool) -> str | None:
    wanted, path = getattr(splits, name), splits.path
    if wanted is not None:
        if wanted not in content:
            raise ValueError(
                f"`{name}` must be a split of {path}, got {wanted!r}; it has {quote(list(content))}."
            )
        return str(wanted)
    found = [split for split in content if split.lower() in _SYNONYMS[name]]
    if len(found) > 1 or (is_needed and not found):
        raise ValueError(
            f"{path} must have one split for {name}, such as {quote(_SYNONYMS[name])}, "
            f"got {quote(list(content))}; name it by `{name}` (--{name} NAME)."
        )
    return found[0] if found else None


def _refuse_overlap(lists: Mapping[str, Sequence[str]], splits: SplitsFile, owner: Mapping[str, str]) -> None:
    for first, second in (("training", "validation"), ("training", "test"), ("validation", "test")):
        if getattr(splits, first) is not None and getattr(splits, second) is not None:
            continue                                    # both were named by the caller
        owners = [{owner.get(case, case) for case in lists[name]} for name in (first, second)]
        both = sorted(owners[0] & owners[1])
        if both:
            raise ValueError(
                f"{splits.path} must keep {first} and {second} apart, got {quote(both)} in both; "
                f"correct it, or allow it by naming both splits (--{first} NAME --{second} NAME)."
            )
