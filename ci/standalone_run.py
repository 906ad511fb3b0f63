#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Second half of ci/standalone.py: works in the folder it lies in, beside plan.json, zips and data; see there.

    python standalone_run.py [--torch-index URL] [--remove]

For every bundle of the plan: unpack and compare with the manifest; a new environment with what metadata.json lists, in
which `import medkd` fails; then teacher, student, evaluation, inference and export, by turns from inside the bundle and
from elsewhere. Runs are of the size of configs/smoke.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORK = Path(__file__).resolve().parent
RESOLVE = """
import json, sys
from monai.bundle import ConfigParser
root, *keys = sys.argv[1:]
parser = ConfigParser()
parser.read_config([f"{root}/configs/train.json", f"{root}/configs/smoke.json"])
print(json.dumps({key: parser.get_parsed_content(key) for key in keys}))
"""
NOT_OPTIONS = ("ckpt_dir", "output_dir")                           # of smoke.json; set here


class Step(NamedTuple):
    """One call of `python -m monai.bundle`, where it starts, and the file or folder that it must write."""

    what: str
    arguments: list[str]
    folder: Path
    written: Path


def read(root: Path, name: str) -> dict[str, Any]:
    """A config of the bundle."""
    config: dict[str, Any] = json.loads((root / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    return config


def shared_options(root: Path, python: Path) -> list[str]:
    """What smoke.json changes and inference.json has too, as options: size of the network, spacing, patches.

    Values may refer to what only train.json has, so they are worked out by MONAI, with `python`.
    """
    inference = read(root, "inference")
    keys = [key for key in read(root, "smoke") if key in inference and key not in NOT_OPTIONS]
    command = [str(python), "-c", RESOLVE, str(root), *keys]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepError(f"smoke.json must have values for {', '.join(keys)}, got\n{done.stderr[-2000:]}")
    values = json.loads(done.stdout.splitlines()[-1])
    return [word for key, value in values.items() for word in (f"--{key}", repr(value))]


def steps(root: Path, data: Path, elsewhere: Path, options: Sequence[str] = ()) -> list[Step]:
    """All calls for one bundle, by turns from inside it and from `elsewhere`; `options` are for inference.json."""
    alone = root / "runs" / "alone"
    weights, scores, predictions = alone / "model.pt", alone / "scores", alone / "predictions"
    inside, student = Path("."), ["--ckpt_dir", str(alone)]

    def run(what: str, at: Path, *names: str) -> list[str]:
        files = [str(at / "configs" / f"{name}.json") for name in names]
        return ["run", what, "--config_file", str(files), "--bundle_root", str(at), "--dataset_dir", str(data)]

    found = [
        Step("teacher", [*run("training", inside, "train", "smoke", "teacher"), "--train#trainer#max_epochs", "1"],
             root, root / "models" / "teacher" / "model.pt"),
        Step("student, from elsewhere", [*run("training", root, "train", "smoke"), *student], elsewhere, weights),
        Step("evaluation", [*run("evaluating", inside, "train", "smoke", "evaluate"), *student,
                            "--output_dir", str(scores)], root, scores),
        Step("inference, from elsewhere", [*run("evaluating", root, "inference"), *options, "--ckpt_path",
                                           str(weights), "--output_dir", str(predictions)], elsewhere, predictions),
    ]
    exports = [("TorchScript", "ckpt_export", alone / "model.ts")]
    if "onnxscript" in read(root, "metadata")["required_packages_version"]:
        exports.append(("ONNX", "onnx_export", alone / "model.onnx"))
    export = ["--net_id", "network_def", "--ckpt_file", str(weights), "--meta_file", "configs/metadata.json",
              "--config_file", "configs/inference.json", "--bundle_root", ".", *options]
    return found + [
        Step(name, [what, "--filepath", str(file), *export], root, file) for name, what, file in exports]


def requirements(root: Path) -> list[str]:
    """What metadata.json lists, as pip takes it."""
    metadata = read(root, "metadata")
    versions = {name: metadata[f"{key}_version"] for name, key in
                (("torch", "pytorch"), ("monai", "monai"), ("numpy", "numpy"))}
    return [f"{name}=={version}" for name, version in (versions | metadata["required_packages_version"]).items()]


class StepError(Exception):
    """A step did not do what it should; the message says which, and why."""


def call(what: str, command: Sequence[str], folder: Path, log: Path) -> None:
    """Run a command, with its output in `log`, and say how long it took.

    Raises:
        StepError: it ended with an error; the message has the end of its output.
    """
    print(f"  {what} ...", end=" ", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        where = {"cwd": folder, "env": environment(), "stdout": file, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, **where, check=False)
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise StepError(f"{what} ended with {done.returncode}; all of its output is in {log}, the end of it is\n{end}")
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def environment() -> dict[str, str]:
    """Variables of the process, without what would show Python more than the environment's own packages."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONNOUSERSITE": "1"}


def unpack(packed: Path, target: Path, name: str) -> Path:
    """Unpack a zip and compare it with its manifest; returns the bundle's folder."""
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(target)
    root = target / name
    listed = dict(line.split("  ", 1)[::-1] for line in (root / "MANIFEST.sha256").read_text().splitlines())
    found = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in root.rglob("*") if path.is_file() and path.name != "MANIFEST.sha256"}
    if listed != found:
        wrong = sorted(key for key in listed | found if listed.get(key) != found.get(key))
        raise StepError(f"{packed} must hold what its manifest lists, got other {', '.join(wrong)}")
    return root


def install(needed: Sequence[str], folder: Path, torch_index: str | None) -> Path:
    """Make an environment with these packages; returns its interpreter."""
    call("new environment", [sys.executable, "-m", "venv", str(folder)], WORK, WORK / "venv.log")
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-compile"]
    if torch_index:
        torch = next(package for package in needed if package.startswith("torch=="))
        call("torch", [*pip, "--no-deps", "--index-url", torch_index, torch], WORK, WORK / "torch.log")
    call(f"the {len(needed)} packages of metadata.json, some minutes", [*pip, *needed], WORK, WORK / "pip.log")
    refused = subprocess.run([python, "-c", "import medkd"], cwd=WORK, env=environment(), capture_output=True,
                             text=True, check=False)
    if "No module named 'medkd'" not in refused.stderr:
        raise StepError(f"`import medkd` must fail outside of the bundle, got {refused.stderr or 'no error'}")
    return python


def check(bundle: dict[str, str], pythons: dict[str, Path], torch_index: str | None) -> None:
    """Run all steps of one bundle of the plan; `pythons` keeps environments by what is in them."""
    home = WORK / "alone" / bundle["name"]
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(parents=True)
    root = unpack(WORK / bundle["zip"], home, bundle["name"])
    key = " ".join(sorted(requirements(root)))
    if key not in pythons:
        pythons[key] = install(requirements(root), WORK / f"venv_{len(pythons)}", torch_index)
    python = pythons[key]
    todo = steps(root, WORK / bundle["data"], elsewhere, shared_options(root, python))
    for number, step in enumerate(todo):
        log = home / f"{number}.log"
        call(step.what, [str(python), "-m", "monai.bundle", *step.arguments], step.folder, log)
        if not (step.written.is_file() or any(step.written.rglob("*.*"))):
            raise StepError(f"{step.what} must write {step.written}, got nothing; its output is in {log}")
    if list(elsewhere.iterdir()):
        raise StepError(f"a run must write into the bundle only, got {', '.join(map(str, elsewhere.iterdir()))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all bundles of the plan; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-index", metavar="URL", help="wheel index for torch alone")
    parser.add_argument("--remove", action="store_true", help="remove this folder when all passed")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    plan, pythons = json.loads((WORK / "plan.json").read_text()), dict[str, Path]()
    for number, bundle in enumerate(plan, start=1):
        print(f"[{number}/{len(plan)}] {bundle['name']}", flush=True)
        try:
            check(bundle, pythons, options.torch_index)
        except StepError as failure:
            print(f"\nFAILED: {bundle['name']}: {failure}\nEverything is kept in {WORK}.")
            return 1
    if options.remove:
        os.chdir("/")
        shutil.rmtree(WORK)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"Stand-alone: {len(plan)} of {len(plan)} bundles passed in {minutes}:{seconds:02} minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
