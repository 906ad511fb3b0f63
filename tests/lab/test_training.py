# SPDX-License-Identifier: Apache-2.0
"""What is looked at before a training, and how its calibrated option is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.execute import Job
from lab.recipe import Arm, Recipe, Row
from lab.training import Run, Study, check_test_list, evaluate, find_datalist, train


@pytest.mark.parametrize(
    ("test", "message"),
    [([], "must have cases, got none"), (["b", "c"], "of its own, got 1 of another list: b"),
     (["u"], "of its own, got 1 of another list: u")],
)
def test_test_cases_are_looked_at_before_anything_is_trained(tmp_path: Path, test: list[str], message: str) -> None:
    lists = {"training": ["a"], "validation": ["b"], "unlabeled": ["u"], "test": test}
    content = {name: [{"image": image} for image in images] for name, images in lists.items()}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_test_list(tmp_path / "datalist.json")


def test_lists_that_are_made_lie_apart_by_their_data_and_options(tmp_path: Path) -> None:
    data, lists = tmp_path / "data", tmp_path / "lists"
    for kind in ("images", "labels", "labels_of_others"):
        (data / kind).mkdir(parents=True)
        for name in "ab":
            (data / kind / f"{name}.nii.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"DATA must have a datalist.json, or images/, labels/ and splits.json"):
        find_datalist(data, lists, {})
    (data / "splits.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))

    made = [find_datalist(data, lists, options) for options in ({}, {}, {"labels": "labels_of_others"})]

    assert made[0] == made[1] != made[2]
    assert "labels_of_others/a.nii.gz" in made[2].read_text()
    (data / "datalist.json").write_text("{}")
    assert find_datalist(data, lists, {}) == data / "datalist.json"


def test_a_folder_per_class_becomes_a_list_of_classes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("benign", "severe"):
        (data / "images" / name).mkdir(parents=True)
        for number in range(2):
            (data / "images" / name / f"{number}.png").touch()
    splits = {"train": ["benign/0.png", "severe/0.png"], "val": ["benign/1.png"], "test": ["severe/1.png"]}
    (data / "splits.json").write_text(json.dumps(splits))
    made = find_datalist(data, tmp_path / "lists", {"class_folders": True, "label_names": "severe,benign"})
    content = json.loads(made.read_text())
    assert content["labels"] == {"0": "severe", "1": "benign"}
    assert [item["label"] for item in content["training"]] == ["benign", "severe"]


@pytest.mark.parametrize(("higher", "chosen"), [(True, 0.4), (False, 0.3)])
def test_the_best_value_on_validation_is_chosen_and_evaluated_with(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, higher: bool, chosen: float
) -> None:
    study = make_study(row=Row("a", calibrate={"value": [0.3, 0.4, 0.5]}), higher_is_better=higher)
    done: list[Job] = []

    def do(job: Job, *_: object, **__: object) -> bool:
        done.append(job)
        if "calibrate" in job.commands[0]:
            job.writes[0].write_text(json.dumps({"value": [1.0, 2.0, 2.0]}))
            return True
        return real(job)

    real = study.executor.do
    monkeypatch.setattr(study.executor, "do", do)
    found = train(Run("teacher", "", 0, ("train", "teacher"), {"seed": 0}), study, {})

    assert found.calibrated == {"value": chosen}
    assert found.validation == (2.0 if higher else 1.0)
    request = json.loads((done[1].folder / "calibrate_request.json").read_text())
    assert request["weights"].endswith("model.pt")
    assert (request["metric"], request["values"]) == ("dice", {"value": [0.3, 0.4, 0.5]})


def test_an_evaluation_is_done_once_per_training_and_option(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(row=Row("a"))
    trained = train(Run("teacher", "", 0, ("train", "teacher"), {"seed": 0}), study, {})
    jobs: list[Job] = []
    monkeypatch.setattr(study.executor, "do", jobs.append)

    for options in ({}, {}, {"value": 0.1}):
        evaluate(replace(trained, calibrated=options), study)
        assert (jobs[-1].writes[0].parent.parent, jobs[-1].writes[0].name) == (trained.folder, "scores")
        assert json.loads(jobs[-1].commands[0][-1]).get("value") == options.get("value")
    assert jobs[0].key == jobs[1].key != jobs[2].key


@pytest.mark.parametrize("here", ["bfloat16", "float32"])
def test_bfloat16_is_asked_for_only_where_the_processor_multiplies_it(
    study: Study, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    monkeypatch.setattr("lab.training.cpu_dtype", lambda: here)
    options = [{"seed": 0}, {"seed": 0, "cpu_dtype": "float32"}, {"seed": 0, "cpu_dtype": "bfloat16"}]
    made = [study.bundle_run("training", Run("combined", "", 0, ["train"], one)) for one in options]
    assert [one.options.get("cpu_dtype") for one in made] == [None, "float32", here]


def test_a_run_has_a_label_its_configs_and_paths_that_the_command_can_use(study: Study) -> None:
    run = Run("logits_kd", "uniform", 2, ("train", "2d", "logits"), {"seed": 2})
    assert run.label == "logits_kd uniform, seed 2"
    made = study.bundle_run("evaluating", run, "evaluate", ckpt_dir=study.folder, value=3)
    assert made.configs == ["train", "2d", "logits", "evaluate"]
    assert made.options == {"seed": 2, "ckpt_dir": "../runs", "value": 3}
    assert Recipe("dice", True, None, (), {"teacher": Arm()}).rows_of("x")[0].arms == {"teacher": Arm()}
