# SPDX-License-Identifier: Apache-2.0
"""Cost of layer feedback distillation: in a training step, alone, and of its unified feature term with all its memory.

Sizes are those of five-level U-Nets on a patch of 96 x 96 x 96 voxels: student 16 to 160 channels, teacher 32 to 320.
Steps use two threads, single terms one. The released formulas are a literal port (`tests/oracles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lab.bench.dynunets import STUDENT, TEACHER, DynUNets, Filters
from lab.bench.peers import against, both_ways, memory_rows
from lab.measure import Row, compare
from medkd.losses.class_heads import ClassHeads, TeacherHeads
from medkd.losses.layer_feedback import LayerFeedbackLoss
from medkd.ops.attention import (
    attention_distance,
    attention_map,
    largest_magnitude,
    resized_attention_map,
    unified_attention_map,
)
from medkd.ops.resample import pool_average
from tests.oracles import layer_feedback as plain

CLASSES = 2
ENCODER = ["input_block", "downsamples.0", "downsamples.1", "downsamples.2", "bottleneck"]
DECODER = [f"upsamples.{n}" for n in range(4)]
TERMS = ("ufd", "ifd", "upd", "ipd")
KEPT = 10.0                # MiB for backward beyond the taps, and of the peak beyond 1.2 student taps


def _loss(filters: Filters) -> LayerFeedbackLoss:
    """The default preset with heads of first values; the teacher's come from a file, as in a training."""
    student, teacher = (list(counts[3::-1]) for counts in filters)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "heads.pt"
        torch.save(ClassHeads(teacher[:3], CLASSES, seed=1).state_dict(), path)
        heads = ClassHeads(student, CLASSES), TeacherHeads(teacher[:3], CLASSES, path)
        loss = LayerFeedbackLoss(ENCODER, DECODER, heads=heads)
        loss.activate(TERMS)
    return loss


def _setting(quick: bool) -> DynUNets:
    return DynUNets(quick, CLASSES, _loss, _ball)


def _ball(size: int) -> Tensor:
    """A ball in the middle, (1, 1, S, S, S)."""
    axis = torch.linspace(-1.0, 1.0, size)
    squares = (axis.view(-1, 1, 1).square(), axis.view(1, -1, 1).square(), axis.view(1, 1, -1).square())
    return (sum(squares, start=torch.zeros(())) < 0.1).long()[None, None]


def training_step(quick: bool) -> list[Row]:
    """Compare a step with all terms with what it cannot do without."""
    return _setting(quick).training_step("all four terms")


def loss_share(quick: bool) -> list[Row]:
    """Time the loss alone against the student's forward and backward pass."""
    return _setting(quick).loss_share("all four terms")


# ---- the unified feature term: 448 channels of the teacher, and the largest layer of the student ------------------


def _unified(quick: bool) -> tuple[Tensor, list[Tensor]]:
    """The student's e1 and the teacher's e2, e3, e4; in the quick mode a third of the size."""
    torch.manual_seed(0)
    size = 32 if quick else 96
    levels = [torch.randn(1, c, *[size // stride] * 3) for c, stride in zip(TEACHER[1:4], (2, 4, 8), strict=True)]
    return torch.randn(1, STUDENT[0], *[size] * 3, requires_grad=True), levels


def _pooled(student: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """`ufd` of preset `default`, (B,)."""
    target = unified_attention_map(levels)
    mine = attention_map(student, 4.0, largest_magnitude(student))
    return attention_distance(pool_average(mine, target.shape[2:]), target)


def _resized(student: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """`ufd` of preset `paper`, (B,)."""
    target = resized_attention_map(levels, student.shape[2:])
    return attention_distance(attention_map(student, 4.0, largest_magnitude(student)), target)


def _literal(student: Tensor, levels: Sequence[Tensor]) -> Tensor:
    return plain.unified_features(student, levels)[None]


UNIFIED = {"default": _pooled, "paper": _resized}


def unified_memory(quick: bool) -> list[Row]:
    """Give what is kept for backward beyond the taps, and the peak with the student's gradient; also of the port."""
    student, levels = _unified(quick)
    rows = []
    for name, function in {**UNIFIED, "literal": _literal}.items():
        words, goal = f"{name}, {student.shape[-1]}^3", KEPT if name in UNIFIED else None
        rows += memory_rows(("unified", name), words, partial(function, levels=levels), student, goal)
    return rows


def unified_time(quick: bool) -> list[Row]:
    """Compare with the literal port, forward and backward: the same value and gradient in preset `paper`."""
    student, levels = _unified(quick)
    pairs = 2 if quick else 5
    words = f"channels in blocks, {student.shape[-1]}^3", f"literal port, {student.shape[-1]}^3"
    functions = partial(_resized, levels=levels), partial(_literal, levels=levels)
    rows = against("unified_paper", words, functions, student, pairs)
    works = tuple(partial(both_ways, partial(one, levels=levels), student) for one in (_pooled, _literal))
    words = f"one channel, on the coarser grid, {student.shape[-1]}^3", words[1]
    return rows + compare("unified_default", words, works, pairs)   # type: ignore[arg-type]


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    measure.__name__: measure for measure in (training_step, loss_share, unified_memory, unified_time)
}
