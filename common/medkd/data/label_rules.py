# SPDX-License-Identifier: Apache-2.0
"""Which cases need a label: those of a training that learns from labels, and of one that has only a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medkd.data.naming import shorten

__all__ = ["demanded_labels", "label_list_problems", "labeled_problem"]

Items = Sequence[Mapping[str, Any]]
Lists = Mapping[str, Items]

_NO_VALIDATION = (
    "move one there from training, or write the list anew: `medkd datalist` with --fractions 0.7,0.15,0.15 or "
    "--validation SPLIT."
)
_TEACHER = (
    "a teacher, which needs none: its weights at `teacher_path`, and weights of distillation above 0 "
    "(medkd check-data --label_free for a teacher that is to come)."
)


def labeled_problem(items: Items, where: str, image_key: str = "image", label_key: str = "label") -> str | None:
    """Say which items of a list without labels have one.

    Args:
        items: the list.
        where: its name in the message.
        image_key: key of the image in an item.
        label_key: key of the label in an item.
    """
    found = [str(item.get(image_key)) for item in items if item.get(label_key) is not None]
    if not found:
        return None
    return (
        f"{where} must have images without a label, got one for {len(found)} of {len(items)}: {shorten(found)}; "
        "list these cases as `training`, or take their `label` away."
    )


def label_list_problems(lists: Lists, image_key: str, label_key: str, needs_labels: bool) -> Iterator[str]:
    """Tell what is wrong with the lists as such: no case where one is needed, no label, labels in some cases only.

    Nothing is where all cases are in the list `test`: they are scored, and nothing is trained.

    Args:
        lists: `training` and `validation`, and perhaps `unlabeled` and `test`.
        image_key: key of the image in an item.
        label_key: key of the label in an item.
        needs_labels: nobody but labels teaches; False where there is a teacher.
    """
    training, validation, extra = lists["training"], lists["validation"], lists.get("unlabeled", ())
    if lists.get("test") and not (training or validation or extra):
        return
    yield from _without_labels(training, extra, label_key) if needs_labels else _without_cases(training, extra)
    if not validation:
        way_out = _NO_VALIDATION if needs_labels else "move some images there, no labels are needed."
        yield f"`validation` must have at least one case, got none; {way_out}"
    lone = [str(item.get(image_key)) for item in validation if label_key not in item]
    if not needs_labels and 0 < len(lone) < len(validation):
        yield (
            f"`validation` must have a label for each case or for none, got none for {len(lone)} of "
            f"{len(validation)}: {shorten(lone)}; add them, or take these cases or the labels of the others away."
        )
    problem = labeled_problem(extra, "`unlabeled`", image_key, label_key)
    if problem:
        yield problem


def _without_labels(training: Items, extra: Items, label_key: str) -> Iterator[str]:
    if not training and not extra:
        yield f"`training` must have a case with a label, got no case; name one in the datalist, or add {_TEACHER}"
    elif not any(label_key in item for item in training):
        beside = f" and {len(extra)} in `unlabeled`" if extra else ""
        found = f"got none of {len(training)}{beside}"
        yield f"`training` must have a case with a label, {found}; add labels, or {_TEACHER}"


def _without_cases(training: Items, extra: Items) -> Iterator[str]:
    if not training and not extra:
        yield (
            "`training` or `unlabeled` must have at least one case, got none; name images there, no labels are needed."
        )


def demanded_labels(name: str, lists: Lists, label_key: str, needs_labels: bool) -> list[bool]:
    """Tell of each item of a list whether it is wrong without the file of a label.

    Items that name a label need its file; those of `validation` need one where scores are by labels. If no case has
    a label at all, `label_list_problems` says so once.
    """
    scored = needs_labels and any(label_key in item for key in ("training", "validation") for item in lists[key])
    if name not in ("training", "validation"):
        return [False for _ in lists[name]]
    return [label_key in item or (scored and name == "validation") for item in lists[name]]
