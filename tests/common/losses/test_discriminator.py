# SPDX-License-Identifier: Apache-2.0
"""The discriminator and its losses: published sizes, bounded attention, formulas, and second derivatives."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medkd.losses.discriminator import Discriminator, SelfAttention, discriminator_loss, student_score_loss

FORMS = ["wgan_gp", "hinge"]


def small(rank: int = 2, seed: int = 0, layers: int = 2) -> Discriminator:
    return Discriminator(2, rank, width=4, layers=layers, seed=seed)


def a_pair(rank: int = 2, batch: int = 3) -> tuple[Tensor, Tensor]:
    size = (16, 20) if rank == 2 else (16, 16, 20)
    return torch.randn(batch, 2, *size), torch.randn(batch, 2, *size)


# ---- the network ---------------------------------------------------------------------------------------------------


def test_it_has_the_published_sizes() -> None:
    network = Discriminator(2, spatial_dims=2)
    assert sum(one.numel() for one in network.parameters()) == pytest.approx(3.18e6, rel=2e-3)
    shapes: list[tuple[int, ...]] = []
    for part in network.body:
        if not isinstance(part, nn.LeakyReLU):
            part.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert network(torch.randn(1, 2, 256, 256)).shape == (1, 1, 13, 13)
    maps = [(64, 128, 128), (128, 64, 64), (256, 32, 32), (256, 32, 32), (512, 16, 16), (512, 16, 16), (1, 13, 13)]
    assert shapes == maps
    assert [one.key.out_channels for one in network.body if isinstance(one, SelfAttention)] == [32, 64]


def test_it_has_the_size_of_the_specification_in_three_dimensions() -> None:
    assert sum(one.numel() for one in Discriminator(2).parameters()) == 11_462_531
    narrow = Discriminator(2, width=4)                             # 1 / 16 of the width, and of all convolutions
    with torch.no_grad():
        assert narrow(torch.randn(1, 2, 64, 64, 80)).shape == (1, 1, 1, 1, 2)


def test_first_values_come_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = small(), small(), small(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    states = [network.state_dict() for network in (one, same, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["body.0.bias"], states[2]["body.0.bias"])


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_changes_nothing_at_first_and_is_the_published_one_later(rank: int) -> None:
    maps = torch.randn(2, 16, *((5, 6) if rank == 2 else (3, 5, 6)))
    attention = SelfAttention(16, rank)
    assert torch.equal(attention(maps), maps)
    nn.init.constant_(attention.gain, 0.7)
    query, key, value = (part(maps).flatten(2) for part in (attention.query, attention.key, attention.value))
    energy = torch.einsum("bcn,bcm->bnm", query, key).softmax(2)
    expected = maps + 0.7 * torch.einsum("bcm,bnm->bcn", value, energy).view(maps.shape)
    torch.testing.assert_close(attention(maps), expected)


def test_attention_of_a_large_map_looks_at_averages() -> None:
    attention = SelfAttention(8, 3, most=30)
    nn.init.constant_(attention.gain, 1.0)
    sizes: list[tuple[int, ...]] = []
    attention.key.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[2:])))
    coarse = torch.randn(1, 8, 3, 2, 3)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    found, expected = attention(fine), attention(coarse)           # 144 voxels, 18 of them as averages
    assert sizes == [(3, 2, 3)] * 2
    torch.testing.assert_close(found[..., ::2, ::2, ::2], expected)


def test_memory_of_attention_grows_with_the_voxels_and_not_with_their_square() -> None:
    attention = SelfAttention(8, 2, most=64)
    kept = []
    for length in (32, 64):
        total = 0

        def note(value: Tensor) -> Tensor:
            nonlocal total
            total += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            attention(torch.randn(1, 8, length, length, requires_grad=True))
        kept.append(total)
    assert kept[1] < 4.1 * kept[0]                                 # four times the voxels
    assert kept[1] < 64**4 / 8


def test_convolutions_have_a_largest_singular_value_of_one() -> None:
    network = small(2, layers=2)
    with torch.no_grad():
        for _ in range(30):
            network(a_pair()[0])
    network.eval()
    convolutions = [one for one in network.body if isinstance(one, nn.Conv2d)]
    values = [torch.linalg.matrix_norm(one.weight.detach().flatten(1), 2).item() for one in convolutions]
    assert values[:2] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert values[2] != pytest.approx(1.0, abs=1e-3)               # the last one is free


def test_only_training_mode_iterates_and_once_for_all_passes() -> None:
    network = small()
    vector = network.body[0].parametrizations.weight[0]._u
    before = vector.clone()
    network.eval()(a_pair()[0])
    assert torch.equal(vector, before)
    twin = copy.deepcopy(network).train()
    twin(a_pair()[0])
    discriminator_loss(network.train(), *a_pair())
    assert not torch.equal(vector, before)
    assert torch.equal(vector, twin.body[0].parametrizations.weight[0]._u)


def test_scores_depend_on_the_temperature_of_the_tanh() -> None:
    logits = 8 * a_pair()[0].sign()                                # where the cold one is flat
    cold, warm = (Discriminator(2, 2, 4, 2, temperature=t).eval() for t in (1.0, 5.0))
    torch.testing.assert_close(cold(logits), warm(5 * logits))
    slopes = []
    for network in (cold, warm):
        leaf = logits.clone().requires_grad_()
        slopes.append(torch.autograd.grad(network(leaf).sum(), leaf)[0].abs().mean())
    assert slopes[1] > 1000 * slopes[0]


# ---- losses --------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Scores whose slope is known: each patch of 2 x 2 voxels has the sum of its logits, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * F.avg_pool2d(logits.sum(1, keepdim=True), 2) * 4


def test_known_answers() -> None:
    teacher, student = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    network = Linear(0.5)                                          # scores 2 and 0; a slope of 0.5 at each of 16 voxels
    values = discriminator_loss(network, teacher, student, "wgan_gp")
    assert values["penalty"].item() == pytest.approx(10 * (2.0 - 1) ** 2)
    assert values["loss"].item() == pytest.approx(0 - 2 + 10)
    assert (values["teacher"].item(), values["student"].item()) == (2.0, 0.0)
    values = discriminator_loss(network, teacher, student, "hinge")
    assert values["loss"].item() == pytest.approx(0 + 1)           # the teacher is beyond the margin
    assert values["penalty"].item() == 0
    assert student_score_loss(network(teacher)).item() == -2.0
    slope = torch.autograd.grad(discriminator_loss(network, teacher, student, "wgan_gp")["loss"], network.factor)[0]
    assert slope.item() == pytest.approx(-4 + 10 * 2 * (2.0 - 1) * 4)      # the penalty is differentiated too


@pytest.mark.parametrize("rank", [2, 3])
def test_the_penalty_is_that_of_each_sample_at_its_mixture(rank: int) -> None:
    network, (teacher, student) = small(rank).eval(), a_pair(rank)
    found = discriminator_loss(network, teacher, student, "wgan_gp", torch.Generator().manual_seed(5), 3.0)
    shares, penalties = torch.rand(3, generator=torch.Generator().manual_seed(5)), []
    for a, one, other in zip(shares, teacher, student, strict=True):
        mixed = (a * one + (1 - a) * other)[None].requires_grad_()
        slope = torch.autograd.grad(network(mixed).sum(), mixed)[0]
        penalties.append((slope.norm() - 1) ** 2)
    expected = 3.0 * torch.stack(penalties).mean()
    torch.testing.assert_close(found["penalty"], expected)
    scores = network(student).mean() - network(teacher).mean()
    torch.testing.assert_close(found["loss"], scores + expected)
    assert (found["teacher"], found["student"]) == (
        pytest.approx(network(teacher).mean().item()), pytest.approx(network(student).mean().item())
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 3])
def test_gradients_reach_all_of_the_discriminator_and_neither_network(form: str, rank: int) -> None:
    network, (teacher, student) = small(rank), a_pair(rank)
    for attention in (one for one in network.body if isinstance(one, SelfAttention)):
        nn.init.constant_(attention.gain, 0.5)
    teacher.requires_grad_()
    student.requires_grad_()
    discriminator_loss(network, teacher, student, form)["loss"].backward()   # type: ignore[arg-type]
    for name, one in network.named_parameters():
        assert one.grad is not None, name
        # a softmax does not see a constant, nor does a difference of scores
        assert one.grad.any() or name.endswith(("key.bias", "body.6.bias")), name
    assert teacher.grad is None
    assert student.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_finite_differences(form: str) -> None:
    network, (teacher, student) = small().double().eval(), a_pair()
    teacher, student = teacher.double(), student.double()
    for attention in (one for one in network.body if isinstance(one, SelfAttention)):
        nn.init.constant_(attention.gain, 0.5)

    def loss() -> Tensor:
        return discriminator_loss(network, teacher, student, form, torch.Generator().manual_seed(1))["loss"]   # type: ignore[arg-type]

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for one in list(network.parameters()):
        way = torch.randn(one.shape, generator=generator, dtype=one.dtype)
        expected = (one.grad * way).sum().item()
        ends = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                one += step * way
            ends.append(loss().item())
        with torch.no_grad():
            one += 1e-6 * way
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_it_learns_to_tell_two_kinds_of_predictions(form: str) -> None:
    network = small()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    gaps = []
    for _ in range(12):
        teacher, student = a_pair(batch=1)
        values = discriminator_loss(network, teacher + 1.0, student - 1.0, form)   # type: ignore[arg-type]
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        gaps.append((values["teacher"] - values["student"]).item())
    thirds = [sum(gaps[n : n + 4]) for n in (0, 4, 8)]
    assert all(later > earlier for earlier, later in pairwise(thirds))
    assert gaps[-1] > gaps[0] + 0.1


# ---- errors --------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`channels` and `spatial_dims` of the discriminator must be 3 and 2, "):
        small()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"must be fewer than 2, which need patches of at least 16 .* got \(16, 12\)"):
        small()(torch.zeros(1, 2, 16, 12))
    with pytest.raises(ValueError, match="which need patches of at least 64 voxels along each axis"):
        Discriminator(2, 2, width=1)(torch.zeros(1, 2, 63, 64))
    for options in ({"width": 0}, {"layers": 0}, {"attended": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="`channels`, `width`, `layers` and `attended` must be at least 1 and"):
            Discriminator(2, 2, **options)   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 or 3, got 1"):
        Discriminator(2, 1)
    with pytest.raises(ValueError, match="`form` must be one of .* got 'gan'"):
        discriminator_loss(small(), *a_pair(), "gan")   # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`teacher` and `student` must have one shape, got"):
        discriminator_loss(small(), a_pair()[0], a_pair()[0][:1])
