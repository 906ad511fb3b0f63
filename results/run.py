# SPDX-License-Identifier: Apache-2.0
"""Train and compare all arms of a bundle on one data set: results/<bundle>.json, a figure, and the READMEs' tables.

    make results BUNDLE=boundary_relation_ct_organs DATA=../shared/data/ct_headneck_openkbp WORKERS=2

Finished runs are not repeated and interrupted ones go on; all work lies in runs/results/<bundle>. What is trained
stands in results/recipes/<bundle>.json. SEARCH=1 tries the recipe's other configurations on validation instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "results"), str(ROOT / "bench"), str(ROOT / "demo")]

from commands import CommandError, Commands, StoppedError  # noqa: E402
from measure import machine, versions  # noqa: E402 - that of bench
from pages import fill  # noqa: E402
from recipe import TEACHER, Recipe, Row, read_recipe  # noqa: E402
from record import (  # noqa: E402
    Scores,
    choose_distilled,
    chosen_runs,
    make_row,
    merge_row,
    read_results,
    shipped_of,
    speed_facts,
    split_names,
    write_results,
)
from schedule import RowFailedError, all_parallel, train_all  # noqa: E402
from summary import Scored, arm_summary, read_scores  # noqa: E402
from trainings import Place, Trained, check_test_list, copy_source, evaluate, find_datalist  # noqa: E402

PACKAGES = ("medkd", "torch", "monai", "pytorch-ignite", "numpy")
Finished = Mapping[tuple[str, str, int], Trained]


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", help="name of a folder of bundles/")
    add("data", type=Path, help="folder with datalist.json, or with images/, labels/ and splits.json")
    add("--workers", type=int, default=1, metavar="N", help="trainings at once, sharing the cores (default: 1)")
    add("--search", action="store_true", help="only the recipe's `search`, on validation")
    add("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)      # of the repository, for the tests
    add("--recipes", type=Path, default=ROOT / "results" / "recipes", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.folder = options.root / "bundles" / options.bundle
    if not (options.folder / "configs" / "train.json").is_file():
        known = sorted(path.name for path in (options.root / "bundles").glob("*/"))
        parser.error(f"BUNDLE must be one of {known}, got {options.bundle!r}.")
    if not options.data.is_dir():
        parser.error(f"DATA must be a folder, got {str(options.data)!r}.")
    if options.workers < 1:
        parser.error(f"WORKERS must be 1 or more, got {options.workers}.")
    options.data = options.data.resolve()
    return options


def make_place(options: argparse.Namespace, recipe: Recipe, row: Row, commands: Commands) -> Place:
    """Copy the sources and make the list of the data."""
    work = options.root / "runs" / "results" / options.bundle
    source = copy_source(options.folder, ROOT / "common" / "medkd", work / "source")
    datalist = find_datalist(options.data, work / row.data / "data", {"patient": row.patient, **row.datalist})
    check_test_list(datalist)
    threads = max(1, cores() // options.workers) if options.workers > 1 else 0
    folder = (work / row.data).resolve()
    return Place(
        source.resolve(), folder, datalist, row.evaluate, threads, commands, row.calibrate, recipe.higher_is_better
    )


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evaluate_all(place: Place, recipe: Recipe, row: Row, finished: Finished, workers: int) -> Scores:
    """Score all trainings on the test cases; helpers have no score."""
    chosen = {name: one for name, one in finished.items() if name[0] not in recipe.helpers}
    print(f"Scoring {len(chosen)} trainings on the test cases.", flush=True)
    folders = all_parallel(lambda one: evaluate(one, place), list(chosen.values()), workers, place.commands)
    scores: dict[str, dict[str, list[Scored]]] = {}
    for (arm, candidate, _), trained, folder in zip(chosen, chosen.values(), folders, strict=True):
        scored = Scored(trained, read_scores(folder, row.patient, row.test, row.parts))
        scores.setdefault(arm, {}).setdefault(candidate, []).append(scored)
    return scores


def measure_speed(place: Place, recipe: Recipe, row: Row, scores: Scores, distilled: str) -> dict[str, Any]:
    """Parameters and seconds per case, timed alternately by a program of its own."""
    teacher, student = (chosen_runs(scores[name], recipe)[0].trained.run for name in (TEACHER, distilled))
    request = {
        "teacher": {"configs": teacher.configs(), "options": dict(teacher.options)},
        "student": {"configs": student.configs(), "options": dict(student.options)},
        "inference": row.inference, "options": dict(row.options), "datalist": str(place.datalist),
    }
    files = [place.folder / f"speed_{name}.json" for name in ("request", "measured")]
    files[0].write_text(json.dumps(request, indent=2) + "\n")
    words = [sys.executable, str(ROOT / "results" / "speed.py"), *map(str, files)]
    print("Timing teacher and student.", flush=True)
    environment = place.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    place.commands.run(words, place.source, place.folder / "speed.log", environment)
    return speed_facts(json.loads(files[1].read_text()))


def show_command(options: argparse.Namespace) -> str:
    """What somebody types to repeat this, without this machine's paths."""
    words = ["make", "results", f"BUNDLE={options.bundle}", f"DATA={options.data.name}"]
    words += [f"WORKERS={options.workers}"] if options.workers > 1 else []
    return shlex.join([*words, "SEARCH=1"] if options.search else words)


def compare(options: argparse.Namespace, recipe: Recipe, row: Row, place: Place) -> None:
    """Train all, score all, write the row."""
    arms = recipe.drop_idle_helpers(recipe.arms_of(row))
    finished = train_all(row, arms, recipe, place, options.workers)
    scores = evaluate_all(place, recipe, row, finished, options.workers)
    summaries = {name: arm_summary(chosen_runs(one, recipe), recipe.metric) for name, one in scores.items()}
    distilled = choose_distilled(recipe, summaries)
    facts = {
        "splits": split_names(place.datalist, row.test),
        **measure_speed(place, recipe, row, scores, distilled or "student_alone"),
        "hardware": machine(), "versions": versions(*PACKAGES), "command": show_command(options),
    }
    content = make_row(recipe, row, scores, facts)
    if row.ship and distilled:
        best, content["shipped"] = shipped_of(chosen_runs(scores[distilled], recipe), recipe)
        shutil.copyfile(best.trained.folder / "model.pt", options.folder / "models" / "model.pt")
        print(f"Shipped: {best.trained.run.label}, in models/model.pt of the bundle.")
    write_all(options, recipe, place, content)


def search(options: argparse.Namespace, recipe: Recipe, row: Row, place: Place) -> None:
    """Train the recipe's other configurations with the first seed, and write their validation values."""
    if not row.search:
        raise ValueError(f"`search` of row {row.id!r} in the recipe must have configurations, got none.")
    tried = {name: replace(arm, seeds=1) for name, arm in row.search.items()}
    known = recipe.arms_of(row)
    arms = {name: known[name] for name in (TEACHER, *recipe.helpers)} | tried
    finished = train_all(row, recipe.drop_idle_helpers(arms), recipe, place, options.workers)
    found = [
        {
            "name": name, "overrides": list(arm.overrides), "options": dict(arm.options),
            "validation": round(one.validation, 4), "epoch": one.epoch, "minutes": round(one.minutes, 1),
        }
        for name, arm in tried.items() for one in [finished[name, "", row.seeds[0]]]
    ]
    found.sort(key=lambda one: one["validation"], reverse=recipe.higher_is_better)
    for one in found:
        print(f"{one['validation']:8.4f}  {one['name']}")
    write_all(options, recipe, place, {"id": row.id, "data": row.data, "preset": row.preset}, found)


def write_all(
    options: argparse.Namespace, recipe: Recipe, place: Place, row: Mapping[str, Any], searched: Any = None
) -> None:
    """Bring results file, figure and pages up to date; two rows that end at once take turns."""
    from figure import draw  # matplotlib, a second to import

    path = options.root / "results" / f"{options.bundle}.json"
    path.parent.mkdir(exist_ok=True)
    with place.commands.locked(place.folder.parents[1]):
        content = merge_row(read_results(path), options.bundle, row, recipe.default, searched)
        write_results(path, content)
        draw(content, path.with_suffix(".png"))
        for page in fill(content, options.root / "README.md", options.folder / "docs" / "README.md"):
            print(f"No markers for results in {page.relative_to(options.root)}.")
    print(f"Written: {path.relative_to(options.root)}")


def main(words: Sequence[str]) -> int:
    """Run what the command line asks for."""
    options = parse_options(words)
    commands = Commands()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        recipe = read_recipe(options.folder, options.recipes)
        rows = recipe.rows_of(options.data.name)
        for row in rows[:1] if options.search else rows:
            place = make_place(options, recipe, row, commands)
            (search if options.search else compare)(options, recipe, row, place)
    except (RowFailedError, CommandError, ValueError, FileNotFoundError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, StoppedError):
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
