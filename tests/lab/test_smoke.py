# SPDX-License-Identifier: Apache-2.0
"""What `make smoke` does with a bundle; that it works is seen by running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.bundle import copy_bundle
from lab.smoke import main, make_jobs


def test_each_bundle_is_taught_distilled_and_used_on_phantoms_of_its_kind(repository: Path, tmp_path: Path) -> None:
    folders: dict[str, Path] = {}
    for bundle in sorted((repository / "bundles").glob("*/")):
        copy_bundle(bundle, tmp_path / bundle.name)
        jobs = make_jobs(bundle, tmp_path)

        assert [job.name for job in jobs] == ["phantoms", "teacher", "student", "inference"]
        assert jobs[0].commands[0][-3:-1] == ["--for", str(bundle)]
        assert all(str(jobs[0].writes[0]) in job.commands[0] for job in jobs)
        assert "runs/smoke/model.pt" in jobs[3].commands[0]
        assert jobs[2].writes[0] == tmp_path / bundle.name / "runs" / "smoke" / "model.pt"
        folders[bundle.name] = jobs[0].folder
    assert folders["graph_relation_nuclei"] != folders["graph_relation_em_neurons"]


def test_labels_are_those_of_the_smoke_training(repository: Path, tmp_path: Path) -> None:
    words = make_jobs(repository / "bundles" / "boundary_relation_ct_organs", tmp_path)[3].commands[0]
    assert words[words.index("--out_channels") + 1] == "7"


def test_an_unknown_bundle_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--bundle", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
