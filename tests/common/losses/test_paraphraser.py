# SPDX-License-Identifier: Apache-2.0
"""Paraphrasers: the published sizes, their fitting, and files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from medkd.losses.fitted import written_taps
from medkd.losses.paraphraser import Paraphraser, Paraphrasers, TeacherParaphrasers, reconstruction_loss


def count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


@pytest.mark.parametrize(
    ("factor", "rank", "encoder", "whole"), [(24, 2, None, 1.301e6), (64, 2, None, 1.549e6), (32, 3, 2.02e6, 4.04e6)]
)
def test_it_has_as_many_parameters_as_the_published_one(
    factor: int, rank: int, encoder: float | None, whole: float
) -> None:
    paraphraser = Paraphraser(256, factor, rank)
    assert count(paraphraser) == pytest.approx(whole, rel=5e-4 if rank == 2 else 2e-3)
    assert encoder is None or count(paraphraser.encoder) == pytest.approx(encoder, rel=2e-3)


def test_all_its_layers_are_convolutions_of_three_voxels_with_leaky_relu_behind() -> None:
    paraphraser = Paraphraser(8, 3, 2)
    kinds = [type(one).__name__ for one in (*paraphraser.encoder, *paraphraser.decoder)]
    assert kinds == ["Conv2d", "LeakyReLU"] * 3 + ["ConvTranspose2d", "LeakyReLU"] * 3
    convolutions = [one for one in (*paraphraser.encoder, *paraphraser.decoder) if not isinstance(one, nn.LeakyReLU)]
    sizes = [(one.in_channels, one.out_channels) for one in convolutions]
    assert sizes == [(8, 8), (8, 3), (3, 3), (3, 3), (3, 8), (8, 8)]
    assert all(one.kernel_size == (3, 3) and one.bias is not None for one in convolutions)
    assert all(one.negative_slope == 0.1 for one in paraphraser.encoder if isinstance(one, nn.LeakyReLU))


@pytest.mark.parametrize("squeeze", [None, 4])
@pytest.mark.parametrize("size", [(7, 5), (4, 7, 5)])
def test_the_size_of_a_layer_stays(size: tuple[int, ...], squeeze: int | None) -> None:
    paraphraser, maps = Paraphraser(6, 2, len(size), squeeze), torch.randn(2, 6, *size)
    assert paraphraser(maps).shape == (2, 2, *size)
    assert paraphraser.reconstruct(maps).shape == maps.shape
    torch.testing.assert_close(paraphraser.reconstruct(maps), paraphraser.decoder(paraphraser(maps)))


def test_a_squeeze_takes_a_twentieth_of_the_multiplications() -> None:
    """Per voxel; 28 GMAC per sample of 24^3 are published, of which less than 3 are left."""
    def multiplications(squeeze: int | None) -> int:
        return sum(one.weight.numel() for one in Paraphraser(256, 32, 3, squeeze).encoder if hasattr(one, "weight"))

    assert multiplications(None) * 24**3 == pytest.approx(28e9, rel=0.02)
    assert multiplications(64) * 24**3 < 1.5e9


def test_first_values_come_from_the_seed_alone_and_keep_the_size_of_features() -> None:
    before = torch.get_rng_state()
    one, same, other = Paraphrasers([(6, 2)]), Paraphrasers([(6, 2)]), Paraphrasers([(6, 2)], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(net.parameters()) for net in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    twice = Paraphrasers([(6, 2), (6, 2)])
    assert not torch.equal(*(next(layer.parameters()) for layer in twice.layers))
    maps = torch.randn(1, 64, 24, 24)
    assert 0.5 < Paraphraser(64, 16, 2)(maps).std() < 2.0


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_fitting_brings_the_layer_back(kind: str) -> None:
    """Six channels that are mixtures of two can be told by two."""
    basis = torch.randn(1, 2, 8, 8).abs()
    maps = torch.einsum("oc,bchw->bohw", torch.rand(6, 2), basis)
    paraphraser = Paraphraser(6, 2, 2)
    optimizer = torch.optim.Adam(paraphraser.parameters(), 0.02)
    values = []
    for _ in range(80):
        value = reconstruction_loss(paraphraser.reconstruct(maps), maps, kind)   # type: ignore[arg-type]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
    assert all(one.grad is not None for one in paraphraser.parameters())


def test_reconstruction_losses_are_means_without_a_gradient_to_the_layer() -> None:
    found, maps = torch.randn(2, 3, 4, 4).requires_grad_(), torch.randn(2, 3, 4, 4).requires_grad_()
    torch.testing.assert_close(reconstruction_loss(found, maps), (found - maps).abs().mean())
    torch.testing.assert_close(reconstruction_loss(found, maps, "mse"), (found - maps).square().mean())
    reconstruction_loss(found, maps).backward()
    assert maps.grad is None


def test_a_file_is_read_strictly_and_frozen(tmp_path: Path) -> None:
    path, teacher = tmp_path / "p.pt", tmp_path / "teacher.pt"
    teacher.write_bytes(b"a teacher")
    built = Paraphrasers([(6, 2), (5, 3)], 2, seed=7)
    sha256 = torch.tensor(list(hashlib.sha256(b"a teacher").digest())).byte()
    torch.save({**built.state_dict(), "teacher_sha256": sha256, "taps": written_taps(["a", "b"])}, path)
    loaded = TeacherParaphrasers(["a", "b"], [(6, 2), (5, 3)], path, 2, teacher_path=teacher).load()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), built.parameters(), strict=True))
    assert not any(one.requires_grad for one in loaded.parameters())
    assert not loaded.training
    with pytest.raises(ValueError, match=r"`paraphrasers` must hold .* of \[\[6, 2\], \[5, 4\]\] channels, .* but "):
        TeacherParaphrasers(["a", "b"], [(6, 2), (5, 4)], path, 2).load()
    same, alike = tmp_path / "q.pt", [(6, 2), (6, 2)]
    torch.save({**Paraphrasers(alike, 2).state_dict(), "taps": written_taps(["a", "b"])}, same)
    TeacherParaphrasers(["a", "b"], alike, same, 2).load()
    for taps in (["b", "a"], ["a", "c"]):                          # nothing but the file tells these apart
        with pytest.raises(ValueError, match=r"fitted to the teacher's layers .*q.pt was fitted to \['a', 'b'\]; give"):
            TeacherParaphrasers(taps, alike, same, 2).load()
    teacher.write_bytes(b"another teacher")
    with pytest.raises(ValueError, match="`paraphrasers` must be fitted to the teacher .*; .*ParaphraserFitting"):
        TeacherParaphrasers(["a", "b"], [(6, 2), (5, 3)], path, 2, teacher_path=teacher).load()


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`channels`, `factor` and `squeeze` must be at least 1, got 4, 0 and None"):
        Paraphraser(4, 0)
    with pytest.raises(ValueError, match="`spatial_dims` must be 2 or 3, got 1"):
        Paraphraser(4, 2, 1)
    for channels in ([], [(4, 2, 1)]):
        with pytest.raises(ValueError, match=r"`channels` must give \[teacher, student\] for each layer"):
            Paraphrasers(channels)
    with pytest.raises(ValueError, match="must be 5 and 2, those of the layer it reads, got 4 and 3; list the layers"):
        Paraphraser(4, 2)(torch.zeros(1, 5, 3, 3))
    with pytest.raises(ValueError, match="`levels` must be 2 layers, one for each, got 1"):
        Paraphrasers([(4, 2), (4, 2)])([torch.zeros(1, 4, 3, 3, 3)])
    with pytest.raises(ValueError, match=r"`taps` must be 2 layers, one for each of `channels`, got \['a'\]"):
        TeacherParaphrasers(["a"], [(4, 2), (4, 2)], "p.pt")
    with pytest.raises(ValueError, match="`kind` must be one of .* got 'l2'"):
        reconstruction_loss(torch.zeros(1), torch.zeros(1), "l2")   # type: ignore[arg-type]
