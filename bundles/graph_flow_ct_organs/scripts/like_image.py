# SPDX-License-Identifier: Apache-2.0
"""Label maps of pictures are saved as pictures, those of anything else as NIfTI; needs torch and monai only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import SaveImage, SaveImaged

__all__ = ["SaveLikeImaged"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


class SaveLikeImaged(SaveImaged):
    """Save a label map of a picture (PNG, JPEG, BMP) as PNG, and of anything else as NIfTI with its affine.

    Args:
        keys: keys of label maps with the metadata of their images, shape (1, *S), values 0 to 255.
        options: of `SaveImaged`, but for `output_ext`.
    """

    def __init__(self, keys: KeysCollection, **options: Any) -> None:
        super().__init__(keys, output_ext=".nii.gz", **options)
        self.picture_saver = SaveImage(output_ext=".png", **{**options, "writer": None})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files; gives a copy of `data`."""
        result = dict(data)
        for key in self.key_iterator(result):
            label = result[key]
            name = str(label.meta["filename_or_obj"]).lower()
            saver = self.picture_saver if name.endswith(PICTURES) else self.saver
            saver(label.reshape(1, *map(int, label.meta["spatial_shape"])))   # an axis of one voxel was dropped
        return result
