# SPDX-License-Identifier: Apache-2.0
"""Classes of pictures by color and texture: public filters on what a student sees, and a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from lab.classical.case import Case, Rule, Segment

__all__ = ["RULE", "features"]

LEVELS = 16                                # of gray, for pairs of neighbors
_pairs: Any = graycomatrix                 # untyped, as are the others
_property: Any = graycoprops
_patterns: Any = local_binary_pattern
PROPERTIES = ("contrast", "homogeneity", "energy", "correlation")
Floats = NDArray[np.float64]


def features(image: NDArray[np.float32]) -> Floats:
    """Describe a picture (3, H, W), 0 to 1: colors, local binary patterns, pairs of gray levels, gradients."""
    gray = image.mean(0)
    colors = image.reshape(3, -1)
    apart = colors - colors.mean(1, keepdims=True)
    told = [colors.mean(1), colors.std(1), np.cbrt((apart**3).mean(1)), [(apart[0] * apart[2]).mean()]]
    for radius in (1, 2):
        patterns = _patterns(np.uint8(255 * gray), 8, radius, "uniform")
        told.append(np.bincount(patterns.astype(int).ravel(), minlength=10) / patterns.size)
    steps = [step for step in (1, 2, 4) if step < min(gray.shape)]
    levels = np.minimum(gray * LEVELS, LEVELS - 1).astype(np.uint8)
    pairs = _pairs(levels, steps, np.arange(4) * np.pi / 4, LEVELS, symmetric=True, normed=True)
    told += [_property(pairs, name).mean(1) for name in PROPERTIES]
    slopes = np.hypot(*np.gradient(gray))
    told += [[slopes.mean(), slopes.std()], np.percentile(slopes, (50, 90, 99))]
    return np.nan_to_num(np.concatenate(told).astype(np.float64))


def _linear(training: Sequence[Case], classes: int) -> Segment:
    """Ridge regression of the classes on standardized features; `penalty` per training case."""
    found = np.stack([features(case.image) for case in training])                # (N, F)
    truth = np.eye(classes)[[int(np.asarray(case.label)) for case in training]]  # (N, K)
    middle, spread = found.mean(0), found.std(0) + 1e-9
    known = (found - middle) / spread
    fits: dict[float, Floats] = {}

    def segment(case: Case, penalty: float) -> NDArray[np.float64]:
        if penalty not in fits:
            gram = known.T @ known + penalty * len(known) * np.eye(known.shape[1])
            fits[penalty] = np.linalg.solve(gram, known.T @ (truth - truth.mean(0)))
        scores: Floats = truth.mean(0) + ((features(case.image) - middle) / spread) @ fits[penalty]
        return scores                                                            # (K,)

    return segment


RULE = Rule(_linear, {"penalty": (0.001, 0.01, 0.1, 1.0, 10.0)}, uses_training=True)
