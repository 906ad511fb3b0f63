# SPDX-License-Identifier: Apache-2.0
"""Instances out of affinities and into files."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from medkd.inference import instances as module
from medkd.inference import partition
from medkd.inference.instances import ConsecutiveLabelsd, InstancesFromAffinitiesd, SaveInstancesd, instances

Array = NDArray[Any]
NEAR = {2: [[-1, 0], [0, -1]], 3: [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]}
FAR = {2: [[-3, 0], [0, -3], [5, 0], [0, 9]], 3: [[-3, 0, 0], [0, -4, 0], [0, 0, 5], [0, -9, 0]]}
METHODS = [("mutex", 2), ("mutex", 3), ("watershed", 2), ("watershed", 3), ("waterz", 3)]
SAVING = {"output_postfix": "seg", "separate_folder": False, "resample": False, "print_log": False}


def affinities(label: Array, offsets: Sequence[Sequence[int]]) -> Array:
    """1 for pairs in one instance, 0 for all others, shape (O, *S), pair by pair."""
    result = np.zeros((len(offsets), *label.shape), np.float32)
    for channel, offset in enumerate(offsets):
        for place in np.ndindex(label.shape):
            partner = tuple(at + step for at, step in zip(place, offset, strict=True))
            if all(0 <= at < length for at, length in zip(partner, label.shape, strict=True)):
                result[(channel, *place)] = label[place] == label[partner] != 0
    return result


def cells(rank: int, membrane: bool) -> Array:
    """Boxes of several sizes, with or without a line of 0 between them."""
    lines = [np.repeat([0, 1], [8, 7]), np.repeat([0, 1, 2], [6, 8, 7]), np.repeat([0, 1], [8, 9])][:rank]
    grid = np.meshgrid(*lines, indexing="ij")
    label: Array = 1 + grid[0] + 2 * grid[1] + (6 * grid[2] if rank == 3 else 0)
    if membrane:
        for axis in range(rank):
            changes = np.diff(label, axis=axis, append=np.take(label, [-1], axis)) != 0
            label = np.where(changes, 0, label)
    return label


def same_partition(first: Array, second: Array) -> bool:
    """Whether two numberings mean the same, background included."""
    pairs = {(int(a), int(b)) for a, b in zip(first.ravel(), second.ravel(), strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) and all(
        (a == 0) == (b == 0) for a, b in pairs
    )


def assert_numbered_and_connected(found: Array) -> None:
    assert found.dtype == np.int32
    numbers = np.unique(found[found > 0])
    assert numbers.tolist() == list(range(1, len(numbers) + 1))
    assert all(ndimage.label(found == number)[1] == 1 for number in numbers)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("membrane", [False, True])
def test_mutex_recovers_a_partition(rank: int, far: bool, membrane: bool) -> None:
    label = cells(rank, membrane)
    offsets = NEAR[rank] + (FAR[rank] if far else [])
    found = instances(affinities(label, offsets), offsets, "mutex", stride=2)
    assert same_partition(found, label)
    assert_numbered_and_connected(found)


@pytest.mark.parametrize(("method", "rank"), METHODS)
def test_partition_with_membranes_is_recovered(method: Any, rank: int) -> None:
    """The membranes, which have no affinity at all, go to any neighbor unless the foreground is known."""
    label = cells(rank, membrane=True)
    offsets = NEAR[rank]
    maps = affinities(label, offsets)
    found = instances(maps, offsets, method)
    assert same_partition(found[label > 0], label[label > 0])
    assert_numbered_and_connected(found)
    found = instances(maps, offsets, method, foreground=(label > 0).astype(np.float32))
    assert same_partition(found, label)
    assert_numbered_and_connected(found)


@pytest.mark.parametrize(("method", "rank"), METHODS)
def test_partition_does_not_depend_on_the_order_of_the_offsets(method: Any, rank: int) -> None:
    label = cells(rank, membrane=True)
    offsets = (FAR[rank] + NEAR[rank])[::-1]
    found = instances(affinities(label, offsets), offsets, method, foreground=(label > 0).astype(np.float32))
    assert same_partition(found, label)


def test_far_pairs_repel_where_near_ones_leak() -> None:
    """A weak membrane has a hole of one voxel: near affinities alone merge through it."""
    label = np.repeat([[1, 2]], [8, 8], axis=1).repeat(16, 0)
    offsets = NEAR[2] + [[0, -3], [0, -5]]
    maps = affinities(label, offsets)
    maps[1, :, 8] = 0.4
    maps[1, 7, 8] = 0.9
    assert instances(maps[:2], NEAR[2], "mutex").max() == 1
    assert same_partition(instances(maps, offsets, "mutex", stride=1), label)


def test_bias_splits_and_threshold_merges() -> None:
    label = cells(3, membrane=True)
    offsets = NEAR[3]
    weak = np.where(affinities(np.ones_like(label), offsets) > 0, 0.6, 0.0).astype(np.float32)
    assert instances(weak, offsets, "mutex", bias=0.5).max() == 1
    assert instances(weak, offsets, "mutex", bias=0.7).max() == 0                # each voxel by itself is background
    leaky = np.where(affinities(label, offsets) > 0, 0.9, 0.3).astype(np.float32)
    leaky *= affinities(np.ones_like(label), offsets)
    assert instances(leaky, offsets, "waterz", threshold=0.5).max() == label.max()
    assert instances(leaky, offsets, "waterz", threshold=0.95).max() == 1


@pytest.mark.parametrize(("method", "rank"), METHODS)
@pytest.mark.parametrize("thin", [False, True])
def test_one_instance_is_one(method: Any, rank: int, thin: bool) -> None:
    shape = (12, 9, 10)[-rank:] if not thin else (1, 9, 10)[-rank:]
    found = instances(affinities(np.ones(shape, int), NEAR[rank]), NEAR[rank], method)
    assert found.tolist() == np.ones(shape, int).tolist()
    found = instances(np.ones((rank, *shape), np.float32), NEAR[rank], method)   # also where no pair is outside
    assert found.tolist() == np.ones(shape, int).tolist()


@pytest.mark.parametrize(("method", "rank"), METHODS)
def test_only_background_has_no_instance(method: Any, rank: int) -> None:
    shape = (6, 9, 10)[-rank:]
    for value in (0.0, 1.0):
        maps = np.full((rank, *shape), value, np.float32)
        found = instances(maps, NEAR[rank], method, foreground=np.zeros(shape, np.float32))
        assert found.dtype == np.int32
        assert not found.any()


@pytest.mark.parametrize(("method", "rank"), METHODS)
def test_without_any_affinity_there_is_no_instance(method: Any, rank: int) -> None:
    assert not instances(np.zeros((rank, *(4, 5, 6)[-rank:]), np.float32), NEAR[rank], method).any()


@pytest.mark.parametrize("method", ["mutex", "watershed", "waterz"])
def test_smallest_volume_has_a_result(method: Any) -> None:
    found = instances(np.zeros((3, 1, 1, 1), np.float32), NEAR[3], method)
    assert found.shape == (1, 1, 1)


@pytest.mark.parametrize("method", ["mutex", "watershed"])
def test_small_instances_become_background_and_the_rest_is_numbered_anew(method: Any) -> None:
    label = cells(2, membrane=True)
    inside = (label > 0).astype(np.float32)
    sizes = np.bincount(label.ravel())[1:]
    least = int(np.median(sizes[sizes > 0]))
    found = instances(affinities(label, NEAR[2]), NEAR[2], method, min_size=least, foreground=inside)
    kept = np.where(np.isin(label, [number for number in range(1, 10) if (label == number).sum() >= least]), label, 0)
    assert 0 < len(np.unique(kept)) < len(np.unique(label))
    assert same_partition(found, kept)
    assert_numbered_and_connected(found)
    assert not instances(affinities(label, NEAR[2]), NEAR[2], method, min_size=10_000, foreground=inside).any()


@pytest.mark.parametrize("method", ["mutex", "watershed"])
def test_foreground_cuts_instances_in_two(method: Any) -> None:
    inside = np.ones((9, 11), np.float32)
    inside[:, 5] = 0.49
    inside[:, 6] = 0.5
    found = instances(affinities(np.ones((9, 11), int), NEAR[2]), NEAR[2], method, foreground=inside)
    assert same_partition(found, np.repeat([[1, 0, 2]], [5, 1, 5], axis=1).repeat(9, 0))
    assert_numbered_and_connected(found)


def stacked() -> Array:
    """Sections with instances of their own: of the same outlines, one above the other."""
    plane = cells(2, membrane=True)
    return np.stack([np.where(plane > 0, plane + 10 * section, 0) for section in range(3)])


@pytest.mark.parametrize("absorb", [0, 10])
def test_sections_without_affinities_between_them_stay_apart(absorb: int) -> None:
    label = stacked()
    offsets = [[0, *offset] for offset in NEAR[2] + FAR[2]]
    maps = affinities(label, offsets)
    found = instances(maps, offsets, "mutex", stride=2, absorb=absorb)
    assert same_partition(found[label > 0], label[label > 0])
    assert (found == 0).any() == (absorb == 0)
    assert all(set(found[section].ravel()) & set(found[section + 1].ravel()) <= {0} for section in range(2))
    assert_numbered_and_connected(found)


@pytest.mark.parametrize("rank", [2, 3])
def test_small_instances_and_what_is_in_none_go_to_their_neighbors(rank: int) -> None:
    label = cells(rank, membrane=True)
    maps = affinities(label, NEAR[rank])
    corner = (slice(0, 2),) * rank
    maps[(slice(None), *corner)] = 0.45                             # a voxel that nothing attracts
    found = instances(maps, NEAR[rank], "mutex", absorb=10)
    assert found.min() == 1
    assert same_partition(found[label > 0], label[label > 0])
    assert_numbered_and_connected(found)


def test_absorbing_stays_in_the_foreground_and_clears_what_has_no_large_neighbor() -> None:
    pieces = np.zeros((20, 22), int)
    pieces[:, :9] = 1
    pieces[2:5, 15:18] = 2
    found = instances(np.ones((2, 20, 22)), NEAR[2], "mutex", absorb=20, foreground=pieces > 0)
    assert np.array_equal(found, pieces == 1)


@pytest.mark.parametrize("method", ["watershed", "waterz"])
def test_regions_per_section_follow_what_moves_fast_from_section_to_section(method: Any) -> None:
    """Affinities between sections are low where an outline jumps; they merge sections where it does not."""
    label = np.repeat([[1, 0, 2]], [9, 3, 9], axis=1).repeat(12, 0)[None].repeat(4, 0)
    maps = affinities(label, NEAR[3])
    found = instances(maps, NEAR[3], method, per_section=True)
    if method == "waterz":
        assert same_partition(found[label > 0], label[label > 0])
    else:
        assert len(np.unique(found)) == 8
        assert all(same_partition(found[z][label[z] > 0], label[z][label[z] > 0]) for z in range(4))
    assert_numbered_and_connected(found)


def test_larger_seed_distance_gives_fewer_regions() -> None:
    maps = np.random.default_rng(0).random((2, 40, 40)).astype(np.float32)
    counts = [instances(maps, NEAR[2], "watershed", seed_distance=distance).max() for distance in (1, 4, 50)]
    assert counts[0] > counts[1] > counts[2] > 0


@pytest.mark.parametrize("method", ["mutex", "watershed"])
def test_no_piece_of_the_foreground_is_lost(method: Any) -> None:
    """Also one that lies far from the middle of the region of high affinities."""
    pieces = np.zeros((20, 22), int)
    pieces[:, :9] = 1
    pieces[2:5, 15:18] = 2
    found = instances(affinities(np.ones_like(pieces), NEAR[2]), NEAR[2], method, foreground=pieces > 0)
    assert same_partition(found, pieces)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "multicut"}, r"`method` must be one of \('mutex', 'waterz', 'watershed'\), got 'multicut'"),
        ({"offsets": NEAR[2][:1]}, r"`affinities` must have a channel per offset.*, got shape \(2, 6, 7\)"),
        ({"offsets": []}, r"`affinities` must have a channel per offset.*, got shape \(2, 6, 7\)"),
        ({"offsets": NEAR[3][:2]}, r"`affinities` must have a channel per offset.*, got shape \(2, 6, 7\)"),
        ({"offsets": [[-1, 0], [0, -2]], "method": "watershed"}, r"`offsets` must hold \[0, -1\]"),
        ({"method": "waterz"}, "'waterz' must have volumes, got 2 axes; take 'mutex'"),
        ({"foreground": np.ones((1, 6, 7))}, r"`foreground` must have the shape \(6, 7\).*, got \(1, 6, 7\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    maps = np.zeros((2, 6, 7), np.float32)
    with pytest.raises(ValueError, match=message):
        instances(maps, **({"offsets": NEAR[2]} | options))


@pytest.mark.parametrize(("method", "rank"), METHODS)
def test_affinities_are_left_as_they_are(method: Any, rank: int) -> None:
    maps = affinities(cells(rank, membrane=True), NEAR[rank])
    before = maps.copy()
    instances(maps, NEAR[rank], method)
    assert np.array_equal(maps, before)


def test_waterz_prints_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it writes at once nor what Python keeps until its buffer is full, as it does for a pipe."""
    label = cells(3, membrane=True)
    maps = affinities(label, NEAR[3])
    with io.TextIOWrapper(os.fdopen(os.dup(1), "wb")) as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        print("before")
        instances(maps, NEAR[3], "waterz")
        print("after")
        os.write(1, b"last\n")
    assert sorted(capfd.readouterr().out.split()) == ["after", "before", "last"]


def test_output_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with partition._silent_output():
            os.write(1, b"hidden\n")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    os.write(1, b"shown\n")
    assert capfd.readouterr().out == "shown\n"


def prediction(rank: int = 2, foreground: bool = False) -> tuple[MetaTensor, Array]:
    """A network's result for cells, with metadata, and the cells."""
    label = cells(rank, membrane=True)
    maps = affinities(label, NEAR[rank])
    if foreground:
        maps = np.concatenate([maps, (label > 0)[None].astype(np.float32)])
    affine = torch.diag(torch.tensor([4.0, 5.0, 6.0, 1.0], dtype=torch.float64))
    return MetaTensor(torch.from_numpy(maps), affine=affine, meta={"filename_or_obj": "case.nii.gz"}), label


@pytest.mark.parametrize("foreground", [False, True])
def test_transform_gives_numbers_with_the_metadata_and_leaves_its_input(foreground: bool) -> None:
    maps, label = prediction(2, foreground)
    data = {"pred": maps, "image": 1}
    result = InstancesFromAffinitiesd("pred", NEAR[2], foreground=foreground)(data)
    assert result["image"] == 1
    assert data["pred"] is maps
    pred = result["pred"]
    assert pred.shape == (1, *label.shape)
    assert pred.dtype == torch.int32
    assert torch.equal(pred.affine, maps.affine)
    assert pred.meta["filename_or_obj"] == "case.nii.gz"
    assert same_partition(pred[0].numpy(), label)


@pytest.mark.parametrize("convert", [torch.Tensor, np.asarray])
def test_transform_takes_plain_tensors_and_arrays(convert: Callable[..., Any]) -> None:
    maps, label = prediction(2)
    plain = convert(maps.as_tensor())
    pred = InstancesFromAffinitiesd("pred", NEAR[2])({"pred": plain})["pred"]
    assert isinstance(pred, type(plain))
    assert same_partition(np.asarray(pred)[0], label)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_affinities_that_are_no_numbers_are_an_error(value: float) -> None:
    maps, _ = prediction(2)
    maps[1, 3, 3] = value
    with pytest.raises(ValueError, match="`pred` must be finite affinities, got NaN or infinity; look at the image"):
        InstancesFromAffinitiesd("pred", NEAR[2])({"pred": maps})


def test_channels_that_are_not_promised_are_an_error() -> None:
    maps, _ = prediction(2, foreground=True)
    with pytest.raises(ValueError, match="`affinities` must have a channel per offset"):
        InstancesFromAffinitiesd("pred", NEAR[2])({"pred": maps})


def test_transform_may_miss_its_key_only_if_told() -> None:
    assert InstancesFromAffinitiesd("pred", NEAR[2], allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match="pred"):
        InstancesFromAffinitiesd("pred", NEAR[2])({"image": 1})


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment without the packages for instances."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_wheels")
@pytest.mark.parametrize(("options", "wheel"), [({}, "mwatershed"), ({"method": "waterz"}, "waterz")])
def test_missing_package_is_an_error_where_instances_are_needed(options: dict[str, Any], wheel: str) -> None:
    message = rf"need the package {wheel}: pip install {wheel}; or take the method 'watershed', which needs none"
    with pytest.raises(ImportError, match=message):
        InstancesFromAffinitiesd("pred", NEAR[2], options=options)


@pytest.mark.usefixtures("no_wheels")
def test_missing_package_leaves_the_affinities_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    maps, _ = prediction(2)
    with caplog.at_level(logging.WARNING):
        transform = InstancesFromAffinitiesd("pred", NEAR[2], required=False)
        assert transform({"pred": maps})["pred"] is maps
    assert len(caplog.records) == 1
    assert "pip install mwatershed" in caplog.text
    assert "the affinities are saved" in caplog.text


@pytest.mark.usefixtures("no_wheels")
def test_watershed_needs_no_package() -> None:
    maps, label = prediction(2, foreground=True)
    transform = InstancesFromAffinitiesd("pred", NEAR[2], foreground=True, options={"method": "watershed"})
    assert same_partition(transform({"pred": maps})["pred"][0].numpy(), label)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float64])
def test_labels_are_numbered_without_gaps_in_their_order(dtype: torch.dtype) -> None:
    numbers = ConsecutiveLabelsd("label")({"label": torch.tensor([[9, 0, 200, 9, 4]], dtype=dtype)})["label"]
    assert numbers.tolist() == [[2, 0, 3, 2, 1]]
    assert numbers.dtype == torch.int32


@pytest.mark.parametrize("first", [65_535, 2**24, 2**31, 2**53])
def test_large_ids_stay_apart(first: int) -> None:
    label = torch.tensor([[0, first, first + 1, first + 2, first]])
    assert ConsecutiveLabelsd("label")({"label": label})["label"].tolist() == [[0, 1, 2, 3, 1]]


@pytest.mark.parametrize(
    ("label", "numbers"),
    [([7, 7], [1, 1]), ([0, 0], [0, 0]), ([3, 5], [1, 2]), ([-1, 5, 0, -9, 3], [-1, 2, 0, -1, 1]), ([-1, 5], [-1, 1])],
)
def test_labels_with_one_or_no_instance_or_no_background(label: list[int], numbers: list[int]) -> None:
    assert ConsecutiveLabelsd("label")({"label": torch.tensor([label])})["label"].tolist() == [numbers]


@pytest.mark.parametrize("sections", [0, 1, 2])
def test_numbers_of_two_sections_are_two_instances_if_asked_for(sections: int) -> None:
    spacing = [4.0, 4.0, 4.0, 1.0]
    spacing[sections] = 40.0
    first = np.array([[5, 5], [0, 70_000]])
    ids = np.stack([first, np.zeros_like(first), first], axis=sections)
    label = MetaTensor(torch.from_numpy(ids)[None], affine=torch.diag(torch.tensor(spacing)))
    transform = ConsecutiveLabelsd("label", per_section=True)
    numbers = np.moveaxis(transform({"label": label})["label"][0].numpy(), sections, 0)
    assert numbers.tolist() == [[[1, 1], [0, 2]], [[0, 0], [0, 0]], [[3, 3], [0, 4]]]
    assert numbers.dtype == np.int32


def test_ignored_voxels_stay_ignored_and_are_no_instance() -> None:
    label = MetaTensor(torch.tensor([[[[-1, 0, 900], [900, 7, -1]], [[-1, 0, 900], [900, 7, 0]]]]), affine=torch.eye(4))
    for per_section, expected in (
        (False, [[[-1, 0, 2], [2, 1, -1]], [[-1, 0, 2], [2, 1, 0]]]),
        (True, [[[-1, 0, 2], [2, 1, -1]], [[-1, 0, 4], [4, 3, 0]]]),
    ):
        result = ConsecutiveLabelsd("label", per_section=per_section)({"label": label})["label"]
        assert result[0].tolist() == expected
        assert result.dtype == torch.int32


def test_numbering_keeps_the_metadata_and_leaves_its_input() -> None:
    label = MetaTensor(torch.tensor([[[5, 0], [9, 9]]]), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    numbers = ConsecutiveLabelsd("label")({"label": label})["label"]
    assert torch.equal(numbers.affine, label.affine)
    assert label.max() == 9
    assert ConsecutiveLabelsd("label", allow_missing_keys=True)({}) == {}


@pytest.mark.parametrize("name", ["label.nii.gz", "label.png"])
def test_ids_of_a_file_stay_apart(tmp_path: Path, name: str) -> None:
    """As the configs load them: as int64."""
    largest = 2**24 + 1 if name.endswith("gz") else 65_535
    ids = np.array([[0, largest - 1, largest], [0, 0, 3]])
    if name.endswith("gz"):
        nib.save(nib.Nifti1Image(ids.astype(np.uint32), np.eye(4)), tmp_path / name)
    else:
        Image.fromarray(ids.T.astype(np.uint16)).save(tmp_path / name)
    label = LoadImage(dtype=torch.int64, ensure_channel_first=True)(str(tmp_path / name))
    assert ConsecutiveLabelsd("label")({"label": label})["label"].tolist() == [[[0, 2, 3], [0, 0, 1]]]


def save(folder: Path, maps: torch.Tensor, source: MetaTensor, **options: Any) -> None:
    """Save a result as that of an image that was loaded."""
    pred = MetaTensor(maps, meta=dict(source.meta))
    result = SaveInstancesd("pred", output_dir=folder, **(SAVING | options))({"pred": pred})
    assert result["pred"] is pred


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("kind", ["oblique", "flipped"])
def test_numbers_of_a_volume_are_saved_as_integers_in_its_geometry(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Also as floats, which `Invertd` gives wherever it resamples."""
    affine = np.diag([-4.0, 5.0, -30.0, 1.0])
    if kind == "oblique":
        affine[:2, :2] = [[4.0 * np.cos(0.3), -5.0 * np.sin(0.3)], [4.0 * np.sin(0.3), 5.0 * np.cos(0.3)]]
    affine[:3, 3] = [7.0, -8.0, 9.0]
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), affine), tmp_path / "case.nii.gz")
    source = LoadImage(ensure_channel_first=True)(str(tmp_path / "case.nii.gz"))
    numbers = torch.arange(210).reshape(1, 5, 6, 7) + 70_000
    save(tmp_path / "eval", numbers.to(dtype), source)
    file = nib.load(tmp_path / "eval/case_seg.nii.gz")
    assert file.get_data_dtype() == np.int32
    assert np.array_equal(np.asarray(file.dataobj), numbers[0].numpy())
    np.testing.assert_allclose(file.affine, affine, atol=1e-5)


def load_picture(path: Path, picture: Array) -> MetaTensor:
    """Write a picture (rows, columns) and read it as the configs do, columns first."""
    Image.fromarray(picture).save(path)
    source: MetaTensor = LoadImage(ensure_channel_first=True)(str(path))
    return source


@pytest.mark.parametrize("suffix", ["png", "BMP", "tif"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_numbers_of_a_picture_are_saved_as_png_that_lies_on_it(
    tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    picture[:5, :9] = 255
    source = load_picture(tmp_path / "case.png", picture)
    source.meta["filename_or_obj"] = str(tmp_path / f"case.{suffix}")         # reading TIFF takes itk, and seconds
    save(tmp_path / "eval", (source.as_tensor() * 256).to(dtype), source)     # above 8 bits
    pred = Image.open(tmp_path / "eval/case_seg.png")
    assert pred.mode == "I;16"
    assert np.array_equal(np.asarray(pred), picture.astype(np.uint16) * 256)


@pytest.mark.parametrize("shape", [(4, 5, 1), (4, 1, 5), (1, 1, 1)])
def test_an_axis_of_one_voxel_of_a_volume_stays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([4.0, 5.0, 6.0, 1.0])), tmp_path / "case.nii.gz")
    source = LoadImage(ensure_channel_first=True)(str(tmp_path / "case.nii.gz"))
    numbers = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(1, *shape)
    save(tmp_path / "eval", numbers, source)
    file = nib.load(tmp_path / "eval/case_seg.nii.gz")
    assert np.array_equal(np.asarray(file.dataobj), numbers[0].numpy())
    np.testing.assert_allclose(file.affine, np.diag([4.0, 5.0, 6.0, 1.0]))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("first", [1, 70_000])
def test_a_row_or_column_of_a_picture_stays(tmp_path: Path, size: tuple[int, int], first: int) -> None:
    source = load_picture(tmp_path / "case.png", np.zeros(size, np.uint8))
    numbers = first + torch.arange(int(np.prod(size))).reshape(1, *size[::-1])
    save(tmp_path / "eval", numbers, source)
    (path,) = (tmp_path / "eval").iterdir()
    assert np.array_equal(np.asarray(Image.open(path)), numbers[0].numpy().T)


def test_stack_of_pictures_is_a_volume(tmp_path: Path) -> None:
    numbers = torch.arange(4 * 5 * 6, dtype=torch.int32).reshape(1, 6, 5, 4)
    source = MetaTensor(numbers, meta={"filename_or_obj": "stack.tif", "spatial_shape": np.array([6, 5, 4])})
    save(tmp_path, numbers, source)
    file = nib.load(tmp_path / "stack_seg.nii.gz")
    assert np.array_equal(np.asarray(file.dataobj), numbers[0].numpy())
    assert file.get_data_dtype() == np.int32


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_more_instances_than_a_png_can_hold_are_saved_as_tiff(
    tmp_path: Path, dtype: torch.dtype, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Pillow and the reader of configs find them where the picture has them."""
    picture = np.random.default_rng(0).integers(0, 255, (200, 400), dtype=np.uint8)
    source = load_picture(tmp_path / "case.png", picture)
    source.meta["filename_or_obj"] = str(tmp_path / f"case.{suffix}")
    numbers = torch.arange(1, 80_001).reshape(1, 400, 200)
    with caplog.at_level(logging.INFO):
        save(tmp_path / "eval", numbers.to(dtype), source)
    assert "has 80000 instances, more than PNG can hold" in caplog.text
    found = np.asarray(Image.open(tmp_path / "eval/case_seg.tif"))
    assert np.array_equal(found, numbers[0].numpy().T)
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["case_seg.tif"]


def test_as_many_instances_as_a_png_can_hold_are_saved_as_png(tmp_path: Path) -> None:
    source = load_picture(tmp_path / "case.png", np.zeros((2, 2), np.uint8))
    save(tmp_path, torch.full((1, 2, 2), 65_535, dtype=torch.int32), source)
    assert np.asarray(Image.open(tmp_path / "case_seg.png")).max() == 65_535


@pytest.mark.parametrize("name", ["case.nii.gz", "case.png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_affinities_are_saved_as_they_are(tmp_path: Path, name: str, channels: int) -> None:
    size = (4, 5) if name.endswith("png") else (4, 5, 6)
    maps = torch.rand(channels, *size, generator=torch.Generator().manual_seed(0))
    source = load_picture(tmp_path / "case.png", np.zeros((5, 4), np.uint8))
    source.meta |= {"filename_or_obj": name, "spatial_shape": np.array(size)}
    save(tmp_path, maps, source)
    file = nib.load(tmp_path / "case_seg.nii.gz")
    assert file.get_data_dtype() == np.float32
    found = np.asarray(file.dataobj).reshape(*size, channels)
    assert np.array_equal(np.moveaxis(found, -1, 0), maps.numpy())


def test_saving_may_miss_its_key_only_if_told(tmp_path: Path) -> None:
    options = SAVING | {"output_dir": tmp_path}
    assert SaveInstancesd("pred", allow_missing_keys=True, **options)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match="pred"):
        SaveInstancesd("pred", **options)({"image": 1})


@pytest.mark.parametrize("name", ["thresold", "mask"])
def test_a_slip_in_the_options_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(ValueError, match=f"`options` must be arguments of `instances`, got '{name}'; there are .*'thr"):
        InstancesFromAffinitiesd("pred", [[0, -1], [-1, 0]], options={name: 1})
