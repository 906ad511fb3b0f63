# SPDX-License-Identifier: Apache-2.0
"""Read all images and labels once, before any training, and tell all that is wrong with them in one error."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medkd.data.datalist import shorten

__all__ = ["DataError", "DataReport", "check_data"]

logger = logging.getLogger(__name__)

Case = Mapping[str, Any]

AFFINE_TOLERANCE = 0.02   # voxels; what rounding a header's spacing to four decimals costs over 512 voxels
_MOST_ROWS = 130          # label values with names in a table; more are instances, and only counted
_MOST_UNNAMED = 20        # the same where none has a name, as in a datalist of instances
_LABELED = {   # lists that need cases with a label, and how to get some
    "training": "name it in the datalist.",
    "validation": "move one there from training, or write the list anew: `medkd datalist` with "
                  "--fractions 0.7,0.15,0.15 or --validation SPLIT.",
}
_MOST = 20                # problems that an error spells out
_THREADS = 4              # each holds one volume


class DataError(ValueError):
    """The data cannot be trained on; the message lists what is wrong with which file, and the way out."""


@dataclass(frozen=True)
class DataReport:
    """What the data look like.

    Attributes:
        cases: number of cases by list.
        voxels: list -> label value -> voxels, over the labeled cases.
        spacing: smallest and largest spacing per axis, in units of the headers (mm for CT).
        shapes: smallest and largest voxel count per axis.
        intensity: smallest and largest value of all images.
        orientations: axis codes of volumes that occur, such as RAS.
    """

    cases: dict[str, int]
    voxels: dict[str, dict[int, int]]
    spacing: tuple[tuple[float, float], ...]
    shapes: tuple[tuple[int, int], ...]
    intensity: tuple[float, float]
    orientations: tuple[str, ...]

    def table(self, names: Mapping[str, str] | None = None) -> str:
        """Lay the report out as text; `names` maps label values to names, as `labels` in a datalist does.

        Where there are too many values to be classes, more than 130, or 20 without any name, they are only counted.
        """
        names = names or {}
        most = _MOST_ROWS if names else _MOST_UNNAMED
        values = sorted({value for counts in self.voxels.values() for value in counts})
        rows = [["", *self.cases], ["cases", *map(str, self.cases.values())]]
        if len(values) > most:
            rows.append(["label values", *(f"{len(counts):,}" for counts in self.voxels.values())])
        for value in values if len(values) <= most else []:
            title = f"voxels of {value} {names.get(str(value), '')}".rstrip()
            rows.append([title, *(f"{self.voxels[name].get(value, 0):,}" for name in self.cases)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        facts = {
            "voxels per axis": _ranges(self.shapes), "spacing": _ranges(self.spacing),
            "intensity": _ranges([self.intensity]), "orientation": ", ".join(self.orientations),
        }
        lines += [f"{name.ljust(widths[0])}  {text}".rstrip() for name, text in facts.items()]
        return "\n".join(lines)


@dataclass
class _Volume:
    """Facts of one file, kept when its voxels are gone."""

    path: str
    shape: tuple[int, ...]                    # spatial
    affine: NDArray[np.float64]               # (4, 4)
    low: float = 0.0
    high: float = 0.0
    counts: Counter[float] = field(default_factory=Counter)   # voxels by value, of a label; `any`: not only 0

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(float(mm) for mm in np.linalg.norm(self.affine[:3, :3], axis=0)[: len(self.shape)])

    @property
    def orientation(self) -> str:
        codes = nib.aff2axcodes(self.affine) if len(self.shape) > 2 else ()   # type: ignore[no-untyped-call]
        return "".join(code or "?" for code in codes)


@dataclass
class _Inspected:
    """One case: its problems, and its files as far as they could be read."""

    problems: list[str] = field(default_factory=list)
    image: _Volume | None = None
    label: _Volume | None = None


def check_data(   # noqa: PLR0913 - options of a config, each with a default
    training: Sequence[Case], validation: Sequence[Case], num_classes: int | None = None,
    test: Sequence[Case] = (), image_key: str = "image", label_key: str = "label", allow_shared: bool = False,
    unlabeled: Sequence[Case] = (), spatial_dims: int | None = None,
) -> DataReport:
    """Check that all files can be read and fit together; read each once, a volume per thread in memory.

    A label lies on its image when no corner of the volume is further off than 0.02 voxels. No error, but one
    log line each: labels that are empty in some cases, a single training case, mixed spacing or orientation.

    Args:
        training: items with the path of an image and of its label; other keys are ignored.
        validation: the same.
        num_classes: number of label values, background included; None does not bound them, as instances need it.
        test: the same; the label may be missing.
        image_key: key of the image in an item.
        label_key: key of the label in an item.
        allow_shared: only log that an image is in two lists; for tests on a single case.
        unlabeled: items of which only the image is read.
        spatial_dims: 2 for pictures and single slices, 3 for volumes; None takes both.

    Returns:
        Numbers of cases and voxels, and ranges of spacing, shape and intensity.

    Raises:
        DataError: anything is wrong; up to 20 problems are listed, the rest counted.
    """
    lists = {"training": training, "validation": validation, "test": test}
    problems = [
        f"`{name}` must have at least one case, got none; {way_out}"
        for name, way_out in _LABELED.items() if not lists[name]
    ]
    shared = _shared_files(lists, image_key)
    if unlabeled:
        lists["unlabeled"] = [{image_key: item.get(image_key)} for item in unlabeled]
    if shared and allow_shared:
        logger.warning("Allowed for a test, its scores mean nothing: %s", shared.partition(";")[0])
    elif shared:
        problems.append(shared)
    cases = _inspect_all(lists, [image_key, label_key], num_classes, spatial_dims)
    every = [case for group in cases.values() for case in group]
    problems += dict.fromkeys(problem for case in every for problem in case.problems)
    labels = [case.label for case in cases["training"] if case.label]
    if labels and len(labels) == len(training) and not any(any(label.counts) for label in labels):
        problems.append(
            f"All {len(labels)} training labels must mark something, got only 0 in each; "
            "check the folder of the labels and how they were exported."
        )
    if problems:
        rest = f"\n  and {len(problems) - _MOST} more." if len(problems) > _MOST else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:_MOST])
        raise DataError(f"The data cannot be used, {len(problems)} problem(s):{listed}{rest}")
    _log_oddities(cases)
    return _report(cases)


def _shared_files(lists: Mapping[str, Sequence[Case]], key: str) -> str | None:
    files = {
        name: {os.path.realpath(str(item[key])): str(item[key]) for item in items if _is_path(item.get(key))}
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


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(str(value))


def _inspect_all(
    lists: Mapping[str, Sequence[Case]], keys: list[str], num_classes: int | None, spatial_dims: int | None
) -> dict[str, list[_Inspected]]:
    """Inspect each pair of files once, even if several lists name it."""
    jobs: dict[tuple[str, bool], tuple[list[object], str, bool]] = {}
    wanted: dict[str, list[tuple[str, bool]]] = {name: [] for name in lists}
    for name, items in lists.items():
        for number, item in enumerate(items):
            files, labeled = [item.get(key) for key in keys], name in _LABELED
            wanted[name].append((repr(files), labeled))
            jobs.setdefault(wanted[name][-1], (files, f"{name}[{number}]", labeled))

    def run(job: tuple[list[object], str, bool]) -> _Inspected:
        return _inspect(*job, num_classes, spatial_dims)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        running = pool.map(run, jobs.values())
        done = list(tqdm(running, "checking data", len(jobs), unit="case", delay=2, leave=False))
    found = dict(zip(jobs, done, strict=True))
    return {name: [found[job] for job in group] for name, group in wanted.items()}


def _inspect(
    files: Sequence[object], where: str, labeled: bool, num_classes: int | None, spatial_dims: int | None
) -> _Inspected:
    case, image = _Inspected(), files[0]
    for key, value in zip(("image", "label"), files, strict=True):
        if value is None and key == "label" and not labeled:
            continue
        if not _is_path(value):
            name = f" ({image})" if key == "label" and _is_path(image) else ""
            case.problems.append(f"{where}{name} must have the path of its {key}, got {value!r}; add it.")
        elif not os.path.exists(str(value)):
            case.problems.append(f"{value} is the {key} of {where}, but there is no such file; correct it.")
        else:
            try:
                data, volume = _read(str(value))
            except Exception as error:   # a broken file makes readers raise anything
                why = (str(error) or type(error).__name__).splitlines()[0][:120]
                case.problems.append(f"{value} must be a readable {key}, got {why!r}; if cut, copy it again.")
                continue
            setattr(case, key, volume)
            case.problems += _rank_problems(volume, spatial_dims)
            if key == "image":
                case.problems += _image_problems(data, volume)
            else:
                case.problems += _label_problems(data, volume, num_classes)
    if case.image and case.label:
        case.problems += _misfits(case.image, case.label)
    return case


def _read(path: str) -> tuple[NDArray[Any], _Volume]:
    """Read voxels, with the spatial shape and the affine of the header."""
    if path.lower().endswith((".nii", ".nii.gz")):
        file: Any = nib.load(path)
        volume = _Volume(path, tuple(file.shape[:3]), np.asarray(file.affine, np.float64))
        return np.asanyarray(file.dataobj), volume
    # imported here: it takes seconds, and NIfTI does without
    from monai.data.utils import to_affine_nd
    from monai.transforms import LoadImage

    tensor: Any = LoadImage(image_only=True, ensure_channel_first=True)(path)
    affine = np.asarray(to_affine_nd(3, tensor.affine.numpy()))
    return tensor.numpy(), _Volume(path, tuple(tensor.shape[1:]), affine)


def _rank_problems(volume: _Volume, spatial_dims: int | None) -> Iterator[str]:
    if spatial_dims not in (None, len(volume.shape)):
        way_out = f"take the config for {'volumes' if spatial_dims == 2 else 'slices, 2d.json'}"
        if volume.shape[2:] == (1,):
            way_out = "save it without the axis of one voxel"
        yield f"{volume.path} must have {spatial_dims} spatial axes, got {volume.shape}; {way_out}."


def _image_problems(data: NDArray[Any], volume: _Volume) -> Iterator[str]:
    volume.low, volume.high = float(data.min()), float(data.max())
    if not np.isfinite([volume.low, volume.high]).all():
        count = int(data.size - np.isfinite(data).sum())
        yield f"{volume.path} must have finite values, got {count:,} NaN or infinite voxels; replace them."
    elif volume.low == volume.high:
        yield f"{volume.path} must show something, got {volume.low:g} in all voxels; export it again."


def _label_problems(data: NDArray[Any], volume: _Volume, num_classes: int | None) -> Iterator[str]:
    channels = data.size // max(1, math.prod(volume.shape))
    if channels > 1:
        yield (
            f"{volume.path} must have one channel of class numbers, got {channels}; "
            "save a label in color as gray, with the number of the class as value."
        )
        return
    for slab in np.array_split(data, max(1, data.size // 2**24), axis=-1):   # np.unique sorts a copy
        values, counts = np.unique(slab, return_counts=True)
        volume.counts.update(dict(zip(map(float, values), map(int, counts), strict=True)))
    found = sorted(volume.counts)
    broken = [f"{value:g}" for value in found if value != np.rint(value)]   # also NaN
    top = np.inf if num_classes is None else num_classes - 1
    outside = [f"{value:g}" for value in found if not 0 <= value <= top]
    if broken:
        yield (
            f"{volume.path} must have whole numbers, got {shorten(broken)}; "
            "it may have been resampled: use nearest-neighbor interpolation for labels."
        )
    elif outside:
        expected = "values of 0 or more" if num_classes is None else f"values in 0..{num_classes - 1}"
        yield (
            f"{volume.path} must have {expected}, got {shorten(outside)}; "
            "map these values, or set `num_classes` to the number of classes with the background."
        )


def _misfits(image: _Volume, label: _Volume) -> Iterator[str]:
    path = label.path
    if image.shape != label.shape:
        yield f"{path} must have the shape of its image, {image.shape}, got {label.shape}; resample the label."
        return
    axes = len(image.shape)
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in image.shape])).reshape(axes, -1)
    corners = np.vstack([ends, np.zeros((3 - axes, ends.shape[1])), np.ones(ends.shape[1])])   # (4, 2^axes)
    most = float(np.linalg.norm(((image.affine - label.affine) @ corners)[:3], axis=0).max())
    if most <= AFFINE_TOLERANCE * min(image.spacing):
        return
    if not np.allclose(image.spacing, label.spacing, rtol=1e-3):
        yield (
            f"{path} must have the spacing of its image, {_numbers(image.spacing)}, "
            f"got {_numbers(label.spacing)}; resample the label."
        )
    else:
        yield (
            f"{path} must have the affine of its image, to {AFFINE_TOLERANCE:g} voxels, got one that is up to "
            f"{most:.3g} mm off; copy the image's header if the voxels match, else resample the label."
        )


def _log_oddities(cases: Mapping[str, Sequence[_Inspected]]) -> None:
    labels = {case.label.path: case.label for group in cases.values() for case in group if case.label}
    empty = [path for path, label in labels.items() if not any(label.counts)]
    if empty:
        message = "%d of %d labels are empty, and used as they are: %s."
        logger.warning(message, len(empty), len(labels), shorten(empty))
    if len(cases["training"]) == 1:
        logger.warning("There is a single training case; the network will hardly generalize.")
    images = [case.image for group in cases.values() for case in group if case.image]
    steps = np.array([image.spacing for image in images if len(image.shape) == len(images[0].shape)])
    if not np.allclose(steps, steps[0], rtol=0.01):
        logger.info("Spacing differs by case, %s; the transforms resample all to one.", _ranges(_span(steps)))
    codes = sorted({image.orientation for image in images} - {""})
    if len(codes) > 1:
        logger.info("Orientation differs by case, %s; the transforms turn all to one.", ", ".join(codes))


def _report(cases: Mapping[str, Sequence[_Inspected]]) -> DataReport:
    voxels: dict[str, Counter[int]] = {name: Counter() for name in cases}
    for name, group in cases.items():
        for label in (case.label for case in group if case.label):
            voxels[name].update({int(value): count for value, count in label.counts.items()})
    images = [case.image for group in cases.values() for case in group if case.image]
    rank = min(len(image.shape) for image in images)
    return DataReport(
        cases={name: len(group) for name, group in cases.items()},
        voxels={name: dict(sorted(counts.items())) for name, counts in voxels.items()},
        spacing=_span([image.spacing[:rank] for image in images]),
        shapes=tuple((int(a), int(b)) for a, b in _span([image.shape[:rank] for image in images])),
        intensity=(min(image.low for image in images), max(image.high for image in images)),
        orientations=tuple(sorted({image.orientation for image in images} - {""})),
    )


def _span(rows: Any) -> tuple[tuple[float, float], ...]:
    values = np.asarray(rows, dtype=np.float64)   # (cases, axes)
    return tuple((float(a), float(b)) for a, b in zip(values.min(0), values.max(0), strict=True))


def _ranges(pairs: Iterable[tuple[float, float]]) -> str:
    shown = [f"{a:.4g}" if f"{a:.4g}" == f"{b:.4g}" else f"{a:.4g} to {b:.4g}" for a, b in pairs]
    return " x ".join(shown)


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.5g}" for value in values) + ")"
