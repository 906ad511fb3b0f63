# SPDX-License-Identifier: Apache-2.0
"""Read images and labels of all kinds of files, channels first, with lengths in the unit of a bundle."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.image_reader import ITKReader, NibabelReader, PILReader
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.transforms import EnsureChannelFirst, LoadImage, LoadImaged, MapTransform
from monai.transforms.io.array import switch_endianness
from monai.utils import ImageMetaKey, convert_to_dst_type, get_equivalent_dtype
from numpy.typing import NDArray

from .picture_files import (
    PICTURES,
    TIFFS,
    TiffStack,
    colors_by_meaning,
    is_plain_tiff,
    itk_spacing,
    one_channel,
    read_tiff,
    tiff_lengths,
)
from .units import NIFTI_UNITS, Unit, unit_factor
from .volume_files import HDF5, Volume, is_zarr, read_volume

__all__ = ["FILE_SHAPE", "LOADED_AFFINE", "ChannelsFirstd", "LoadImageFilesd"]

Array = NDArray[Any]
FILE_SHAPE = "file_shape"         # metadata: the spatial shape of a file, where the image has other axes
LOADED_AFFINE = "loaded_affine"   # metadata: the affine that a file was given, where it is not that of the file
_DONE = "channels_first"          # metadata: the channels stand first
_WAYS_OUT = (   # part of what a reader says -> what to do
    (("end-of-stream", "truncated", "eof", "crc", "unexpected end", "incorrect length"), "it is cut: copy it again"),
    (("work out file type",), "it is cut or no such file, whatever its name says: copy or export it again"),
    (("not recognized", "cannot identify", "could not create io", "not a"),
     "it is no such file, whatever its name says: export it again"),
)


class LoadImageFilesd(LoadImaged):
    """Read files: NIfTI, DICOM and what else MONAI reads, and what pictures and the field of EM have.

    * Pictures (PNG, JPEG, BMP, TIFF) show what a viewer shows: palettes become colors, inverted gray, print colors and
      single bits the gray or red, green, blue that they mean. Labels keep their numbers.
    * HDF5 (.h5, .hdf5, .hdf), zarr of version 2 and 3 with OME-NGFF, and, where `unit` is nm, TIFF stacks are volumes
      with sections first (Z, Y, X). They need h5py, zarr, tifffile.
    * The affine is in `unit`: NIfTI, TIFF (ImageJ, OME, resolution), HDF5 and zarr may declare another one; see
      `units.unit_factor` for what is believed. The file's own is kept as `original_affine`, for writers.

    What is loaded already, as servers hand it in, stays as it is.

    Args:
        keys: paths of images or labels.
        dtype: of the result; an integer type for instance numbers, which must then be whole and fit.
        is_label: these are labels.
        unit: mm for CT, nm for EM; None leaves lengths alone.
        spatial_dims: axes that the network works on. A volume of one section then is a picture, and a picture a volume
            of one section; the file's axes stay known, for writers. None takes any number.
        dataset: path of the array in an HDF5 or zarr file; None for the only volume, or one of a usual name.
        spacing: lengths of a voxel along the axes of the array, in `unit`, in place of what the file says; None for
            the file's.
        allow_missing_keys: do nothing where a key is absent.
        options: further ones of `LoadImaged`.

    Raises:
        ValueError: a file cannot be read, has another number of axes, or numbers that `dtype` cannot hold.
        ImportError: the package that a file needs is not installed.
    """

    def __init__(
        self,
        keys: KeysCollection,
        dtype: Any = np.float32,
        is_label: bool = False,
        unit: Unit | None = None,
        spatial_dims: int | None = None,
        dataset: str | None = None,
        spacing: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, dtype=dtype, allow_missing_keys=allow_missing_keys, **options)
        self._loader = _Loader(dtype, is_label, unit, spatial_dims, dataset, spacing, options)


class ChannelsFirstd(MapTransform):
    """Bring channels to the front where `LoadImageFilesd` has not: in what servers hand in.

    Args:
        keys: images with metadata.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with channels first."""
        result = dict(data)
        for key in self.key_iterator(result):
            if not getattr(result[key], "meta", {}).get(_DONE):
                result[key] = EnsureChannelFirst()(result[key])
        return result


class _Loader(LoadImage):
    """Reads one file; see `LoadImageFilesd`."""

    def __init__(
        self, dtype: Any, is_label: bool, unit: Unit | None, spatial_dims: int | None, dataset: str | None,
        spacing: Sequence[float] | None, options: dict[str, Any],
    ) -> None:
        simple = {name: value for name, value in options.items() if name in ("image_only", "simple_keys", "expanduser")}
        super().__init__(dtype=dtype, **simple)
        self.is_label = is_label
        self.unit = unit
        self.spatial_dims = spatial_dims
        self.dataset = dataset
        self.spacing = None if spacing is None else [float(length) for length in spacing]
        self.numbers: Any = get_equivalent_dtype(dtype, np.ndarray)   # type: ignore[no-untyped-call]

    def __call__(self, filename: Any, reader: Any = None) -> Any:
        """Give a tensor (C, *S) with its metadata."""
        if not isinstance(filename, (str, os.PathLike)):
            return filename                                        # of a server, in memory
        path = os.path.expanduser(str(filename)) if self.expanduser else str(filename)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} must be there to be read, got no such file; correct its path.")
        try:
            array, meta, declared = self._read(path, reader)
        except ImportError:
            raise
        except Exception as error:   # readers raise anything
            raise ValueError(_told(path, error)) from error
        self._check_numbers(path, array)
        array = convert_to_dst_type(array, dst=array, dtype=self.dtype)[0]
        meta = switch_endianness(meta, "<")   # type: ignore[no-untyped-call]
        meta[ImageMetaKey.FILENAME_OR_OBJ] = path
        image = MetaTensor.ensure_torch_and_prune_meta(array, meta, self.simple_keys, self.pattern, self.sep)
        image = EnsureChannelFirst()(image)
        if isinstance(image, MetaTensor):
            image.meta[_DONE] = True
            self._scale(image, declared)
        image = self._with_axes(path, image)
        return image if self.image_only else (image, image.meta)

    def _read(self, path: str, reader: Any) -> tuple[Array, dict[str, Any], str | None]:
        """Voxels, metadata, and the name of the unit of the affine."""
        lower = path.lower()
        if lower.endswith(HDF5) or is_zarr(path):
            return _from_volume(read_volume(path, self.dataset, self.is_label))
        if lower.endswith(TIFFS) and self.unit == "nm":
            stack = read_tiff(path, self.is_label)
            return _from_volume(stack._replace(pixels=one_channel(path, stack.pixels)))
        if lower.endswith(TIFFS) and not is_plain_tiff(path):
            return _as_itk_has_it(path, read_tiff(path, self.is_label), self.unit)
        if lower.endswith(PICTURES):
            reader = PILReader(converter=None if self.is_label else colors_by_meaning)
        if reader is None:
            reader = next((one for one in self.readers[::-1] if one.verify_suffix((path,))), ITKReader())
        array, meta = reader.get_data(reader.read((path,)))
        declared = None
        if lower.endswith(TIFFS) and self.unit is not None:
            declared = _use_lengths(meta, tiff_lengths(path))
        if isinstance(reader, NibabelReader):
            declared = NIFTI_UNITS.get(int(np.asarray(meta.get("xyzt_units", 0))) & 7)
        return array, meta, declared

    def _check_numbers(self, path: str, array: Any) -> None:
        """Raise where an integer type does not hold the numbers of a label, or an image has some that are none."""
        if not self.is_label and array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int(array.size - np.isfinite(array).sum())
            raise ValueError(
                f"{path} must have finite values, got {count:,} NaN or infinite voxels; replace them, by the lowest "
                "number where there is no data."
            )
        if not self.is_label or not np.issubdtype(self.numbers, np.integer) or array.dtype.kind in "bi":
            return
        most = np.iinfo(self.numbers).max
        if array.dtype.kind == "u":
            if int(array.max()) > most:
                raise ValueError(
                    f"{path} must have numbers up to {most:,}, got {int(array.max()):,}; number the instances anew, "
                    "and give -1 to what is to be ignored."
                )
            return
        if not np.isfinite(array).all() or bool((array != np.rint(array)).any()):
            broken = array[~(np.isfinite(array) & (array == np.rint(array)))].flat[0]
            raise ValueError(
                f"{path} must have whole numbers, got {broken:g}; "
                "it may have been resampled: use nearest-neighbor interpolation for labels."
            )
        exact = 2 ** (np.finfo(array.dtype).nmant + 1)
        if float(np.abs(array).max()) > exact:
            raise ValueError(
                f"{path} must have numbers up to {exact:,} as {array.dtype}, got {float(np.abs(array).max()):.0f}, "
                "where this type no longer tells instances apart; save the label as whole numbers, from its source."
            )

    def _scale(self, image: MetaTensor, declared: str | None) -> None:
        """Bring the affine to the unit of the bundle, and to the spacing that is given."""
        rank = image.dim() - 1
        affine = to_affine_nd(max(rank, len(image.affine) - 1), image.affine.numpy())
        lengths = np.linalg.norm(affine[:-1, :rank], axis=0)
        changed = np.array(affine, np.float64)
        if self.spacing is not None:
            if len(self.spacing) != rank or min(self.spacing) <= 0:
                raise ValueError(f"`spacing` must be {rank} lengths above 0, got {self.spacing}.")
            changed[:, :rank] *= np.asarray(self.spacing) / lengths
        elif self.unit is not None:
            factor = unit_factor(list(lengths), declared, self.unit)
            if factor != 1.0:
                changed[:-1] = np.vectorize(_six_digits)(changed[:-1] * factor)
        if not np.array_equal(changed, affine):
            image.affine = torch.as_tensor(changed)
            if "xyzt_units" in image.meta:                         # results are NIfTI: they lie on NIfTI only
                image.meta[LOADED_AFFINE] = torch.as_tensor(changed)

    def _with_axes(self, path: str, image: Any) -> Any:
        """Drop or add axes of one voxel behind the others, as the network works on `spatial_dims`."""
        shape = tuple(image.shape[1:])
        while self.spatial_dims is not None and image.dim() - 1 > self.spatial_dims and image.shape[-1] == 1:
            image = image.squeeze(-1)
        if self.spatial_dims == 3 and image.dim() == 3:
            image = image.unsqueeze(-1)
        if isinstance(image, MetaTensor) and tuple(image.shape[1:]) != shape:
            is_dicom = any("|" in str(key) for key in image.meta)   # a slice, which ITK has as a volume
            image.meta[FILE_SHAPE] = np.asarray(image.shape[1:] if is_dicom else shape)
            image.meta["spatial_shape"] = np.asarray(image.shape[1:])
        if self.spatial_dims not in (None, image.dim() - 1):
            way_out = "give a volume" if self.spatial_dims == 3 else "save its sections as files of their own"
            raise ValueError(f"{path} must have {self.spatial_dims} spatial axes, got {shape}; {way_out}.")
        return image


def _six_digits(value: float) -> float:
    """A length as it was meant: headers hold 3e-05 as 2.99999992e-05."""
    return float(f"{value:.6g}")


def _from_volume(volume: Volume | TiffStack) -> tuple[Array, dict[str, Any], str | None]:
    """Voxels with sections first, and an affine that keeps the order of the axes."""
    voxels, spacing, unit = volume
    affine = np.diag([*(spacing or (1.0,) * 3), 1.0])
    return voxels, _metadata(affine, voxels, 3), unit


def _as_itk_has_it(path: str, stack: TiffStack, unit: Unit | None) -> tuple[Array, dict[str, Any], str | None]:
    """Columns first, sections last or absent, and the axes of ITK, which reads the other TIFF files of a list."""
    pixels = np.moveaxis(stack.pixels.swapaxes(1, 2), 0, 2)        # (X, Y, Z) or (X, Y, Z, C)
    rank = 2 if pixels.shape[2] == 1 else 3
    if rank == 2:
        pixels = pixels[:, :, 0]
    meta = _metadata(orientation_ras_lps(np.diag([*itk_spacing(path, rank), 1.0])), pixels, rank)
    declared = None if unit is None else _use_lengths(meta, (stack.spacing, stack.unit))
    return pixels, meta, declared


def _use_lengths(meta: dict[str, Any], stated: tuple[tuple[float, float, float] | None, str | None]) -> str | None:
    """Take the lengths that ImageJ or OME states, which ITK does not read, for the affine; gives their unit."""
    spacing, unit = stated
    if spacing is None or unit == "mm":                            # per inch or centimeter: ITK has it
        return None
    rank = len(meta["affine"]) - 1
    for name in ("affine", "original_affine"):
        meta[name] = orientation_ras_lps(np.diag([*spacing[::-1][:rank], 1.0]))
    return unit


def _metadata(affine: Array, pixels: Array, rank: int) -> dict[str, Any]:
    channel = float("nan") if pixels.ndim == rank else -1
    return {
        "affine": affine, "original_affine": affine.copy(), "spatial_shape": np.asarray(pixels.shape[:rank]),
        "original_channel_dim": channel, "space": "RAS",
    }


def _told(path: str, error: Exception) -> str:
    """One line: the file, what its reader says, and the way out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.split(":")[0].endswith((".cxx", ".hxx", ".h"))]
    reason = (told or lines or [type(error).__name__])[0]
    if "ITK ERROR: " in reason:
        reason = reason.partition("ITK ERROR: ")[2].partition("): ")[2] or reason
    if path in reason and "must" in reason:
        return reason                                              # our own words
    way_out = next((way for words, way in _WAYS_OUT if any(word in reason.lower() for word in words)), "export it anew")
    return f"{path} must be a readable image, got {reason[:200]!r}; {way_out}."
