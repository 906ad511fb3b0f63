# SPDX-License-Identifier: Apache-2.0
"""Write results with the axes, the affine and the unit that the file of their image has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from monai.data.image_writer import NibabelWriter
from monai.data.utils import to_affine_nd
from monai.utils import get_equivalent_dtype
from nibabel.nifti1 import Nifti1Header

from .reading import FILE_SHAPE, LOADED_AFFINE

__all__ = ["LikeFileWriter"]

_EXPLICIT_UNITS = (1, 2, 3)   # of NIfTI: meters, millimeters, microns


class LikeFileWriter(NibabelWriter):
    """Write NIfTI that lies on the file of its image: as many axes, those of one voxel too, its affine and its unit.

    MONAI's writer drops axes of one voxel at the end: a volume of shape (40, 50, 1) would come back as (40, 50).
    `LoadImageFilesd` may have changed the unit of the affine, which is changed back here. Give the class to a saver,
    as its `writer`.
    """

    def set_data_array(
        self, data_array: Any, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **options: Any
    ) -> None:
        """Take an array; of one channel the axis of channels is dropped, whatever `squeeze_end_dims` says."""
        super().set_data_array(data_array, channel_dim, squeeze_end_dims=False, **options)
        meta = getattr(data_array, "meta", {})
        rank = len(np.atleast_1d(np.asarray(meta.get(FILE_SHAPE, meta.get("spatial_shape", [0, 0, 0])))))
        if self.data_obj.shape[-1] == 1:                           # (X, Y, Z, C), whatever the array had
            self.data_obj = self.data_obj[..., 0]
            while self.data_obj.ndim > rank and self.data_obj.shape[-1] == 1:
                self.data_obj = self.data_obj[..., 0]
            axes = np.asarray(meta.get("dim", ())).ravel()[:5].tolist()   # of NIfTI: their number, then their lengths
            if self.data_obj.ndim == 3 and axes[:1] == [4] and axes[4:] == [1]:
                self.data_obj = self.data_obj[..., None]           # a channel that the file has, too

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, resample: bool = True, **options: Any) -> None:
        """Take the affine, brought back to that of the file."""
        meta = dict(meta_dict or {})
        self.units = int(np.asarray(meta.get("xyzt_units", 0))) & 7
        if LOADED_AFFINE in meta:
            keys = (LOADED_AFFINE, "original_affine", "affine")
            loaded, own, now = (to_affine_nd(3, np.asarray(meta[key], np.float64)) for key in keys)
            same = np.allclose(now, loaded, rtol=1e-6, atol=1e-9)
            meta["affine"] = own if same else own @ np.linalg.inv(loaded) @ now
        super().set_metadata(meta, resample=resample, **options)

    def write(self, filename: Any, verbose: bool = False, **options: Any) -> None:
        """Write the file, with the unit of its image's where readers would take another one."""
        if self.units in _EXPLICIT_UNITS:
            header: Any = Nifti1Header()   # type: ignore[no-untyped-call]
            kind: Any = get_equivalent_dtype(self.output_dtype, np.ndarray)   # type: ignore[no-untyped-call]
            header.set_data_dtype(kind)
            header.set_xyzt_units(self.units)
            options["header"] = header
        super().write(filename, verbose=verbose, **options)
