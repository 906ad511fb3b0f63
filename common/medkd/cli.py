# SPDX-License-Identifier: Apache-2.0
"""The console command `medkd`. Its commands import what they need when they run: `--help` has to be quick."""

from __future__ import annotations

import builtins
import functools
import inspect
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from difflib import get_close_matches
from hashlib import file_digest
from typing import Any

import fire

from medkd import __version__

__all__ = ["COMMANDS", "main"]

Command = Callable[..., None]


def phantom_ct(
    output: str,
    *,
    training: int = 12,
    validation: int = 3,
    test: int = 4,
    unlabeled: int = 0,
    seed: int = 0,
    shape: tuple[int, int, int] = (96, 80, 64),
    spacing: tuple[float, float, float] = (3.0, 3.0, 4.0),
) -> None:
    """Write procedural abdominal CT cases: six organs, look-alikes, noise, oblique affines; 1 MB each.

    Args:
        output: folder to fill with images/, labels/ and datalist.json.
        training: number of training cases.
        validation: number of validation cases.
        test: number of test cases.
        unlabeled: number of cases without a label.
        seed: integer of 0 or more; the same seed gives the same cases.
        shape: voxels per axis, 16 or more each.
        spacing: mm per voxel and axis; a case differs from it by up to 8 %.
    """
    from medkd.phantoms.ct import CT_LABELS, write_ct_phantoms

    path = write_ct_phantoms(output, training, validation, test, unlabeled, seed, shape, spacing)
    print(f"Wrote {path}: {_counts(_load(path))}.")
    print(f"Next: medkd check-data {shlex.quote(str(path))} --num_classes {len(CT_LABELS)}")


def phantom_em(  # noqa: PLR0913 - fire makes one option of each parameter
    output: str,
    *,
    training: int = 4,
    validation: int = 1,
    test: int = 2,
    unlabeled: int = 0,
    seed: int = 0,
    shape: tuple[int, int, int] = (48, 128, 128),
    spacing: tuple[float, float, float] = (30.0, 6.0, 6.0),
    missing: float = 0.0,
    gap: int = 0,
) -> None:
    """Write procedural EM blocks of dense neurites, labels instance numbers: organelles, weak membranes; 1 MB each.

    Args:
        output: folder to fill with images/, labels/ and datalist.json.
        training: number of training cases.
        validation: number of validation cases.
        test: number of test cases.
        unlabeled: number of cases without a label.
        seed: integer of 0 or more; the same seed gives the same cases.
        shape: voxels per axis, 16 or more each, sections along the first.
        spacing: nm per voxel and axis, 2 to 60, sections first; 10,10,10 for cubic voxels. Headers hold the numbers
            without a unit, as NIfTI knows no nm.
        missing: chance of a section to be black, 0 to 0.5; its label stays.
        gap: 0 where instances touch; 1 for a line of label 0 between them, one voxel wide.
    """
    from medkd.phantoms.em import write_em_phantoms

    path = write_em_phantoms(output, training, validation, test, unlabeled, seed, shape, spacing, missing, gap)
    print(f"Wrote {path}: {_counts(_load(path))}.")
    print(f"Next: medkd check-data {shlex.quote(str(path))}")


def phantom_nuclei(
    output: str,
    *,
    training: int = 24,
    validation: int = 6,
    test: int = 8,
    unlabeled: int = 0,
    seed: int = 0,
    shape: tuple[int, int] = (256, 256),
    stained: float = 0.25,
) -> None:
    """Write procedural pictures of nuclei as PNG, labels instance numbers: clusters, dim and blurred ones; 50 kB each.

    Args:
        output: folder to fill with images/, labels/ and datalist.json.
        training: number of training cases.
        validation: number of validation cases.
        test: number of test cases.
        unlabeled: number of cases without a label.
        seed: integer of 0 or more; the same seed gives the same cases.
        shape: pixels per axis, 64 to 4096 each; nuclei have a radius of 5 to 20 pixels.
        stained: share of each list that is stained tissue in RGB, 0 to 1; the others are fluorescence in gray.
    """
    from medkd.phantoms.nuclei import write_nuclei_phantoms

    path = write_nuclei_phantoms(output, training, validation, test, unlabeled, seed, shape, stained)
    print(f"Wrote {path}: {_counts(_load(path))}.")
    print(f"Next: medkd check-data {shlex.quote(str(path))}")


def datalist(  # noqa: PLR0913 - fire makes one option of each parameter
    source: str,
    output: str,
    *,
    splits: str | None = None,
    training: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    fractions: tuple[float, float, float] | None = None,
    seed: int = 0,
    patient: str | None = None,
    images: str = "images",
    labels: str = "labels",
    unlabeled: str | None = None,
    label_names: str | None = None,
) -> None:
    """Write a datalist.json for a folder of images and labels of the same names; the folder stays as it is.

    Args:
        source: folder of the data.
        output: datalist.json to write, or the folder for it; outside of SOURCE.
        splits: JSON file of case names by split, such as {"train": ["a.nii.gz"], "val": ["b"], "test": []};
            without it splits are drawn at random by patient.
        training: name of the training split in the splits file. Default: training or train.
        validation: name of the validation split. Default: validation, val or valid.
        test: name of the test split. Default: test or testing.
        fractions: shares of training, validation and test for random splits. Default: 0.65,0.15,0.2.
        seed: integer of 0 or more, for random splits.
        patient: regular expression with one group, the patient, in file names without extension, such as
            "^(p[0-9]+)_"; without it each file is a patient of its own.
        images: folder of the images in SOURCE.
        labels: folder of the labels in SOURCE.
        unlabeled: folder of images in SOURCE; those in no split and without label become `unlabeled`.
        label_names: names of the label values from 0 on, such as "background,liver,spleen", or a JSON file of
            them.
    """
    from medkd.data.datalist import SplitsFile, make_datalist

    named = {"training": training, "validation": validation, "test": test}
    if splits is None:
        lone = [f"--{name}" for name, split in named.items() if split is not None]
        if lone:
            raise ValueError(f"{', '.join(lone)} must name a split of a file, got no --splits; add it.")
        plan: Any = _random_splits(fractions, seed)
    elif fractions is not None or seed != 0:
        raise ValueError("--fractions and --seed must come without --splits, got both; leave one out.")
    else:
        plan = SplitsFile(splits, **named)
    path = make_datalist(source, output, plan, images, labels, unlabeled, label_names, patient)
    print(f"Wrote {path}: {_counts(_load(path))}.")
    print(f"Next: medkd check-data {shlex.quote(str(path))}")


def check_data(datalist: str, *, num_classes: int | None = None, allow_shared: bool = False) -> None:
    """Read all files of a datalist, tell everything that is wrong, and show what the data look like.

    Args:
        datalist: the datalist.json, or its folder.
        num_classes: number of label values with the background. Default: by `labels` in the file, else any.
        allow_shared: accept an image that is in two lists, for tests on a single case.
    """
    from medkd.data.check import check_data as check

    path = os.path.join(datalist, "datalist.json") if os.path.isdir(datalist) else datalist
    content = _load(path)
    names = content.get("labels") or {}
    if num_classes is None and names:
        num_classes = max(int(value) for value in names) + 1
    elif num_classes is not None and (not isinstance(num_classes, int) or num_classes < 2):
        raise ValueError(f"--num_classes must be an integer of 2 or more, got {num_classes!r}.")
    report = check(
        content["training"], content["validation"], num_classes, content["test"],
        allow_shared=allow_shared, unlabeled=content["unlabeled"],
    )
    print(report.table(names or {str(value): "" for value in range(num_classes or 0)}))
    print("The data can be used.")
    folder = shlex.quote(os.path.dirname(os.path.abspath(path)))
    run = "python -m monai.bundle run training --config_file configs/train.json --bundle_root ."
    print(f"Next, in the folder of a bundle: {run} --dataset_dir {folder}")


def verify(path: str) -> None:
    """Check that a packed bundle is whole and unchanged: no file changed, missing or added since `make pack`.

    Args:
        path: the zip, or the folder unpacked from it, as long as nothing ran in it.
    """
    from medkd.verify import verify as check

    number = check(path)
    print(f"OK: {number} files of {path} are as they were packed.")
    if os.path.isfile(path):
        with open(path, "rb") as file:
            print(f"SHA-256 of the zip, to compare with its author's: {file_digest(file, 'sha256').hexdigest()}")


COMMANDS: dict[str, Any] = {
    "phantom": {"ct": phantom_ct, "em": phantom_em, "nuclei": phantom_nuclei},
    "datalist": datalist, "check-data": check_data, "verify": verify,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command.

    Args:
        arguments: words after `medkd`; None takes those of the process.

    Returns:
        Exit code: 0, 2 for wrong arguments or data, 130 when interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word != "--"]   # what follows it would be flags of fire
    if words == ["--version"]:
        print(f"medkd {__version__}")
        return 0
    logging.basicConfig(format="medkd: %(message)s")
    logging.getLogger("medkd").setLevel(logging.INFO)
    try:
        call = _parse(words)
        if call is not None:
            call()
    except (ValueError, OSError) as error:
        print(f"medkd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("medkd: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(words: list[str]) -> Callable[[], None] | None:
    """Find the command of `words` and leave it: fire would run it before it complains of what is left over.

    Returns:
        The call, or None where help was asked for and shown.

    Raises:
        ValueError: fire could not make a call of `words`.
    """
    calls: list[functools.partial[None]] = []
    said, shown = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(shown):
            fire.Fire(_recording(COMMANDS, calls), command=words, name="medkd")
    except fire.core.FireExit as stop:
        if stop.code:
            raise ValueError(_explain(stop.trace.elements[-1].ErrorAsStr(), words, calls)) from None
        print(_tidy(said.getvalue()))
        return None
    if not calls:
        print(_tidy(shown.getvalue()))
    return calls[0] if calls else None


def _tidy(page: str) -> str:
    """Take out of fire's help what only its authors understand."""
    page = page[page.find("NAME\n"):].replace(" GROUP | ", " ", int("FIRE_METADATA" in page))
    page = re.sub(r"GROUPS\n    GROUP is one of the following:\n\n     FIRE_METADATA\n+", "", page)
    page = re.sub(r"Type: Optional\[(.*?)\]\n", r"Type: \1\n", page)
    return page.replace("        Default: None\n", "").rstrip()


def _recording(commands: Mapping[str, Any], calls: list[functools.partial[None]]) -> dict[str, Any]:
    """Copy the tree of commands with functions that note their call in `calls` instead of running."""

    def recorder(command: Command) -> Command:
        @functools.wraps(command)
        def note(*args: Any, **options: Any) -> None:
            calls.append(functools.partial(command, *args, **options))

        kinds = {name: kind.removesuffix(" | None") for name, kind in command.__annotations__.items()}
        texts = [name for name, kind in kinds.items() if kind == "str"]
        given = inspect.signature(command).parameters.values()   # help shows their types
        shown = [part.replace(annotation=getattr(builtins, kinds[part.name].split("[")[0])) for part in given]
        note.__signature__ = inspect.Signature(shown)   # type: ignore[attr-defined]
        noting: Command = fire.decorators.SetParseFns(**dict.fromkeys(texts, str))(note)   # 007 stays "007"
        return noting

    return {
        name: _recording(command, calls) if isinstance(command, dict) else recorder(command)
        for name, command in commands.items()
    }


def _explain(error: str, words: list[str], calls: list[functools.partial[None]]) -> str:
    """Say fire's error in our words, with the way out."""
    names: list[str] = []
    level: Any = COMMANDS
    for word in words:
        if not isinstance(level, dict) or word not in level:
            break
        names.append(word)
        level = level[word]
    way_out = f"see `{' '.join(['medkd', *names])} --help`."
    left = error.partition(": ")[2].strip()
    path = " ".join(["medkd", *names])
    if isinstance(level, dict):
        return f"`{left}` is no command of `{path}`, which has {', '.join(level)}; {way_out}"
    if not calls and "required argument" in error:
        return f"`{path}` needs {left.upper()}, got none; {way_out}"
    if not calls:
        return f"{error}; {way_out}"
    options = [f"--{name}" for name in inspect.signature(level).parameters]
    near = get_close_matches(left, options, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"`{left}` is no option of `{path}`; {guess}{way_out}"


def _random_splits(fractions: object, seed: int) -> Any:
    from medkd.data.datalist import RandomSplits

    if fractions is None:
        return RandomSplits(seed=seed)
    shares = list(fractions) if isinstance(fractions, (tuple, list)) else []
    numbers = [share for share in shares if isinstance(share, (int, float)) and 0 <= share <= 1]
    if len(shares) != 3 or len(numbers) != 3 or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(
            f"--fractions must be three shares with the sum 1, for training, validation and test, got "
            f"{fractions!r}; "
            "such as 0.65,0.15,0.2."
        )
    return RandomSplits(numbers[1], numbers[2], seed)


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all lists of a datalist, empty where absent, and its labels."""
    import json

    from medkd.data.datalist import load_datalist

    content: dict[str, Any] = {"training": load_datalist(os.fspath(path), "training")}
    with open(path, encoding="utf-8") as file:
        raw = json.load(file)
    for name in ("validation", "test", "unlabeled"):
        content[name] = load_datalist(os.fspath(path), name) if name in raw else []
    content["labels"] = raw.get("labels", {})
    return content


def _counts(content: Mapping[str, Any]) -> str:
    return ", ".join(f"{len(cases)} {name}" for name, cases in content.items() if isinstance(cases, list))
