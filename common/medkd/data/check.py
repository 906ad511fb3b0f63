# SPDX-License-Identifier: Apache-2.0
"""Read all images and labels once, before any training, and tell all that is wrong with them in one error."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

from medkd.data.classes import class_problem, class_set_problems, has_classes, is_class
from medkd.data.grid import Turning, grid_problems, turned
from medkd.data.headers import HDF5, NIFTI, PICTURES, Header, ending, read_header
from medkd.data.images import image_problems
from medkd.data.label_rules import demanded_labels, label_list_problems
from medkd.data.labels import label_problems, stored_numbers
from medkd.data.oddities import log_oddities
from medkd.data.overlaps import collisions, is_path, shared_files
from medkd.data.reasons import unreadable
from medkd.data.report import DataReport, numbers, report
from medkd.data.volumes import Case, Loading, Volume, default_loading, largest_shift, volume_of

__all__ = ["AFFINE_TOLERANCE", "DataError", "DataReport", "check_data"]

logger = logging.getLogger(__name__)

Item = Mapping[str, Any]

AFFINE_TOLERANCE = 0.02   # voxels; what rounding a header's spacing to four decimals costs over 512 voxels
_MOST = 20                # problems that an error spells out
_THREADS = 4              # each holds one volume
# what is read in threads; other kinds are for ITK, which loads its parts on demand and is not safe while it does
_THREADED = (*NIFTI, ".npy", ".npz", ".png", ".jpg", ".jpeg", ".bmp", *HDF5, ".zarr", "")


class DataError(ValueError):
    """The data cannot be trained on; the message lists what is wrong with which file, and the way out."""


@dataclass(frozen=True)
class _Wanted:
    """What files have to be; see `check_data`."""

    num_classes: int | None
    spatial_dims: int | None
    loading: Loading
    spacing: Sequence[float] | None
    intensity_range: Sequence[float] | None
    patch_size: Sequence[int] | None
    channels: Sequence[int] | None
    orientation: Turning | None
    allow_ignored: bool
    needs_labels: bool
    by_case: bool


def check_data(   # noqa: PLR0913 - options of a config, each with a default
    training: Sequence[Item], validation: Sequence[Item], num_classes: int | None = None,
    test: Sequence[Item] = (), image_key: str = "image", label_key: str = "label", allow_shared: bool = False,
    unlabeled: Sequence[Item] = (), spatial_dims: int | None = None, loading: Loading | None = None,
    spacing: Sequence[float] | None = None, intensity_range: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None, channels: Sequence[int] | None = None,
    orientation: Turning | None = None, allow_ignored: bool | None = None, needs_labels: bool = True,
) -> DataReport:
    """Check that all files can be read and fit together; read each once, a volume per thread in memory.

    Files are read by the step that training reads them with, so what passes here is not refused there. A label lies on
    its image when no corner of the volume is further off than 0.02 voxels. No error, but one log line each: labels
    that are empty in some cases, a single training case, mixed spacing or orientation, classes that no case shows,
    masks in place of instances.

    Args:
        training: items with the path of an image and of its label, or the number of its class; other keys are ignored.
            The key of the label may lack where other cases have one.
        validation: the same, each with a label.
        num_classes: number of label values, background included, or of classes of whole images; None does not bound
            them, as instances need it.
        test: the same; the label may be missing. It is checked alone where all other lists are empty.
        image_key: key of the image in an item.
        label_key: key of the label in an item.
        allow_shared: only log that an image is in two lists; for tests on a single case.
        unlabeled: items without a label, for a teacher.
        spatial_dims: 2 for pictures and single slices, 3 for volumes; None takes both.
        loading: takes {"image": path, "label": path}, or the image alone, and gives tensors (C, *S) with an affine in
            the units of `spacing`; None takes MONAI's reader.
        spacing: spacing of the network after `orientation`; a resampling by more than 8 along an axis, to less than
            a patch by more than 4, or beyond the free memory is refused. Values up to 0 leave an axis as it is.
        intensity_range: values that the network sees as 0 and 1; images that show next to nothing in it are refused.
        patch_size: voxels that the network sees at once, for `spacing`.
        channels: numbers of channels that are taken, after `loading`; None takes any.
        orientation: step that turns volumes before they are resampled to `spacing`.
        allow_ignored: take -1 in labels for voxels to ignore; None does where `num_classes` is None.
        needs_labels: False where a teacher teaches: `training` may be without any label, and empty if `unlabeled` is
            not; of `validation` all or none have labels.

    Returns:
        Numbers of cases and voxels, and ranges of spacing, shape and intensity.

    Raises:
        DataError: anything is wrong; up to 20 problems are listed, the rest counted.
    """
    lists = {"training": training, "validation": validation, "test": test}
    lists |= {"unlabeled": unlabeled} if unlabeled else {}
    wanted = _Wanted(
        num_classes, spatial_dims, loading or default_loading(), spacing, intensity_range, patch_size, channels,
        orientation, num_classes is None if allow_ignored is None else allow_ignored, needs_labels,
        has_classes(lists, label_key),
    )
    problems = [*label_list_problems(lists, image_key, label_key, needs_labels),
                *class_set_problems(lists, label_key, num_classes, needs_labels),
                *_shared(lists, image_key, allow_shared), *collisions(lists, image_key)]
    cases = _inspect_all(lists, [image_key, label_key], wanted)
    every = [case for group in cases.values() for case in group]
    problems += dict.fromkeys(problem for case in every for problem in case.problems)
    labeled = {name: sum(label_key in item for item in lists[name]) for name in ("training", "validation")}
    problems += [text for name, number in labeled.items() for text in _empty(name, cases[name], number)]
    if problems:
        rest = f"\n  and {len(problems) - _MOST} more." if len(problems) > _MOST else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:_MOST])
        raise DataError(f"The data cannot be used, {len(problems)} problem(s):{listed}{rest}")
    log_oddities(cases, num_classes, intensity_range, is_blind=loading is None, needs_labels=needs_labels)
    return report(cases)


def _shared(lists: Mapping[str, Sequence[Item]], key: str, allow_shared: bool) -> Iterator[str]:
    shared = shared_files(lists, key)
    if shared and allow_shared:
        logger.warning("Allowed for a test, its scores mean nothing: %s", shared.partition(";")[0])
    elif shared:
        yield shared


def _empty(name: str, cases: Sequence[Case], number: int) -> Iterator[str]:
    labels = [case.label for case in cases if case.label and not case.problems]
    if labels and len(labels) == number and not any(label.marks for label in labels):
        yield (
            f"All {len(labels)} {name} labels must mark something, got only 0 in each; "
            "check the folder of the labels and how they were exported."
        )


def _inspect_all(lists: Mapping[str, Sequence[Item]], keys: list[str], wanted: _Wanted) -> dict[str, list[Case]]:
    """Inspect each pair of files once, even if several lists name it."""
    jobs: dict[tuple[str, bool], tuple[list[object], str, bool]] = {}
    asked: dict[str, list[tuple[str, bool]]] = {name: [] for name in lists}
    for name, items in lists.items():
        demanded = demanded_labels(name, lists, keys[1], wanted.needs_labels)
        for number, (item, labeled) in enumerate(zip(items, demanded, strict=True)):
            files = [item.get(keys[0]), None if name == "unlabeled" else item.get(keys[1])]
            asked[name].append((repr(files), labeled))
            jobs.setdefault(asked[name][-1], (files, f"{name}[{number}]", labeled))

    alone = Lock()

    def run(job: tuple[list[object], str, bool]) -> Case:
        with nullcontext() if all(ending(str(file)) in _THREADED for file in job[0]) else alone:
            return _inspect(*job, wanted)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        running = pool.map(run, jobs.values())
        done = list(tqdm(running, "checking data", len(jobs), unit="case", delay=2, leave=False))
    found = dict(zip(jobs, done, strict=True))
    return {name: [found[job] for job in group] for name, group in asked.items()}


def _inspect(files: Sequence[object], where: str, labeled: bool, wanted: _Wanted) -> Case:
    case, headers = Case(), {}
    for key, value in zip(("image", "label"), files, strict=True):
        if value is None and key == "label" and not labeled:
            continue
        if key == "label" and wanted.by_case and is_class(value):
            case.category = int(str(value))
            problem = class_problem(case.category, files[0], wanted.num_classes)
            case.problems += [problem] if problem else []
            continue
        if not is_path(value):
            name = f" ({files[0]})" if key == "label" and is_path(files[0]) else ""
            case.problems.append(f"{where}{name} must have the path of its {key}, got {value!r}; add it.")
        elif not os.path.exists(str(value)):
            case.problems.append(f"{value} is the {key} of {where}, but there is no such file; correct it.")
        else:
            header = _header(case, str(value), key)
            if header is not None:
                headers[key] = (str(value), header)
    loaded = _load(case, {key: path for key, (path, _) in headers.items()}, wanted.loading)
    for key in [key for key in headers if key in loaded]:
        _look(case, (key, *headers[key]), loaded, wanted)
    if case.image and case.label:
        flat = all(ending(volume.path) in PICTURES and len(volume.shape) == 2 for volume in (case.image, case.label))
        # a picture has no affine of its own: what readers make up differs by format, and matters to turning alone
        case.problems += _misfits(case.image, case.label, compare_affines=not flat or wanted.orientation is not None)
    return case


def _header(case: Case, path: str, key: str) -> Header | None:
    """Facts of a header; None where the file cannot be used, and the case has the problem."""
    try:
        header = read_header(path)
    except Exception as error:   # a broken file makes readers raise anything
        if path.lower().endswith(NIFTI):
            case.problems.append(unreadable(path, key, error))
            return None
        header = Header()        # another reader may know it, and tells what is wrong
    if key == "image":
        return header
    stored, broken = stored_numbers(path, header.stored)
    if broken:
        case.problems.append(broken)
    return None if broken else replace(header, stored=stored)


def _load(case: Case, paths: Mapping[str, str], loading: Loading) -> Mapping[Any, Any]:
    """Read the files of a case; where that fails, one after the other, to tell which is to blame."""
    if "image" not in paths:
        return _load_apart(case, paths, loading)
    try:
        return loading(dict(paths))
    except Exception as error:   # a broken file makes readers raise anything
        loaded = _load_apart(case, paths, loading)
        if loaded.keys() == paths.keys():
            key = list(paths)[-1]
            case.problems.append(unreadable(paths[key], key, error))
        return loaded


def _load_apart(case: Case, paths: Mapping[str, str], loading: Loading) -> dict[Any, Any]:
    loaded = {}
    for key, path in paths.items():
        try:
            loaded[key] = loading({"image": path, key: path})[key]
        except Exception as error:   # see above
            case.problems.append(unreadable(path, key, error))
    return loaded


def _look(case: Case, file: tuple[str, str, Header], loaded: Mapping[Any, Any], wanted: _Wanted) -> None:
    """Keep the facts of a file that was read, and its problems."""
    key, path, header = file
    data, volume = volume_of(path, loaded[key], header)
    if not data.size:
        case.problems.append(f"{path} must hold voxels, got the shape {tuple(data.shape)}; export it again.")
        return
    setattr(case, key, volume)
    rank = list(_rank_problems(volume, wanted.spatial_dims))
    case.problems += rank
    if key == "label":
        case.problems += label_problems(data, volume, wanted.num_classes, wanted.allow_ignored)
        return
    case.problems += image_problems(data, volume, wanted.intensity_range, wanted.channels)
    if wanted.spacing is not None and not rank:
        order = turned(volume, loaded, wanted.orientation)
        case.problems += grid_problems(volume, wanted.spacing, wanted.patch_size, order)


def _rank_problems(volume: Volume, spatial_dims: int | None) -> Iterator[str]:
    is_flat = len(volume.file_shape) < (spatial_dims or 0)         # a picture, which inference takes for one section
    if is_flat or spatial_dims not in (None, len(volume.shape)):
        way_out = "give volumes, or a config for slices" if spatial_dims == 3 else "save its sections as pictures"
        if volume.header.pages > 1 and spatial_dims == 2:
            way_out = f"save its {volume.header.pages} pages as files of their own"
        elif volume.shape[2:] == (1,) and not is_flat:
            way_out = "save it without the axis of one voxel"
        shape = volume.file_shape if is_flat else volume.shape
        yield f"{volume.path} must have {spatial_dims} spatial axes, got {shape}; {way_out}."


def _misfits(image: Volume, label: Volume, compare_affines: bool) -> Iterator[str]:
    path = label.path
    if image.shape != label.shape:
        yield f"{path} must have the shape of its image, {image.shape}, got {label.shape}; resample the label."
        return
    if not compare_affines:
        return
    if ending(image.path) != ending(label.path) and {ending(image.path), ending(label.path)} <= set(PICTURES):
        copy = "save both as PNG, or both as TIFF"
    else:
        copy = "copy the image's header if the voxels match, else resample the label"
    most = largest_shift(image.affine, label.affine, image.shape)
    if most <= AFFINE_TOLERANCE * min(image.spacing):
        return
    if not np.allclose(image.spacing, label.spacing, rtol=1e-3):
        yield (
            f"{path} must have the spacing of its image, {numbers(image.spacing)}, "
            f"got {numbers(label.spacing)}; resample the label."
        )
    else:
        yield (
            f"{path} must have the affine of its image, to {AFFINE_TOLERANCE:g} voxels, got one that is up to "
            f"{most:.3g} mm off; {copy}."
        )
