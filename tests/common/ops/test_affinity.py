# SPDX-License-Identifier: Apache-2.0
"""Boundary maps from feature contrast, and the distance of pair affinities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from medkd.ops.affinity import affinity_distance, feature_contrast, half_directions, path_affinity
from oracles import boundary_relation as oracle

SHAPES = [(5, 7), (3, 5, 4)]
LENGTHS = (1, 2, 4)


def contrast_of(vectors: list[tuple[float, ...]], *size: int) -> list[float]:
    """Contrast of feature vectors given in C order."""
    features = torch.tensor(vectors, dtype=torch.float32).T.reshape(1, -1, *size)
    return feature_contrast(features).flatten().tolist()


def one_hot_features(label: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(label, 2).movedim(-1, 0).float().unsqueeze(0)


def affinities(boundary: Tensor, direction: tuple[int, ...], lengths: tuple[int, ...]) -> list[list[float]]:
    return [path_affinity(boundary, direction, length).flatten().tolist() for length in lengths]


def labels_with_ignored_voxels(*shape: int) -> Tensor:
    label = torch.randint(0, 3, (2, 1, *shape))
    label[torch.rand(label.shape) < 0.05] = -1
    return label


# ---- contrast ------------------------------------------------------------------------------------------------------


def test_contrast_is_the_mean_over_the_existing_neighbors() -> None:
    assert contrast_of([(1, 0), (2, 0), (0, 3), (0, 1)], 1, 4) == pytest.approx([0, 0.25, 0.25, 0])


def test_a_dead_vector_contrasts_a_quarter_with_a_live_one() -> None:
    expected = [0.146447, 0.146447, 0.198223, 0.25]
    assert contrast_of([(1, 0), (1, 1), (0, 1), (0, 0)], 1, 4) == pytest.approx(expected, abs=1e-6)


def test_contrast_of_a_label_pattern_matches_the_values_by_hand() -> None:
    features = one_hot_features(torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1]]))
    expected = [[0, 1 / 3, 1 / 4], [1 / 6, 3 / 8, 0], [0, 1 / 3, 1 / 4]]
    torch.testing.assert_close(feature_contrast(features)[0, 0], torch.tensor(expected, dtype=torch.float32))


def test_contrast_around_a_single_voxel_in_a_volume_matches_the_values_by_hand() -> None:
    label = torch.zeros(2, 2, 2, dtype=torch.long)
    label[0, 0, 0] = 1
    expected = [0.5, 1 / 6, 1 / 6, 0, 1 / 6, 0, 0, 0]
    assert feature_contrast(one_hot_features(label)).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_contrast_equals_the_loop_over_voxels(shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 3, *shape, dtype=torch.float64)
    features[:, :, 1, 2] = 0.0
    expected = np.stack([oracle.contrast_by_loops(sample) for sample in features.numpy()])
    np.testing.assert_allclose(feature_contrast(features)[:, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_contrast_and_its_gradient_equal_autograd_of_the_plain_formula(shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 1, *shape, dtype=torch.float64)
    ours, plain = feature_contrast(features), oracle.contrast(features)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(value, features, pull)[0] for value in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (1, 3, 2)])
def test_contrast_passes_gradcheck(shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(feature_contrast, features)


def test_contrast_ignores_the_length_of_every_vector() -> None:
    features = torch.randn(1, 4, 3, 5, 4)
    torch.testing.assert_close(
        feature_contrast(features * (torch.rand(1, 1, 3, 5, 4) + 0.1)), feature_contrast(features)
    )


def test_contrast_ignores_rotation_order_and_zero_padding_of_the_channels() -> None:
    features = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    expected = feature_contrast(features)
    torch.testing.assert_close(feature_contrast(torch.einsum("ij,bjhw->bihw", rotation, features)), expected)
    torch.testing.assert_close(feature_contrast(features[:, [2, 0, 3, 1]]), expected)
    torch.testing.assert_close(feature_contrast(torch.cat([features, torch.zeros_like(features)], 1)), expected)


def test_contrast_of_a_volume_of_depth_one_equals_two_dimensions() -> None:
    features = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(feature_contrast(features.unsqueeze(2)).squeeze(2), feature_contrast(features))


@pytest.mark.parametrize("features", [torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.ones(1, 3, 1, 1)])
def test_zero_and_constant_features_have_no_boundary_and_no_gradient(features: Tensor) -> None:
    features = features.clone().requires_grad_()
    boundary = feature_contrast(features)
    boundary.sum().backward()
    assert boundary.abs().max() < 1e-6
    assert features.grad is not None
    assert features.grad.abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e15])
def test_small_and_large_activations_keep_contrast_and_gradient_finite(scale: float) -> None:
    features = torch.randn(1, 3, 4, 5)
    scaled = (features * scale).requires_grad_()
    boundary = feature_contrast(scaled)
    boundary.sum().backward()
    torch.testing.assert_close(boundary, feature_contrast(features), atol=1e-5, rtol=1e-4)
    assert scaled.grad is not None
    assert scaled.grad.isfinite().all()


def test_a_vector_as_long_as_eps_is_alive_and_a_shorter_one_is_dead() -> None:
    features = torch.tensor([[[[0.5, 0.0]], [[0.0, 0.5]]]])
    assert feature_contrast(features, eps=0.5).flatten().tolist() == [0.5, 0.5]
    assert feature_contrast(features, eps=0.51).flatten().tolist() == [0.0, 0.0]


def test_maps_too_large_for_all_channels_at_once_give_the_same() -> None:
    features = torch.randn(1, 3, 600, 300, dtype=torch.float64, requires_grad=True)   # two channels, then one
    pull = torch.randn(1, 1, 600, 300, dtype=torch.float64)
    ours, plain = feature_contrast(features), oracle.contrast(features)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, features, pull)[0] for value in (ours, plain)))


def test_half_precision_features_are_computed_in_float32() -> None:
    features = torch.randn(1, 3, 4, 5).bfloat16()
    boundary = feature_contrast(features)
    assert boundary.dtype == torch.float32
    torch.testing.assert_close(boundary, feature_contrast(features.float()))


def test_contrast_refuses_what_is_not_a_floating_map() -> None:
    with pytest.raises(ValueError, match=r"`features` must be a floating map of shape \(B, C, \*S\).*got \(2, 3, 4\)"):
        feature_contrast(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"`features` must be a floating map.*torch\.int64"):
        feature_contrast(torch.zeros(1, 2, 3, 4, dtype=torch.long))


# ---- directions and paths ------------------------------------------------------------------------------------------


def test_half_directions_are_four_in_the_plane_and_thirteen_in_space() -> None:
    assert half_directions(2) == [(0, 1), (1, -1), (1, 0), (1, 1)]
    assert half_directions(3) == oracle.directions(3)
    assert len(half_directions(3)) == 13


@pytest.mark.parametrize(
    ("direction", "one", "two"),
    [
        ((0, 1), [0.9, 0.8, 0.6, 0.5, 0.3, 0.2], [0.8, 0.5, 0.2]),
        ((1, -1), [0.7, 0.6, 0.4, 0.3], [0.4]),
        ((1, 0), [0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2]),
        ((1, 1), [0.6, 0.5, 0.3, 0.2], [0.2]),
    ],
)
def test_path_affinities_match_the_values_by_hand(
    direction: tuple[int, int], one: list[float], two: list[float]
) -> None:
    boundary = torch.tensor([[[[0, 0.1, 0.2], [0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]]])
    found = affinities(boundary, direction, (1, 2))
    assert found[0] == pytest.approx(one)
    assert found[1] == pytest.approx(two)


@pytest.mark.parametrize(("size", "lengths", "pairs"), [(4, (1,), 468), (4, (2,), 224), (24, LENGTHS, 439_052)])
def test_a_cube_has_the_expected_number_of_pairs(size: int, lengths: tuple[int, ...], pairs: int) -> None:
    boundary = torch.zeros(1, 1, size, size, size)
    found = [path_affinity(boundary, v, length).numel() for v in half_directions(3) for length in lengths]
    assert sum(found) == pairs


def test_pairs_around_one_corner_voxel_match_the_counts_by_hand() -> None:
    boundary = torch.tensor([0.5, 0.5, 0.5, 0, 0.5, 0, 0, 0]).view(1, 1, 2, 2, 2)
    found = [a for v in half_directions(3) for values in affinities(boundary, v, (1,)) for a in values]
    assert (len(found), sum(a < 1 for a in found), sum(found)) == (28, 22, 17)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 4), (1, 4, 3), (2, 2, 2)])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_path_affinities_equal_one_minus_the_maximum_of_slices(shape: tuple[int, ...], length: int) -> None:
    boundary = torch.rand(2, 1, *shape)
    for direction in half_directions(len(shape)):
        torch.testing.assert_close(
            path_affinity(boundary, direction, length), oracle.path_affinity(boundary, direction, length)
        )


def test_affinity_lies_between_zero_and_one_and_falls_with_the_length() -> None:
    boundary = torch.rand(2, 1, 6, 7, 8)
    for direction in half_directions(3):
        previous = 1 - boundary
        for length in (1, 2, 3, 4):
            affinity = path_affinity(boundary, direction, length)
            kept = tuple(slice(1, None) if v < 0 else slice(None, -1) if v > 0 else slice(None) for v in direction)
            assert affinity.min() >= 0
            assert affinity.max() <= 1
            assert (affinity <= previous[:, :, *kept]).all()
            previous = affinity


def test_raising_one_boundary_voxel_raises_no_affinity() -> None:
    low = torch.rand(1, 1, 5, 6)
    high = low.clone()
    high[0, 0, 2, 3] += 0.3
    for direction in half_directions(2):
        for length in LENGTHS:
            assert (path_affinity(high, direction, length) <= path_affinity(low, direction, length)).all()


# ---- distance ------------------------------------------------------------------------------------------------------


def a_row() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and label on a grid of 1 x 6, in float64."""
    values = [0.1, 0.2, 0.4, 0.3, 0, 0], [0, 0.6, 0.6, 0, 0, 0.1], [0, 0, 1, 1, 1, 1]
    student, teacher, label = (torch.tensor(v, dtype=torch.float64).view(1, 1, 1, 6) for v in values)
    return student, teacher, label.long()


def test_distance_on_a_row_matches_the_values_by_hand() -> None:
    student, teacher, label = a_row()
    a_teacher, a_student = (sum(affinities(maps, (0, 1), LENGTHS), []) for maps in (teacher, student))
    assert a_teacher == pytest.approx([0.4, 0.4, 0.4, 1, 0.9, 0.4, 0.4, 0.4, 0.9, 0.4, 0.4])
    assert a_student == pytest.approx([0.8, 0.6, 0.6, 0.7, 1, 0.6, 0.6, 0.6, 0.7, 0.6, 0.6])
    assert affinity_distance(student, teacher).item() == pytest.approx(0.0527273, abs=1e-7)
    assert affinity_distance(student, teacher, label).item() == pytest.approx(0.0516667, abs=1e-7)
    assert affinity_distance(student, teacher, label).item() == pytest.approx((0.04 + 0.19 / 3) / 2)


def test_of_equal_maxima_on_a_path_the_first_takes_the_gradient() -> None:
    student, teacher = torch.tensor([[[[0.5, 0.5, 0.0]]]], requires_grad=True), torch.zeros(1, 1, 1, 3)
    affinity_distance(student, teacher, lengths=(1,)).backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == [0.5, 0.5, 0.0]      # the means over two pairs: 2 * 0.5 / 2 for each


@pytest.mark.parametrize("other", [256, 511, 1000])
def test_labels_may_be_larger_than_a_byte(other: int) -> None:
    student, teacher, label = a_row()
    expected = affinity_distance(student, teacher, label)
    torch.testing.assert_close(affinity_distance(student, teacher, label * other), expected)


def test_a_thin_structure_between_two_equal_ends_makes_the_pair_cross() -> None:
    student, teacher = torch.tensor([0.0, 0.4, 0.2]).view(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    label = torch.tensor([0, 1, 0]).view(1, 1, 1, 3)
    # all three pairs cross, so there is one mean; looking at the ends alone would give two, each weighing a half
    assert affinity_distance(student, teacher, label, (1, 2)).item() == pytest.approx(0.16)
    label[..., 1] = 0
    assert affinity_distance(student, teacher, label, (1, 2)).item() == pytest.approx(0.16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("labeled", [True, False])
def test_distance_equals_the_loop_over_pairs(shape: tuple[int, ...], labeled: bool) -> None:
    student, teacher = torch.rand(2, 2, 1, *shape, dtype=torch.float64).unbind()
    label = labels_with_ignored_voxels(*shape) if labeled else None
    expected = oracle.affinity_distance_by_loops(
        student[:, 0].numpy(), teacher[:, 0].numpy(), None if label is None else label[:, 0].numpy()
    )
    assert affinity_distance(student, teacher, label).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(9, 7), (7, 5, 6), (1, 6, 7)])
@pytest.mark.parametrize("lengths", [(1,), (2, 3), LENGTHS])
def test_distance_and_its_gradient_equal_autograd_of_the_plain_formula(
    shape: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    student = torch.rand(2, 1, *shape, dtype=torch.float64, requires_grad=True)
    teacher, label = torch.rand(2, 1, *shape, dtype=torch.float64), labels_with_ignored_voxels(*shape)
    ours = affinity_distance(student, teacher, label, lengths)
    plain = oracle.affinity_distance(student, teacher, label, lengths)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 3)])
def test_distance_passes_gradcheck(shape: tuple[int, ...]) -> None:
    student = torch.rand(2, 1, *shape, dtype=torch.float64, requires_grad=True)
    teacher, label = torch.rand(2, 1, *shape, dtype=torch.float64), torch.randint(0, 2, (2, 1, *shape))
    assert torch.autograd.gradcheck(lambda maps: affinity_distance(maps, teacher, label), student)


@pytest.mark.parametrize(("labeled", "expected"), [(True, 0.194146), (False, 0.204423)])
def test_binary_divergence_on_a_row_matches_the_values_by_hand(labeled: bool, expected: float) -> None:
    student = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.0, 0.0]).double().view(1, 1, 1, 6)
    teacher = torch.tensor([0.0, 0.6, 0.6, 0.0, 0.0, 0.1]).double().view(1, 1, 1, 6)
    label = torch.tensor([0, 0, 1, 1, 1, 1]).view(1, 1, 1, 6) if labeled else None
    value = affinity_distance(student, teacher, label, LENGTHS, divergence="binary_kl")
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(9, 7), (7, 5, 6), (1, 6, 7)])
def test_binary_divergence_and_its_gradient_equal_autograd_of_the_plain_formula(shape: tuple[int, ...]) -> None:
    student, teacher = torch.rand(2, 2, 1, *shape, dtype=torch.float64)
    student.flatten()[:3] = torch.tensor([0.0, 1.0, 1e-6])         # outside the clamp: a value, but no gradient
    student.requires_grad_()
    label = torch.randint(0, 2, (2, 1, *shape))
    ours = affinity_distance(student, teacher, label, divergence="binary_kl")
    plain = oracle.affinity_distance(student, teacher, label, divergence="binary_kl")
    torch.testing.assert_close(ours, plain)
    found, expected = (torch.autograd.grad(value, student)[0] for value in (ours, plain))
    torch.testing.assert_close(found, expected)


def test_an_unknown_divergence_is_refused() -> None:
    maps = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"`divergence` must be one of \('squared', 'binary_kl'\), got 'l1'"):
        affinity_distance(maps, maps, divergence="l1")   # type: ignore[arg-type]


def test_equal_maps_have_no_distance_and_no_gradient() -> None:
    student = torch.rand(1, 1, 5, 6, 7, requires_grad=True)
    distance = affinity_distance(student, student.detach(), torch.randint(0, 3, (1, 1, 5, 6, 7)))
    distance.backward()
    assert distance.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_flips_axis_swaps_and_quarter_turns_leave_the_distance() -> None:
    maps = [*torch.rand(2, 1, 1, 5, 6, 7, dtype=torch.float64), torch.randint(0, 2, (1, 1, 5, 6, 7))]
    expected = affinity_distance(*maps)
    for change in (
        lambda x: x.flip(2), lambda x: x.flip((3, 4)), lambda x: x.transpose(2, 4), lambda x: x.rot90(1, (3, 4))
    ):
        torch.testing.assert_close(affinity_distance(*map(change, maps)), expected)


def test_moving_voxels_around_changes_the_distance() -> None:
    student, teacher = torch.rand(2, 1, 1, 6, 6)
    order = torch.randperm(36)
    moved = [maps.flatten(2)[..., order].view_as(maps) for maps in (student, teacher)]
    assert abs(affinity_distance(*moved) - affinity_distance(student, teacher)) > 1e-4


def test_distance_of_volumes_of_depth_one_equals_two_dimensions() -> None:
    maps = [*torch.rand(2, 2, 1, 5, 7), torch.randint(0, 3, (2, 1, 5, 7))]
    torch.testing.assert_close(affinity_distance(*(m.unsqueeze(2) for m in maps)), affinity_distance(*maps))


def test_pairs_are_pooled_over_the_batch() -> None:
    student, teacher = torch.rand(2, 2, 1, 5, 6, dtype=torch.float64)
    label = torch.zeros(2, 1, 5, 6, dtype=torch.long)
    label[1, 0, :2] = 1                                            # only the second sample has crossing pairs
    expected = oracle.affinity_distance(student, teacher, label)
    torch.testing.assert_close(affinity_distance(student, teacher, label), expected)
    single = torch.stack([affinity_distance(student[i : i + 1], teacher[i : i + 1], label[i : i + 1]) for i in (0, 1)])
    assert abs(single.mean() - expected) > 1e-6


@pytest.mark.parametrize("label", [torch.full((1, 1, 4, 4), -1), torch.full((1, 1, 4, 4), -1).float()])
def test_nothing_but_ignored_voxels_gives_zero_with_zero_gradient(label: Tensor) -> None:
    student = torch.rand(1, 1, 4, 4, requires_grad=True)
    distance = affinity_distance(student, torch.rand(1, 1, 4, 4), label)
    distance.backward()
    assert distance.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_a_map_too_small_for_any_pair_gives_zero_with_zero_gradient() -> None:
    student = torch.rand(1, 1, 1, 1, requires_grad=True)
    distance = affinity_distance(student, torch.rand(1, 1, 1, 1))
    distance.backward()
    assert distance.item() == 0
    assert student.grad is not None
    assert student.grad.item() == 0


def test_without_labels_no_voxel_is_ignored_whatever_the_ignored_label_is() -> None:
    student, teacher = torch.rand(2, 1, 1, 5, 5)
    torch.testing.assert_close(affinity_distance(student, teacher, ignore=0), affinity_distance(student, teacher))


def test_an_ignored_label_may_be_negative_and_changes_at_ignored_voxels_do_not_count() -> None:
    student, teacher = torch.rand(2, 1, 1, 6, 6)
    label = torch.randint(0, 2, (1, 1, 6, 6))
    label[..., 4:, :] = -1
    expected = affinity_distance(student, teacher, label, ignore=-1)
    changed = student.clone()
    changed[..., 4:, :] = 0.9
    torch.testing.assert_close(affinity_distance(changed, teacher, label, ignore=-1), expected)


def test_the_teacher_map_gets_no_gradient() -> None:
    student, teacher = (torch.rand(1, 1, 4, 4, requires_grad=True) for _ in range(2))
    affinity_distance(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not affinity_distance(student.detach(), teacher).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_distance_has_at_least_the_precision_of_float32_and_the_teacher_may_differ(dtype: torch.dtype) -> None:
    student, teacher = torch.rand(2, 1, 1, 6, 5).to(dtype)
    student = student.float().requires_grad_()
    expected = affinity_distance(student, teacher.float())
    torch.testing.assert_close(affinity_distance(student, teacher), expected)
    assert affinity_distance(student.to(dtype), teacher).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("lengths", [(), (0, 1), (2, 1), (1, 1)])
def test_lengths_that_do_not_ascend_are_refused(lengths: tuple[int, ...]) -> None:
    maps = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match="`lengths` must be ascending positive numbers of voxels, got"):
        affinity_distance(maps, maps, lengths=lengths)


def test_maps_of_other_grids_are_refused() -> None:
    maps = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match="`student` and `teacher` must share batch and spatial shape"):
        affinity_distance(maps, torch.rand(1, 1, 4, 5))
    with pytest.raises(ValueError, match=r"Both maps must have one channel, got 1 \(`student`\) and 2"):
        affinity_distance(maps, torch.rand(1, 2, 4, 4))
    with pytest.raises(ValueError, match="`student` and `label` must share batch and spatial shape"):
        affinity_distance(maps, maps, torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match=r"`label` must have shape \(B, 1, \*S\)"):
        affinity_distance(maps, maps, torch.zeros(1, 4, 4))
