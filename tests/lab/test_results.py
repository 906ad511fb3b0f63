# SPDX-License-Identifier: Apache-2.0
"""`make results`: one small row from end to end, interrupted and continued."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.results import main
from medkd.phantoms.ct import write_ct_phantoms

BUNDLE = "boundary_relation_ct_organs"


def start(repository: Path, root: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "lab.results", BUNDLE, str(root / "toy"), "--root", str(root), "--workers", "2"]
    return subprocess.Popen(
        [*words, "--recipes", str(root / "recipes")], text=True, cwd=repository, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def write_recipe(root: Path, repository: Path) -> None:
    shutil.copytree(repository / "results" / "recipes", root / "recipes")
    row = {
        "options": {
            "out_channels": 7, "patch_size": [32, 32, 32], "spacing": [8.0, 8.0, 8.0],
            "train#trainer#epoch_length": 1,
            "teacher_check": {"metric": "val_mean_dice", "mode": "warn"},
        },
        "epochs": {"teacher": 1, "student": 1}, "val_interval": {"teacher": 1, "student": 1}, "seeds": [0, 1],
        "classical": "sarcoma_muscle", "leaks": ["mean_label"], "curve": [0, 1, 2],
        "ship": True, "calibrate": {"validate#inferer#overlap": [0.0, 0.25]},
    }
    arms = {"student_alone": {"seeds": 1}, "logits_kd": None, "features_kd": None, "method": None}
    own = {"regime": {"labels": 0, "unlabeled": True}, "calibrate": {}, "curve": [], "seeds": [0], "ship": False}
    rows = {"toy": row, "toy_none": {"like": "toy", "data": "toy", **own}}
    (root / "recipes" / f"{BUNDLE}.json").write_text(json.dumps({"default": "toy", "arms": arms, "rows": rows}))


def check_row_without_labels(content: dict[str, Any]) -> None:
    """The second row: what it shares with the first, how it chose, and its place in the curve of the first."""
    (none,) = content["rows"]
    assert none["regime"] == {"name": "none", "labels": 0, "unlabeled": 1, "labels_of_student_alone": 2}
    assert none["teacher"]["keys"] == content["teacher"]["keys"]
    assert none["student_alone"]["keys"] == content["student_alone"]["keys"]
    assert none["distilled"]["keys"] != content["distilled"]["keys"][:1]
    assert none["labels_worth"].keys() & {"value", "reason"}
    points = {point["labels"]: point for point in content["curve"]["points"]}
    assert points[0]["row"] == "toy_none"
    assert points[0]["distilled"]["mean"] == none["distilled"]["mean"]
    assert "student_alone" not in points[0]
    assert points[2]["student_alone"]["keys"] == content["student_alone"]["keys"]       # trained once
    assert points[1]["student_alone"]["keys"] != points[2]["student_alone"]["keys"]


@pytest.mark.timeout(900)   # 2 minutes on two idle cores
def test_a_small_row_from_end_to_end_interrupted_and_continued(repository: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundles" / BUNDLE
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(repository / "bundles" / BUNDLE / name, bundle / name)
    (bundle / "models").mkdir()
    shutil.copy(repository / "README.md", tmp_path)
    sizes: dict[str, Any] = {"shape": (40, 36, 32), "spacing": (6.0, 6.0, 7.0)}
    write_ct_phantoms(tmp_path / "toy", training=2, validation=1, test=1, unlabeled=1, **sizes)
    write_recipe(tmp_path, repository)

    with start(repository, tmp_path) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if "teacher, seed 0: finished" in line:
                first.send_signal(signal.SIGTERM)
    assert first.returncode == 130
    with start(repository, tmp_path) as second:
        said, _ = second.communicate()

    assert second.returncode == 0, said
    assert "teacher, seed 0: was finished before" in said
    content = json.loads((tmp_path / "results" / f"{BUNDLE}.json").read_text())
    assert content["distilled"]["seeds"] == [0, 1]
    runs = tmp_path / "runs" / "lab"
    for arm in (content[name] for name in ("teacher", "student_alone", "combined")):
        for key, chosen, value in zip(arm["keys"], arm["calibrated"], arm["validation"]["runs"], strict=True):
            (file,) = (runs / key).glob("calibration_????????????/calibrate_answer.json")
            tried = json.loads(file.read_text())["validate#inferer#overlap"]
            assert value == round(max(tried), 4)
            assert chosen == {"validate#inferer#overlap": [0.0, 0.25][tried.index(max(tried))]}
    assert content["parameters"]["teacher"] > 20 * content["parameters"]["student"]
    assert content["seconds_per_case"].keys() >= {"load", "network", "decode", "write"}
    assert all(value["student"] > 0 for value in content["seconds_per_case"].values())
    assert set(content["teacher"]["per_case"][0]) == set(content["classical"]["per_case"]) == {"case_003"}
    assert content["classical"]["metrics"].keys() == content["teacher"]["metrics"].keys()
    assert content["leaks"]["mean_label"]["mean"] > 0 < len(content["leaks"]["verdict"])
    told = content["converged"]
    assert (told["steps"], told["steps_at_half"], type(told["reached"])) == (2, 1, bool)
    assert told["teacher"]["validation_at_half"] == content["teacher"]["validation"]["mean"]
    assert content["regime"] == {"name": "all", "labels": 2, "unlabeled": 0, "labels_of_student_alone": 2}
    check_row_without_labels(content)
    assert content["retention"] == round(content["distilled"]["mean"] / content["teacher"]["mean"], 4)
    assert len(list((tmp_path / "runs" / "lab" / "rules").glob("toy_*/sarcoma_muscle/case_003*.nii.gz"))) == 1
    assert (tmp_path / "results" / f"{BUNDLE}_labels.png").exists()
    assert len(content["teacher"]["metrics"]) >= 2
    assert str(tmp_path) not in json.dumps(content)
    assert (tmp_path / "results" / f"{BUNDLE}.png").exists()
    name = r"toy(?: \([a-z, ]+\))?"
    assert re.search(rf"{name}: 0\.\d+ / 0\.", (tmp_path / "README.md").read_text())
    assert re.search(rf"\| {name} \| 0\.", (bundle / "docs" / "README.md").read_text())
    page = (bundle / "docs" / "results.md").read_text()
    assert "Chosen on validation, `validate#inferer#overlap`: teacher 0." in page
    assert len(content["shipped"]["sha256"]) == 64
    assert (bundle / "models" / "model.pt").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", "."], "BUNDLE must be one of .*boundary_relation_ct_organs.*, got 'nothing'"),
        ([BUNDLE, "nowhere"], "DATA must be a folder, got 'nowhere'"),
        ([BUNDLE, ".", "--workers", "0"], "WORKERS must be 1 or more, got 0"),
    ],
)
def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert re.search(message, capsys.readouterr().err)


def test_a_row_that_the_data_do_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "ct_headneck_openkbp"
    data.mkdir()
    assert main([BUNDLE, str(data), "--row", "ct_liver_msd_slices"]) == 1
    said = capsys.readouterr().err
    assert "ROW must be one of ct_headneck_openkbp_all, ct_headneck_openkbp_few, ct_headneck_openkbp_none, got" in said
