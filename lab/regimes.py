# SPDX-License-Identifier: Apache-2.0
"""Label regimes: what of a data set a training may see, from all labels to none, as lists made of one whole list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ALL_LABELS", "Regime", "describe_regime", "make_regime", "regime_list", "supervised_list"]

Labels = int | Literal["all"]


@dataclass(frozen=True)
class Regime:
    """How many labeled cases there are, and whether there are further images.

    Args:
        labels: number of labeled training cases, the first ones of the list, or `all`. With 0 there are no labels for
            validation either, and none of the teacher's training images.
        unlabeled: whether the images of the list `unlabeled` are there.
    """

    labels: Labels = "all"
    unlabeled: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.labels, int) and not isinstance(self.labels, bool) and self.labels >= 0
        if not whole and self.labels != "all":
            raise ValueError(f"`labels` of a regime must be 0, a number of cases or 'all', got {self.labels!r}.")
        if not isinstance(self.unlabeled, bool):
            raise ValueError(f"`unlabeled` of a regime must be true or false, got {self.unlabeled!r}.")
        if self.labels == 0 and not self.unlabeled:
            raise ValueError("`unlabeled` of a regime must be true where `labels` is 0, got false: nothing is left.")

    @property
    def name(self) -> str:
        """`all`, `few` or `none`."""
        return {"all": "all", 0: "none"}.get(self.labels, "few")


ALL_LABELS = Regime()


def make_regime(content: Mapping[str, Any] | Regime) -> Regime:
    """Make a regime of what a recipe says."""
    if isinstance(content, Regime):
        return content
    if content.keys() - {"labels", "unlabeled"}:
        raise ValueError(f"`regime` must have the keys 'labels' and 'unlabeled', got {sorted(content)}.")
    return Regime(**content)


def regime_list(content: Mapping[str, Any], labels: Labels = "all", unlabeled: bool = False) -> dict[str, Any]:
    """Give the datalist of a regime, made of one in which all training and validation cases have their labels.

    The first cases keep their labels, so that a smaller number is a subset of a larger one; the other training images
    become `unlabeled`, and the further ones join them. Without labels the training images are gone, too: they are the
    teacher's, and who was given a teacher has none of them. The test cases stay as they are.

    Args:
        content: of a `datalist.json`.
        labels: see `Regime`.
        unlabeled: see `Regime`.

    Raises:
        ValueError: there are fewer labeled cases, or no further images where there are no labels.

    Example:
        >>> whole = {"training": [{"image": "a", "label": "b"}, {"image": "c", "label": "d"}],
        ...          "validation": [{"image": "v", "label": "w"}], "unlabeled": [{"image": "u"}]}
        >>> regime_list(whole, 1, True)["unlabeled"]
        [{'image': 'c'}, {'image': 'u'}]
        >>> regime_list(whole, 0, True)
        {'training': [], 'validation': [{'image': 'v'}], 'unlabeled': [{'image': 'u'}]}
    """
    training = content["training"]
    extra = list(content.get("unlabeled", ())) if unlabeled else []
    if labels == "all":
        return _with_lists(content, unlabeled=extra)
    if labels == 0:
        if not extra:
            raise ValueError(
                "`unlabeled` of the datalist must have images where a regime has no labels, got none; name their "
                "folder by `datalist: {\"unlabeled\": FOLDER}` of the row."
            )
        validation = [_without_label(case) for case in content["validation"]]
        return _with_lists(content, training=[], validation=validation, unlabeled=extra)
    labeled = [case for case in training if case.get("label")][:labels]
    if len(labeled) < labels:
        raise ValueError(f"`labels` of a regime must be at most {len(labeled)}, the labeled cases, got {labels}.")
    rest = [_without_label(case) for case in training if case not in labeled]
    return _with_lists(content, training=labeled, unlabeled=[*rest, *extra])


def supervised_list(content: Mapping[str, Any], labels: Labels = "all") -> dict[str, Any]:
    """Give the datalist of a network that learns from labels alone; where a regime has none, it has all of them."""
    return _with_lists(regime_list(content, labels or "all"), unlabeled=[])


def describe_regime(content: Mapping[str, Any], regime: Regime, teachers: Regime | None = None) -> dict[str, Any]:
    """What the results tell of a regime: its name, and how many cases the distilled student and the one alone have.

    `labels_of_teacher` is there where the row gives its teacher a regime of its own.
    """
    seen = regime_list(content, regime.labels, regime.unlabeled)
    alone = supervised_list(content, regime.labels)
    told = {
        "name": regime.name, "labels": _labeled(seen),
        "unlabeled": len(seen.get("unlabeled", ())) + len(seen["training"]) - _labeled(seen),
        "labels_of_student_alone": _labeled(alone),
    }
    own = {} if teachers is None else {"labels_of_teacher": _labeled(supervised_list(content, teachers.labels))}
    return told | own


def _labeled(content: Mapping[str, Any]) -> int:
    return len([case for case in content["training"] if case.get("label")])


def _with_lists(content: Mapping[str, Any], **lists: list[Any]) -> dict[str, Any]:
    """The content with other lists; an empty one that was not there does not appear."""
    return {**content, **{name: cases for name, cases in lists.items() if cases or name in content}}


def _without_label(case: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if key != "label"}
