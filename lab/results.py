# SPDX-License-Identifier: Apache-2.0
"""Train and compare all arms of a bundle on one data set: results/<bundle>.json, a figure, and the READMEs' tables.

    make results BUNDLE=boundary_relation_ct_organs DATA=../shared/data/ct_headneck_openkbp WORKERS=2

Finished runs are not repeated and interrupted ones go on; all work lies in runs/lab, where bundles and rows share what
they train alike. What is trained stands in results/recipes/<bundle>.json. ROW=id does one of the rows of a data set,
SEARCH=1 tries the recipe's other configurations on validation instead, FINISHED=1 trains nothing and writes what is
finished so far, with the names of what is not.
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

from lab import convergence, curve, record
from lab.borrow import Borrowed, borrow
from lab.bundle import ROOT, freeze_bundle
from lab.execute import ExecutionError, Executor, Job, StoppedError, read_state
from lab.keys import content_hash, data_hash, file_hash
from lab.measure import machine, versions
from lab.networks import program_words
from lab.plan import Finished, RowFailedError, all_parallel, train_all, wanted_runs
from lab.recipe import TEACHER, Recipe, Row, read_recipe
from lab.regimes import describe_regime
from lab.training import Run, Study, Trained, check_test_list, evaluate, find_datalist, ranked

PACKAGES = ("medkd", "torch", "monai", "pytorch-ignite", "numpy", "scipy", "scikit-image", "openvino")


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m lab.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("bundle", help="name of a folder of bundles/")
    add("data", type=Path, help="folder with datalist.json, or with images/, labels/ and splits.json")
    add("--workers", type=int, default=2, metavar="N", help="trainings at once, sharing the cores (default: 2)")
    add("--row", help="id of the only row to do (default: all of DATA)")
    add("--search", action="store_true", help="only the recipe's `search`, on validation")
    add("--finished", action="store_true", help="train nothing; write the rows from the trainings that are finished")
    add("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)      # of the repository, for the tests
    add("--recipes", type=Path, default=ROOT / "results" / "recipes", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.folder = options.root / "bundles" / options.bundle
    if not (options.folder / "configs" / "train.json").is_file():
        known = sorted(path.name for path in (options.root / "bundles").glob("*/"))
        parser.error(f"BUNDLE must be one of {known}, got {options.bundle!r}.")
    if not options.data.is_dir():
        parser.error(f"DATA must be a folder, got {str(options.data)!r}.")
    if options.search and options.finished:
        parser.error("SEARCH and FINISHED cannot be given together.")
    if options.workers < 1:
        parser.error(f"WORKERS must be 1 or more, got {options.workers}.")
    options.data = options.data.resolve()
    return options


def make_study(options: argparse.Namespace, recipe: Recipe, row: Row, executor: Executor) -> Study:
    """Copy the sources and make the list of the data."""
    work = (options.root / "runs" / "lab").resolve()
    source = freeze_bundle(options.folder, work / "source")
    datalist = find_datalist(options.data, work / "data", {"patient": row.patient, **row.datalist})
    check_test_list(datalist)
    return Study(recipe, row, source, work, datalist, executor, options.workers)


def evaluate_all(study: Study, finished: Finished) -> record.Scores:
    """Score all trainings on the test cases; helpers have no score."""
    chosen = [one for one in finished.values() if one.run.arm not in study.recipe.helpers]
    print(f"Scoring {len(chosen)} trainings on the test cases.", flush=True)
    scores: dict[str, dict[str, list[Trained]]] = {}
    for one in all_parallel(lambda one: evaluate(one, study), chosen, study.workers, study.executor):
        scores.setdefault(one.run.arm, {}).setdefault(one.run.candidate, []).append(one)
    return scores


def measure_speed(study: Study, trained: Mapping[str, Trained]) -> dict[str, Any]:
    """Parameters and median of the seconds per case and stage, timed by a program of its own, every time anew."""
    print("Timing teacher and student.", flush=True)
    folder = study.folder / "speed" / study.source.name / study.row.id
    training = {name: study.bundle_run("training", one.run) for name, one in trained.items()}
    weights = {name: str((one.folder / "model.pt").resolve()) for name, one in trained.items()}
    row, datalist = study.row, os.path.relpath(study.datalist, study.source)
    request = {
        "networks": {
            name: {"configs": run.configs, "options": run.options, "weights": weights[name]}
            for name, run in training.items()
        },
        "inference": {"configs": ["inference", *row.inference], "options": {
            **row.options, "datalist": datalist, "output_dir": str((folder / "label_maps").resolve()),
        }},
    }
    words, answer = program_words("stages", folder, study.source, request, ["lab.stages"])
    answer.unlink(missing_ok=True)
    environment = training["student"].environment | {"CUDA_VISIBLE_DEVICES": ""}
    study.executor.do(Job("speed", folder, "", [words], ROOT, [answer], environment))
    told = read_state(answer)
    return {name: told[name] for name in ("parameters", "seconds_per_case")}


def measure_rules(study: Study) -> dict[str, Any]:
    """`classical` and `leaks` of a row: what does not learn, tuned on validation and scored on the test cases, once."""
    row, recipe = study.row, study.recipe
    names = [*filter(None, [row.classical]), *row.leaks]
    if not names:
        return {}
    print(f"Scoring without networks: {', '.join(names)}.", flush=True)
    plain = Run("rules", "", row.seeds[0], ["train", *row.overrides], row.options)
    run = study.bundle_run("evaluating", plain, *row.evaluate, datalist=study.datalist)
    data = data_hash(study.datalist, ("training", "validation", "test"))
    decides = run.config["validate"]["key_metric"], row.options, row.test, row.patient, data, rules_hash()
    key = content_hash([names, *decides])[:12]
    folder = study.folder / "rules" / f"{row.id}_{key}"
    request = {
        "rules": names, "configs": run.configs, "options": run.options, "metric": recipe.metric,
        "higher_is_better": recipe.higher_is_better, "patient": row.patient, "test": row.test,
        "output": str(folder.resolve()),
    }
    words, answer = program_words("rules", folder, study.source, request, ["lab.classical.scoring"])
    study.executor.do(Job("rules", folder, key, [words], ROOT, [answer], run.environment))
    return record.rules_of(row, read_state(answer))


def trace_curve(study: Study, scored: record.Scores, distilled: str | None, borrowed: Borrowed) -> dict[str, Any]:
    """`curve` of a row that has one: trains and scores what of it is left, now that the arm is chosen."""
    recipe, row = study.recipe, study.row
    if not row.curve or distilled is None:
        return {}
    taught = {curve.DISTILLED: distilled, **({curve.PLAIN: curve.PLAIN} if curve.PLAIN in scored else {})}
    chosen = {kind: record.chosen_runs(scored[name], recipe)[0].run.candidate for kind, name in taught.items()}
    arms = {
        name: arm for kind, of in taught.items()
        for name, arm in curve.taught_arms(row, kind, row.arms[of], chosen[kind]).items()
    }
    needed = {name: row.arms[name] for name in (TEACHER, *recipe.helpers)}
    finished = train_all(study, recipe.drop_idle_helpers({**needed, **arms}))
    points = {**scored, **evaluate_all(study, {name: one for name, one in finished.items() if one.run.arm in arms})}
    names = [name for name in (*curve.alone_arms(row, row.arms), *arms) if name in points]
    values = {**curve.alone_values(borrowed.alone), **{name: record.summarize(points[name], recipe) for name in names}}
    return {"curve": curve.make_curve(row, distilled, chosen[curve.DISTILLED], values)}


def show_command(options: argparse.Namespace) -> str:
    """What somebody types to repeat this, without this machine's paths."""
    words = ["make", "results", f"BUNDLE={options.bundle}", f"DATA={options.data.name}"]
    words += [f"WORKERS={options.workers}"] if options.workers != 2 else []
    words += [f"ROW={options.row}"] if options.row else []
    return shlex.join([*words, "SEARCH=1"] if options.search else words)


def rules_hash() -> str:
    """Hash of the code of `lab.classical`."""
    return content_hash([file_hash(file) for file in sorted((ROOT / "lab" / "classical").glob("*.py"))])


def compare(options: argparse.Namespace, study: Study) -> None:
    """Train all, score all, write the row."""
    recipe, row = study.recipe, study.row
    borrowed = borrow(study, options.root, options.recipes)
    own = {name: arm for name, arm in row.arms.items() if name not in borrowed.arms}
    alone = curve.alone_arms(row, own)
    doubled = {} if record.ALONE in borrowed.arms else convergence.doubled_arms(study, own)
    wanted = recipe.drop_idle_helpers(own) | doubled | alone
    if borrowed.arms:
        print(f"Of {borrowed.bundle}, the same trainings: {', '.join(borrowed.arms)}.", flush=True)
    finished = train_all(study, wanted)
    missing = [run.label for run in wanted_runs(study, wanted, finished) if run.id not in finished]
    known = measure_rules(study)
    scored = evaluate_all(study, {name: one for name, one in finished.items() if one.run.arm not in doubled})
    scores = {name: arm for name, arm in scored.items() if name in own}
    distilled = record.choose_distilled(recipe, scores)
    if distilled is None and record.ALONE not in scores:
        raise RowFailedError(f"{row.id}: no student of this bundle is finished.")
    arms = {TEACHER: TEACHER, "student": distilled or record.ALONE}
    speed = measure_speed(study, {name: record.chosen_runs(scores[arm], recipe)[0] for name, arm in arms.items()})
    facts = {
        "splits": record.split_names(study.datalist, row.test),
        "regime": describe_regime(json.loads(study.datalist.read_text()), row.regime, row.arms[TEACHER].regime),
        "steps": borrowed.steps | {
            name: convergence.steps_of(record.chosen_runs(arm, recipe)[0].run, study) for name, arm in scores.items()
        },
        "converged": borrowed.converged or convergence.converged(study, finished), **borrowed.told(),
        **({"not_trained": missing} if missing else {}), **known, **trace_curve(study, scored, distilled, borrowed),
        **speed, "hardware": machine(), "versions": versions(*PACKAGES), "command": show_command(options),
    }
    content = record.make_row(recipe, row, scores, facts, borrowed.arms)
    if row.ship and distilled:
        best, content["shipped"] = record.shipped_of(record.chosen_runs(scores[distilled], recipe), recipe)
        shutil.copyfile(best.folder / "model.pt", options.folder / "models" / "model.pt")
        (options.folder / "models" / "model.json").unlink(missing_ok=True)     # of a training in this folder
        print(f"Shipped: {best.run.label}, in models/model.pt of the bundle.")
    write_all(options, study, content)


def search(options: argparse.Namespace, study: Study) -> None:
    """Train the recipe's other configurations with the first seed, and write their validation values."""
    recipe, row = study.recipe, study.row
    if not row.search:
        raise ValueError(f"`search` of row {row.id!r} in the recipe must have configurations, got none.")
    tried = {name: replace(arm, seeds=1) for name, arm in row.search.items()}
    arms = {name: row.arms[name] for name in (TEACHER, *recipe.helpers)} | tried
    finished = train_all(study, recipe.drop_idle_helpers(arms))
    found = []
    for one in ranked((finished[name, "", row.seeds[0]] for name in tried), recipe):
        name, arm = one.run.arm, tried[one.run.arm]
        found.append({
            "name": name, "overrides": list(arm.overrides), "options": dict(arm.options),
            "validation": round(one.validation, 4), "epoch": one.epoch, "minutes": round(one.minutes, 1),
        })
        print(f"{one.validation:8.4f}  {name}")
    write_all(options, study, {"id": row.id, "data": row.data, "preset": row.preset}, found)


def write_all(options: argparse.Namespace, study: Study, row: Mapping[str, Any], searched: Any = None) -> None:
    """Bring results file, figure and pages up to date; two rows that end at once take turns."""
    from lab.publish import publish  # matplotlib, a second to import

    path = options.root / "results" / f"{options.bundle}.json"
    with study.executor.locked(study.folder / "writing"):
        before = record.read_results(path)
        content = record.merge_row(before, options.bundle, row, study.recipe.default, searched)
        for page in publish(options.root, content, study.recipe):
            print(f"No markers for results in {page.relative_to(options.root)}.")
    print(f"Written: {path.relative_to(options.root)}")


def main(words: Sequence[str]) -> int:
    """Run what the command line asks for."""
    options = parse_options(words)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    executor = Executor(max(1, cores // options.workers) if options.workers > 1 else 0, trains=not options.finished)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        recipe = read_recipe(options.folder, options.recipes)
        rows = [row for row in recipe.rows_of(options.data.name) if options.row in (None, row.id)]
        if not rows:
            known = ", ".join(row.id for row in recipe.rows_of(options.data.name))
            raise ValueError(f"ROW must be one of {known}, got {options.row!r}.")
        for row in rows[:1] if options.search else rows:
            (search if options.search else compare)(options, make_study(options, recipe, row, executor))
    except (RowFailedError, ExecutionError, ValueError, FileNotFoundError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, StoppedError):
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
