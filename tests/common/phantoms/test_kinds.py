# SPDX-License-Identifier: Apache-2.0
"""A bundle says by its modality, or by the name of a kind, which phantoms it takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from medkd.phantoms.kinds import KINDS, kind_of


def with_metadata(folder: Path, metadata: Any) -> Path:
    (folder / "configs").mkdir()
    (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    return folder


def taking(modality: Any, **more: Any) -> dict[str, Any]:
    return {"network_data_format": {"inputs": {"image": {"modality": modality}}}, **more}


def test_every_bundle_of_the_repository_has_a_kind(repository: Path) -> None:
    bundles = sorted(repository.glob("bundles/*/"))
    assert bundles
    assert {kind_of(bundle).name for bundle in bundles} <= set(KINDS)


@pytest.mark.parametrize(("modality", "name"), [("CT", "ct"), ("EM", "em"), ("microscopy", "nuclei")])
def test_the_modality_counts_and_the_name_of_the_folder_does_not(tmp_path: Path, modality: str, name: str) -> None:
    bundle = tmp_path / "graph_ct_tumor_em_nuclei"
    bundle.mkdir()
    assert kind_of(with_metadata(bundle, taking(modality))) is KINDS[name]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_bundle_may_name_its_kind(tmp_path: Path, kind: Any) -> None:
    assert kind_of(with_metadata(tmp_path, taking(kind.modality, phantoms=kind.name))) is kind


@pytest.mark.parametrize("name", ["em", "ct_tumour", 3, None, ["ct_tumor"]])
def test_a_kind_that_is_none_or_of_another_modality_is_refused(tmp_path: Path, name: Any) -> None:
    message = f"`phantoms` of .*json must be a kind .* CT, one of ct, ct_tumor, got {re.escape(json.dumps(name))};"
    with pytest.raises(ValueError, match=message):
        kind_of(with_metadata(tmp_path, taking("CT", phantoms=name)))


@pytest.mark.parametrize(
    ("metadata", "came"), [({}, "null"), (taking("MR"), '"MR"'), (taking(["CT"]), r'\["CT"\]'), ([], "null")]
)
def test_a_bundle_without_a_known_modality_is_refused(tmp_path: Path, metadata: Any, came: str) -> None:
    message = f"modality` of .*metadata.json must be one of CT, EM, microscopy, got {came}; it tells which phantoms"
    with pytest.raises(ValueError, match=message):
        kind_of(with_metadata(tmp_path, metadata))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    message = "`bundle` must be a folder with configs/metadata.json, got "
    with pytest.raises(ValueError, match=message + ".*No such file"):
        kind_of(tmp_path)
    with_metadata(tmp_path, {})
    (tmp_path / "configs/metadata.json").write_text("{")
    with pytest.raises(ValueError, match=message + ".*line 1"):
        kind_of(tmp_path)


def test_a_kind_writes_its_phantoms(tmp_path: Path) -> None:
    path = KINDS["nuclei"].write(tmp_path, training=1, validation=0, test=0, shape=(64, 64))
    assert path == tmp_path / "datalist.json"
    assert [file.name for file in tmp_path.glob("images/*")] == ["case_000.png"]
