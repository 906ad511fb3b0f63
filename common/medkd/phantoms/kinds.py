# SPDX-License-Identifier: Apache-2.0
"""The kinds of data that phantoms exist of, and which of them a bundle takes.

A bundle takes the first kind of its modality, unless its metadata name another: `"phantoms": "ct_tumor"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        name: its word in `medkd phantom`, and its module here, which has a function `write_<name>_phantoms`.
        modality: what a bundle that takes such data says of its input `image`. The first kind of several with one
            modality is that of a bundle that does not say more.
        about: what its phantoms are, in one sentence, with their size.
        cases: number of training, validation and test cases, by default.
        options: further options of its phantoms, with their defaults and what they mean.
    """

    name: str
    modality: str
    about: str
    cases: tuple[int, int, int]
    options: Mapping[str, tuple[Any, str]]

    def write(self, output_dir: str | os.PathLike[str], **options: Any) -> Path:
        """Write phantoms by the kind's writer, which takes the options, and is imported only now."""
        writer = getattr(import_module(f"medkd.phantoms.{self.name}"), f"write_{self.name}_phantoms")
        path: Path = writer(output_dir, **options)
        return path


KINDS = {kind.name: kind for kind in (
    Kind("ct", "CT", "Abdominal CT: six organs, look-alikes, contrast phases, noise; 1 MB per case.", (12, 3, 4), {
        "shape": ((96, 80, 64), "voxels per axis, 16 or more each"),
        "spacing": ((3.0, 3.0, 4.0), "mm per voxel and axis; a case differs from it by up to 8 %"),
    }),
    Kind("ct_tumor", "CT", "CT tumors of liver and kidneys: small, weak contrast; 1.5 MB per case.", (16, 4, 4), {
        "shape": ((128, 108, 88), "voxels per axis, 16 or more each"),
        "spacing": ((2.25, 2.25, 3.0), "mm per voxel and axis; a case differs from it by up to 8 %"),
        "healthy": (0.25, "share of each list without a tumor, 0 to 1"),
    }),
    Kind("em", "EM", "EM, labels instance numbers: neurites, organelles, weak membranes; 1 MB per case.", (4, 1, 2), {
        "shape": ((48, 128, 128), "voxels per axis, 16 or more each, sections along the first"),
        "spacing": ((30.0, 6.0, 6.0), "nm per voxel and axis, 2 to 60, sections first; 10,10,10 for cubic voxels. "
                    "Headers hold the numbers without a unit, as NIfTI knows no nm"),
        "missing": (0.0, "chance of a section to be black, 0 to 0.5; its label stays"),
        "gap": (0, "0 where instances touch; 1 for a line of label 0 between them, one voxel wide"),
    }),
    Kind("nuclei", "microscopy", "Pictures of nuclei as PNG, labels instance numbers; 50 kB per case.", (24, 6, 8), {
        "shape": ((256, 256), "pixels per axis, 64 to 4096 each; nuclei have a radius of 5 to 20 pixels"),
        "stained": (0.25, "share of each list that is stained tissue in RGB, 0 to 1; the rest is fluorescence in gray"),
    }),
    Kind("histology", "microscopy", "Tissue in RGB as PNG, its class by the order in one gland; 0.1 MB per case.",
         (120, 20, 40), {
        "shape": ((128, 128), "pixels per axis, 64 to 4096 each; nuclei are 2.5 x 4.6 pixels"),
        "pictures": (3, "pictures of each case, 1 to 20, of grades that follow each other"),
        "grades": (3, "number of classes, 2 to 4, from orderly to disorderly"),
    }),
)}


def kind_of(bundle: str | os.PathLike[str]) -> Kind:
    """Tell which kind of data a bundle takes, by its `configs/metadata.json`.

    The key `phantoms` names the kind. Without it, it is the first of `KINDS` with the modality of the input `image`.

    Args:
        bundle: folder of the bundle.

    Raises:
        ValueError: the metadata cannot be read, name no modality of `KINDS`, or a kind that is none or of another
            modality.
    """
    file = Path(bundle, "configs/metadata.json")
    try:
        metadata: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`bundle` must be a folder with configs/metadata.json, got {bundle}: {error}") from None
    modality = metadata
    for key in ("network_data_format", "inputs", "image", "modality"):
        modality = modality.get(key) if isinstance(modality, dict) else None
    kinds = {name: kind for name, kind in KINDS.items() if kind.modality == modality}
    if not kinds:
        known = ", ".join(dict.fromkeys(kind.modality for kind in KINDS.values()))
        raise ValueError(
            f"`network_data_format#inputs#image#modality` of {file} must be one of {known}, got "
            f"{json.dumps(modality)}; it tells which phantoms suit the bundle."
        )
    named = metadata.get("phantoms", next(iter(kinds)))
    if not isinstance(named, str) or named not in kinds:
        raise ValueError(
            f"`phantoms` of {file} must be a kind of the modality {modality}, one of {', '.join(kinds)}, got "
            f"{json.dumps(named)}; leave it out for the first of them."
        )
    return kinds[named]
