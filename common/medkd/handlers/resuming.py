# SPDX-License-Identifier: Apache-2.0
"""Put what a checkpoint holds into the objects of a run: as it was, or as far as new settings let it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["Resume", "as_resume", "load_anew", "load_objects"]

Resume = Literal[False, True, "changed"]
# switches of optimizers that ask for more memories than a checkpoint without them has
_SWITCHES = ("amsgrad", "centered", "momentum")
logger = logging.getLogger(__name__)


def as_resume(value: Any) -> Resume:
    """The option `resume`, which a command line gives as text.

    Raises:
        ValueError: it is none of false, true and changed.
    """
    known: dict[str, Resume] = {"false": False, "true": True, "changed": "changed"}
    text = str(value).lower()
    if text not in known:
        raise ValueError(f"`resume` must be one of false, true and changed, got {value!r}.")
    return known[text]


def load_objects(objects: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> None:
    """Load everything as it was saved.

    Args:
        objects: name -> module, optimizer or schedule.
        content: of the checkpoint.
        path: the checkpoint, for messages.

    Raises:
        ValueError: one of them is not in the checkpoint, or does not fit.
    """
    for name, target in objects.items():
        if name not in content["objects"]:
            raise ValueError(f"{path} must hold {name!r} to resume, got {sorted(content['objects'])}.")
        try:
            target.load_state_dict(content["objects"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} does not fit {name!r} of this run; it cannot be resumed: {error}") from error


def load_anew(objects: Mapping[str, Any], content: Mapping[str, Any], path: Path, steps: int) -> None:
    """Load what was learned, and leave the settings of this run: hyper-parameters, schedules, losses.

    A schedule is not loaded: it is the one of this run, wound forward by what is done. Moments of an optimizer and
    memories of a loss that do not fit any more start anew, which is logged.

    Args:
        objects: name -> module, optimizer or schedule, as they were built, in any order.
        content: of the checkpoint.
        path: the checkpoint, for messages.
        steps: that this run would have done by now.

    Raises:
        ValueError: the student does not fit, or a schedule depends on the validation.
    """
    schedules = {name: target for name, target in objects.items() if isinstance(target, LRScheduler)}
    for name in schedules:
        if isinstance(schedules[name], ReduceLROnPlateau):
            raise ValueError(
                f"`resume` must not be 'changed' with {name!r}, a {type(schedules[name]).__name__}, which cannot be "
                "wound forward, as it depends on each validation; resume with the same settings, or start anew."
            )
    load_objects({"network": objects["network"]}, content, path)
    for name, target in objects.items():
        if name == "network" or name in schedules:
            continue
        if isinstance(target, Optimizer):
            _load_moments(name, target, content)
        else:
            _load_if_it_fits(name, target, content)
    for name, schedule in schedules.items():                       # after the optimizers, whose rates they set
        _wind(schedule, _steps_done(content["objects"].get(name, {}), content, steps))


def _load_if_it_fits(name: str, target: Any, content: Mapping[str, Any]) -> None:
    before = copy.deepcopy(target.state_dict())
    try:
        target.load_state_dict(content["objects"][name])
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(target, nn.Module):                          # it has loaded what fits of it
            target.load_state_dict(before)
        logger.warning("%s starts anew, as the checkpoint has no such one: %s", name, error)


def _load_moments(name: str, optimizer: Optimizer, content: Mapping[str, Any]) -> None:
    saved = content["objects"].get(name)
    if saved is None or not _has_moments_for(name, optimizer, saved, content):
        logger.warning("The moments of %s start anew: the checkpoint is of another one.", name)
        return
    own = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
           for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def _has_moments_for(name: str, optimizer: Optimizer, saved: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    kind, record = type(optimizer).__name__, content.get("record") or {"built": {}}
    groups = list(zip(saved["param_groups"], optimizer.param_groups, strict=False))
    if record["built"].get(f"{name}#kind", kind) != kind or len(saved["param_groups"]) != len(optimizer.param_groups):
        return False
    for old, new in groups:
        if len(old["params"]) != len(new["params"]) or any(new.get(key) and not old.get(key) for key in _SWITCHES):
            return False
    return all(
        moment.shape == parameter.shape
        for old, new in groups
        for number, parameter in zip(old["params"], new["params"], strict=True)
        for moment in saved["state"].get(number, {}).values()
        if isinstance(moment, Tensor) and moment.dim() > 0
    )


def _steps_done(saved: Mapping[str, Any], content: Mapping[str, Any], steps: int) -> int:
    """How often a schedule was stepped: after each epoch, or after each step, whose number may be another now."""
    count = int(saved.get("last_epoch", content["epoch"]))
    return steps if count == content["iteration"] != content["epoch"] else count


def _wind(schedule: LRScheduler, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                            # torch warns that the optimizer has done no step
        for _ in range(count):
            schedule.step()
