# SPDX-License-Identifier: Apache-2.0
"""Volumes of HDF5 and zarr files: which of their arrays is meant, and how long its voxels are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["HDF5", "Volume", "is_zarr", "read_volume"]

Array = NDArray[Any]
HDF5 = (".h5", ".hdf5", ".hdf")
_IMAGES = ("volumes/raw", "raw", "main", "data", "image", "images", "em")   # as the field names them, the first counts
_LABELS = (
    "volumes/labels/neuron_ids", "labels", "label", "segmentation", "seg", "neuron_ids", "stack", "main", "data",
)
_SPACINGS = ("resolution", "voxel_size", "spacing", "element_size_um", "pixel_size")   # attributes, along Z, Y, X


class Volume(NamedTuple):
    """An array of a file.

    Attributes:
        voxels: shape (Z, Y, X), sections first as such files have it.
        spacing: lengths of a voxel along these axes; None where the file does not say.
        unit: that these are in, as the file names it; None where it names none.
    """

    voxels: Array
    spacing: tuple[float, ...] | None
    unit: str | None


class _Found(NamedTuple):
    """An array that is not read yet, with the lengths that its group tells."""

    array: Any
    scale: tuple[float, ...] | None = None
    unit: str | None = None


def is_zarr(path: str) -> bool:
    """Whether a path is a zarr store, a folder named *.zarr, or lies within one."""
    return any(part.lower().endswith(".zarr") for part in Path(path).parts)


def read_volume(path: str, dataset: str | None = None, is_label: bool = False) -> Volume:
    """Read one array with three axes; further axes of one element, such as time and channel, are dropped.

    Without a name it is the only such array, the finest one of an OME-NGFF image, or the one with a usual name:
    `volumes/raw`, `raw`, `main` or `data`; of a label `volumes/labels/neuron_ids`, `labels`, `main` or `data`.

    Args:
        path: an HDF5 file, a zarr store of version 2 or 3, or a group or array within a store.
        dataset: path of the array in the file, or of the group of an OME-NGFF image; None for the above.
        is_label: which of the usual names count.

    Raises:
        ImportError: h5py or zarr is not installed.
        ValueError: there is no such array, or more than one could be meant.
    """
    if is_zarr(path):
        root = _package(path, "zarr").open(path, mode="r")
        return _read(path, root, dataset, is_label)
    h5py = _package(path, "h5py")
    if os.path.isfile(path) and not h5py.is_hdf5(path):
        raise ValueError(f"{path} must be HDF5, got another or a damaged file; if it is cut, copy it again.")
    with h5py.File(path, "r") as file:
        return _read(path, file, dataset, is_label)


def _package(path: str, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{path} needs the package {name}, which is not installed; pip install {name}.") from error


def _read(path: str, root: Any, dataset: str | None, is_label: bool) -> Volume:
    found = {"": _Found(root)} if _is_array(root) else dict(_arrays(root))
    name, chosen = _chosen(path, found, dataset, is_label)
    voxels = np.asarray(chosen.array[()] if chosen.array.shape else chosen.array)
    kept = _kept_axes(voxels.shape)
    if len(kept) != 3:
        raise ValueError(
            f"{path} must hold one channel of a volume in {name or 'its array'}, got shape {voxels.shape}; name "
            "another array, or save one channel."
        )
    spacing, unit = _lengths(chosen, voxels.ndim)
    return Volume(
        voxels.reshape([voxels.shape[axis] for axis in kept]),
        None if spacing is None else tuple(spacing[axis] for axis in kept), unit,
    )


def _kept_axes(shape: Sequence[int]) -> list[int]:
    """Axes that are left when those of one element are dropped, the first ones first, until there are three."""
    kept = list(range(len(shape)))
    for axis in range(len(shape)):
        if len(kept) > 3 and shape[axis] == 1:
            kept.remove(axis)
    return kept


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _arrays(group: Any, prefix: str = "") -> Iterator[tuple[str, _Found]]:
    """All arrays below a group with their paths; of an OME-NGFF image the finest one, by the path of its group."""
    scales = _multiscales(group)
    levels = scales.get("datasets", [])
    coarse = {str(level.get("path")) for level in levels}
    if levels:
        axes = [axis.get("unit") for axis in scales.get("axes", []) if axis.get("type") == "space"]
        unit = next((str(one) for one in axes if one), None)
        yield prefix, _Found(group[levels[0]["path"]], _ngff_scale(levels[0], scales), unit)
    for name in sorted(group.keys()):
        if name in coarse:
            continue
        node, place = group[name], f"{prefix}/{name}".lstrip("/")
        if _is_array(node):
            yield place, _Found(node)
        elif hasattr(node, "keys"):
            yield from _arrays(node, place)


def _multiscales(group: Any) -> Mapping[str, Any]:
    attributes = dict(group.attrs)
    listed = attributes.get("multiscales") or dict(attributes.get("ome") or {}).get("multiscales") or []
    first: Mapping[str, Any] = listed[0] if isinstance(listed, (list, tuple)) and listed else {}
    return first if isinstance(first, Mapping) else {}


def _ngff_scale(level: Mapping[str, Any], scales: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Product of the scales of a level and of the whole image."""
    steps = chain(level.get("coordinateTransformations") or (), scales.get("coordinateTransformations") or ())
    factors = [step["scale"] for step in steps if step.get("type") == "scale" and "scale" in step]
    return tuple(float(value) for value in np.prod(factors, axis=0)) if factors else None


def _chosen(
    path: str, found: Mapping[str, _Found], dataset: str | None, is_label: bool
) -> tuple[str, _Found]:
    if dataset is not None and list(found) != [""]:
        name = dataset.strip("/")
        if name in found:
            return name, found[name]
        raise ValueError(f"{path} must hold the array {dataset!r}, got {_listed(found)}; name one of these.")
    volumes = {name: one for name, one in found.items() if len(one.array.shape) >= 3}
    if len(volumes) > 1:
        usual = [name for name in (_LABELS if is_label else _IMAGES) if name in volumes]
        below = [name for name in volumes if ("labels" in name.split("/")) == is_label]
        choice = usual[:1] or (below if len(below) == 1 else [])
        volumes = {name: volumes[name] for name in choice}
    if len(volumes) == 1:
        return next(iter(volumes.items()))
    option = "label_dataset" if is_label else "image_dataset"
    raise ValueError(
        f"{path} must hold one volume, or one of a usual name, got {_listed(found)}; name it: --{option} NAME."
    )


def _listed(found: Mapping[str, _Found]) -> str:
    names = [f"{name or '/'} {tuple(one.array.shape)}" for name, one in found.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _lengths(found: _Found, rank: int) -> tuple[tuple[float, ...] | None, str | None]:
    """Spacing along all axes of an array, and its unit."""
    if found.scale is not None and len(found.scale) == rank:
        return found.scale, found.unit
    attributes = dict(found.array.attrs)
    for name in _SPACINGS:
        if name in attributes:
            values = np.atleast_1d(np.asarray(attributes[name], np.float64)).ravel()
            values = np.repeat(values, 3) if len(values) == 1 else values
            if len(values) >= 3 and bool((values > 0).all()) and len(values) <= rank:
                return (1.0,) * (rank - len(values)) + tuple(map(float, values)), _unit(attributes, name)
    return None, None


def _unit(attributes: Mapping[str, Any], name: str) -> str | None:
    if name.endswith("_um"):
        return "um"
    stated = next((attributes[key] for key in ("units", "unit") if key in attributes), None)
    if isinstance(stated, (list, tuple, np.ndarray)) and len(stated):
        stated = stated[-1]                                        # of X
    return stated.decode() if isinstance(stated, bytes) else None if stated is None else str(stated)
