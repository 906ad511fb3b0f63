# SPDX-License-Identifier: Apache-2.0
"""Whether a row's networks were trained until they stopped improving: against trainings of half the schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lab.bundle import BundleRun
from lab.keys import lookup
from lab.plan import Finished, make_run
from lab.recipe import ALONE, TEACHER, Arm
from lab.training import Run, Study

__all__ = ["converged", "half_arms", "half_schedule", "limit_of", "steps_of"]

AT_HALF = "_at_half"
LIMIT, LIMIT_VOI = 0.01, 0.05            # what a doubled schedule may still bring: Dice, PQ, accuracy; VOI


def half_schedule(epochs: int, val_interval: int) -> dict[str, int] | None:
    """Options of a schedule half as long that ends with a validation, about as many epochs apart; None of one.

    Example:
        >>> half_schedule(100, 10), half_schedule(25, 5), half_schedule(1, 1)
        ({'epochs': 50, 'val_interval': 10}, {'epochs': 12, 'val_interval': 4}, None)
    """
    half = epochs // 2
    if half == 0:
        return None
    near = range(max(1, 2 * val_interval // 3), 4 * val_interval // 3 + 1)
    interval = min(near, key=lambda one: (half % one, abs(one - val_interval))) if val_interval <= half else half
    return {"epochs": half - half % interval, "val_interval": interval}


def half_arms(study: Study, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Arms with one seed: the teacher and the student alone with half their schedule."""
    found = {}
    for name in (TEACHER, ALONE):
        if name not in arms or arms[name].candidates:
            continue
        run = make_run(study, name, arms[name], study.row.seeds[0])
        config = _config(run, study)
        schedule = half_schedule(config["epochs"], config["val_interval"])
        if schedule:
            options = {**arms[name].options, **schedule}
            found[name + AT_HALF] = replace(arms[name], options=options, seeds=1, regime=run.regime)
    return found


def steps_of(run: Run, study: Study) -> int:
    """Optimizer steps of a training."""
    config = _config(run, study)
    length = (lookup(config, "train#trainer#epoch_length") or [None])[0]
    if not isinstance(length, int):
        cases = json.loads(study.datalist_of(run).read_text())
        images = [*cases["training"], *cases.get("unlabeled", ())]
        labeled = [case for case in images if case.get("label")]   # others are added to these, if there are any
        length = -(-len(labeled or images) // int(config["batch_size"]))
    return int(config["epochs"]) * length


def limit_of(metric: str) -> float:
    """By how much a doubled schedule may improve a metric that has converged."""
    return LIMIT_VOI if "voi" in metric else LIMIT


def converged(study: Study, finished: Finished) -> dict[str, Any]:
    """What the results tell of the student alone, and in `teacher` of the teacher: whether half the steps would do."""
    told = {name: _told(name, study, finished) for name in (ALONE, TEACHER) if (name, "", _first(study)) in finished}
    return {**told.get(ALONE, {}), **({TEACHER: told[TEACHER]} if TEACHER in told else {})}


def _told(name: str, study: Study, finished: Finished) -> dict[str, Any]:
    whole, half = finished[name, "", _first(study)], finished.get((name + AT_HALF, "", _first(study)))
    told = {"steps": steps_of(whole.run, study), "validation": round(whole.validation, 4)}
    if half is None:
        return {**told, "validation_at_half": None, "reached": None, "reason": "one epoch cannot be halved"}
    gain = (whole.validation - half.validation) * (1 if study.recipe.higher_is_better else -1)
    return {
        **told, "steps_at_half": steps_of(half.run, study), "validation_at_half": round(half.validation, 4),
        "reached": gain < limit_of(study.recipe.metric),
    }


def _first(study: Study) -> int:
    return study.row.seeds[0]


def _config(run: Run, study: Study) -> dict[str, Any]:
    return BundleRun(study.source, "", run.configs, run.options).config
