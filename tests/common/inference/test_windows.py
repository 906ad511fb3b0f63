# SPDX-License-Identifier: Apache-2.0
"""Blended windows of affinities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor, decollate_batch, list_data_collate

from medkd.inference.affinities import direct_affinity, embedding_affinity
from medkd.inference.windows import AffinityInferer

PLANE = [[-1, 0], [0, -1], [-3, 0], [0, -5], [2, 0], [0, 4], [-2, 3]]
SPACE = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-3, 0, 0], [0, 2, 0], [1, -4, 2]]
NEAR = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, -9, 0], [0, 0, -9]]
Network = Callable[..., torch.Tensor]


def numbered(*size: int, batch: int = 1) -> torch.Tensor:
    """Images that tell each voxel apart from all others: (batch, 1, *size)."""
    return torch.arange(batch * int(np.prod(size)), dtype=torch.float32).reshape(batch, 1, *size)


def noise(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def told(image: torch.Tensor, offsets: Sequence[Sequence[int]], outside: float) -> torch.Tensor:
    """An affinity for each voxel and offset, by the voxel's number, and `outside` where its partner is missing."""
    maps = []
    for channel, offset in enumerate(offsets):
        map_ = (image[:, 0] * 0.37 + 0.11 * channel) % 1.0
        for axis, step in enumerate(offset):
            length = map_.shape[axis + 1]
            places = torch.arange(length)
            missing = (places + step < 0) | (places + step >= length)
            map_ = map_.movedim(axis + 1, -1).masked_fill(missing, outside).movedim(-1, axis + 1)
        maps.append(map_)
    return torch.stack(maps, 1)


def teller(offsets: Sequence[Sequence[int]], margin: Sequence[int] | None = None, foreground: bool = False) -> Network:
    """A network that knows the affinities of all pairs in its window, and is far off for the others."""

    def network(windows: torch.Tensor) -> torch.Tensor:
        lost = margin or [0] * (windows.dim() - 2)
        inner = windows[(..., *(slice(cut, size - cut) for cut, size in zip(lost, windows.shape[2:], strict=True)))]
        maps = told(inner, offsets, outside=1e6)
        return torch.cat([maps, inner * 0.01 % 1.0], 1) if foreground else maps

    return network


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
@pytest.mark.parametrize(
    ("size", "roi", "offsets"),
    [
        ((1, 1), (16, 14), PLANE), ((5, 3), (16, 14), PLANE), ((16, 14), (16, 14), PLANE),
        ((1, 40), (16, 14), PLANE), ((17, 41), (16, 14), PLANE), ((33, 15), (16, 14), PLANE),
        ((1, 1, 1), (8, 10, 12), SPACE), ((3, 5, 7), (8, 10, 12), SPACE), ((9, 1, 30), (8, 10, 12), SPACE),
        ((20, 13, 8), (8, 10, 12), SPACE),
    ],
)
def test_what_a_network_knows_of_pairs_is_reproduced_for_any_size(
    size: tuple[int, ...], roi: tuple[int, ...], offsets: list[list[int]], overlap: float, mode: Any
) -> None:
    image = numbered(*size)
    result = AffinityInferer(roi, offsets, overlap=overlap, mode=mode, sw_batch_size=3)(image, teller(offsets))
    torch.testing.assert_close(result, told(image, offsets, outside=0.0), atol=1e-5, rtol=0)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("size", [(9, 40), (16, 14), (60, 33)])
@pytest.mark.parametrize("alignment", [None, (3, 5)])
def test_margin_and_alignment_do_not_move_anything(size: tuple[int, int], alignment: Any) -> None:
    image = numbered(*size)
    seen: list[int] = []

    def network(windows: torch.Tensor) -> torch.Tensor:
        seen.append(int(windows[0, 0, 2, 4]))                          # number of the window's first voxel
        return teller(PLANE, margin=(2, 4))(windows)

    inferer = AffinityInferer((20, 24), PLANE, margin=(2, 4), alignment=alignment)
    torch.testing.assert_close(inferer(image, network), told(image, PLANE, outside=0.0), atol=1e-5, rtol=0)
    rows, columns = zip(*(divmod(number, size[1]) for number in seen), strict=True)
    for starts, unit in zip((rows, columns), alignment or (1, 1), strict=True):
        assert all(start % unit == 0 for start in starts)


def test_foreground_counts_everywhere() -> None:
    image = numbered(30, 20)
    inferer = AffinityInferer((16, 14), PLANE, foreground=True)
    result = inferer(image, teller(PLANE, foreground=True))
    assert result.shape == (1, len(PLANE) + 1, 30, 20)
    torch.testing.assert_close(result[:, :-1], told(image, PLANE, outside=0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(result[:, -1:], image * 0.01 % 1.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("foreground", [False, True])
def test_embeddings_become_affinities_in_each_window_and_are_never_blended(foreground: bool) -> None:
    """Each window turns its embedding, as networks may; its inner products do not change, but for the background."""
    embedding = noise(1, 4, 12, 25, 31)
    turns = iter(range(1000))

    def network(windows: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(next(turns))
        turn = torch.eye(4)
        turn[1:, 1:] = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
        return torch.einsum("dc,bcxyz->bdxyz", turn, windows)

    inferer = AffinityInferer((8, 10, 12), SPACE, from_embedding=True, foreground=foreground)
    expected = embedding_affinity(embedding, SPACE, foreground)
    torch.testing.assert_close(inferer(embedding, network), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("foreground", [False, True])
def test_logits_of_the_first_offsets_become_affinities(foreground: bool) -> None:
    logits = noise(1, len(PLANE) + 1, 30, 20)
    inferer = AffinityInferer((64, 64), PLANE[:3], from_logits=True, foreground=foreground)
    result = inferer(logits, lambda windows: windows)
    expected = direct_affinity(logits, 3, foreground)
    for channel, (rows, columns) in enumerate(PLANE[:3]):          # pairs that leave the image
        expected[:, channel, : -rows] = 0.0
        expected[:, channel, :, : -columns] = 0.0
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_samples_of_a_batch_do_not_mix(batch: int) -> None:
    images = numbered(20, 30, batch=3)
    inferer = AffinityInferer((16, 14), PLANE, sw_batch_size=batch)
    result = inferer(images, teller(PLANE))
    torch.testing.assert_close(result, told(images, PLANE, outside=0.0), atol=1e-5, rtol=0)
    for sample in range(3):
        assert torch.equal(inferer(images[sample : sample + 1], teller(PLANE))[0], result[sample])


def test_network_sees_whole_windows_in_batches_and_its_further_arguments() -> None:
    sizes = []

    def network(windows: torch.Tensor, shift: float, *, scale: float) -> torch.Tensor:
        sizes.append(tuple(windows.shape))
        return teller(PLANE)(windows) * scale + shift

    image = numbered(16, 30)
    result = AffinityInferer((16, 14), PLANE, overlap=0.0, sw_batch_size=2)(image, network, 0.25, scale=0.5)
    assert sizes == [(2, 1, 16, 14), (1, 1, 16, 14)]
    inside = told(image, PLANE, outside=-1.0) >= 0
    torch.testing.assert_close(result[inside], told(image, PLANE, 0.0)[inside] * 0.5 + 0.25, atol=1e-5, rtol=0)
    assert not result[~inside].any()


class TwoLevels(torch.nn.Module):
    """Gives embeddings by two convolutions, the second one behind a pooling by 3 in the plane.

    With padding 0 the result lacks `margin` voxels on each side; sizes in the plane are multiples of 3, and 4 more.
    """

    margin, alignment = (4, 8, 8), (1, 3, 3)

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fine = torch.nn.Conv3d(1, 2, 5, padding=padding)
            self.coarse = torch.nn.Conv3d(2, 3, 5, padding=padding)
        self.cut = 0 if padding else 2                             # coarse voxels on each side

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = self.fine(image)
        coarse = self.coarse(F.max_pool3d(fine, (1, 3, 3)))
        depth, plane = self.cut, 3 * self.cut
        inner = F.pad(fine, [-plane, -plane, -plane, -plane, -depth, -depth])
        return torch.cat([inner, F.interpolate(coarse, scale_factor=(1.0, 3.0, 3.0))], 1)


def extended(image: torch.Tensor, margin: Sequence[int], more: Sequence[int]) -> torch.Tensor:
    """The image as the docstring says that it is extended, by NumPy."""
    array = image[0, 0].numpy()
    for axis, (cut, behind) in enumerate(zip(margin, more, strict=True)):
        pad = [(0, 0)] * 3
        pad[axis] = (cut, cut + behind)
        array = np.pad(array, pad, mode="reflect" if cut + behind < array.shape[axis] else "edge")
    return torch.from_numpy(array)[None, None]


@pytest.mark.parametrize(
    ("depth", "size", "more", "windows"),
    [
        (13, (4, 7, 6), (1, 2, 0), 2),          # all axes shorter than the margin: repeated, not reflected
        (13, (9, 6, 5), (0, 0, 1), 2),          # sections are reflected
        (10, (2, 17, 2), (0, 1, 4), 5),         # rows are reflected
        (10, (1, 4, 5), (1, 2, 1), 1),
    ],
)
@torch.no_grad()
def test_windows_of_valid_convolutions_equal_the_whole_image_at_once(
    depth: int, size: tuple[int, int, int], more: tuple[int, int, int], windows: int
) -> None:
    network = TwoLevels()
    seen = []
    offsets = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, -2, 0], [0, 1, -2]]
    inferer = AffinityInferer(
        (depth, 22, 22), offsets, from_embedding=True, overlap=0.0, margin=network.margin, alignment=network.alignment
    )
    image = noise(1, 1, *size)
    result = inferer(image, lambda window: (seen.append(1), network(window))[1])
    whole = network(extended(image, network.margin, more))
    expected = embedding_affinity(whole[..., : size[0], : size[1], : size[2]], offsets)
    assert len(seen) == windows
    assert result.isfinite().all()
    assert result.mean() > 0.1 or size[0] == 1
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_windows_of_padded_convolutions_equal_the_whole_image_away_from_their_borders() -> None:
    """What the network does not see from a window's border does not know of it: 9 voxels in the plane."""
    network = TwoLevels(padding=2)
    image = noise(1, 1, 3, 9, 54)
    offsets = [[-1, 0, 0], [0, 0, -1], [0, 0, -9]]
    inferer = AffinityInferer((3, 9, 36), offsets, from_embedding=True, alignment=network.alignment)
    result = inferer(image, network)
    whole = embedding_affinity(network(image), offsets)
    for columns in (slice(0, 18), slice(36, 54)):                  # the windows start at 0 and 18
        torch.testing.assert_close(result[..., columns], whole[..., columns], atol=1e-4, rtol=0)
    assert not torch.allclose(result, whole, atol=1e-2)            # in between they know it


@torch.no_grad()
def test_black_section_and_black_image_give_finite_affinities() -> None:
    inferer = AffinityInferer((6, 12, 18), NEAR, from_embedding=True)
    image = noise(1, 1, 9, 15, 30)
    image[:, :, 4] = image.min()
    for one in (image, torch.zeros_like(image)):
        result = inferer(one, TwoLevels(padding=2))
        assert result.isfinite().all()
        assert result.min() >= 0
        assert result.max() <= 1


def test_embedding_without_length_has_affinity_zero() -> None:
    inferer = AffinityInferer((16, 14), PLANE, from_embedding=True)
    assert not inferer(torch.zeros(1, 3, 20, 20), lambda windows: windows).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_low_precision_are_blended_in_float32(dtype: torch.dtype) -> None:
    image = numbered(20, 20) / 400

    def network(windows: torch.Tensor) -> torch.Tensor:
        return teller(PLANE[:2])(windows).clamp(0, 1).to(dtype)

    result = AffinityInferer((16, 14), PLANE[:2])(image, network)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, told(image, PLANE[:2], outside=0.0), atol=5e-3, rtol=0)


def test_image_is_left_as_it_is() -> None:
    image = numbered(20, 20)
    AffinityInferer((16, 14), PLANE)(image, teller(PLANE))
    assert torch.equal(image, numbered(20, 20))


def test_result_has_the_metadata_of_the_image_by_which_it_can_be_turned_back_and_saved() -> None:
    meta = {"filename_or_obj": "case.nii.gz"}
    image = MetaTensor(numbered(20, 20)[0], affine=torch.diag(torch.tensor([4.0, 5.0, 1.0, 1.0])), meta=meta)
    batch = list_data_collate([image])
    result = AffinityInferer((16, 14), PLANE)(batch, teller(PLANE))
    one = decollate_batch(result)[0]
    assert torch.equal(one.affine, image.affine)
    assert one.meta["filename_or_obj"] == "case.nii.gz"
    assert one.shape == (len(PLANE), 20, 20)
    assert type(AffinityInferer((16, 14), PLANE)(numbered(20, 20), teller(PLANE))) is torch.Tensor


def test_progress_is_shown_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    AffinityInferer((16, 14), PLANE)(numbered(20, 20), teller(PLANE))
    assert "windows" not in capsys.readouterr().err
    AffinityInferer((16, 14), PLANE, progress=True)(numbered(20, 20), teller(PLANE))
    assert "windows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "linear"}, r"`mode` must be one of \('constant', 'gaussian'\), got 'linear'"),
        ({"offsets": [[-1, 0, 0]]}, r"`offsets`.* must have 2 axes, as `roi_size` has"),
        ({"offsets": []}, r"`offsets`.* must have 2 axes, as `roi_size` has"),
        ({"margin": (1,)}, "`alignment` and `strides` must have 2 axes"),
        ({"alignment": (1, 1, 1)}, "`alignment` and `strides` must have 2 axes"),
        ({"strides": (1, 1, 1)}, "`alignment` and `strides` must have 2 axes"),
        ({"strides": (0, 1)}, r"`strides` must be at least 1, got \[0, 1\]"),
        ({"offsets": [[0, -14]]}, r"must leave windows that are larger than the offsets \[0, 14\] by `alignment`"),
        ({"offsets": [[0, 20]]}, r"larger than the offsets \[0, 20\]"),
        ({"alignment": (1, 10)}, r"by `alignment` \[1, 10\], got windows of \[16, 14\]"),
        ({"margin": (8, 0)}, r"got windows of \[0, 14\]"),
        ({"overlap": 1.0}, "`overlap` must be a share of at least 0 and below 1, got 1.0"),
        ({"overlap": -0.5}, "`overlap` must be a share of at least 0 and below 1, got -0.5"),
        ({"sw_batch_size": 0}, "`sw_batch_size` must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffinityInferer(**({"roi_size": (16, 14), "offsets": PLANE} | options))


def shapes_seen(size: Sequence[int], **options: Any) -> list[tuple[int, ...]]:
    """Shapes of the batches that a network is given for one image."""
    seen = []

    def network(windows: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(windows.shape))
        return teller(SPACE if len(size) == 3 else PLANE)(windows)

    AffinityInferer(**options)(numbered(*size), network)
    return seen


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("strides", [(1, 1), (2, 4), (16, 14)])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 14), (17, 41), (60, 33)])
def test_windows_that_fit_the_image_give_the_same(
    size: tuple[int, int], strides: tuple[int, int], overlap: float
) -> None:
    options: dict[str, Any] = {"overlap": overlap, "sw_batch_size": 3, "mode": "constant"}
    image = numbered(*size)
    result = AffinityInferer((16, 14), PLANE, strides=strides, **options)(image, teller(PLANE))
    torch.testing.assert_close(result, told(image, PLANE, outside=0.0), atol=1e-5, rtol=0)
    margin = AffinityInferer((20, 20), PLANE, margin=(2, 3), strides=strides, **options)(image, teller(PLANE, (2, 3)))
    torch.testing.assert_close(margin, told(image, PLANE, outside=0.0), atol=1e-5, rtol=0)


def test_windows_are_as_small_as_cover_the_image_in_as_many() -> None:
    options = {"roi_size": (16, 14), "offsets": [[-1, 0], [0, -1]], "overlap": 0.25, "sw_batch_size": 9}

    def seen(*size: int, **more: Any) -> list[int]:
        shapes: list[list[int]] = []

        def network(windows: torch.Tensor) -> torch.Tensor:
            shapes.append([len(windows), *windows.shape[2:]])
            return teller(options["offsets"])(windows)   # type: ignore[arg-type]

        AffinityInferer(**(options | more))(numbered(*size), network)   # type: ignore[arg-type]
        return shapes[0]

    assert seen(5, 3) == [1, 16, 14]
    assert seen(5, 3, strides=(4, 7)) == [1, 8, 7]                 # 16 - 2 x 4, 14 - 7
    assert seen(20, 14) == [2, 16, 14]
    assert seen(20, 14, strides=(2, 2)) == [2, 12, 14]             # 12 + 9 >= 20, 10 + 7 is not
    assert seen(20, 14, strides=(5, 5)) == [2, 16, 14]             # 11 + 8 is not


def test_no_window_is_left_alone() -> None:
    options: dict[str, Any] = {"roi_size": (8, 10, 12), "offsets": SPACE, "overlap": 0.25, "strides": (1, 1, 1)}
    assert [shape[0] for shape in shapes_seen((16, 10, 12), sw_batch_size=2, **options)] == [3]
    assert [shape[0] for shape in shapes_seen((24, 10, 12), sw_batch_size=2, **options)] == [2, 3]
    assert [shape[0] for shape in shapes_seen((5, 10, 12), sw_batch_size=1, **options)] == [1]
    assert [shape[0] for shape in shapes_seen((5, 10, 12), sw_batch_size=2, **options)] == [2]      # computed twice
    assert [shape[0] for shape in shapes_seen((5, 6), roi_size=(16, 14), offsets=PLANE)] == [1]     # images are not


def test_offset_just_inside_a_window_is_taken() -> None:
    image = numbered(20, 30)
    result = AffinityInferer((16, 14), [[0, -13], [15, 0]])(image, teller([[0, -13], [15, 0]]))
    torch.testing.assert_close(result, told(image, [[0, -13], [15, 0]], outside=0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda windows: windows, r"\[1, 16, 14\]"),
        (lambda windows: windows[..., 1:].expand(-1, len(PLANE), -1, -1), r"\[7, 16, 13\]"),
        (lambda windows: windows.expand(-1, len(PLANE) + 1, -1, -1), r"\[8, 16, 14\]"),
    ],
)
def test_result_of_another_shape_is_refused(network: Network, got: str) -> None:
    message = rf"`network` must give 7 channels of \[16, 14\] voxels for windows of \[16, 14\], got {got}; see `margin`"
    with pytest.raises(ValueError, match=message):
        AffinityInferer((16, 14), PLANE)(numbered(20, 20), network)


def test_images_of_another_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`inputs` must have shape \(B, C, \*S\) with 2 axes in S, got \(1, 5, 5\)"):
        AffinityInferer((16, 14), PLANE)(torch.zeros(1, 5, 5), teller(PLANE))
