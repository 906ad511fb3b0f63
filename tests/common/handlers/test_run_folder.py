# SPDX-License-Identifier: Apache-2.0
"""A folder has one living owner, can be written to, and keeps what an earlier run left."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

import toys
from medkd.handlers import run_folder
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.handlers.run_folder import FolderInUseError, RunFolder, check_writable
from medkd.weights import load_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(folder: Path, epochs: int = 2, resume: Any = False, extra: Any = (), seed: int = 1) -> Any:
    network = toys.student(seed)
    saver = CheckpointHandler(folder, {"network": network}, resume=resume)
    engine = toys.make_trainer(network, [*extra, saver], epochs=epochs)
    engine.run()
    return engine


# ---- one living owner ----------------------------------------------------------------------------------------------


def live_in(folder: Path, workers: int = 0) -> None:
    """Be a run that has begun and does not end."""
    wait = toys.on(Events.EPOCH_STARTED(once=2), lambda _: time.sleep(60))
    network = toys.student()
    toys.make_trainer(network, [wait, CheckpointHandler(folder, {"network": network})], workers=workers).run()


@pytest.fixture
def living(tmp_path: Path) -> Any:
    process = toys.start(live_in, tmp_path)
    while not (tmp_path / "checkpoints/epoch_00001.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_with_the_owner_before_it_moves_anything(tmp_path: Path, living: Any) -> None:
    before = contents(tmp_path)
    message = rf"`ckpt_dir` must be .*, got {tmp_path}, which belongs to a run that is alive \(process {living.pid} on"
    for resume in (False, True, "changed"):
        with pytest.raises(FolderInUseError, match=message):
            run(tmp_path, resume=resume)
    assert contents(tmp_path) == before


def test_a_folder_is_free_as_soon_as_its_owner_is_killed(tmp_path: Path, living: Any) -> None:
    living.kill()
    living.join()
    run(tmp_path, epochs=1)
    assert names(tmp_path) == ["before_1", "checkpoints", "model.json", "model.pt"]


def test_workers_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    worker = os.fork()
    if worker == 0:
        time.sleep(30)
        os._exit(0)
    try:
        folder.close()
        RunFolder(tmp_path).open()
        code = f"from medkd.handlers.run_folder import RunFolder\nRunFolder({str(tmp_path)!r}).open()"
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} on" in refused.stderr
        run_folder._unlock(tmp_path / ".owner")
        subprocess.run([sys.executable, "-c", code], check=True)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_run_that_ends_or_breaks_off_leaves_no_lock(tmp_path: Path) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    run(tmp_path, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, extra=[toys.on(Events.EPOCH_STARTED(once=2), stop)])
    assert ".owner" not in names(tmp_path)


def test_a_run_whose_end_nobody_told_gives_way_to_a_later_one_of_its_thread_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path).open()
    found: list[BaseException] = []

    def other() -> None:
        try:
            RunFolder(tmp_path).open()
        except FolderInUseError as error:
            found.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(found) == 1
    later = RunFolder(tmp_path)
    later.open()
    later.close()
    assert names(tmp_path) == []


def test_without_locks_the_life_of_the_named_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "fcntl", None)                 # as on Windows
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = json.loads(run_folder._owner()) | {"pid": process.pid}
    (tmp_path / ".owner").write_text(json.dumps(owner))
    try:
        with pytest.raises(FolderInUseError, match=rf"process {process.pid} on .*; wait for its end, or give another"):
            run(tmp_path)
    finally:
        process.kill()
        process.wait()
    run(tmp_path, epochs=1)
    assert ".owner" not in names(tmp_path)
    (tmp_path / ".owner").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))
    with pytest.raises(FolderInUseError, match=rf"elsewhere, since yesterday\).* delete {tmp_path}/.owner"):
        run(tmp_path)


# ---- what an earlier run left --------------------------------------------------------------------------------------


def test_the_student_of_an_earlier_run_is_kept_and_no_later_start_deletes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    students = []
    with caplog.at_level(logging.INFO, "medkd"):
        for seed in range(3):
            run(tmp_path, epochs=1, seed=seed)
            students.append((contents(tmp_path)["model.pt"], contents(tmp_path)["model.json"]))
    for number in (1, 2):
        aside = tmp_path / f"before_{number}"
        assert names(aside) == ["checkpoints", "model.json", "model.pt"]
        assert ((aside / "model.pt").read_bytes(), (aside / "model.json").read_bytes()) == students[number - 1]
        assert f"The student of an earlier run is kept as {aside / 'model.pt'}." in caplog.text
    assert names(tmp_path) == ["before_1", "before_2", "checkpoints", "model.json", "model.pt"]


def test_a_run_that_dies_before_its_first_student_leaves_the_earlier_one_in_place(tmp_path: Path) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    run(tmp_path, epochs=1)
    student = contents(tmp_path)["model.pt"], contents(tmp_path)["model.json"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, extra=[toys.on(Events.ITERATION_COMPLETED, stop)])
    assert (contents(tmp_path)["model.pt"], contents(tmp_path)["model.json"]) == student
    assert names(tmp_path / "before_1") == ["checkpoints"]


def test_other_files_of_the_folder_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.pt").touch()
    torch.save(toys.student(5).state_dict(), tmp_path / "model.pt")   # as a bundle has it
    committed = load_tensors(tmp_path / "model.pt")
    run(tmp_path, epochs=1)
    assert names(tmp_path) == ["before_1", "checkpoints", "model.json", "model.pt", "teacher"]
    assert names(tmp_path / "teacher") == ["model.pt"]
    assert toys.same(load_tensors(tmp_path / "before_1/model.pt"), committed)


def test_a_resumed_run_replaces_its_own_student(tmp_path: Path) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    whole = toys.Run(tmp_path, epochs=4, extra=[toys.on(Events.EPOCH_STARTED(once=3), stop)])
    with pytest.raises(KeyboardInterrupt):
        whole.trainer.run()
    toys.Run(tmp_path, epochs=4, resume=True).trainer.run()
    assert names(tmp_path) == ["checkpoints", "model.json", "model.pt"]


def test_a_student_that_a_link_leads_to_is_copied(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    torch.save(toys.student(5).state_dict(), tmp_path / "store/a.pt")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.pt").symlink_to(tmp_path / "store/a.pt")
    run(tmp_path / "weights", epochs=1)
    kept = tmp_path / "weights/before_1/model.pt"
    assert not kept.is_symlink()
    assert kept.read_bytes() == (tmp_path / "store/a.pt").read_bytes()


@pytest.mark.parametrize(("is_lower_better", "earlier"), [(False, 0.9), (True, 0.1)])
def test_the_end_says_where_a_better_earlier_student_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_lower_better: bool, earlier: float
) -> None:
    def go(constant: float) -> str:
        caplog.clear()
        whole = toys.Run(tmp_path, epochs=1)
        whole.evaluator.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: setattr(engine.state, "best_metric", constant)
        )
        if is_lower_better:
            whole.evaluator.metric_cmp_fn = lambda value, best: value < best
        whole.trainer.run()
        return caplog.text

    worse = 1.0 - earlier
    assert "an earlier student had" not in go(earlier)
    for _ in range(2):
        assert f"before_1/model.pt: an earlier student had val_mean_dice {earlier:.4f}, this run's has {worse:.4f}" in (
            go(worse)
        )
    assert "an earlier student had" not in go(earlier)


# ---- a folder that can be written to -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "checkpoints", "deep/weights"])
def test_a_file_in_the_place_of_the_folder_is_found_at_the_start(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "weights"
    file = folder if place == "." else folder / "checkpoints" if place == "checkpoints" else tmp_path / "deep"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    steps: list[int] = []
    count = toys.on(Events.ITERATION_STARTED, lambda engine: steps.append(1))
    target = tmp_path / place if place.startswith("deep") else folder
    with pytest.raises(OSError, match=rf"`ckpt_dir` must be a folder that can be written to, got {tmp_path}/"):
        run(target, extra=[count])
    assert steps == []
    assert list(tmp_path.rglob(".owner")) == []


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
def test_a_folder_in_the_place_of_a_file_is_found_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=rf"`ckpt_dir` must have room for the file {tmp_path}/{name}, got a folder"):
        run(tmp_path)


def train_without_rights(folder: Path, said: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        run(folder)
    except OSError as error:
        os.seteuid(user)
        said.write_text(str(error))


def train_without_room(folder: Path, said: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        run(folder)
    except OSError as error:
        said.write_text(str(error))


@pytest.mark.parametrize(("train", "reason"), [
    (train_without_rights, "Permission denied"), (train_without_room, "File too large"),
])
def test_a_folder_without_rights_or_room_is_found_at_the_start(train: Any, reason: str, tmp_path: Path) -> None:
    toys.finish(toys.start(train, tmp_path / "weights", tmp_path / "said.txt"))
    assert (tmp_path / "said.txt").read_text().startswith(
        f"`ckpt_dir` must be a folder that can be written to, got {tmp_path / 'weights'}: {reason}; free some space"
    )


def test_the_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b", "`output_dir`")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a/b"]
