# SPDX-License-Identifier: Apache-2.0
"""Options of a run, wherever they come from: what has no meaning is refused, and errors end with their cause."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from itertools import pairwise
from math import inf
from pathlib import Path
from pydoc import locate
from types import TracebackType
from typing import Any

import torch
from monai.bundle.config_item import ConfigComponent
from monai.bundle.config_parser import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from torch import nn

from .cases import told_cause
from .trained import tell_other_input

__all__ = ["check_options", "check_sizes", "current_parser", "prepare_run"]

_TRACKING: Mapping[str, Any] = DEFAULT_MLFLOW_SETTINGS["configs"]   # type: ignore[assignment]
_FREE = {"run", "training", "evaluating", "initialize", "finalize", *_TRACKING}
_NAMED_BY_USERS = "key_metric"        # a dict of metrics, whose keys are what they are called in the log
_REFERENCE = re.compile(r"[@%](\w+)")
_CHOICES = {"resume": (False, True, "changed"), "cpu_dtype": ("float32", "bfloat16")}
_BOUNDS = {   # of options whose other values fail late, or not at all
    "epochs": (1, inf), "val_interval": (1, inf), "batch_size": (1, inf), "learning_rate": (0, inf),
    "num_workers": (0, inf), "cache_rate": (0, 1), "overlap": (0, 0.99), "distill_ramp": (0, 1),
}
_INSIDE = ("_target_", "_disabled_", "_requires_", "_desc_", "_mode_")


def prepare_run(argv: Sequence[str]) -> None:
    """Check the options of the run that is being set up, and let an uncaught error end with its first cause.

    A line of `initialize` in every bundle. MONAI takes any key in silence, whether it comes from the command line, an
    `args_file`, a later config file or Python (`ConfigWorkflow`), so what is compared is what has come of all of them.

    Args:
        argv: `sys.argv`. MONAI wraps errors of a config several times, so that the last line names an expression and
            not the reason; `python -m monai.bundle` gets one line more.

    Raises:
        ValueError: see `check_options`.
    """
    if argv and Path(argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py"):
        sys.excepthook = _end_with_cause
    warnings.filterwarnings("ignore", "Mean of empty slice")       # MONAI's report, of a case that a metric leaves out
    parser = current_parser()
    if parser is None:
        return
    name, base = _base(parser)
    config: dict[str, Any] = parser.get()
    if base and _read_switches(config, base):
        parser.parse()                                             # what is being evaluated needs none of it
    if base:
        check_options(config, base, name)
    tell_other_input(parser)


def _base(parser: ConfigParser) -> tuple[str, dict[str, Any]]:
    """Name and content of the bundle's own config that a run started from; empty where the bundle has no such file."""
    name = f"{'train' if 'train' in parser else 'inference'}.json"
    path = Path(str(parser.get("bundle_root", "."))) / "configs" / name
    return name, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_switches(config: dict[str, Any], base: Mapping[str, Any]) -> bool:
    """Turn the texts true, false and null, as a command line gives them, into values; tell whether there were any.

    As a text `false` counts as true: `--resume false` would resume.
    """
    spoken = {"true": True, "false": False, "null": None, "none": None}
    found = False
    for key, value in config.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found = _read_switches(value, base[key]) or found
        elif isinstance(value, str) and value.lower() in spoken and _takes_none_or_switch(base.get(key)):
            config[key], found = spoken[value.lower()], True
    return found


def current_parser() -> ConfigParser | None:
    """Find the parser of the config whose expression is being evaluated; None outside of a config.

    MONAI hands an expression the objects that it refers to and nothing of the config around it, so it is found where
    it is at work: among the callers.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ConfigParser):
            parser: ConfigParser = frame.f_locals["self"]
            return parser
        frame = frame.f_back
    return None


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    cause = told_cause(error)
    if cause is not error:
        sys.stderr.write(f"\nError: {cause}\n")


def _takes_none_or_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def check_options(config: Mapping[str, Any], base: Mapping[str, Any], file: str = "the config") -> None:
    """Compare a config with the one that it was made from by options and later files.

    A key must exist in the base, be an argument of the class that it goes to, or be referred to by an expression; one
    that begins with `+` or `_` is left alone. A value must be of the kind that the base has: a number, a list of
    numbers, a text, true or false; a list whose key ends in `_range` must ascend. Expressions and references may
    stand for anything, as may what is null in the base.

    Args:
        config: what is run.
        base: train.json or inference.json of the bundle.
        file: name of the base, for messages.

    Raises:
        ValueError: naming the first option that is wrong, with the nearest key or an example.
    """
    used = set(_REFERENCE.findall(json.dumps(config, default=str)))
    for key, value in config.items():
        if key in base:
            _check(key, value, base[key], file)
        elif key not in used | _FREE and not key.startswith(("+", "_")):
            raise ValueError(_unknown(key, base, file))


def _check(path: str, value: Any, base: Any, file: str) -> None:
    if isinstance(base, Mapping) and isinstance(value, Mapping):
        if value.get("_target_") != base.get("_target_") or path.endswith(_NAMED_BY_USERS):
            return                                                 # another component, its class checks the arguments
        unknown = [key for key in value if key not in base and not str(key).startswith(("+", "_"))]
        for key in _not_arguments(unknown, value) if "_target_" in base else unknown if _is_section(base) else []:
            raise ValueError(_unknown(key, base, file, path + "#"))
        missing = [key for key in base if key not in value] if "_target_" not in base and _is_section(base) else []
        if missing:
            raise ValueError(
                f"`{path}` must keep what {file} has, got it without {missing[0]!r}, as a section replaces the whole; "
                f"write its keys one by one, such as {path}#{next(iter(value), missing[0])}."
            )
        for key in value.keys() & base.keys():
            if "_target_" not in base or isinstance(base[key], Mapping) or _is_list_of_components(base[key]):
                _check(f"{path}#{key}", value[key], base[key], file)   # a class checks its own values
    elif _is_list_of_components(base) and isinstance(value, list) and len(value) == len(base):
        for number, (one, other) in enumerate(zip(value, base, strict=True)):
            _check(f"{path}#{number}", one, other, file)
    elif value != base:
        _check_kind(path, value, base, file)


def _check_kind(path: str, value: Any, base: Any, file: str) -> None:
    """Raise where a plain value is of another kind than the one it replaces."""
    wanted = _kind(base)
    if path in _CHOICES and _kind(value) is not None:
        if value not in _CHOICES[path]:
            raise ValueError(f"Option `{path}` must be one of {_listed(_CHOICES[path])}, got {value!r}.")
        return
    if wanted is not None and _kind(value) is not None and not _fits(value, wanted):
        raise ValueError(f"Option `{path}` must be {wanted}, as {json.dumps(base)} in {file}, got {json.dumps(value)}.")
    low, high = _BOUNDS.get(path, (-inf, inf))
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise ValueError(f"Option `{path}` must be in {low:g}..{high:g}, as {json.dumps(base)} in {file}, got {value}.")
    is_lengths = path.endswith(("spacing", "_size")) and _kind(value) == _NUMBERS
    if is_lengths and any(one <= 0 and one != -1 for one in value):   # -1 keeps the spacing of a file
        raise ValueError(
            f"Option `{path}` must be numbers above 0, as {json.dumps(base)} in {file}, got {json.dumps(value)}."
        )
    is_range = path.endswith("_range") and _kind(value) == _NUMBERS
    if is_range and any(low >= high for low, high in pairwise(value)):
        raise ValueError(f"Option `{path}` must ascend, as {json.dumps(base)} in {file}, got {json.dumps(value)}.")


_NUMBER, _WHOLE, _NUMBERS, _TEXT, _SWITCH = (
    "a number", "a whole number", "a list of numbers", "a text", "true or false",
)


def _kind(value: Any) -> str | None:
    """Kind of a plain value; None for expressions, references, null, and what is no plain value."""
    if isinstance(value, bool):
        return _SWITCH
    if isinstance(value, (int, float)):
        return _WHOLE if isinstance(value, int) else _NUMBER
    if isinstance(value, str):
        return None if value.startswith(("$", "@", "%")) else _TEXT
    if isinstance(value, (list, tuple)) and value and all(_kind(one) in (_NUMBER, _WHOLE) for one in value):
        return _NUMBERS
    if _is_list_of_components(value) or (isinstance(value, Mapping) and "_target_" in value):
        return None                                                # one may stand for several, several for one
    return "a list" if isinstance(value, (list, tuple)) else "a section" if isinstance(value, Mapping) else None


def _fits(value: Any, wanted: str) -> bool:
    kind = _kind(value)
    if wanted == "a list":
        return kind in ("a list", _NUMBERS)
    if wanted == _NUMBER or (wanted == _WHOLE and isinstance(value, float) and value.is_integer()):
        return kind in (_NUMBER, _WHOLE)
    return kind == wanted


def _not_arguments(names: Sequence[str], component: Mapping[str, Any]) -> list[str]:
    """Those of the names that the class or function of a component does not take."""
    if not names:
        return []
    target = locate(str(ConfigComponent(dict(component)).resolve_module_name()))   # type: ignore[no-untyped-call]
    try:
        parameters = signature(target).parameters.values()   # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []                                                  # no such class: whoever builds it says so
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters):
        return []
    return [name for name in names if name not in {one.name for one in parameters}]


def _is_section(value: Mapping[str, Any]) -> bool:
    """Whether a dict without a class holds components, so that its keys are places and not data."""
    return any(
        (isinstance(one, Mapping) and ("_target_" in one or _is_section(one))) or _is_list_of_components(one)
        for one in value.values()
    )


def _is_list_of_components(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, Mapping) and "_target_" in one for one in value)


def _unknown(key: str, base: Mapping[str, Any], file: str, path: str = "") -> str:
    known = [name for name in base if name not in _INSIDE]
    near = [path + name for name in get_close_matches(key, known, n=3)]
    way_out = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {_listed(known)}."
    return f"Option `{path}{key}` must exist in {file}, or be referred to there; {way_out}"


def _listed(names: Iterable[Any], most: int = 12) -> str:
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(repr, listed[:most])) + rest


def check_sizes(network: nn.Module) -> None:
    """Run a network once on zeros of each size that an option or a later file has changed, such as `patch_size`.

    Args:
        network: takes (B, C, *S); its mode, its weights and the random state stay as they are.

    Raises:
        ValueError: the network cannot take a size; the message names the nearest smaller one that it can take.
    """
    parser = current_parser()
    base = {} if parser is None else _base(parser)[1]
    names = [name for name, value in base.items() if name.endswith("_size") and _kind(value) == _NUMBERS]
    for name in names:
        size = parser.get(name)   # type: ignore[union-attr]
        if _kind(size) != _NUMBERS:
            continue
        steps = _steps_to_student(parser, name, size)
        if size == base[name] and max(steps) == 1:
            continue
        seen = [length // step for length, step in zip(size, steps, strict=True)]
        problem = _problem(network, seen)
        if problem is not None:
            smaller = ([length // unit * unit for length in seen] for unit in (2, 4, 8, 16, 32))
            good = next((one for one in smaller if all(one) and _problem(network, one) is None), None)
            whole = good and [length * step for length, step in zip(good, steps, strict=True)]
            way_out = f"take {whole}" if whole else "take another one"
            given = f"{list(size)}, of which the student sees {seen}" if max(steps) > 1 else f"{list(size)}"
            raise ValueError(
                f"Option `{name}` must be a size that the network takes, got {given} ({problem}); {way_out}."
            )


def _steps_to_student(parser: Any, name: str, size: Sequence[int]) -> list[int]:
    """By how much the network's image is smaller than a size along each axis: a student of low resolution."""
    key = f"student_{name}"
    seen = parser.get_parsed_content(key) if key in parser else size
    return [length // own for length, own in zip(size, seen, strict=True)]


def _problem(network: nn.Module, size: Sequence[int]) -> str | None:
    """What a network says of zeros of a size; None where it takes them."""
    weight = next((one for one in network.parameters() if one.dim() > 3), None)
    if weight is None:
        return None
    if weight.dim() != len(size) + 2:
        return f"it has {len(size)} axes instead of {weight.dim() - 2}"
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, weight.shape[1], *size, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, ValueError, IndexError) as error:
        return str(error).strip().splitlines()[0][:100]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return None

