# SPDX-License-Identifier: Apache-2.0
"""Compare: all that can be refused is refused first, then each network is run on all cases, one case at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from medkd.compare.cases import Files, read_case
from medkd.compare.comparison import Comparison
from medkd.compare.levels import Row, align_levels
from medkd.compare.networks import Network, check_comparable
from medkd.compare.running import AFFINITY, Runner

__all__ = ["compare"]


def compare(
    networks: Sequence[Network], cases: Mapping[str, Files], folder: Path, exponent: float = 4.0,
    taps: Sequence[Sequence[str]] = (), class_names: Mapping[int, str] | None = None, shown: int = 3,
    told: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run networks on cases.

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
    for one in taps:
        if len(one) not in (1, len(networks)):
            raise ValueError(
                f"--tap must have one path, or one for each of {len(networks)} networks, got {','.join(one)!r}."
            )
    runners = [
        Runner(network, folder / str(place), exponent, [one[place % len(one)] for one in taps] or None)
        for place, network in enumerate(networks)
    ]
    told(f"{len(networks)} networks are loaded; looking at the files of {len(cases)} case(s).")
    for name, files in cases.items():
        read_case(networks[0], name, files)
    outcomes = {}
    for network, runner in zip(networks, runners, strict=True):
        outcomes[network.name] = runner.run(cases, list(cases)[:shown], partial(_tell, told, network.name))
    rows = align_levels({runner.network.name: runner.levels for runner in runners})
    if networks[0].kind == "instances":
        rows.append(Row("mean affinity to the nearest voxels: dark is a border", dict.fromkeys(outcomes, AFFINITY)))
    return Comparison(networks, outcomes, cases, rows, class_names or networks[0].class_names())


def _tell(told: Callable[[str], None], name: str, case: str) -> None:
    told(f"{name}: {case}")
