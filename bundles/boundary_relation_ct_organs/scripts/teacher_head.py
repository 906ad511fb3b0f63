# SPDX-License-Identifier: Apache-2.0
"""The teacher's boundary head, trained on top of the frozen teacher (preset `paper`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medkd.handlers.teacher import Teacher
from medkd.handlers.teacher_fitting import TeacherLayers
from medkd.losses.boundary_head import BoundaryHead
from medkd.losses.boundary_relation import boundary_grid
from medkd.ops.resample import pool_or_interpolate

__all__ = ["TeacherBoundary"]


class TeacherBoundary(BoundaryHead):
    """A network that is the frozen teacher followed by a boundary head; its weights are the head's alone, and
    `teacher_sha256`, the hash of the teacher's file.

    Args:
        teacher: loaded here, and from then on frozen.
        channels: channels of the tapped levels.
        taps: encoder layers of the teacher, as `boundary_taps` of the loss.
        boundary_cells: as in the loss.
        spatial_dims: 2 or 3.
    """

    def __init__(
        self,
        teacher: Teacher,
        channels: Sequence[int],
        taps: Sequence[str],
        boundary_cells: int = 131_072,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__(channels, spatial_dims)
        self.frozen = TeacherLayers(teacher, taps)
        self.register_buffer("teacher_sha256", self.frozen.sha256)
        self.boundary_cells = boundary_cells

    def forward(self, image: Tensor) -> Tensor:   # type: ignore[override]
        """Boundary map of an image (B, C, *S): on the boundary grid in training, else of shape (B, 1, *S)."""
        levels = [level.float() for level in self.frozen(image)]
        boundary = super().forward(levels, boundary_grid(levels, self.boundary_cells))
        return boundary if self.training else pool_or_interpolate(boundary, image.shape[2:])
