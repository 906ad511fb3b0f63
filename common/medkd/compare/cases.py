# SPDX-License-Identifier: Apache-2.0
"""The cases that networks are compared on: which, and what their files hold, read one case at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import to_affine_nd
from numpy.typing import NDArray

from medkd.checks import suggest
from medkd.compare.frames import Frame, frame_of
from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of
from medkd.data.check import AFFINE_TOLERANCE
from medkd.data.classes import class_problem, is_class
from medkd.data.volumes import largest_shift
from medkd.inference.cases import told_cause
from medkd.inference.picture_files import PICTURES
from medkd.outputs import plain_tensor

__all__ = ["Case", "Files", "check_labels", "choose_cases", "read_case"]

Array = NDArray[Any]
Files = Mapping[str, Any]      # `image`, a path, and `label` if there is one: a path, or the number of a class


@dataclass(frozen=True)
class Case:
    """A case on the grid of its files."""

    name: str
    image: Array               # (*S), or (*S, 3) of colors in [0, 1]
    label: Array | None        # (*S), whole numbers; negative is ignored
    frame: Frame


def choose_cases(items: Sequence[Files], names: Sequence[str] = ()) -> dict[str, Files]:
    """Name cases by their files, and keep those that are asked for.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: there is no case, or none of a name.

    Example:
        >>> choose_cases([])   # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: There must be a case that all networks can be run on, got none; name a list of the datalist ...
    """
    if not items:
        raise ValueError(
            "There must be a case that all networks can be run on, got none; name a list of the datalist that has "
            "some (--list), or an image (--image)."
        )
    missing = [path for item in items for path in item.values() if not is_class(path) and not os.path.exists(path)]
    if missing:
        raise FileNotFoundError(f"Cases must have files that exist, got {missing[0]}, which does not.")
    found = dict(zip(_names([item["image"] for item in items]), items, strict=True))
    for name in names:
        if name not in found:
            raise ValueError(f"--case must name a case of the list, got {name!r}; {suggest(name, found)}")
    return {name: item for name, item in found.items() if not names or name in names}


def check_labels(network: Network, cases: Mapping[str, Files]) -> None:
    """Raise unless labels are of the kind that the network gives: the class of a whole image, or a file.

    Raises:
        ValueError: naming the first case that has another one, or the number of no class.
    """
    for name, files in cases.items():
        label = files.get("label")
        if label is None:
            continue
        if network.kind != "whole images" and is_class(label):
            raise ValueError(
                f"The label of {name} must be a file, as `{network.name}` finds {network.kind} in an image, got the "
                f"class {label}; take a list with maps as labels, or networks that classify whole images."
            )
        if network.kind == "whole images" and not is_class(label):
            raise ValueError(
                f"The label of {name} must be a class, as `{network.name}` classifies whole images, got {label}; "
                "write the list by `medkd datalist --class_folders`, or leave labels out."
            )
        if network.kind == "whole images" and (problem := class_problem(label, name, network.classes)):
            raise ValueError(problem)


def _names(files: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart, without extension."""
    paths = []
    for file in files:
        path = Path(file)
        stem = path.name.removesuffix(".gz")
        paths.append((*path.parts[:-1], os.path.splitext(stem)[0]))
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    names = ["/".join(path[-depth:]) for path in paths]
    return [name if names.index(name) == n else f"{name} {n + 1}" for n, name in enumerate(names)]


def read_case(network: Network, name: str, files: Files) -> Case:
    """Read image and label as the bundle of a network does, and check that they belong together.

    Raises:
        ValueError: a file cannot be read; the label has another grid than its image, or a number that is no class.
    """
    with scripts_of(network.root):
        loading = network.parse().get_parsed_content("loading")
        try:
            data = loading(dict(files))
        except Exception as error:
            raise ValueError(f"Case {name} cannot be read: {told_cause(error)}") from error
    image, label = data["image"], data.get("label")
    affine = np.asarray(image.affine, dtype=np.float64)
    is_picture = _is_picture(files["image"])
    frame = frame_of(tuple(image.shape[1:]), affine, network.config.get("unit"), is_picture)
    if label is not None:
        _check_label(network, name, image, label)
    pixels = plain_tensor(image).numpy()
    looked_at = _looked_at(pixels[:3] if is_picture and len(pixels) == 4 else pixels)   # without transparency
    return Case(name, looked_at, None if label is None else _whole(label), frame)


def _is_picture(file: str) -> bool:
    return file.lower().endswith(PICTURES)


def _check_label(network: Network, name: str, image: Any, label: Any) -> None:
    if image.shape[1:] != label.shape[1:]:
        raise ValueError(
            f"The label of {name} must have the size of its image, {tuple(image.shape[1:])}, got "
            f"{tuple(label.shape[1:])}; take the label that was drawn on this image, or resample it."
        )
    if network.axes == 3 or "orientation" in network.config:       # of other pictures readers make up the affine
        places = [np.asarray(to_affine_nd(3, np.asarray(one.affine, np.float64))) for one in (image, label)]
        _check_place(name, places[0], places[1], image.shape[1:])
    largest = int(label.max())
    if network.kind == "classes" and largest >= network.classes:
        raise ValueError(
            f"The label of {name} must have values in 0..{network.classes - 1}, the classes of `{network.name}`, got "
            f"{largest}; compare networks of as many classes, or mark unknown voxels by -1."
        )


def _check_place(name: str, image: Array, label: Array, shape: Sequence[int]) -> None:
    """Raise where affines (4, 4) of image and label put a voxel at unlike places."""
    lengths = [np.linalg.norm(affine[:-1, :-1], axis=0)[: len(shape)] for affine in (image, label)]
    shift = largest_shift(image, label, shape) / float(lengths[0].min())
    if shift > AFFINE_TOLERANCE:
        raise ValueError(
            f"The label of {name} must lie where its image does, to {AFFINE_TOLERANCE:g} voxels, got one that is up to "
            f"{shift:.3g} voxels off, with voxels of {lengths[1].round(4).tolist()} for the label and "
            f"{lengths[0].round(4).tolist()} for the image; take the label that was drawn on this image."
        )


def _whole(label: Any) -> Array:
    values: Array = plain_tensor(label).numpy()[0]
    return values if values.dtype.kind in "iu" else np.rint(values).astype(np.int32)


def _looked_at(image: Array) -> Array:
    """Gray values as they are, or colors scaled to 0..1; of other numbers of channels the first one."""
    if len(image) != 3:
        gray: Array = image[0]
        return gray
    low, high = float(image.min()), float(np.percentile(image, 99.8))
    colors: Array = np.clip((np.moveaxis(image, 0, -1) - low) / max(high - low, 1e-6), 0, 1)
    return colors
