# SPDX-License-Identifier: Apache-2.0
"""Every bundle in seconds, on a copy: phantom data of its kind, teacher, distillation as smoke.json says, inference.

    make smoke                                             or: .venv/bin/python -m lab.smoke [--bundle NAME]
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.bundle import ROOT, BundleRun, copy_bundle
from lab.execute import ExecutionError, Executor, Job, bundle_job
from lab.progress import clock, do_with_bar
from lab.training import check_model
from medkd.phantoms.kinds import kind_of

__all__ = ["make_jobs"]


def make_jobs(bundle: Path, work: Path) -> list[Job]:
    """What is done with a bundle, a copy of which lies in `work` under its name; phantoms serve all of one kind."""
    name, data = bundle.name, work / "data" / kind_of(bundle).name
    copy = work / name
    smoke = json.loads((bundle / "configs" / "smoke.json").read_text())
    labels = {key: smoke[key] for key in ("out_channels",) if key in smoke}

    def run(run_id: str, *configs: str, **options: object) -> BundleRun:
        return BundleRun(copy, run_id, configs, {"dataset_dir": str(data), **options})

    phantoms = [sys.executable, "-m", "medkd", "phantom", "--for", str(bundle), str(data)]
    student = run("training", "train", "smoke")
    jobs = [Job("phantoms", work / "jobs" / data.name, "smoke", [phantoms], work, [data], student.environment)]
    if (bundle / "configs" / "teacher.json").is_file():
        teacher = run("training", "train", "smoke", "teacher", **{"train#trainer#max_epochs": 1})
        jobs.append(_training("teacher", work / "jobs" / name, teacher, copy / "models" / "teacher"))
    jobs.append(_training("student", work / "jobs" / name, student, copy / "runs" / "smoke"))
    inference = run("evaluating", "inference", ckpt_path="runs/smoke/model.pt", **labels)
    return [*jobs, bundle_job("inference", work / "jobs" / name / "inference", "smoke", [inference])]


def _training(name: str, folder: Path, run: BundleRun, weights: Path) -> Job:
    return bundle_job(
        name, folder / name, "smoke", [run], writes=[weights / "model.pt"], progress=[weights / "progress.json"],
        check=lambda: check_model(weights),
    )


def main(words: Sequence[str]) -> int:
    """Run one bundle or all."""
    names = sorted(path.parents[1].name for path in ROOT.glob("bundles/*/configs/train.json"))
    parser = argparse.ArgumentParser(
        "python -m lab.smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", choices=names, help="name of a folder of bundles/ (default: all)")
    options = parser.parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work, executor = Path(tempfile.mkdtemp(prefix="medkd_smoke_")), Executor()
    try:
        for name in [options.bundle] if options.bundle else names:
            print(f"== {name}", flush=True)
            copy_bundle(ROOT / "bundles" / name, work / name)
            for job in make_jobs(ROOT / "bundles" / name, work):
                print(job.name, flush=True)
                print(f"  done {'' if do_with_bar(executor, job) else 'before '}in {clock(job.seconds)}", flush=True)
    except ExecutionError as error:
        print(f"\n{error}", file=sys.stderr)       # with the log's place, so that stays
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(work)
        return 130
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
