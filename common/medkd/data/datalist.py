# SPDX-License-Identifier: Apache-2.0
"""Read `datalist.json`, and make one from a folder of images and labels without touching that folder."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["RandomSplits", "SplitsFile", "load_datalist", "make_datalist", "shorten", "write_datalist"]

logger = logging.getLogger(__name__)

_Lists = dict[str, list[str]]   # list -> cases

LISTS = ("training", "validation", "test")
_SYNONYMS = {
    "training": ("training", "train", "tr"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing", "ts"),
}
_SUFFIX = re.compile(r"\.(nii\.gz|nii|mha|mhd|nrrd|npy|npz|png|tiff?|jpe?g|bmp|dcm|h5|hdf5|zarr)$", re.I)


@dataclass(frozen=True)
class SplitsFile:
    """Splits from a JSON file such as `{"train": ["a.nii.gz"], "val": ["b"], "test": []}`.

    Args:
        path: the file; case names with or without their extension.
        training: name of the split to take; None takes `training`, `train` or `tr`.
        validation: the same; None takes `validation`, `val` or `valid`, if there is one.
        test: the same; None takes `test`, `testing` or `ts`, if there is one.
    """

    path: str | Path
    training: str | None = None
    validation: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class RandomSplits:
    """Splits drawn by patient: all cases of a patient go to one list.

    Args:
        validation: share of the patients, 0 to 1.
        test: share of the patients, 0 to 1; training gets the rest.
        seed: non-negative integer; the same seed gives the same splits.
    """

    validation: float = 0.15
    test: float = 0.2
    seed: int = 0


def load_datalist(path: str | Path, key: str) -> list[dict[str, str]]:
    """Read one list of a `datalist.json`, with its paths made absolute.

    Paths of `image`, `label` and keys that end in them (`teacher_image`) are relative to `data_root` in the file, which
    itself may be relative to the file; without it, to the folder of the file. Other keys stay as they are.

    Args:
        path: the file.
        key: `training`, `validation`, `test` or `unlabeled`.

    Returns:
        The items, each with `image` and, where it is labeled, `label`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, has no such list, or an item has no image.
    """
    path = Path(path)
    content = _read_json(path, "path", "a datalist", "write one with `medkd datalist`")
    lists = [name for name, value in content.items() if isinstance(value, list)]
    if key not in lists:
        raise ValueError(
            f"`key` must name a list of {path}, got {key!r}; it has {_quote(lists)}; "
            "add one, or write the file anew with `medkd datalist`."
        )
    root = path.parent.absolute() / str(content.get("data_root", ""))
    return [_absolute(item, root, f"{path}, {key}[{number}]") for number, item in enumerate(content[key])]


def _absolute(item: object, root: Path, where: str) -> dict[str, str]:
    if not isinstance(item, dict) or not item.get("image"):
        raise ValueError(
            f"{where} must be an object with the path of its `image`, got {json.dumps(item)}; add it."
        )
    files = [name for name in item if name.endswith(("image", "label"))]
    for name in files:
        if not isinstance(item[name], str):
            raise ValueError(
                f"{where} must have one path as `{name}`, got {json.dumps(item[name])}; leave it out."
            )
    return item | {name: os.path.normpath(root / item[name]) for name in files}


def write_datalist(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a datalist as JSON, and return its path; a file of that name is replaced as a whole or stays as it is.

    Args:
        path: file to write; its folder is made.
        content: lists of items, `labels`, and perhaps `data_root`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def make_datalist(
    source: str | Path, output: str | Path, splits: SplitsFile | RandomSplits | None = None,
    images: str = "images", labels: str = "labels", unlabeled: str | None = None,
    label_names: str | Path | Sequence[str] | Mapping[str, str] | None = None, patient: str | None = None,
) -> Path:
    """Write a `datalist.json` for images and labels with the same file names, and return its path.

    Args:
        source: the data; nothing is written there. Its absolute path becomes `data_root`.
        output: file to write if it ends in `.json`, else the folder for `datalist.json`.
        splits: which case goes where; None draws `RandomSplits()`.
        images: folder of the images, relative to `source`.
        labels: folder of the labels, relative to `source`.
        unlabeled: folder of further images, relative to `source`; those that have no label and are in no list become
            `unlabeled`. May be `images` itself.
        label_names: names in the order of the label values, `background` first; also as "background,liver", as
            {"0": "background"}, or as a JSON file of either. None leaves `labels` empty.
        patient: regular expression with one group, the patient, searched in the name without extension; None takes the
            whole name. No patient may be in two lists.

    Raises:
        FileNotFoundError: a folder or the splits file does not exist.
        ValueError: `output` lies in `source`, a labeled case has no label, a split names an unknown case, a case or
            patient is in two lists, or there is no training case.
    """
    source, target = Path(source), Path(output)
    target = target if target.suffix == ".json" else target / "datalist.json"
    if not source.is_dir():
        raise FileNotFoundError(f"`source` must be a folder with images and labels, got {str(source)!r}.")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"`output` must lie outside `source`, which stays as it is, got {str(target)!r}.")
    image_files, label_files = _files(source, images, "images"), _files(source, labels, "labels")
    labeled = [name for name in image_files if name in label_files]
    owner = _patients(labeled, patient)
    if isinstance(splits, SplitsFile):
        lists = _read_splits(splits, image_files, owner)
    else:
        lists = _draw_splits(splits or RandomSplits(), labeled, owner)
    if not lists["training"]:
        counts = ", ".join(f"{len(cases)} {name}" for name, cases in lists.items())
        raise ValueError(f"`splits` must leave at least one training case, got {counts} of {source}.")
    _refuse_unlabeled(lists, label_files, source / labels)
    if not lists["validation"]:
        logger.warning("No validation case: training needs one; name a split for it, or draw one by a share.")
    content: dict[str, Any] = {"data_root": str(source.resolve())}
    for name, cases in lists.items():
        content[name] = [{"image": image_files[case], "label": label_files[case]} for case in cases]
    extra = _files(source, unlabeled, "unlabeled") if unlabeled else {}
    used = {case for cases in lists.values() for case in cases} | set(label_files)
    content["unlabeled"] = [{"image": file} for case, file in extra.items() if case not in used]
    content["labels"] = _label_names(label_names)
    return write_datalist(target, content)


def _read_json(path: Path, argument: str, kind: str, way_out: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"`{argument}` must name {kind}, got {str(path)!r}, which is no file; {way_out}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must name {kind} in JSON, got {str(path)!r}: {error}; {way_out}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}; {way_out}.")
    return content


def shorten(names: Sequence[str], most: int = 5) -> str:
    """List the first of some names, and tell how many there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _quote(names: Sequence[str]) -> str:
    return shorten(list(map(repr, names)), 8) or "none"


def _stem(name: str) -> str:
    return _SUFFIX.sub("", Path(name).name)


def _files(source: Path, folder: str, argument: str) -> dict[str, str]:
    """Map the case name to its path relative to `source`, for all visible files of a folder."""
    if not (source / folder).is_dir():
        there = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
        raise FileNotFoundError(
            f"`{argument}` must be a folder of {source}, got {folder!r}; it has {_quote(there)}."
        )
    found: dict[str, str] = {}
    for name in sorted(os.listdir(source / folder)):
        if name.startswith(".") or not _SUFFIX.search(name):
            continue
        if _stem(name) in found:
            other = found[_stem(name)]
            raise ValueError(f"`{argument}` must hold one file per case, got {other!r} and {name!r}.")
        found[_stem(name)] = Path(folder, name).as_posix()
    if not found:
        raise ValueError(f"`{argument}` must hold volumes or images, got {source / folder}, which has none.")
    return found


def _patients(names: Sequence[str], pattern: str | None) -> dict[str, str]:
    """Map each case to its patient."""
    if pattern is None:
        return {name: name for name in names}
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`patient` must be a regular expression, got {pattern!r}: {error}.") from error
    if regex.groups != 1:
        raise ValueError(f"`patient` must have one group, the patient, got {pattern!r} with {regex.groups}.")
    found = {name: match[1] for name in names if (match := regex.search(name)) and match[1] is not None}
    strange = [name for name in names if name not in found]
    if strange:
        raise ValueError(f"`patient` must match every labeled case, got {pattern!r} for {_quote(strange)}.")
    return found


def _draw_splits(splits: RandomSplits, cases: Sequence[str], owner: Mapping[str, str]) -> _Lists:
    shares = {name: getattr(splits, name) for name in ("validation", "test")}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must be a share of the patients, 0 to 1, got {share}.")
    patients = sorted({owner[case] for case in cases})
    np.random.default_rng(splits.seed).shuffle(patients)
    wanted = [share * len(patients) for share in shares.values()]
    first, second = (max(1, round(number)) if number else 0 for number in wanted)
    if first + second >= len(patients):
        raise ValueError(
            f"`source` must have enough labeled patients for training, got {len(patients)} with {first} for "
            f"validation and {second} for test; lower these shares."
        )
    drawn = patients[first + second :], patients[:first], patients[first : first + second]
    groups = dict(zip(LISTS, map(set, drawn), strict=True))
    return {name: [case for case in cases if owner[case] in group] for name, group in groups.items()}


def _read_splits(splits: SplitsFile, images: Mapping[str, str], owner: Mapping[str, str]) -> _Lists:
    content = _read_json(Path(splits.path), "splits", "a file of splits", "give lists of case names by split")
    lists: _Lists = {}
    for name in LISTS:
        split = _pick_split(content, name, getattr(splits, name), splits.path)
        cases = content[split] if split else []
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise ValueError(
                f"{splits.path} must hold a list of names as {split!r}, got {json.dumps(cases)[:80]}."
            )
        lists[name] = [_stem(case) for case in cases]
        unknown = [case for case in cases if _stem(case) not in images]
        if unknown:
            raise ValueError(
                f"{splits.path} must name images that exist, got {_quote(unknown)} in {split!r}."
            )
        repeated = [case for case, count in Counter(lists[name]).items() if count > 1]
        if repeated:
            raise ValueError(
                f"{splits.path} must name each case once, got {_quote(repeated)} twice in {split!r}."
            )
    _refuse_overlap(lists, splits, owner)
    return lists


def _pick_split(content: Mapping[str, Any], name: str, wanted: str | None, path: str | Path) -> str | None:
    if wanted is not None:
        if wanted not in content:
            raise ValueError(
                f"`{name}` must be a split of {path}, got {wanted!r}; it has {_quote(list(content))}."
            )
        return wanted
    found = [split for split in content if split.lower() in _SYNONYMS[name]]
    if len(found) > 1 or (name == "training" and not found):
        raise ValueError(
            f"{path} must have one split for {name}, such as {_quote(_SYNONYMS[name])}, "
            f"got {_quote(list(content))}; name it by `{name}` (--{name} NAME)."
        )
    return found[0] if found else None


def _refuse_overlap(lists: Mapping[str, Sequence[str]], splits: SplitsFile, owner: Mapping[str, str]) -> None:
    for first, second in (("training", "validation"), ("training", "test"), ("validation", "test")):
        if getattr(splits, first) is not None and getattr(splits, second) is not None:
            continue                                    # both were named by the caller
        owners = [{owner.get(case, case) for case in lists[name]} for name in (first, second)]
        both = sorted(owners[0] & owners[1])
        if both:
            raise ValueError(
                f"{splits.path} must keep {first} and {second} apart, got {_quote(both)} in both; "
                f"correct it, or allow it by naming both splits (--{first} NAME --{second} NAME)."
            )


def _refuse_unlabeled(lists: Mapping[str, Sequence[str]], labels: Mapping[str, str], folder: Path) -> None:
    for name, cases in lists.items():
        missing = [case for case in cases if case not in labels]
        if missing:
            raise ValueError(
                f"{name} must have a label for each image, got none for {_quote(missing)} in {folder}; "
                "add the labels or take the cases out of the split."
            )


def _label_names(names: str | Path | Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Bring every form of `label_names` to {"0": "background", ...}."""
    if names is None:
        return {}
    if isinstance(names, (str, Path)):
        if Path(names).suffix == ".json":
            loaded = _read_json(Path(names), "label_names", "a file of names", "or give the names themselves")
            names = loaded["labels"] if isinstance(loaded.get("labels"), dict) else loaded
        else:
            names = [name.strip() for name in str(names).split(",")]
    if isinstance(names, Mapping):
        pairs = [(str(value), str(name)) for value, name in names.items()]
        if all(name.isdecimal() for _, name in pairs):   # the other way round: {"background": 0}
            pairs = [(name, value) for value, name in pairs]
    else:
        pairs = [(str(value), str(name)) for value, name in enumerate(names)]
    if not pairs or not all(value.isdecimal() and name for value, name in pairs) or pairs[0][0] != "0":
        raise ValueError(
            f"`label_names` must name the values from 0, the background, on, got {dict(pairs)}; "
            'write "background,first,second".'
        )
    return dict(pairs)
