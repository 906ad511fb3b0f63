# SPDX-License-Identifier: Apache-2.0
"""How many voxels each instance of a prediction shares with each of a label, and scores made of that table alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medkd.taps import plain_tensor

__all__ = [
    "Contingency", "adapted_rand_error", "aggregated_jaccard", "contingency", "count_difference", "panoptic_quality",
    "symmetric_best_dice", "variation_of_information",
]

Ints = NDArray[np.int64]
TABLE = 4  # values below so many times their count are numbered by a table, larger ones by sorting, which is slower


@dataclass(frozen=True, eq=False)
class Contingency:
    """Voxels that the instances of a prediction share with those of a label.

    Only pairs that share a voxel are stored. Pair `k` is the instances `pred_ids[pred_index[k]]` and
    `label_ids[label_index[k]]`, and shares `counts[k]` voxels. Index 0 is background, also where there is none.

    Args:
        pred_ids, label_ids: ids of each side, ascending, 0 first. Shapes (P + 1,) and (L + 1,).
        pred_sizes, label_sizes: voxels of each, anywhere in the map. The same shapes.
        pred_index, label_index: places of a pair in these. Shape (N,), the same for `counts`.
        counts: 1 or more.
    """

    pred_ids: NDArray[Any]
    label_ids: NDArray[Any]
    pred_sizes: Ints
    label_sizes: Ints
    pred_index: Ints
    label_index: Ints
    counts: Ints

    @property
    def instances(self) -> tuple[int, int]:
        """How many instances the prediction and the label have, P and L."""
        return len(self.pred_ids) - 1, len(self.label_ids) - 1


def contingency(pred: Tensor | NDArray[Any], label: Tensor | NDArray[Any]) -> Contingency:
    """Count the voxels that each instance of the prediction shares with each of the label.

    Neighbors along the last axis that have the same pair of ids are counted at once, so smooth maps are fast.

    Args:
        pred: instance ids, 0 is background. Shape (*S), whole numbers of any type and size.
        label: the same of the label, 0 is background or not labeled. A voxel with a negative label is ignored: it is
            in no count, whatever is predicted there.

    Raises:
        ValueError: the shapes differ; a predicted id is negative, an id is not whole, or so large that its floating
            type may have merged it with others.

    Example:
        >>> table = contingency(np.array([7, 7, 70_000, 70_000]), np.array([0, 1, 1, 1]))
        >>> table.pred_ids.tolist(), table.label_ids.tolist(), table.pred_sizes.tolist()
        ([0, 7, 70000], [0, 1], [0, 2, 2])
        >>> list(zip(table.pred_index.tolist(), table.label_index.tolist(), table.counts.tolist()))
        [(1, 0, 1), (1, 1, 1), (2, 1, 2)]
    """
    if tuple(pred.shape) != tuple(label.shape):
        raise ValueError(
            f"`pred` and `label` must have one shape, got {tuple(pred.shape)} and {tuple(label.shape)}; resample the "
            "prediction to the label's grid."
        )
    flat_pred, flat_label = _flat(pred), _flat(label)
    if flat_label.dtype.kind in "if" and flat_label.min(initial=0) < 0:
        counted = ~(flat_label < 0)
        flat_pred, flat_label = flat_pred[counted], flat_label[counted]
    changes = (flat_pred[1:] != flat_pred[:-1]) | (flat_label[1:] != flat_label[:-1])
    starts = np.append(0, np.flatnonzero(changes) + 1)[: flat_pred.size]
    lengths = np.diff(starts, append=flat_pred.size)                                # (runs,) of one pair of ids
    pred_ids, pred_runs = _number(_checked("pred", flat_pred[starts], pred.dtype))
    label_ids, label_runs = _number(_checked("label", flat_label[starts], label.dtype))
    pairs, pair_runs = _number(pred_runs * len(label_ids) + label_runs, background=False)
    counts = _add_up(lengths, pair_runs, len(pairs))
    pred_index, label_index = np.divmod(pairs, len(label_ids))
    return Contingency(
        pred_ids, label_ids,
        _add_up(counts, pred_index, len(pred_ids)), _add_up(counts, label_index, len(label_ids)),
        pred_index, label_index, counts,
    )


def _flat(ids: Tensor | NDArray[Any]) -> NDArray[Any]:
    """One axis, on the host, of a type that NumPy has."""
    if isinstance(ids, Tensor):
        plain = plain_tensor(ids).detach().cpu()
        ids = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return ids.ravel()


def _checked(name: str, ids: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Integers of ids that came as `dtype`; raise unless they are ids."""
    floating = ids.dtype.kind == "f"
    wrong = ids[(ids < 0) | (ids != np.floor(ids))] if floating else ids[ids < 0]
    if wrong.size:
        raise ValueError(f"`{name}` must have whole ids of 0 or more, got {wrong[0]}; 0 is background or not labeled.")
    if floating:
        limit = 2 / float((torch.finfo if isinstance(dtype, torch.dtype) else np.finfo)(dtype).eps)
        if ids.max(initial=0) >= limit:
            raise ValueError(
                f"`{name}` must have ids below {limit:.0f} as long as they are {dtype}, which has the same number for "
                f"several larger ones, got {ids.max():.0f}; load and keep ids as integers."
            )
    return ids if ids.dtype.kind in "iu" else ids.astype(np.int64)


def _number(values: NDArray[Any], background: bool = True) -> tuple[NDArray[Any], Ints]:
    """The values that occur, ascending (0 always, if it is background), and for each value its place among them."""
    if background:
        values = np.append(values, values.dtype.type(0))               # goes again at the end
    if int(values.max(initial=0)) < TABLE * len(values):
        present = np.bincount(values.astype(np.int64)) > 0
        found, numbers = np.flatnonzero(present), (np.cumsum(present) - 1)[values]
    else:
        found, numbers = np.unique(values, return_inverse=True)
    return found, numbers[:-1] if background else numbers


def _add_up(voxels: Ints, index: Ints, length: int) -> Ints:
    """Sum of the voxels per index, exact up to 2^53."""
    return np.bincount(index, weights=voxels, minlength=length).astype(np.int64)


def _labeled(table: Contingency) -> tuple[Ints, Ints, NDArray[Any], NDArray[Any]]:
    """Pairs with a label: both indices and voxels, and the voxels of each prediction that have one."""
    pairs = table.label_index > 0
    preds, labels, counts = table.pred_index[pairs], table.label_index[pairs], table.counts[pairs].astype(np.float64)
    return preds, labels, counts, np.bincount(preds, weights=counts)


def variation_of_information(table: Contingency) -> tuple[float, float]:
    """Uncertainty about the one segmentation that the other one leaves, in bits, over voxels with a label.

    Equal to scikit-image's function with `ignore_labels=(0,)`: prediction 0 is a segment like the others.

    Returns:
        Split error, H(pred | label), and merge error, H(label | pred), 0 or more. Their sum is the variation of
        information. NaN for both where no voxel has a label, or one alone: it says nothing.

    Reference:
        Meilă, Comparing clusterings - an information based distance, Journal of Multivariate Analysis 98(5), 2007.
        Nunez-Iglesias et al., arXiv:1303.6163, for the two parts.

    Example:
        >>> variation_of_information(contingency(np.array([1, 1, 2, 0]), np.array([1, 1, 1, 1])))
        (1.5, 0.0)
    """
    preds, labels, counts, pred_sizes = _labeled(table)
    if counts.sum() < 2:
        return math.nan, math.nan
    share = counts / counts.sum()
    sizes = table.label_sizes[labels], pred_sizes[preds]
    split, merge = (float(share @ np.log2(size / counts)) for size in sizes)
    return split, merge


def adapted_rand_error(table: Contingency) -> float:
    """Tell how wrong pairs of voxels are: 1 - F-score of being in one segment, over voxels with a label.

    Equal to scikit-image's function: prediction 0 is a segment like the others (that of the CREMI challenge takes each
    of its voxels for a segment of its own), and a voxel is no pair with itself (that of the SNEMI3D challenge counts
    n^2 pairs of n voxels instead of n (n - 1), which differs for tiny segments only).

    Returns:
        0 (perfect) to 1; NaN where no two voxels are in one segment of either, as where no voxel has a label.

    Reference:
        Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics,
        Frontiers in Neuroanatomy 9:142, 2015.

    Example:
        >>> adapted_rand_error(contingency(np.array([1, 1, 2, 2]), np.array([1, 1, 1, 2])))
        0.6
    """
    _, _, counts, pred_sizes = _labeled(table)
    segments = counts, pred_sizes, table.label_sizes[1:].astype(np.float64)   # int64 overflows above 2^31 voxels
    both, pred, label = (float(sizes @ (sizes - 1)) for sizes in segments)    # ordered pairs in one segment
    return 1.0 - 2.0 * both / (pred + label) if pred + label else math.nan


def _says_nothing(table: Contingency) -> bool:
    """Whether there is no instance to agree about, or nothing but a voxel."""
    return not any(table.instances) or int(table.counts.sum()) < 2


def _overlaps(table: Contingency) -> tuple[Ints, Ints, Ints, Ints]:
    """Pairs of instances, without background: both indices, voxels that they share and voxels that they cover."""
    pairs = (table.pred_index > 0) & (table.label_index > 0)
    preds, labels, counts = table.pred_index[pairs], table.label_index[pairs], table.counts[pairs]
    return preds, labels, counts, table.pred_sizes[preds] + table.label_sizes[labels] - counts


def panoptic_quality(table: Contingency) -> tuple[float, float, float]:
    """Count and grade instances that are found: those with an intersection over union above one half.

    Returns:
        Panoptic quality DQ * SQ; detection quality DQ, the F-score TP / (TP + FP / 2 + FN / 2); segmentation quality
        SQ, the mean intersection over union of what is found, 0 if nothing is. 0 to 1; all are NaN where neither has an
        instance, as agreement about nothing is no quality, and in a map of a single voxel.

    Reference:
        Kirillov et al., Panoptic Segmentation, arXiv:1801.00868, equation 1.

    Example:
        >>> panoptic_quality(contingency(np.array([1, 1, 1, 0, 2, 2]), np.array([5, 5, 5, 5, 0, 8])))
        (0.375, 0.5, 0.75)
    """
    if _says_nothing(table):
        return math.nan, math.nan, math.nan
    total = sum(table.instances)
    _, _, counts, unions = _overlaps(table)
    overlaps = counts / unions
    found = overlaps[overlaps > 0.5]                # of one instance at most one, as more than half cannot be twice
    detection = 2 * len(found) / total
    segmentation = float(found.mean()) if found.size else 0.0
    return detection * segmentation, detection, segmentation


def aggregated_jaccard(table: Contingency) -> float:
    """Intersection over union of all instances taken together, each label with the prediction that fits it best.

    Labels choose in the order of their ids: the prediction of the largest intersection over union that no label before
    took (of equal ones the lowest id). Labels and predictions that are left over add to the union only. Where one
    prediction covers several labels, the value depends on that order. In the paper several labels may share a
    prediction, which then counts several times.

    Returns:
        0 to 1 (perfect), NaN where neither has an instance, and in a map of a single voxel.

    Reference:
        Kumar et al., A Dataset and a Technique for Generalized Nuclear Segmentation for Computational Pathology, IEEE
        TMI 36(7), 2017, algorithm 1.

    Example:
        >>> aggregated_jaccard(contingency(np.array([1, 1, 1, 0, 2, 2]), np.array([5, 5, 5, 5, 0, 8])))
        0.6666666666666666
    """
    if _says_nothing(table):
        return math.nan
    preds, labels, counts, unions = _overlaps(table)
    order = np.lexsort((preds, -counts / unions, labels))              # by label, then best first
    taken, served, common = set(), set(), 0
    for pred, label, count in zip(preds[order].tolist(), labels[order].tolist(), counts[order].tolist(), strict=True):
        if pred not in taken and label not in served:
            taken.add(pred)
            served.add(label)
            common += count
    return common / int(table.pred_sizes[1:].sum() + table.label_sizes[1:].sum() - common)


def symmetric_best_dice(table: Contingency) -> float:
    """Mean over instances of the best Dice with any instance of the other side; the worse of both directions.

    Returns:
        0 to 1 (perfect), NaN where neither has an instance, and in a map of a single voxel.

    Reference:
        Scharr et al., Leaf segmentation in plant phenotyping: a collation study, Machine Vision and Applications 27,
        2016.

    Example:
        >>> symmetric_best_dice(contingency(np.array([1, 1, 1, 0, 2, 2]), np.array([5, 5, 5, 0, 0, 0])))
        0.5
    """
    if _says_nothing(table):
        return math.nan
    if not all(table.instances):
        return 0.0
    preds, labels, counts, unions = _overlaps(table)
    means = []
    for index, instances in zip((preds, labels), table.instances, strict=True):
        best = np.zeros(instances + 1)
        np.maximum.at(best, index, 2 * counts / (unions + counts))
        means.append(float(best[1:].mean()))
    return min(means)


def count_difference(table: Contingency) -> float:
    """By how many instances prediction and label differ in number, |DiC|; NaN where neither has any.

    Example:
        >>> count_difference(contingency(np.array([1, 1, 2, 3]), np.array([4, 4, 0, 0])))
        2
    """
    if _says_nothing(table):
        return math.nan
    preds, labels = table.instances
    return abs(preds - labels)
