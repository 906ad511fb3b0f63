# SPDX-License-Identifier: Apache-2.0
"""Whether a row's networks were trained until they stopped improving: against trainings of twice the schedule."""

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

__all__ = ["WATCHED", "converged", "doubled_arms", "limit_of", "steps_of"]

DOUBLED = "_doubled"
WATCHED = (TEACHER, ALONE, "logits_kd")
LIMIT, LIMIT_VOI = 0.01, 0.05            # what a doubled schedule may still bring: Dice, PQ, accuracy; VOI


def doubled_arms(study: Study, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Arms with one seed: teacher, student alone and plain distillation with twice their schedule."""
    found = {}
    for name in WATCHED:
        if name not in arms or arms[name].candidates:
            continue
        run = make_run(study, name, arms[name], study.row.seeds[0])
        config = _config(run, study)
        schedule = {key: 2 * int(config[key]) for key in ("epochs", "val_interval")}
        options = {**arms[name].options, **schedule}
        found[name + DOUBLED] = replace(arms[name], options=options, seeds=1, regime=run.regime)
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
    """What a doubled schedule brought, of the student alone, and under their names of teacher and plain distillation.

    `validation` is that of the doubled schedule of `steps`, `validation_at_half` that of the row's own.
    """
    told = {name: _told(name, study, finished) for name in WATCHED if (name + DOUBLED, "", _first(study)) in finished}
    return {**told.get(ALONE, {}), **{name: told[name] for name in told if name != ALONE}}


def _told(name: str, study: Study, finished: Finished) -> dict[str, Any]:
    row, doubled = (finished[arm, "", _first(study)] for arm in (name, name + DOUBLED))
    gain = (doubled.validation - row.validation) * (1 if study.recipe.higher_is_better else -1)
    return {
        "steps": steps_of(doubled.run, study), "validation": round(doubled.validation, 4),
        "steps_at_half": steps_of(row.run, study), "validation_at_half": round(row.validation, 4),
        "reached": gain < limit_of(study.recipe.metric),
    }


def _first(study: Study) -> int:
    return study.row.seeds[0]


def _config(run: Run, study: Study) -> dict[str, Any]:
    return BundleRun(study.source, "", run.configs, run.options).config
