# SPDX-License-Identifier: Apache-2.0
"""What is compared: a network of a bundle, with the configs and settings that it was trained with, and its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal

from medkd.checks import suggest
from medkd.data.bundle_check import scripts_of
from medkd.inference.cases import told_cause

__all__ = ["Kind", "Network", "check_comparable", "find_bundle"]

Kind = Literal["classes", "instances", "whole images"]

_NEEDED = ("train", "evaluate")
_SEEN = ("spacing", "scale", "intensity_range", "patch_size", "window_size")   # what a network is shown, of ours


@dataclass(frozen=True)
class Network:
    """A network as its bundle evaluates it; building it runs code of the bundle.

    Args:
        name: what to call it.
        root: folder of the bundle.
        configs: names of files in configs/ that it was trained with, beside train.json, in their order.
        settings: key -> value, as options of its training.
        given_weights: its weights, or a checkpoint of its training; None for the `model.pt` that the training writes.

    Raises:
        ValueError: no such config or key; the bundle has no evaluation.
    """

    name: str
    root: Path
    configs: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    given_weights: Path | None = None

    def parse(self, extra: Mapping[str, Any] | None = None, configs: Sequence[str] | None = None) -> Any:
        """A new parser of the merged configs, evaluate.json or that of a config last; `extra` may be of any key."""
        from monai.bundle.config_parser import ConfigParser

        own = self.configs if configs is None else configs
        files = [self._file(name) for name in (_NEEDED[0], *own, self._evaluation(own))]
        parser = ConfigParser()
        parser.read_config([str(file) for file in files])
        places = {"bundle_root": str(self.root)}
        for key, value in {**places, **self.settings, **(extra or {})}.items():
            if key not in parser:
                raise ValueError(
                    f"`{self.name}` must be set by keys of its configs, got {key!r}; {suggest(key, parser.get())}"
                )
            parser[key] = value
        return parser

    def _evaluation(self, configs: Sequence[str]) -> str:
        """Name of the config that evaluates: that of a preset with another kind of label, where it has one."""
        own = (f"{_NEEDED[1]}_{name.removesuffix('.json')}" for name in configs)
        return next((name for name in own if (self.root / "configs" / f"{name}.json").is_file()), _NEEDED[1])

    def _file(self, name: str) -> Path:
        file = self.root / "configs" / f"{name.removesuffix('.json')}.json"
        if not file.is_file():
            known = [path.stem for path in sorted((self.root / "configs").glob("*.json"))]
            raise ValueError(f"`{self.name}` must have the config {name!r} in {self.root}; {suggest(name, known)}")
        return file

    @cached_property
    def config(self) -> dict[str, Any]:
        """The merged config, as it is written."""
        return dict(self.parse().get())

    @cached_property
    def kind(self) -> Kind:
        """What a label has numbers of: classes, instances, or one class of a whole image."""
        if self.value("label_filling#dtype") == "class":
            return "whole images"
        return "classes" if self.config.get("score_columns") == "classes" else "instances"

    def value(self, key: str) -> Any:
        """A value of the config with its references resolved; None where there is no such key.

        Raises:
            ValueError: a setting with which it cannot be had.
        """
        parser = self.parse()
        if key not in parser:
            return None
        with scripts_of(self.root):
            try:
                return parser.get_parsed_content(key)
            except Exception as error:   # whatever its configs make of a setting
                raise ValueError(
                    f"`{self.name}` must have a {key!r} that its configs can make, got {parser[key]!r}: "
                    f"{told_cause(error)}; correct the settings."
                ) from error

    @cached_property
    def classes(self) -> int:
        """Number of classes, with the background where there is one; for instances that of channels."""
        return int(self.value("out_channels"))

    @cached_property
    def axes(self) -> int:
        """Those of its images, 2 or 3: a network of slices may work on volumes."""
        return int(self.value("data_check#spatial_dims") or len(self.value("patch_size")))

    @cached_property
    def weights(self) -> Path:
        """File of the weights.

        Raises:
            FileNotFoundError: it is not there.
        """
        path = self.given_weights or Path(self.value("ckpt_dir"), "model.pt")
        if not path.is_file():
            raise FileNotFoundError(
                f"`{self.name}` must have weights, got {path}, which does not exist; train it, or name the file: "
                f"{self.name}=FILE{''.join(f'+{name}' for name in self.configs)}."
            )
        return path

    @cached_property
    def sha256(self) -> str:
        """Hash of that file."""
        with self.weights.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    def class_names(self) -> dict[int, str]:
        """Names of the classes, as the metadata of the bundle have them; empty where they do not fit."""
        channels: Any = self._metadata().get("network_data_format", {})
        for key in ("outputs", "pred", "channel_def"):
            channels = channels.get(key, {})
        return {int(number): name for number, name in channels.items()} if len(channels) == self.classes else {}

    def _metadata(self) -> dict[str, Any]:
        file = self.root / "configs/metadata.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def story(self, others: Sequence[Network] = ()) -> str:
        """How it was trained, by the `model.json` beside its weights; `others` may hold its teacher."""
        file = self.weights.with_name("model.json")
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "unknown: there is no model.json beside the weights"
        text = "with labels alone"
        if told.get("mode") == "distilled":
            sha = str(told.get("teacher_sha256"))
            teachers = [other.name for other in others if other.sha256 == sha]
            teacher = f"`{teachers[0]}`" if teachers else f"a teacher of SHA-256 {sha[:12]}"
            weights = ", ".join(f"{term} {weight:g}" for term, weight in told.get("weights", {}).items() if weight)
            text = f"distilled from {teacher} (weights: {weights or 'none'})"
        text += f"; weights of epoch {told.get('epoch')} of {told.get('max_epochs')}"
        for metric, value in (told.get("validation") or {}).items():
            text += f", {metric} {value:.3f} on its validation cases"
        return text

    def facts(self, others: Sequence[Network], layer: str, parameters: int) -> list[tuple[str, str]]:
        """What it is, for readers; `layer` is the name of the module's class."""
        about = self._metadata()
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        shown = {key: self.value(key) for key in _SEEN if key in self.config}
        units = {"spacing": f" {self.config.get('unit') or ''}".rstrip(), "patch_size": " voxels in training"}
        return [
            ("bundle", f"{about.get('name', self.root.name)} {about.get('version', '')}".strip()),
            ("configs", ", ".join(("train", *self.configs)) + (f"; {settings}" if settings else "")),
            ("network", f"{layer}, {parameters:,} parameters"),
            ("sees", ", ".join(f"{key} {value}{units.get(key, '')}" for key, value in shown.items()) or "-"),
            ("trained", self.story(others)),
            ("weights", f"{self._shown_weights()}, SHA-256 {self.sha256}"),
        ]

    def _shown_weights(self) -> str:
        path, root = self.weights.absolute(), self.root.absolute()
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def find_bundle(file: Path) -> Path | None:
    """The bundle that a file lies in: the nearest folder above with a train.json."""
    for folder in file.absolute().parents:
        if (folder / "configs/train.json").is_file():
            return folder
    return None


def check_comparable(networks: Sequence[Network]) -> None:
    """Raise unless what the networks give can be laid side by side.

    Raises:
        ValueError: fewer than two, two of one name, another kind of label, number of axes, unit or number of classes;
            a bundle without the configs of an evaluation.
    """
    if len(networks) < 2:
        raise ValueError(f"`medkd compare` needs two or more networks, got {len(networks)}; name another one.")
    names = [network.name for network in networks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Networks must have names of their own, got {name!r} twice; write NAME=PATH.")
    for network in networks:
        missing = [f"configs/{name}.json" for name in _NEEDED if not (network.root / f"configs/{name}.json").is_file()]
        if missing:
            raise ValueError(
                f"`{network.name}` must be of a bundle that trains and evaluates, as ours, got "
                f"{os.fspath(network.root)} without {missing[0]}."
            )
    first = networks[0]
    words = {"kind": "labels of", "axes": "a number of axes of", "unit": "lengths in"}
    for other in networks[1:]:
        for what, text in words.items():
            pair = [one.config.get("unit") if what == "unit" else getattr(one, what) for one in (first, other)]
            if pair[0] != pair[1]:
                raise ValueError(
                    f"Networks must have the same task, got {text} {pair[0]} for `{first.name}` and {pair[1]} for "
                    f"`{other.name}`; compare those of one task."
                )
        if first.kind != "instances" and first.classes != other.classes:
            raise ValueError(
                f"Networks must have the same number of classes, got {first.classes} for `{first.name}` and "
                f"{other.classes} for `{other.name}`; if that is how they were trained they cannot be compared, else "
                f"write {other.name}=...+out_channels={first.classes}, or --set out_channels=K for all."
            )
