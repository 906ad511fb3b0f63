# SPDX-License-Identifier: Apache-2.0
"""What the header of a file says beyond what a reader gives: how values are stored, units, and modes of pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

__all__ = ["HDF5", "NIFTI", "PICTURES", "TIFF", "Header", "ending", "read_header"]

NIFTI = (".nii", ".nii.gz")
TIFF = (".tif", ".tiff")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", *TIFF)
HDF5 = (".h5", ".hdf5", ".hdf")
_FORM_TOLERANCE = 1e-3    # of a voxel's size; headers hold float32
_SHIFT_TOLERANCE = 0.1    # of a voxel's size
_MODES = {"P": "a palette", "PA": "a palette", "CMYK": "CMYK colors", "LAB": "LAB colors", "1": "1 bit"}
_STORED = {"I;16": np.uint16, "I;16B": np.uint16, "I": np.int32, "F": np.float32}   # by mode of Pillow; else 8 bit
_INTERPRETED = {0: "white as 0", 3: "a palette", 5: "CMYK colors", 8: "LAB colors", 9: "LAB colors"}   # of TIFF


@dataclass(frozen=True)
class Header:
    """Facts of a file's header, each None or empty where it has none or it is unknown.

    Attributes:
        stored: type of the values in the file; float64 where a NIfTI header scales them.
        unit: unit of the spacing that NIfTI declares, mm, micron or meter, or ImageJ in a TIFF.
        two_affines: qform and sform of a NIfTI header are both set, and differ.
        mode: how a picture codes its colors, if not as gray or RGB: such as a palette, 1 bit, white as 0.
        pages: images of a TIFF.
        samples: values per pixel of a TIFF; readers that know up to four make up the others.
    """

    stored: np.dtype[Any] | None = None
    unit: str = ""
    two_affines: bool = False
    mode: str = ""
    pages: int = 1
    samples: int = 1


def ending(path: str) -> str:
    """Ending of a path in small letters, .nii.gz as one."""
    name = path.lower().rstrip("/")
    return ".nii.gz" if name.endswith(".nii.gz") else name[name.rfind("."):] if "." in name else ""


def read_header(path: str) -> Header:
    """Read the header of a file that can be read; a kind without one gives an empty `Header`."""
    kind = ending(path)
    if kind in NIFTI:
        return _nifti(path)
    if kind in TIFF:
        return _tiff(path)
    if kind in PICTURES:
        from PIL import Image

        with Image.open(path) as picture:
            return Header(np.dtype(_STORED.get(picture.mode, np.uint8)), mode=_MODES.get(picture.mode, ""))
    if kind == ".npy":
        return Header(np.load(path, mmap_mode="r").dtype)
    return Header(_hdf5_type(path) if kind in HDF5 else _zarr_type(path) if kind == ".zarr" else None)


def _nifti(path: str) -> Header:
    file: Any = nib.load(path)
    header = file.header
    stored = np.dtype(header.get_data_dtype())
    if (file.dataobj.slope, file.dataobj.inter) != (1.0, 0.0):
        stored = np.dtype(np.float64)
    unit = header.get_xyzt_units()[0]
    forms = [header.get_sform(coded=True), header.get_qform(coded=True)]
    both = all(code > 0 for _, code in forms)
    return Header(stored, "" if unit == "unknown" else unit, both and _differ(*(form for form, _ in forms)))


def _differ(first: NDArray[Any], second: NDArray[Any]) -> bool:
    size = float(np.linalg.norm(first[:3, :3], axis=0).min())
    apart = np.abs(first - second)
    return bool(apart[:3, :3].max() > _FORM_TOLERANCE * size or apart[:3, 3].max() > _SHIFT_TOLERANCE * size)


def _tiff(path: str) -> Header:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        mode = _INTERPRETED.get(int(page.photometric), "1 bit" if page.bitspersample == 1 else "")
        unit = str((file.imagej_metadata or {}).get("unit", ""))
        stored = np.dtype(page.dtype) if page.dtype else None
        return Header(stored, unit, mode=mode, pages=len(file.pages), samples=int(page.samplesperpixel))


def _hdf5_type(path: str) -> np.dtype[Any] | None:
    """Type of all arrays of a file, where it has one type of them only."""
    try:
        import h5py  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    found: set[np.dtype[Any]] = set()

    def note(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim > 1:
            found.add(node.dtype)

    with h5py.File(path) as file:
        file.visititems(note)
    return found.pop() if len(found) == 1 else None


def _zarr_type(path: str) -> np.dtype[Any] | None:
    """The same of the arrays of a folder, of version 2 or 3."""
    found: set[str] = set()
    for file in [*Path(path).rglob(".zarray"), *Path(path).rglob("zarr.json")]:
        content = json.loads(file.read_text(encoding="utf-8"))
        if len(content.get("shape", ())) > 1:
            found.add(str(content.get("dtype", content.get("data_type"))))
    return np.dtype(found.pop()) if len(found) == 1 else None
