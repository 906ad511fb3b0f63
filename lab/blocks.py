# SPDX-License-Identifier: Apache-2.0
"""Blocks of one large volume as cases of their own: to validate on each in turn, or to leave some without a label."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from skimage.measure import label as connected

from medkd.data.datalist import write_datalist

__all__ = ["cut_blocks"]


def cut_blocks(datalist: Path, case: str, parts: Sequence[int], validation: Sequence[int] = ()) -> Path:
    """Put blocks in the place of a training case; they are written beside the list.

    An instance that a cut leaves in several pieces is as many instances there, as nobody could link them.

    Args:
        datalist: made by `make_datalist`; it is replaced.
        case: file name of the image, without extension.
        parts: number of blocks along each axis of the file; sizes differ by at most one voxel.
        validation: numbers of the blocks, counted from 0 with the last axis fastest, that become the validation cases
            instead of those of the list; the others are trained with.

    Raises:
        ValueError: no such case, another number of axes, more parts than voxels, or a block that does not exist.
    """
    content = json.loads(datalist.read_text())
    root = datalist.parent / content.get("data_root", "")
    names = [Path(one["image"]).name.split(".")[0] for one in content["training"]]
    if case not in names:
        raise ValueError(f"`case` of `blocks` must be a training case, one of {names}, got {case!r}.")
    place = names.index(case)
    whole = content["training"][place]
    count = int(np.prod(parts))
    if any(not 0 <= number < count for number in validation):
        raise ValueError(f"`validation` of `blocks` must be numbers below {count}, got {list(validation)}.")
    blocks: list[dict[str, str]] = [{} for _ in range(count)]
    for key in ("image", "label"):
        written = _write_blocks(root / whole[key], datalist.parent / "blocks", key, parts)
        for block, file in zip(blocks, written, strict=True):
            block[key] = os.path.relpath(file, root)
    kept = [block for number, block in enumerate(blocks) if number not in validation]
    content["training"][place : place + 1] = kept
    if validation:
        content["validation"] = [blocks[number] for number in validation]
    return write_datalist(datalist, content)


def _write_blocks(file: Path, folder: Path, key: str, parts: Sequence[int]) -> list[Path]:
    volume: Any = nibabel.load(file)
    voxels = np.asanyarray(volume.dataobj)
    if len(parts) != voxels.ndim or any(not 1 <= one <= size for one, size in zip(parts, voxels.shape, strict=True)):
        raise ValueError(f"`parts` of `blocks` must divide {voxels.shape} voxels of {file.name}, got {list(parts)}.")
    folder.mkdir(parents=True, exist_ok=True)
    edges = [np.linspace(0, size, one + 1).round().astype(int) for one, size in zip(parts, voxels.shape, strict=True)]
    written = []
    for number, index in enumerate(product(*map(range, parts))):
        start = [edge[one] for edge, one in zip(edges, index, strict=True)]
        box = tuple(slice(edge[one], edge[one + 1]) for edge, one in zip(edges, index, strict=True))
        written.append(folder / f"{file.name.split('.')[0]}_{number}_{key}.nii.gz")
        _save(written[-1], voxels[box] if key == "image" else _instances(voxels[box]), volume.affine, start)
    return written


def _instances(label: NDArray[Any]) -> NDArray[Any]:
    """Pieces that touch by faces, numbered afresh; 0 stays background, and what is negative stays ignored."""
    find: Any = connected                                          # untyped
    pieces = find(np.maximum(label.astype(np.int64), 0), connectivity=1)
    return np.where(label < 0, -1, pieces).astype(np.int32)


def _save(file: Path, voxels: NDArray[Any], affine: NDArray[Any], start: Sequence[int]) -> None:
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, float)
    draft = file.with_name(f".{os.getpid()}_{file.name}")          # another row may read the file at this moment
    volume: Any = nibabel.Nifti1Image                              # untyped
    nibabel.save(volume(voxels, moved), draft)
    draft.replace(file)
