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
from tqdm import tqdm

from medkd.data.datalist import write_datalist

__all__ = ["are_counts", "are_lengths", "check_seed", "is_whole", "save_nifti", "write_set"]

Save = Callable[[tuple[int, int, int], Mapping[str, Path]], None]


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


def write_set(
    output_dir: str | Path,
    counts: Mapping[str, int],
    seed: int,
    save: Save,
    suffix: str,
    labels: Mapping[str, str],
    title: str,
) -> Path:
    """Write cases to `images/` and `labels/`, and the `datalist.json` of them.

    The seeds of a case are `seed`, the number of its list and its place there: more cases in one list leave those of
    the others as they are.

    Args:
        output_dir: folder to fill.
        counts: number of cases by list; those of `unlabeled` are written without their label.
        seed: non-negative integer.
        save: draws the case of three seeds and writes it to the files given by key, `image` and perhaps `label`.
        suffix: of the files, such as ".png".
        labels: names of the label values; empty for instance numbers.
        title: shown with the progress.

    Returns:
        Path of `datalist.json`.

    Raises:
        ValueError: a count is negative, or there is no case at all.
    """
    for name, count in counts.items():
        if not is_whole(count, 0):
            raise ValueError(f"`{name}` must be a number of cases, 0 or more, got {count!r}.")
    if not sum(counts.values()):
        raise ValueError("`training` must be 1 or more, got 0 in all lists.")
    folder = Path(output_dir)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[dict[str, str]]] = {name: [] for name in counts}
    plan = [(name, place) for name, count in counts.items() for place in range(count)]
    for number, (name, place) in enumerate(tqdm(plan, desc=title, unit="case", delay=2)):
        file = f"case_{number:03d}{suffix}"
        item = {"image": f"images/{file}"} | ({"label": f"labels/{file}"} if name != "unlabeled" else {})
        save((seed, list(counts).index(name), place), {key: folder / path for key, path in item.items()})
        lists[name].append(item)
    return write_datalist(folder / "datalist.json", {**lists, "labels": dict(labels)})


def save_nifti(
    files: Mapping[str, Path], volumes: Mapping[str, NDArray[Any]], affine: NDArray[np.float64], unit: str = "unknown"
) -> None:
    """Write the volumes whose keys have a file. `unit` of the affine goes into the header: mm, micron or unknown."""
    for key, path in files.items():
        file: Any = nib.Nifti1Image(volumes[key], affine)   # type: ignore[no-untyped-call]
        file.header.set_xyzt_units(unit)
        nib.save(file, path)
