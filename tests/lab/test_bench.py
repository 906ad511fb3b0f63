# SPDX-License-Identifier: Apache-2.0
"""`make bench` in small: every measurement runs, and the files keep to their format; no time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.bench import inter_resolution_attention

KEYS = [
    "name", "subject", "reference", "subject_value", "reference_value", "ratio", "better", "goal", "reached", "unit",
    "spread", "command",
]


def bench(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lab.bench", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=480)


@pytest.fixture(scope="module")
def written(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """File name -> content of one quick run of everything."""
    folder = tmp_path_factory.mktemp("bench")
    done = bench(repository, "--quick", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


def test_a_file_holds_rows_machine_and_versions(written: dict[str, dict[str, Any]]) -> None:
    assert "boundary_relation.json" in written
    for content in written.values():
        assert list(content) == ["rows", "machine", "versions"]
        assert content["machine"]["cores"] >= 1
        assert {"python", "torch", "monai", "medkd"} <= set(content["versions"])


def test_the_network_of_the_histology_paper_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        network = inter_resolution_attention.Vgg(inter_resolution_attention.VGG16, 4)
    assert sum(one.numel() for one in network.parameters()) == 14_716_740


def test_rows_have_distinct_names_and_the_agreed_keys(written: dict[str, dict[str, Any]]) -> None:
    for content in written.values():
        names = [row["name"] for row in content["rows"]]
        assert len(names) == len(set(names))
        for row in content["rows"]:
            assert list(row) == KEYS
            assert row["better"] in ("lower", "higher")
            assert row["subject"]
            assert row["unit"]
            assert row["subject_value"] >= 0


def test_a_ratio_is_a_speed_up_or_an_overhead_and_decides_on_the_goal(written: dict[str, dict[str, Any]]) -> None:
    for row in (row for content in written.values() for row in content["rows"]):
        judged = row["subject_value"] if row["ratio"] is None else row["ratio"]
        assert (row["ratio"] is None) is (row["reference"] is None) is (row["reference_value"] is None)
        if row["goal"] is None:
            assert row["reached"] is None
        else:
            assert row["reached"] is (judged <= row["goal"] if row["better"] == "lower" else judged >= row["goal"])
        if row["spread"] is not None:
            assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        elif row["ratio"] is not None:
            mine, other = row["subject_value"], row["reference_value"]
            assert row["ratio"] == pytest.approx(other / mine if row["better"] == "higher" else mine / other)


def test_an_unknown_measurement_is_refused_with_those_that_the_commands_name(
    written: dict[str, dict[str, Any]], repository: Path
) -> None:
    done = bench(repository, "--only", "boundary_relation.speed")
    assert done.returncode == 2
    refusal = done.stderr.replace("\n", "")
    assert "must be a method or a measurement, got 'boundary_relation.speed'; there are" in refusal
    commands = [row["command"] for content in written.values() for row in content["rows"]]
    assert all(command.startswith("python -m lab.bench --only ") for command in commands)
    assert all(command.split()[4] in refusal for command in commands)
