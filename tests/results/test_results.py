# SPDX-License-Identifier: Apache-2.0
"""The results protocol: choice by validation, keys, the gap's interval, pages; and one small row from end to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pages
import pytest
import trainings
from commands import Commands
from figure import draw
from keys import data_hash, needed_part, run_key
from recipe import Arm, Recipe, Row, read_recipe
from record import all_rows, make_row, merge_row, shipped_of, write_results
from schedule import RowFailedError, count_runs, train_all, wanted_runs
from summary import Scored, gap_recovered, read_scores
from trainings import Place, Run, Trained, check_test_list, copy_source, needs_of

from medkd.phantoms.ct import write_ct_phantoms

BUNDLE = "boundary_relation_ct_organs"
ARMS = {
    "teacher": Arm(("teacher",), seeds=1),
    "student_alone": Arm(("baseline",)),
    "logits_kd": Arm(candidates={"uniform": Arm(("logits",)), "foreground": Arm(("logits",), {"weighting": "f"})}),
    "method": Arm(("method",)),
    "combined": Arm(),
}
RECIPE = Recipe("dice", True, "a", ("method", "combined"), ARMS, {}, {}, {})
TRAIN = {
    "epochs": 9, "value": 0.5, "weighting": "u", "unused": 1, "distill_loss": {"_target_": "medkd.losses.some.Loss"},
    "distill_weights": None, "teacher_path": "t", "ckpt_dir": "c", "output_dir": "o", "datalist": "d", "seed": 0,
    "trainer": {"epochs": "@epochs", "weighting": "@weighting", "loss": "@distill_loss", "weights": "@distill_weights",
                "seed": "@seed", "value": "@value"},
    "initialize": [], "training": ["$@trainer.run()"],
}
# stands for a training: reads its options, leaves weights, a description and a count of how often it ran
FAKE = """
import json, sys, time
from pathlib import Path
options = json.loads(Path(sys.argv[1]).read_text())
folder = Path(options["ckpt_dir"])
with (folder / "ran").open("a") as file:
    file.write(" ".join(sys.argv[2:]) + ";")
if options.get("fail"):
    sys.exit("the reason")
if options.get("wait"):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "epoch_00001.pt").touch()
    time.sleep(0 if "--resume" in sys.argv else 60)
value = options.get("value", 0.5) + options["seed"] / 100
(folder / "model.pt").write_text(json.dumps(options))
description = {"epoch": 3, "validation": {"dice": value}}
(folder / "model.json").write_text(json.dumps(options.get("description", description)))
print(options.get("say", ""))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A bundle whose trainings take no time."""
    source = tmp_path / "source"
    for name, content in {
        "train": TRAIN, "teacher": {"distill_weights": {"x": 0}, "epochs": 20},
        "baseline": {"distill_weights": {"x": 0}}, "logits": {"distill_weights": {"x": 1}},
        "method": {"distill_weights": {"x": 2}},
    }.items():
        (source / "configs").mkdir(parents=True, exist_ok=True)
        (source / "configs" / f"{name}.json").write_text(json.dumps(content))
    loss = source / "package" / "medkd" / "losses" / "some.py"
    loss.parent.mkdir(parents=True)
    loss.write_text("from medkd.ops import other\nx = 1\n")
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [{"image": "fake.py"}], "validation": []}))

    def command(run: Run, place: Place, run_id: str, file: Path, options: dict[str, Any], *more: str) -> list[str]:
        file.write_text(json.dumps(options))
        return [sys.executable, str(tmp_path / "fake.py"), place.path(file)]

    monkeypatch.setattr(trainings, "_command", command)
    return Place(source, tmp_path / "row", tmp_path / "datalist.json", ("evaluate",), 0, Commands())


def trained(value: float, seed: int = 0, arm: str = "method", **options: Any) -> Trained:
    return Trained(Run(arm, "", seed, (arm,), options), Path("f"), "k", "dice", value, 1, 2.0, f"sha{seed}", True)


def scored(validation: float, *cases: float, seed: int = 0, **options: Any) -> Scored:
    values = {f"case{number}": value for number, value in enumerate(cases)}
    return Scored(trained(validation, seed, **options), {"dice": values, "hd95": {"case0": 7.0}})


def row_of(**changed: Any) -> dict[str, Any]:
    scores = {
        "teacher": {"": [scored(0.9, 0.8, 0.9, 0.8, 0.9)]},
        "student_alone": {"": [scored(0.5, 0.4, 0.5, 0.4, 0.5), scored(0.5, 0.5, 0.6, 0.5, 0.6, seed=1)]},
        "logits_kd": {"uniform": [scored(0.4, 0.9)], "foreground": [scored(0.6, 0.3), scored(0.1, 0.2, seed=1)]},
        "method": {"": [scored(0.7, 0.9, 0.9, 0.9, 0.9)]},
        "combined": {"": [scored(0.8, 0.6, 0.7, 0.6, 0.7, lr=1), scored(0.7, 0.6, 0.7, 0.6, 0.7, seed=1, lr=1)]},
    }
    facts = {
        "splits": {"training": 1, "validation": 1, "test": 4}, "parameters": {"teacher": 2000, "student": 10},
        "seconds_per_case": {"teacher": 0.5, "student": 0.1}, "hardware": {}, "versions": {}, "command": "make",
    }
    return make_row(RECIPE, Row("a", seeds=(0, 1), options={"size": 3}), scores, facts) | changed


# --- the recovered gap ---


def test_the_gap_of_equal_cases_and_seeds_has_no_spread() -> None:
    gap = gap_recovered([0.8] * 4, [[0.4] * 4] * 2, [[0.6] * 4] * 2)

    assert gap == {"value": 0.5, "low": 0.5, "high": 0.5, "left_out": 0.0}


def test_the_interval_of_two_seeds_is_that_of_their_four_pairs() -> None:
    # seeds of the distilled student give 0.25 and 0.75 of the gap; a draw is 0.25, 0.5 or 0.75 with 1/4, 1/2, 1/4
    gap = gap_recovered([0.8] * 4, [[0.4] * 4] * 2, [[0.5] * 4, [0.7] * 4])

    assert (gap["value"], gap["low"], gap["high"]) == (0.5, 0.25, 0.75)


def test_the_gap_is_the_same_every_time_and_for_a_metric_that_falls() -> None:
    teacher, alone, distilled = [0.8, 0.9, 0.7, 0.6], [[0.4, 0.5, 0.6, 0.3]], [[0.5, 0.6, 0.6, 0.4]]
    flipped = [[[1 - value for value in run] for run in runs] for runs in ([teacher], alone, distilled)]

    first = gap_recovered(teacher, alone, distilled)
    second = gap_recovered(flipped[0][0], flipped[1], flipped[2], higher_is_better=False)

    assert first == gap_recovered(teacher, alone, distilled)
    assert (first["value"], first["low"], first["high"]) == (second["value"], second["low"], second["high"])
    assert first["low"] < first["value"] < first["high"]


def test_there_is_no_gap_when_the_teacher_is_not_better_by_more_than_the_sd() -> None:
    gap = gap_recovered([0.5] * 4, [[0.3] * 4, [0.6] * 4], [[0.9] * 4])

    assert gap["value"] is gap["low"] is None
    assert "0.0500 against 0.2121" in gap["reason"]


def test_three_cases_have_no_interval() -> None:
    gap = gap_recovered([0.8] * 3, [[0.4] * 3], [[0.6] * 3])

    assert (gap["value"], gap["low"]) == (0.5, None)
    assert "too few" in gap["reason"]


def test_draws_without_a_gap_are_left_out_and_counted() -> None:
    gap = gap_recovered([0.9, 0.1, 0.9, 0.1], [[0.4, 0.5, 0.4, 0.5]], [[0.5, 0.5, 0.5, 0.5]])

    assert gap["value"] == pytest.approx(1.0)
    assert gap["low"] is None
    assert "30 % of the draws the teacher is not better" in gap["reason"]
    rarely = gap_recovered([0.9, 0.38, 0.9, 0.9], [[0.4, 0.5, 0.4, 0.5]], [[0.5, 0.5, 0.5, 0.5]])
    assert 0 < rarely["left_out"] < 0.025
    assert rarely["low"] < rarely["value"] < rarely["high"]


# --- scores and rows ---


def test_scores_are_read_per_case_and_averaged_per_patient(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text(
        "filename,class0,mean\n/d/liver_1_7.nii.gz,1,0.2\n/d/liver_1_8.nii.gz,1,0.4\n/d/liver_2_1.nii.gz,nan,nan\n"
    )

    assert read_scores(tmp_path) == {"val_x": {"liver_1_7": 0.2, "liver_1_8": 0.4}}
    assert read_scores(tmp_path, r"liver_(\d+)")["val_x"] == {"1": pytest.approx(0.3)}


def test_parts_of_chosen_cases_count_as_cases(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text(
        "filename,class0,class1,mean\n/d/cube_a.nii.gz,0.1,0.3,0.2\n/d/cube_b.nii.gz,nan,0.7,0.7\n"
    )

    assert read_scores(tmp_path, test="_a$") == {"val_x": {"cube_a": 0.2}}
    assert read_scores(tmp_path, parts=True)["val_x"] == {"cube_a 1": 0.1, "cube_a 2": 0.3, "cube_b 2": 0.7}
    assert read_scores(tmp_path, test="_b$", parts=True) == {"val_x": {"cube_b 2": 0.7}}


def test_cases_of_one_name_in_different_folders_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "val_x_raw.csv").write_text("filename,mean\n/d/p1/ct.nii.gz,0.2\n/d/p2/ct.nii.gz,0.4\n")

    assert read_scores(tmp_path)["val_x"] == {"p1/ct": 0.2, "p2/ct": 0.4}
    assert read_scores(tmp_path, r"^p(\d)")["val_x"] == {"1": 0.2, "2": 0.4}


def test_a_row_has_the_keys_of_the_protocol_and_chooses_by_validation_alone() -> None:
    row = row_of()

    assert {
        "data", "splits", "metric", "higher_is_better", "seeds", "teacher", "student_alone", "logits_kd", "distilled",
        "gap_recovered", "parameters", "seconds_per_case", "hardware", "versions", "command", "method", "combined",
    } <= row.keys()
    assert row["student_alone"] | {"mean": 0.5, "sd": 0.0707, "runs": [0.45, 0.55]} == row["student_alone"]
    assert row["distilled"]["arm"] == "combined"           # the method is better on the test cases
    assert row["logits_kd"]["candidate"] == "foreground"
    assert set(row["logits_kd"]["candidates"]) == {"uniform", "foreground"}
    assert row["teacher"]["metrics"] == {"hd95": 7.0}
    assert row["options"] == {"size": 3}
    assert row["combined"]["options"] == {"lr": 1}


def test_what_is_shipped_is_the_run_that_is_best_on_validation() -> None:
    best, told = shipped_of([scored(0.5, 0.9), scored(0.6, 0.1, seed=1)], RECIPE)

    assert best.trained.run.seed == told["seed"] == 1
    assert told == {"seed": 1, "sha256": "sha1", "mean": 0.1, "per_case": {"case0": 0.1}}


def test_a_new_row_replaces_its_own_only_and_keeps_what_was_searched_last(tmp_path: Path) -> None:
    content = merge_row({}, "x", {"id": "b", "v": 1}, "a")
    assert (content["id"], content["rows"]) == ("b", [])    # until there is the default row
    content = merge_row(content, "x", {"id": "a", "v": 1}, "a")
    content = merge_row(content, "x", {"id": "a"}, "a", [{"name": "n", "validation": 1}])
    content = merge_row(content, "x", {"id": "a", "v": 2}, "a")
    content = merge_row(content, "x", {"id": "a"}, "a", [{"name": "m", "validation": 2}])

    assert [(row["id"], row["v"]) for row in all_rows(content)] == [("a", 2), ("b", 1)]
    assert [one["name"] for one in content["search"]] == ["m"]
    write_results(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content


# --- keys ---


def test_a_key_changes_with_what_decides_and_with_nothing_else(place: Place) -> None:
    config, source = dict(TRAIN), place.source

    def key(**changed: Any) -> str:
        return run_key(needed_part({**config, **changed}, ("training",)), source, "data")

    first = key()
    code = source / "package" / "medkd" / "losses" / "some.py"
    assert first == key(unused=2, ckpt_dir="elsewhere", teacher_path="elsewhere")
    assert len({first, key(seed=1), key(epochs=10), key(distill_weights={"x": 1})}) == 4
    assert run_key(needed_part(config, ("training",)), source, "other data") != first
    code.write_text('"""A docstring."""\nfrom medkd.ops import other\nx = 1   # a comment\n')
    assert key() == first
    alone = key(distill_weights={"x": 0})
    code.write_text("from medkd.ops import other\nx = 2\n")
    assert key() != first
    assert key(distill_weights={"x": 0}) == alone           # without distillation its loss does not matter
    (source / "package" / "medkd" / "ops").mkdir()
    second = key()
    (source / "package" / "medkd" / "ops" / "other.py").write_text("y = 1")
    assert key() != second


def test_a_key_follows_the_scripts_that_the_config_names_and_no_others(place: Place) -> None:
    scripts = place.source / "scripts"
    scripts.mkdir()
    for name, content in {"used": "from scripts import helper", "helper": "x = 1", "other": "x = 1"}.items():
        (scripts / f"{name}.py").write_text(content)
    part = {"transform": {"_target_": "scripts.used.Transformd"}}
    first = run_key(part, place.source)
    (scripts / "other.py").write_text("x = 2")
    assert run_key(part, place.source) == first
    (scripts / "helper.py").write_text("x = 2")
    assert run_key(part, place.source) != first


def test_the_hash_of_data_knows_names_and_sizes_but_no_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.nii").write_text("123")
        (tmp_path / name / "datalist.json").write_text(json.dumps({"training": [{"image": "image.nii"}]}))
    one, two = ((tmp_path / name / "datalist.json") for name in ("a", "b"))

    assert data_hash(one, ["training"]) == data_hash(two, ["training"])
    (tmp_path / "b" / "image.nii").write_text("1234")
    assert data_hash(one, ["training"]) != data_hash(two, ["training"])


def test_a_run_that_distils_needs_the_teacher_and_others_do_not(place: Place) -> None:
    runs = {run.arm: run for run in wanted_runs(Row("a"), ARMS, RECIPE, {})}

    assert {name for name, run in runs.items() if needs_of(run, place)} == {"logits_kd", "method", "combined"}


def test_the_copy_of_the_sources_is_made_once_per_content(tmp_path: Path) -> None:
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    (tmp_path / "bundle" / "configs" / "train.json").write_text("{}")
    (tmp_path / "medkd").mkdir()

    first = copy_source(tmp_path / "bundle", tmp_path / "medkd", tmp_path / "copies")
    assert copy_source(tmp_path / "bundle", tmp_path / "medkd", tmp_path / "copies") == first
    (tmp_path / "bundle" / "configs" / "train.json").write_text("{ }")
    assert copy_source(tmp_path / "bundle", tmp_path / "medkd", tmp_path / "copies") != first
    assert (first / "configs" / "train.json").read_text() == "{}"


# --- the pool ---


def test_the_better_candidate_gets_the_other_seeds_and_finished_runs_are_not_repeated(place: Place) -> None:
    candidates = {name: Arm(("logits",), {"value": value}) for name, value in (("u", 0.55), ("f", 0.6))}
    better = {**ARMS, "logits_kd": Arm(candidates=candidates), "combined": Arm((), {"value": 0.7})}
    row = Row("a", epochs={"teacher": 7, "student": 5})

    finished = train_all(row, better, RECIPE, place, 2)
    again = train_all(row, better, RECIPE, place, 2)

    assert len(finished) == count_runs(row, better, RECIPE) == 1 + 3 + 4 + 1 + 3
    assert {name for name in finished if name[0] == "logits_kd"} == {
        ("logits_kd", "u", 0), ("logits_kd", "f", 0), ("logits_kd", "f", 1), ("logits_kd", "f", 2)
    }
    assert [sum(name[0] == arm for name in finished) for arm in ("method", "combined")] == [1, 3]
    assert all(one.new for one in finished.values())
    assert not any(one.new for one in again.values())
    assert {(one.folder / "ran").read_text() for one in again.values()} == {";"}
    options = json.loads((finished["combined", "", 2].folder / "options.json").read_text())
    teacher = finished["teacher", "", 0].folder
    assert (options["epochs"], options["seed"]) == (5, 2)
    assert (place.source / options["teacher_path"]).resolve() == teacher.resolve() / "model.pt"
    assert json.loads((teacher / "options.json").read_text())["epochs"] == 7


def test_a_failed_run_shows_its_log_and_leaves_the_others(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {**ARMS, "method": Arm(("method",), {"fail": True}, seeds=1)}

    with pytest.raises(RowFailedError, match="not trained: method, seed 0"):
        train_all(Row("a"), arms, RECIPE, place, 2)

    said = capsys.readouterr().out
    assert "method, seed 0: FAILED, exit code 1" in said
    assert "the reason" in said
    assert len(list(place.folder.glob("*/model.pt"))) == 1 + 3 + 4 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"description": {"epoch": 3}}, "a model that could not be saved or was not validated"),
        ({"say": "The student was NOT saved to x: disk full."}, "a model that could not be saved"),
        ({"description": {"epoch": 3, "validation": {"voi": 1.0}}}, "must be taken by dice, .* got voi"),
    ],
)
def test_a_training_without_the_model_that_is_asked_for_has_failed(
    place: Place, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    arms = {"teacher": Arm(("teacher",), options, seeds=1)}
    for _ in range(2):
        with pytest.raises(RowFailedError, match="not trained: teacher, seed 0"):
            train_all(Row("a"), arms, RECIPE, place, 1)
        assert re.search(f"teacher, seed 0: FAILED, .*{message}", capsys.readouterr().out)


def test_an_interruption_of_a_single_command_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"]

    def interrupt(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Commands().run(words, tmp_path, tmp_path / "log", {})

    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("test", "message"), [([], "must have cases, got none"), (["b", "c"], "of its own, got 1 of another list: b")]
)
def test_test_cases_are_looked_at_before_anything_is_trained(tmp_path: Path, test: list[str], message: str) -> None:
    lists = {"training": ["a"], "validation": ["b"], "test": test}
    content = {name: [{"image": image} for image in images] for name, images in lists.items()}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_test_list(tmp_path / "datalist.json")


def test_an_interrupted_run_goes_on_from_its_checkpoint(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        if any(place.folder.glob("*/checkpoints/*.pt")):
            raise KeyboardInterrupt
        time.sleep(0.05)
        return set(), set()

    arms = {"teacher": Arm(("teacher",), {"wait": True}, seeds=1)}
    monkeypatch.setattr("schedule.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_all(Row("a"), arms, RECIPE, place, 1)
    monkeypatch.setattr("schedule.wait", wait)
    fresh = Place(place.source, place.folder, place.datalist, place.evaluate, 0, Commands())

    finished = train_all(Row("a"), arms, RECIPE, fresh, 1)

    folder = finished["teacher", "", 0].folder
    assert (folder / "ran").read_text() == ";--resume true;"
    assert not (folder / "checkpoints").exists()


def test_a_folder_that_another_process_works_in_is_waited_for(tmp_path: Path) -> None:
    waiting = threading.Event()

    def work() -> None:
        with Commands().locked(tmp_path / "run", waiting.set):
            (tmp_path / "second").touch()

    second = threading.Thread(target=work)
    with Commands().locked(tmp_path / "run"):
        second.start()
        assert waiting.wait(30)
        assert not (tmp_path / "second").exists()
    second.join(30)

    assert (tmp_path / "second").exists()


# --- recipes and pages ---


def test_the_recipes_of_the_repository_are_sound(repository: Path) -> None:
    for bundle in sorted((repository / "bundles").glob("*/")):
        recipe = read_recipe(bundle)
        assert next(iter(recipe.arms_of(recipe.rows_of("unknown")[0]))) == "teacher"
        for row in recipe.rows.values():
            assert count_runs(row, recipe.arms_of(row), recipe) > 5


def test_rows_may_share_their_data() -> None:
    rows = {"a": Row("a"), "easy": Row("easy", data="a", test="easy"), "b": Row("b")}
    recipe = Recipe("dice", True, "a", (), ARMS, {}, {}, rows)
    assert [row.id for row in recipe.rows_of("a")] == ["a", "easy"]
    assert [row.data for row in recipe.rows_of("c")] == ["c"]


def test_helpers_are_trained_only_when_something_starts_from_them() -> None:
    recipe = Recipe("dice", True, "a", (), ARMS, {}, {"head": Arm(("head",)), "idle": Arm(("idle",))}, {})
    arms = recipe.arms_of(Row("a", arms={"method": Arm(weights_of={"head_path": "head"})}))
    assert arms.keys() == {*ARMS, "head", "idle"}
    assert recipe.drop_idle_helpers(arms).keys() == {*ARMS, "head"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metrik": 1}, "metrik"),
        ({"rows": {"a": {"epoch": 1}}}, "row a must have keys of .*got \\['epoch'\\]"),
        ({"arms": {"teacher": {"overrides": ["nowhere"]}}, "distilled_from": []}, "no configs/nowhere.json"),
        ({"distilled_from": ["magic"]}, "must name arms, got 'magic'"),
        ({"arms": {"method": {}}, "distilled_from": ["method"]}, "must have an arm, got 'teacher'"),
        ({"helpers": {"head": {"weights_of": {"teacher_path": "techer"}}}}, "must name arms or helpers, got 'techer'"),
        ({"default": "typo"}, "must name a row, got 'typo'"),
        ({"rows": {"a": {"inference": "nope.json"}}}, "no configs/nope.json"),
        ({"rows": {"a": {"patient": "liver"}}}, "must have one group, got 'liver'"),
        ({"rows": {"a": {"search": {"x": {"seeds": 2}}}}}, "must have no `candidates` and no `seeds`"),
    ],
)
def test_a_wrong_recipe_is_refused(repository: Path, tmp_path: Path, content: dict[str, Any], message: str) -> None:
    shutil.copy(repository / "results" / "recipes" / "default.json", tmp_path)
    (tmp_path / f"{BUNDLE}.json").write_text(json.dumps(content))

    with pytest.raises(ValueError, match=message):
        read_recipe(repository / "bundles" / BUNDLE, tmp_path)


def test_pages_are_filled_between_their_markers_and_the_same_twice(tmp_path: Path) -> None:
    content = merge_row({}, "x", row_of(), "a")
    content["search"] = [{"name": "no_ramp", "validation": 0.4567}]
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    other = "| <!-- results:y -->y<!-- /results --> |\n"
    readme.write_text(f"{other}| before <!-- results:x -->old<!-- /results --> | after |")
    page.write_text("no markers")

    assert pages.fill(content, readme, page) == [page]
    first = readme.read_text()
    page.write_text("a\n<!-- results -->\n<!-- /results -->\nb")
    assert pages.fill(content, readme, page) == []
    second = page.read_text()
    assert pages.fill(content, readme, page) == []

    assert first == readme.read_text() == (
        f"{other}| before <!-- results:x -->"
        "a: 0.500 ± 0.071 / 0.250 ± 0.071 / 0.650 ± 0.000 / 0.850<!-- /results --> | after |"
    )
    assert second == page.read_text()
    tried = second[second.index("| first seed only | validation dice |") :]
    assert [line.split(" | ")[0] for line in tried.splitlines()[2:8]] == [
        "| method and plain KD", "| method alone", "| plain KD (foreground)", "| student alone", "| no ramp",
        "| plain KD (uniform)",
    ]
    assert "| no ramp | 0.457 |" in tried
    assert second.startswith("a\n<!-- results -->\n| a | validation dice | test dice |")
    assert "| method and plain KD (= distilled) |" in second


def test_the_figure_is_small_and_drawn_for_any_number_of_rows(tmp_path: Path) -> None:
    content: dict[str, Any] = merge_row({}, "x", row_of(), "a")
    for name in "bcd":
        content = merge_row(content, "x", row_of(id=name, data=f"ct_some_long_name_{name}"), "a")

    draw({"rows": [{"id": "only searched"}]}, tmp_path / "none.png")
    draw(content, tmp_path / "x.png")

    assert not (tmp_path / "none.png").exists()
    assert 5_000 < (tmp_path / "x.png").stat().st_size < 200_000


# --- all of it, small ---


def start(repository: Path, root: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(repository / "results" / "run.py"), BUNDLE, str(root / "toy"), "--root", str(root)]
    return subprocess.Popen(
        [*words, "--recipes", str(root / "recipes"), "--workers", "2", *more], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.timeout(900)   # 40 seconds on two idle cores
def test_a_small_row_from_end_to_end_interrupted_and_continued(repository: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundles" / BUNDLE
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(repository / "bundles" / BUNDLE / name, bundle / name)
    (bundle / "models").mkdir()
    shutil.copy(repository / "README.md", tmp_path)
    shutil.copytree(repository / "results" / "recipes", tmp_path / "recipes")
    write_ct_phantoms(tmp_path / "toy", training=1, validation=1, test=1, shape=(40, 36, 32), spacing=(6.0, 6.0, 7.0))
    row = {
        "options": {
            "out_channels": 7, "patch_size": [32, 32, 32], "spacing": [8.0, 8.0, 8.0],
            "train#trainer#epoch_length": 1,
            "teacher_check": {"metric": "val_mean_dice", "mode": "warn"},
        },
        "epochs": {"teacher": 1, "student": 1}, "val_interval": {"teacher": 1, "student": 1}, "seeds": [0, 1],
        "ship": True, "calibrate": {"validate#inferer#overlap": [0.0, 0.25]},
    }
    arms = {"teacher": {"overrides": ["teacher"], "seeds": 1}, "student_alone": {"overrides": ["baseline"], "seeds": 1}}
    recipe = {"default": "toy", "arms": {**arms, "combined": {}}, "distilled_from": ["combined"], "rows": {"toy": row}}
    (tmp_path / "recipes" / f"{BUNDLE}.json").write_text(json.dumps(recipe))

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
    files = (tmp_path / "runs" / "results" / BUNDLE / "toy").glob("*/calibration_????????????.json")
    tried = {file.parent.name[-12:]: json.loads(file.read_text())["validate#inferer#overlap"] for file in files}
    for arm in (content[name] for name in ("teacher", "student_alone", "combined")):
        for key, chosen, value in zip(arm["keys"], arm["calibrated"], arm["validation"]["runs"], strict=True):
            assert value == round(max(tried[key]), 4)
            assert chosen == {"validate#inferer#overlap": [0.0, 0.25][tried[key].index(max(tried[key]))]}
    assert content["parameters"]["teacher"] > 20 * content["parameters"]["student"]
    assert content["seconds_per_case"]["student"] > 0
    assert set(content["teacher"]["per_case"][0]) == {"case_002"}
    assert len(content["teacher"]["metrics"]) >= 2
    assert str(tmp_path) not in json.dumps(content)
    assert (tmp_path / "results" / f"{BUNDLE}.png").exists()
    assert "toy: 0." in (tmp_path / "README.md").read_text()
    page = (bundle / "docs" / "README.md").read_text()
    assert "| toy |" in page
    assert "Chosen on validation, `validate#inferer#overlap`: teacher 0." in page
    assert len(content["shipped"]["sha256"]) == 64
    assert (bundle / "models" / "model.pt").stat().st_size > 10_000
