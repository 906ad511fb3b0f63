# SPDX-License-Identifier: Apache-2.0
"""What all sets of phantoms share: checks of their arguments, the plan of cases, the files and the datalist."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medkd.data.datalist import LISTS, write_datalist

__all__ = ["are_counts", "are_lengths", "check_counts", "check_seed", "is_whole", "write_set"]


def is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Tell whether a value is an integer from `least` to `most`; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= int(value) <= most


def are_counts(value: Any, axes: int, least: int, most: float = math.inf) -> bool:
    """Tell whether a value holds one integer from `least` to `most` per axis."""
    return _is_list(value, axes) and all(is_whole(count, least, most) for count in value)


def are_lengths(value: Any, axes: int, least: float = 0.0, most: float = math.inf) -> bool:
    """Tell whether a value holds one positive, finite number from `least` to `most` per axis."""
    return _is_list(value, axes) and all(
        isinstance(length, (int, float)) and 0 < length < math.inf and least <= length <= most for length in value
    )


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is an integer of 0 or more, or several of them."""
    if not all(is_whole(part, 0) for part in (seed if isinstance(seed, (tuple, list)) else [seed])):
        raise ValueError(f"`seed` must be an integer of 0 or more, or several of them, got {seed!r}.")


def check_counts(counts: Sequence[int]) -> None:
    """Raise unless `counts` are numbers of training, validation, test and unlabeled cases, at least one in all."""
    for name, count in zip((*LISTS, "unlabeled"), counts, strict=True):
        if not is_whole(count, 0):
            raise ValueError(f"`{name}` must be a number of cases, 0 or more, got {count!r}.")
    if not sum(counts):
        raise ValueError("`training` must be 1 or more, got 0 in all lists.")


def write_set(
    output_dir: str | Path, counts: Sequence[int], seed: int, draw: Callable[[tuple[int, int, int]], Any],
    title: str, labels: Mapping[str, str] | None = None, unit: str = "unknown",
) -> Path:
    """Write cases to `images/` and `labels/`, and the `datalist.json` of them, whose path it returns.

    The seeds of a case are `seed`, the number of its list and its place there: more cases in one list leave those of
    the others as they are.

    Args:
        output_dir: folder to fill.
        counts: number of training, validation, test and unlabeled cases; the last are written without their label.
        seed: non-negative integer.
        draw: gives the case of three seeds: `image`, `label` and, where they are NIfTI and not PNG, `affine`.
        title: shown with the progress.
        labels: names of the label values; None for instance numbers, which leaves `labels` empty.
        unit: of the affines, for the headers: mm, micron or unknown.

    Raises:
        ValueError: a count is negative, or there is no case at all.
    """
    check_counts(counts)
    lists: dict[str, list[dict[str, str]]] = {name: [] for name in (*LISTS, "unlabeled")}
    folder = Path(output_dir)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    plan = [(number, place) for number, count in enumerate(counts) for place in range(count)]
    for index, (number, place) in enumerate(tqdm(plan, desc=f"{title} phantoms", unit="case", delay=2)):
        case, name = draw((seed, number, place)), list(lists)[number]
        keys = ("image",) if name == "unlabeled" else ("image", "label")
        suffix = ".nii.gz" if hasattr(case, "affine") else ".png"
        lists[name].append({key: f"{key}s/case_{index:03d}{suffix}" for key in keys})
        for key, path in lists[name][-1].items():
            _save(getattr(case, key), getattr(case, "affine", None), folder / path, unit)
    return write_datalist(folder / "datalist.json", {**lists, "labels": dict(labels or {})})


def _save(values: NDArray[Any], affine: NDArray[np.float64] | None, path: Path, unit: str) -> None:
    if affine is None:
        Image.fromarray(values).save(path)
        return
    file: Any = nib.Nifti1Image(values, affine)   # type: ignore[no-untyped-call]
    file.header.set_xyzt_units(unit)
    nib.save(file, path)
