# SPDX-License-Identifier: Apache-2.0
"""Which trainings a row needs, and the pool that runs them as soon as what they start from is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from commands import CommandError, Commands, StoppedError
from recipe import Arm, Recipe, Row
from summary import choose
from trainings import Place, Run, Trained, needs_of, train

__all__ = ["RowFailedError", "all_parallel", "best_candidate", "count_runs", "train_all", "wanted_runs"]


class RowFailedError(RuntimeError):
    """Some runs of a row failed; what they wrote last was shown already."""


Finished = Mapping[tuple[str, str, int], Trained]   # arm, candidate, seed -> training


def _run(row: Row, name: str, arm: Arm, seed: int, candidate: str = "") -> Run:
    whole = arm.changed(arm.candidates[candidate]) if candidate else arm
    options = {**row.schedule(name), **row.options, **whole.options}
    return Run(name, candidate, seed, (*row.overrides, *whole.overrides), options, whole.weights_of)


def wanted_runs(row: Row, arms: Mapping[str, Arm], recipe: Recipe, finished: Finished) -> list[Run]:
    """All trainings of a row that can be named so far: the other seeds of what is chosen only after the choice."""
    runs = []
    distilled = _best({name: (name, "", row.seeds[0]) for name in recipe.distilled_from}, recipe, finished)
    for name, arm in arms.items():
        seeds = row.seeds[: arm.seeds]
        if not arm.candidates:
            is_open = name not in recipe.distilled_from or name == distilled
            runs += [_run(row, name, arm, seed) for seed in (seeds if is_open else seeds[:1])]
            continue
        runs += [_run(row, name, arm, seeds[0], candidate) for candidate in arm.candidates]
        best = best_candidate(name, arm, seeds[0], recipe, finished)
        if best is not None:
            runs += [_run(row, name, arm, seed, best) for seed in seeds[1:]]
    return runs


def best_candidate(name: str, arm: Arm, seed: int, recipe: Recipe, finished: Finished) -> str | None:
    """The candidate that is best on validation with the first seed; None as long as one is not finished."""
    return _best({candidate: (name, candidate, seed) for candidate in arm.candidates}, recipe, finished)


def _best(runs: Mapping[str, tuple[str, str, int]], recipe: Recipe, finished: Finished) -> str | None:
    """Which of some runs, by a name for each, is best on validation; None as long as one is not finished."""
    if not runs or any(run not in finished for run in runs.values()):
        return None
    return choose({name: finished[run].validation for name, run in runs.items()}, recipe.higher_is_better)


def count_runs(row: Row, arms: Mapping[str, Arm], recipe: Recipe) -> int:
    """How many trainings a row is made of, at most."""
    first = sum(max(len(arm.candidates), 1) for arm in arms.values())
    others = {name: len(row.seeds[: arm.seeds]) - 1 for name, arm in arms.items()}
    rivals = [others.pop(name) for name in recipe.distilled_from if name in others]     # one of them is chosen
    return first + sum(others.values()) + max(rivals, default=0)


@dataclass
class _State:
    total: int
    finished: dict[tuple[str, str, int], Trained] = field(default_factory=dict)
    failed: set[tuple[str, str, int]] = field(default_factory=set)
    begin: float = field(default_factory=time.monotonic)

    def say(self, label: str, text: str) -> None:
        print(f"[{len(self.finished)}/{self.total}] {label}: {text}", flush=True)


def train_all(
    row: Row, arms: Mapping[str, Arm], recipe: Recipe, place: Place, workers: int
) -> dict[tuple[str, str, int], Trained]:
    """Train everything that a row needs; a failed run does not hinder those that do not start from it.

    Args:
        row: the row.
        arms: name -> arm, in the order in which they start.
        recipe: decides which value is better.
        place: where.
        workers: trainings at once.

    Raises:
        RowFailedError: a run failed.
        KeyboardInterrupt: the user interrupted; all commands were stopped.
    """
    state = _State(count_runs(row, arms, recipe))
    started: set[tuple[str, str, int]] = set()
    running: dict[Future[Trained], Run] = {}
    with _Pool(workers, place.commands) as pool:
        while True:
            for run in wanted_runs(row, arms, recipe, state.finished):
                if _name(run) in started or len(running) >= workers:
                    continue
                weights = _weights(run, row, arms, recipe, place, state.finished)
                if weights is not None:
                    started.add(_name(run))
                    running[pool.submit(train, run, place, weights, partial(state.say, run.label))] = run
            if not running:
                break
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                _finish(future, running.pop(future), recipe, state)
    wanted = wanted_runs(row, arms, recipe, state.finished)
    missing = [run.label for run in wanted if _name(run) not in state.finished]
    if missing:
        raise RowFailedError(f"{row.id}: not trained: {'; '.join(missing)}. The same command goes on from here.")
    return {_name(run): state.finished[_name(run)] for run in wanted}


def _name(run: Run) -> tuple[str, str, int]:
    return run.arm, run.candidate, run.seed


def _weights(
    run: Run, row: Row, arms: Mapping[str, Arm], recipe: Recipe, place: Place, finished: Finished
) -> dict[str, Any] | None:
    """Config key -> weights that a run starts from; None as long as they are not there."""
    found = {}
    for key, name in needs_of(run, place).items():
        candidate = best_candidate(name, arms[name], row.seeds[0], recipe, finished) or ""
        trained = finished.get((name, candidate, row.seeds[0]))
        if trained is None:
            return None
        found[key] = trained.folder / "model.pt"
    return found


def _finish(future: Future[Trained], run: Run, recipe: Recipe, state: _State) -> None:
    try:
        trained = future.result()
        if trained.metric != recipe.metric and run.arm not in recipe.helpers:
            raise CommandError(
                f"the best model must be taken by {recipe.metric}, as the recipe says, got {trained.metric}; "
                "change `metric` of the recipe or `validate#key_metric` of train.json."
            )
    except CommandError as error:
        state.failed.add(_name(run))
        state.say(run.label, f"FAILED, {error}")
        return
    state.finished[_name(run)] = trained
    left = state.total - len(state.finished) - len(state.failed)
    word = "finished" if trained.new else "was finished before"
    state.say(
        run.label, f"{word}, {trained.metric} {trained.validation:.4f} on validation at epoch {trained.epoch}, "
        f"{trained.minutes:.1f} min; {left} left, {(time.monotonic() - state.begin) / 60:.0f} min so far",
    )


class _Pool:
    """A pool of threads that is left only when all commands have ended, which an error stops."""

    def __init__(self, workers: int, commands: Commands) -> None:
        self.pool, self.commands = ThreadPoolExecutor(workers), commands

    def __enter__(self) -> ThreadPoolExecutor:
        return self.pool

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.commands.stop()
        self.pool.shutdown(wait=True, cancel_futures=True)


def all_parallel(work: Callable[[Any], Any], items: list[Any], workers: int, commands: Commands) -> list[Any]:
    """Call `work` for each item, `workers` at once, and give what it returned in their order."""
    with _Pool(workers, commands) as pool:
        futures = [pool.submit(work, item) for item in items]
        while wait(futures, timeout=1).not_done:
            broken = [future for future in futures if future.done() and future.exception()]
            if broken and not isinstance(broken[0].exception(), StoppedError):
                broken[0].result()
        return [future.result() for future in futures]
