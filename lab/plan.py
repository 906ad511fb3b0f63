# SPDX-License-Identifier: Apache-2.0
"""Which trainings a row needs, and when they run: each as soon as what it starts from is there, and a worker free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from lab.bundle import BundleRun
from lab.execute import ExecutionError, Executor
from lab.keys import run_distils
from lab.recipe import ALONE, TEACHER, Arm
from lab.regimes import ALL_LABELS
from lab.training import Run, Study, Trained, ranked, train

__all__ = ["Finished", "RowFailedError", "all_parallel", "count_runs", "make_run", "train_all", "wanted_runs"]

Finished = Mapping[tuple[str, str, int], Trained]   # arm, candidate, seed -> training
Arms = Mapping[str, Arm]
Item = TypeVar("Item")
Made = TypeVar("Made")


class RowFailedError(RuntimeError):
    """Some runs of a row failed; what they wrote last was shown already."""


def wanted_runs(study: Study, arms: Arms, finished: Finished) -> list[Run]:
    """All trainings of a row that can be named so far: the other seeds of what is chosen only after the choice."""
    leaders = {name: _leader(study, name, arm, finished) for name, arm in arms.items()}
    rivals = [leaders[name] for name in study.recipe.distilled_from if name in leaders]   # a row may lack one
    distilled = ranked([one for one in rivals if one], study.recipe)[0].run.arm if rivals and all(rivals) else None
    runs = []
    for name, arm in arms.items():
        first, *others = study.row.seeds[: arm.seeds]
        runs += [make_run(study, name, arm, first, candidate) for candidate in arm.candidates or [""]]
        leader = leaders[name]
        if (leader or not arm.candidates) and (name not in study.recipe.distilled_from or name == distilled):
            runs += [make_run(study, name, arm, seed, leader.run.candidate if leader else "") for seed in others]
    return runs


def _leader(study: Study, name: str, arm: Arm, finished: Finished) -> Trained | None:
    """An arm's run with the first seed, of its candidates the best on validation; None until all are finished."""
    runs = [finished.get((name, candidate, study.row.seeds[0])) for candidate in arm.candidates or [""]]
    there = [run for run in runs if run]
    return ranked(there, study.recipe)[0] if len(there) == len(runs) else None


def make_run(study: Study, name: str, arm: Arm, seed: int, candidate: str = "") -> Run:
    """The training of an arm, or of one of its candidates, with a seed."""
    row, whole = study.row, arm.candidates[candidate] if candidate else arm
    configs = ["train", *row.overrides, *whole.overrides]
    options = {**row.schedule(name), **row.options, **whole.options, "seed": seed}
    weights_of = whole.weights_of
    if weights_of is None:
        weights_of = {"teacher_path": TEACHER} if run_distils(BundleRun(study.source, "", configs, options)) else {}
    regime = whole.regime or (ALL_LABELS if name in (TEACHER, *study.recipe.helpers) else row.regime)
    return Run(name, candidate, seed, configs, options, weights_of, regime)


def _weights(run: Run, study: Study, arms: Arms, finished: Finished) -> dict[str, Path] | None:
    """Config key -> weights that a run starts from; None as long as they are not there."""
    leaders = {key: _leader(study, name, arms[name], finished) for key, name in run.weights_of.items()}
    found = {key: one.folder / "model.pt" for key, one in leaders.items() if one}
    return found if len(found) == len(leaders) else None


def count_runs(study: Study, arms: Arms) -> int:
    """How many trainings a row is made of, at most."""
    others = {name: len(study.row.seeds[: arm.seeds]) - 1 for name, arm in arms.items()}
    rivals = [others.pop(name) for name in study.recipe.distilled_from if name in others]   # one of them is chosen
    return sum(max(len(arm.candidates), 1) for arm in arms.values()) + sum(others.values()) + max(rivals, default=0)


def train_all(study: Study, arms: Arms) -> Finished:
    """Train everything that a row needs; a failed run does not hinder those that do not start from it.

    An executor that does not train leaves out what is not finished, and all of an arm whose first seed is not.

    Raises:
        RowFailedError: a run failed, or the teacher or the student alone would be left out.
    """
    total, begin = count_runs(study, arms), time.monotonic()
    finished: dict[tuple[str, str, int], Trained] = {}
    tried: set[tuple[str, str, int]] = set()
    failed: list[str] = []

    def say(run: Run, text: str) -> None:
        print(f"[{len(finished)}/{total}] {run.label}: {text}\n", end="", flush=True)   # whole, from several threads

    def work(run: Run, weights: Mapping[str, Path]) -> None:
        try:
            trained = train(run, study, weights, partial(say, run))
        except ExecutionError as error:
            failed.append(run.label)
            say(run, f"FAILED, {error}" if study.executor.trains else f"left out, {error}")
            return
        finished[run.id] = trained
        say(
            run, f"{'finished' if trained.new else 'was finished before'}, {trained.metric} {trained.validation:.4f} "
            f"on validation at epoch {trained.epoch}, {trained.minutes:.1f} min; "
            f"{total - len(finished) - len(failed)} left, {(time.monotonic() - begin) / 60:.0f} min so far",
        )

    with _workers(study.workers, study.executor) as pool:
        running: set[Future[None]] = set()
        while True:
            wanted = wanted_runs(study, arms, finished)
            for run in wanted:
                weights = _weights(run, study, arms, finished) if run.id not in tried else None
                if weights is not None:
                    tried.add(run.id)
                    running.add(pool.submit(work, run, weights))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    missing = [run for run in wanted if run.id not in finished]
    left_out = {run.arm for run in missing if run.seed == study.row.seeds[0]}
    if (missing and study.executor.trains) or left_out & {TEACHER, ALONE}:
        labels = "; ".join(run.label for run in missing)
        raise RowFailedError(f"{study.row.id}: not trained: {labels}. The same command goes on from here.")
    return {run.id: finished[run.id] for run in wanted if run.id in finished and run.arm not in left_out}


def all_parallel(work: Callable[[Item], Made], items: Sequence[Item], workers: int, executor: Executor) -> list[Made]:
    """Call `work` for each item, `workers` at once, and give what it returned in their order; an error stops all."""
    with _workers(workers, executor) as pool:
        futures = [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]


@contextmanager
def _workers(number: int, executor: Executor) -> Iterator[ThreadPoolExecutor]:
    """Threads that start jobs; an error ends the jobs that run, and starts no other."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    except BaseException:
        executor.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
