# SPDX-License-Identifier: Apache-2.0
"""Jobs are done once, go on where they were, wait for each other, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.execute import ExecutionError, Executor, Job, StoppedError, last_lines, read_state, write_json

FAR = {"epoch": 1, "epochs": 1, "step": 1, "steps": 4, "done": False}


def make_job(folder: Path, *codes: str, key: str = "0", **more: Any) -> Job:
    commands = [[sys.executable, "-c", code] for code in codes]
    return Job("one step", folder / "job", key, commands, folder, [folder / "made"], **more)


def test_a_finished_job_is_left_until_its_key_changes_or_its_files_are_gone(tmp_path: Path) -> None:
    code = "open('made', 'x').close(); open('runs', 'a').write('x')"
    executor = Executor()

    ran = [executor.do(make_job(tmp_path, code, key=key)) for key in "001"]
    (tmp_path / "made").unlink()
    ran.append(executor.do(make_job(tmp_path, code, key="1")))

    assert ran == [True, False, True, True]
    assert (tmp_path / "runs").read_text() == "xxx"
    state = read_state(tmp_path / "job" / "run.json")
    assert state.keys() == {"key", "command", "seconds", "done"}
    assert "python -c" in state["command"]


def test_a_failing_job_shows_the_last_lines_of_this_attempt_and_is_not_finished(tmp_path: Path) -> None:
    job = make_job(tmp_path, "print('x\\n' * 50); raise SystemExit('the cause')")

    for _ in range(2):
        with pytest.raises(ExecutionError, match=r"'one step' failed with exit code 1[\s\S]*the cause") as error:
            Executor().do(job)
        assert str(tmp_path / "job" / "log.txt") in str(error.value)
        assert str(error.value).count("\nx") < 15
    assert not job.is_done
    assert job.log.read_text().count("the cause") == 2


def test_a_job_that_leaves_less_than_was_asked_for_has_failed(tmp_path: Path) -> None:
    job = make_job(tmp_path, "open('made', 'w')", check=lambda: "no validation.")
    with pytest.raises(ExecutionError, match=r"'one step' failed: no validation. See .*log.txt"):
        Executor().do(job)
    assert not job.is_done
    assert Executor().do(replace(job, check=lambda: ""))


def test_an_interrupted_training_goes_on_and_a_changed_one_starts_anew(tmp_path: Path) -> None:
    code = "import sys, pathlib, time; folder = pathlib.Path('checkpoints'); folder.mkdir(exist_ok=True)\n"
    code += "time.sleep(0.2)\n"                                     # a tenth of a second is what is told
    code += "(folder / 'epoch_1.pt').touch(); pathlib.Path('made').touch(); sys.exit('--resume' not in sys.argv)"
    said: list[str] = []

    def job(key: str) -> Job:
        return make_job(tmp_path, code, key=key, checkpoints=tmp_path / "checkpoints")

    for key in "01":
        with pytest.raises(ExecutionError):
            Executor().do(job(key), said.append)
    first = job("1").seconds
    assert Executor().do(job("1"), said.append)

    assert said == ["starts", "starts", "goes on"]
    assert "--resume True" in job("1").state["command"]
    assert job("1").seconds > first > 0                            # of all attempts
    assert not (tmp_path / "checkpoints").exists()                 # nothing goes on from a finished run


def test_progress_is_read_from_the_files_of_the_commands(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []
    tell = f"import json, time; json.dump({FAR}, open('p', 'w')); time.sleep(1.2); open('made', 'w')"
    job = make_job(tmp_path, "import time; time.sleep(0.7)", tell, progress=[tmp_path / "none", tmp_path / "p"])

    Executor().do(job, watch=lambda number, progress: seen.append((number, progress)))

    assert (0, {}) in seen
    assert (1, FAR) in seen


def test_an_interruption_of_a_single_command_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            raise subprocess.TimeoutExpired("", 0)
        monkeypatch.undo()
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Executor().do(make_job(tmp_path, code))

    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert make_job(tmp_path, code).seconds > 0


def test_a_job_is_looked_at_often_and_noted_seldom(tmp_path: Path) -> None:
    written: list[int] = []
    note = tmp_path / "job/run.json"

    Executor().do(make_job(tmp_path, "import time; time.sleep(2.2); open('made', 'w')"),
                  watch=lambda *_: written.append(note.stat().st_mtime_ns))

    assert len(written) >= 3
    assert len(set(written)) == 1
    assert make_job(tmp_path, "").seconds > 2                      # at the end it is


def test_stopping_ends_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    executor, begun = Executor(), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            executor.do(make_job(tmp_path, "import time; time.sleep(60)"), watch=lambda *_: begun.set())
        except StoppedError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(30)
    executor.stop()
    thread.join(30)

    assert len(failures) == 1
    with pytest.raises(StoppedError):
        executor.do(make_job(tmp_path / "other", "pass"))


def test_a_folder_that_another_process_works_in_is_waited_for(tmp_path: Path) -> None:
    waiting = threading.Event()

    def work() -> None:
        with Executor().locked(tmp_path / "run", waiting.set):
            (tmp_path / "second").touch()

    second = threading.Thread(target=work)
    with Executor().locked(tmp_path / "run"):
        second.start()
        assert waiting.wait(30)
        assert not (tmp_path / "second").exists()
    second.join(30)

    assert (tmp_path / "second").exists()


def test_a_lock_outlives_a_killed_parent_as_long_as_its_command_runs(tmp_path: Path) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import sys; from pathlib import Path; from lab.execute import Executor, Job; folder = Path(sys.argv[1])\n"
        f"job = Job('x', folder / 'job', '0', [[sys.executable, '-c', {code!r}]], folder)\n"
        "Executor().do(job, watch=lambda *_: (folder / 'pid').exists() and sys.stdout.write('x\\n'))"
    )
    process = subprocess.Popen([sys.executable, "-uc", parent, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    executor, said = Executor(), []

    def give_up() -> None:
        said.append("waits")
        executor.stop()

    try:
        with pytest.raises(StoppedError), executor.locked(tmp_path / "job", give_up):
            pass
        assert said == ["waits"]
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_the_end_of_a_log_leaves_out_what_a_bar_wrote_over() -> None:
    assert last_lines("first\nbar 1\rbar 2\r\n\nError: why\n", 2) == "bar 2\nError: why"


def test_half_a_file_is_no_state(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_state(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_text('{"a"')
    assert read_state(tmp_path / "a.json") == read_state(tmp_path / "absent.json") == {}
