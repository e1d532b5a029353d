# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a language model in little memory, on a tiny one."""

from __future__ import annotations

import pytest

from fused_ewclora.benchmarks import large_model


@pytest.mark.parametrize("structure", large_model.STRUCTURES)
def test_two_tasks(structure: str, monkeypatch: pytest.MonkeyPatch):
    """Both tasks run with every structure; the penalty acts in the second, and the Fisher has its size."""
    monkeypatch.setattr(large_model, "GATHERED_BYTES", 1 << 16)
    record = large_model.run("tiny", structure, samples=2, tokens=8, rank=4)
    assert "failed" not in record and record["adapters"] == 14
    assert record["penalty of the first task"] == 0.0 < record["penalty of the second task"]
    share = record["fisher_bytes"] / record["weights"]  # narrow rows are padded
    assert share == 4.0 if structure == "dense" else share < 1.6
    assert list(record["seconds"])[-1] == "second task, Fisher pass and merge"


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch):
    """What does not fit says where it failed."""

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(large_model.fe.EWC, "end_task", fails)
    record = large_model.run("tiny", "factored", samples=1, tokens=8, rank=4)
    assert record["failed"] == "out of memory in: first task, Fisher pass and merge"
