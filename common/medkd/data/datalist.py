# SPDX-License-Identifier: Apache-2.0
"""Read `datalist.json`, and make one from a folder of images and labels without touching that folder."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medkd.data.assigning import Plan, assign_images, assign_labeled
from medkd.data.classes import assign_classes, find_class_folders, is_class, number_classes
from medkd.data.label_rules import labeled_problem
from medkd.data.left_out import excluded_cases, log_left_out
from medkd.data.naming import quote, shorten, split_channel
from medkd.data.pairs import Pairs, add_folders, find_files, find_images, find_pairs
from medkd.data.splits import LISTS, RandomSplits, SplitsFile, read_json

__all__ = ["LISTS", "RandomSplits", "SplitsFile", "load_datalist", "make_class_datalist", "make_datalist", "shorten",
           "write_datalist"]


def load_datalist(
    path: str | Path, key: str, labeled: bool = False, missing_ok: bool = False
) -> list[dict[str, Any]]:
    """Read one list of a `datalist.json`, with its paths made absolute.

    Paths of `image`, `label` and keys that end in them (`teacher_image`) are relative to `data_root` in the file, which
    itself may be relative to the file; without it, to the folder of the file. Other keys stay as they are. A `label`
    may also be the class of the whole image: its number from 0 on, or its name in `labels` of the file.

    Args:
        path: the file.
        key: `training`, `validation`, `test` or `unlabeled`.
        labeled: require at least one case, and of each the files of image and label, as an evaluation needs them.
        missing_ok: give no items where there is no such file, or no such list in it.

    Returns:
        The items, each with `image` and, where it is labeled, `label`: a path, or the number of a class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, has no such list, or one of another spelling (`unlabelled`) instead, an item has
            no image or one of `unlabeled` has a label, some labels are classes and others none, or what `labeled`
            requires is missing.
    """
    path = Path(path)
    if missing_ok and not path.exists():
        return []
    content = read_json(path, "path", "a datalist", "write one with `medkd datalist`")
    lists = [name for name, value in content.items() if isinstance(value, list)]
    if missing_ok and content.get(key, []) == []:
        _refuse_other_spelling(content, path, key)
        return []
    if key not in lists:
        raise ValueError(
            f"`key` must name a list of {path}, got {key!r}; it has {quote(lists)}; "
            "add one, or write the file anew with `medkd datalist`."
        )
    root = path.parent.absolute() / str(content.get("data_root", ""))
    found = [_with_image(item, f"{path}, {key}[{number}]") for number, item in enumerate(content[key])]
    found = number_classes(found, content.get("labels") or {}, f"{path}, {key}")
    items = [_absolute(item, root, f"{path}, {key}[{number}]") for number, item in enumerate(found)]
    if labeled:
        _refuse_unlabeled_items(items, path, key)
    if key == "unlabeled" and (problem := labeled_problem(items, f"`{key}` of {path}")):
        raise ValueError(problem)
    return items


def _refuse_other_spelling(content: Mapping[str, Any], path: Path, key: str) -> None:
    like = [name for name in content if name.lower().startswith(key[:7]) and name != key]
    if like:
        raise ValueError(f"images must stand in the list `{key}` of {path}, got {like[0]!r}; rename it.")


def _refuse_unlabeled_items(items: Sequence[Mapping[str, Any]], path: Path, key: str) -> None:
    if not items:
        raise ValueError(f"`{key}` of {path} must have at least one case, got none; name the cases to evaluate there.")
    lone = [item["image"] for item in items if item.get("label") is None]
    if lone:
        raise ValueError(
            f"`{key}` of {path} must have a label for each image, as scores need them, got none for {len(lone)} of "
            f"{len(items)}: {shorten(lone)}; add them, or predict without scores by inference.json."
        )
    missing = [item[name] for item in items for name in ("image", "label")
               if not is_class(item[name]) and not os.path.exists(item[name])]
    if missing:
        raise ValueError(
            f"`{key}` of {path} must name files that exist, got {len(missing)} that do not: {shorten(missing)}; "
            "correct the paths, or `data_root`."
        )


def _with_image(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or not item.get("image"):
        raise ValueError(
            f"{where} must be an object with the path of its `image`, got {json.dumps(item)}; add it."
        )
    return item


def _absolute(item: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
    files = [name for name in item if name.endswith(("image", "label"))]
    files = [name for name in files if name != "label" or not is_class(item[name])]
    for name in files:
        if not isinstance(item[name], str) or not item[name]:
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
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
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


def make_datalist(   # noqa: PLR0913 - options of a command, each with a default
    source: str | Path, output: str | Path, splits: SplitsFile | RandomSplits | None = None,
    images: str = "images", labels: str | None = "labels", unlabeled: str | None = None,
    label_names: str | Path | Sequence[str] | Mapping[str, str] | None = None, patient: str | None = None,
    exclude: str | Path | Sequence[str] | None = None, labeled_cases: int | None = None, more: Sequence[str] = (),
) -> Path:
    """Write a `datalist.json` for images and labels with the same file names, and return its path.

    Training cases of `splits` without a label become `unlabeled`, if others have one.

    Args:
        source: the data; nothing is written there. Its absolute path becomes `data_root`.
        output: file to write if it ends in `.json`, else the folder for `datalist.json`.
        splits: which case goes where; None draws `RandomSplits()`.
        images: folder of the images, relative to `source`.
        labels: folder of the labels, relative to `source`. None lists images only, for a training by a teacher: those
            that are drawn for it, or a split names, become `validation`, all others `unlabeled`; only a split fills
            `test`.
        unlabeled: folder of further images, relative to `source`; those that have no label and are in no list become
            `unlabeled`. May be `images` itself.
        label_names: names in the order of the label values, `background` first; also as "background,liver", as
            {"0": "background"}, or as a JSON file of either. None leaves `labels` empty.
        patient: regular expression with one group, the patient, searched in the name without extension; None takes the
            whole name. No patient may be in two lists of `training`, `validation` and `test`; images without a label
            are left out where their patient is in one of the last two.
        exclude: JSON file with a list of names of images to leave out, from the working directory or `source`; or the
            names themselves.
        labeled_cases: number of training cases that keep their labels, the first ones; the others become `unlabeled`.
            With 0 `training` is empty. None keeps all.
        more: further folders, relative to `source`, each with folders `images` and `labels` of its own; what has a
            label there is trained with, behind the other training cases.

    Raises:
        FileNotFoundError: a folder or file does not exist.
        ValueError: `output` lies in `source`, a case of validation or test has no label, a split names an unknown case,
            a case or patient is in two lists, there is no case to train on, `labeled_cases` is out of range, or `more`
            comes without labels or with names that are there already.
    """
    source, target = _places(source, output)
    has_labels = labels is not None
    pairs = find_images(source, images, unlabeled) if labels is None else find_pairs(source, images, labels, unlabeled)
    if more and labels is None:
        raise ValueError(f"`more` must come with labels, got {list(more)} without; name its images by `unlabeled`.")
    added = add_folders(pairs, source, more, images, labels) if labels is not None else []
    extra = _unlabeled(source, pairs, images, unlabeled)
    plan = Plan(splits, patient, excluded_cases(exclude, source, pairs, extra), labeled_cases, added)
    cases = (assign_labeled if has_labels else assign_images)(pairs, extra, plan)
    content: dict[str, Any] = {"data_root": str(source.resolve())}
    for name, listed in cases.lists.items():
        content[name] = [_item(pairs, case) for case in listed]
    content["unlabeled"] = [{"image": path} for path in cases.unlabeled.values()]
    content["labels"] = _label_names(label_names)
    log_left_out(pairs, cases.lists, {*cases.unlabeled, *cases.left_out}, has_labels)
    return write_datalist(target, content)


def make_class_datalist(
    source: str | Path, output: str | Path, splits: SplitsFile | RandomSplits | None = None, images: str = "images",
    label_names: str | Path | Sequence[str] | Mapping[str, str] | None = None, patient: str | None = None,
    exclude: str | Path | Sequence[str] | None = None,
) -> Path:
    """Write a `datalist.json` for pictures in a folder per class, and return its path.

    Args:
        source: the data; nothing is written there. Its absolute path becomes `data_root`.
        output: file to write if it ends in `.json`, else the folder for `datalist.json`.
        splits: which case goes where, by names such as "polyp/a.png"; None draws `RandomSplits()`, so that each list
            has its share of every class.
        images: folder of the classes' folders, relative to `source`.
        label_names: the folders in the order of their numbers from 0 on, as "benign,low,high"; also as `make_datalist`
            takes them. None sorts them by name. Order matters where classes are grades.
        patient: regular expression with one group, the patient, searched in "class/name"; no patient gets into two
            lists. None takes each image as a patient of its own.
        exclude: names to leave out, as `make_datalist`.

    Raises:
        FileNotFoundError: a folder or file does not exist.
        ValueError: `output` lies in `source`, there are no classes, `label_names` are not those of the folders, or a
            split does not fit; see `medkd.data.classes.assign_classes`.
    """
    source, target = _places(source, output)
    pairs, classes = find_class_folders(source, images)
    left_out = excluded_cases(exclude, source, pairs, {})
    classes = {case: name for case, name in classes.items() if case not in left_out}
    there = sorted(set(classes.values()))
    names = _label_names(label_names) or {str(number): name for number, name in enumerate(there)}
    if sorted(names.values()) != there:
        got = quote(list(names.values()))
        raise ValueError(f"`label_names` must be the folders of the classes, {quote(there)}, got {got}.")
    lists = assign_classes(pairs, classes, splits, patient)
    content: dict[str, Any] = {"data_root": str(source.resolve())}
    for name, cases in lists.items():
        content[name] = [{"image": pairs.images[case], "label": classes[case]} for case in cases if case in classes]
    return write_datalist(target, {**content, "unlabeled": [], "labels": names})


def _places(source: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Folder of the data, and the file to write, which must not lie in it."""
    source, target = Path(source), Path(output)
    target = target if target.suffix == ".json" else target / "datalist.json"
    if not source.is_dir():
        raise FileNotFoundError(f"`source` must be a folder with images and labels, got {str(source)!r}.")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"`output` must lie outside `source`, which stays as it is, got {str(target)!r}.")
    return source, target


def _item(pairs: Pairs, case: str) -> dict[str, str]:
    label = {"label": pairs.labels[case]} if case in pairs.labels else {}
    return {"image": pairs.images[case], **label}


def _unlabeled(source: Path, pairs: Pairs, images: str, folder: str | None) -> dict[str, str]:
    if folder is None:
        return {}
    if (source / folder).resolve() == (source / images).resolve():
        return pairs.images
    found = find_files(source, folder, "unlabeled")
    others = [file for case, file in found.items() if split_channel(case)[1] > "0000"]
    if pairs.by_channel and others:
        raise ValueError(
            f"`unlabeled` must have one channel per case, got {quote(others)} beside 0000; move these away."
        )
    return {pairs.case(case) or case: file for case, file in found.items()}


def _label_names(names: str | Path | Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Bring every form of `label_names` to {"0": "background", ...}."""
    if names is None:
        return {}
    if isinstance(names, (str, Path)):
        if Path(names).suffix == ".json":
            loaded = read_json(Path(names), "label_names", "a file of names", "or give the names themselves")
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
