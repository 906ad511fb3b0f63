# SPDX-License-Identifier: Apache-2.0
"""Nodes and edges of the graph of instances, and relations across images by second moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medkd.ops.graph import unit_vectors
from medkd.ops.instances import (
    consecutive_labels,
    instance_numbers,
    moment_distance,
    relation_edges,
    second_moment,
    segment_mean,
)
from oracles import graph_relation as oracle

LABEL = torch.tensor([[[[1, 1, 2, 2]]]])


def known(vectors: list[tuple[float, float]]) -> Tensor:
    """Embeddings of one row of pixels, (1, 2, 1, W)."""
    return torch.tensor(vectors, dtype=torch.float32).T.reshape(1, 2, 1, -1)


TEACHER, STUDENT = known([(1, 0), (1, 0), (0, 1), (0, 1)]), known([(1, 0), (1, 0), (1, 0), (0, 1)])


def test_known_nodes_and_edges() -> None:
    (mine, present), (other, _) = segment_mean(STUDENT, LABEL), segment_mean(TEACHER, LABEL)
    assert present.tolist() == [[False, True, True]]
    lengths = (mine - other)[present].norm(dim=1)
    assert lengths.mean() == pytest.approx(0.353553, abs=1e-6)     # L_node of the specification, by norm ...
    assert lengths.square().mean() == pytest.approx(0.25)          # ... and squared
    difference = (relation_edges(mine) - relation_edges(other)).square().sum() / 2**2
    assert difference == pytest.approx(0.25)                       # L_edge


def test_known_relations_to_the_nodes_and_pixels_of_a_bank() -> None:
    bank = second_moment(torch.eye(2)[None])[0]
    nodes = [unit_vectors(segment_mean(maps, LABEL)[0][:, 1:], dim=2) for maps in (STUDENT, TEACHER)]
    assert moment_distance(nodes[0], nodes[1], bank).item() == pytest.approx(0.146447, abs=1e-6)
    pixels = [maps.flatten(2).transpose(1, 2) for maps in (STUDENT, TEACHER)]
    assert moment_distance(pixels[0], pixels[1], bank).item() == pytest.approx(0.25)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (3, 4, 5)])
def test_means_are_those_of_a_loop_over_instances(size: tuple[int, ...], background: bool) -> None:
    maps = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 4, (2, 1, *size))
    label[1][label[1] == 2] = 3
    nodes, present = segment_mean(maps, label, background)
    expected = {
        key: value for key, value in oracle.instance_means(maps, label).items() if background or key[1] > 0
    }
    assert {tuple(key) for key in present.nonzero().tolist()} == expected.keys()
    stacked = torch.stack([expected[key] for key in sorted(expected)])
    torch.testing.assert_close(nodes[present], stacked)
    assert nodes[~present].abs().sum() == 0
    force = torch.randn_like(stacked)
    gradients = [torch.autograd.grad((one * force).sum(), maps)[0] for one in (nodes[present], stacked)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_background_alone_has_no_node_and_no_gradient() -> None:
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    nodes, present = segment_mean(maps, torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    nodes.sum().backward()
    assert not present.any()
    assert maps.grad is not None
    assert maps.grad.abs().sum() == 0


def test_numbers_become_consecutive_and_background_stays() -> None:
    assert consecutive_labels(torch.tensor([0, 9, 70_000, 9])).tolist() == [0, 1, 2, 1]
    assert consecutive_labels(torch.tensor([9, 2**40])).tolist() == [1, 2]
    assert consecutive_labels(torch.tensor([-7, 0, 9, -1])).tolist() == [-1, 0, 1, -1]   # ignored stays ignored
    assert consecutive_labels(torch.tensor([-7, 9, 8])).tolist() == [-1, 2, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_whole_numbers_of_any_type_are_instances_whose_borders_are_widened_on_request(dtype: torch.dtype) -> None:
    label, like = torch.tensor([[[[7, 7, 9, 9]]]]).to(dtype), torch.zeros(1, 2, 1, 4)
    assert instance_numbers(label, like).tolist() == [[[[7, 7, 9, 9]]]]
    assert instance_numbers(label, like, widen=True).tolist() == [[[[7, 0, 0, 9]]]]
    assert instance_numbers(label, like).dtype == torch.int64


def test_numbers_of_more_than_32_bits_stay_apart() -> None:
    label = torch.tensor([[[[2**40, 1, 0]]]])
    assert torch.equal(instance_numbers(label, torch.zeros(1, 2, 1, 3)), label)


def test_an_edge_is_a_cosine_and_knows_its_norms() -> None:
    nodes = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    edges = relation_edges(nodes)
    expected = torch.nn.functional.cosine_similarity(nodes[:, :, None], nodes[:, None], dim=3)
    torch.testing.assert_close(edges, expected)
    (gradient,) = torch.autograd.grad((edges * torch.randn_like(edges)).sum(), nodes)
    torch.testing.assert_close((gradient * nodes).sum(2), torch.zeros(2, 4, dtype=torch.float64))   # nothing radial


def test_relations_by_moments_equal_those_over_all_pairs() -> None:
    student = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    teacher, others = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = moment_distance(student, teacher, second_moment(others[None])[0])
    expected = oracle.relation_distance(student, teacher, others)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(one.sum(), student)[0] for one in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    maps = torch.randn(2, 3, 4, 5).to(dtype)
    label = torch.randint(0, 3, (2, 1, 4, 5))
    torch.testing.assert_close(segment_mean(maps, label), segment_mean(maps.float(), label))
    vectors = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(second_moment(vectors), second_moment(vectors.float()))
    moment, other = torch.eye(3), vectors.flip(1)
    torch.testing.assert_close(
        moment_distance(vectors, other, moment), moment_distance(vectors.float(), other.float(), moment)
    )


def test_no_vector_at_all_has_no_moment_and_no_distance() -> None:
    nothing = torch.zeros(2, 0, 3)
    assert second_moment(nothing).tolist() == torch.zeros(2, 3, 3).tolist()
    assert moment_distance(nothing, nothing, torch.eye(3)).tolist() == [0, 0]


def test_many_images_are_one_mean_of_moments() -> None:
    student, teacher = (torch.randn(1, 4, 3, dtype=torch.float64) for _ in range(2))
    images = [torch.randn(count, 3, dtype=torch.float64) for count in (2, 7)]
    moment = torch.stack([second_moment(one[None])[0] for one in images]).mean(0)
    expected = torch.stack([oracle.relation_distance(student, teacher, one) for one in images]).mean(0)
    torch.testing.assert_close(moment_distance(student, teacher, moment), expected)


def test_the_teacher_gets_no_gradient_and_equal_networks_none() -> None:
    nodes = torch.randn(1, 4, 3, requires_grad=True)
    teacher = nodes.detach().clone().requires_grad_()
    moment = torch.eye(3, requires_grad=True)
    moment_distance(nodes, teacher, moment).sum().backward()
    assert teacher.grad is moment.grad is None
    assert nodes.grad is not None
    assert nodes.grad.abs().sum() == 0


def test_embeddings_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have one shape \(B, N, C\), got \(1, 4, 3\) and \(1, 4, 2\)"):
        moment_distance(torch.rand(1, 4, 3), torch.rand(1, 4, 2), torch.eye(3))
