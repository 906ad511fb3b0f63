# SPDX-License-Identifier: Apache-2.0
"""From nothing to a distilled student: phantom CT, teacher, student alone, distilled student, scores and a report.

    make demo                                  or: .venv/bin/python demo/demo.py
    .venv/bin/python demo/demo.py --help       options, such as --quick, --epochs 60, --output DIR, --fresh

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
from importlib.metadata import version
from pathlib import Path

from plan import TRAININGS, Sizes, bundle_command, copy_bundle, folder_name, make_steps
from progress import clock
from scores import RUNS, Result, gap_text, organ_names, read_result, table
from steps import Step, StepError, run_step, seconds_of, show_command

from medkd import __version__

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
ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "boundary_relation_ct_organs"


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `sizes` holds the numbers, `output` and `report` where things go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be {least} or more, got {value}.")
    folder = options.output
    if folder and folder.exists() and not (folder / "stamps").is_dir() and any(folder.iterdir()):
        parser.error(f"--output must be a new or empty folder, or that of an earlier demo, got {folder}.")
    options.sizes = _sizes(options)
    options.typed = "make demo" if not words else f"python demo/demo.py {shlex.join(words)}"
    options.report = (options.output or ROOT / "demo").resolve() / "report.html"
    options.output = (options.output or ROOT / "demo" / "output").resolve()
    return options


def _sizes(options: argparse.Namespace) -> Sizes:
    sizes = QUICK if options.quick else FULL
    if options.cases:
        sizes = replace(sizes, training=options.cases)
    if options.epochs:
        interval = min(sizes.val_interval, options.epochs)
        sizes = replace(
            sizes, teacher_epochs=options.epochs, student_epochs=options.epochs, val_interval=interval
        )
    return sizes


def show_start(sizes: Sizes) -> None:
    """Say what will happen, and how long it takes."""
    print(f"MedKD demo: phantom CT, {sizes.training} cases to train, {sizes.validation} to validate, {sizes.test} to "
          f"test; epochs: teacher {sizes.teacher_epochs}, students {sizes.student_epochs}{DURATION.get(sizes, '')}.")


def run_steps(steps: Sequence[Step]) -> None:
    """Run all steps, and tell each training's best validation Dice."""
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps) + 1}] {step.name}", flush=True)
        new = run_step(step, lambda words, folder: show_command(words, folder, ROOT))
        best = best_validation(step) if step.epochs else ""
        word = "done in" if new else "finished before (--fresh repeats it) in"
        print(f"  {word} {clock(seconds_of(step))}{best}", flush=True)


def best_validation(step: Step) -> str:
    """What a training wrote beside its weights about the best epoch."""
    path = step.folder / TRAININGS[step.name].weights / "model.json"
    described = json.loads(path.read_text())
    value = described.get("validation", {}).get("val_mean_dice")
    return "" if value is None else f", best validation Dice {value:.3f} at epoch {described['epoch']}"


def read_results(output: Path) -> dict[str, Result]:
    """Scores, parameters and times of the three networks."""
    measured = json.loads((output / "predictions" / "measured.json").read_text())
    return {
        name: read_result(output / "bundle" / run.scores, **measured[folder_name(name)])
        for name, run in TRAININGS.items()
    }


def show_table(results: Mapping[str, Result], organs: Sequence[str]) -> None:
    """Print the table."""
    heads = (("", "teacher", "alone", "distilled") + ("teacher", "alone", "distilled"),)
    print(f"\n{'':18}{'Dice':<30}{'HD95 in mm':<30}".rstrip())
    for name, *cells in (*heads, *table(results, organs)):
        print(f"{name:16}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"\nGap recovered by distillation: {gap_text(results)}.")


def describe_run(options: argparse.Namespace, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """What somebody needs to repeat the run, and how long it took."""
    sizes, packages = options.sizes, ("monai", "torch", "pytorch-ignite", "numpy")
    times = [f"{step.name} {clock(seconds_of(step))}" for step in steps]
    return [
        ("versions", ", ".join([f"Python {platform.python_version()}", f"medkd {__version__}"]
                               + [f"{name} {version(name)}" for name in packages])),
        ("seed", str(options.seed)),
        ("phantoms", f"{sizes.training} to train, {sizes.validation} to validate, {sizes.test} to test; "
                     f"{' x '.join(map(str, sizes.shape))} voxels of {' x '.join(map(str, sizes.spacing))} mm"),
        ("epochs", f"{sizes.teacher_epochs} for the teacher, {sizes.student_epochs} for each student"),
        ("hardware", f"{processor()}, {os.cpu_count()} cores, {platform.system()}"),
        ("times", f"{', '.join(times)}; together {clock(sum(map(seconds_of, steps)))}"),
    ]


def processor() -> str:
    """Name of the CPU, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_all(options: argparse.Namespace, steps: Sequence[Step], results: Mapping[str, Result]) -> None:
    """Write the report."""
    from curves import read_curves  # matplotlib and tensorboard, seconds to import
    from report import Report, read_cases, write_report

    folders = {name: options.output / "predictions" / folder_name(name) for name in RUNS}
    report = Report(
        results,
        organ_names(options.output / "data" / "datalist.json"),
        read_cases(options.output / "data", folders),
        {name: read_curves(options.output / "bundle" / run.weights / "logs") for name, run in TRAININGS.items()},
        [("command", options.typed), *describe_run(options, steps)],
        [show_command(words, step.folder, ROOT) for step in steps for words in step.commands],
    )
    write_report(report, options.report)


def show_next(options: argparse.Namespace, steps: Sequence[Step]) -> None:
    """Say where things are, and what to type next."""
    report = options.report
    shown = report.relative_to(ROOT) if report.is_relative_to(ROOT) else report
    again = bundle_command("evaluating", ["configs/inference.json"], "--output_dir", "../labels")
    print(f"All steps took {clock(sum(map(seconds_of, steps)))}. Report with pictures: {shown}")
    print("Next, label maps of the distilled student; --dataset_dir takes any folder with a datalist.json:")
    print(f"  {show_command(again, options.output / 'bundle', ROOT)}")


def main(words: Sequence[str]) -> int:
    """Run the demo."""
    options = parse_options(words)
    if options.fresh:
        for name in ("stamps", "data", "bundle", "predictions"):
            shutil.rmtree(options.output / name, ignore_errors=True)
    (options.output / "stamps").mkdir(parents=True, exist_ok=True)
    copy_bundle(BUNDLE, options.output / "bundle")
    steps = make_steps(options.output, options.sizes, options.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # ends the running step too
    try:
        show_start(options.sizes)
        run_steps(steps)
        print(f"\n[{len(steps) + 1}/{len(steps) + 1}] report", flush=True)
        results = read_results(options.output)
        write_all(options, steps, results)
    except StepError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    show_table(results, organ_names(options.output / "data" / "datalist.json"))
    show_next(options, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
