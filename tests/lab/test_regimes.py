# SPDX-License-Identifier: Apache-2.0
"""Lists of label regimes: nested, without the teacher's images where there are no labels, and shared where equal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.keys import data_hash
from lab.plan import all_parallel, make_run, train_all
from lab.recipe import Arm, Row
from lab.regimes import Regime, describe_regime, make_regime, regime_list, supervised_list
from lab.training import Study
from medkd.data.datalist import write_datalist
from tests.lab.conftest import ARMS, TRAIN, write_bundle

WHOLE: dict[str, Any] = {
    "training": [{"image": f"t{n}", "label": f"l{n}"} for n in range(4)],
    "validation": [{"image": "v", "label": "w"}], "test": [{"image": "x", "label": "y"}],
    "unlabeled": [{"image": "u0"}, {"image": "u1"}], "labels": {"0": "background"},
}


def images(content: dict[str, Any], name: str) -> list[str]:
    return [case["image"] for case in content[name]]


@pytest.mark.parametrize(
    ("regime", "training", "unlabeled", "labeled_validation"),
    [
        (("all", True), ["t0", "t1", "t2", "t3"], ["u0", "u1"], True),
        (("all", False), ["t0", "t1", "t2", "t3"], [], True),
        ((1, True), ["t0"], ["t1", "t2", "t3", "u0", "u1"], True),
        ((3, False), ["t0", "t1", "t2"], ["t3"], True),
        ((0, True), [], ["u0", "u1"], False),
    ],
)
def test_a_regime_keeps_the_first_labels_and_makes_the_rest_unlabeled(
    regime: tuple[Any, bool], training: list[str], unlabeled: list[str], labeled_validation: bool
) -> None:
    before = json.dumps(WHOLE)
    made = regime_list(WHOLE, *regime)

    assert images(made, "training") == training
    assert all("label" in case for case in made["training"])
    assert images(made, "unlabeled") == unlabeled
    assert not any("label" in case for case in made["unlabeled"])
    assert images(made, "validation") == ["v"]
    assert ("label" in made["validation"][0]) is labeled_validation
    assert made["test"] == WHOLE["test"]
    assert json.dumps(WHOLE) == before


def test_what_learns_from_labels_alone_sees_no_other_image_and_all_labels_where_there_are_none() -> None:
    for labels, training in (("all", 4), (2, 2), (0, 4)):
        made = supervised_list(WHOLE, labels)
        assert (len(made["training"]), made["unlabeled"]) == (training, [])
    assert supervised_list(WHOLE, 4) == supervised_list(WHOLE, 0) == supervised_list(WHOLE)
    assert describe_regime(WHOLE, Regime(0, unlabeled=True)) == {
        "name": "none", "labels": 0, "unlabeled": 2, "labels_of_student_alone": 4
    }
    assert describe_regime(WHOLE, Regime(1, unlabeled=True)) == {
        "name": "few", "labels": 1, "unlabeled": 5, "labels_of_student_alone": 1
    }
    own = describe_regime(WHOLE, Regime(1, unlabeled=True), Regime(2))
    assert (own["labels_of_teacher"], own["labels_of_student_alone"]) == (2, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": -1}, "must be 0, a number of cases or 'all', got -1"),
        ({"labels": "few"}, "got 'few'"),
        ({"labels": True}, "got True"),
        ({"labels": 0}, "`unlabeled` of a regime must be true where `labels` is 0"),
        ({"unlabeled": "yes"}, "must be true or false, got 'yes'"),
        ({"label": 3}, "must have the keys 'labels' and 'unlabeled', got \\['label'\\]"),
    ],
)
def test_a_wrong_regime_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_regime(content)


def test_a_regime_that_the_data_do_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at most 4, the labeled cases, got 5"):
        regime_list(WHOLE, 5)
    with pytest.raises(ValueError, match="must have images where a regime has no labels, got none"):
        regime_list({**WHOLE, "unlabeled": []}, 0, True)


def fill(folder: Path) -> None:
    """Put the whole list in place of the toy study's."""
    (folder / "datalist.json").write_text(json.dumps(WHOLE))


def test_each_training_reads_the_list_of_its_regime(make_study: Callable[..., Study], tmp_path: Path) -> None:
    fill(tmp_path)
    study = make_study(row=Row("a", regime={"labels": 2, "unlabeled": True}, arms=ARMS))
    lists = {}
    for name in ("teacher", "student_alone", "method"):
        path = study.datalist_of(make_run(study, name, ARMS[name], 0))
        content = json.loads(path.read_text())
        lists[name] = images(content, "training"), images(content, "unlabeled")
        assert (path.parent / content["data_root"]).resolve() == tmp_path.resolve()

    assert lists == {
        "teacher": (["t0", "t1", "t2", "t3"], []), "student_alone": (["t0", "t1"], []),
        "method": (["t0", "t1"], ["t2", "t3", "u0", "u1"]),
    }
    whole = make_study(row=Row("a", regime={"labels": "all", "unlabeled": True}, arms=ARMS))
    assert whole.datalist_of(make_run(whole, "method", ARMS["method"], 0)) == tmp_path / "datalist.json"


def test_trainings_that_start_at_once_may_want_one_list(
    make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    study = make_study(row=Row("a", regime={"labels": 2, "unlabeled": True}, arms=ARMS))
    written: list[Path] = []

    def slowly(path: Path, content: dict[str, Any]) -> Path:
        written.append(path)
        time.sleep(0.2)
        return write_datalist(path, content)

    monkeypatch.setattr("lab.training.write_datalist", slowly)
    runs = [make_run(study, "method", ARMS["method"], seed) for seed in range(4)]
    assert len(set(all_parallel(study.datalist_of, runs, 4, study.executor))) == len(written) == 1


def test_regimes_share_the_trainings_that_are_the_same(make_study: Callable[..., Study], tmp_path: Path) -> None:
    fill(tmp_path)
    none = {"description": {"saved": True, "epoch": 3, "validation": {"dice_with_teacher": 0.5}}}
    found = {}
    for labels in ("all", 2, 0):
        own = none if labels == 0 else {}
        arms = {**{name: ARMS[name] for name in ("teacher", "student_alone")}, "method": Arm(("method",), own)}
        study = make_study(row=Row("a", regime={"labels": labels, "unlabeled": True}, arms=arms, seeds=(0,)))
        found[labels] = train_all(study, arms)

    def new(labels: Any) -> set[str]:
        return {one.run.arm for one in found[labels].values() if one.new}

    assert new("all") == {"teacher", "student_alone", "method"}
    assert (new(2), new(0)) == ({"student_alone", "method"}, {"method"})
    assert found[0]["student_alone", "", 0].folder == found["all"]["student_alone", "", 0].folder
    assert found[0]["method", "", 0].metric == "dice_with_teacher"


def test_without_labels_the_best_model_must_be_taken_by_agreement(
    make_study: Callable[..., Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    arms = {"teacher": ARMS["teacher"], "method": ARMS["method"]}
    study = make_study(row=Row("a", regime={"labels": 0, "unlabeled": True}, arms=arms, seeds=(0,)))
    with pytest.raises(RuntimeError, match="not trained: method, seed 0"):
        train_all(study, arms)
    assert re.search("must be taken by dice_with_teacher, .* got dice;", capsys.readouterr().out)


def test_keys_see_the_images_without_labels_only_where_they_are_used(tmp_path: Path) -> None:
    names = ("training", "validation", "unlabeled")
    hashes = []
    for content in (WHOLE, regime_list(WHOLE, "all", False), supervised_list(WHOLE, 4)):
        (tmp_path / "x.json").write_text(json.dumps(content))
        hashes.append(data_hash(tmp_path / "x.json", names))
    assert hashes[0] != hashes[1] == hashes[2]


def test_trainings_of_one_teacher_share_its_soft_labels(make_study: Callable[..., Study], tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "soft", {**TRAIN, "soft_label_dir": "somewhere"})
    arms = {"teacher": ARMS["teacher"], "method": replace(ARMS["method"], seeds=1)}
    found = train_all(make_study(source), arms)

    options = json.loads((found["method", "", 0].folder / "model.pt").read_text())
    teacher = found["teacher", "", 0].folder
    assert (source / options["soft_label_dir"]).resolve() == teacher.resolve() / "soft_labels"
    assert "soft_label_dir" not in json.loads((teacher / "model.pt").read_text())
