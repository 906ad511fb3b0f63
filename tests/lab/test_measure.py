# SPDX-License-Identifier: Apache-2.0
"""Memory as the bench counts it: the largest sum, and what a result keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lab.measure import cpu_dtype, kept_memory, peak_memory

COUNT = 2**18     # numbers in a MiB of float32


def test_the_peak_counts_what_is_there_at_once_and_the_rest_is_what_stays() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(COUNT)
        second = torch.ones(2 * COUNT)
        return first + second[:COUNT]

    assert peak_memory(work) == pytest.approx(4.0, abs=0.01)
    assert kept_memory(work) == pytest.approx(1.0, abs=0.01)


def test_a_graph_keeps_what_it_needs_for_backward() -> None:
    leaf = torch.rand(COUNT, requires_grad=True)
    assert kept_memory(lambda: leaf.exp().sum()) == pytest.approx(1.0, abs=0.01)
    assert kept_memory(lambda: leaf.detach().exp().sum()) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(("flags", "dtype"), [
    ("flags : fpu avx512f avx512_bf16", "bfloat16"), ("flags : fpu avx512f", "float32"), (None, "float32"),
])
def test_bfloat16_is_taken_only_where_the_processor_multiplies_it(
    tmp_path: Path, flags: str | None, dtype: str
) -> None:
    file = tmp_path / "cpuinfo"
    if flags:
        file.write_text(flags)
    assert cpu_dtype(file) == dtype
