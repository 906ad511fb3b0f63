# SPDX-License-Identifier: Apache-2.0
"""Cases without a label are added to labeled ones: how many, which, and that nothing else changes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader, Dataset
from monai.data.utils import set_rnd
from monai.transforms import Compose, RandGaussianNoised, RandSpatialCropSamplesd
from torch.utils.data.distributed import DistributedSampler

import toys
from medkd.data.datalist import write_datalist
from medkd.data.mixing import MixedDataset, unlabeled_cases
from medkd.handlers.randomness import EpochSeed
from medkd.handlers.run_record import describe_data

KEYS = ["image", "label"]


def cases(first: int, count: int, has_label: bool = True) -> list[dict[str, Any]]:
    """Images of one value each, the number of the case."""
    keys = KEYS if has_label else KEYS[:1]
    return [{key: torch.full((1, 6, 6), float(number)) for key in keys} for number in range(first, first + count)]


def fill(case: dict[str, Any]) -> dict[str, Any]:
    """Stands for the step of a bundle that gives each case a label."""
    return {"label": torch.full((1, 6, 6), -2.0), **case}


def transform() -> Compose:
    crops = RandSpatialCropSamplesd(keys=KEYS, roi_size=(3, 3), num_samples=2, random_size=False)
    return Compose([fill, crops, RandGaussianNoised(keys="image", prob=0.5, std=0.01)])


def whole(data: list[dict[str, Any]]) -> Dataset:
    return Dataset(data, fill)


def numbers(item: Any) -> list[int]:
    """Numbers of the cases that the crops of an item are of."""
    return [round(float(crop["image"].mean())) for crop in (item if isinstance(item, list) else [item])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# what an item is


def test_crops_of_as_many_cases_as_the_ratio_says_are_added_behind_those_of_the_labeled_one() -> None:
    mixed = MixedDataset(Dataset(cases(0, 3), transform()), Dataset(cases(10, 4, False), transform()), ratio=2)
    assert len(mixed) == 3
    for index in range(3):
        found = numbers(mixed[index])
        assert found[:2] == [index, index]
        assert len(found) == 6
        assert found[2] == found[3] != found[4] == found[5]
        assert {*found[2:]} <= {10, 11, 12, 13}
        assert all((crop["label"] == -2).all() for crop in mixed[index][2:])


def test_training_cases_without_a_label_are_added_with_the_others_and_are_no_items_of_their_own() -> None:
    data = [*cases(0, 1), *cases(10, 2, False), *cases(1, 1)]
    mixed = MixedDataset(whole(data), whole(cases(12, 1, False)), ratio=3)
    assert len(mixed) == 2
    assert [numbers(mixed[index])[0] for index in (0, 1, -1)] == [0, 1, 1]
    assert sorted(numbers(mixed[0])[1:]) == [10, 11, 12]
    assert [int(item["image"].mean()) for item in mixed.data] == [0, 1, 10, 11, 12]


def test_more_cases_than_there_are_come_twice() -> None:
    mixed = MixedDataset(whole(cases(0, 1)), whole(cases(10, 2, False)), ratio=16)
    assert Counter(numbers(mixed[0])[1:]).keys() == {10, 11}
    assert len(mixed[0]) == 17


def test_all_cases_without_a_label_are_drawn_about_equally_often() -> None:
    mixed = MixedDataset(whole(cases(0, 1)), whole(cases(10, 4, False)), ratio=1)
    set_rnd(mixed, 0)
    found = Counter(numbers(mixed[0])[1] for _ in range(400))
    assert found.keys() == {10, 11, 12, 13}
    assert min(found.values()) > 70                                # 100 expected, standard deviation 8.7


def test_part_of_a_ratio_is_one_more_case_by_chance() -> None:
    mixed = MixedDataset(whole(cases(0, 1)), whole(cases(10, 4, False)), ratio=1.25)
    set_rnd(mixed, 0)
    found = Counter(len(mixed[0]) - 1 for _ in range(400))
    assert found.keys() == {1, 2}
    assert 70 < found[2] < 130                                     # 100 expected, standard deviation 8.7


def test_items_of_a_batch_are_of_one_kind_where_chance_adds_to_some_of_them_only() -> None:
    mixed = MixedDataset(whole(cases(0, 8)), whole(cases(10, 4, False)), ratio=0.5)
    set_rnd(mixed, 0)
    batch = next(iter(DataLoader(mixed, batch_size=8)))
    assert 8 < len(batch["image"]) < 16


def test_without_any_labeled_case_each_item_is_one_without_a_label() -> None:
    for data in ([], cases(10, 2, False)):
        mixed = MixedDataset(Dataset(data, transform()), Dataset(cases(12, 1, False), transform()), ratio=4)
        assert len(mixed) == len(data) + 1
        assert [numbers(mixed[index]) for index in range(len(mixed))] == [[n, n] for n in (10, 11, 12)[-len(mixed):]]


def test_places_beyond_the_last_item_raise_as_a_list_does() -> None:
    mixed = MixedDataset(whole(cases(0, 2)), whole([]))
    with pytest.raises(IndexError):
        mixed[2]
    assert [numbers(item) for item in mixed] == [[0], [1]]


# nothing else changes


@pytest.mark.parametrize(("ratio", "extra"), [(0, 3), (0.0, 0), (1, 0), (2.5, 0)])
@pytest.mark.parametrize("is_shared", [True, False])
def test_with_nothing_to_add_items_are_bit_for_bit_those_of_the_labeled_cases(
    ratio: float, extra: int, is_shared: bool
) -> None:
    alone = CacheDataset(cases(0, 3), transform(), progress=False)
    steps = transform()
    mixed = MixedDataset(
        CacheDataset(cases(0, 3), steps, progress=False),
        CacheDataset(cases(10, extra, False), steps if is_shared else transform(), progress=False), ratio,
    )
    for seed in (0, 7, 2**32 + 5):
        set_rnd(alone, seed)
        set_rnd(mixed, seed)
        for index in (0, 2, 1):
            assert same(alone[index], mixed[index])
    for dataset in (alone, mixed):
        torch.manual_seed(3)
        dataset.batches = list(DataLoader(dataset, batch_size=2, shuffle=True))
    assert same(alone.batches, mixed.batches)


def test_with_nothing_to_add_a_single_crop_stays_what_it_is_without_a_list() -> None:
    assert isinstance(MixedDataset(whole(cases(0, 1)), whole(cases(10, 1, False)), 0)[0], dict)
    assert isinstance(MixedDataset(whole(cases(0, 1)), whole([]), 1)[0], dict)
    assert isinstance(MixedDataset(whole([]), whole(cases(10, 1, False)), 1)[0], dict)


def test_labeled_crops_are_the_same_whatever_is_added_by_other_transforms() -> None:
    alone = Dataset(cases(0, 3), transform())
    mixed = MixedDataset(Dataset(cases(0, 3), transform()), Dataset(cases(10, 4, False), transform()), 1.5)
    for dataset in (alone, mixed):
        set_rnd(dataset, 5)
    for index in range(3):
        assert same(alone[index], mixed[index][:2])


def test_items_that_a_data_set_keeps_are_not_changed() -> None:
    class Kept(list):
        data = cases(0, 1)

    mixed = MixedDataset(Kept([cases(0, 2)]), whole(cases(10, 1, False)), 1)
    assert [len(mixed[0]), len(mixed[0])] == [3, 3]


def test_added_cases_are_not_augmented_as_the_labeled_one_is() -> None:
    noise = [RandGaussianNoised(keys="image", prob=1.0) for _ in range(2)]
    mixed = MixedDataset(Dataset(cases(0, 1), noise[0]), Dataset(cases(0, 1, False), noise[1]), 1)
    set_rnd(mixed, 0)
    labeled, added = mixed[0]
    assert not torch.equal(labeled["image"], added["image"])


# draws are repeated


def epochs_of(seed: int, epochs: int = 2, workers: int = 0, others: int = 0, **options: Any) -> list[Any]:
    """The batches of each epoch, as the trainer of a bundle gets them; `others` items are taken before."""
    mixed = MixedDataset(Dataset(cases(0, 4), transform()), Dataset(cases(10, 9, False), transform()), 1.5)
    for _ in range(others):
        mixed[0]
    engine: Any = Engine(lambda engine, batch: seen[-1].append({key: batch[key].clone() for key in KEYS}))
    engine.data_loader = DataLoader(mixed, batch_size=2, num_workers=workers, **options)
    seen: list[Any] = []
    engine.add_event_handler(Events.EPOCH_STARTED, lambda _: seen.append([]))
    EpochSeed(seed).attach(engine)
    engine.run(engine.data_loader, max_epochs=epochs)
    return seen


def added(epoch: list[Any]) -> list[int]:
    """Numbers of the cases without a label that an epoch shows."""
    return [number for batch in epoch for number in map(round, batch["image"].mean((1, 2, 3)).tolist()) if number > 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_on_its_seed_alone_so_that_runs_can_be_repeated_and_resumed(workers: int) -> None:
    first = epochs_of(1, workers=workers, shuffle=True)
    assert toys.same(first, epochs_of(1, workers=workers, shuffle=True, others=3))
    assert toys.same(first[1:], epochs_of(2, 1, workers=workers, shuffle=True, others=1))
    assert not toys.same(first[0], first[1])


def test_epochs_and_workers_draw_other_cases() -> None:
    epochs = [tuple(added(epoch)) for epoch in epochs_of(1, epochs=3)]
    assert len(set(epochs)) == 3
    mixed = MixedDataset(whole(cases(0, 20)), whole(cases(100, 50, False)), 1)
    batches = list(DataLoader(mixed, batch_size=10, num_workers=2))
    found = [batch["image"].amax((1, 2, 3)).tolist()[1::2] for batch in batches]
    assert found[0] != found[1]


def test_ranks_share_the_labeled_cases_and_draw_others_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        sampler = DistributedSampler(range(4), 2, rank, shuffle=False)
        seen.append(epochs_of(1, 1, sampler=sampler)[0])
    assert added(seen[0]) != added(seen[1])
    shown = [{round(float(image.mean())) for batch in part for image in batch["image"]} for part in seen]
    assert [found & {0, 1, 2, 3} for found in shown] == [{0, 2}, {1, 3}]


def test_a_state_seeds_all_as_well() -> None:
    found = []
    for seed in (1, 1, 2):
        mixed = MixedDataset(Dataset(cases(0, 2), transform()), Dataset(cases(10, 9, False), transform()), 2)
        mixed.set_random_state(state=np.random.RandomState(seed))
        found.append(mixed[0])
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


# what is told and refused


def test_record_of_a_run_has_all_cases(tmp_path: Path) -> None:
    names = [tmp_path / f"{name}.nii" for name in "abc"]
    for path in names:
        path.write_bytes(path.name.encode())
    labeled = [{"image": str(names[0]), "label": str(names[0])}, {"image": str(names[1])}]
    mixed = MixedDataset(Dataset(labeled), Dataset([{"image": str(names[2])}]), 1)
    record = describe_data(training=DataLoader(mixed, batch_size=1))["lists"]["training"]
    assert [[entry[:2] for entry in case] for case in record] == [
        [["image", "a.nii"], ["label", "a.nii"]], [["image", "b.nii"]], [["image", "c.nii"]],
    ]


@pytest.mark.parametrize(
    ("labeled", "extra", "ratio", "line"),
    [
        (18, 66, 1, "18 labeled cases, 66 without a label: 1 of them added to each labeled one."),
        (4, 2, 1.5, "4 labeled cases, 2 without a label: 1.5 of them added to each labeled one, on average."),
        (0, 2, 1, "No case has a label, an epoch is the 2 without one."),
        (4, 2, 0, "4 labeled cases; 2 without a label are left out."),
        (4, 0, 1, None),
    ],
)
def test_numbers_of_cases_are_told_once(
    labeled: int, extra: int, ratio: float, line: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medkd")
    mixed = MixedDataset(whole(cases(0, labeled)), whole(cases(100, extra, False)), ratio)
    mixed[0], mixed.set_random_state(0)
    assert [record.getMessage() for record in caplog.records] == [line] * (line is not None)


@pytest.mark.parametrize("ratio", [-0.1, 16.1, float("nan"), float("inf"), True, "1", None])
def test_ratio_out_of_range_is_refused(ratio: Any, tmp_path: Path) -> None:
    message = re.escape(f"`ratio` must be a number of cases without a label per labeled one, 0 to 16, got {ratio!r};")
    with pytest.raises(ValueError, match=message):
        MixedDataset(whole(cases(0, 1)), whole([]), ratio)
    with pytest.raises(ValueError, match=message):
        unlabeled_cases(tmp_path / "none.json", ratio, False)


@pytest.mark.parametrize("ratio", [0, 1])
def test_nothing_to_train_on_is_refused(ratio: float) -> None:
    message = "`labeled` and `unlabeled` must have at least one case to train on, got none; name cases with labels as"
    with pytest.raises(ValueError, match=message):
        MixedDataset(whole([]), whole([]), ratio)


# unlabeled_cases


def test_images_without_labels_are_read_where_a_teacher_can_use_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": [], "unlabeled": [{"image": "a.nii"}]})
    assert unlabeled_cases(path, 1, True) == [{"image": str(tmp_path / "a.nii")}]
    assert unlabeled_cases(path, 1, False) == unlabeled_cases(path, 0, True) == []
    assert unlabeled_cases(tmp_path / "none.json", 1, True) == []
    other = write_datalist(tmp_path / "other.json", {"training": []})
    with caplog.at_level("INFO"):
        assert unlabeled_cases(other, 1, True) == []
    assert "other.json has no list `unlabeled`: the teacher teaches on the list `training` alone." in caplog.text
    write_datalist(path, {"training": [], "unlabeled": [{"image": "a.nii", "label": "b.nii"}]})
    with pytest.raises(ValueError, match="`unlabeled` of .*list.json must have images without a label, got one for 1"):
        unlabeled_cases(path, 0.5, True)


def test_a_list_of_another_spelling_is_not_passed_over(tmp_path: Path) -> None:
    path = write_datalist(tmp_path / "list.json", {"training": [], "unlabelled": [{"image": "a.nii"}]})
    with pytest.raises(ValueError, match="in the list `unlabeled` of .*list.json, got 'unlabelled'; rename it"):
        unlabeled_cases(path, 1, True)
