# SPDX-License-Identifier: Apache-2.0
"""Affinities without error give the labels back, up to every edge of an image and of its data.

The real sets are those of the folder that the variable MEDKD_DATA names, or beside the repository in shared/data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import label as connected_components

from medkd.inference.instances import InstancesFromAffinitiesd, instances
from medkd.metrics.contingency import contingency, panoptic_quality, variation_of_information
from medkd.ops.embedding import BackgroundPairs, label_affinity, widen_borders
from medkd.phantoms.em import em_phantom
from medkd.phantoms.nuclei import nuclei_phantom

Array = NDArray[Any]
ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("MEDKD_DATA", ROOT.parent / "shared/data"))
NEAR = {2: [[-1, 0], [0, -1]], 3: [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]}
METHODS = [("mutex", 2), ("mutex", 3), ("watershed", 2), ("watershed", 3), ("waterz", 3)]


def real(folder: str, name: str) -> Array:
    path = DATA / folder / name
    if not path.is_file():
        pytest.skip(f"{folder} is not in the data folder; set MEDKD_DATA")
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).astype(np.int64)
    return np.asarray(nib.load(path).dataobj).astype(np.int64)


@cache
def neurons(source: str) -> Array:
    """Labels of a volume, sections first: neurons that touch, neurons with a line between them, or a real block."""
    if source == "real":
        return real("em_fibsem_medulla", "labels/medulla_a_val.nii.gz")[:, :160, :160]
    gap = int(source == "line")
    return em_phantom(3, shape=(20, 96, 88), spacing=(10.0, 10.0, 10.0), gap=gap).label.astype(np.int64)


@cache
def nuclei(source: str) -> Array:
    if source == "real":
        return real("nuclei_dsb2018", "labels/fluo256_05040e2e959c.png")
    return nuclei_phantom(3, shape=(160, 144)).label.astype(np.int64)


def ideal(label: Array, offsets: Sequence[Sequence[int]], background: BackgroundPairs = "different") -> Array:
    """The targets that networks are trained with, shape (O, *S)."""
    numbers = torch.from_numpy(np.ascontiguousarray(label))[None, None]
    return label_affinity(numbers, offsets, background)[0].numpy()


def widened(label: Array) -> Array:
    return widen_borders(torch.from_numpy(np.ascontiguousarray(label))).numpy()


def voi(found: Array, label: Array) -> float:
    return sum(variation_of_information(contingency(found, label)))


def decodings(bundle: str) -> list[Any]:
    """Options of decoding and offsets of the configs of a bundle, each pair once."""
    folder = ROOT / "bundles" / bundle / "configs"
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        name = "inference.json" if path.name.startswith("inference") else "train.json"
        config = json.loads((folder / name).read_text()) | json.loads(path.read_text())
        offsets = config.get("decoded_offsets", "@offsets")
        offsets = config["offsets"] if offsets == "@offsets" else offsets
        pair = (config["decoding"], offsets)
        found.setdefault(json.dumps(pair), pytest.param(*pair, id=path.stem))
    return list(found.values())


@pytest.mark.parametrize("source", ["touching", "line", "real"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("options", "offsets"), decodings("graph_relation_em_neurons"))
def test_neurons_come_back_out_of_their_affinities(options: Any, offsets: Any, wide: bool, source: str) -> None:
    """With widened borders, where what is thin is lost, on the voxels that are left to an instance."""
    label = neurons(source)
    target = widened(label) if wide else label
    found = instances(ideal(target, offsets), offsets, **options)
    if not any(offset[0] for offset in offsets):                   # sections that do not link
        plain = [connected_components(section, background=0, connectivity=1) for section in target]
        target = np.stack([np.where(part > 0, part + z * target.size, 0) for z, part in enumerate(plain)])
    assert voi(found, target) < (0.5 if wide else 0.2)             # `absorb` takes small instances of sections


@pytest.mark.parametrize("source", ["touching", "line", "real"])
@pytest.mark.parametrize("background", ["same", "different"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "waterz", "threshold": 0.3}, {"method": "waterz", "threshold": 0.7}, {"method": "watershed"},
        {"method": "waterz", "per_section": True}, {"method": "mutex"}, {"method": "mutex", "absorb": 20},
    ],
)
def test_every_decoder_gives_neurons_back(options: Any, background: BackgroundPairs, source: str) -> None:
    label = neurons(source)
    assert voi(instances(ideal(label, NEAR[3], background), NEAR[3], **options), label) < 0.1


@pytest.mark.parametrize("options", [{"method": "waterz"}, {"method": "watershed"}, {"method": "mutex"}])
def test_weak_affinities_with_noise_give_neurons_back(options: Any) -> None:
    label = neurons("touching")
    maps = ideal(label, NEAR[3]) * 0.7 + 0.15
    maps += np.random.default_rng(0).normal(0.0, 0.07, maps.shape).astype(np.float32)
    assert voi(instances(maps.clip(0.0, 1.0), NEAR[3], **options), label) < 0.2


@pytest.mark.parametrize("method", ["waterz", "watershed", "mutex"])
def test_two_halves_that_touch_are_two(method: Any) -> None:
    label = np.repeat([1, 2], 10)[:, None, None] * np.ones((1, 20, 20), np.int64)
    for axis in range(3):
        halves = np.ascontiguousarray(np.moveaxis(label, 0, axis))
        found = instances(ideal(halves, NEAR[3]), NEAR[3], method)
        assert found.max() == 2
        assert voi(found, halves) == 0.0


@pytest.mark.parametrize("source", ["phantom", "real"])
@pytest.mark.parametrize("background", ["same", "different"])
@pytest.mark.parametrize("method", ["mutex", "watershed"])
@pytest.mark.parametrize(("options", "offsets"), decodings("graph_relation_nuclei"))
def test_nuclei_come_back_out_of_their_affinities(
    options: Any, offsets: Any, method: Any, background: BackgroundPairs, source: str
) -> None:
    label = nuclei(source)
    found = instances(
        ideal(label, offsets, background), offsets, **(options | {"method": method}), foreground=(label > 0) * 1.0
    )
    assert panoptic_quality(contingency(found, label))[0] > 0.9


@pytest.mark.parametrize("method", ["mutex", "watershed"])
@pytest.mark.parametrize("source", ["phantom", "real"])
def test_nuclei_are_found_without_a_foreground_where_background_is_no_object(method: Any, source: str) -> None:
    """What is wider than a membrane is not shared out."""
    label = nuclei(source)
    found = instances(ideal(label, NEAR[2]), NEAR[2], method)
    assert panoptic_quality(contingency(found, label))[0] > 0.8


@pytest.mark.parametrize("background", ["same", "different"])
def test_sections_of_nerve_cord_come_back(background: BackgroundPairs) -> None:
    label = real("em_sstem_vnc", "labels_instance2d/vnc_val.nii.gz")[:1, :256, :256]
    for method in ("mutex", "watershed", "waterz"):
        found = instances(ideal(label, NEAR[3], background), NEAR[3], method, per_section=True)
        assert voi(found, label) < 0.1


def test_watershed_needs_no_affinities_between_sections_that_do_not_link() -> None:
    label = np.stack([four(), four(), np.rot90(four(), 2)])
    target = np.where(label > 0, label + 10 * np.arange(3)[:, None, None], 0)
    found = instances(ideal(label, NEAR[3][1:]), NEAR[3][1:], "watershed", per_section=True)
    assert found.max() == 12
    assert voi(found, target) == 0.0
    with pytest.raises(ValueError, match=r"`offsets` must hold \[-1, 0, 0\].*'watershed' with `per_section`"):
        instances(ideal(label, NEAR[3][1:]), NEAR[3][1:], "watershed")


def four() -> Array:
    """One section of four cells with a line between them, which reaches every edge."""
    label = 1 + np.arange(21)[:, None] // 11 * 2 + np.arange(23)[None] // 12
    label[10] = label[:, 11] = 0
    return label.astype(np.int64)


@pytest.mark.parametrize("method", ["mutex", "watershed", "waterz"])
@pytest.mark.parametrize("absorb", [0, 10])
@pytest.mark.parametrize(("axis", "per_section"), [(0, True), (0, False), (1, False), (2, False)])
def test_four_cells_of_one_section_are_four(method: Any, per_section: bool, absorb: int, axis: int) -> None:
    label = np.expand_dims(four(), axis)
    found = instances(ideal(label, NEAR[3]), NEAR[3], method, per_section=per_section, absorb=absorb)
    assert found.max() == 4
    assert voi(found, label) == 0.0


@pytest.mark.parametrize(("method", "rank"), METHODS)
@pytest.mark.parametrize("stored", [0.0, 0.3, 1.0])
def test_pairs_that_leave_the_image_do_not_count(method: Any, rank: int, stored: float) -> None:
    """Whatever is stored for them: a layer of one voxel at the first edge is an instance like others."""
    size = (12, 13, 14)[-rank:]
    for axis in range(rank):
        label = np.ones(size, np.int64)
        label[(slice(None),) * axis + (slice(0, 2),)] = 2
        maps = ideal(label, NEAR[rank])
        for other in range(rank):
            maps[(other, *(slice(None),) * other, 0)] = stored
        found = instances(maps, NEAR[rank], method)
        assert voi(found, label) == 0.0


FAR = {2: [[-3, 0], [0, -3], [-27, 0], [0, 27]], 3: [[-3, 0, 0], [-9, 0, 0], [0, -9, 0], [0, 0, 27]]}


@pytest.mark.parametrize(("method", "rank"), METHODS)
@pytest.mark.parametrize("length", [1, 2, 3, 8])
@pytest.mark.parametrize("foreground", [False, True])
def test_offsets_longer_than_the_axis_are_dropped(method: Any, rank: int, length: int, foreground: bool) -> None:
    offsets = NEAR[rank] + FAR[rank]
    label = np.ones((length,) * rank, np.int64)
    inside = np.ones(label.shape, np.float32) if foreground else None
    found = instances(ideal(label, offsets), offsets, method, foreground=inside, absorb=1)
    assert found.shape == label.shape
    assert (found == (length > 1)).all()


def test_a_panic_of_a_package_is_an_ordinary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mwatershed = pytest.importorskip("mwatershed")
    whole = mwatershed.agglom

    def panics(weights: Array, offsets: Any, **options: Any) -> Array:
        return whole(weights[:, :1], [[-5, *offset[1:]] for offset in offsets], **options)   # type: ignore[no-any-return]

    monkeypatch.setattr(mwatershed, "agglom", panics)
    with pytest.raises(RuntimeError, match=r"mwatershed must be able to partition.*\(3, 8, 8, 8\), got its panic"):
        instances(np.ones((3, 8, 8, 8), np.float32), NEAR[3], "mutex")


def halves_with_a_gap(rank: int, gap: int) -> tuple[Array, Array]:
    """One instance with voxels without data across, and where there is data."""
    size = (12, 20, 22)[-rank:]
    data = np.ones(size, bool)
    data[..., 10 : 10 + gap] = False
    return np.ones((rank, *size), np.float32), data


@pytest.mark.parametrize(("method", "rank"), METHODS)
@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("absorb", [0, 10])
def test_nothing_is_linked_through_voxels_without_data(method: Any, rank: int, gap: int, absorb: int) -> None:
    maps, data = halves_with_a_gap(rank, gap)
    found = instances(maps, NEAR[rank], method, mask=data, absorb=absorb)
    assert np.array_equal(found > 0, data)
    assert voi(found, np.where(data, 1 + (np.arange(22) > 10), 0) * np.ones(data.shape, np.int64)) == 0.0
    assert found.max() == 2


@pytest.mark.parametrize(("method", "rank"), METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_is_stored_where_there_is_no_data_does_not_matter(method: Any, rank: int, value: float) -> None:
    """A margin on one side and a lost layer: the rest is as without the margin."""
    label = neurons("touching")[:, :60, :60] if rank == 3 else nuclei("phantom")[:60, :60]
    offsets = NEAR[rank] + FAR[rank][:1]
    plain = instances(ideal(label, offsets), offsets, method)
    pad = [(0, 0)] * (rank - 1) + [(14, 3)]
    maps = np.pad(ideal(label, offsets), [(0, 0), *pad], constant_values=value)
    data = np.pad(np.ones(label.shape, bool), pad)
    found = instances(maps, offsets, method, mask=data)
    assert not found[~data].any()
    assert voi(found[data].reshape(label.shape), plain) < 0.05
    assert not instances(maps, offsets, method, mask=np.zeros_like(data)).any()


def test_transform_takes_the_key_of_voxels_without_data() -> None:
    maps, data = halves_with_a_gap(3, 2)
    transform = InstancesFromAffinitiesd("pred", NEAR[3], no_data="no_data")
    pred = torch.from_numpy(maps)
    assert int(transform({"pred": pred})["pred"].max()) == 1
    assert int(transform({"pred": pred, "no_data": torch.zeros(1, *data.shape)})["pred"].max()) == 1
    found = transform({"pred": pred, "no_data": torch.from_numpy(~data)[None]})["pred"]
    assert int(found.max()) == 2
    assert not found[0][~torch.from_numpy(data)].any()
    with pytest.raises(ValueError, match=r"`no_data` must have the size \(12, 20, 22\) of.*, got \(1, 3, 4, 5\)"):
        transform({"pred": pred, "no_data": torch.zeros(1, 3, 4, 5)})
