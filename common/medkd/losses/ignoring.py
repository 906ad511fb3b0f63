# SPDX-License-Identifier: Apache-2.0
"""Supervised losses that do not know of ignored voxels, over the voxels that count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medkd.checks import check_maps
from medkd.ops.ignored import is_ignored, labeled_samples, on_grid

__all__ = ["IgnoringLoss"]


class IgnoringLoss(nn.Module):
    """Give a loss the voxels whose label is not negative, and nothing else.

    They are handed on as one row of voxels, so the value is exactly that over the labeled part for a loss that sums or
    averages over voxels, such as Dice and cross entropy. A loss that looks at neighbors (boundaries, distances) would
    be wrong. Where the samples of a batch differ in what is ignored, they are handed on one by one and the mean of
    their values is taken, without samples of ignored voxels alone; for a loss whose `batch` is true, as MONAI's Dice
    has it, all voxels of the batch make one sample. Without an ignored voxel the loss gets the batch as it is.

    Samples without a label (`medkd.ops.ignored.UNLABELED`) are left out before anything else, so that the value is that
    of the labeled samples alone, bit for bit; 0 where no sample has a label.

    Of predictions of whole images, (B, K), with labels (B,), (B, 1) or (B, K), samples with a negative label are left
    out.

    Args:
        loss: takes predictions (B, K, *S) and labels (B, 1, *S) or (B, K, *S), and gives a scalar.

    Example:
        >>> import torch
        >>> from monai.losses.dice import DiceCELoss
        >>> loss = IgnoringLoss(DiceCELoss(to_onehot_y=True, softmax=True))
        >>> pred, label = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 1, 4, 4))
        >>> label[..., 3] = -1
        >>> bool(torch.isclose(loss(pred, label), loss.loss(pred[..., :3], label[..., :3])))
        True
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compute the loss over the voxels that count; 0 with zero gradient where there are none.

        Raises:
            ValueError: a prediction that is no map, or labels of another grid.
        """
        pred, label = labeled_samples(whole := pred, label)
        if not len(label):
            return whole.as_subclass(Tensor).sum() * 0.0
        mask = is_ignored(label)
        if not bool(mask.any()):
            value: Tensor = self.loss(pred, label)
            return value
        if pred.dim() == 2:
            kept = ~mask.view(len(mask), -1).any(1)
            return self._of_samples(pred.as_subclass(Tensor), label.as_subclass(Tensor), kept)
        check_maps("pred", pred)
        pred, label = pred.as_subclass(Tensor), label.as_subclass(Tensor)   # without MONAI's metadata
        if pred.shape[2:] != label.shape[2:]:
            raise ValueError(
                f"`label` must have the prediction's size {tuple(pred.shape[2:])} where voxels are ignored, got "
                f"{tuple(label.shape[2:])}; resize it with mode 'nearest'."
            )
        counted = ~on_grid(mask, label.shape[2:]).flatten(1)       # (B, N)
        samples = zip(pred.flatten(2).chunk(len(pred)), label.flatten(2).chunk(len(pred)), counted, strict=True)
        pairs = [
            (p[:, :, None, kept], y[:, :, None, kept])             # (1, K, 1, n)
            for p, y, kept in samples
            if bool(kept.any())
        ]
        if not pairs:
            return pred.sum() * 0.0
        same = bool((counted == counted[:1]).all())
        pooled = any(getattr(part, "batch", False) is True for part in self.loss.modules())
        if same or pooled:
            preds, labels = zip(*pairs, strict=True)
            axis = 0 if same else 3
            pairs = [(torch.cat(preds, axis), torch.cat(labels, axis))]
        values = [self.loss(*pair) for pair in pairs]
        return torch.stack(values).mean()

    def _of_samples(self, pred: Tensor, label: Tensor, kept: Tensor) -> Tensor:
        if not bool(kept.any()):
            return pred.sum() * 0.0
        value: Tensor = self.loss(pred[kept], label[kept])
        return value
