# SPDX-License-Identifier: Apache-2.0
"""What a teacher without its data is worth: phantom CT, teacher, students alone, distilled student, scores, report.

Somebody trained the teacher with labels that nobody else has; the user has a few labels and images without any.

    make demo                                  or: .venv/bin/python -m lab.demo
    .venv/bin/python -m lab.demo --help        options, such as --quick, --epochs 60, --output DIR, --fresh

Finished steps are not repeated, and an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lab.bundle import ROOT, copy_bundle, show_words
from lab.demo import steps
from lab.demo.scores import DISTILLED, TEACHER, Result, read_result, summary_table, verdict
from lab.demo.steps import SPEED, Sizes, Training, folder_of, inference, make_jobs, make_trainings
from lab.execute import ExecutionError, Executor, Job
from lab.measure import machine, versions
from lab.plan import all_parallel
from lab.progress import clock, do_with_bar, tell

FULL = Sizes(
    teacher_labels=48, labels=4, unlabeled=40, validation=3, test=6, shape=(96, 80, 64), spacing=(3.0, 3.0, 4.0),
    teacher_epochs=20, alone_epochs=60, distilled_epochs=30, val_interval=10, steps=40, more_labels=(48,),
)
QUICK = Sizes(
    teacher_labels=3, labels=2, unlabeled=2, validation=1, test=2, shape=(48, 40, 32), spacing=(3.0, 3.0, 4.0),
    teacher_epochs=2, alone_epochs=4, distilled_epochs=2, val_interval=1, steps=10, more_labels=(3,),
)
DURATION = {FULL: ", about 10 minutes on two cores", QUICK: ", about a minute on two cores"}
WORKERS = 2
BUNDLE = ROOT / "bundles" / "boundary_relation_ct_organs"


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `sizes` holds the numbers, `output` and `report` where things go."""
    parser = argparse.ArgumentParser(
        "python -m lab.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute, to see that all works; its scores mean nothing")
    add("--epochs", type=int, metavar="N", help=f"of {FULL.steps} steps, of teacher and distilled student; a student "
        f"alone takes twice as many (default: {FULL.teacher_epochs} and {FULL.distilled_epochs})")
    add("--labels", type=int, metavar="N", help=f"cases of yours with a label (default: {FULL.labels})")
    add("--unlabeled", type=int, metavar="N", help=f"and without one (default: {FULL.unlabeled})")
    add("--seed", type=int, default=0, metavar="N", help="of phantoms and trainings (default: 0)")
    add("--output", type=Path, metavar="DIR", help="data, weights, logs, report (default: demo/output, and the "
        "report in demo/report.html)")
    add("--fresh", action="store_true", help="repeat finished steps too")
    options = parser.parse_args(words)
    for name, least in (("epochs", 1), ("labels", 1), ("unlabeled", 1), ("seed", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name} must be {least} or more, got {value}.")
    folder = options.output
    if folder and folder.exists() and not (folder / "steps").is_dir() and any(folder.iterdir()):
        parser.error(f"--output must be a new or empty folder, or that of an earlier demo, got {folder}.")
    sizes = QUICK if options.quick else FULL
    changed = {}
    if number := options.epochs:
        changed = {"teacher_epochs": number, "alone_epochs": 2 * number, "distilled_epochs": number}
        changed["val_interval"] = min(sizes.val_interval, number)
    changed |= {name: getattr(options, name) for name in ("labels", "unlabeled") if getattr(options, name) is not None}
    more = tuple(count for count in sizes.more_labels if count > changed.get("labels", sizes.labels))
    options.sizes = replace(sizes, more_labels=more, **changed)
    options.typed = "make demo" if not words else f".venv/bin/python -m lab.demo {shlex.join(words)}"
    options.report = (folder or ROOT / "demo").resolve() / "report.html"
    options.output = (folder or ROOT / "demo" / "output").resolve()
    return options


def do_jobs(jobs: Sequence[Job], output: Path, trainings: Mapping[str, Training]) -> None:
    """Do all jobs, two at once where they do not need each other, and tell each training's best validation Dice."""
    threads = max((os.cpu_count() or 1) // WORKERS, 1)   # two trainings on a core each beat one on two cores

    def work(executor: Executor, lane: Sequence[Job]) -> None:
        for job in lane:
            title = f"[{jobs.index(job) + 1}/{len(jobs) + 1}] {job.name}"
            word = "done in" if do_with_bar(executor, job, title) else "finished before (--fresh repeats it) in"
            best = _best(output / "bundle" / trainings[job.name].weights) if job.name in trainings else ""
            tell(f"{title}: {word} {clock(job.seconds)}{best}")

    for lanes in steps.plan_lanes(jobs):
        executor = Executor(threads if len(lanes) > 1 else 0)
        all_parallel(partial(work, executor), lanes, WORKERS, executor)


def _best(weights: Path) -> str:
    told = json.loads((weights / "model.json").read_text())
    return f", best validation Dice {told['validation']['val_mean_dice']:.3f} at epoch {told['epoch']}"


def read_results(output: Path, trainings: Mapping[str, Training]) -> dict[str, Result]:
    """Scores, parameters and times of the networks."""
    facts = json.loads((folder_of(SPEED, output) / "time_answer.json").read_text())
    results = {}
    for name, one in trainings.items():
        numbers = (facts[what]["teacher" if name == TEACHER else "student"] for what in facts)
        results[name] = read_result(output / "bundle" / one.scores, one.labels, one.unlabeled, *numbers)
    return results


def describe_run(options: argparse.Namespace, jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """What somebody needs to repeat the run, and how long it took."""
    sizes, here = options.sizes, machine()
    found = versions("medkd", "monai", "torch", "pytorch-ignite", "numpy")
    times = [f"{job.name} {clock(job.seconds)}" for job in jobs]
    return [
        ("command", options.typed),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.items())),
        ("seed", str(options.seed)),
        ("phantoms", f"{sizes.teacher_labels} for the teacher; {sizes.labels} with a label, {sizes.unlabeled} without, "
                     f"{sizes.validation} to validate, {sizes.test} to test; "
                     f"{' x '.join(map(str, sizes.shape))} voxels of {' x '.join(map(str, sizes.spacing))} mm"),
        ("steps", steps_text(sizes)),
        ("hardware", f"{here['processor']}, {here['cores']} cores, {platform.system()}"),
        ("times", f"{', '.join(times)}; together {clock(steps.duration(jobs))}"),
    ]


def steps_text(sizes: Sizes) -> str:
    """Optimizer steps of the networks."""
    teacher, alone, distilled = (
        sizes.steps * epochs for epochs in (sizes.teacher_epochs, sizes.alone_epochs, sizes.distilled_epochs)
    )
    return f"teacher {teacher:,}, students alone {alone:,}, distilled student {distilled:,} of twice the crops"


def show_results(
    options: argparse.Namespace, jobs: Sequence[Job], results: Mapping[str, Result], trainings: Mapping[str, Training]
) -> None:
    """Print what was gained, the table, where things are, and what to type next."""
    print(f"\n{verdict(results)}\n")
    head, rows = summary_table(results)
    for name, *cells in (head, *rows):
        print(f"{name:18}" + "".join(f"{cell:>{len(title) + 3}}" for cell, title in zip(cells, head[1:], strict=True)))
    print(f"\nOne seed. Steps: {steps_text(options.sizes)}.")
    report = options.report
    shown = report.relative_to(ROOT) if report.is_relative_to(ROOT) else report
    again = inference(options.output, trainings[DISTILLED], "../labels")
    print(f"All steps took {clock(steps.duration(jobs))}. Report with pictures: {shown}")
    print("Next, label maps of the distilled student; --dataset_dir takes any folder with a datalist.json:")
    print(f"  . .venv/bin/activate; {show_words(again.words(), again.folder)}")


def main(words: Sequence[str]) -> int:
    """Run the demo."""
    options = parse_options(words)
    sizes, output = options.sizes, options.output
    if options.fresh:
        for name in ("steps", "teacher_data", "data", "bundle", "predictions"):
            shutil.rmtree(output / name, ignore_errors=True)
    copy_bundle(BUNDLE, output / "bundle")
    jobs, trainings = make_jobs(output, sizes, options.seed), make_trainings(sizes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # ends the running step too
    try:
        print(f"MedKD demo: a teacher that learned from {sizes.teacher_labels} labeled cases that you do not have; you "
              f"have {sizes.labels}, and {sizes.unlabeled} images without labels. Phantom CT"
              f"{DURATION.get(sizes, '')}.")
        do_jobs(jobs, output, trainings)
        print(f"\n[{len(jobs) + 1}/{len(jobs) + 1}] report", flush=True)
        from lab.demo.report import write_report  # tensorboard, seconds to import

        results = read_results(output, trainings)
        commands = [show_words(words, job.where) for job in jobs for words in job.commands]
        write_report(options.report, output, results, trainings, (describe_run(options, jobs), commands))
    except ExecutionError as error:
        print(f"\nStep {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    show_results(options, jobs, results, trainings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
