# SPDX-License-Identifier: Apache-2.0
"""What is strange about data that can be used: one log line each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from medkd.data.grid import MOST_FACTOR, odd_spacing
from medkd.data.headers import PICTURES, ending
from medkd.data.labels import masks_line
from medkd.data.naming import shorten
from medkd.data.report import numbers, ranges, span
from medkd.data.volumes import Case, Volume

__all__ = ["log_oddities"]

logger = logging.getLogger(__name__)

_MOST_INSTANCES = 65_535   # that a PNG of 16 bit holds
_EXPECTED_UNITS = ("", "mm", "millimeter", "nm", "nanometer", "pixel", "pixels", "inch")
_EIGHT_BIT = (250, 255)    # where the largest value of an image lies that was scaled to 8 bit


def log_oddities(
    cases: Mapping[str, Sequence[Case]], num_classes: int | None, window: Sequence[float] | None, is_blind: bool,
    needs_labels: bool = True,
) -> None:
    """Log what is strange.

    Args:
        cases: inspected cases by list.
        num_classes: number of label values, if that is bounded.
        window: values that the network sees as 0 and 1, if these are fixed.
        is_blind: nobody said how a network reads the files and what it expects of them.
        needs_labels: there is no teacher, so cases without a label teach nothing.
    """
    every = [case for group in cases.values() for case in group]
    images = list({case.image.path: case.image for case in every if case.image}.values())
    labels = list({case.label.path: case.label for case in every if case.label}.values())
    for line in (*_label_lines(cases, labels, num_classes), *_header_lines([*images, *labels])):
        logger.warning("%s", line)
    for line in (*_window_lines(images, window), *(_blind_lines(images) if is_blind else ())):
        logger.warning("%s", line)
    _log_missing_labels(cases, needs_labels)
    steps = np.array([image.spacing for image in images if len(image.shape) == len(images[0].shape)])
    if not np.allclose(steps, steps[0], rtol=0.01):
        logger.info("Spacing differs by case, %s; the transforms resample all to one.", ranges(span(steps)))
    codes = sorted({image.orientation for image in images} - {""})
    if len(codes) > 1:
        logger.info("Orientation differs by case, %s; the transforms turn all to one.", ", ".join(codes))
    modes = sorted({image.header.mode for image in images} - {""})
    if modes:
        named = shorten([image.path for image in images if image.header.mode])
        logger.info("Pictures with %s are read as what they show: %s.", ", ".join(modes), named)


def _log_missing_labels(cases: Mapping[str, Sequence[Case]], needs_labels: bool) -> None:
    lone = {name: sum(not case.is_labeled for case in cases[name]) for name in ("training", "validation", "test")}
    if lone["training"] and needs_labels:
        text = "%d of %d training cases have no label: without a teacher they are left out."
        logger.warning(text, lone["training"], len(cases["training"]))
    elif lone["training"]:
        text = "%d of %d training cases have no label: they learn from the teacher alone."
        logger.info(text, lone["training"], len(cases["training"]))
    if lone["validation"]:
        logger.info("No validation case has a label: the model is selected by agreement with the teacher.")
    if lone["test"]:
        text = "%d of %d test cases have no label: they can be predicted, not evaluated."
        logger.info(text, lone["test"], len(cases["test"]))
    extra = 0 if needs_labels else len(cases.get("unlabeled", ()))
    if len(cases["training"]) + extra - (lone["training"] if needs_labels else 0) == 1:
        logger.warning("There is a single training case; the network will hardly generalize.")


def _label_lines(
    cases: Mapping[str, Sequence[Case]], labels: Sequence[Volume], num_classes: int | None
) -> Iterator[str]:
    empty = [label.path for label in labels if not label.marks]
    if empty:
        yield f"{len(empty)} of {len(labels)} labels are empty, and used as they are: {shorten(empty)}."
    if num_classes is not None:
        for name in ("training", "validation"):
            found = {value for case in cases[name] if case.label for value in case.label.counts}
            absent = [str(value) for value in range(1, num_classes) if value not in found]
            if absent and len(absent) < num_classes - 1:
                yield f"No {name} label has a voxel of the class(es) {shorten(absent, 20)}."
        return
    masks = masks_line(labels)
    if masks:
        yield masks
    many = [label.path for label in labels if len(label.counts) > _MOST_INSTANCES and ending(label.path) in PICTURES]
    if many:
        yield (
            f"{len(many)} labels have more than {_MOST_INSTANCES:,} instances; a prediction with as many does not go "
            f"into a PNG, and is written as TIFF: {shorten(many)}."
        )
    white = [label.path for label in labels if label.header.mode == "white as 0"]
    if white:
        yield f"{len(white)} labels store white as 0; look whether their background is 0: {shorten(white)}."


def _header_lines(volumes: Sequence[Volume]) -> Iterator[str]:
    two = [volume.path for volume in volumes if volume.header.two_affines]
    if two:
        yield (
            f"{len(two)} files have a qform and an sform that differ; all steps use the one that the reader takes: "
            f"{shorten(two)}."
        )


def _window_lines(images: Sequence[Volume], window: Sequence[float] | None) -> Iterator[str]:
    if window is None or window[0] >= 0:
        return
    eight = [image.path for image in images if image.low >= 0 and _EIGHT_BIT[0] <= image.high <= _EIGHT_BIT[1]]
    if eight:
        yield (
            f"{len(eight)} of {len(images)} images look like 8 bit, windowed before, and not like the values of "
            f"`intensity_range`, {window[0]:g} to {window[1]:g}; set it to 0 to 255 for them: {shorten(eight)}."
        )


def _blind_lines(images: Sequence[Volume]) -> Iterator[str]:
    """What looks wrong though nobody said what is right."""
    volumes = [image for image in images if len(image.shape) == 3]
    units = {image.header.unit for image in volumes} - set(_EXPECTED_UNITS)
    if units:
        named = shorten([image.path for image in volumes if image.header.unit in units])
        yield f"The spacing is declared in {' and '.join(sorted(units))}; a bundle reads it in its own units: {named}."
    odd = [text for text in map(odd_spacing, images) if text]
    if odd:
        yield f"{len(odd)} spacings are hardly in mm, nor in nm; look at the headers: {shorten(odd)}."
    steps = np.array([image.spacing for image in volumes])
    if len(volumes) > 1 and (np.sort(steps, 1).max(0) > MOST_FACTOR * np.sort(steps, 1).min(0)).any():
        sizes = [float(np.prod(image.spacing)) for image in volumes]
        ends = (volumes[int(np.argmin(sizes))], volumes[int(np.argmax(sizes))])
        against = " against ".join(f"{numbers(end.spacing)} in {end.path}" for end in ends)
        yield f"Spacing differs by more than {MOST_FACTOR:g} times between cases, as if in two units: {against}."
    scaled = [image.path for image in images if image.low >= 0 and image.high <= 1]
    if scaled:
        yield (
            f"{len(scaled)} of {len(images)} images have values in 0..1: they were scaled, and a bundle with a fixed "
            f"window, as for CT, sees one gray: {shorten(scaled)}."
        )
