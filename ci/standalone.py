#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check that bundles work alone: packed, unpacked in an empty folder, with the packages of metadata.json and no others.

    python ci/standalone.py [--bundle NAME] [--torch-index URL]
    python ci/standalone.py --prepare FOLDER       only the first half; prints the command of the second

The first half, this file, needs the repository: it packs the bundles and makes phantom data. The second half,
ci/standalone_run.py, is copied beside them into a temporary folder and reads nothing of the repository any more. To see
that for yourself, take the repository away meanwhile; in its folder:

    .venv/bin/python ci/standalone.py --prepare /tmp/alone && mv "$PWD" "$PWD.away" \\
        && (cd / && python3 /tmp/alone/standalone_run.py); mv "$PWD.away" "$PWD"
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from command import ROOT, command_line
from pack_bundle import bundles, pack

SECOND_HALF = Path(__file__).with_name("standalone_run.py")
CASES = ["--training", "3", "--validation", "1", "--test", "2"]


def prepare(work: Path, name: str | None, root: Path = ROOT) -> None:
    """Put zips, data, a plan and the second half into `work`.

    Args:
        work: folder, empty or not there yet.
        name: bundle; None takes all.
        root: repository.

    Raises:
        ValueError: there is no such bundle, or `work` is not empty.
        subprocess.CalledProcessError: a bundle does not say which data it takes.
    """
    chosen = bundles(root, name)
    if work.exists() and any(work.iterdir()):
        raise ValueError(f"--prepare must name an empty or new folder, got {work}; remove what is in it.")
    plan = []
    for bundle in chosen:
        data = work / "data" / bundle.name
        command = [sys.executable, "-m", "medkd", "phantom", "--for", str(bundle), str(data), *CASES]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        packed = pack(bundle, root, work / "zips")
        plan.append({"name": bundle.name, "zip": f"zips/{packed.name}", "data": f"data/{bundle.name}"})
    (work / "plan.json").write_text(json.dumps(plan))
    shutil.copy(SECOND_HALF, work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, and run the second half; returns the exit status."""
    parser = command_line(__doc__)
    parser.add_argument("--bundle", help="name of a folder of bundles/ (default: all)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="stop after the first half")
    parser.add_argument("--torch-index", metavar="URL", help="wheel index for torch alone, as in the Makefile")
    options = parser.parse_args(arguments)
    work = (options.prepare or Path(tempfile.mkdtemp(prefix="standalone_"))).resolve()
    try:
        prepare(work, options.bundle, options.root)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        if not options.prepare:
            shutil.rmtree(work)
        return 1
    python = os.path.realpath(sys.executable)                      # not .venv's, which lies in the repository
    command = [python, str(work / SECOND_HALF.name)]
    command += ["--torch-index", options.torch_index] if options.torch_index else []
    if options.prepare:
        print(f"Next: {shlex.join(command)}")
        return 0
    print(f"From here on this repository is not read; everything lies in {work}.", flush=True)
    os.chdir(work)
    return subprocess.run([*command, "--remove"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
