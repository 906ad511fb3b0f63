# SPDX-License-Identifier: Apache-2.0
"""Compare classifiers: all that can be refused is refused first, then each is run, and looked at where it matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from medkd.compare.cases import Files, check_labels, read_case
from medkd.compare.classifiers.comparison import ClassComparison
from medkd.compare.classifiers.running import ClassRunner
from medkd.compare.comparing import check_taps, tell_case
from medkd.compare.networks import Network, check_comparable

__all__ = ["compare_classifiers"]


def compare_classifiers(
    networks: Sequence[Network], cases: Mapping[str, Files], taps: Sequence[Sequence[str]] = (),
    class_names: Mapping[int, str] | None = None, shown: int = 3, told: Callable[[str], None] = lambda text: None,
) -> ClassComparison:
    """Run networks that classify whole images on cases.

    Args:
        networks: two or more of one task.
        cases: name -> files, as `choose_cases` gives them; a label is the number of a class.
        taps: layers that are shown; each one path for all networks, or a path for each. None shows the last with maps.
        class_names: number -> name; empty takes those of the first network's bundle.
        shown: cases with pictures: those on which the networks differ, then those that they get wrong, then others.
        told: called with a line about what is done.

    Raises:
        FileNotFoundError: weights are not there.
        ValueError: the networks cannot be compared, weights are not theirs, a tap does not exist, a file cannot be read
            or a label is no class. Nothing has been predicted then.
        ValueError: later, where a network fails on a case.
    """
    check_comparable(networks)
    check_labels(networks[0], cases)
    runners = [ClassRunner(network, paths)
               for network, paths in zip(networks, check_taps(taps, len(networks)), strict=True)]
    told(f"{len(networks)} networks are loaded; looking at the files of {len(cases)} case(s).")
    for name, files in cases.items():
        read_case(networks[0], name, {"image": files["image"]})
    outcomes = {}
    for runner in runners:
        name = runner.network.name
        outcomes[name] = runner.run(cases, partial(tell_case, told, name))
    found = ClassComparison(networks, outcomes, cases, class_names or networks[0].class_names())
    chosen = {case: cases[case] for case in found.ranked[:shown]}
    for runner in runners:
        told(f"{runner.network.name}: attention")
        runner.look_at(chosen)
    return found
