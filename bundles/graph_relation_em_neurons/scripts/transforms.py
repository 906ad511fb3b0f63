# SPDX-License-Identifier: Apache-2.0
"""Transforms for EM volumes: the axis of the sections, and damage that sections have."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.meta_obj import get_track_meta
from monai.data.meta_tensor import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Orientation, RandomizableTransform
from monai.utils.enums import TraceKeys
from nibabel.orientations import aff2axcodes
from torch import Tensor

from scripts.instances import section_axis

__all__ = ["RandMissingSectionsd", "RandShiftedSectionsd", "SectionsFirstd"]

_CODES = (("L", "R"), ("P", "A"), ("I", "S"))    # of nibabel, whatever space the metadata name


class SectionsFirstd(MapTransform, InvertibleTransform):
    """Move the axis of the largest spacing to the front: (z, y, x), as networks for anisotropic EM expect it.

    Of equal spacings the earliest axis counts, so isotropic volumes stay as they are. `Invertd` undoes it.

    Args:
        keys: volumes with an affine, shape (C, *S), 3-D.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the volumes turned."""
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key]
            codes = list(aff2axcodes(np.asarray(volume.affine)))
            front = [codes.pop(section_axis(volume)), *codes]
            result[key] = Orientation(axcodes="".join(front), labels=_CODES)(volume)
            if get_track_meta() and result[key].applied_operations:
                result[key].applied_operations[-1][TraceKeys.ID] = TraceKeys.NONE   # made and undone by two objects
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the axes in their first order."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = Orientation(axcodes="RAS", labels=_CODES).inverse(result[key])
        return result


class _RandSectionsd(RandomizableTransform, MapTransform):
    """What transforms of single sections have in common."""

    def __init__(self, keys: KeysCollection, prob: float, share: float, allow_missing_keys: bool) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.share = share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the same sections of all images damaged in the same way."""
        result = dict(data)
        self.randomize(None)
        first = self.first_key(result)
        if not self._do_transform or first == ():
            return result
        damages = self.draw(result[first].shape[1])
        for key in self.key_iterator(result):
            result[key] = result[key].clone()
            self.damage(result[key], damages)
        return result

    def draw(self, sections: int) -> Mapping[int, Any]:
        """Sections that are hit, each with probability `share`, but never all of them, and what happens to them."""
        chosen = np.flatnonzero(self.R.random(sections) < self.share)
        return {int(one): None for one in chosen[: sections - 1]}

    def damage(self, image: Tensor, damages: Mapping[int, Any]) -> None:
        """Change an image (C, D, H, W) in place."""
        raise NotImplementedError


class RandMissingSectionsd(_RandSectionsd):
    """Make some sections of an image as dark as its darkest voxel; the label stays.

    Args:
        keys: images of shape (C, D, H, W); all lose the same sections.
        prob: probability that an image is changed at all.
        share: expected share of its sections that go missing.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(
        self, keys: KeysCollection, prob: float = 0.1, share: float = 0.05, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, prob, share, allow_missing_keys)

    def damage(self, image: Tensor, damages: Mapping[int, Any]) -> None:
        """Darken the sections."""
        image[:, list(damages)] = image.min()


class RandShiftedSectionsd(_RandSectionsd):
    """Shift some sections in their plane, as misaligned series have it; the label is not shifted.

    What moves in at the border repeats it.

    Args:
        keys: images of shape (C, D, H, W); all are shifted alike.
        prob: probability that an image is changed at all.
        share: expected share of its sections that are shifted.
        largest: voxels of the largest shift along each axis of the plane.
        allow_missing_keys: do nothing where a key is absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.1,
        share: float = 0.1,
        largest: int = 4,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, prob, share, allow_missing_keys)
        self.largest = largest

    def draw(self, sections: int) -> Mapping[int, Any]:
        """Sections that are hit, with voxels to shift each by along both axes of the plane."""
        shifted = super().draw(sections)
        return dict(zip(shifted, self.R.randint(-self.largest, self.largest + 1, (len(shifted), 2)), strict=True))

    def damage(self, image: Tensor, damages: Mapping[int, Any]) -> None:
        """Shift the sections."""
        for section, (rows, columns) in damages.items():
            image[:, section] = _shift(_shift(image[:, section], 1, int(rows)), 2, int(columns))


def _shift(section: Tensor | MetaTensor, axis: int, step: int) -> Tensor:
    """Move a section (C, H, W) along an axis, repeating its border."""
    length = section.shape[axis]
    places = (torch.arange(length) - step).clamp(0, length - 1)
    moved: Tensor = section.index_select(axis, places.to(section.device))
    return moved
