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


def prepare(repository: Path, root: Path, rows: dict[str, dict[str, Any]]) -> Path:
    """A repository with the bundle, phantoms and a recipe; gives the bundle's folder."""
    bundle = root / "bundles" / BUNDLE
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(repository / "bundles" / BUNDLE / name, bundle / name)
    (bundle / "models").mkdir()
    shutil.copy(repository / "README.md", root)
    sizes: dict[str, Any] = {"shape": (40, 36, 32), "spacing": (6.0, 6.0, 7.0)}
    write_ct_phantoms(root / "toy", training=2, validation=1, test=1, unlabeled=1, **sizes)
    shutil.copytree(repository / "results" / "recipes", root / "recipes")
    arms = {"student_alone": {"seeds": 1}, "logits_kd": None, "features_kd": None, "method": None}
    content = {"default": "toy", "arms": arms, "rows": rows}
    (root / "recipes" / f"{BUNDLE}.json").write_text(json.dumps(content))
    return bundle


ROW: dict[str, Any] = {
    "options": {
        "out_channels": 7, "patch_size": [32, 32, 32], "spacing": [8.0, 8.0, 8.0], "train#trainer#epoch_length": 1,
        "teacher_check": {"metric": "val_mean_dice", "mode": "warn"},
    },
    "epochs": {"teacher": 1, "student": 1}, "val_interval": {"teacher": 1, "student": 1},
}


@pytest.mark.timeout(900)   # a minute on two idle cores
def test_a_small_row_from_end_to_end_interrupted_and_continued(repository: Path, tmp_path: Path) -> None:
    own = {"classical": "sarcoma_muscle", "leaks": ["mean_label"], "ship": True, "seeds": [0, 1],
           "calibrate": {"validate#inferer#overlap": [0.0, 0.25]}}
    bundle = prepare(repository, tmp_path, {"toy": {**ROW, **own}})

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
    assert content["steps"] == dict.fromkeys(content["steps"], 1)
    assert content["steps"].keys() >= {"teacher", "student_alone", "combined"}
    assert told["teacher"]["validation_at_half"] == content["teacher"]["validation"]["mean"]
    assert content["regime"] == {"name": "all", "labels": 2, "unlabeled": 0, "labels_of_student_alone": 2}
    assert content["retention"] == round(content["distilled"]["mean"] / content["teacher"]["mean"], 4)
    assert len(list((runs / "rules").glob("toy_*/sarcoma_muscle/case_003*.nii.gz"))) == 1
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


@pytest.mark.slow           # 2 minutes on two idle cores
@pytest.mark.timeout(1800)
def test_regimes_share_trainings_and_fill_a_curve_from_end_to_end(repository: Path, tmp_path: Path) -> None:
    row = {**ROW, "seeds": [0], "regime": {"unlabeled": True}}
    none = {"like": "toy", "data": "toy", "regime": {"labels": 0, "unlabeled": True}, "curve": []}
    prepare(repository, tmp_path, {"toy": {**row, "curve": [0, 1, 2]}, "toy_none": none})

    with start(repository, tmp_path) as process:
        said, _ = process.communicate()

    assert process.returncode == 0, said
    whole = json.loads((tmp_path / "results" / f"{BUNDLE}.json").read_text())
    (without,) = whole["rows"]
    assert whole["regime"] == {"name": "all", "labels": 2, "unlabeled": 1, "labels_of_student_alone": 2}
    assert without["regime"] == {"name": "none", "labels": 0, "unlabeled": 1, "labels_of_student_alone": 2}
    for name in ("teacher", "student_alone"):
        assert without[name]["keys"] == whole[name]["keys"]
    assert without["labels_worth"].keys() & {"value", "reason"}
    points = {point["labels"]: point for point in whole["curve"]["points"]}
    assert (points[0]["row"], points[2]["row"]) == ("toy_none", "toy")
    assert points[0]["distilled"]["mean"] == without["distilled"]["mean"]
    assert "student_alone" not in points[0]
    keys = [points[1]["student_alone"]["keys"], points[2]["student_alone"]["keys"], whole["student_alone"]["keys"]]
    assert keys[0] != keys[1] == keys[2]                           # trained once
    assert points[2]["distilled"]["keys"] == whole["distilled"]["keys"]
    assert all("logits_kd" in point for point in points.values())
    assert (tmp_path / "results" / f"{BUNDLE}_labels.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", "."], "BUNDLE must be one of .*boundary_relation_ct_organs.*, got 'nothing'"),
        ([BUNDLE, "nowhere"], "DATA must be a folder, got 'nowhere'"),
        ([BUNDLE, ".", "--workers", "0"], "WORKERS must be 1 or more, got 0"),
        ([BUNDLE, ".", "--search", "--finished"], "SEARCH and FINISHED cannot be given together"),
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
