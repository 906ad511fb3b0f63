# SPDX-License-Identifier: Apache-2.0
"""A whole file is there whatever happens: a failed write, a full disk, a killed process."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

import toys
from medkd.handlers.atomic import save_atomically
from medkd.handlers.checkpoint import CheckpointHandler
from medkd.weights import load_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def run(folder: Path, epochs: int) -> None:
    """Train with a checkpoint handler that has no validation."""
    network = toys.student()
    toys.make_trainer(network, [CheckpointHandler(folder, {"network": network})], epochs=epochs).run()


def test_a_file_is_whole_on_the_disk_before_it_takes_its_name_and_its_folder_is_after(
    tmp_path: Path, disk: list[tuple[str, int, int]]
) -> None:
    run(tmp_path, epochs=1)
    for name in ("checkpoints/epoch_00001.pt", "model.pt", "model.json"):
        file, folder = (tmp_path / name).stat(), (tmp_path / name).parent.stat()
        synced = disk.index(("synced", file.st_ino, file.st_size))
        assert disk[synced + 1] == ("renamed", file.st_ino, file.st_size)
        assert disk[synced + 2] == ("folder synced", folder.st_ino, 0)


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_atomically({"a": torch.ones(2)}, path)

    class Unwritable:
        def __reduce__(self) -> tuple[Any, ...]:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_atomically({"a": Unwritable()}, path)
    assert toys.same(load_tensors(path), {"a": torch.ones(2)})
    assert names(tmp_path) == ["model.pt"]


def test_a_full_disk_keeps_the_last_whole_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    full, free, log = tmp_path / "full", tmp_path / "free", tmp_path / "log.txt"
    starved, whole = toys.start(toys.train_on_a_full_disk, full, log), toys.start(toys.train, free)
    starved.join()
    assert starved.exitcode == 1                                   # in the end, it has failed
    toys.finish(whole)
    assert names(full / "checkpoints") == ["epoch_00001.pt"]
    assert load_tensors(full / "checkpoints" / "epoch_00001.pt")["epoch"] == 1
    assert names(full) == ["checkpoints", "model.json", "model.pt", "result.pt"]
    assert "`ckpt_dir` must hold what the run ends with, got no room for its student and its last state in" in (
        log.read_text()
    )
    told = json.loads((full / "model.json").read_text())
    assert (told["epoch"], told["saved"]) == (1, False)
    assert "File too large" in told["reason"]
    assert toys.same(torch.load(full / "result.pt"), torch.load(free / "result.pt"))
    text = log.read_text()
    assert text.count("The student was NOT saved to") >= 1
    for epoch in range(2, 6):
        assert f"epoch_0000{epoch}.pt was NOT saved: [Errno 27] File too large. The previous one is whole" in text
    toys.finish(toys.start(toys.train, full, resume=True))
    assert toys.same(torch.load(full / "result.pt"), torch.load(free / "result.pt"))


def test_a_student_that_could_not_be_saved_is_told_until_a_later_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, epochs=1)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr("medkd.handlers.checkpoint.save_atomically", fail)
        with pytest.raises(OSError, match="got no room for its student and its last state in"):
            run(tmp_path, epochs=2)
        told = json.loads((tmp_path / "model.json").read_text())
        assert (told["saved"], told["reason"], told["epoch"]) == (False, "disk full", 1)
        broken.setattr("medkd.handlers.atomic._write_atomically", fail)
        with pytest.raises(OSError, match="got no room for its student and its last state in"):
            run(tmp_path, epochs=2)
        assert names(tmp_path) == ["before_1", "before_2", "checkpoints", "model.pt"]   # nothing tells of success
    run(tmp_path, epochs=2)
    told = json.loads((tmp_path / "model.json").read_text())
    assert (told["saved"], told["epoch"], "reason" in told) == (True, 2, False)


def test_a_best_student_that_found_no_room_is_saved_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the later, worse one; and by a resumed run, too."""
    best: dict[str, Any] = {}

    def first_only(engine: Any) -> None:
        engine.state.best_metric, engine.state.best_metric_epoch = 1.0, 1

    def fill(engine: Any) -> None:
        best.update(toys.state_of(engine.network))
        (tmp_path / f".model.pt.{os.getpid()}.tmp").mkdir()        # no file of the name can be written

    def free(engine: Any) -> None:
        (tmp_path / f".model.pt.{os.getpid()}.tmp").rmdir()
        raise KeyboardInterrupt

    def run_with(event: Any, action: Any, **options: Any) -> toys.Run:
        whole = toys.Run(tmp_path, epochs=4, extra=[toys.on(event, action)], **options)
        whole.evaluator.add_event_handler(Events.EPOCH_COMPLETED, first_only)
        return whole

    broken = run_with(Events.EPOCH_COMPLETED(once=1), fill)
    broken.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=3), free)
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.run()
    assert "model.pt" not in names(tmp_path)
    run_with(Events.EPOCH_STARTED(once=4), lambda _: None, resume=True).trainer.run()
    assert toys.same(dict(load_tensors(tmp_path / "model.pt")), best)
    told = json.loads((tmp_path / "model.json").read_text())
    assert (told["epoch"], told["saved"], told["validation"]) == (1, True, {"val_mean_dice": 1.0})


def killed_while_saving(folder: Path, delay: float) -> list[str]:
    """Let a process save until `delay` seconds after its first checkpoint, kill it, and say what lies there."""
    before = {path.name for path in folder.glob("epoch_*.pt")}
    process = toys.start(toys.save_for_ever, folder.parent)
    try:
        while not {path.name for path in folder.glob("epoch_*.pt")} - before:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.kill()
        process.join()
    return names(folder)


def test_a_whole_checkpoint_is_there_after_each_of_fifty_kills(tmp_path: Path) -> None:
    folder, newest, torn = tmp_path / "checkpoints", 0, 0
    moments = random.Random(0)
    for _ in range(50):
        found = killed_while_saving(folder, moments.uniform(0.0, 0.06))
        torn += any(name.endswith(".tmp") for name in found)
        whole = [name for name in found if not name.endswith(".tmp")]
        assert whole                                               # more than two, when killed before old ones go
        for name in whole:
            content = load_tensors(folder / name)
            assert name == f"epoch_{content['epoch']:05d}.pt"
            assert bool((content["objects"]["network"]["ballast"] == content["epoch"]).all())
        assert content["epoch"] > newest                           # it went on from the last one
        newest = content["epoch"]
    assert torn > 0                                                # some kills came in the middle of a write
