# SPDX-License-Identifier: Apache-2.0
"""Predictions of inner layers: trained, fixed, drawn anew, and the teacher's from a file."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medkd.losses.class_heads import ClassHeads, FixedHeads, TeacherHeads, drawn_projection
from oracles import layer_feedback as oracle


def levels(rank: int = 2) -> list[Tensor]:
    return [torch.randn(2, 5, *(4, 3, 5)[:rank]), torch.randn(2, 3, *(8, 6, 10)[:rank])]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", [ClassHeads, FixedHeads])
def test_heads_give_logits_of_each_layer_on_its_own_grid(kind: type, rank: int) -> None:
    heads, given = kind([5, 3], classes=4, spatial_dims=rank), levels(rank)
    found = heads(given)
    for n, (logits, level) in enumerate(zip(found, given, strict=True)):
        weight = heads.layers[n].weight if kind is ClassHeads else heads.get_buffer(f"weight_{n}")
        torch.testing.assert_close(logits, oracle.projected(level, weight.flatten(1), torch.zeros(4)))


def test_first_values_are_small_and_come_from_a_generator_of_their_own() -> None:
    before = torch.get_rng_state()
    first, same, other = (ClassHeads([400], 300, size=0.1, seed=seed) for seed in (0, 0, 1))
    fixed = [FixedHeads([400], 3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert first.layers[0].weight.std().item() == pytest.approx(0.1 * 400**-0.5, rel=0.02)
    assert not first.layers[0].bias.any()
    for a, b, c in ([h.layers[0].weight for h in (first, same, other)], [h.weight_0 for h in fixed]):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize(("channels", "classes"), [(8, 3), (3, 8), (4, 4)])
def test_fixed_heads_are_orthonormal_saved_and_never_trained(channels: int, classes: int) -> None:
    heads = FixedHeads([channels], classes)
    weight = heads.weight_0.flatten(1)
    gram = weight @ weight.T if channels >= classes else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(channels, classes)))
    assert not list(heads.parameters())
    assert list(heads.state_dict()) == ["weight_0"]


def test_drawn_projections_have_the_first_values_of_torch_and_follow_the_generator() -> None:
    maps = torch.randn(1, 16, 3, 3)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([drawn_projection(maps, 50, generator) for _ in range(40)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn_projection(maps, 50, torch.Generator().manual_seed(3)), drawn[0])
    with torch.random.fork_rng():
        default = torch.stack([torch.nn.Conv2d(16, 50, 1)(maps) for _ in range(40)])
    assert drawn.std().item() == pytest.approx(default.std().item(), rel=0.05)
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.05)


def test_a_layer_of_other_channels_or_axes_is_named() -> None:
    heads = ClassHeads([5, 4], 2, spatial_dims=2)
    with pytest.raises(ValueError, match="`channels` and `spatial_dims` of head 1 must be 3 and 2, .* got 4 and 2; "):
        heads(levels())
    with pytest.raises(ValueError, match="of head 0 must be 5 and 3, those of the layer it reads, got 5 and 2"):
        heads(levels(3))
    with pytest.raises(ValueError, match="`levels` must be 2 layers, one for each head, got 1"):
        heads(levels()[:1])


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`channels` and `classes` must be at least 1, .* got \[\] and 2"):
        ClassHeads([], 2)
    with pytest.raises(ValueError, match=r"got \[3\] and 0"):
        FixedHeads([3], 0)
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 or 3, got 4"):
        ClassHeads([3], 2, spatial_dims=4)


def test_the_teachers_heads_are_loaded_strictly_and_frozen(tmp_path: Path) -> None:
    (tmp_path / "teacher.pt").write_bytes(b"first")
    heads = ClassHeads([5, 3], 2, spatial_dims=2, seed=5)
    mark = torch.tensor(list(sha256(b"first").digest()), dtype=torch.uint8)
    torch.save({**heads.state_dict(), "teacher_sha256": mark}, tmp_path / "model.pt")
    fitted = TeacherHeads([5, 3], 2, tmp_path / "model.pt", 2, tmp_path / "teacher.pt")
    loaded, given = fitted.load(), levels()
    torch.testing.assert_close(loaded(given), heads(given))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    with pytest.raises(ValueError, match=r"must hold heads for layers of \[5\] channels and 2 classes, but"):
        TeacherHeads([5], 2, tmp_path / "model.pt", 2).load()
    with pytest.raises(ValueError, match=r"must hold heads for layers of \[5, 3\] channels and 3 classes, but"):
        TeacherHeads([5, 3], 3, tmp_path / "model.pt", 2).load()
    with pytest.raises(FileNotFoundError, match=r"the teacher's class heads, got .*no\.pt.*HeadFitting"):
        TeacherHeads([5, 3], 2, tmp_path / "no.pt").load()
    (tmp_path / "teacher.pt").write_bytes(b"second")
    with pytest.raises(ValueError, match=r"must be fitted to the teacher .*teacher\.pt .*; .*HeadFitting"):
        fitted.load()
