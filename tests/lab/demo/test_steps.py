# SPDX-License-Identifier: Apache-2.0
"""The demo's jobs: what repeats which of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.bundle import copy_bundle
from lab.demo.__main__ import BUNDLE, QUICK
from lab.demo.steps import make_jobs


@pytest.fixture
def output(tmp_path: Path) -> Path:
    copy_bundle(BUNDLE, tmp_path / "bundle")
    return tmp_path


def keys(output: Path, seed: int = 0, **changed: int) -> dict[str, str]:
    return {job.name: job.key for job in make_jobs(output, replace(QUICK, **changed), seed)}


def repeated(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_what_depends_on_a_change_is_repeated_and_nothing_else(output: Path) -> None:
    first = keys(output)
    later = ["evaluation", "prediction and speed"]

    assert list(first) == ["phantoms", "teacher", "student alone", "distilled student", *later]
    assert repeated(first, keys(output)) == []
    assert repeated(first, keys(output, training=4)) == list(first)
    assert repeated(first, keys(output, seed=1)) == list(first)
    assert repeated(first, keys(output, teacher_epochs=3)) == ["teacher", "distilled student", *later]
    assert repeated(first, keys(output, student_epochs=3)) == ["student alone", "distilled student", *later]
    config = output / "bundle" / "configs" / "inference.json"
    config.write_text(config.read_text().replace('"overlap": 0.5', '"overlap": 0.25'))
    assert repeated(first, keys(output)) == ["prediction and speed"]


def test_trainings_tell_their_progress_and_go_on_from_checkpoints(output: Path) -> None:
    jobs = {job.name: job for job in make_jobs(output, QUICK, 0)}
    folders = {"teacher": "models/teacher", "student alone": "runs/baseline", "distilled student": "models"}
    for name, folder in folders.items():
        weights = output / "bundle" / folder
        assert jobs[name].checkpoints == weights / "checkpoints"
        assert jobs[name].progress == [weights / "progress.json"]
    assert len(jobs["evaluation"].progress) == len(jobs["evaluation"].commands) == 3
