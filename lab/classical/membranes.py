# SPDX-License-Identifier: Apache-2.0
"""Neurons in EM: dark ridges are membranes; affinities across them are low, and waterz merges what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage import feature

from lab.classical.case import Case, Rule, Segment
from medkd.inference.partition import instances

__all__ = ["RULE"]

hessian_matrix: Any = feature.hessian_matrix       # untyped
hessian_matrix_eigvals: Any = feature.hessian_matrix_eigvals

_OFFSETS = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))


def _ridges(_training: Sequence[Case], _classes: int) -> Segment:
    """A pair's affinity is 1 less the larger ridge at its two ends: the Hessian's largest eigenvalue.

    `sigma`, in voxels, is the Hessian's, `share` the part of the ridge's values that is below 1, `threshold` that of
    waterz.
    """

    def segment(case: Case, sigma: float, share: float, threshold: float) -> NDArray[np.int32]:
        hessian = hessian_matrix(case.image, sigma=sigma, mode="nearest", use_gaussian_derivatives=False)
        ridge = hessian_matrix_eigvals(hessian)[0].clip(min=0)
        ridge = (ridge / max(float(np.quantile(ridge, share)), 1e-6)).clip(max=1).astype(np.float32)
        affinities = np.zeros((3, *ridge.shape), np.float32)
        for channel in range(3):
            both = np.swapaxes(ridge, 0, channel), np.swapaxes(affinities[channel], 0, channel)
            both[1][1:] = 1 - np.maximum(both[0][1:], both[0][:-1])
        found: NDArray[np.int32] = instances(affinities, _OFFSETS, method="waterz", threshold=threshold)
        return found

    return segment


RULE = Rule(_ridges, {"sigma": (1.5, 2.0), "share": (0.9, 0.97), "threshold": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)})
