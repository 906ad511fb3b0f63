# SPDX-License-Identifier: Apache-2.0
"""From nothing to a distilled student: phantom CT, teacher, student alone, distilled student, scores and a report.

    make demo                                  or: .venv/bin/python -m lab.demo
    .venv/bin/python -m lab.demo --help        options, such as --quick, --epochs 60, --output DIR, --fresh

Finished steps are not repeated, and an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lab.bundle import ROOT, copy_bundle, show_words
from lab.demo.scores import DISTILLED, TEACHER, Result, gap_text, organ_names, read_result, table
from lab.demo.steps import SPEED, TRAININGS, Sizes, folder_of, inference, make_jobs
from lab.execute import ExecutionError, Executor, Job
from lab.measure import machine, versions
from lab.progress import clock, do_with_bar

# Measured on two idle cores, where a step takes two patches of 48^3 and an epoch 12 steps: teacher 2:34 minutes (36
# epochs), student alone 1:53 and distilled student 2:53 (45 epochs each, with their validations and 10 s of start),
# phantoms, evaluation, predictions and report 0:35. Together 8 minutes.
FULL = Sizes(
    training=12, validation=3, test=4, shape=(96, 80, 64), spacing=(3.0, 3.0, 4.0),
    teacher_epochs=36, student_epochs=45, val_interval=9,
)
QUICK = Sizes(
    training=3, validation=1, test=2, shape=(48, 40, 32), spacing=(3.0, 3.0, 4.0),
    teacher_epochs=2, student_epochs=2, val_interval=1,
)
DURATION = {FULL: ", about 8 minutes on two cores", QUICK: ", about a minute on two cores"}
BUNDLE = ROOT / "bundles" / "boundary_relation_ct_organs"


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `sizes` holds the numbers, `output` and `report` where things go."""
    parser = argparse.ArgumentParser(
        "python -m lab.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute, to see that all works; its scores mean nothing")
    add("--epochs", type=int, metavar="N", help="of each training (default: "
        f"{FULL.teacher_epochs} for the teacher, {FULL.student_epochs} for a student)")
    add("--cases", type=int, metavar="N", help=f"training cases (default: {FULL.training})")
    add("--seed", type=int, default=0, metavar="N", help="of phantoms and trainings (default: 0)")
    add("--output", type=Path, metavar="DIR", help="data, weights, logs, report (default: demo/output, and the "
        "report in demo/report.html)")
    add("--fresh", action="store_true", help="repeat finished steps too")
    options = parser.parse_args(words)
    for name, least in (("epochs", 1), ("cases", 1), ("seed", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name} must be {least} or more, got {value}.")
    folder = options.output
    if folder and folder.exists() and not (folder / "steps").is_dir() and any(folder.iterdir()):
        parser.error(f"--output must be a new or empty folder, or that of an earlier demo, got {folder}.")
    sizes = QUICK if options.quick else FULL
    both, interval = options.epochs, min(sizes.val_interval, options.epochs or sizes.val_interval)
    epochs = {"teacher_epochs": both, "student_epochs": both, "val_interval": interval} if both else {}
    options.sizes = replace(sizes, training=options.cases or sizes.training, **epochs)
    options.typed = "make demo" if not words else f"python -m lab.demo {shlex.join(words)}"
    options.report = (folder or ROOT / "demo").resolve() / "report.html"
    options.output = (folder or ROOT / "demo" / "output").resolve()
    return options


def do_jobs(jobs: Sequence[Job], output: Path) -> None:
    """Do all jobs, and tell each training's best validation Dice."""
    executor = Executor()
    for number, job in enumerate(jobs, start=1):
        print(f"\n[{number}/{len(jobs) + 1}] {job.name}", flush=True)
        word = "done in" if do_with_bar(executor, job) else "finished before (--fresh repeats it) in"
        best = ""
        if job.name in TRAININGS:
            told = json.loads((output / "bundle" / TRAININGS[job.name].weights / "model.json").read_text())
            best = f", best validation Dice {told['validation']['val_mean_dice']:.3f} at epoch {told['epoch']}"
        print(f"  {word} {clock(job.seconds)}{best}", flush=True)


def read_results(output: Path) -> dict[str, Result]:
    """Scores, parameters and times of the three networks."""
    facts = json.loads((folder_of(SPEED, output) / "time_answer.json").read_text())
    results = {}
    for name, training in TRAININGS.items():
        numbers = (facts[what]["teacher" if name == TEACHER else "student"] for what in facts)
        results[name] = read_result(output / "bundle" / training.scores, *numbers)
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
        ("phantoms", f"{sizes.training} to train, {sizes.validation} to validate, {sizes.test} to test; "
                     f"{' x '.join(map(str, sizes.shape))} voxels of {' x '.join(map(str, sizes.spacing))} mm"),
        ("epochs", f"{sizes.teacher_epochs} for the teacher, {sizes.student_epochs} for each student"),
        ("hardware", f"{here['processor']}, {here['cores']} cores, {platform.system()}"),
        ("times", f"{', '.join(times)}; together {clock(sum(job.seconds for job in jobs))}"),
    ]


def show_results(options: argparse.Namespace, jobs: Sequence[Job], results: Mapping[str, Result]) -> None:
    """Print the table, where things are, and what to type next."""
    print(f"\n{'':18}{'Dice':<30}{'HD95 in mm'}")
    rows = table(results, organ_names(options.output / "data" / "datalist.json"))
    for name, *cells in (["", *("teacher", "alone", "distilled") * 2], *rows):
        print(f"{name:16}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"\nGap recovered by distillation: {gap_text(results)}.")
    report = options.report
    shown = report.relative_to(ROOT) if report.is_relative_to(ROOT) else report
    again = inference(options.output, DISTILLED, "../labels")
    print(f"All steps took {clock(sum(job.seconds for job in jobs))}. Report with pictures: {shown}")
    print("Next, label maps of the distilled student; --dataset_dir takes any folder with a datalist.json:")
    print(f"  {show_words(again.words(), again.folder)}")


def main(words: Sequence[str]) -> int:
    """Run the demo."""
    options = parse_options(words)
    sizes, output = options.sizes, options.output
    if options.fresh:
        for name in ("steps", "data", "bundle", "predictions"):
            shutil.rmtree(output / name, ignore_errors=True)
    copy_bundle(BUNDLE, output / "bundle")
    jobs = make_jobs(output, sizes, options.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # ends the running step too
    try:
        print(f"MedKD demo: phantom CT, {sizes.training} cases to train, {sizes.validation} to validate, "
              f"{sizes.test} to test; epochs: teacher {sizes.teacher_epochs}, students {sizes.student_epochs}"
              f"{DURATION.get(sizes, '')}.")
        do_jobs(jobs, output)
        print(f"\n[{len(jobs) + 1}/{len(jobs) + 1}] report", flush=True)
        from lab.demo.report import write_report  # tensorboard, seconds to import

        results = read_results(output)
        commands = [show_words(words, job.where) for job in jobs for words in job.commands]
        write_report(options.report, output, results, describe_run(options, jobs), commands)
    except ExecutionError as error:
        print(f"\nStep {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    show_results(options, jobs, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
