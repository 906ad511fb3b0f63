# SPDX-License-Identifier: Apache-2.0
"""A toy bundle whose trainings take no time, as what the lab does with it is tested, not the training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.bundle import BundleRun
from lab.execute import Executor
from lab.recipe import Arm, Recipe, Row
from lab.training import Study

ARMS = {
    "teacher": Arm(("teacher",), seeds=1),
    "student_alone": Arm(("baseline",)),
    "logits_kd": Arm(candidates={"uniform": Arm(("logits",)), "foreground": Arm(("logits",), {"weighting": "f"})}),
    "method": Arm(("method",)),
    "combined": Arm(),
}
TRAIN = {
    "epochs": 9, "val_interval": 3, "batch_size": 1, "value": 0.5, "weighting": "u", "unused": 1,
    "teacher_path": "t", "ckpt_dir": "c", "output_dir": "o", "datalist": "d", "seed": 0, "network_def": {"width": 2},
    "teacher_def": {"width": 4},
    "teacher": {"_target_": "medkd.handlers.teacher.Teacher", "network": "@teacher_def", "path": "@teacher_path"},
    "distill_loss": {"_target_": "medkd.losses.some.Loss"}, "distill_weights": {"x": 1.0, "y": 2.0},
    "validate": {"evaluator": {"value": "@value"}, "teacher_evaluator": {"value": "@weighting"}},
    "train": {
        "handlers": [
            {"_target_": "medkd.handlers.distillation.DistillationHandler", "teacher": "@teacher",
             "loss": "@distill_loss", "weights": "@distill_weights", "validator": "@validate#teacher_evaluator"},
            {"evaluator": "@validate#evaluator", "ckpt_dir": "@ckpt_dir"},
        ],
        "trainer": {"epochs": "@epochs", "network": "@network_def", "seed": "@seed", "handlers": "@train#handlers",
                    "weighting": "@weighting"},
    },
    "initialize": [], "training": ["$@train#trainer.run()"],
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "teacher": {"distill_weights": {}, "network_def": "@teacher_def", "epochs": 20},
    "baseline": {"distill_weights": {"x": 0.0}},
    "logits": {"distill_weights": {"x": 1.0}, "distill_loss": {"_target_": "medkd.losses.plain.Plain"}},
    "method": {"distill_weights": {"x": 2.0}},
    "evaluate": {"score_columns": "case", "evaluating": ["$@validate#evaluator.run()"]},
}
CODE = {
    "losses/some.py": "from medkd.ops import other\n\n\nclass Loss:\n    x = 1\n",
    "losses/plain.py": "class Plain:\n    pass\n",
    "handlers/teacher.py": "class Teacher:\n    pass\n",
    "handlers/distillation.py": "class DistillationHandler:\n    pass\n",
    "ops/other.py": "y = 1\n",
}
# stands for a training: leaves weights, a description and a count of how often it ran
FAKE = """
import json, sys, time
from pathlib import Path
options = json.loads(sys.argv[1])
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
description = {"saved": True, "epoch": 3, "validation": {"dice": value}}
(folder / "model.json").write_text(json.dumps(options.get("description", description)))
"""


def write_bundle(folder: Path, train: dict[str, Any] | None = None, **changed: str) -> Path:
    """A copy of a toy bundle with its medkd; `changed` are files of the package, `losses__some` for losses/some.py."""
    for name, content in {"train": train or TRAIN, **OVERRIDES}.items():
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content))
    code = CODE | {f"{name.replace('__', '/')}.py": text for name, text in changed.items()}
    for name, text in code.items():
        file = folder / "package" / "medkd" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """Makes studies of a toy row, all of whose runs lie in one folder; later arguments replace fields."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [{"image": "fake.py"}], "validation": []}))
    command = [sys.executable, str(tmp_path / "fake.py")]
    monkeypatch.setattr(BundleRun, "words", lambda run: [*command, json.dumps(run.options)])

    def make(source: Path | None = None, workers: int = 1, row: Row | None = None, **recipe: Any) -> Study:
        source = source or write_bundle(tmp_path / "source")
        told = {"metric": "dice", "higher_is_better": True, "default": "a", "distilled_from": ("method", "combined")}
        whole = Recipe(**{**told, "arms": ARMS, **recipe})
        return Study(
            whole, row or Row("a", arms=whole.arms), source, tmp_path / "runs", tmp_path / "datalist.json",
            Executor(), workers,
        )

    return make


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    """A study of the toy row."""
    return make_study()
