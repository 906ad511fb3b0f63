# SPDX-License-Identifier: Apache-2.0
"""Volumes of HDF5 and zarr files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medkd.inference.reading import LoadImageFilesd
from medkd.inference.volume_files import is_zarr, read_volume

VOXELS = np.random.default_rng(0).integers(1, 256, (6, 10, 12)).astype(np.uint8)
IDS = VOXELS.astype(np.uint64) * 2**40


def write_hdf5(path: Path, arrays: dict[str, np.ndarray], **attributes: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip").attrs.update(attributes)
    return path


def write_zarr(path: Path, arrays: dict[str, np.ndarray], version: int, **attributes: Any) -> Path:
    zarr = pytest.importorskip("zarr", minversion="3")
    group = zarr.open_group(path, mode="w", zarr_format=version)
    for name, array in arrays.items():
        one = group.create_array(name, shape=array.shape, dtype=array.dtype)
        one[...] = array
        one.attrs.update(attributes)
    return path


CREMI = {"volumes/raw": VOXELS, "volumes/labels/neuron_ids": IDS, "volumes/labels/clefts": VOXELS}


def test_image_and_label_of_one_file_are_found_by_their_usual_names(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "sample_A.hdf", CREMI, resolution=[40.0, 4.0, 4.0])
    image = LoadImageFilesd("image", unit="nm", spatial_dims=3)({"image": str(path)})["image"]
    label = LoadImageFilesd("label", dtype=torch.int64, is_label=True, unit="nm")({"label": str(path)})["label"]
    assert np.array_equal(image[0].numpy(), VOXELS)
    assert np.array_equal(label[0].numpy(), IDS.astype(np.int64))
    for one in (image, label):
        assert np.diag(one.affine).tolist() == [40.0, 4.0, 4.0, 1.0]
    assert image.meta["filename_or_obj"] == str(path)


@pytest.mark.parametrize("name", ["main", "data", "stack/whatever"])
@pytest.mark.parametrize("suffix", ["h5", "hdf5", "hdf"])
def test_the_only_volume_is_taken_whatever_its_name(tmp_path: Path, name: str, suffix: str) -> None:
    path = write_hdf5(tmp_path / f"a.{suffix}", {name: VOXELS[None], "table": np.zeros((4, 5))})
    for is_label in (False, True):
        volume = read_volume(str(path), is_label=is_label)
        assert np.array_equal(volume.voxels, VOXELS)
        assert (volume.spacing, volume.unit) == (None, None)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"element_size_um": [0.04, 0.004, 0.004]}, (40, 4, 4)),
        ({"voxel_size": [40, 4, 4], "units": ["nm", "nm", "nm"]}, (40, 4, 4)),
        ({"resolution": [4e-5, 4e-6, 4e-6], "unit": "mm"}, (40, 4, 4)),
        ({"resolution": 8.0}, (8, 8, 8)),
        ({"resolution": [0, 4, 4]}, (1, 1, 1)),
        ({}, (1, 1, 1)),
    ],
)
def test_lengths_of_voxels_are_read_with_their_unit(
    tmp_path: Path, attributes: dict[str, Any], expected: tuple[float, ...]
) -> None:
    path = write_hdf5(tmp_path / "a.h5", {"raw": VOXELS}, **attributes)
    image = LoadImageFilesd("image", unit="nm")({"image": str(path)})["image"]
    np.testing.assert_allclose(np.diag(image.affine)[:3], expected, rtol=1e-6)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_of_both_versions_is_read_whole_or_by_a_path_within(tmp_path: Path, version: int) -> None:
    path = write_zarr(tmp_path / "a.zarr", {"raw": VOXELS, "labels": IDS}, version, resolution=[40, 4, 4])
    assert is_zarr(str(path))
    for place, voxels, is_label in ((path, VOXELS, False), (path / "raw", VOXELS, False), (path, IDS, True)):
        volume = read_volume(str(place), is_label=is_label)
        assert np.array_equal(volume.voxels, voxels)
        assert volume.spacing == (40.0, 4.0, 4.0)


@pytest.mark.parametrize("version", [2, 3])
def test_of_an_ome_ngff_image_the_finest_level_is_read_in_its_unit(tmp_path: Path, version: int) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    path = write_zarr(tmp_path / "a.zarr", {"0": VOXELS[None], "1": VOXELS[None, :, ::2, ::2]}, version)
    scale = [[{"type": "scale", "scale": [1, 0.03, 0.006 * step, 0.006 * step]}] for step in (1, 2)]
    levels = [{"path": str(n), "coordinateTransformations": scale[n]} for n in (0, 1)]
    axes = [{"name": "c", "type": "channel"}] + [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    scales = [{"axes": axes, "datasets": levels}]
    group = zarr.open_group(path, mode="a")
    group.attrs.update({"multiscales": scales} if version == 2 else {"ome": {"version": "0.5", "multiscales": scales}})
    image = LoadImageFilesd("image", unit="nm", spatial_dims=3)({"image": str(path)})["image"]
    assert np.array_equal(image[0].numpy(), VOXELS)
    np.testing.assert_allclose(np.diag(image.affine)[:3], [30, 6, 6], rtol=1e-6)


def test_an_array_is_named_where_several_could_be_meant(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", {"first": VOXELS, "second": VOXELS[::-1]})
    with pytest.raises(ValueError, match=r"a\.h5 must hold one volume.*first \(6, 10, 12\), second .*--image_dataset"):
        read_volume(str(path))
    with pytest.raises(ValueError, match="--label_dataset"):
        read_volume(str(path), is_label=True)
    assert np.array_equal(read_volume(str(path), "/second").voxels, VOXELS[::-1])
    with pytest.raises(ValueError, match=r"a\.h5 must hold the array 'third', got first \(6, 10, 12\), second"):
        read_volume(str(path), "third")


def test_an_array_of_several_channels_or_of_a_table_is_refused(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", {"raw": np.stack([VOXELS, VOXELS])})
    with pytest.raises(ValueError, match=r"a\.h5 must hold one channel of a volume in raw, got shape \(2, 6, 10, 12\)"):
        read_volume(str(path))
    path = write_hdf5(tmp_path / "b.h5", {"table": VOXELS[0]})
    with pytest.raises(ValueError, match=r"b\.h5 must hold one volume.*table \(10, 12\)"):
        read_volume(str(path))


@pytest.mark.parametrize(("name", "package"), [("a.h5", "h5py"), ("a.zarr", "zarr")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} needs the package {package}, .*; pip install {package}\."):
        LoadImageFilesd("image")({"image": str(tmp_path / name)})
