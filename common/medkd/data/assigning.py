# SPDX-License-Identifier: Apache-2.0
"""Which case gets into which list of a datalist: those with labels, those that give theirs up, and mere images."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medkd.data.naming import quote, shorten
from medkd.data.pairs import Pairs
from medkd.data.splits import LISTS, RandomSplits, SplitsFile, draw_splits, patients, read_splits

__all__ = ["Assigned", "Plan", "assign_images", "assign_labeled"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How cases are assigned; see `make_datalist`.

    Attributes:
        splits: which case goes where; None draws.
        patient: regular expression of the patient in a name.
        left_out: cases that get into no list.
        labeled_cases: number of training cases that keep their labels; None is all.
        more: labeled cases that no split knows and that are trained with, behind the others.
    """

    splits: SplitsFile | RandomSplits | None = None
    patient: str | None = None
    left_out: set[str] = field(default_factory=set)
    labeled_cases: int | None = None
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Assigned:
    """Where cases get.

    Attributes:
        lists: cases of `training`, `validation` and `test`.
        unlabeled: case -> path of the image.
        left_out: cases that are in no list by intent, or were told of.
    """

    lists: dict[str, list[str]]
    unlabeled: dict[str, str]
    left_out: set[str]


def assign_labeled(pairs: Pairs, extra: Mapping[str, str], plan: Plan) -> Assigned:
    """Assign cases with labels; training cases without one, and the images of `extra` that are nowhere else, follow.

    A test share of 1 gives a list to score with.

    Args:
        pairs: images and labels.
        extra: case -> path of the image, of those that may become `unlabeled`.
        plan: how.

    Raises:
        ValueError: a case for scores has no label, no training case has one, or `labeled_cases` is out of range.
    """
    labeled = [case for case in pairs.images if case in pairs.labels and case not in plan.left_out]
    owner = patients(labeled, plan.patient)
    if isinstance(plan.splits, SplitsFile):
        lists = _without(read_splits(plan.splits, pairs, owner), plan.left_out)
    else:
        splits = plan.splits or RandomSplits()
        if splits.test == 1:
            return Assigned({"training": _keep([], plan.labeled_cases), "validation": [], "test": labeled}, {},
                            plan.left_out)
        drawn = [case for case in labeled if case not in plan.more]
        lists = draw_splits(splits, drawn, {case: owner[case] for case in drawn})
    lists["training"] = lists["training"] + _more_training(lists, owner, plan)
    if not lists["training"]:
        counts = ", ".join(f"{len(cases)} {name}" for name, cases in lists.items())
        raise ValueError(f"`splits` must leave at least one training case, got {counts}.")
    training = [case for case in lists["training"] if case in pairs.labels]
    _refuse_unlabeled(lists if not training else {name: lists[name] for name in LISTS[1:]}, pairs)
    lone = [case for case in lists["training"] if case not in pairs.labels]
    if lone:
        text = "%d of %d training cases have no label of their name, and become `unlabeled`: %s."
        logger.warning(text, len(lone), len(lists["training"]), shorten([pairs.images[case] for case in lone]))
    lists["training"] = _keep(training, plan.labeled_cases)
    moved = [*training[len(lists["training"]):], *lone]
    others = {case: path for case, path in extra.items() if case not in pairs.labels}
    return _assigned(lists, {case: pairs.images[case] for case in moved} | others, plan, owner)


def assign_images(pairs: Pairs, extra: Mapping[str, str], plan: Plan) -> Assigned:
    """Assign images without labels: some to `validation` and, to be predicted, to `test`, all others to `unlabeled`.

    Args:
        pairs: images.
        extra: case -> path of the image, of further ones for `unlabeled`.
        plan: how; without a training split in a file all images that are in none are for training. A test share of 1
            gives a list to predict with.

    Raises:
        ValueError: a number of labels is wanted, or no image is left to learn from.
    """
    if plan.labeled_cases is not None:
        raise ValueError(
            f"`labeled_cases` must come with labels, got {plan.labeled_cases!r} without; leave one out (--few, "
            "--no_labels)."
        )
    cases = [case for case in pairs.images if case not in plan.left_out]
    owner = patients(cases, plan.patient, "case")
    if isinstance(plan.splits, SplitsFile):
        lists = _without(read_splits(plan.splits, pairs, owner, needs_training=False), plan.left_out)
    else:
        splits = plan.splits or RandomSplits(test=0.0)
        if splits.test == 1:
            return Assigned({"training": [], "validation": [], "test": cases}, dict(extra), plan.left_out)
        lists = draw_splits(splits, cases, owner, "patients")
    scored = {case for name in LISTS[1:] for case in lists[name]}
    learned = lists["training"] or [case for case in cases if case not in scored]
    lists["training"] = []
    assigned = _assigned(lists, {case: pairs.images[case] for case in learned} | dict(extra), plan, owner)
    if not assigned.unlabeled:
        raise ValueError(
            f"`splits` must leave at least one image to learn from, got {len(lists['validation'])} validation and "
            f"{len(lists['test'])} test of {len(cases)}; take some out of these."
        )
    return assigned


def _more_training(lists: Mapping[str, Sequence[str]], owner: Mapping[str, str], plan: Plan) -> list[str]:
    """The cases of `more`, but for those of patients that scores are of."""
    listed = {case for cases in lists.values() for case in cases} | plan.left_out
    scored = {owner.get(case) for name in LISTS[1:] for case in lists[name]}      # one without a label is refused later
    cases = [case for case in plan.more if case not in listed]
    leaking = [case for case in cases if owner[case] in scored]
    if leaking:
        logger.warning(
            "%d further cases are of patients of validation or test, and left out: %s.", len(leaking), shorten(leaking),
        )
    return [case for case in cases if case not in leaking]


def _without(lists: Mapping[str, Sequence[str]], left_out: set[str]) -> dict[str, list[str]]:
    return {name: [case for case in cases if case not in left_out] for name, cases in lists.items()}


def _refuse_unlabeled(lists: Mapping[str, Sequence[str]], pairs: Pairs) -> None:
    for name, cases in lists.items():
        missing = [case for case in cases if case not in pairs.labels]
        if missing:
            raise ValueError(
                f"{name} must have a label for each image, got none for {quote(missing)}; add the labels, take the "
                "cases out of the split, or do without any labels (--no_labels)."
            )


def _keep(training: list[str], count: Any) -> list[str]:
    """The first cases, which keep their labels."""
    if count is None:
        return training
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(training):
        raise ValueError(
            f"`labeled_cases` must be how many of the {len(training)} training cases keep their labels, 0 to "
            f"{len(training)}, got {count!r} (--few)."
        )
    return training[:count]


def _assigned(
    lists: dict[str, list[str]], images: Mapping[str, str], plan: Plan, owner: Mapping[str, str]
) -> Assigned:
    """Take out of some images what is in a list or left out, and patients that scores are of."""
    used = {case for cases in lists.values() for case in cases} | plan.left_out
    scored = {owner.get(case, case) for name in LISTS[1:] for case in lists[name]}
    free = {case: path for case, path in images.items() if case not in used}
    leaking = [case for case in free if owner.get(case, _patient(case, plan.patient)) in scored]
    if leaking:
        logger.warning(
            "%d images without a label are of patients of validation or test, and left out: %s.", len(leaking),
            shorten([free[case] for case in leaking]),
        )
    unlabeled = {case: path for case, path in free.items() if case not in leaking}
    return Assigned(lists, unlabeled, plan.left_out | set(leaking))


def _patient(case: str, pattern: str | None) -> str:
    """Patient of a case whose name need not tell one."""
    match = re.search(pattern, case) if pattern else None
    return match[1] if match and match[1] is not None else case
