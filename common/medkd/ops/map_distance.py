# SPDX-License-Identifier: Apache-2.0
"""How two sets of maps differ in shape, whatever their scale: normalizations of class maps, and their distance."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from medkd.checks import check_maps, check_same_grid
from medkd.ops.precision import at_least_float32

__all__ = ["Normalization", "map_distance", "normalized_maps", "root_mean_square"]

Normalization = Literal["minmax_joint", "minmax_class", "softmax", "l2", "none"]
_FLAT = 1e-6               # of the largest magnitude: a range below it is rounding
_ROOT = 1e-12              # under the root of a mean square, whose slope at 0 would be infinite


def normalized_maps(
    maps: Tensor, normalization: Normalization = "minmax_joint", weight: Tensor | None = None,
    temperature: float = 0.01,
) -> Tensor:
    """Bring the maps of each sample to a common scale.

    | `normalization` | | |
    |---|---|---|
    | `minmax_joint` | (S - min) / (max - min), over classes and positions | ratios between classes stay |
    | `minmax_class` | the same for each class | the map of an unlikely class is as strong as the others |
    | `softmax` | softmax of S / temperature over classes and positions | |
    | `l2` | S / length of S over classes and positions | no gradient of single extreme values |
    | `none` | S | |

    The gradient flows through minimum, maximum and length; tied extremes share it. Maps whose range is below 1e-6 of
    their largest magnitude, and of `l2` maps of zeros, become 0 without a gradient: the difference of their rounding
    errors means nothing, and dividing by it would give gradients of a million.

    Args:
        maps: shape (B, C, *S), floating.
        normalization: as above.
        weight: shape (B, C or 1, *S), non-negative: where it is 0 nothing is read, and the result is 0. Lengths of
            `l2` are weighted. None where all positions count alike.
        temperature: of `softmax`, in units of the maps; 0.01 is that of the released code.

    Returns:
        Same shape, at least float32; in [0, 1] for the first three.

    Raises:
        ValueError: unknown normalization, no floating maps, a temperature that is not above 0.

    Reference:
        del Amor et al., arXiv 2401.06010, released code, which has no guards, and whose softmax cannot run: it takes
        the wrong shape. `l2`: Zagoruyko and Komodakis, arXiv 1612.03928.

    Example:
        >>> normalized_maps(torch.tensor([[[[1.0, 3.0]], [[1.0, 2.0]]]])).flatten().tolist()
        [0.0, 1.0, 0.0, 0.5]
    """
    check_maps("maps", maps)
    if normalization not in get_args(Normalization):
        raise ValueError(f"`normalization` must be one of {get_args(Normalization)}, got {normalization!r}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    maps = at_least_float32(maps)
    axes = _axes(maps, normalization)
    counted = None if weight is None else _counted(weight, axes)
    with torch.autocast(maps.device.type, enabled=False):
        if normalization == "softmax":
            entries = maps if counted is None else maps.masked_fill(~counted, -torch.inf)
            result = (entries.flatten(1) / temperature).softmax(1).view_as(maps)
        elif normalization == "l2":
            result = _unit(maps, weight, axes)
        elif normalization == "none":
            result = maps
        else:
            low, spread, flat = _range(maps, counted, axes)
            result = torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, spread))
        return result if counted is None else torch.where(counted, result, 0.0)


def map_distance(
    student: Tensor, teacher: Tensor, normalization: Normalization = "minmax_joint", weight: Tensor | None = None,
    temperature: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Distance of normalized maps, for each sample.

    The root of the mean squared difference over classes and positions, in [0, 1] with min-max; of `l2` the squared
    distance of both unit vectors, in [0, 4], and in [0, 2] where no map is negative.

    A teacher's map that is constant shows nothing: such a sample does not count, or the student would be drawn to an
    empty map; of `minmax_class` such a class counts neither.

    Args:
        student: shape (B, C, *S), floating.
        teacher: likewise, never receives a gradient.
        normalization: as in `normalized_maps`.
        weight: shape (B, C or 1, *S), non-negative; None for 1.
        temperature: of `softmax`.

    Returns:
        Shape (B,), at least 1e-6 where it is a root, as 1e-12 is added to the mean square; and which samples count,
        shape (B,), bool. The distance of those that do not is finite.

    Raises:
        ValueError: other classes or grids, or as in `normalized_maps`.

    Reference:
        del Amor et al., arXiv 2401.06010, released code.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])
        >>> distance, counts = map_distance(student, teacher)
        >>> round(distance.item(), 6), counts.tolist()
        (1.0, [True])
    """
    check_maps("student", student)
    check_same_grid("student", student, "teacher", teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"`student` must have the teacher's {teacher.shape[1]} maps, got {student.shape[1]}.")
    student = at_least_float32(student)
    teacher = teacher.detach().to(student.dtype)
    weight = None if weight is None else weight.to(student.dtype)
    axes = _axes(teacher, normalization)
    flat = _range(teacher, None if weight is None else _counted(weight, axes), axes)[2]
    if normalization == "minmax_class":
        weight = (~flat).to(student.dtype) if weight is None else weight * ~flat       # (B, C, *S)
    mine, other = (normalized_maps(maps, normalization, weight, temperature) for maps in (student, teacher))
    squares = (mine - other).square()
    if normalization == "l2":
        distance = (squares if weight is None else squares * weight).flatten(1).sum(1)
    elif weight is None:
        distance = (squares.flatten(1).mean(1) + _ROOT).sqrt()
    else:
        whole = weight.expand_as(squares).flatten(1).sum(1)
        mean = (squares * weight).flatten(1).sum(1) / torch.where(whole > 0, whole, 1.0)
        distance = (mean + _ROOT).sqrt()
    counts = ~flat.flatten(1).all(1)
    return distance, counts if weight is None else counts & (weight.flatten(1) > 0).any(1)


def root_mean_square(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Root of the mean squared difference of features, over channels, positions and the whole batch.

    Args:
        student: shape (B, C, *S), floating.
        teacher: likewise.
        weight: shape (B, 1, *S), non-negative; None for 1.

    Returns:
        A scalar, at least 1e-6, as 1e-12 is added to the mean; 0 without a gradient where all weights are 0.

    Reference:
        del Amor et al., arXiv 2401.06010, released code (feature matching, softmax regression).

    Example:
        >>> round(root_mean_square(torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0]]]])).item(), 4)
        2.1213
    """
    squares = (student - teacher.to(student.dtype)).square().mean(1, keepdim=True)     # (B, 1, *S)
    if weight is None:
        return (squares.mean() + _ROOT).sqrt()
    total = weight.sum()
    mean = (squares * weight).sum() / torch.where(total > 0, total, 1.0)
    return (mean + _ROOT).sqrt() * (total > 0)


def _axes(maps: Tensor, normalization: str) -> tuple[int, ...]:
    return tuple(range(2 if normalization == "minmax_class" else 1, maps.dim()))


def _counted(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Where a weight is above 0; everywhere where nothing is, as a minimum of nothing would be infinite."""
    counted = weight > 0
    return counted | ~counted.amax(axes, keepdim=True)


def _range(maps: Tensor, counted: Tensor | None, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum, range, and whether that is as good as none."""
    low = (maps if counted is None else maps.masked_fill(~counted, torch.inf)).amin(axes, keepdim=True)
    high = (maps if counted is None else maps.masked_fill(~counted, -torch.inf)).amax(axes, keepdim=True)
    spread = high - low
    size = torch.maximum(low.abs(), high.abs()).detach()
    return low, spread, spread.detach() <= _FLAT * size


def _unit(maps: Tensor, weight: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """Maps of length 1 per sample; squares of tiny ones are safe."""
    largest = maps.detach().abs().amax(axes, keepdim=True)
    scaled = maps / torch.where(largest > 0, largest, 1.0)
    squares = scaled.square() if weight is None else scaled.square() * weight
    power = squares.sum(axes, keepdim=True)
    empty = power.detach() <= 0
    return torch.where(empty, 0.0, scaled / torch.where(empty, 1.0, power).sqrt())
