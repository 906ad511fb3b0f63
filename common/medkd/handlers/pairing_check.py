# SPDX-License-Identifier: Apache-2.0
"""Whether teacher and student see one tissue at the resolutions that were agreed, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from ignite.engine import Engine, Events
from torch import Tensor

__all__ = ["PairingCheck"]

Mode = Literal["native", "upsampled"]


class PairingCheck:
    """Raise in the first step unless the teacher's image has `scale` times the voxels of the student's.

    Shapes tell a wrong factor, a chain that crops one image only, or a size that leaves a rest; that both show the same
    tissue is up to the transform that makes both, `medkd.inference.degradation.PairResolutionsd`.

    Args:
        scale: voxels of the teacher per voxel of the student along each axis, or one number for all axes.
        mode: "native", or "upsampled", where both images have the same grid.
        student_key: key of the student's image in a batch, shape (B, C, *S).
        teacher_key: key of the teacher's image.
        stride: voxels of the student per cell of a layer, along each axis or for all: the one that is compared, or the
            deepest one of a network that cannot take a rest.

    Raises:
        KeyError: in the first step, a key is not in the batch.
        ValueError: in the first step, sizes do not fit; before, `mode`, `scale` or `stride` is none.
    """

    def __init__(
        self, scale: int | Sequence[int], mode: Mode = "native", student_key: str = "image",
        teacher_key: str = "teacher_image", stride: int | Sequence[int] = 1,
    ) -> None:
        self.scale = (scale,) if isinstance(scale, int) else tuple(scale)
        self.stride = (stride,) if isinstance(stride, int) else tuple(stride)
        if mode not in get_args(Mode):
            raise ValueError(f"`mode` must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        for name, values in (("scale", self.scale), ("stride", self.stride)):
            if not values or any(not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f"`{name}` must be whole numbers of 1 or more, got {values!r}.")
        self.mode, self.student_key, self.teacher_key = mode, student_key, teacher_key
        self._is_due = True

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def _start(self, _engine: Any) -> None:
        self._is_due = True                                        # a resumed run counts on from its last step

    def __call__(self, engine: Any) -> None:
        """Look at the batch of a run's first step."""
        if not self._is_due:
            return
        self._is_due = False
        batch = engine.state.batch
        for key in (self.student_key, self.teacher_key):
            if key not in batch:
                raise KeyError(
                    f"`{key}` must be in the batch, got the keys {sorted(map(str, batch))}; make both images by "
                    "`PairResolutionsd` behind the random transforms."
                )
        student, teacher = batch[self.student_key], batch[self.teacher_key]
        self._check_sizes(student, teacher)
        own = tuple(student.shape[2:])
        stride = self._per_axis("stride", self.stride, len(own))
        if any(length % step for length, step in zip(own, stride, strict=True)):
            raise ValueError(
                f"`{self.student_key}` must be divisible by the stride {stride} of the layer, got {own}; take another "
                "patch, or a network of smaller stride."
            )

    def _check_sizes(self, student: Tensor, teacher: Tensor) -> None:
        own = tuple(student.shape[2:])
        scale = self._per_axis("scale", self.scale, len(own))
        factor = scale if self.mode == "native" else (1,) * len(scale)
        wanted = tuple(length * step for length, step in zip(own, factor, strict=True))
        if tuple(teacher.shape[2:]) != wanted or len(teacher) != len(student):
            relation = f"{scale} times" if self.mode == "native" else "the size of"
            raise ValueError(
                f"`{self.teacher_key}` must have {relation} `{self.student_key}`, {wanted} for {own} in a batch of "
                f"{len(student)}, got {tuple(teacher.shape[2:])} in one of {len(teacher)}; give `scale` and `mode` "
                "of the transform that makes both, and sizes that `scale` divides."
            )

    @staticmethod
    def _per_axis(name: str, values: tuple[int, ...], axes: int) -> tuple[int, ...]:
        values = values * axes if len(values) == 1 else values
        if len(values) != axes:
            raise ValueError(f"`{name}` must have a number for each of {axes} spatial axes, got {values}.")
        return values
