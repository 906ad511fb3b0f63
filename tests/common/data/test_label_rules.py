# SPDX-License-Identifier: Apache-2.0
"""The check of lists in which cases have no label: with a teacher none is needed, without one some are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medkd.data.check import DataError, check_data

Item = dict[str, Any]
Make = Callable[[str], Item]


@pytest.fixture
def make(volume: Callable[..., Item]) -> Make:
    """Writer of a case of noise with a label."""

    def write(name: str, **new: Any) -> Item:
        rng = np.random.default_rng(sum(map(ord, name)))
        image = new.get("image", rng.integers(-100, 100, (8, 7, 6)).astype(np.int16))
        return volume(name, image, new.get("label", np.uint8(rng.random((8, 7, 6)) > 0.7)))

    return write


@pytest.fixture
def bare(make: Make) -> Make:
    """Writer of a case without a label."""
    return lambda name: {"image": make(name)["image"]}


def only(problem: str) -> str:
    return rf"1 problem\(s\):\n  {problem}$"


# a teacher teaches


def test_without_any_label_images_and_a_teacher_are_enough(make: Make, bare: Make) -> None:
    for training, extra in (([bare("a"), bare("b")], []), ([], [bare("a"), bare("b")]), ([bare("a")], [bare("b")])):
        report = check_data(training, [bare("c")], unlabeled=extra, num_classes=3, needs_labels=False)
        found = {**{"unlabeled": 0}, **report.without_label}
        assert found == {"training": len(training), "validation": 1, "test": 0, "unlabeled": len(extra)}
        assert report.voxels["training"] == {}


def test_labels_of_some_cases_are_still_checked_where_a_teacher_teaches(make: Make, bare: Make) -> None:
    check_data([make("a"), bare("b")], [make("c")], unlabeled=[bare("d")], needs_labels=False)
    with pytest.raises(DataError, match=only(r".*a_label.nii.gz must have values in 0..0, got 1; .*")):
        check_data([make("a"), bare("b")], [bare("c")], num_classes=1, needs_labels=False)
    empty = make("e", label=np.zeros((8, 7, 6), np.uint8))
    with pytest.raises(DataError, match="All 1 training labels must mark something"):
        check_data([empty, bare("b")], [bare("c")], needs_labels=False)


def test_no_image_to_learn_from_is_refused_without_asking_for_labels(bare: Make) -> None:
    message = "`training` or `unlabeled` must have at least one case, got none; name images there, no labels are .*"
    with pytest.raises(DataError, match=only(message)):
        check_data([], [bare("c")], needs_labels=False)


def test_no_validation_image_is_refused_without_asking_for_labels(bare: Make) -> None:
    message = "`validation` must have at least one case, got none; move some images there, no labels are needed."
    with pytest.raises(DataError, match=only(message)):
        check_data([], [], unlabeled=[bare("a")], needs_labels=False)


def test_validation_with_labels_in_some_cases_only_is_refused_by_their_names(make: Make, bare: Make) -> None:
    message = r"`validation` must have a label for each case or for none, got none for 1 of 2: .*d_image.nii.gz; add .*"
    with pytest.raises(DataError, match=only(message)):
        check_data([make("a")], [make("c"), bare("d")], needs_labels=False)


def test_images_of_the_list_without_labels_get_all_checks_of_images(make: Make) -> None:
    image = np.full((8, 7, 6), 5, np.int16)
    flat = {"image": make("flat", image=image)["image"]}
    gone = {"image": flat["image"].replace("flat", "gone")}
    with pytest.raises(DataError) as caught:
        check_data([make("a")], [make("b")], unlabeled=[flat, gone], channels=[2], needs_labels=False)
    for part in ("flat_image.nii.gz must show something, got 5 in all voxels", "flat_image.nii.gz must have 2 channel",
                 "gone_image.nii.gz is the image of unlabeled[1], but there is no such file"):
        assert part in str(caught.value)
    far = make("far", image=(np.arange(336).reshape(8, 7, 6) + 5000).astype(np.int16))
    with pytest.raises(DataError, match=only(r".*far_image.nii.gz must have its values in `intensity_range`.*")):
        check_data([make("a")], [make("b")], unlabeled=[{"image": far["image"]}], intensity_range=[-100, 100])


@pytest.mark.parametrize("needs_labels", [True, False])
@pytest.mark.parametrize("place", ["training", "validation", "test"])
def test_image_of_another_list_among_those_without_labels_is_refused(
    make: Make, bare: Make, place: str, needs_labels: bool
) -> None:
    lists = {"training": [make("a")], "validation": [make("b")], "test": [make("c")]}
    extra = [{"image": lists[place][0]["image"]}]
    with pytest.raises(DataError, match=rf"`{place}` and `unlabeled` must have no image in common, got .*keep each in"):
        check_data(**lists, unlabeled=extra, needs_labels=needs_labels)
    check_data(**lists, unlabeled=extra, needs_labels=needs_labels, allow_shared=True)


@pytest.mark.parametrize("needs_labels", [True, False])
def test_case_without_labels_that_has_one_is_refused_with_both_ways_out(
    make: Make, bare: Make, needs_labels: bool
) -> None:
    message = (r"`unlabeled` must have images without a label, got one for 1 of 2: .*e_image.nii.gz; list these cases "
               "as `training`, or take their `label` away.")
    with pytest.raises(DataError, match=only(message)):
        check_data([make("a")], [make("b")], unlabeled=[bare("d"), make("e")], needs_labels=needs_labels)


# labels teach


def test_some_training_cases_may_lack_their_label_and_are_told_of_once(
    make: Make, bare: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "medkd")
    report = check_data([make("a"), make("f"), bare("b"), bare("e")], [make("c")])
    assert report.without_label == {"training": 2, "validation": 0, "test": 0}
    row = next(line for line in report.table().splitlines() if line.startswith("without a label"))
    assert row.split()[-3:] == ["2", "0", "0"]
    assert lines(caplog) == ["2 of 4 training cases have no label: without a teacher they are left out."]


def test_table_of_cases_that_all_have_labels_counts_none_without(make: Make) -> None:
    assert "without a label" not in check_data([make("a")], [make("b")]).table()


@pytest.mark.parametrize("extra", [0, 2])
def test_no_label_at_all_asks_once_for_labels_or_a_teacher(bare: Make, extra: int) -> None:
    images = [bare(name) for name in "abcdef"]
    beside = " and 2 in `unlabeled`" if extra else ""
    message = rf"`training` must have a case with a label, got none of 2{beside}; add labels, or a teacher, which .*"
    with pytest.raises(DataError, match=only(message)):
        check_data(images[:2], images[2:4], unlabeled=images[4:4 + extra])


def test_validation_case_without_label_is_named_though_no_training_case_has_one(make: Make, bare: Make) -> None:
    with pytest.raises(DataError, match=r"2 problem\(s\):\n  `training` must have a case(?s:.*)validation\[1\] \("):
        check_data([bare("a")], [make("c"), bare("d")])


def test_empty_training_beside_images_without_labels_asks_for_a_teacher(make: Make, bare: Make) -> None:
    message = r"`training` must have a case with a label, got none of 0 and 1 in `unlabeled`; add labels, or a te.*"
    with pytest.raises(DataError, match=only(message)):
        check_data([], [make("c")], unlabeled=[bare("a")])


def test_labels_that_are_all_empty_are_refused_beside_cases_without(make: Make, bare: Make) -> None:
    with pytest.raises(DataError, match=only("All 1 training labels must mark something, got only 0 in each; .*")):
        check_data([make("a", label=np.zeros((8, 7, 6), np.uint8)), bare("b")], [make("c")])


# what is told


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_selection_by_the_teacher_is_told(bare: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medkd")
    check_data([bare("a"), bare("b")], [bare("c")], needs_labels=False)
    assert lines(caplog) == [
        "2 of 2 training cases have no label: they learn from the teacher alone.",
        "No validation case has a label: the model is selected by agreement with the teacher.",
    ]


@pytest.mark.parametrize(("needs_labels", "is_single"), [(True, True), (False, False)])
def test_cases_that_teach_are_counted_for_a_single_one(
    make: Make, bare: Make, caplog: pytest.LogCaptureFixture, needs_labels: bool, is_single: bool
) -> None:
    check_data([make("a"), bare("b")], [make("c")], unlabeled=[bare("d")], needs_labels=needs_labels)
    assert ("There is a single training case; the network will hardly generalize." in lines(caplog)) is is_single


def test_single_image_for_a_teacher_is_logged(bare: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "medkd")
    check_data([], [bare("c")], unlabeled=[bare("a")], needs_labels=False)
    assert lines(caplog) == ["There is a single training case; the network will hardly generalize."]
