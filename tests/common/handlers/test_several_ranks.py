# SPDX-License-Identifier: Apache-2.0
"""Two ranks with gloo: one student, one set of heads, one writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import toys


def train(folder: Path, weights: tuple[Path, Path], **options: Any) -> list[tuple[dict[str, Any], list[str]]]:
    """What each of two ranks ends with, and the cases that it saw."""
    folder.mkdir(exist_ok=True)
    (folder / "meeting_point").unlink(missing_ok=True)
    toys.finish(*(toys.start(toys.train_one_rank, rank, 2, folder, weights[rank], **options) for rank in range(2)))
    return [torch.load(folder / f"result_{rank}.pt") for rank in range(2)]


def test_ranks_end_with_one_student_and_one_head_and_only_the_first_writes(tmp_path: Path) -> None:
    mine, other = tmp_path / "of_rank_0", tmp_path / "of_rank_1"
    (first, seen_first), (second, seen_second) = train(tmp_path, (mine, other), epochs=2)
    for name in ("network", "distill_loss", "optimizer", "best_metric", "best_metric_epoch"):
        assert toys.same(first[name], second[name]), name
    assert all(bool(torch.isfinite(value).all()) for value in first["network"].values())
    assert not toys.same(first["distill_loss"]["1.projectors.0.weight"], toys.hint_loss().projectors[0].weight)
    assert set(seen_first[:2]).isdisjoint(seen_second[:2])
    assert set(seen_first) | set(seen_second) == {f"case_{index}.nii.gz" for index in range(4)}
    assert sorted(path.name for path in mine.iterdir()) == ["checkpoints", "model.json", "model.pt"]
    assert not other.exists()
    toys.student().load_state_dict(torch.load(mine / "model.pt"), strict=True)


def test_a_run_of_two_ranks_is_resumed_to_the_same_end_each_with_its_memory(tmp_path: Path) -> None:
    shared = tmp_path / "weights", tmp_path / "weights"
    whole = train(tmp_path / "whole", (tmp_path / "other", tmp_path / "other"), epochs=4, memory=True)
    train(tmp_path / "broken", shared, epochs=4, last=2, memory=True)
    content = torch.load(shared[0] / "checkpoints" / "epoch_00002.pt")
    assert [set(of_rank) for of_rank in content["memories"]] == [{"distill_loss"}] * 2   # the student is one
    resumed = train(tmp_path / "broken", shared, epochs=4, resume=True, memory=True)
    memories = [of_rank["distill_loss"]["2.bank.voxel_moments"] for of_rank, _ in whole]
    assert (memories[0] != memories[1]).flatten(1).any(1).all()    # no rank has an image of the other
    heads = [of_rank["distill_loss"]["2.projections.0.weight"] for of_rank, _ in whole]
    assert torch.equal(*heads)
    for (before, cases), (after, later_cases) in zip(whole, resumed, strict=True):
        assert toys.same(before, after)
        assert later_cases == cases[len(later_cases) :]


def test_all_ranks_end_where_the_first_finds_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    ranks = [toys.start(toys.train_one_rank, rank, 2, tmp_path, tmp_path / "weights") for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [1, 1]


TWO_HEADS = """
import torch
import toys
from medkd.handlers.distillation import DistillationHandler
from medkd.losses.base import DistillationLoss

class TwoHeads(DistillationLoss):
    terms = ("one", "two")

    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleDict({term: torch.nn.Conv2d(2, 2, 1) for term in self.terms})

    def compute_terms(self, student, teacher, label):
        return {term: self.heads[term](student["pred"]).square().mean() for term in self.active_terms}

torch.distributed.init_process_group("gloo", f"file://{folder}/meeting_point", rank=0, world_size=1)
loss, network = TwoHeads(), toys.student()
before = toys.state_of(loss)
handler = DistillationHandler(toys.Bright(), loss, {"one": 1.0})
toys.make_trainer(network, [handler], parameters=[*network.parameters(), *loss.parameters()]).run()
changed = [name for name, value in loss.state_dict().items() if not torch.equal(value, before[name])]
assert changed == ["heads.one.weight", "heads.one.bias"], changed
torch.distributed.destroy_process_group()
"""


def test_a_head_that_no_term_uses_does_not_stop_a_rank(tmp_path: Path) -> None:
    toys.finish(toys.start(exec, TWO_HEADS, {"folder": str(tmp_path)}))
