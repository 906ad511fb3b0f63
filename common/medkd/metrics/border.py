# SPDX-License-Identifier: Apache-2.0
"""How well a boundary map shows the borders of the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from torch import Tensor

from medkd.ops.border import border_auc
from medkd.ops.resample import majority_label
from medkd.taps import plain_tensor

__all__ = ["BorderAUC"]


class BorderAUC(Metric):
    """Area under the ROC curve of a boundary map against the two-voxel borders of the labels, mean over cases.

    1 is perfect, 0.5 is chance, below is inverted; a case without a border counts nothing, and without any case with
    one the value is NaN. Labels are reduced to the map's grid by majority vote.

    Args:
        output_transform: gives `(boundary, label)`, lists of tensors of shape (1, *S), from the engine's output.

    Example:
        >>> metric = BorderAUC()
        >>> metric.update(([torch.tensor([[[0.1, 0.9, 0.8, 0.2]]])], [torch.tensor([[[0, 0, 1, 1]]])]))
        >>> metric.compute()
        1.0
    """

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all cases."""
        self._sum = torch.zeros((), dtype=torch.float64)
        self._cases = torch.zeros((), dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: Sequence[Sequence[Tensor]]) -> None:
        """Add cases; `output` is `(boundary, label)`."""
        for boundary, label in zip(*output, strict=True):
            labels, _ = majority_label(plain_tensor(label)[None], boundary.shape[1:])
            value = border_auc(plain_tensor(boundary)[None], labels)
            if not math.isnan(value):
                self._sum += value
                self._cases += 1.0

    @sync_all_reduce("_sum", "_cases")
    def compute(self) -> float:
        """Mean over the cases of all ranks."""
        return float(self._sum / self._cases) if self._cases else math.nan
