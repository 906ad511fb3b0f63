# SPDX-License-Identifier: Apache-2.0
"""Make a student's image of low resolution from one of full resolution, and bring its result back to the full grid.

Degrade before windowing: an average of HU that were clipped before has the borders of bone and air in the wrong place.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from monai.config import KeysCollection
from monai.data.meta_obj import get_track_meta
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import TraceKeys, convert_to_tensor
from torch import Tensor
from torch.nn import functional

__all__ = ["DegradeResolutiond", "PairResolutionsd", "area_average"]

Mode = Literal["native", "upsampled"]

_POOLS = {2: functional.avg_pool2d, 3: functional.avg_pool3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}
_NEAREST = (0, "nearest", "nearest-exact")          # how `Invertd` says that the nearest voxel counts


def area_average(image: Tensor, scale: Sequence[int]) -> Tensor:
    """Average blocks of voxels: what a scanner or a slide reader of coarser pixels sees.

    Every voxel counts once, unlike in an interpolation by 1/4, which reads 4 of 16 pixels or 8 of 64 voxels.

    Args:
        image: shape (C, *S), 2-D or 3-D, of any type; each axis divisible by its scale.
        scale: voxels per block along each axis, such as (2, 2, 2), or (1, 1, 4) for slices of four times the thickness.

    Returns:
        Shape (C, *(S / scale)), float32, with the mean of `image`; empty where `image` is.

    Example:
        >>> area_average(torch.tensor([[[0.0, 2.0, 1.0, 1.0], [4.0, 6.0, 1.0, 5.0]]]), (2, 2))
        tensor([[[3., 2.]]])
    """
    if image.numel() == 0:                                           # air alone, cropped to the body
        shape = [length // step for length, step in zip(image.shape[1:], scale, strict=True)]
        return image.new_zeros((len(image), *shape), dtype=torch.float32)
    pooled: Tensor = _POOLS[len(scale)](image.float()[None], tuple(scale))[0]
    return pooled


class DegradeResolutiond(MapTransform, InvertibleTransform):
    """Reduce the resolution of images by a whole number per axis, by averaging blocks of voxels; 2-D and 3-D.

    The affine follows: a voxel is `scale` times as long, and the first one lies (scale - 1) / 2 voxels further in, also
    where the volume is rotated; an image without an affine gets one on a grid of unit voxels. The result is float32.

    `Invertd` brings what a network gives for the low grid back to the full one, its true extent: floating maps by
    linear interpolation, classes or with `nearest_interp` by the nearest voxel. What is on the full grid already, as an
    inferer may leave it, only gets its place and its extent. With `mode` "upsampled" the grid never changes, so that
    there is nothing to bring back.

    Args:
        keys: images of shape (C, *S) in their own units (HU, 0 to 255), before windowing; every channel is averaged.
        scale: voxels per block along each axis, or one number for all axes; (1, 1, 4) averages slices for thick CT,
            and all ones leave the image as it is, as for a file that has the low resolution already.
        mode: "native" gives the small image, which saves the work; "upsampled" brings it back to the grid by linear
            interpolation, as the paper's released code does: less detail, the same work.
        pad: repeat the last voxels of an axis that its scale does not divide, which the result then covers with a
            last block, and its inverse cuts off. Without it such an image is refused, as a block of a training patch
            would show tissue that its teacher and label lack.
        align_corners: of "upsampled"; True is the released code, which stretches the image by up to (scale - 1) / 2
            voxels at its border.
        allow_missing_keys: do nothing where a key is absent.

    Raises:
        ValueError: `scale` or `mode` is none, an image has other axes than `scale`, or cannot be divided by it.
        KeyError: a key is absent.

    Reference:
        R. del Amor et al., Attention to detail: inter-resolution knowledge distillation, arXiv 2401.06010. The 3-D and
        the native form are ours.
    """

    def __init__(
        self, keys: KeysCollection, scale: int | Sequence[int], mode: Mode = "native", pad: bool = False,
        align_corners: bool = False, allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if mode not in get_args(Mode):
            raise ValueError(f"`mode` must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        if align_corners and mode != "upsampled":
            raise ValueError("`align_corners` must come with mode \"upsampled\", got mode \"native\"; leave it out.")
        self.scale = _checked_scale(scale)
        self.mode, self.pad, self.align_corners = mode, pad, align_corners

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with the images degraded."""
        result = dict(data)
        for key in self.keys:
            if key in result:
                result[key] = self._degrade(result[key], key)
            elif not self.allow_missing_keys:
                raise _missing(key, result)
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` on the grid before; shape (C, *S) of the image as it came."""
        result = dict(data)
        for key in self.key_iterator(result):
            trace = self.pop_transform(result[key])
            if self.mode == "native":
                result[key] = self._restored(result[key], trace, key)
        return result

    def _degrade(self, values: Any, key: Hashable) -> Tensor:
        image: Tensor = convert_to_tensor(values, track_meta=get_track_meta())
        scale = self._scale_of(image, key)
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        size = [-(-length // step) * step for length, step in zip(plain.shape[1:], scale, strict=True)]
        low = area_average(_filled(plain, size), scale)              # (C, *ceil(S / scale))
        native = self.mode == "native"
        if not native and max(scale) > 1:
            mode = _LINEAR[len(scale)]
            low = functional.interpolate(low[None], size, mode=mode, align_corners=self.align_corners)[0]
            low = _cropped(low, plain.shape[1:])                     # the true extent, (C, *S)
        if not isinstance(image, MetaTensor):
            return low
        degraded = MetaTensor(low, meta=image.meta, applied_operations=image.applied_operations)
        traced: Tensor = self.push_transform(   # type: ignore[no-untyped-call]
            degraded, affine=_step(scale) if native else None, orig_size=tuple(plain.shape[1:]),
            extra_info={"mode": "bilinear"},
        )
        return traced

    def _scale_of(self, image: Tensor, key: Hashable) -> tuple[int, ...]:
        """The scale of each axis of an image that can be divided by it."""
        rank = image.dim() - 1
        scale = self.scale * rank if len(self.scale) == 1 else self.scale
        shape = tuple(image.shape)
        if rank not in _POOLS or len(scale) != rank:
            expected = "2 or 3" if len(self.scale) == 1 else str(len(scale))
            raise ValueError(
                f"`{key}` must have shape (C, *S) with {expected} spatial axes, as `scale` {_told(self.scale)} has a "
                f"number for each, got {shape}; give one number per axis, 1 where nothing is averaged."
            )
        if not self.pad and any(length % step for length, step in zip(shape[1:], scale, strict=True)):
            raise ValueError(
                f"`{key}` must be divisible by `scale` {_told(scale)} along its axes, got {shape[1:]}; take a patch "
                "that is, or put DivisiblePadd before, for image and label; `pad` true repeats the last voxels of a "
                "whole image, for inference."
            )
        return scale

    def _restored(self, result: MetaTensor, trace: Mapping[str, Any], key: Hashable) -> MetaTensor:
        """What a network gave for the small image, on the full grid."""
        size = [int(length) for length in trace[TraceKeys.ORIG_SIZE]]
        scale = self.scale * len(size) if len(self.scale) == 1 else self.scale
        low = result.as_tensor()
        covered = [-(-length // step) for length, step in zip(size, scale, strict=True)]
        full = [length * step for length, step in zip(covered, scale, strict=True)]
        if list(low.shape[1:]) not in (covered, full):
            way_out = "undo what changed the grid after that first"
            if low.dim() == 1:
                way_out = "a class of the whole image has none: take a config for classes, like evaluate_classify.json"
            raise ValueError(
                f"`{key}` must have the grid of the degraded image, {covered}, to be brought back from it, or the full "
                f"one, {full}, got {list(low.shape[1:])}; {way_out}."
            )
        is_nearest = trace[TraceKeys.EXTRA_INFO]["mode"] in _NEAREST or not low.is_floating_point()
        if list(low.shape[1:]) != full and is_nearest:               # else an inferer has brought it there
            for axis, step in enumerate(scale, 1):
                low = low.repeat_interleave(step, dim=axis)          # integers stay integers
        elif list(low.shape[1:]) != full:
            low = functional.interpolate(low[None].float(), full, mode=_LINEAR[len(size)], align_corners=False)[0]
        restored = MetaTensor(_cropped(low, size).contiguous(), meta=result.meta)
        restored.applied_operations = result.applied_operations
        affine = result.affine.double()
        restored.affine = affine @ to_affine_nd(len(affine) - 1, torch.linalg.inv(_step(scale)))
        return restored


class PairResolutionsd(DegradeResolutiond):
    """Make the images of teacher and student from one: put it behind all random steps, which then hold for both.

    Two chains of random steps would show teacher and student different tissue, without any message. Windows and
    random intensity follow on both keys: MONAI's steps, such as `RandScaleIntensityd`, draw one number for all keys.

    Args:
        scale: as `DegradeResolutiond`, and so are `mode`, `pad` and `align_corners`.
        source: key of the image that random steps have changed. `Invertd` with the student's key undoes these too where
            it is the student's key.
        teacher_key: key that the image of full resolution gets, the `teacher_input` of the handler.
        student_key: key that the degraded image gets; `source` may be either of both.

    Raises:
        KeyError: there is no `source`.
        ValueError: as `DegradeResolutiond`, or both keys are one.

    Example:
        >>> pair = PairResolutionsd(scale=2)({"image": torch.rand(1, 8, 6)})
        >>> {key: tuple(image.shape) for key, image in pair.items()}
        {'image': (1, 4, 3), 'teacher_image': (1, 8, 6)}
    """

    def __init__(
        self, scale: int | Sequence[int], mode: Mode = "native", pad: bool = False, align_corners: bool = False,
        source: str = "image", teacher_key: str = "teacher_image", student_key: str = "image",
    ) -> None:
        super().__init__(student_key, scale, mode, pad, align_corners)
        if teacher_key == student_key:
            raise ValueError(f"`teacher_key` must differ from `student_key`, got {teacher_key!r} twice.")
        self.source, self.teacher_key, self.student_key = source, teacher_key, student_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Give a copy of `data` with both images."""
        if self.source not in data:
            raise _missing(self.source, data)
        result = dict(data)
        full: Tensor = convert_to_tensor(data[self.source], track_meta=get_track_meta())
        result[self.student_key] = self._degrade(full, self.source)
        result[self.teacher_key] = full.float()
        return result


def _checked_scale(scale: Any) -> tuple[int, ...]:
    values = tuple(scale) if isinstance(scale, (Sequence, Tensor)) and not isinstance(scale, str) else (scale,)
    whole = all(_is_number(value) and float(value).is_integer() and value >= 1 for value in values)
    if not whole or len(values) not in (1, 2, 3):
        raise ValueError(
            f"`scale` must be a whole number of 1 or more, one for all axes or for each of 2 or 3, got {scale!r}; "
            "such as [2, 2, 2], or [1, 1, 4] for slices of four times the thickness."
        )
    return tuple(int(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _missing(key: Hashable, data: Mapping[Hashable, Any]) -> KeyError:
    return KeyError(
        f"`{key}` must be in the data to be degraded, got the keys {sorted(map(str, data))}; load it, or name another."
    )


def _filled(image: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the last voxels of each axis up to a size."""
    for axis, length in enumerate(size, 1):
        if length > image.shape[axis]:
            index = torch.arange(length, device=image.device).clamp(max=image.shape[axis] - 1)
            image = image.index_select(axis, index)
    return image


def _cropped(image: Tensor, size: Sequence[int]) -> Tensor:
    """Cut off what was filled."""
    for axis, length in enumerate(size, 1):
        image = image.narrow(axis, 0, length)
    return image


def _step(scale: Sequence[int]) -> Tensor:
    """Affine from voxels of the low grid to those of the full one: shape (D + 1, D + 1), float64."""
    step = torch.diag(torch.tensor([*scale, 1], dtype=torch.float64))
    step[:-1, -1] = (torch.tensor(scale, dtype=torch.float64) - 1) / 2
    return step


def _told(scale: Sequence[int]) -> str:
    return "x".join(map(str, scale))
