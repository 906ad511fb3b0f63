# SPDX-License-Identifier: Apache-2.0
"""What is made of results can be made again from them alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lab.publish import publish_all


@pytest.fixture
def root(repository: Path, tmp_path: Path) -> Path:
    """A copy of what results are made of and go to."""
    shutil.copytree(repository / "results", tmp_path / "results")
    shutil.copy(repository / "README.md", tmp_path)
    for file in (repository / "results").glob("*.json"):
        for name in ("configs", "docs"):
            bundle = Path("bundles", file.stem, name)
            shutil.copytree(repository / bundle, tmp_path / bundle)
    return tmp_path


def test_all_results_are_published_twice_alike_and_rows_of_an_earlier_protocol_say_so(root: Path) -> None:
    names = publish_all(root, recipes=root / "results" / "recipes")

    assert names == sorted(file.stem for file in (root / "results").glob("*.json"))
    texts = {}
    for name in names:
        content = json.loads((root / "results" / f"{name}.json").read_text())
        for row in (content, *content["rows"]):
            assert ("not_rerun" in row) == ("teacher" in row and "converged" not in row)
            if "not_rerun" in row:
                assert f"{row['id']} (not rerun" in (root / "README.md").read_text()
        texts[name] = (root / "bundles" / name / "docs" / "results.md").read_text()
    publish_all(root, names[:1], recipes=root / "results" / "recipes")
    assert (root / "bundles" / names[0] / "docs" / "results.md").read_text() == texts[names[0]]


def test_a_bundle_without_results_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"BUNDLE must be one of .*, which have results, got \['nothing'\]"):
        publish_all(root, ["nothing"])
