# SPDX-License-Identifier: Apache-2.0
"""The demo's jobs: what repeats which of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.bundle import copy_bundle
from lab.demo.__main__ import BUNDLE, FULL, QUICK, parse_options
from lab.demo.steps import Sizes, make_jobs, plan_lanes


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
    mine = ["your phantoms", "student alone", "distilled student", *later]

    assert list(first) == [
        "phantoms of the teacher", "your phantoms", "teacher", "student alone", "student alone with 3 labels",
        "distilled student", *later,
    ]
    assert repeated(first, keys(output)) == []
    assert repeated(first, keys(output, labels=1)) == mine
    assert repeated(first, keys(output, unlabeled=5)) == mine
    assert repeated(first, keys(output, seed=1)) == list(first)
    assert repeated(first, keys(output, teacher_epochs=3)) == ["teacher", "distilled student", *later]
    alone = [name for name in first if name.startswith("student alone")]
    assert repeated(first, keys(output, alone_epochs=3)) == [*alone, *later]
    assert repeated(first, keys(output, distilled_epochs=3)) == ["distilled student", *later]
    config = output / "bundle" / "configs" / "inference.json"
    config.write_text(config.read_text().replace('"overlap": 0.5', '"overlap": 0.25'))
    assert repeated(first, keys(output)) == ["prediction and speed"]


def test_the_teacher_learns_from_cases_that_the_user_has_not(output: Path) -> None:
    jobs = {job.name: " ".join(job.commands[0]) for job in make_jobs(output, QUICK, seed=3)}

    assert "../teacher_data --seed 7 --training 3" in jobs["phantoms of the teacher"]
    assert "../data --seed 6 --training 2 --unlabeled 2" in jobs["your phantoms"]
    assert "--dataset_dir ../teacher_data" in jobs["teacher"]
    assert "--dataset_dir ../data" in jobs["student alone"]
    assert "--dataset_dir ../data" in jobs["distilled student"]
    assert "[:3]" in jobs["student alone with 3 labels"]


def test_trainings_tell_their_progress_and_go_on_from_checkpoints(output: Path) -> None:
    jobs = {job.name: job for job in make_jobs(output, QUICK, 0)}
    folders = {"teacher": "models/teacher", "student alone": "runs/baseline", "distilled student": "runs/logits"}
    for name, folder in folders.items():
        weights = output / "bundle" / folder
        assert jobs[name].checkpoints == weights / "checkpoints"
        assert jobs[name].progress == [weights / "progress.json"]
    assert len(jobs["evaluation"].progress) == len(jobs["evaluation"].commands) == 4


def test_what_needs_something_runs_after_it_and_times_are_taken_alone(output: Path) -> None:
    jobs = make_jobs(output, QUICK, 0)
    names = [[[job.name for job in lane] for lane in lanes] for lanes in plan_lanes(jobs)]

    assert names == [
        [["phantoms of the teacher"], ["your phantoms"]],
        [["teacher", "distilled student"], ["student alone", "student alone with 3 labels"]],
        [["evaluation", "prediction and speed"]],
    ]


@pytest.mark.parametrize("sizes", [FULL, QUICK, parse_options(["--epochs", "7"]).sizes])
def test_a_student_alone_sees_as_many_crops_as_the_distilled_one(sizes: Sizes) -> None:
    assert sizes.alone_epochs == 2 * sizes.distilled_epochs      # an unlabeled case is added to each labeled one
