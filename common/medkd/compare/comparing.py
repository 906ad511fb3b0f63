# SPDX-License-Identifier: Apache-2.0
"""Compare: all that can be refused is refused first, then each network is run on all cases, one case at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from medkd.compare.cases import Files, check_labels, read_case
from medkd.compare.comparison import Comparison
from medkd.compare.levels import Row, align_levels
from medkd.compare.networks import Network, check_comparable
from medkd.compare.running import AFFINITY, Runner

__all__ = ["check_taps", "compare", "tell_case"]


def compare(
    networks: Sequence[Network], cases: Mapping[str, Files], folder: Path, exponent: float = 4.0,
    taps: Sequence[Sequence[str]] = (), class_names: Mapping[int, str] | None = None, shown: int = 3,
    told: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run networks that segment on cases.

    Args:
        networks: two or more of one task.
        cases: name -> files, as `choose_cases` gives them.
        folder: for predictions and maps, until the report is written: 4 bytes per voxel, network and case, 8 of
            instances; of a case with pictures another 2 per voxel that the network sees and level.
        exponent: of the attention maps, at least 1.
        taps: layers that are shown; each one path for all networks, or a path for each. None shows the levels.
        class_names: label value -> name; empty takes those of the first network's bundle.
        shown: cases with pictures, the first ones.
        told: called with a line about what is done.

    Raises:
        FileNotFoundError: weights are not there.
        ValueError: the networks cannot be compared, weights are not theirs, a tap does not exist, or image and label of
            a case do not belong together. Nothing has been predicted then.
        ValueError: later, where a network fails on a case.
    """
    check_comparable(networks)
    check_labels(networks[0], cases)
    runners = [
        Runner(network, folder / str(place), exponent, paths, list(cases)[:shown])
        for place, (network, paths) in enumerate(zip(networks, check_taps(taps, len(networks)), strict=True))
    ]
    told(f"{len(networks)} networks are loaded; looking at the files of {len(cases)} case(s).")
    for name, files in cases.items():
        read_case(networks[0], name, files)
    outcomes = {}
    for network, runner in zip(networks, runners, strict=True):
        outcomes[network.name] = runner.run(cases, partial(tell_case, told, network.name))
    rows = align_levels({runner.network.name: runner.levels for runner in runners})
    if networks[0].kind == "instances":
        rows.append(Row("mean affinity to the nearest voxels: dark is a border", dict.fromkeys(outcomes, AFFINITY)))
    return Comparison(networks, outcomes, cases, class_names or networks[0].class_names(), rows)


def check_taps(taps: Sequence[Sequence[str]], networks: int) -> list[list[str] | None]:
    """The paths of each network, of taps that have one path for all networks, or one for each; None without any.

    Example:
        >>> check_taps([["a"], ["b", "c"]], 2)
        [['a', 'b'], ['a', 'c']]
    """
    for one in taps:
        if len(one) not in (1, networks):
            raise ValueError(
                f"--tap must have one path, or one for each of {networks} networks, got {','.join(one)!r}."
            )
    return [[one[place % len(one)] for one in taps] or None for place in range(networks)]


def tell_case(told: Callable[[str], None], name: str, case: str) -> None:
    """Tell that a network is done with a case."""
    told(f"{name}: {case}")
