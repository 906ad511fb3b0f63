# SPDX-License-Identifier: Apache-2.0
"""Cases with and without a label in one training: the latter are added to the former, and replace none of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.data.utils import set_rnd
from monai.transforms import Randomizable
from monai.utils import MAX_SEED
from torch.utils.data import Dataset

from medkd.data.datalist import load_datalist

__all__ = ["MixedDataset", "unlabeled_cases"]

logger = logging.getLogger(__name__)

_MOST = 16                 # cases without a label beside one with a label; more is a slip, and a step that fills memory
_DRAWS, _UNLABELED = 0x5EED_0001, 0x5EED_0002   # added to a seed, so that the streams are apart in each epoch


def unlabeled_cases(datalist: str | Path, ratio: float, teacher_teaches: bool) -> list[dict[str, str]]:
    """Read the list `unlabeled` of a datalist, if there is one and a training can learn from it.

    Args:
        datalist: the file; it may be missing, as where a program hands in its own list for training.
        ratio: cases without a label that are to be added to each labeled one, 0 to 16; with 0 nothing is read.
        teacher_teaches: there is a teacher, and it has a say; nothing is read without one.

    Returns:
        The items, empty where they are of no use or there are none.

    Raises:
        ValueError: `ratio` is out of range, or the list cannot be used; see `load_datalist`.
    """
    _check_ratio(ratio)
    if not ratio or not teacher_teaches:
        return []
    found = load_datalist(datalist, "unlabeled", missing_ok=True)
    if not found:
        logger.info("%s has no list `unlabeled`: the teacher teaches on the list `training` alone.", datalist)
    return found


class MixedDataset(Randomizable, Dataset[Any]):
    """Labeled cases, to each of which crops of random cases without a label are added.

    It has as many items as there are labeled cases, so an epoch shows each of those once, however many others there
    are. Without any labeled case each item is one without a label. All crops need the same keys to share a batch: a
    transform has to give cases without a label one that is full of -2 (`medkd.ops.ignored.UNLABELED`).

    Which cases are added is drawn from a random state of its own. `set_random_state` seeds it and the transforms of
    both data sets, those of `labeled` as if that stood alone: with `ratio` 0, or nothing to add, each item is bit for
    bit what `labeled` gives.

    Args:
        labeled: MONAI's data set of the training cases; those whose item has no `label` count as unlabeled.
        unlabeled: data set of further images; may be empty.
        ratio: cases without a label that are added to each labeled one, 0 to 16; of 1.5, one or two by chance. They
            differ from each other as long as there are enough.

    Attributes:
        data: all items, the labeled ones before the others.

    Raises:
        ValueError: `ratio` is out of range, or there is no case at all.

    Example:
        >>> from monai.data import Dataset
        >>> mixed = MixedDataset(Dataset([{"image": 1, "label": 1}]), Dataset([{"image": 2}]), ratio=1)
        >>> len(mixed), mixed[0]
        (1, [{'image': 1, 'label': 1}, {'image': 2}])
    """

    def __init__(self, labeled: Any, unlabeled: Any, ratio: float = 1.0) -> None:
        _check_ratio(ratio)
        self.labeled, self.unlabeled, self.ratio = labeled, unlabeled, float(ratio)
        places = {has_label: [place for place, item in enumerate(labeled.data) if ("label" in item) is has_label]
                  for has_label in (True, False)}
        self._with = [(labeled, place) for place in places[True]]
        self._without = [*((labeled, place) for place in places[False]),
                         *((unlabeled, place) for place in range(len(unlabeled)))]
        if not self._with and not self._without:
            raise ValueError(
                "`labeled` and `unlabeled` must have at least one case to train on, got none; name cases with labels "
                "as `training` in the datalist, or images as `unlabeled`, which need a teacher and `unlabeled_ratio` "
                "above 0."
            )
        self.data: list[Mapping[str, Any]] = [one.data[place] for one, place in (*self._with, *self._without)]
        self._log()

    def _log(self) -> None:
        if not self._without:
            return
        count, rest, average = len(self._with), len(self._without), "" if self.ratio.is_integer() else ", on average"
        if not count:
            logger.info("No case has a label, an epoch is the %d without one.", rest)
        elif not self.ratio:
            logger.info("%d labeled cases; %d without a label are left out.", count, rest)
        else:
            logger.info("%d labeled cases, %d without a label: %g of them added to each labeled one%s.",
                        count, rest, self.ratio, average)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> MixedDataset:
        """Seed what is drawn here, and the random transforms of both data sets.

        Args:
            seed: of all; None takes one from `state`.
            state: NumPy's RandomState; None draws a seed that nobody knows.
        """
        if seed is None:
            super().set_random_state(state=state)
            seed = int(self.R.randint(MAX_SEED, dtype="uint64"))
        super().set_random_state((seed + _DRAWS) % MAX_SEED)
        set_rnd(self.unlabeled, (seed + _UNLABELED) % MAX_SEED)
        set_rnd(self.labeled, seed)        # last: both may have the same transforms
        return self

    def __len__(self) -> int:
        return len(self._with or self._without)

    def __getitem__(self, index: int) -> Any:
        dataset, place = (self._with or self._without)[index]
        item = dataset[place]
        if not self._with or not self._without or not self.ratio:
            return item
        crops = _crops(item)               # a list even where nothing is added: items of a batch must be of one kind
        for other, number in self._draw():
            crops += _crops(other[number])
        return crops

    def _draw(self) -> list[tuple[Any, int]]:
        """Some cases without a label, each once if there are enough."""
        count = int(self.ratio) + int(self.R.random_sample() < self.ratio % 1)
        size = len(self._without)
        return [self._without[place] for place in self.R.choice(size, count, replace=count > size)]


def _crops(item: Any) -> list[Any]:
    return list(item) if isinstance(item, (list, tuple)) else [item]


def _check_ratio(ratio: Any) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= _MOST:
        raise ValueError(
            f"`ratio` must be a number of cases without a label per labeled one, 0 to {_MOST}, got {ratio!r}; "
            "1 adds as many as there are labeled ones (`unlabeled_ratio` in a config)."
        )
