# SPDX-License-Identifier: Apache-2.0
"""What a step leaves for MONAI's logging handlers."""

from __future__ import annotations

from pathlib import Path

import pytest
from monai.handlers.metrics_saver import MetricsSaver
from monai.handlers.tensorboard_handlers import TensorBoardStatsHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toys
from medkd.handlers.distillation import DistillationHandler
from medkd.handlers.records import case_meta, step_losses
from medkd.losses.logits import SoftLabelLoss


@pytest.mark.parametrize("decollate", [True, False])
def test_the_losses_of_a_step_are_numbers_decollated_or_not(decollate: bool) -> None:
    handler = DistillationHandler(toys.Bright(), SoftLabelLoss(), {"logits": 0.5})
    engine = toys.make_trainer(toys.student(), [handler], epochs=1, decollate=decollate)
    engine.run()
    losses = step_losses(engine.state.output)
    assert list(losses) == ["kd/logits", "loss", "supervised_loss"]
    assert losses["loss"] == pytest.approx(losses["supervised_loss"] + 0.5 * losses["kd/logits"], rel=1e-6)


def test_plain_training_has_its_loss_alone() -> None:
    engine = toys.make_trainer(toys.student(), epochs=1)
    engine.run()
    assert list(step_losses(engine.state.output)) == ["loss"]


def test_each_term_is_a_curve_of_its_own_in_tensorboard(tmp_path: Path) -> None:
    handler = DistillationHandler(toys.Bright(), SoftLabelLoss(), {"logits": 0.5})
    curves = TensorBoardStatsHandler(log_dir=str(tmp_path), tag_name="train", output_transform=step_losses)
    toys.make_trainer(toys.student(), [handler, curves], epochs=2).run()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"kd/logits", "loss", "supervised_loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("kd/logits")) == 4


def test_case_names_reach_the_metrics_report(tmp_path: Path) -> None:
    engine = toys.make_evaluator(toys.student())
    MetricsSaver(str(tmp_path), metric_details="*", batch_transform=case_meta, summary_ops=None).attach(engine)
    engine.run()
    rows = (tmp_path / "val_mean_dice_raw.csv").read_text().splitlines()
    assert [row.split(",")[0].split("\t")[0] for row in rows[1:3]] == ["case_0.nii.gz", "case_1.nii.gz"]
