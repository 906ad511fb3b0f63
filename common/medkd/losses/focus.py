# SPDX-License-Identifier: Apache-2.0
"""Whether attention maps show more than a single voxel: said in the log, as a loss of them would be nearly silent."""

from __future__ import annotations

import logging

from torch import Tensor

from medkd.ops.attention import effective_voxels

__all__ = ["FocusCheck"]

logger = logging.getLogger(__name__)
_FEW = 2.0                          # voxels; a map of fewer belongs to one of them


class FocusCheck:
    """Tells once, after the first batches, over how many voxels the teacher's attention maps are spread.

    Args:
        batches: of which the mean is told, per term.
    """

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches
        self.values: dict[str, list[float]] = {}

    def __call__(self, term: str, attention: Tensor) -> None:
        """Take notice of the teacher's map (B, 1, *S) of a term."""
        values = self.values.setdefault(term, [])
        if len(values) == self.batches:
            return
        values.append(float(effective_voxels(attention).mean()))
        if len(values) < self.batches:
            return
        mean, voxels = sum(values) / self.batches, attention[0].numel()
        log, way_out = logger.info, ""
        if voxels == 1:
            log, way_out = logger.warning, " Of one voxel there is nothing to learn; take larger patches."
        elif mean < _FEW:
            log, way_out = logger.warning, " One has nearly all of it; a smaller `exponent` shows more of the layer."
        log("The teacher's attention maps of `%s` are spread over %.1f of %d voxels.%s", term, mean, voxels, way_out)
